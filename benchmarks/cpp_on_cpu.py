"""`gsx-run` on a CPU against Python on the same bundle: the portable runner, which does as much work, and the fast one.

    python -m benchmarks.cpp_on_cpu BUNDLE --gsx-run build/cpp/gsx-run

All three continue the same prompt plainly and greedily, with as many threads, in turn; the tokens must be the same.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.measure import Table, parse, parser, print_header
from gsx.benchmarking.rounds import ratios, repeated
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.generation.generate import generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner

PROMPT = list(range(20, 84))
NEW = 48


class Measured(NamedTuple):
    """Seconds of the first token and of a later one, and the tokens."""

    first: float
    later: float
    tokens: list[int]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    made = parser("cpp_on_cpu", __doc__, rounds=5, threads=1)
    made.add_argument("bundle", type=Path)
    made.add_argument("--gsx-run", type=Path, required=True, help="the program, built with GSX_ONNXRUNTIME")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    bundle = open_bundle(args.bundle)
    command = [args.gsx_run, args.bundle, "--backend", "onnxruntime", "--threads", str(args.threads), "--json"]
    command += ["--no-speculative", "--max-new-tokens", str(NEW)]

    def in_cpp() -> Measured:
        done = subprocess.run(command, input=" ".join(map(str, PROMPT)), capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        stats = found["stats"]
        return Measured(stats["prefill_seconds"], stats["decode_seconds"] / stats["decode_steps"], found["ids"])

    def on(runner: Runner) -> Callable[[], Measured]:
        def measured() -> Measured:
            found = generate(runner, [PROMPT], max_new_tokens=NEW)
            stats = found.stats
            return Measured(stats.prefill_seconds, stats.decode_seconds / stats.decode_steps, found.sequences[0].tokens)

        return measured

    forms = {
        "C++": in_cpp,
        "Python, portable": on(WholeRunner(PortableStage(bundle, threads=args.threads))),
        "Python, fast": on(open_runner(bundle, args.threads)),
    }
    rounds = repeated(lambda: {name: run() for name, run in forms.items()}, args.rounds)
    assert all(one[name].tokens == rounds[0]["C++"].tokens for one in rounds for name in forms), "the tokens differ"
    lines = Table("", "first token, ms", "a later token, ms", "first, of C++'s", "later, of C++'s")
    for name in forms:
        first, later = [one[name].first for one in rounds], [one[name].later for one in rounds]
        against = [
            ratios(first, [one["C++"].first for one in rounds]),
            ratios(later, [one["C++"].later for one in rounds]),
        ]
        lines.row(name, *(f"{1e3 * median(own):.1f}" for own in (first, later)), *(f"{ratio:.2f}" for ratio in against))


if __name__ == "__main__":
    main()
