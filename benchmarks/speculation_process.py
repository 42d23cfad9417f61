"""What `benchmarks.speculation` measures in separate processes: memory, and transformers' own speculation.

`python -m benchmarks.speculation_process SPEC`; SPEC and the answer are JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import timed
from gsx.benchmarking.rounds import repeated

Spec = dict[str, Any]


def ask(kind: str, **spec: Any) -> dict[str, float]:
    """Run one of `KINDS` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speculation_process", json.dumps({"kind": kind, **spec}, default=str)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def plain_memory(spec: Spec) -> dict[str, float]:
    """Memory after plain decoding. Args: spec: bundle, threads, number of prompt tokens and of new tokens."""
    from gsx_engines.bundle.bundle import open_bundle
    from gsx_engines.generation.generate import generate
    from gsx_engines.runners.select import open_runner

    runner = open_runner(open_bundle(spec["bundle"]), spec["threads"])
    generate(runner, [_prompt(spec)], max_new_tokens=spec["new_tokens"], stop_ids=[])
    return {"mb": resident_mb()}


def speculative_memory(spec: Spec) -> dict[str, float]:
    """Memory after decoding with the bundle's own draft."""
    from gsx_engines.bundle.bundle import open_bundle
    from gsx_engines.generation.generate import generate
    from gsx_engines.speculation.draft import open_draft

    bundle = open_bundle(spec["bundle"])
    assert bundle.manifest.draft is not None
    draft = open_draft(bundle, bundle.manifest.draft.draft, spec["threads"])
    options: dict[str, Any] = {"max_new_tokens": spec["new_tokens"], "stop_ids": []}
    generate(draft.runner, [_prompt(spec)], draft=draft, draft_length=4, **options)
    return {"mb": resident_mb()}


def hugging_face(spec: Spec) -> dict[str, float]:
    """Tokens per second of transformers, greedy, batch 1, with its K/V cache: plain, and drafting with an exit.

    Args: spec: model, exit, prompts, threads, new tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts = iter([spec["prompts"][0], *spec["prompts"]])  # the first one warms up

    def one_round() -> tuple[float, float]:
        ids = torch.tensor([next(prompts)])
        options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": spec["new_tokens"]}
        options["do_sample"] = False
        plain = timed(lambda: model.generate(ids, **options))
        return plain, timed(lambda: model.generate(ids, assistant_early_exit=spec["exit"], **options))

    seconds = repeated(one_round, len(spec["prompts"]))
    tokens = spec["new_tokens"] * len(seconds)
    return {"plain": tokens / sum(one[0] for one in seconds), "speculative": tokens / sum(one[1] for one in seconds)}


def resident_mb() -> float:
    """Memory of this process in MB: its own, and its share of shared memory."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name] = float(value) / 1024
    return found["Pss:"]


def _prompt(spec: Spec) -> list[int]:
    return [int(one) for one in np.random.default_rng(0).integers(3, spec["vocabulary"], (spec["tokens"],))]


KINDS: dict[str, Callable[[Spec], dict[str, float]]] = {
    "plain": plain_memory,
    "speculative": speculative_memory,
    "hugging face": hugging_face,
}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(KINDS[asked["kind"]](asked)))
