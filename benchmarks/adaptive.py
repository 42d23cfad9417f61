"""What a skip set that is searched while generating gains, beside plain decoding and its first set.

    python -m benchmarks.adaptive BUNDLE

The bundle leaves branches out on request (gates, or `--policy layers`). In each round all four continue the same prompt
in turn, the search anew; the last one drafts with the set that the search of this round ended with.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.cost import step_bytes
from gsx_engines.generation import Generation, generate
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


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=512, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    bundle = open_bundle(args.bundle)
    prompt, cost = BundleTokenizer(bundle).encode_prompt(PROMPT), step_bytes(bundle)
    runner, draft = (open_runner(bundle, args.threads) for _ in range(2))
    runs: dict[str, list[Generation]] = {}

    def run(name: str, drafting: FullDepthDraft | None, search: SkipSetSearch | None = None) -> None:
        found = generate(
            drafting.runner if drafting else runner,
            [prompt],
            max_new_tokens=args.tokens,
            stop_ids=[],
            draft=drafting,
            search=search,
        )
        runs.setdefault(name, []).append(found)

    for number in range(args.rounds + 1):
        first, searched = (FullDepthDraft(draft, first_set(bundle.manifest)) for _ in range(2))
        search = SkipSetSearch(searched, cost)
        run("plain", None)
        run("first set", first)
        run("searched meanwhile", searched, search)
        run("set that was found", searched)
        if number == 0:
            runs.clear()  # what loads at the first use has loaded
    print(f"{args.tokens} tokens, {args.rounds} rounds in turn; first set {first.kind}; found {searched.kind}")
    print(f"the search: {search.found}\n")
    print("| | tokens/s | of plain | right | tokens a verification | search, share of the time |")
    print("|---|---|---|---|---|---|")
    for name, found in runs.items():
        speeds = [one.stats.decode_tokens_per_second or 0.0 for one in found]
        pairs = zip(speeds, runs["plain"], strict=True)
        ratio = statistics.median(speed / (one.stats.decode_tokens_per_second or 1.0) for speed, one in pairs)
        stats = found[-1].stats
        right = "" if stats.acceptance is None else f"{stats.acceptance:.1%}"
        cells = (f"{statistics.median(speeds):.0f}", f"{ratio:.2f}", right, f"{stats.tokens_per_verification:.2f}")
        print(f"| {name} | {' | '.join(cells)} | {stats.search_seconds / stats.decode_seconds:.1%} |")
        assert found[0].sequences == runs["plain"][0].sequences, "the text is plain decoding's"


if __name__ == "__main__":
    main()
