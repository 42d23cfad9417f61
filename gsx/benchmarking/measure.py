"""Times forms in turn: one process for each bundle, all forms in each round, one shape of calls after the other."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from gsx.benchmarking.forms import Form
from gsx.benchmarking.process import Worker
from gsx.benchmarking.rounds import in_turn
from gsx_plugins.progress import OnProgress, Progress

MODULE = "gsx.benchmarking.worker"


@dataclass(frozen=True, order=True)
class Shape:
    """Calls of one shape: a batch of prompts of one length."""

    batch: int
    prompt_tokens: int

    def __str__(self) -> str:
        return f"{self.prompt_tokens} tokens" + (f" x {self.batch}" if self.batch > 1 else "")


# One timed answer of each round, as `worker.py` gives it, by form.
Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def gsx_worker(name: str, **spec: Any) -> Worker:
    """A process with a bundle. Args: name: for messages; spec: as `gsx.benchmarking.worker.load` takes it."""
    return Worker(name, [sys.executable, "-m", MODULE, json.dumps(spec, default=str)])


def time_forms(
    forms: Sequence[Form],
    prompts: Mapping[Shape, Sequence[list[list[int]]]],
    specs: Sequence[Mapping[str, Any]],
    *,
    new_tokens: int,
    rounds: int,
    seconds: float,
    on_progress: OnProgress,
) -> dict[Shape, Answers]:
    """Time all forms at all shapes.

    Args:
        prompts: for each shape, the prompts of each bundle; small shapes first, since peak memory never falls.
        specs: what each bundle's worker runs.
        rounds: counted rounds of a shape at most.
        seconds: when to stop: each shape may take its part of the time that is left, and has one round at least.
    Returns: the answers by shape; shapes for which no time was left are missing.
    """
    began = time.monotonic()
    found: dict[Shape, Answers] = {}
    with ExitStack() as stack:
        workers = {}
        for number, (bundle, draft) in enumerate(dict.fromkeys(form.process for form in forms)):
            on_progress(Progress("loading", number, len({form.process for form in forms})))
            spec = {**specs[bundle], "draft": draft}
            workers[bundle, draft] = stack.enter_context(gsx_worker(f"bundle {spec['bundle']}", **spec))
        by_name = {form.name: form for form in forms}
        for place, (shape, ids) in enumerate(prompts.items()):
            now = time.monotonic()
            if found and now - began >= seconds:
                break
            until = now + (seconds - (now - began)) / (len(prompts) - place)
            asked = 0

            def ask(name: str, shape: Shape = shape, ids: Sequence[list[list[int]]] = ids) -> Any:
                nonlocal asked
                on_progress(Progress(f"timing {shape}", asked, (rounds + 1) * len(forms), name))
                asked += 1
                form = by_name[name]
                request = {"prompts": ids[form.bundle], "new_tokens": new_tokens, "keep": vars(form.keep)}
                return workers[form.process].ask(request)

            def goes_on(until: float = until) -> bool:
                return time.monotonic() < until

            found[shape] = in_turn(by_name, ask, rounds, goes_on)
    return found
