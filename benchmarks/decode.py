"""Prefill and decode: what skipping saves, and how gsx compares with ONNX Runtime GenAI.

    python -m benchmarks.decode --work DIR

The benchmark model, dense and gated, exported by gsx, and its dense form exported by GenAI's builder. All peers
(`peers.py`) get 512 random tokens of prompt and write 65 more by greedy decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.bundles import BUDGET, Workshop, add_model_options
from benchmarks.measure import Table, milliseconds, parse, parser, print_header
from benchmarks.peers import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    genai_model,
    genai_peer,
    gsx_peer,
    random_prompt,
    time_in_turn,
)
from gsx.benchmarking.rounds import ratios, spread
from gsx_engines.bundle.controls import KeepSettings

GENAI, DENSE = "GenAI, dense", "gsx, dense"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    made = parser("decode", __doc__, work="models and exports (1.5 GB)", rounds=9, threads=2, quick={"shape": "tiny"})
    add_model_options(made)
    made.add_argument("--gates", nargs="*", default=["scalar", "vector"], help="(default: scalar vector)")
    args = parse(made, arguments)
    workshop = Workshop.of(args.work, args.shape)
    genai = genai_model(workshop.model(), workshop.directory, "fp32")
    bundles = {name: workshop.bundle(name).directory for name in ("dense", *args.gates)}
    if args.prepare:
        return
    print_header(made, args, arguments)
    peers = {GENAI: genai_peer(GENAI, genai, args.threads), DENSE: gsx_peer(DENSE, bundles["dense"], args.threads)}
    for gate in args.gates:
        for budget in (0.7, BUDGET) if gate == "scalar" else (BUDGET,):
            name = f"gsx, {gate} gates, budget {budget:g}"
            peers[name] = gsx_peer(name, bundles[gate], args.threads, KeepSettings(budget=budget))
    found = time_in_turn(peers, random_prompt(workshop), args.rounds)
    same = found[GENAI][-1].tokens == found[DENSE][-1].tokens
    print(f"{PROMPT_TOKENS} + {NEW_TOKENS} tokens, {args.threads} threads, {args.rounds} rounds;")
    print(f"gsx dense and GenAI wrote the same tokens: {'yes' if same else 'NO'}\n")
    prefill = {name: [one.prefill for one in answers] for name, answers in found.items()}
    decode = {name: [one.decode for one in answers] for name, answers in found.items()}
    lines = Table(
        *("peer", "kept", "prefill ms", "/dense", "/GenAI", "decode tok/s", "time /dense", "speed /GenAI", "peak MB")
    )
    for name, answers in found.items():
        kept = answers[-1].kept
        lines.row(
            name,
            None if kept is None else f"{kept:.3f}",
            milliseconds(prefill[name], 0),
            f"{ratios(prefill[name], prefill[DENSE]):.3f}",
            f"{ratios(prefill[name], prefill[GENAI]):.3f}",
            f"{1 / spread(decode[name]).median:.1f}",
            f"{ratios(decode[name], decode[DENSE]):.3f}",
            f"{ratios(decode[GENAI], decode[name]):.3f}",
            f"{answers[-1].peak_mb:.0f}",
        )


if __name__ == "__main__":
    main()
