"""Whole steps with K and V as 8-bit codes, against float32, by the length of what they look back on.

    python -m benchmarks.kv_cache --work DIR

The dense benchmark model (`model.py`, with room for more positions) is exported twice, with `--kv-cache int8` and
without. At each length both take single tokens and a call of many, in turn in one process; ratios are medians of
ratios within a round. What was before is not read in first, which would take minutes: the caches hold zeros there,
whose arithmetic takes as long as that of other numbers.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.model import SHAPES, make_model, random_text
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import Keep, controls_for
from gsx_engines.runners.select import open_runner

LENGTHS = (512, 2048, 8192)
STEPS, CALL_TOKENS = 16, 256


def exports(work: Path) -> dict[str, Path]:
    """The bundles by type of K and V, made as far as they are not there yet."""
    from gsx.workflows.export import export

    model = work / "model-long"
    text = random_text(work / "text.txt", SHAPES["small"]["vocab_size"])
    if not model.exists():
        make_model(model, "small", None, positions=2 * max(LENGTHS))
    paths = {"float32": work / "gsx-long", "int8": work / "gsx-long-kv8"}
    if not paths["float32"].exists():
        export(model, paths["float32"])
    if not paths["int8"].exists():
        export(model, paths["int8"], kv_cache="int8", calibration=text)
    return paths


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for the model and its exports (1 GB)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make model and exports, and time nothing")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    paths = exports(args.work)
    if args.prepare:
        return
    runners = {name: open_runner(open_bundle(path), threads=args.threads) for name, path in paths.items()}
    controls = controls_for(runners["int8"].manifest, Keep())
    shape = runners["int8"].manifest.decoder
    caches = {name: runner.new_cache(1, max(LENGTHS) + CALL_TOKENS) for name, runner in runners.items()}
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, CALL_TOKENS))

    def call(name: str, past: int, tokens: int) -> float:
        caches[name].lengths, caches[name].verified = [past], [past]
        started = time.perf_counter()
        runners[name].step(caches[name], ids[:, :tokens], controls)
        return time.perf_counter() - started

    head = ("past tokens", "K/V MB float32", "int8", "one token, ms", "int8", "ratio")
    print("| " + " | ".join((*head, f"{CALL_TOKENS} tokens, ms", "int8", "ratio")) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for past in LENGTHS:
        seconds: dict[tuple[str, int], list[float]] = {}
        for number in range(args.rounds + 1):
            for name in sorted(runners, reverse=number % 2 == 0):  # neither always comes first
                one = statistics.mean(call(name, past, 1) for _ in range(STEPS))
                many = call(name, past, CALL_TOKENS)
                if number:  # the first round warms up
                    seconds.setdefault((name, 1), []).append(one)
                    seconds.setdefault((name, CALL_TOKENS), []).append(many)
        values = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * past
        cells = [f"{past:,}", f"{4 * values / 1e6:.1f}", f"{values / 1e6:.1f}"]
        for tokens in (1, CALL_TOKENS):
            wide, narrow = seconds["float32", tokens], seconds["int8", tokens]
            cells += [f"{1e3 * statistics.median(one):.1f}" for one in (wide, narrow)]
            cells.append(f"{statistics.median(n / w for n, w in zip(narrow, wide, strict=True)):.2f}")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
