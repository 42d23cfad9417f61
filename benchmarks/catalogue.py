"""A task to train an exit on: the catalogue entry of a program, as JSON, from what is said about it.

Debian's package lists are the data: for each of some 10,000 programs, people wrote a description, a summary of one
line, a section and tags of a closed vocabulary. The prompt is the description; the answer has the other three. It is
the kind of work that drafts are good at, as LayerSkip's semantic parsing is (TOPv2, arXiv:2404.16710): part of
an answer is copied, part is structure, and part has to be understood.

    apt-get update -o Acquire::Languages=en
    apt-cache pkgnames | sort | xargs apt-cache -o Acquire::Languages=en --no-all-versions show > packages.txt
    python -m benchmarks.catalogue data packages.txt OUT      # OUT/train.jsonl, OUT/heldout.jsonl, OUT/answers.txt
    python -m benchmarks.catalogue quality BUNDLE OUT/heldout.jsonl     # how good the entries of a model are

Packages of one source describe themselves alike: a source is either trained on or held out, and gives at most two.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measure import Table
from benchmarks.prompts import chat_prompts
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.generation.generate import generate
from gsx_engines.runners.select import open_runner
from gsx_engines.tokens import BundleTokenizer

TASK = "Write the catalogue entry of this program as JSON."
# One source in 20 is held out; of each, at most so many packages.
SHARES, MOST = 20, 2
# A description has so many characters, an entry so many tags, each of which so many packages have.
CHARACTERS, TAGS, COMMON = range(120, 700), range(3, 13), 20


def stanzas(text: str) -> Iterator[dict[str, str]]:
    """The fields of each package, lines that go on joined by line ends."""
    for stanza in text.split("\n\n"):
        fields = re.findall(r"^([A-Za-z0-9-]+):[ ]?(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        if fields:
            yield dict(fields)


def prose(lines: str) -> str:
    """A description without its line ends, which only wrap it: Debian writes an empty line as a point, and what is
    indented further stays a line of its own."""
    text = re.sub(r"\n \.(?=\n|$)", "\n\n", lines)
    return re.sub(r"\n (?! )", " ", text).replace("\n  ", "\n").strip()


def entry(fields: dict[str, str], known: set[str]) -> dict[str, list[dict[str, str]]] | None:
    """The chat about one package; None if too little or too much is known of it."""
    summary, _, body = fields.get("Description-en", "").partition("\n")
    description = re.sub(r" *\n+ *", "\n", prose("\n" + body))
    tags = [tag for tag in tags_of(fields) if tag in known]
    if len(description) not in CHARACTERS or len(tags) not in TAGS or not (summary + description).isascii():
        return None
    answer = {"summary": summary.strip(), "section": fields["Section"], "tags": tags}
    parts = (("system", TASK), ("user", description), ("assistant", json.dumps(answer)))
    return {"messages": [{"role": role, "content": content} for role, content in parts]}


def tags_of(fields: dict[str, str]) -> list[str]:
    """A package's tags, in the order of the list."""
    return re.findall(r"[^\s,]+", fields.get("Tag", ""))


def is_held_out(source: str) -> bool:
    """Whether a source is held out: by its name alone."""
    return int.from_bytes(hashlib.sha256(source.encode()).digest()[:4], "big") % SHARES == 0


def data(args: argparse.Namespace) -> None:
    """Write the chats."""
    packages = list(stanzas(args.packages.read_text(encoding="utf-8")))
    counts = Counter(tag for fields in packages for tag in tags_of(fields))
    known = {tag for tag, count in counts.items() if count >= COMMON}
    rows: dict[bool, list[str]] = {False: [], True: []}
    used: Counter[str] = Counter()
    for fields in packages:
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        chat = entry(fields, known) if used[source] < MOST else None
        if chat is not None:
            used[source] += 1
            rows[is_held_out(source)].append(json.dumps(chat))
    args.out.mkdir(parents=True, exist_ok=True)
    for held_out, name in ((False, "train"), (True, "heldout")):
        random.Random(0).shuffle(rows[held_out])
        (args.out / f"{name}.jsonl").write_text("\n".join(rows[held_out]) + "\n", encoding="utf-8")
        print(f"{name}: {len(rows[held_out]):,} packages")
    answers = (json.loads(row)["messages"][-1]["content"] for row in rows[False])
    (args.out / "answers.txt").write_text("\n".join(answers) + "\n", encoding="utf-8")
    print(f"{len(known)} tags")


def quality(args: argparse.Namespace) -> None:
    """Let a bundle write entries, greedily, and compare them with what people wrote."""
    bundle = open_bundle(args.bundle)
    tokenizer, runner = BundleTokenizer(bundle), open_runner(bundle, args.threads)
    prompts, stops = chat_prompts(bundle, args.chats, args.prompts)
    valid = sections = right = found = wanted = 0
    for prompt, line in zip(prompts, args.chats.read_text(encoding="utf-8").splitlines(), strict=False):
        answer = generate(runner, [prompt], max_new_tokens=args.new_tokens, stop_ids=stops).sequences[0]
        want = json.loads(json.loads(line)["messages"][-1]["content"])
        wanted += len(want["tags"])
        try:
            have = json.loads(tokenizer.decode([token for token in answer.tokens if token not in stops]))
            tags = set(have["tags"])
            sections += have["section"] == want["section"]
        except (ValueError, KeyError, TypeError):
            continue
        valid, found, right = valid + 1, found + len(tags), right + len(tags & set(want["tags"]))
    table = Table("entries", "valid JSON", "right section", "tags, precision", "tags, recall")
    shares = (valid / len(prompts), sections / len(prompts), right / max(found, 1), right / wanted)
    table.row(len(prompts), *(f"{share:.1%}" for share in shares))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("data", help="the chats, from Debian's package lists")
    command.add_argument("packages", type=Path, help="what `apt-cache show` prints")
    command.add_argument("out", type=Path)
    command.set_defaults(run=data)
    command = commands.add_parser("quality", help="how good the entries of a model are")
    command.add_argument("bundle", type=Path)
    command.add_argument("chats", type=Path, help="heldout.jsonl of `data`")
    command.add_argument("--prompts", type=int, default=100, help="(default: 100)")
    command.add_argument("--new-tokens", type=int, default=200, help="at most (default: 200)")
    command.add_argument("--threads", type=int, default=2, help="(default: 2)")
    command.set_defaults(run=quality)
    args = parser.parse_args(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
