"""Losses and perplexity against PyTorch's cross-entropy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gsx_exporter.evaluation import evaluate, losses


def test_losses_are_cross_entropies() -> None:
    rng = np.random.default_rng(0)
    logits = (20 * rng.normal(size=(2, 5, 11))).astype(np.float32)
    ids = rng.integers(0, 11, (2, 5))
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits[:, :-1]).double().transpose(1, 2), torch.from_numpy(ids[:, 1:]), reduction="none"
    )
    np.testing.assert_allclose(losses(logits, ids), want.numpy(), atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1000.0, -1000.0], [0.0, 0.0]], np.float32)
    assert losses(logits, np.array([0, 1])) == pytest.approx([2000.0])


def test_equal_logits_have_the_perplexity_of_the_vocabulary() -> None:
    windows = np.zeros((5, 8), np.int64)
    found = evaluate(lambda ids: np.zeros((*ids.shape, 13), np.float32), windows, batch=2)
    assert found.perplexity == pytest.approx(13)
    assert found.tokens == 5 * 7
