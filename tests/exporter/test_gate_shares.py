"""A budget divided among gates: its mean is the budget, and what weighs more skips more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsx.workflows.export import export
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.gate_shares import kept_shares
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

WEIGHTS = ((0.0, 1.0), (1.0, 0.25), (0.5, 1.0))
weights = st.lists(st.sampled_from([0.0, 1e-4, 0.01, 0.3, 1.0]), min_size=1, max_size=40).filter(any)


@given(weights, st.floats(0.01, 1.0))
def test_shares_follow_the_weights_and_meet_the_budget(of_gates: list[float], budget: float) -> None:
    shares = kept_shares(of_gates, budget)
    least = of_gates.count(0.0) / len(of_gates)  # what gates without a weight keep
    assert sum(shares) / len(shares) == pytest.approx(max(budget, least), abs=1e-7)
    by_weight = [share for _, share in sorted(zip(of_gates, shares, strict=True))]
    assert by_weight == sorted(by_weight, reverse=True)
    assert all(share == 1.0 for weight, share in zip(of_gates, shares, strict=True) if weight == 0.0)
    lower = kept_shares(of_gates, budget / 2)
    assert all(low <= high + 1e-9 for low, high in zip(lower, shares, strict=True))


@given(st.integers(1, 64), st.floats(0.01, 1.0))
def test_equal_weights_give_the_budget_to_each(count: int, budget: float) -> None:
    assert kept_shares([0.2] * count, budget) == pytest.approx([budget] * count, abs=1e-12)


@pytest.mark.parametrize(
    "written",
    [
        [[1.0, 1.0]],
        [[1.0]] * 3,
        [[1.0, -1.0]] * 3,
        [[0.0, 0.0]] * 3,
        [[1.0, "1"]] * 3,
        [[1.0, float("nan")]] * 3,
        0.5,
        [],
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, written: Any) -> None:
    model = tiny_checkpoint(tmp_path, gate=GateConfig("scalar"))
    path = model / "config.json"
    raw = json.loads(path.read_text())
    raw["gsx"]["gate"]["skip_weights"] = written
    path.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="skip_weights"):
        open_checkpoint(model)


def test_selection_by_rank_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", gate=GateConfig("scalar", skip_weights=WEIGHTS), tokenizer=True)
    with pytest.raises(UsageError, match="keeps the same share at every branch"):
        export(model, tmp_path / "bundle", budget=0.7, select="rank")
