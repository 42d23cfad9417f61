"""Runtimes that are timed against each other: gsx, ONNX Runtime GenAI and llama.cpp, in one process each.

All peers answer the same prompt in turn. Each timed call follows an untimed one, in the process that answers
(`worker.py`). A peer that waits is stopped: the idle threads of a runtime may spin (OpenMP's do under
OMP_WAIT_POLICY=ACTIVE), which doubles the time of the others.
"""

from __future__ import annotations

import atexit
import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.bundles import Workshop
from benchmarks.measure import in_turn

PROMPT_TOKENS, NEW_TOKENS = 512, 65


@dataclass(frozen=True)
class Answer:
    """One timed call of a peer.

    Args:
        prefill: seconds to the first token; decode: seconds per token after it.
        tokens: the generated tokens.
        kept: the share of skippable branches that ran; None if nothing is skipped.
        peak_mb: the process's peak memory.
    """

    prefill: float
    decode: float
    tokens: list[int]
    kept: float | None
    peak_mb: float


class Peer:
    """A runtime with its model, in a process that is stopped until it is asked.

    Args:
        name: as in the tables.
        interpreter: Python of the environment that the runtime is installed in.
        spec: what the worker runs.
    """

    def __init__(self, name: str, interpreter: str = sys.executable, **spec: Any) -> None:
        command = [interpreter, "-m", "benchmarks.worker", json.dumps(spec, default=str)]
        self.name = name
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if json.loads(self._process.stdout.readline() or "null") != "ready":
            raise SystemExit(f"{name}: did not start")
        self._process.send_signal(signal.SIGSTOP)
        atexit.register(self._process.kill)  # a stopped process does not notice the end of its input

    def ask(self, prompt: list[int]) -> Answer:
        """Time a prompt and the tokens after it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"prompt": prompt, "new_tokens": NEW_TOKENS}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        self._process.send_signal(signal.SIGSTOP)
        answer["decode"] /= NEW_TOKENS - 1
        return Answer(**answer)

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        self._process.wait()


def random_prompt(workshop: Workshop) -> list[int]:
    """The prompt that all peers get: random tokens of the benchmark model."""
    found: list[int] = np.random.default_rng(0).integers(0, workshop.sizes["vocab_size"], PROMPT_TOKENS).tolist()
    return found


def time_in_turn(peers: Mapping[str, Peer], prompt: list[int], rounds: int) -> dict[str, list[Answer]]:
    """Answers of all peers by name, one per round; the peers are stopped afterwards."""
    found = in_turn(peers, lambda name: peers[name].ask(prompt), rounds)
    for peer in peers.values():
        peer.stop()
    return found


def genai_model(workshop: Workshop, precision: Literal["fp32", "int8"]) -> Path:
    """ONNX Runtime GenAI's own export of the dense model, made once."""
    output = workshop.directory / f"genai-{precision}"
    if not output.exists():
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(workshop.model())]
        command += ["-o", str(output), "-c", str(workshop.directory / "cache"), "-p", precision, "-e", "cpu"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return output


def llama_model(workshop: Workshop, interpreter: str, kind: Literal["F32", "Q8_0"]) -> Path:
    """The dense model as llama.cpp reads it, made once. Args: interpreter: Python of the environment of `llama.py`."""
    path = workshop.directory / f"dense-{kind}.gguf"
    if not path.exists():
        command = [interpreter, "-m", "benchmarks.llama", str(workshop.model()), str(path), "--type", kind]
        subprocess.run(command, check=True)
    return path


def llama_peer(name: str, interpreter: str, path: Path, threads: int, *, exact: bool = False) -> Peer:
    """llama.cpp on one of those files; `exact` computes in float32 throughout, to compare tokens."""
    context = PROMPT_TOKENS + NEW_TOKENS
    return Peer(name, interpreter, kind="llama", path=path, threads=threads, context=context, exact=exact)
