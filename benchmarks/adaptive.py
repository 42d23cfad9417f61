"""What a search for a skip set while generating gains, against plain decoding and against the set it starts with.

    python -m benchmarks.adaptive --work DIR

The example model, or the bundle at `--bundle`, which must leave branches out on request (gates, or `--policy layers`).
In each round all four ways continue the same prompt in turn, and the search starts again; the last way drafts with the
set that this round's search ended with. Its text must be that of plain decoding.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bundles import EXAMPLE, exported
from benchmarks.measure import Table, parse, parser, print_header
from gsx.benchmarking.rounds import ratios, repeated
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.cost import step_bytes
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.runners.select import open_runner
from gsx_engines.speculation.adapt import SkipSetSearch, first_set
from gsx_engines.speculation.draft import FullDepthDraft
from gsx_engines.tokens import BundleTokenizer

PROMPT = '''"""Read tables."""


class Reader:
    """Reads rows of a table, one after the other.

    Args:
        path: of the file.
    """

    def __init__(self, path):
        self.path = path
'''
PLAIN = "plain"


def speed(one: Generation) -> float:
    """Tokens per second after the first one."""
    return one.stats.decode_tokens_per_second or 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    made = parser("adaptive", __doc__, work="the export", rounds=5, threads=2, quick={"tokens": 32})
    made.add_argument("--bundle", type=Path, help="a bundle to measure (default: the example model, --policy layers)")
    made.add_argument("--tokens", type=int, default=512, help="new tokens (default: 512)")
    args = parse(made, arguments)
    bundle = open_bundle(args.bundle) if args.bundle else exported(args.work / "layers", EXAMPLE, policy="layers")
    print_header(made, args, arguments)
    prompt, cost = BundleTokenizer(bundle).encode_prompt(PROMPT), step_bytes(bundle)
    runner, draft = (open_runner(bundle, args.threads) for _ in range(2))

    def run(drafting: FullDepthDraft | None, search: SkipSetSearch | None = None) -> Generation:
        asked = drafting.runner if drafting else runner
        return generate(asked, [prompt], max_new_tokens=args.tokens, stop_ids=[], draft=drafting, search=search)

    def one_round() -> tuple[dict[str, Generation], SkipSetSearch, str]:
        first, searched = (FullDepthDraft(draft, first_set(bundle.manifest)) for _ in range(2))
        search = SkipSetSearch(searched, cost)
        found = {
            PLAIN: run(None),
            "first set": run(first),
            "searched meanwhile": run(searched, search),
            "set that was found": run(searched),
        }
        return found, search, f"first set {first.kind}; found {searched.kind}"

    rounds = repeated(one_round, args.rounds)
    _, search, sets = rounds[-1]
    print(f"{args.tokens} tokens, {args.rounds} rounds; {sets}\nthe search: {search.found}\n")
    lines = Table("", "tokens/s", "/plain", "right", "tokens a verification", "search, share of the time")
    plain = [found[PLAIN] for found, _, _ in rounds]
    for name in rounds[0][0]:
        runs = [found[name] for found, _, _ in rounds]
        stats = runs[-1].stats
        lines.row(
            name,
            f"{statistics.median(map(speed, runs)):.0f}",
            f"{ratios(list(map(speed, runs)), list(map(speed, plain))):.2f}",
            None if stats.acceptance is None else f"{stats.acceptance:.1%}",
            f"{stats.tokens_per_verification:.2f}",
            f"{stats.search_seconds / stats.decode_seconds:.1%}",
        )
        assert runs[0].sequences == plain[0].sequences, "speculation changed the text"


if __name__ == "__main__":
    main()
