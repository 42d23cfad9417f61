"""Running both sides: the reference, and the engine's graph with internal values as outputs.

Everything is teacher-forced: both sides read the same tokens, whatever they would have generated themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from gsx.parity.closeness import Observation
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.tensor_names import past
from gsx_engines.bundle.words import BRANCHES, KvPolicy
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.reference.model import Reference, ReferenceOutput
from gsx_exporter.reference.rule import ReferenceRule


class ReferenceSide:
    """The reference with a keep rule.

    Args:
        reference: the model.
        rule: the reference rule, with its parameters.
        kv_policy: as exported.
    """

    def __init__(self, reference: Reference, rule: ReferenceRule, kv_policy: KvPolicy) -> None:
        self._reference, self._rule, self._kv_policy = reference, rule, kv_policy

    def observe(self, ids: np.ndarray, mask: np.ndarray) -> list[Observation]:
        """Run ids [B, S] in one call; mask [B, S] is 0 for padding. Returns one observation per sequence."""
        output = self.step(ids, mask, DynamicCache())
        margins = margins_of(output)
        found = []
        for row, valid in enumerate(mask.astype(bool)):
            found.append(
                Observation(
                    logits=_rows(output.logits, row, valid),
                    states=[_rows(state, row, valid) for state in output.states[1:]],
                    keys=[_heads(layer.keys[row].numpy(), valid) for layer in output.cache.layers],
                    values=[_heads(layer.values[row].numpy(), valid) for layer in output.cache.layers],
                    scores=_scores(output)[:, :, row, valid],
                    keep=_keep(output)[:, :, row, valid],
                    margins=margins[:, :, row, valid],
                )
            )
        return found

    def step(self, ids: np.ndarray, mask: np.ndarray, cache: DynamicCache) -> ReferenceOutput:
        """One call with a cache: ids [B, S], mask [B, past + S]."""
        return self._reference(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            cache=cache,
            rule=self._rule,
            kv_policy=self._kv_policy,
        )


class EngineSide:
    """ONNX Runtime on the unchanged `model.onnx`, with states, scores and kept rows as further outputs."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self._places = [(layer, branch, _column(branch)) for layer, branch in manifest.skippable_places]
        capture = [f"layers.{i}.output" for i in range(manifest.decoder.num_layers)]
        for layer, branch, _ in self._places:
            capture += [f"layers.{layer}.{branch}.score", f"layers.{layer}.{branch}.index"]
        self.stage = PortableStage(bundle, capture=capture)
        self.runner: Runner = WholeRunner(self.stage)

    def observe(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        controls: RuntimeValues,
        chunks: Sequence[int] | None = None,
    ) -> list[Observation]:
        """Run ids [B, S], in one call or in chunks of the given sizes with the cache.

        Args: mask [B, S], 0 for padding; controls as a runner takes them.
        Returns: one observation per sequence, without padding.
        """
        B, S = ids.shape
        L = self._manifest.decoder.num_layers
        positions = positions_of(mask)
        memory = self.stage.new_memory(B, S)
        logits: list[np.ndarray] = []
        states: list[list[np.ndarray]] = [[] for _ in range(L)]
        scores = np.full((L, 2, B, S), np.nan, np.float32)
        keep = np.ones((L, 2, B, S), bool)
        at = 0
        for size in chunks or [S]:
            part = slice(at, at + size)
            results = self.stage.execute(memory, ids[:, part], mask[:, : at + size], positions[:, part], controls)
            logits.append(results["logits"].astype(np.float32, copy=False))
            captured = self.stage.captured
            for layer in range(L):
                states[layer].append(captured[f"layers.{layer}.output"].reshape(B, size, -1))
            for layer, branch, column in self._places:
                scores[layer, column, :, part] = captured[f"layers.{layer}.{branch}.score"].reshape(B, size)
                kept = np.zeros(B * size, bool)
                kept[captured[f"layers.{layer}.{branch}.index"]] = True
                keep[layer, column, :, part] = kept.reshape(B, size)
            at += size
        assert at == S, "the chunks do not add up to the sequence"
        whole = [np.concatenate(parts, axis=1) for parts in states]
        all_logits = np.concatenate(logits, axis=1)
        return [
            Observation(
                logits=all_logits[row, valid],
                states=[state[row, valid] for state in whole],
                keys=[_heads(memory[past(i, "key")][row], valid) for i in range(L)],
                values=[_heads(memory[past(i, "value")][row], valid) for i in range(L)],
                scores=scores[:, :, row, valid],
                keep=keep[:, :, row, valid],
            )
            for row, valid in enumerate(mask.astype(bool))
        ]


