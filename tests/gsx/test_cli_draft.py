"""The command line with drafts: export, generate, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gsx.command_line import Gsx
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def split(make_tiny_bundle: Callable[..., Path]) -> Path:
    return make_tiny_bundle(draft="exit:1")


def test_the_text_is_the_same(gsx: Gsx, split: Path) -> None:
    options = ("abc", "--max-new-tokens", 24, "--temperature", 0.8, "--seed", 5, "--json")
    found = {}
    for way in ((), ("--no-speculative",), ("--draft-length", 0), ("--draft", "budget:0.6", "--draft-length", 3)):
        code, out, _ = gsx("generate", split, *options, *way)
        assert code == 0
        found[way] = json.loads(out)
    assert len({tuple(one["ids"]) for one in found.values()}) == 1
    assert [one["draft"] for one in found.values()] == ["exit:1", None, None, "budget:0.6"]
    stats = found["--draft", "budget:0.6", "--draft-length", 3]["stats"]
    assert stats["tokens_per_verification"] >= 1
    assert len(stats["accepted_by_place"]) == len(stats["drafted_by_place"]) <= 3


def test_statistics_name_the_draft(gsx: Gsx, split: Path) -> None:
    _, _, err = gsx("generate", split, "abc", "--max-new-tokens", 8)
    assert "draft exit:1: " in err
    assert "tokens a verification" in err


def test_auto_shows_what_it_chose_from(gsx: Gsx, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=4, tokenizer=True, exits=(1, 3))
    text = Path(__file__).parents[2] / "docs" / "design.md"
    code, out, err = gsx("export", model, "--draft", "auto", "--calibration", text, "-o", tmp_path / "out")
    assert code == 0
    assert "measuring drafts (exit:3)" in err
    assert "exit:1" in out
    assert "tokens/s" in out
    entry = json.loads((tmp_path / "out" / "gsx.json").read_text())["draft"]
    assert [one["draft"]["layer"] for one in entry["measured"]] == [1, 3]
    best = max(entry["measured"], key=lambda one: one["tokens_per_second"] / one["plain_tokens_per_second"])
    assert entry["draft"] == best["draft"]
    assert entry["length"] == best["length"]
    code, _, err = gsx("generate", tmp_path / "out", "abc", "--max-new-tokens", 4)
    assert (code, f"draft exit:{best['draft']['layer']}" in err) == (0, True)


def test_a_set_is_searched_and_used(gsx: Gsx, tiny_gated: Path, tiny_text: Path, tmp_path: Path) -> None:
    options = ("--budget", 0.9, "--calibration", tiny_text, "--calibration-tokens", 1024)
    code, _, err = gsx("export", tiny_gated, *options, "--draft", "layers:auto", "-o", tmp_path / "out")
    assert code == 0
    assert "searching skip sets" in err
    entry = json.loads((tmp_path / "out" / "gsx.json").read_text())["draft"]
    assert entry["draft"] in [one["draft"] for one in entry["measured"]]
    assert entry["draft"]["kind"] == "layers"
    texts = [
        json.loads(gsx("generate", tmp_path / "out", "abc", "--max-new-tokens", 16, "--json", *way)[1])["ids"]
        for way in ((), ("--no-speculative",))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--draft", "exit:0"), "the exit is not between"),
        (("--draft", "exit:-3"), "the exit is not between"),
        (("--draft", "exit:3"), "the exit is not between"),
        (("--draft", "quick"), "is not a draft"),
        (("--draft", "exit:1", "--select", "rank"), "selection by threshold"),
        (("--draft", "auto", "--select", "rank"), "selection by threshold"),
        (("--draft", "layers:auto", "--select", "rank"), "selection by threshold"),
        (("--draft", "auto", "--precision", "bf16"), "bf16"),
    ],
)
def test_export_refuses(gsx: Gsx, tiny_gated: Path, tmp_path: Path, arguments: tuple[str, ...], part: str) -> None:
    code, _, err = gsx("export", tiny_gated, "--budget", 0.7, "-o", tmp_path / "out", *arguments)
    assert code in (1, 2)
    assert part in err
    assert not (tmp_path / "out").exists()


def test_generate_searches_a_set(gsx: Gsx, tiny_bundle: Path) -> None:
    prompt = "a text of more than thirty-two bytes, one token each"
    options = ("--max-new-tokens", 60, "--json")
    plain, found = (
        json.loads(gsx("generate", tiny_bundle, prompt, *way, *options)[1]) for way in ((), ("--draft", "layers:auto"))
    )
    assert found["ids"] == plain["ids"]
    assert found["draft"].startswith("layers:")
    assert found["adaptation"]["looks"] > 0
    assert (plain["adaptation"], plain["stats"]["search_seconds"]) == (None, 0)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--speculative",), "has no draft"),
        (("--draft-length", "4"), "has no draft"),
        (("--draft", "exit:1"), "cannot draft with exit:1"),
        (("--draft", "layers:9"), "leaves out branches that it cannot"),
        (("--draft", "budget:0.6", "--no-speculative"), "plain decoding and a draft"),
        (("--no-speculative", "--draft-length", "4"), "plain decoding and a draft"),
        (("--speculative", "--draft-length", "0"), "plain decoding and a draft"),
        (("--draft", "budget:0.6", "--draft-length", "-2"), "the draft length is out of range"),
        (("--draft", "layers:auto", "--no-speculative"), "plain decoding and a draft"),
    ],
)
def test_generate_refuses(gsx: Gsx, tiny_bundle: Path, arguments: tuple[str, ...], part: str) -> None:
    code, _, err = gsx("generate", tiny_bundle, "abc", *arguments)
    assert code in (1, 2)
    assert part in err
