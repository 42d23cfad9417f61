"""What a skipped branch saves, and what an entered one costs, compared with the same work in the dense graph.

    python -m benchmarks.branches --work DIR

The runner without the decoding loop: prefill of 512 tokens, and single tokens at 512 past tokens. Dense against scalar
gates with half of the branches kept (the calibrated budget 0.5), with no branch kept and with all kept. Caches are
reused, so that no form pays for fresh memory.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.bundles import BUDGET, Workshop, add_model_options
from benchmarks.measure import Table, milliseconds, parse, parser, print_header, timed
from gsx.benchmarking.rounds import in_turn, ratios
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.runners.select import open_runner

PROMPT_TOKENS, STEPS = 512, 24
# Scores are between 0 and 1: no score is above 2, and all are above minus infinity.
KEEP_NONE, KEEP_ALL = 2.0, -np.inf


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    made = parser("branches", __doc__, work="models and exports (1 GB)", rounds=12, threads=2, quick={"shape": "tiny"})
    add_model_options(made)
    args = parse(made, arguments)
    workshop = Workshop.of(args.work, args.shape)
    bundles = workshop.bundle("dense"), workshop.bundle("scalar")
    if args.prepare:
        return
    print_header(made, args, arguments)
    dense, gated = (open_runner(bundle, threads=args.threads) for bundle in bundles)
    table = (1, workshop.layers, 2)
    forms = {
        "dense": (dense, {}),
        "half kept": (gated, controls_for(gated.manifest, KeepSettings(budget=BUDGET))),
        "none kept": (gated, {"thresholds": np.full(table, KEEP_NONE, np.float32)}),
        "all kept": (gated, {"thresholds": np.full(table, KEEP_ALL, np.float32)}),
    }
    caches = {id(runner): runner.new_cache(1, PROMPT_TOKENS + 1) for runner in (dense, gated)}
    ids = np.random.default_rng(0).integers(0, workshop.sizes["vocab_size"], (1, PROMPT_TOKENS))

    def seconds_of(form: str) -> tuple[float, float]:
        """Seconds of prefill, and of one token (mean of several)."""
        runner, values = forms[form]
        cache = caches[id(runner)]

        def step(tokens: np.ndarray, past: int) -> float:
            cache.roll_back([past])
            return timed(lambda: runner.step(cache, tokens, values))

        return step(ids, 0), statistics.mean(step(ids[:, i : i + 1], PROMPT_TOKENS) for i in range(STEPS))

    found = in_turn(forms, seconds_of, args.rounds)
    prefill = {form: [one[0] for one in seconds] for form, seconds in found.items()}
    decode = {form: [one[1] for one in seconds] for form, seconds in found.items()}
    lines = Table("form", "prefill ms", "/dense", "decode ms", "/dense")
    for form in forms:
        cells: list[str] = []
        for seconds in (prefill, decode):
            cells += [milliseconds(seconds[form]), f"{ratios(seconds[form], seconds['dense']):.3f}"]
        lines.row(form, *cells)


if __name__ == "__main__":
    main()
