"""`gsx compare`: measurements against the reference; which policies apply; bundles that are reused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from gsx.cli import run
from gsx.comparison.measure import LEAST_TOKENS
from gsx.comparison.report import CompareReport, Point
from gsx.workflows.compare import compare
from gsx.workflows.kept_exports import WINDOW_TOKENS
from gsx_engines.bundle.layer_sets import exit_places, mask_of, unified_places
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import TextError
from gsx_exporter.evaluation import losses
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.reference.model import Reference
from gsx_exporter.router_config import RouterConfig
from gsx_exporter.rules.layers.reference import LayerMask
from gsx_exporter.text import tokenize
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

LAYERS = 6
# Two orders of summation of float32 products, over the mean loss of a text.
PERPLEXITY_RTOL = 1e-4


@pytest.fixture(autouse=True, scope="module")
def few_rounds() -> Iterator[None]:
    """Few rounds of timing: here times need not be exact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gsx.workflows.compare.SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "model"
    return tiny_checkpoint(path, layers=LAYERS, gate=GateConfig("scalar"), exits=(2,), tokenizer=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def report(work: Path, model: Path, tiny_text: Path) -> CompareReport:
    return compare(model, work, text=tiny_text, tokens=LEAST_TOKENS)


def point(report: CompareReport, policy: str, setting: str) -> Point:
    return next(one for one in report.points if (one.policy, one.setting) == (policy, setting))


def test_every_policy_of_a_gated_checkpoint_is_there(report: CompareReport) -> None:
    whole = report.points[0]
    assert (whole.policy, whole.setting, whole.kept, whole.token_ratio) == ("whole model", "layers", 1, 1)
    others = {one.policy for one in report.points[1:]}
    assert others == {"gateskip", "even layers", "exits", "unified", "ffn-skip", "calm"}
    assert set(report.left_out) == {"loops", "router"}
    assert "this checkpoint has none" in report.left_out["router"]
    for one in report.points:
        assert min(one.prefill_ms, one.prefill_ratio, one.token_ms, one.token_ratio) > 0


@pytest.mark.parametrize(
    ("policy", "setting", "depth"),
    [
        ("even layers", "6 of 6 layers", 6),
        ("even layers", "4 of 6 layers", None),
        ("exits", "exit 2 of 6", 2),
        ("unified", "speed-up 1.33", None),
    ],
)
def test_sets_measure_what_masks_say(
    report: CompareReport, model: Path, tiny_text: Path, policy: str, setting: str, depth: int | None
) -> None:
    """The windows of the text's second half, each with its first half as a prompt, by PyTorch."""
    checkpoint = open_checkpoint(model)
    ids = tokenize(checkpoint, tiny_text, max_tokens=2 * LEAST_TOKENS, window=WINDOW_TOKENS).ids
    windows, prompt = ids[len(ids) // 2 :], WINDOW_TOKENS // 2
    places = unified_places(LAYERS, 4 / 3) if depth is None else exit_places(depth, LAYERS)
    full = prompt if policy == "unified" else 0
    rule = LayerMask(mask_of(places, LAYERS, "none")[None], np.array([full]))
    reference = Reference.load(checkpoint)
    logits = [reference(torch.from_numpy(one[None]), rule=rule, kv_policy="none").logits[0].numpy() for one in windows]
    nats = np.mean([losses(found[prompt:], one[prompt:]) for found, one in zip(logits, windows, strict=True)])
    found = point(report, policy, setting)
    assert found.perplexity == pytest.approx(math.exp(nats), rel=PERPLEXITY_RTOL)
    assert found.kept == pytest.approx(len(places) / (2 * LAYERS))
    assert found.prompt_kept == pytest.approx(1 if full else found.kept)


def test_keeping_everything_is_the_whole_model(report: CompareReport) -> None:
    whole = report.points[0]
    for policy in ("gateskip", "ffn-skip"):
        one = point(report, policy, "budget 1")
        assert (one.kept, one.prompt_kept) == (1, 1)
        assert one.perplexity == pytest.approx(whole.perplexity, rel=PERPLEXITY_RTOL)


def test_shares_count_branches_that_are_never_skipped(report: CompareReport) -> None:
    points = [one for one in report.points if one.policy == "ffn-skip"]
    # Neither attention nor the first and the last MLP is ever skipped, nor anything of a prompt.
    assert all(one.prompt_kept == 1 and one.kept >= (LAYERS + 2) / (2 * LAYERS) for one in points)
    assert min(one.kept for one in points) < 1


def test_a_bundle_that_is_there_and_whole_is_used_again(
    report: CompareReport, work: Path, model: Path, tiny_text: Path
) -> None:
    made = {path: path.stat().st_mtime_ns for path in work.glob("*/gsx.json")}
    assert sorted(path.parent.name.rpartition("-")[0] for path in made) == ["calm", "ffn-skip", "gateskip", "layers"]
    damaged = next(work.glob("calm-*"))
    with (damaged / "weights.bin").open("r+b") as weights:
        weights.write(b"damaged!")
    again = compare(model, work, text=tiny_text, tokens=LEAST_TOKENS)
    changed = {path.parent for path, at in made.items() if path.stat().st_mtime_ns != at}
    assert changed == {damaged}
    assert [one.perplexity for one in again.points] == [one.perplexity for one in report.points]


def test_the_command_says_what_a_dense_checkpoint_lacks(
    tmp_path: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=3, tokenizer=True)
    page = tmp_path / "compare.html"
    options = ["--work", str(tmp_path / "work"), "--text", str(tiny_text), "--tokens", str(LEAST_TOKENS)]
    assert run(["compare", str(model), *options, "-o", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["points"][0]["setting"] == "dense"
    assert {one["policy"] for one in found["points"][1:]} == {"even layers", "exits", "unified"}
    assert set(found["left_out"]) == {"gateskip", "router", "ffn-skip", "calm", "loops"}
    assert "cannot reach budget" in found["left_out"]["ffn-skip"]  # which calibration finds
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 3  # the first one for wide and for narrow screens
    assert "needs exits, and this checkpoint lists none" in text


def test_a_checkpoint_with_routers_has_only_their_policy(tmp_path: Path, tiny_text: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=2, router=RouterConfig(), tokenizer=True)
    report = compare(model, tmp_path / "work", text=tiny_text, tokens=LEAST_TOKENS)
    whole, *others = report.points
    assert (whole.setting, {one.policy for one in others}) == ("router", {"router"})
    assert point(report, "router", "budget 0.5").kept < point(report, "router", "budget 1").kept == 1


def test_a_text_that_is_too_short_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short to halve. " * 20, encoding="utf-8")
    with pytest.raises(TextError, match="too short to calibrate on one half"):
        compare(model, tmp_path / "work", text=short)
    assert run(["compare", str(model), "--work", str(tmp_path / "work"), "--tokens", "8"]) == 2
    assert "tokens to compare on" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_model_without_room_for_a_prompt_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True, max_position_embeddings=32)
    with pytest.raises(UsageError, match="expected 64 positions or more, found 32"):
        compare(model, tmp_path / "work")


def test_with_no_time_one_policy_is_compared(work: Path, model: Path, tiny_text: Path, report: CompareReport) -> None:
    found = compare(model, work, text=tiny_text, tokens=LEAST_TOKENS, seconds=1e-3)
    (policy,) = {one.policy for one in found.points[1:]}
    assert policy == "gateskip"
    assert {why for name, why in found.left_out.items() if name not in ("loops", "router")} == {"no time was left"}
    assert found.tokens == LEAST_TOKENS
