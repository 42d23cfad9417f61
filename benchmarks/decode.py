"""Prefill and decode: what skipping saves, and how the runner compares with ONNX Runtime GenAI.

    python -m benchmarks.decode --work DIR

Makes the benchmark model dense and gated (`model.py`), exports it, lets GenAI's builder export the dense one, and times
all peers in turn: one process each, 512 random tokens of prompt, 64 more tokens, greedy, each timed call right after an
untimed prefill. Ratios are medians of the ratios within a round, so that a machine that speeds up or slows down moves
both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model import SHAPES, make_model, random_text

PROMPT_TOKENS, NEW_TOKENS = 512, 65


@dataclass
class Peer:
    """A process under test and what it answered."""

    name: str
    process: subprocess.Popen[str]
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def call(self, prompt: list[int], keep: bool) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new_tokens": NEW_TOKENS}) + "\n")
        self.process.stdin.flush()
        self.last = json.loads(self.process.stdout.readline())
        if keep:
            self.prefill_s.append(self.last["prefill"])
            self.decode_s.append(self.last["decode"] / (NEW_TOKENS - 1))


def start(name: str, **spec: Any) -> Peer:
    """Start a worker and wait until it has loaded its model."""
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(spec, default=str)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if json.loads(process.stdout.readline() or "null") != "ready":
        raise SystemExit(f"{name}: did not start")
    return Peer(name, process)


def prepare(work: Path, gates: list[str]) -> None:
    """Models, exports and GenAI's export, as far as they are not there yet."""
    from gsx.export import export

    work.mkdir(parents=True, exist_ok=True)
    text = random_text(work / "text.txt", SHAPES["small"]["vocab_size"])
    for gate in (None, *gates):
        name = gate or "dense"
        if not (work / f"gsx-{name}").exists():
            model = make_model(work / f"model-{name}", "small", gate)
            options: dict[str, Any] = {"budget": 0.5, "calibration": text} if gate else {}
            export(model, work / f"gsx-{name}", **options)
    if not (work / "genai").exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        paths = ["-i", str(work / "model-dense"), "-o", str(work / "genai"), "-c", str(work / "cache")]
        subprocess.run([*builder, *paths, "-p", "fp32", "-e", "cpu"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and exports (1.5 GB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gates", nargs="*", default=["scalar", "vector"])
    args = parser.parse_args()
    prepare(args.work, args.gates)
    peers = [start("GenAI, dense", kind="genai", path=args.work / "genai", threads=args.threads)]
    peers.append(start("gsx, dense", kind="gsx", path=args.work / "gsx-dense", threads=args.threads))
    for gate in args.gates:
        for budget in (0.7, 0.5) if gate == "scalar" else (0.5,):
            path = args.work / f"gsx-{gate}"
            name = f"gsx, {gate} gates, budget {budget:g}"
            peers.append(start(name, kind="gsx", path=path, threads=args.threads, budget=budget))
    prompt = np.random.default_rng(0).integers(0, SHAPES["small"]["vocab_size"], PROMPT_TOKENS).tolist()
    for number in range(args.rounds + 1):
        for peer in peers:
            peer.call(prompt, keep=number > 0)  # the first round warms up
    same = peers[0].last["tokens"] == peers[1].last["tokens"]
    print(f"{PROMPT_TOKENS} + {NEW_TOKENS} tokens, {args.threads} threads, {args.rounds} rounds in turn, medians;")
    print(f"gsx dense and GenAI wrote the same tokens: {'yes' if same else 'NO'}\n")
    print("| peer | kept | prefill ms | /dense | /GenAI | decode tok/s | time /dense | speed /GenAI | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    genai, dense = peers[:2]

    def ratio(a: list[float], b: list[float]) -> float:
        return statistics.median(x / y for x, y in zip(a, b, strict=True))

    for peer in peers:
        kept = peer.last["kept"]
        cells = [
            peer.name,
            "" if kept is None else f"{kept:.3f}",
            f"{1e3 * statistics.median(peer.prefill_s):.0f}",
            f"{ratio(peer.prefill_s, dense.prefill_s):.3f}",
            f"{ratio(peer.prefill_s, genai.prefill_s):.3f}",
            f"{1 / statistics.median(peer.decode_s):.1f}",
            f"{ratio(peer.decode_s, dense.decode_s):.3f}",
            f"{ratio(genai.decode_s, peer.decode_s):.3f}",
            f"{peer.last['peak_mb']:.0f}",
        ]
        print("| " + " | ".join(cells) + " |")
        assert peer.process.stdin is not None
        peer.process.stdin.close()
        peer.process.wait()


if __name__ == "__main__":
    main()
