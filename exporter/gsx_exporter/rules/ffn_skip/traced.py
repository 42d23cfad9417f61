"""FFN-SkipLLM (arXiv:2404.03865): a token whose state an FFN hardly changes skips the next FFNs. Needs no training.

Attention always runs. After each FFN that a token ran, its residual stream is compared with the one before it. If the
change, 1 - cosine, is at most the layer's threshold, the FFNs of the next `stride` layers are skipped; the one after
them runs, and its change is measured again. A layer with the threshold minus infinity is cold: its FFN always runs, and
never causes a skip. Facts, and what is unknown: docs/methods.md section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.decoder.rule import (
    FORCED,
    BranchInput,
    BranchScore,
    Tokens,
    TracedRule,
    Value,
    Values,
    WatchesBranches,
    apply_forced,
    before,
    forced,
)
from gsx_exporter.rules.scores import by_token

_MLP = BRANCHES.index("mlp")


@dataclass(frozen=True)
class FfnSkip(TracedRule, WatchesBranches):
    """Skip the FFNs after one that hardly changed the state.

    What a token needs to know is a queue of verdicts, one for each of the next `stride` layers: the last change minus
    its threshold; the layer runs if that is above 0. Beyond the queue every layer runs. So a decision is one
    comparison, and a token that was skipped only moves on in its queue: on a thin model more nodes cost more than they
    save.

    Args:
        stride: number of FFNs that are then skipped.
    """

    stride: int

    @property
    def branches(self) -> tuple[Branch, ...]:
        return ("mlp",)

    @property
    def inputs(self) -> Mapping[str, Value]:
        return {"thresholds": Value(torch.float32, ("B", "L", 2)), "full_until": Value(torch.int64, ("B",))}

    @property
    def whole(self) -> frozenset[str]:
        return frozenset(("thresholds",))

    @property
    def call(self) -> Mapping[str, Value]:
        """See `TracedRule`. bounds: 0, and minus infinity for cold layers; similar: the cosine from which a change is
        within the threshold; runs: the verdict of layers that no FFN decides about, infinity."""
        own = {"bounds": Value(torch.float32, ("L", "N")), "similar": Value(torch.float32, ("L", "N"))}
        return {**FORCED, **own, "runs": Value(torch.float32, ("N", 1))}

    @property
    def carried(self) -> Mapping[str, Value]:
        """See `TracedRule`: the queue, for the next layer first."""
        return {name: Value(torch.float32, ("N", 1)) for name in self._queue}

    @property
    def _queue(self) -> tuple[str, ...]:
        return tuple(f"verdict_{number}" for number in range(1, self.stride + 1))

    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """Tokens below `full_until` run in full; no FFN has run yet."""
        values = forced(tokens, before(tokens.positions, inputs["full_until"]))
        thresholds = by_token(tokens, inputs["thresholds"][:, :, _MLP])
        bounds = torch.where(thresholds > -torch.inf, torch.tensor(0.0), torch.tensor(-torch.inf))
        runs = torch.full_like(values["forced_score"], torch.inf).unsqueeze(1)
        first = {name: runs.clone() for name in self._queue}
        return {**values, "bounds": bounds, "similar": 1 - thresholds, "runs": runs, **first}

    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """The score is the verdict about this layer."""
        return BranchScore(apply_forced(values[self._queue[0]].squeeze(1), values), values["bounds"])

    def after(self, branch: Branch, before: Tensor, after: Tensor, index: Tensor, values: Values) -> Values:
        """The queues move on; those of rows that ran are filled with the new verdict."""
        was, now = (state.index_select(0, index).to(torch.float32) for state in (before, after))
        cosine = _dot(was, now) / (_dot(was, was) * _dot(now, now)).sqrt()
        found = values["similar"].index_select(0, index).unsqueeze(1) - cosine
        moved = [*(values[name] for name in self._queue[1:]), values["runs"]]
        queues = zip(self._queue, moved, strict=True)
        return {name: queue.index_copy(0, index, found) for name, queue in queues}


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Dot products of rows, [K, H] twice -> [K, 1]: a matrix product, since ONNX Runtime's sum gives a wrong shape for
    K = 0."""
    return torch.bmm(one.unsqueeze(1), other.unsqueeze(2)).squeeze(2)
