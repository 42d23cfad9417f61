"""K and V in 8 bits against float32: time and memory at 2,048 past tokens.

    python -m benchmarks.kv_cache --work DIR

Makes and exports the benchmark model (`model.py`), dense and with gates, and times both kinds of cache in turn in one
process: a chunk of 256 tokens, and single tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from benchmarks.model import SHAPES, random_text
from benchmarks.peers import BUDGET, prepare, ratio
from engines.bundle.bundle import open_bundle
from engines.bundle.controls import controls_for
from engines.runners.base import Cache, Runner
from engines.runners.select import open_runner

PAST, CHUNK, STEPS = 2048, 256, 8


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and exports (1.3 GB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepare", action="store_true", help="make models and exports alone")
    args = parser.parse_args()
    _prepare(args.work)
    if args.prepare:
        return
    print("| model | chunk float32 ms | int8 ms | ratio | step float32 ms | int8 ms | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name in ("dense", "scalar"):
        pair = [_Side(args.work / f"gsx-{name}{kind}", args.threads) for kind in ("", "-kv8")]
        for _ in range(args.rounds):
            for side in pair:
                side.time()
        plain, eight = pair
        cells = [name]
        for one, other in ((plain.chunk_s, eight.chunk_s), (plain.step_s, eight.step_s)):
            cells += [f"{1e3 * statistics.median(seconds):.1f}" for seconds in (one, other)]
            cells.append(f"{ratio(other, one):.3f}")
        print("| " + " | ".join(cells) + " |", flush=True)


class _Side:
    """One kind of cache, filled, and the seconds of every round: of a chunk, and of a step."""

    def __init__(self, path: Path, threads: int) -> None:
        self.runner: Runner = open_runner(open_bundle(path), threads=threads)
        self.cache: Cache = self.runner.new_cache(1, PAST + CHUNK)
        self.controls = controls_for(self.runner.manifest)
        self.ids = np.random.default_rng(0).integers(3, SHAPES["small"]["vocab_size"], (1, PAST + CHUNK))
        for start in range(0, PAST, CHUNK):
            self._run(start, CHUNK)
        self.chunk_s: list[float] = []
        self.step_s: list[float] = []

    def time(self) -> None:
        """One round."""
        self.chunk_s.append(self._run(PAST, CHUNK))
        self._run(PAST, 1)  # other shapes are bound anew
        self.step_s.append(statistics.mean(self._run(PAST + n, 1) for n in range(STEPS)))

    def _run(self, start: int, count: int) -> float:
        self.cache.roll_back([start])
        before = time.perf_counter()
        self.runner.step(self.cache, self.ids[:, start : start + count], self.controls, logits="last")
        return time.perf_counter() - before


def _prepare(work: Path) -> None:
    """Exports with K and V in 8 bits beside the others, as far as they are not there yet."""
    from gsx.export import export

    prepare(work, ["scalar"])
    text = random_text(work / "text.txt", SHAPES["small"]["vocab_size"])
    for name, budget in (("dense", None), ("scalar", BUDGET)):
        output = work / f"gsx-{name}-kv8"
        if not output.exists():
            values = {"budget": budget, "calibration": text, "calibration_tokens": 1024}
            export(work / f"model-{name}", output, kv_cache="int8", **values)


if __name__ == "__main__":
    main()
