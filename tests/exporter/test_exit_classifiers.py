"""CALM's trained classifiers: how they are fitted, a checkpoint with them, and parity of an export with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.reference.model import Reference
from gsx_exporter.training.exit_classifiers import _fit, fit_exit_classifiers, train_exit_classifiers
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint


def test_a_classifier_is_the_balanced_optimum() -> None:
    """Labels drawn by a known rule come back, with the bias of a text that has as many of each kind."""
    rng = torch.Generator().manual_seed(0)
    states = torch.randn(20_000, 3, generator=rng) * torch.tensor([1.0, 30.0, 0.1]) + torch.tensor([0.0, 50.0, 2.0])
    logits = 2.0 * states[:, 0] + (states[:, 1] - 50) / 30 - 3.0
    agrees = torch.rand(20_000, generator=rng) < logits.sigmoid()
    weight, bias = _fit(states, agrees, depth=1)
    # A balanced text moves the log-odds by those of the shares; the rest is sampling error and the penalty.
    shift = torch.logit(agrees.float().mean())
    found = states @ weight[0] + bias
    # Sampling error: about 1 / sqrt(20000 x 0.1) of a logit and direction; the penalty shrinks by as much again.
    assert torch.corrcoef(torch.stack([found, logits]))[0, 1] > 0.995
    assert float((found.mean() - (logits.mean() - shift)).abs()) < 0.15


@pytest.mark.parametrize("label", [True, False])
def test_an_exit_that_always_or_never_agrees_teaches_nothing(label: bool) -> None:
    with pytest.raises(
        UsageError, match=r"exit 3: there is nothing to learn[\s\S]*" + ("always" if label else "never")
    ):
        _fit(torch.randn(10, 4), torch.full((10,), label), depth=3)


def test_agreement_is_that_of_the_reference(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "model", layers=3, exit_classifiers=(1,)))
    ids = np.random.default_rng(0).integers(3, 97, (8, 64))
    found = fit_exit_classifiers(checkpoint, ids, (1, 2))
    reference = Reference.load(checkpoint)
    output = reference(torch.from_numpy(ids[7:]))  # the last eighth is held out
    for one in found:
        agrees = reference.exit_logits(output, one.depth).argmax(-1) == output.logits.argmax(-1)
        assert one.agreement == pytest.approx(float(agrees.float().mean()))
        scores = (output.states[one.depth] @ one.weight.t() + one.bias)[agrees.logical_not()]
        above = (output.states[one.depth] @ one.weight.t() + one.bias)[agrees][:, None] > scores
        assert one.ranking == pytest.approx(float(above.float().mean()), abs=1e-6)


def test_a_checkpoint_gets_classifiers_and_keeps_its_weights(tmp_path: Path, tiny_text: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=4, exits=(1, 3), tokenizer=True)
    result = train_exit_classifiers(model, tmp_path / "out", text=tiny_text.parent, tokens=4096)
    assert [one.depth for one in result.exits] == [1, 3]
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    names = {f"model.layers.{layer}.exit_classifier.{part}" for layer in (0, 2) for part in ("weight", "bias")}
    assert set(after) - set(before) == names
    assert json.loads((tmp_path / "out" / "config.json").read_text())["gsx"]["exit_classifiers"] == [1, 3]
    # Again, and at other exits: the old ones are removed.
    train_exit_classifiers(tmp_path / "out", tmp_path / "again", depths=[2], text=tiny_text.parent, tokens=4096)
    assert open_checkpoint(tmp_path / "again").config.exit_classifiers == (2,)


@pytest.mark.slow
def test_parity(tmp_path: Path, tiny_text: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=4, exit_classifiers=(1, 3), tokenizer=True)
    export(model, tmp_path / "out", policy="calm:classifier,threshold=0.5", draft="exit:2")
    report = verify(tmp_path / "out", text=tiny_text, tokens=256, greedy_tokens=32)
    assert [check.name for check in report.checks if check.verdict == "fail"] == []
    shares = [result.kept_share for result in report.results if result.kept_share is not None]
    assert min(shares) < 1, "something leaves"


@pytest.mark.parametrize(
    ("depths", "message"),
    [([0], "outside the model"), ([3], "outside the model"), (None, '"exits"')],
)
def test_exits_that_cannot_have_one_are_refused(
    tmp_path: Path, tiny_text: Path, depths: list[int] | None, message: str
) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=3, tokenizer=True)
    with pytest.raises(UsageError, match=message):
        train_exit_classifiers(model, tmp_path / "out", depths=depths, text=tiny_text.parent)
    assert not (tmp_path / "out").exists()


def test_a_text_without_four_windows_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", exits=(1,), tokenizer=True)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("too short")
    with pytest.raises(TextError, match="2048 tokens or more"):
        train_exit_classifiers(model, tmp_path / "out", text=tmp_path / "text")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"exit classifiers are incomplete[\s\S]*model\.layers\.0\.exit_classifier\.bias"),
        ("unnamed", r"exit classifiers that config\.json does not mention[\s\S]*exit_classifiers"),
        ("nan", r"exit_classifier\.bias contains NaN"),
        ("last", "names a depth that the model does not have"),
    ],
)
def test_a_checkpoint_that_lacks_one_is_refused_by_name(tmp_path: Path, change: str, message: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", exit_classifiers=(1,))
    tensors = load_file(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    name = "model.layers.0.exit_classifier.bias"
    if change == "missing":
        del tensors[name]
    elif change == "nan":
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    else:
        config["gsx"]["exit_classifiers"] = [3] if change == "last" else []
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)
