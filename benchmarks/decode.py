"""Prefill and decode: what skipping saves, and how the runner compares with ONNX Runtime GenAI.

    python -m benchmarks.decode --work DIR

Makes the benchmark model dense and gated (`model.py`), exports it, lets GenAI's builder export the dense one, and times
all peers in turn (`peers.py`): 512 random tokens of prompt, 64 more tokens, greedy.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.peers import BUDGET, NEW_TOKENS, PROMPT_TOKENS, prepare, prepare_genai, ratio, start, time_in_turn


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and exports (1.5 GB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gates", nargs="*", default=["scalar", "vector"])
    args = parser.parse_args()
    prepare(args.work, args.gates)
    prepare_genai(args.work, args.work / "genai", "fp32")
    peers = [start("GenAI, dense", kind="genai", path=args.work / "genai", threads=args.threads)]
    peers.append(start("gsx, dense", kind="gsx", path=args.work / "gsx-dense", threads=args.threads))
    for gate in args.gates:
        for budget in (0.7, BUDGET) if gate == "scalar" else (BUDGET,):
            path = args.work / f"gsx-{gate}"
            name = f"gsx, {gate} gates, budget {budget:g}"
            peers.append(start(name, kind="gsx", path=path, threads=args.threads, budget=budget))
    time_in_turn(peers, args.rounds)
    same = peers[0].last["tokens"] == peers[1].last["tokens"]
    print(f"{PROMPT_TOKENS} + {NEW_TOKENS} tokens, {args.threads} threads, {args.rounds} rounds in turn, medians;")
    print(f"gsx dense and GenAI wrote the same tokens: {'yes' if same else 'NO'}\n")
    print("| peer | kept | prefill ms | /dense | /GenAI | decode tok/s | time /dense | speed /GenAI | peak MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    genai, dense = peers[:2]
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
        peer.stop()


if __name__ == "__main__":
    main()
