"""Text that a model wrote itself, to train an exit that drafts for it: a draft is asked about the model's own texts.

A row is the beginning of a paragraph of others' text and the model's greedy continuation. A share of rows of others'
text alone is mixed in, so that the model itself stays what it was on prompts.

    python -m benchmarks.documentation docs-text
    python -m benchmarks.own_texts docs-text own-text --model MODEL   # own-text/train.jsonl, own-text/heldout.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from benchmarks.bundles import exported
from gsx_engines.generation.generate import generate
from gsx_engines.runners.select import open_runner
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import load_tokenizer

# Of others' text alone: pieces of so many characters, and their share of the characters of the model's own rows.
PIECE, OTHERS = 1500, 0.35
# Characters that surely hold a prompt.
ROOM = 800


def beginnings(texts: Sequence[str], numbers: random.Random) -> Iterator[str]:
    """Places of texts where a line begins."""
    while True:
        text = numbers.choice(texts)
        at = text.rfind("\n", 0, numbers.randrange(max(1, len(text) - ROOM))) + 1
        yield text[at : at + ROOM]


def rows(model: Path, work: Path, texts: Sequence[str], count: int, args: argparse.Namespace, seed: int) -> list[str]:
    """The model's continuations of texts, behind their prompts."""
    tokenizer = load_tokenizer(open_checkpoint(model))
    encoded = (tokenizer.encode(text).ids[: args.prompt_tokens] for text in beginnings(texts, random.Random(seed)))
    prompts = (ids for ids in encoded if len(ids) == args.prompt_tokens)
    runner = open_runner(exported(work / "dense", model), args.threads)
    found: list[str] = []
    while len(found) < count:
        batch = list(islice(prompts, min(args.batch, count - len(found))))
        made = generate(runner, batch, max_new_tokens=args.new_tokens).sequences
        found += [tokenizer.decode(ids + one.tokens) for ids, one in zip(batch, made, strict=True)]
        print(f"{len(found)} of {count} rows", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("texts", type=Path, help="train.jsonl and heldout.jsonl of `documentation`")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1152, help="to train on (default: 1152)")
    parser.add_argument("--held-out", type=int, default=96, help="rows (default: 96)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--new-tokens", type=int, default=192, help="(default: 192)")
    parser.add_argument("--batch", type=int, default=32, help="rows at a time (default: 32)")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed, (name, count) in enumerate((("train", args.rows), ("heldout", args.held_out))):
        lines = (args.texts / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        found = rows(args.model, args.out / "bundles", texts, count, args, seed)
        if name == "train":
            numbers = random.Random(seed)
            for _ in range(round(OTHERS * sum(map(len, found)) / PIECE)):
                text = numbers.choice(texts)
                at = numbers.randrange(max(1, len(text) - PIECE))
                found.append(text[at : at + PIECE])
            numbers.shuffle(found)
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in found))


if __name__ == "__main__":
    main()
