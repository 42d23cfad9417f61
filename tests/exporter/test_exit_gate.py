"""Ouro's exit gate: what it is fitted to, a checkpoint with it, and what decides by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.loops.reference import CountedLoops
from gsx_exporter.training.exit_gate import LoopGain, _fit, fit_exit_gate, going_on, train_exit_gate
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

LOOPS, LENGTH = 3, 64


@pytest.fixture(scope="module")
def ouro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ouro") / "model", "ouro", layers=2, tokenizer=True)


def test_labels_are_the_published_ones() -> None:
    losses = [torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.5, 1.995, 2.5])]
    (label,) = going_on(losses)  # a gain of 0.5; of 0.005, where both are as good; none, which counts as 0
    torch.testing.assert_close(label, torch.tensor([1.0, 0.5, 1 / (1 + np.exp(0.25))]).float(), atol=1e-4, rtol=0)


def test_losses_are_those_of_fewer_loops(ouro: Path) -> None:
    checkpoint, ids = open_checkpoint(ouro), np.random.default_rng(0).integers(3, 250, (4, LENGTH))
    found = fit_exit_gate(checkpoint, ids)
    assert found.weight.shape == (1, 64)
    reference, held = Reference.load(checkpoint), torch.from_numpy(ids[3:])
    for count, gain in enumerate(found.gains, start=1):
        logits = reference(held, rule=CountedLoops(np.array([count])), kv_policy="none").logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], held[0, 1:])
        assert (gain.loops, gain.loss) == (count, pytest.approx(float(loss), abs=1e-4))
    assert np.isnan(found.gains[-1].leaving)


def test_the_gate_finds_who_gains() -> None:
    """One direction of the state says whether another loop helps; the same one after each loop."""
    rng = torch.Generator().manual_seed(0)
    states = [torch.randn(4000, 5, generator=rng) for _ in range(2)]
    losses = [torch.full((4000,), 3.0)]
    for one in states:
        losses.append(losses[-1] - 0.3 * (one[:, 2] > 0))
    found = _fit(states, losses, learnt=3000)
    assert found.weight[0].abs().argmax() == 2
    assert float(found.weight[0, 2]) < 0, "who gains stays"
    for gain in found.gains[:-1]:
        # Half of the tokens gain; a label of no gain is 0.44, so that leaving is never quite sure.
        assert gain.helped == pytest.approx(0.5, abs=0.05)
        assert gain.ranking > 0.99


def test_a_checkpoint_gets_the_gate_and_keeps_its_weights(ouro: Path, tmp_path: Path, tiny_text: Path) -> None:
    result = train_exit_gate(ouro, tmp_path / "out", text=tiny_text.parent, tokens=4096)
    assert [type(one) for one in result.gains] == [LoopGain] * LOOPS
    before, after = (load_file(folder / "model.safetensors") for folder in (ouro, tmp_path / "out"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert (set(after), changed) == (set(before), {f"model.early_exit_gate.{part}" for part in ("weight", "bias")})
    assert open_checkpoint(tmp_path / "out").config.loop_gate


@pytest.mark.parametrize(("family", "keys"), [("llama", {}), ("dory", {}), ("ouro", {"total_ut_steps": 1})])
def test_a_model_without_such_a_gate_is_refused(tmp_path: Path, family: str, keys: dict[str, int]) -> None:
    model = tiny_checkpoint(tmp_path / "model", family, layers=2, tokenizer=True, **keys)
    with pytest.raises(UsageError, match="has no exit gate between loops"):
        train_exit_gate(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
