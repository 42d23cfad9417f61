"""What a skipped branch saves and what an entered one costs, with all forms in one process.

    python -m benchmarks.branches --work DIR     (the directory that benchmarks.decode has filled)

The runner alone, without the decoding loop: 512-token prefill, and single tokens at 512 past tokens, dense against
scalar gates with half of the branches kept (the calibrated budget 0.5), none and all. Caches are reused, so that no
fresh memory is paid for. Forms take turns; ratios are medians of ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import Keep, controls_for
from gsx_engines.runners.select import open_runner

PROMPT_TOKENS, STEPS = 512, 24
# Scores lie between 0 and 1: nothing is above 2, everything is above minus infinity.
NOTHING, EVERYTHING = 2.0, -np.inf


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    dense = open_runner(open_bundle(args.work / "gsx-dense"), threads=args.threads)
    gated = open_runner(open_bundle(args.work / "gsx-scalar"), threads=args.threads)
    shape = (gated.manifest.decoder.num_layers, 2)
    forms = {
        "dense": (dense, {}),
        "half kept": (gated, controls_for(gated.manifest, Keep(budget=0.5))),
        "none kept": (gated, {"thresholds": np.full(shape, NOTHING, np.float32)}),
        "all kept": (gated, {"thresholds": np.full(shape, EVERYTHING, np.float32)}),
    }
    caches = {id(runner): runner.new_cache(1, PROMPT_TOKENS + 1) for runner in (dense, gated)}
    ids = np.random.default_rng(0).integers(0, dense.manifest.decoder.vocab_size, (1, PROMPT_TOKENS))

    def call(form: str, tokens: np.ndarray, past: int) -> float:
        runner, controls = forms[form]
        cache = caches[id(runner)]
        cache.roll_back([past])
        started = time.perf_counter()
        runner.step(cache, tokens, controls)
        return time.perf_counter() - started

    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(args.rounds + 1):
        for form in forms:
            prefill = call(form, ids, 0)
            decode = statistics.mean(call(form, ids[:, i : i + 1], PROMPT_TOKENS) for i in range(STEPS))
            if number:  # the first round warms up
                seconds.setdefault((form, "prefill"), []).append(prefill)
                seconds.setdefault((form, "decode"), []).append(decode)
    print("| form | prefill ms | /dense | decode ms | /dense |")
    print("|---|---|---|---|---|")
    for form in forms:
        cells = [form]
        for phase in ("prefill", "decode"):
            pairs = zip(seconds[form, phase], seconds["dense", phase], strict=True)
            cells.append(f"{1e3 * statistics.median(seconds[form, phase]):.1f}")
            cells.append(f"{statistics.median(a / b for a, b in pairs):.3f}")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
