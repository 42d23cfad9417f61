"""Codes of weights: rounding to nearest, GPTQ, and where chosen codes are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gsx_exporter.quantization import codes as coding
from gsx_exporter.quantization.chosen import ChosenCodes
from gsx_exporter.quantization.codes import round_to_nearest
from gsx_exporter.quantization.gptq import DAMPING, Compensation, gptq
from gsx_exporter.quantization.scheme import (
    E4M3,
    INT4,
    INT8,
    INT8_BLOCKS,
    WeightFormat,
)


def weight_of(seed: int, spread: float = 1.0, width: int = 64, out: int = 5) -> torch.Tensor:
    return torch.randn(width, out, generator=torch.Generator().manual_seed(seed)) * spread


# Rounding to a code is off by half a step at most; half precision's scale is itself rounded, and codes follow it.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", [INT8, INT8_BLOCKS])
@given(seed=st.integers(0, 10_000), spread=st.floats(1e-3, 1e3))
def test_int8_weights_are_off_by_half_a_step(form: WeightFormat, dtype: torch.dtype, seed: int, spread: float) -> None:
    weight = weight_of(seed, spread)
    weight[:, 2] = 0
    found = round_to_nearest(weight, form, dtype)
    assert found.codes.dtype == torch.int8
    assert found.scales.shape == (1 if form == INT8 else 2, 5)
    assert int(found.codes.abs().max()) == 127, "the largest weight takes the largest code"
    steps = found.scales.float().repeat_interleave(64 // len(found.scales), 0)
    slack = 127 * 2.0**-11 if dtype == torch.float16 else 1e-4  # the clipped end, where the scale was rounded down
    assert bool(((found.decoded() - weight).abs() <= steps * (0.5 + slack)).all())
    assert not found.codes[:, 2].any()


@given(seed=st.integers(0, 10_000), shift=st.floats(-2, 2))
def test_int4_blocks_hold_their_range(seed: int, shift: float) -> None:
    """Codes and zero-points fit 4 bits, 0 is a value, and no weight is off by more than a step and what was cut off."""
    weight = weight_of(seed) + shift
    found = round_to_nearest(weight, INT4, torch.float32)
    assert found.zero_points is not None
    assert found.scales.shape == found.zero_points.shape == (2, 5)
    for codes in (found.codes, found.zero_points):
        assert (codes.dtype, bool((codes >= -8).all()), bool((codes <= 7).all())) == (torch.int8, True, True)
    blocks = weight.reshape(2, 32, 5)
    ranges = blocks.amax(1).clamp(min=0) - blocks.amin(1).clamp(max=0)
    off = (found.decoded() - weight).abs().reshape(2, 32, 5).amax(1)
    assert bool((off <= ranges * (0.2 + 1 / 15)).all())


@pytest.mark.parametrize("form", [INT8, INT8_BLOCKS, INT4, E4M3])
def test_channels_may_be_rounded_some_at_a_time(form: WeightFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(0).to(torch.bfloat16)
    whole = round_to_nearest(weight, form, torch.float32)
    monkeypatch.setattr(coding, "_AT_A_TIME", 2 * 64)
    parts = round_to_nearest(weight, form, torch.float32)
    assert (parts.codes.dtype, parts.scales.shape) == (whole.codes.dtype, whole.scales.shape)
    assert torch.equal(parts.decoded(), whole.decoded())


@given(seed=st.integers(0, 10_000))
def test_fp8_weights_keep_three_bits_of_mantissa(seed: int) -> None:
    weight = weight_of(seed)
    found = round_to_nearest(weight, E4M3, torch.float32)
    assert found.codes.dtype == torch.float8_e4m3fn
    error = (found.decoded() - weight).abs()
    # 2^-4 relative; below the smallest normal code, 2^-6, half the spacing of 2^-9.
    assert bool((error <= torch.maximum(weight.abs() * 2.0**-4, found.scales * 2.0**-10) * 1.001).all())


@pytest.mark.parametrize("form", [INT8, INT8_BLOCKS, INT4, E4M3])
@given(seed=st.integers(0, 1_000))
def test_gptq_changes_outputs_less_than_rounding_does(form: WeightFormat, seed: int) -> None:
    """On inputs whose channels go together, as a model's do; the codes are in the same range."""
    inputs = torch.randn(256, 8, generator=torch.Generator().manual_seed(seed)) @ weight_of(seed + 1, out=64, width=8)
    inputs = inputs + weight_of(seed + 2, 0.1, 256, 64)
    weight = weight_of(seed + 3)
    off = []
    for found in (
        round_to_nearest(weight, form, torch.float32),
        gptq(weight, inputs.t() @ inputs, form, torch.float32),
    ):
        assert float(found.codes.float().abs().max()) <= max(form.largest, 8)
        off.append(float((inputs @ (found.decoded() - weight)).square().sum()))
    assert off[1] < off[0]


@given(seed=st.integers(0, 1_000), first=st.integers(0, 63))
def test_the_factor_is_that_of_the_inverse(seed: int, first: int) -> None:
    """U^T U is the inverse of the damped Hessian, in which inputs that nothing reads stand alone."""
    rows, weight = weight_of(seed, width=256, out=64), weight_of(seed + 1)
    weight[[3, 40]] = 0
    hessian = (rows.t() @ rows).double()
    wanted = hessian.clone()
    for unread in (3, 40):
        wanted[unread], wanted[:, unread] = 0, 0
        wanted[unread, unread] = 1
    wanted += DAMPING * wanted.diagonal().mean() * torch.eye(64)
    found = Compensation(weight, hessian.float())
    factor = found.rows(0, 64).double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ wanted, torch.eye(64).double(), atol=1e-4, rtol=0)
    assert torch.equal(found.rows(first, 64), found.rows(0, 64)[first:])


def test_a_hessian_that_rounding_spoiled_passes_no_errors_on() -> None:
    hessian = -torch.ones(64, 64)
    assert torch.equal(Compensation(weight_of(0), hessian.clone()).rows(0, 64), torch.eye(64))
    found = gptq(weight_of(0), hessian, INT8, torch.float32)
    assert torch.equal(found.codes, round_to_nearest(weight_of(0), INT8, torch.float32).codes)


def test_chosen_codes_are_found_by_matrix_and_format(tmp_path: Path) -> None:
    chosen = ChosenCodes(tmp_path)
    stored = round_to_nearest(weight_of(0), INT4, torch.float16)
    chosen.store("layers.0", {"layers.0.mlp.up_proj": stored})
    found = chosen.find("layers.0.mlp.up_proj", INT4)
    assert found is not None
    assert torch.equal(found.decoded(), stored.decoded())
    assert found.scales.dtype == torch.float16
    assert chosen.find("layers.0.mlp.up_proj", INT8_BLOCKS) is None, "another format is rounded to nearest"
    assert chosen.find("layers.1.mlp.up_proj", INT4) is None
