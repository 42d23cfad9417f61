"""Runtimes that are timed against each other: their models and exports, and one process each.

All peers answer in turn, so that a machine that speeds up or slows down moves them all; ratios are medians of the
ratios within a round. Each timed call follows an untimed one, in the process that answers (`worker.py`). Who waits is
stopped: idle threads of a runtime may spin (OpenMP's do under OMP_WAIT_POLICY=ACTIVE), which doubles the others' times.
"""

from __future__ import annotations

import atexit
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.model import SHAPES, make_model, random_text

PROMPT_TOKENS, NEW_TOKENS = 512, 65
BUDGET = 0.5


@dataclass
class Peer:
    """A process under test and what it answered."""

    name: str
    process: subprocess.Popen[str]
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def call(self, prompt: list[int], keep: bool) -> None:
        """Time the prompt and the tokens after it; `keep` notes the times."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"prompt": prompt, "new_tokens": NEW_TOKENS}) + "\n")
        self.process.stdin.flush()
        self.last = json.loads(self.process.stdout.readline())
        self.process.send_signal(signal.SIGSTOP)
        if keep:
            self.prefill_s.append(self.last["prefill"])
            self.decode_s.append(self.last["decode"] / (NEW_TOKENS - 1))

    def stop(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def start(name: str, interpreter: str = sys.executable, **spec: Any) -> Peer:
    """Start a worker and wait until it has loaded its model; it is stopped until it is asked."""
    command = [interpreter, "-m", "benchmarks.worker", json.dumps(spec, default=str)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if json.loads(process.stdout.readline() or "null") != "ready":
        raise SystemExit(f"{name}: did not start")
    process.send_signal(signal.SIGSTOP)
    atexit.register(process.kill)  # a stopped process does not see its input end
    return Peer(name, process)


def time_in_turn(peers: Iterable[Peer], rounds: int) -> None:
    """Rounds in which every peer answers the same random prompt; the first round warms up."""
    prompt = np.random.default_rng(0).integers(0, SHAPES["small"]["vocab_size"], PROMPT_TOKENS).tolist()
    everyone = list(peers)
    for number in range(rounds + 1):
        for peer in everyone:
            peer.call(prompt, keep=number > 0)


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Time over the base's time: median over rounds."""
    return statistics.median(s / b for s, b in zip(seconds, base, strict=True))


def prepare(work: Path, gates: Iterable[str]) -> None:
    """Models and float32 exports, dense and with gates at `BUDGET`, as far as they are not there yet."""
    from gsx.workflows.export import export

    work.mkdir(parents=True, exist_ok=True)
    text = random_text(work / "text.txt", SHAPES["small"]["vocab_size"])
    for gate in (None, *gates):
        name = gate or "dense"
        if not (work / f"gsx-{name}").exists():
            model = make_model(work / f"model-{name}", "small", gate)
            options: dict[str, Any] = {"budget": BUDGET, "calibration": text} if gate else {}
            export(model, work / f"gsx-{name}", **options)


def prepare_genai(work: Path, output: Path, precision: Literal["fp32", "int8"]) -> None:
    """ONNX Runtime GenAI's own export of the dense model, if it is not there yet."""
    if not output.exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        paths = ["-i", str(work / "model-dense"), "-o", str(output), "-c", str(work / "cache")]
        subprocess.run([*builder, *paths, "-p", precision, "-e", "cpu"], check=True, stdout=subprocess.DEVNULL)


def prepare_llama(work: Path, interpreter: str) -> dict[str, Path]:
    """The dense model as llama.cpp reads it, by type, as far as it is not there yet (`llama.py`)."""
    paths = {kind: work / f"dense-{kind}.gguf" for kind in ("F32", "Q8_0")}
    for kind, path in paths.items():
        if not path.exists():
            command = [interpreter, "-m", "benchmarks.llama", str(work / "model-dense"), str(path), "--type", kind]
            subprocess.run(command, check=True)
    return paths


def start_llama(name: str, interpreter: str, path: Path, threads: int, *, exact: bool = False) -> Peer:
    """llama.cpp on one of those files; `exact` computes in float32 throughout, to compare tokens."""
    context = PROMPT_TOKENS + NEW_TOKENS
    return start(name, interpreter, kind="llama", path=path, threads=threads, context=context, exact=exact)
