"""INT8 on ONNX Runtime: against float32 at the same budget, and against ONNX Runtime GenAI's INT8.

    python -m benchmarks.quantization --work DIR

The benchmark model of `decode.py`, exported in float32, in INT8 (weights and activations), and with INT8 weights alone;
GenAI's builder makes its INT8 of the dense one. One process a peer, in turn, as in `decode.py`; ratios are medians of
the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode import PROMPT_TOKENS, Peer, prepare, start
from benchmarks.model import SHAPES

BUDGET = 0.5


def prepare_int8(work: Path) -> None:
    """INT8 exports of what `decode.prepare` made, and GenAI's, as far as they are not there yet."""
    from gsx.export import export
    from gsx.quantize import Quantize

    for gate in ("dense", "scalar"):
        for scheme in ("int8", "int8-weights"):
            path = work / f"gsx-{gate}-{scheme}"
            if not path.exists():
                options: dict[str, Any] = {} if gate == "dense" else {"budget": BUDGET}
                quantize = Quantize(scheme, cache=work / "statistics")  # type: ignore[arg-type]
                text = None if gate == "dense" and scheme == "int8-weights" else work / "text.txt"
                export(work / f"model-{gate}", path, calibration=text, quantize=quantize, **options)
    if not (work / "genai-int8").exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        paths = ["-i", str(work / "model-dense"), "-o", str(work / "genai-int8"), "-c", str(work / "cache")]
        subprocess.run([*builder, *paths, "-p", "int8", "-e", "cpu"], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and exports (2 GB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    prepare(args.work, ["scalar"])
    prepare_int8(args.work)
    peers = {"GenAI int8, dense": start("GenAI", kind="genai", path=args.work / "genai-int8", threads=args.threads)}
    for gate, budget in (("dense", None), ("scalar", BUDGET)):
        for scheme in ("fp32", "int8", "int8-weights"):
            path = args.work / (f"gsx-{gate}" if scheme == "fp32" else f"gsx-{gate}-{scheme}")
            name = f"gsx {scheme}, {'dense' if budget is None else f'budget {budget:g}'}"
            peers[name] = start(name, kind="gsx", path=path, threads=args.threads, budget=budget)
    prompt = np.random.default_rng(0).integers(0, SHAPES["small"]["vocab_size"], PROMPT_TOKENS).tolist()
    for number in range(args.rounds + 1):
        for peer in peers.values():
            peer.call(prompt, keep=number > 0)  # the first round warms up
    print(f"{args.threads} threads, {args.rounds} rounds in turn, medians\n")
    print("| peer | prefill ms | speed /fp32 | speed /GenAI | decode tok/s | speed /fp32 | speed /GenAI | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    genai = peers["GenAI int8, dense"]
    for name, peer in peers.items():
        base = None if name.startswith("GenAI") else peers[f"gsx fp32, {name.split(', ')[1]}"]
        cells = [
            name,
            f"{1e3 * statistics.median(peer.prefill_s):.0f}",
            "" if base is None else f"{speed(peer.prefill_s, base.prefill_s):.2f}",
            f"{speed(peer.prefill_s, genai.prefill_s):.2f}",
            f"{1 / statistics.median(peer.decode_s):.0f}",
            "" if base is None else f"{speed(peer.decode_s, base.decode_s):.2f}",
            f"{speed(peer.decode_s, genai.decode_s):.2f}",
            f"{peer.last['peak_mb']:.0f}",
        ]
        print("| " + " | ".join(cells) + " |")
        stop(peer)


def speed(seconds: list[float], base: list[float]) -> float:
    """How many times as fast as the base, median over rounds."""
    return statistics.median(b / s for s, b in zip(seconds, base, strict=True))


def stop(peer: Peer) -> None:
    """End a worker."""
    assert peer.process.stdin is not None
    peer.process.stdin.close()
    peer.process.wait()


if __name__ == "__main__":
    main()