@dataclass(frozen=True)
class Mismatch:
    """A token of the greedy continuation that differs.

    Args:
        position: number of the new token, from 0.
        reference_token, engine_token: ids.
        margin: difference of the reference's two best logits.
        excused: why it is not an error, or None.
    """

    position: int
    reference_token: int
    engine_token: int
    margin: float
    excused: str | None


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation, token by token: the reference's tokens are fed to both sides.

    As long as all tokens agree, this is what both would have generated on their own. After a difference the comparison
    continues with the next token.

    Args:
        tokens: new tokens compared.
        mismatches: tokens that differ.
        flips: branches of a step that kept another number of rows, near ties or not; wrong_flips: steps in which the
            first of them was not a near tie and did not follow from one.
        max_abs_logits: largest difference of the logits, before any flip.
    """

    tokens: int
    mismatches: tuple[Mismatch, ...]
    flips: int
    wrong_flips: int
    max_abs_logits: float

    @property
    def wrong(self) -> tuple[Mismatch, ...]:
        """Mismatches that nothing excuses."""
        return tuple(mismatch for mismatch in self.mismatches if mismatch.excused is None)


@dataclass(frozen=True)
class _Step:
    """What the reference did in one step of its greedy continuation."""

    ids: np.ndarray
    logits: np.ndarray
    keep: np.ndarray
    margins: np.ndarray


def reference_continuation(side: ReferenceSide, prompt: np.ndarray, new_tokens: int) -> list[_Step]:
    """The reference's own greedy continuation of prompt [1, S], with its cache, past any end-of-text."""
    steps = []
    cache = DynamicCache()
    ids, length = prompt, 0
    for _ in range(new_tokens):
        length += ids.shape[1]
        output = side.step(ids, np.ones((1, length), np.int64), cache)
        logits = output.logits[0, -1].numpy().astype(np.float32)
        keep, margins = _keep(output)[:, :, 0], margins_of(output)[:, :, 0]
        steps.append(_Step(ids, logits, keep, margins))
        ids = np.array([[int(logits.argmax())]], np.int64)
    return steps


def follow(
    runner: Runner,
    steps: Sequence[_Step],
    controls: RuntimeValues,
    *,
    logit_tolerance: Callable[[np.ndarray], float],
    near_tie: float,
) -> Greedy:
    """Feed a runner the reference's continuation and compare the tokens that it would have generated.

    Args:
        logit_tolerance: from the reference's logits [V], the lead of the best token up to which another may win.
        near_tie: margin up to which a decision may flip.
    """
    places = runner.manifest.skippable_places
    cache = runner.new_cache(1, sum(step.ids.shape[1] for step in steps))
    mismatches: list[Mismatch] = []
    flips = wrong_flips = 0
    max_abs = 0.0
    near_tie_flip: int | None = None
    for number, step in enumerate(steps):
        output = runner.step(cache, step.ids, controls)
        logits = output.logits[0, -1]
        if output.kept is not None:
            differ = [
                (layer, _column(branch))
                for layer, branch in places
                if output.kept[layer, _column(branch)] != step.keep[layer, _column(branch)].sum()
            ]
            flips += len(differ)
            if differ and near_tie_flip is None:
                if step.margins[differ[0]].min() <= near_tie:
                    near_tie_flip = number
                else:
                    wrong_flips += 1
        if near_tie_flip is None:
            error = float(np.abs(logits.astype(np.float64) - step.logits).max())
            max_abs = max(max_abs, error if np.isfinite(error) else np.inf)
        token, wanted = int(logits.argmax()), int(step.logits.argmax())
        if token != wanted:
            best = np.partition(step.logits, -2)[-2:]
            margin = float(best[1] - best[0])
            excused = None
            if near_tie_flip is not None:
                excused = f"a near-tie decision flipped at token {near_tie_flip}"
            elif margin <= logit_tolerance(step.logits):
                excused = "the reference's two best logits are nearer than the logit tolerance"
            mismatches.append(Mismatch(number, wanted, token, margin, excused))
    return Greedy(len(steps), tuple(mismatches), flips, wrong_flips, max_abs)


def runner_logits(runner: Runner, ids: np.ndarray, controls: RuntimeValues) -> tuple[np.ndarray, np.ndarray | None]:
    """Logits [B, S, V] of a runner for windows [B, S] without padding, in one call, and rows kept [L, 2]."""
    output = runner.step(runner.new_cache(*ids.shape), ids, controls, logits="all")
    return output.logits, output.kept


def positions_of(mask: np.ndarray) -> np.ndarray:
    """Positions [B, S] int64: valid tokens counted from 0, as other clients do with padding on the left."""
    return np.maximum(mask.cumsum(axis=1) - 1, 0).astype(np.int64)


def _column(branch: str) -> int:
    return BRANCHES.index(branch)


def _scores(output: ReferenceOutput) -> np.ndarray:
    """[L, 2, B, S] float32, NaN where there is no score."""
    B, S = output.keep[0][0].shape
    none = np.full((B, S), np.nan, np.float32)
    return np.stack([np.stack([none if s is None else s.numpy() for s in row]) for row in output.scores])


def margins_of(output: ReferenceOutput) -> np.ndarray:
    """How far each decision was from flipping, [L, 2, B, S] float64; inf where it cannot flip."""
    return np.stack([np.stack([margin.numpy() for margin in row]) for row in output.margins])


def _keep(output: ReferenceOutput) -> np.ndarray:
    """[L, 2, B, S] bool."""
    return np.stack([np.stack([keep.numpy() for keep in row]) for row in output.keep])


def _rows(x: torch.Tensor, row: int, valid: np.ndarray) -> np.ndarray:
    rows: np.ndarray = x[row].float().numpy()[valid]
    return rows


def _heads(x: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """[heads, T, D] -> [S, heads x D], only valid tokens."""
    rows = x.transpose(1, 0, 2)[valid]
    return rows.reshape(len(rows), -1)
