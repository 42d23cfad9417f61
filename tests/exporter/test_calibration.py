"""Calibration: the share kept, measured by running, meets every budget of the grid; ties; unusable text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.gate_shares import kept_shares
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.calibration import NEAR_SHARE, TIE, calibrate, threshold_for
from gsx_exporter.rules.gateskip.reference import Threshold
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_exporter.text import MIN_TOKENS, text_after, tokenize
from tests.tiny import tiny_checkpoint

BUDGETS = (1.0, 0.9, 0.7, 0.5)
# Of a single branch behind layer 0, whose scores depend on the token alone and repeat: others make up for its ties.
SHARE_ATOL = 0.06
KEPT_ATOL = 0.01  # the bound: the share really kept, on the calibration text


@pytest.mark.parametrize(
    ("gate", "kv_policy"),
    [
        (GateConfig(), "compute"),
        (GateConfig("scalar", "pre_norm"), "copy"),
        (GateConfig(branches=("mlp",)), "compute"),
        (GateConfig(branches=("attn",)), "copy"),
        (GateConfig("scalar", skip_weights=((0.0, 0.1), (1.0, 0.5), (0.3, 1.0))), "compute"),
    ],
)
def test_the_reference_keeps_what_the_calibration_says(tmp_path: Path, gate: GateConfig, kv_policy: str) -> None:
    """The reference, which shares no code with the calibration, counts the same shares with its thresholds."""
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "m", gate=gate, tokenizer=True))
    text = tokenize(checkpoint, None, max_tokens=2048, window=256)
    points = calibrate(checkpoint, text.ids, BUDGETS, DecoderOptions(GateSkip.of(checkpoint.config), kv_policy))
    reference = Reference.load(checkpoint)
    columns = [("attn", "mlp").index(branch) for branch in gate.branches]
    weights = gate.skip_weights or ((1.0,) * len(columns),) * checkpoint.config.num_layers
    for budget, point in zip(BUDGETS, points, strict=True):
        wanted = kept_shares([weight for of_layer in weights for weight in of_layer], budget)
        found = [point.kept[layer, column] for layer in range(len(weights)) for column in columns]
        assert found[len(columns) :] == pytest.approx(wanted[len(columns) :], abs=SHARE_ATOL)
        assert point.kept_share == pytest.approx(budget, abs=KEPT_ATOL)
        with torch.inference_mode():
            out = reference(torch.from_numpy(text.ids), rule=Threshold(point.thresholds), kv_policy=kv_policy)
        kept = np.array([[float(k.float().mean()) for k in layer] for layer in out.keep])[:, columns]
        assert kept.mean() == pytest.approx(point.kept_share, abs=2e-3)  # near-ties of two float32 computations


scores = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200)


@given(scores, st.floats(0, 1))
@example([0.0, 0.0, 1.0, 1.0, 1.0, 1.1920928955078125e-07, 4.998641500719714e-08], 1.0)
def test_a_threshold_keeps_the_nearest_share_that_ties_allow(values: list[float], share: float) -> None:
    """Scores nearer than TIE are one score; the search for a wide gap may cost NEAR_SHARE of the share."""
    score = np.array(values, np.float32)
    n = len(score)
    kept = float((score > threshold_for(score, share)).mean())
    if np.ptp(score.astype(np.float64)) < TIE:
        assert kept == 1.0
        return
    gaps = np.diff(np.sort(score.astype(np.float64)), prepend=-np.inf, append=np.inf)
    possible = [(n - cut) / n for cut in np.flatnonzero(gaps >= TIE)]
    assert abs(kept - share) <= max(NEAR_SHARE, min(abs(p - share) for p in possible)) + 1e-9


def test_equal_scores_are_kept_or_skipped_together() -> None:
    score = np.array([0.5] * 6 + [0.9] * 4, np.float32)
    assert (score > threshold_for(score, 0.45)).sum() == 4
    assert (score > threshold_for(score, 0.9)).sum() == 10


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_gate_that_cannot_choose_keeps_all(share: float) -> None:
    score = np.full(9, 0.25, np.float32)
    assert (score > threshold_for(score, share)).all()


@pytest.mark.parametrize("content", ["", "too short", "é" * 10])
def test_short_texts_are_refused(tmp_path: Path, tiny_gated: Path, content: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(TextError, match=f"at least {MIN_TOKENS} tokens"):
        tokenize(open_checkpoint(tiny_gated), path, max_tokens=4096)


def test_a_text_without_different_scores_is_refused(tmp_path: Path, tiny_gated: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" " * 4000 + "a few words behind blanks", encoding="utf-8")
    with pytest.raises(TextError, match="turns this text into almost nothing but one token") as error:
        tokenize(open_checkpoint(tiny_gated), path, max_tokens=4096)
    assert "99% of its tokens are" in error.value.message


def test_what_is_not_text_is_refused(tmp_path: Path, tiny_gated: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(128, 256)) * 10)
    with pytest.raises(TextError, match="not UTF-8"):
        tokenize(open_checkpoint(tiny_gated), tmp_path / "binary", max_tokens=4096)
    with pytest.raises(TextError, match="no such"):
        tokenize(open_checkpoint(tiny_gated), tmp_path / "nothing", max_tokens=4096)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path: Path, tiny_text: Path, tiny_gated: Path) -> None:
    small = tiny_checkpoint(tmp_path / "m", gate=GateConfig(), vocab=97)
    (small / "tokenizer.json").write_bytes((tiny_gated / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="does not fit the model"):
        tokenize(open_checkpoint(small), tiny_text, max_tokens=4096)


def test_the_text_after_the_part_that_was_read(tiny_gated: Path, tiny_text: Path) -> None:
    checkpoint = open_checkpoint(tiny_gated)
    seen = tokenize(checkpoint, tiny_text, max_tokens=1024)
    tokenizer = load_tokenizer(checkpoint)
    every = tokenizer.encode(tiny_text.read_text(), add_special_tokens=False).ids
    rest = text_after(checkpoint, tiny_text, seen.tokens, 512)
    assert rest is not None
    ids = rest.ids[:, len(tokenizer.encode("").ids) :].flatten().tolist()
    assert ids == every[seen.tokens :][: len(ids)]
    assert text_after(checkpoint, tiny_text, len(every) - 10, 512) is None, "ten tokens say nothing"
