"""The text that quality is measured on: prose about programs, in English, no code, and none of it calibration text.

    python -m benchmarks.descriptions OUT.txt

Paragraphs of the descriptions that Python packages show on PyPI, taken from the packages that are installed and in an
order that is random and always the same. Versions of packages differ, and so would the text: figures are measured on
`TEXT`, which was written once. `benchmarks/data/NOTICE.md` has its sources and licences.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

TEXT = Path(__file__).parent / "data" / "descriptions.txt"
# A paragraph of prose: this many words, and mostly letters. No package may be more than a small part of the text.
WORDS, LETTERS, MOST_CHARACTERS = 25, 0.72, 6000
LICENCES = re.compile(r"^(MIT|BSD|Apache|ISC|3-Clause BSD)[\w .,-]*$")
# Code, literal blocks, tables, headings, quotations and directives.
BLOCKS = re.compile(r"```.*?```|~~~.*?~~~", re.DOTALL)
NOT_PROSE = ("    ", "\t", "..", ">>>", "|", "#", "=", "<", "$")
MARKUP = re.compile(r"<[^>]+>|!?\[[^\]]*\]\([^)]*\)|https?://\S+")


def paragraphs(description: str) -> Iterator[str]:
    """The paragraphs of prose in a description, each as one line."""
    for found in re.split(r"\n\s*\n", BLOCKS.sub("", description)):
        bare = MARKUP.sub("", found)
        words = re.findall(r"[A-Za-z']+", bare)
        marked = any(line.startswith(NOT_PROSE) for line in found.splitlines())
        letters = sum(map(len, words))
        if not marked and len(words) >= WORDS and len(bare) > 0.8 * len(found) and letters > LETTERS * len(bare):
            yield " ".join(found.split())


def licence(package: Distribution) -> str:
    """A package's licence, as its metadata gives it; empty if it gives none."""
    data: Any = package.metadata
    classes = [one.split("::")[-1].strip() for one in data.get_all("Classifier") or [] if one.startswith("License ::")]
    return str(data.get("License-Expression") or (classes or [(data.get("License") or "").strip()])[0])


def sources() -> list[tuple[str, str, str]]:
    """Installed packages under permissive licences with some prose: name, version and licence, text."""
    found = {}
    for package in distributions():
        data: Any = package.metadata
        name: str = data["Name"]
        text = "\n\n".join(paragraphs(str(data.get_payload() or data.get("Description") or "")))
        whole = text[: text.rfind(".", 0, MOST_CHARACTERS) + 1]
        if whole and LICENCES.match(licence(package)) and name != "gsx":
            found[name] = (name, f"{package.version}, {licence(package)}", whole)
    return sorted(found.values(), key=lambda source: hashlib.sha256(source[0].encode()).digest())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the text, and print its sources."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.descriptions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("output", type=Path)
    args = made.parse_args(arguments)
    found = sources()
    args.output.write_text("\n\n".join(text for _, _, text in found) + "\n", encoding="utf-8")
    print("; ".join(f"{name} {rest}" for name, rest, _ in found))


if __name__ == "__main__":
    main()
