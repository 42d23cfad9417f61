"""INT8 on ONNX Runtime: against float32 at the same budget, against ONNX Runtime GenAI's INT8 and llama.cpp's Q8_0.

    python -m benchmarks.quantization --work DIR [--llama ENV/bin/python]

The benchmark model in float32, in INT8 by default (in the gated model the first layer stays in float32), in INT8
throughout, and with only its weights in INT8; GenAI's builder makes its own INT8 form of the dense model.

llama.cpp must be compiled, in an environment of its own: `llama.py` says how. Its file of the dense model is checked
first: in float32 it must write the tokens that gsx writes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from benchmarks.bundles import BUDGET, Workshop, add_model_options
from benchmarks.measure import Table, milliseconds, parse, parser, print_header
from benchmarks.peers import (
    genai_model,
    genai_peer,
    gsx_peer,
    llama_model,
    llama_peer,
    random_prompt,
    time_in_turn,
)
from gsx.benchmarking.rounds import ratios, spread
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings

GENAI, LLAMA = "GenAI int8, dense", "llama.cpp Q8_0, dense"
# Form -> what is added to the name of the float32 bundle.
FORMS = {"fp32": "", "int8": "-int8", "int8 throughout": "-int8-throughout", "int8 weights": "-int8-weights"}


def check_llama(workshop: Workshop, interpreter: str, threads: int, prompt: list[int]) -> None:
    """Stop if llama.cpp reads another model from its file than gsx from its own."""
    path = llama_model(workshop.model(), workshop.directory, interpreter, "F32")
    peers = {
        "llama.cpp": llama_peer("llama.cpp", interpreter, path, threads, exact=True),
        "gsx": gsx_peer("gsx", workshop.bundle("dense").directory, threads),
    }
    theirs, ours = (answers[0].tokens for answers in time_in_turn(peers, prompt, rounds=1).values())
    if theirs != ours:
        raise SystemExit("llama.cpp in float32 does not write the tokens of gsx: the file is not the same model")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    work = "models and exports (2 GB)"
    made = parser("quantization", __doc__, work=work, rounds=9, threads=2, quick={"shape": "tiny"})
    add_model_options(made)
    made.add_argument(
        "--llama",
        default=os.environ.get("GSX_LLAMA_PYTHON"),
        metavar="PYTHON",
        help="interpreter of an environment with llama-cpp-python (default: $GSX_LLAMA_PYTHON; none: left out)",
    )
    args = parse(made, arguments)
    workshop = Workshop.of(args.work, args.shape)
    genai = genai_model(workshop.model(), workshop.directory, "int8")
    paths = {}
    for gate, asked in (("dense", "dense"), ("scalar", f"budget {BUDGET:g}")):
        for form, suffix in FORMS.items():
            if (gate, form) != ("dense", "int8 throughout"):  # in a dense model nothing stays in float32 anyway
                paths[f"gsx {form}, {asked}"] = workshop.bundle(gate + suffix).directory
    llama = llama_model(workshop.model(), workshop.directory, args.llama, "Q8_0") if args.llama else None
    if args.prepare:
        return
    print_header(made, args, arguments)
    prompt = random_prompt(workshop)
    if llama:
        check_llama(workshop, args.llama, args.threads, prompt)
    peers = {GENAI: genai_peer(GENAI, genai, args.threads)}
    if llama:
        peers[LLAMA] = llama_peer(LLAMA, args.llama, llama, args.threads)
    for name, path in paths.items():
        keep = AS_EXPORTED if name.endswith("dense") else KeepSettings(budget=BUDGET)
        peers[name] = gsx_peer(name, path, args.threads, keep)
    found = time_in_turn(peers, prompt, args.rounds)
    print(f"{args.threads} threads, {args.rounds} rounds;")
    print("llama.cpp: in float32 it writes the tokens of gsx\n" if llama else "llama.cpp: left out (--llama)\n")
    prefill = {name: [one.prefill for one in answers] for name, answers in found.items()}
    decode = {name: [one.decode for one in answers] for name, answers in found.items()}
    lines = Table(
        *("peer", "prefill ms", "speed /fp32", "speed /GenAI", "decode tok/s", "speed /fp32", "speed /GenAI", "peak MB")
    )
    for name, answers in found.items():
        base = f"gsx fp32, {name.split(', ')[1]}" if name in paths else None
        lines.row(
            name,
            milliseconds(prefill[name], 0),
            base and f"{ratios(prefill[base], prefill[name]):.2f}",
            f"{ratios(prefill[GENAI], prefill[name]):.2f}",
            f"{1 / spread(decode[name]).median:.0f}",
            base and f"{ratios(decode[base], decode[name]):.2f}",
            f"{ratios(decode[GENAI], decode[name]):.2f}",
            f"{answers[-1].peak_mb:.0f}",
        )


if __name__ == "__main__":
    main()
