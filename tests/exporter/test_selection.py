"""Counting and checking selections: docs/design.md section 3, docs/methods.md 3.4."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsx_engines.bundle.counting import kept_count
from gsx_exporter.reference.rule import KeepAll
from gsx_exporter.rules.gateskip.reference import Rank, Threshold
from gsx_exporter.rules.gateskip.traced import rank_count
from gsx_plugins.errors import UsageError


def _decimal_count(n: int, millionths: int) -> int:
    """The formula of docs/design.md in exact arithmetic."""
    budget = Fraction(millionths, 10**6)
    if budget >= 1 or n <= 1:
        return n
    return n - 1 - math.floor((1 - budget) * (n - 1))


@given(n=st.integers(0, 200_000), millionths=st.integers(1, 1_000_000))
def test_count_is_the_decimal_answer(n: int, millionths: int) -> None:
    budget = millionths / 10**6
    assert kept_count(n, budget) == _decimal_count(n, millionths)
    # At run time the budget is a float32.
    assert kept_count(n, float(np.float32(budget))) == _decimal_count(n, millionths)


@given(n=st.integers(0, 3000), millionths=st.integers(1, 1_000_000))
def test_count_is_the_formula_of_the_design(n: int, millionths: int) -> None:
    budget = millionths / 10**6
    # Doubles err by less than the sixth place as long as n is in the thousands.
    expected = n if budget >= 1 or n <= 1 else n - 1 - math.floor(round((1 - budget) * (n - 1), 6))
    close = abs((1 - budget) * (n - 1) - round((1 - budget) * (n - 1))) < 1e-5
    if not close or millionths % 1000 == 0:
        assert kept_count(n, budget) == expected


@pytest.mark.parametrize(
    ("n", "budget", "kept"),
    [
        (0, 0.5, 0),
        (1, 0.1, 1),
        (2, 0.5, 1),
        (11, 0.9, 9),  # the rounding trap of methods.md 3.4
        (101, 0.71, 71),
        (101, 0.47, 47),
        (512, 1.0, 512),
        (512, 0.5, 256),
        (2, 0.000001, 1),
    ],
)
def test_count_of_known_cases(n: int, budget: float, kept: int) -> None:
    assert kept_count(n, budget) == kept


@pytest.mark.parametrize("budget", [0, 0.0, -0.1, 1.01, float("nan"), float("inf"), "0.5", None])
def test_what_is_not_a_budget(budget: Any) -> None:
    with pytest.raises(UsageError, match=r"the budget is out of range\n  expected a number above 0 and at most 1"):
        Rank(budget)


@pytest.mark.parametrize(
    "thresholds",
    [
        np.zeros(4, np.float32),
        np.zeros((4, 3), np.float32),
        np.zeros((4, 2)),
        np.full((1, 2), np.nan, np.float32),
    ],
)
def test_what_are_not_thresholds(thresholds: np.ndarray) -> None:
    with pytest.raises(UsageError, match="thresholds"):
        Threshold(thresholds)


def test_selections_are_values() -> None:
    assert KeepAll() == KeepAll()
    assert Rank(0.5) == Rank(0.5)


def test_the_graph_counts_as_the_formula_does() -> None:
    """In ONNX Runtime, for lengths at which a division in float32 is off by one."""

    class Count(torch.nn.Module):
        def forward(self, valid: torch.Tensor, ends: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
            return rank_count(valid, ends, budget)

    example = (torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool), torch.tensor(0.5))
    axis = {0: torch.export.Dim.AUTO}
    program = torch.onnx.export(Count(), example, dynamo=True, dynamic_shapes=(axis, axis, None), verbose=False)
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for n in (*range(1, 300), *range(1000, 8192, 67)):
        for budget in (0.3, 0.55, 0.7, 0.85, 0.9, 0.95):
            feeds = dict(zip(names, (np.ones(n, bool), np.zeros(n, bool), np.float32(budget)), strict=True))
            found = int(session.run(None, {k: np.asarray(v) for k, v in feeds.items()})[0][0])
            assert found == kept_count(n, budget), (n, budget)
