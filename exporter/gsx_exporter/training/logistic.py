"""Logistic regression on states. It is convex, so it is solved rather than trained: a text has one answer."""

from __future__ import annotations

import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

# Factor of half the squared weights (for standardized states), added to the mean loss: keeps weights finite even if the
# labels are separable.
PENALTY = 1e-3
_STEPS = 200


def logistic_regression(states: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weights with which `sigmoid(states @ weight + bias)` is closest to labels, by mean cross-entropy.

    Args:
        states: [N, H] float32.
        labels: [N] float32, from 0 to 1.
        weights: [N], how much each row counts; None for all alike.
    Returns: weight [1, H] and bias [1].
    """
    mean, spread = states.mean(dim=0), states.std(dim=0).clamp(min=1e-6)
    each = torch.ones(len(states)) if weights is None else weights
    weight, bias = (torch.zeros(size, requires_grad=True) for size in (states.shape[1], 1))
    solver = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        scaled = weight / spread
        scores = states @ scaled + (bias - mean @ scaled)
        found = binary_cross_entropy_with_logits(scores, labels, each, reduction="sum") / each.sum()
        found = found + PENALTY / 2 * weight.square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    solver.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        scaled = weight / spread
        return scaled[None], bias - mean @ scaled


def ranking(scores: Tensor, labels: Tensor) -> float:
    """Probability that a row with label True scores higher than one without (area under the ROC curve).

    Args: scores: [N]; labels: [N] bool.
    Returns: 0.5 is a guess; NaN if all labels are the same.
    """
    positive = labels.numpy()
    n = int(positive.sum())
    if n in (0, len(positive)):
        return float("nan")
    ranks = rankdata(scores.numpy())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))
