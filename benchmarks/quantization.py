"""INT8 on ONNX Runtime: against float32 at the same budget, against ONNX Runtime GenAI's INT8 and llama.cpp's Q8_0.

    python -m benchmarks.quantization --work DIR [--llama ENV/bin/python]

The benchmark model of `decode.py`, exported in float32, in INT8 as it comes (of the gated model the first layer
stays in float32), in INT8 throughout, and with INT8 weights alone; GenAI's builder makes its INT8 of the
dense one. All in turn (`peers.py`).

llama.cpp has to be compiled, in an environment of its own: `llama.py` says how. Its file of the dense model is checked
first: in float32 it must write the tokens that gsx writes.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers import (
    BUDGET,
    Peer,
    prepare,
    prepare_genai,
    prepare_llama,
    ratio,
    start,
    start_llama,
    time_in_turn,
)

GENAI, LLAMA, DENSE = "GenAI int8, dense", "llama.cpp Q8_0, dense", "gsx fp32, dense"

# What is written into a table -> scheme and layers to keep; nothing is spared of a dense model anyway.
FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "int8": ("int8", ()),
    "int8-throughout": ("int8", ("none",)),
    "int8-weights": ("int8-weights", ()),
}


def exports(work: Path, gate: str) -> dict[str, Path]:
    """Bundles of the dense or gated model by form, made as far as they are not there yet."""
    from gsx.workflows.export import export
    from gsx.workflows.quantize import Quantize

    found = {"fp32": work / f"gsx-{gate}"}
    for form, (scheme, keep) in FORMS.items():
        if gate == "dense" and keep:
            continue
        found[form] = path = work / f"gsx-{gate}-{form}"
        if not path.exists():
            options: dict[str, Any] = {} if gate == "dense" else {"budget": BUDGET}
            quantize = Quantize(scheme, keep, cache=work / "statistics")
            text = None if gate == "dense" and scheme == "int8-weights" else work / "text.txt"
            export(work / f"model-{gate}", path, calibration=text, quantize=quantize, **options)
    return found


def check_llama(exact: Peer, dense: Peer) -> None:
    """Stop where llama.cpp reads another model in its file than gsx in its own."""
    time_in_turn([exact, dense], rounds=0)
    exact.stop()
    if exact.last["tokens"] != dense.last["tokens"]:
        raise SystemExit("llama.cpp in float32 does not write the tokens of gsx: the file is not the same model")


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and exports (2 GB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make models and exports, and time nothing")
    parser.add_argument(
        "--llama",
        default=os.environ.get("GSX_LLAMA_PYTHON"),
        help="interpreter of an environment with llama-cpp-python (default: $GSX_LLAMA_PYTHON; none: left out)",
    )
    args = parser.parse_args()
    prepare(args.work, ["scalar"])
    prepare_genai(args.work, args.work / "genai-int8", "int8")
    bundles = {gate: exports(args.work, gate) for gate in ("dense", "scalar")}
    files = prepare_llama(args.work, args.llama) if args.llama else {}
    if args.prepare:
        return
    peers = {GENAI: start(GENAI, kind="genai", path=args.work / "genai-int8", threads=args.threads)}
    if files:
        peers[LLAMA] = start_llama(LLAMA, args.llama, files["Q8_0"], args.threads)
    for gate, budget in (("dense", None), ("scalar", BUDGET)):
        for form, path in bundles[gate].items():
            name = f"gsx {form}, {'dense' if budget is None else f'budget {budget:g}'}"
            peers[name] = start(name, kind="gsx", path=path, threads=args.threads, budget=budget)
    if files:
        check_llama(start_llama(LLAMA, args.llama, files["F32"], args.threads, exact=True), peers[DENSE])
    time_in_turn(peers.values(), args.rounds)
    print(f"{args.threads} threads, {args.rounds} rounds in turn, medians")
    print("llama.cpp: in float32 it writes the tokens of gsx\n" if files else "llama.cpp: left out (--llama)\n")
    print("| peer | prefill ms | speed /fp32 | speed /GenAI | decode tok/s | speed /fp32 | speed /GenAI | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    genai = peers[GENAI]
    for name, peer in peers.items():
        base = peers[f"gsx fp32, {name.split(', ')[1]}"] if name.startswith("gsx") else None
        cells = [
            name,
            f"{1e3 * statistics.median(peer.prefill_s):.0f}",
            "" if base is None else f"{1 / ratio(peer.prefill_s, base.prefill_s):.2f}",
            f"{1 / ratio(peer.prefill_s, genai.prefill_s):.2f}",
            f"{1 / statistics.median(peer.decode_s):.0f}",
            "" if base is None else f"{1 / ratio(peer.decode_s, base.decode_s):.2f}",
            f"{1 / ratio(peer.decode_s, genai.decode_s):.2f}",
            f"{peer.last['peak_mb']:.0f}",
        ]
        print("| " + " | ".join(cells) + " |")
        peer.stop()


if __name__ == "__main__":
    main()
