"""Runtimes that are timed against each other: gsx, ONNX Runtime GenAI and llama.cpp, in one process each.

All peers answer the same prompt in turn. Each timed call follows an untimed one, in the process that answers, which
stands still while others do (`gsx/benchmarking/process.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gsx
import gsx_plugins
from benchmarks.bundles import Workshop
from gsx.benchmarking.measure import gsx_worker
from gsx.benchmarking.process import Worker
from gsx.benchmarking.rounds import in_turn
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings

PROMPT_TOKENS, NEW_TOKENS = 512, 65
# Precision of GenAI's builder, and its options for another form of it.
GENAI_FORMS = {
    "fp32": ("fp32", ()),
    "int8": ("int8", ()),
    "int4": ("int4", ()),
    "int4 zero points": ("int4", ("is_symmetric=false", "shared_embeddings=false")),
    "int4 k-quant": ("int4", ("algo_config=k_quant",)),
    "int4 k-quant mixed": ("int4", ("algo_config=k_quant_mixed",)),
}


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


@dataclass(frozen=True)
class Peer:
    """A runtime with its model, in a process that is stopped until it is asked. Args: keep: settings of a bundle."""

    worker: Worker
    keep: KeepSettings = AS_EXPORTED

    def ask(self, prompt: list[int], new_tokens: int = NEW_TOKENS) -> Answer:
        """Time a prompt and the tokens after it."""
        found = self.worker.ask({"prompts": [prompt], "new_tokens": new_tokens, "keep": vars(self.keep)})
        return Answer(found["first"], found["token"], found["tokens"][0], found.get("kept"), found["peak_mb"])

    def logits(self, ids: np.ndarray, file: Path) -> np.ndarray:
        """Logits [S, V] of token ids [S], for peers other than gsx. Args: file: to exchange them through."""
        self.worker.ask({"ids": ids.tolist(), "file": str(file)})
        found: np.ndarray = np.load(file)
        return found


def gsx_peer(name: str, path: Path, threads: int, keep: KeepSettings = AS_EXPORTED) -> Peer:
    """A bundle, by gsx's own runner and loop."""
    return Peer(gsx_worker(name, bundle=path, threads=threads), keep)


def genai_peer(name: str, path: Path, threads: int) -> Peer:
    """ONNX Runtime GenAI on a model that its own builder made."""
    return Peer(_worker(name, sys.executable, kind="genai", path=path, threads=threads))


def llama_peer(
    name: str, interpreter: str, path: Path, threads: int, *, exact: bool = False, logits: bool = False
) -> Peer:
    """llama.cpp on a GGUF file; `exact` computes in float32 throughout, to compare tokens."""
    spec = {"context": PROMPT_TOKENS + NEW_TOKENS, "exact": exact, "logits": logits}
    return Peer(_worker(name, interpreter, kind="llama", path=path, threads=threads, **spec))


def _worker(name: str, interpreter: str, **spec: Any) -> Worker:
    return Worker(name, [interpreter, "-m", "benchmarks.worker", json.dumps(spec, default=str)], environment())


def random_prompt(workshop: Workshop) -> list[int]:
    """The prompt that all peers get: random tokens of the benchmark model."""
    found: list[int] = np.random.default_rng(0).integers(0, workshop.sizes["vocab_size"], PROMPT_TOKENS).tolist()
    return found


def time_in_turn(peers: Mapping[str, Peer], prompt: list[int], rounds: int) -> dict[str, list[Answer]]:
    """Answers of all peers by name, one per round; the peers are stopped afterwards."""
    found = in_turn(peers, lambda name: peers[name].ask(prompt), rounds)
    for peer in peers.values():
        peer.worker.stop()
    return found


def genai_model(model: Path, work: Path, form: str) -> Path:
    """ONNX Runtime GenAI's own export of a dense model, made once. Args: form: a key of `GENAI_FORMS`."""
    precision, options = GENAI_FORMS[form]
    output = work / f"genai-{form.replace(' ', '-')}"
    if not output.exists():
        partial = work / f"{output.name}.partial"
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(partial)]
        command += ["-c", str(work / "cache"), "-p", precision, "-e", "cpu"]
        _run([*command, *(["--extra_options", *options] if options else [])])
        partial.rename(output)
    return output


def _run(command: Sequence[str]) -> None:
    """Run a command that says much; what it says is shown only if it fails."""
    ran = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}: failed\n{ran.stdout[-2000:]}")


def llama_model(model: Path, work: Path, interpreter: str, kind: str) -> Path:
    """A dense model as llama.cpp reads it, made once.

    Args:
        interpreter: Python of the environment of `llama.py`.
        kind: type of the matrices, or a mix of types.
    """
    path = work / f"dense-{kind}.gguf"
    if not path.exists():
        mixed = kind.endswith(("_S", "_M", "_L"))
        source = llama_model(model, work, interpreter, "F32") if mixed else model
        command = [interpreter if mixed else sys.executable, "-m", "benchmarks.llama", str(source), str(path)]
        _run([*command, "--type", kind])
    return path


def environment() -> dict[str, str]:
    """Variables for an environment that need not have gsx: where the worker finds what it imports of it."""
    folders = [str(Path(str(package.__file__)).parents[1]) for package in (gsx, gsx_plugins)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
