"""The task of catalogue entries: what becomes of a package list, and that a model's entries are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import catalogue

BODY = """\
 This program reads files of several formats, finds what is the same in them,
 and writes it once.
 .
 Features:
   - it is fast
   - it needs little memory, whatever the size of the files may be"""
TAGS = "interface::commandline, role::program, use::comparing,\n works-with::file"


def package(number: int, **fields: str) -> str:
    """A stanza as `apt-cache show` prints it."""
    values = {"Package": f"finder{number}", "Description-en": f"finds what is the same\n{BODY}", "Tag": TAGS}
    values |= {"Section": "utils"} | {key.replace("_", "-"): value for key, value in fields.items()}
    return "\n".join(f"{key}: {value}" for key, value in values.items())


def made(tmp_path: Path, *stanzas: str) -> list[dict[str, str]]:
    """The chats that come of a list, trained on and held out, as role -> content."""
    (tmp_path / "packages.txt").write_text("\n\n".join(stanzas) + "\n", encoding="utf-8")
    catalogue.main(["data", str(tmp_path / "packages.txt"), str(tmp_path)])
    lines = [line for name in ("train", "heldout") for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in lines if line]
    return [{message["role"]: message["content"] for message in chat} for chat in chats]


def test_an_entry(tmp_path: Path) -> None:
    chats = made(tmp_path, *(package(n) for n in range(catalogue.COMMON)))
    assert len(chats) == catalogue.COMMON
    assert json.loads(chats[0]["assistant"]) == {
        "summary": "finds what is the same",
        "section": "utils",
        "tags": ["interface::commandline", "role::program", "use::comparing", "works-with::file"],
    }
    assert chats[0]["user"] == (
        "This program reads files of several formats, finds what is the same in them, and writes it once.\n"
        "Features:\n- it is fast\n- it needs little memory, whatever the size of the files may be"
    )
    assert (tmp_path / "answers.txt").read_text().splitlines()[0] == chats[0]["assistant"]


@pytest.mark.parametrize(
    "fields",
    [
        {"Description_en": "too short\n It is short."},
        {"Tag": "role::program"},
        {"Tag": "rare::one, rare::two, rare::three"},
        {"Description_en": f"naïve\n{BODY}"},
    ],
    ids=["little is said", "few tags", "rare tags", "not English"],
)
def test_what_is_left_out(tmp_path: Path, fields: dict[str, str]) -> None:
    others = [package(n) for n in range(catalogue.COMMON)]
    assert len(made(tmp_path, *others, package(99, **fields))) == catalogue.COMMON


def test_a_source_is_on_one_side_and_gives_few(tmp_path: Path) -> None:
    stanzas = [package(n, Source=f"source{n // 5} (1.{n})") for n in range(200)]
    chats = made(tmp_path, *stanzas)
    assert len(chats) == 40 * catalogue.MOST
    held_out = len((tmp_path / "heldout.jsonl").read_text().splitlines())
    assert held_out == catalogue.MOST * sum(catalogue.is_held_out(f"source{n}") for n in range(40))
    assert 0 < held_out < len(chats)


def test_entries_of_a_model(tmp_path: Path, chat_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that knows nothing writes none; how many it was asked for is counted all the same."""
    made(tmp_path, *(package(n) for n in range(100)))
    capsys.readouterr()
    options = ["--prompts", "2", "--new-tokens", "4", "--threads", "1"]
    catalogue.main(["quality", str(chat_bundle), str(tmp_path / "heldout.jsonl"), *options])
    assert capsys.readouterr().out.splitlines()[-1] == "| 2 | 0.0% | 0.0% | 0.0% | 0.0% |"
