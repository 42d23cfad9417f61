"""Whole steps with K and V as 8-bit codes, against float32, by the number of past tokens.

    python -m benchmarks.kv_cache --work DIR

The dense benchmark model, with room for more positions, exported with `--kv-cache int8` and without. At each length
both take single tokens and a call of 256 tokens. The past tokens are not computed first, which would take minutes: the
caches hold zeros there, and arithmetic on zeros takes as long as on other numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.bundles import Workshop, add_model_options, exported
from benchmarks.measure import Table, milliseconds, parse, parser, print_header, timed
from gsx.benchmarking.rounds import in_turn, ratios
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.runners.select import open_runner

LENGTHS = (512, 2048, 8192)
STEPS, CALL_TOKENS = 16, 256


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    quick = {"shape": "tiny", "lengths": LENGTHS[:1]}
    made = parser("kv_cache", __doc__, work="the model and its exports (1 GB)", rounds=6, threads=2, quick=quick)
    add_model_options(made)
    made.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="past tokens (default: 512 2048 8192)")
    args = parse(made, arguments)
    workshop = Workshop.of(args.work, args.shape)
    model = workshop.model(positions=2 * max(LENGTHS))
    bundles = {
        "float32": exported(workshop.directory / "gsx-long", model),
        "int8": exported(workshop.directory / "gsx-long-kv8", model, kv_cache="int8", calibration=workshop.text()),
    }
    if args.prepare:
        return
    print_header(made, args, arguments)
    runners = {name: open_runner(bundle, threads=args.threads) for name, bundle in bundles.items()}
    values = controls_for(runners["int8"].manifest, KeepSettings())
    shape = runners["int8"].manifest.decoder
    caches = {name: runner.new_cache(1, max(args.lengths) + CALL_TOKENS) for name, runner in runners.items()}
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (1, CALL_TOKENS))

    def step(name: str, past: int, tokens: int) -> float:
        cache = caches[name]
        cache.lengths, cache.verified = [past], [past]
        return timed(lambda: runners[name].step(cache, ids[:, :tokens], values))

    def measure(past: int) -> dict[str, list[tuple[float, float]]]:
        """Seconds of one token (mean of several) and of a call of many, by form and round."""
        return in_turn(
            runners,
            lambda name: (statistics.mean(step(name, past, 1) for _ in range(STEPS)), step(name, past, CALL_TOKENS)),
            args.rounds,
        )

    many = f"{CALL_TOKENS} tokens"
    lines = Table(
        *("past tokens", "K/V MB float32", "int8", "one token, ms float32", "int8", "int8 /float32"),
        *(f"{many}, ms float32", "int8", "int8 /float32"),
    )
    for past in args.lengths:
        found = measure(past)
        numbers = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * past
        cells = [f"{past:,}", f"{4 * numbers / 1e6:.1f}", f"{numbers / 1e6:.1f}"]
        for column in range(2):
            wide, narrow = ([one[column] for one in found[name]] for name in ("float32", "int8"))
            cells += [milliseconds(wide), milliseconds(narrow), f"{ratios(narrow, wide):.2f}"]
        lines.row(*cells)


if __name__ == "__main__":
    main()
