"""Running both sides: the reference, and the engine's graph with internal values as outputs.

Everything is teacher-forced: both sides read the same tokens. Greedy text is the one that a runner wrote, and the
reference reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache

from gsx.parity.closeness import Observation
from gsx.parity.greedy import GreedyText, ReferenceStep
from gsx.parity.routes import Routes, routers_of, routes_of
from gsx.parity.store import Rows, Store
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.tensor_names import past
from gsx_engines.bundle.words import BRANCHES, KvPolicy
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.streamed import StreamedStage
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.reference.model import Reference, ReferenceOutput
from gsx_exporter.reference.rule import ReferenceRule
from gsx_plugins.progress import OnProgress, silent


class ReferenceSide:
    """The reference with a keep rule.

    Args:
        reference: the model.
        rule: the reference rule, with its parameters.
        kv_policy: as exported.
    """

    def __init__(self, reference: Reference, rule: ReferenceRule, kv_policy: KvPolicy) -> None:
        self._reference, self._rule, self._kv_policy = reference, rule, kv_policy

    def observe(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        store: Store | None = None,
        *,
        states: bool = True,
        exit_layer: int | None = None,
    ) -> list[Observation]:
        """Run ids [B, S] in one call; mask [B, S] is 0 for padding.

        Args:
            store: keeps logits, states, K and V; None to keep them in memory.
            states: whether states, K and V are wanted.
            exit_layer: after which further logits are wanted.
        Returns: one observation per sequence.
        """
        output = self.step(ids, mask, DynamicCache())
        margins = margins_of(output)
        put = (lambda rows: rows) if store is None else store.put
        found = []
        for row, valid in enumerate(mask.astype(bool)):
            layers = self._reference.cached(output) if states else []
            found.append(
                Observation(
                    logits=self._logits(output.states[-1], row, valid, store),
                    states=[put(_rows(state, row, valid)) for state in output.states[1:] if states],
                    keys=[put(_by_token(_array(layer.keys))[row][valid]) for layer in layers],
                    values=[put(_by_token(_array(layer.values))[row][valid]) for layer in layers],
                    scores=_scores(output)[:, :, row, valid],
                    keep=_keep(output)[:, :, row, valid],
                    margins=margins[:, :, row, valid],
                    routes=self._routes(output, row, valid),
                    exit_logits=None
                    if exit_layer is None
                    else self._logits(output.states[exit_layer], row, valid, store),
                )
            )
        return found

    def step(self, ids: np.ndarray, mask: np.ndarray, cache: DynamicCache) -> ReferenceOutput:
        """One call with a cache, without logits: ids [B, S], mask [B, past + S]."""
        return self._reference(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            cache=cache,
            rule=self._rule,
            kv_policy=self._kv_policy,
            logits=False,
        )

    def read(self, text: GreedyText, store: Store, *, causal: bool) -> list[ReferenceStep]:
        """What the reference says of each token of a text.

        Args: causal: whether a decision depends only on a token's past, so that one call gives what steps would.
        """
        prompt = len(text.prompt)
        ids = np.array([[*text.prompt, *text.tokens[:-1]]], np.int64)
        if causal:
            (found,) = self.observe(ids, np.ones_like(ids), store, states=False)
            assert found.margins is not None
            starts = [0, *range(prompt, ids.shape[1])]
            return [
                ReferenceStep(
                    found.logits,
                    stop - 1,
                    found.keep[..., start:stop],
                    found.margins[..., start:stop],
                    float(found.routes.nearest(found.tokens)[start:stop].min()),
                )
                for start, stop in zip(starts, range(prompt, ids.shape[1] + 1), strict=True)
            ]
        steps, cache, start = [], DynamicCache(), 0
        for stop in range(prompt, ids.shape[1] + 1):
            output = self.step(ids[:, start:stop], np.ones((1, stop), np.int64), cache)
            logits = self._logits(output.states[-1][:, -1:], 0, np.ones(1, bool), store)
            valid = np.ones(stop - start, bool)
            nearest = float(self._routes(output, 0, valid).nearest(stop - start).min())
            steps.append(ReferenceStep(logits, 0, _keep(output)[:, :, 0], margins_of(output)[:, :, 0], nearest))
            start = stop
        return steps

    def _routes(self, output: ReferenceOutput, row: int, valid: np.ndarray) -> Routes:
        """The experts of one sequence's tokens."""
        experts = self._reference.config.experts
        if experts is None:
            return Routes()
        logits = {layer: found[row].double().numpy()[valid] for layer, found in output.routers.items()}
        return routes_of(logits, _keep(output)[:, BRANCHES.index("mlp"), row, valid], experts.per_token)

    def _logits(self, states: torch.Tensor, row: int, valid: np.ndarray, store: Store | None) -> Rows:
        """Logits [S, V] of one sequence's states [B, S, H]."""
        blocks = (_array(rows) for rows in self._reference.logits_after(states[row][torch.from_numpy(valid)]))
        return np.concatenate(list(blocks)) if store is None else store.put_blocks(blocks)


class EngineSide:
    """ONNX Runtime on the unchanged `model.onnx`, with states, scores and kept rows as further outputs.

    Args: streamed: whether one layer at a time is in memory; then there is no cache, and no runner.
    """

    def __init__(self, bundle: Bundle, *, streamed: bool = False, on_progress: OnProgress = silent) -> None:
        manifest = bundle.manifest
        self._manifest = manifest
        self._places = [(layer, branch, _column(branch)) for layer, branch in manifest.skippable_places]
        capture = [f"layers.{i}.output" for i in range(manifest.decoder.num_layers)]
        for layer, branch, _ in self._places:
            capture += [f"layers.{layer}.{branch}.score", f"layers.{layer}.{branch}.index"]
        self._routers = routers_of(bundle)
        capture += [router.logits for router in self._routers.values()]
        self.stage: PortableStage | StreamedStage = (
            StreamedStage(bundle, capture=capture, on_progress=on_progress)
            if streamed
            else PortableStage(bundle, capture=capture)
        )

    @property
    def runner(self) -> Runner:
        """Runs the graph with a cache."""
        assert isinstance(self.stage, PortableStage)
        return WholeRunner(self.stage)

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
        routers: dict[int, list[np.ndarray]] = {layer: [] for layer in self._routers}
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
            for layer, router in self._routers.items():
                found = captured[router.logits]
                spread = np.zeros((B * size, found.shape[1]), found.dtype)
                spread[keep[layer, _column("mlp"), :, part].reshape(-1)] = found
                routers[layer].append(spread.reshape(B, size, -1))
            at += size
        assert at == S, "the chunks do not add up to the sequence"
        whole = [_joined(parts) for parts in states]
        all_logits = _joined(logits)
        all_routers = {layer: _joined(parts) for layer, parts in routers.items()}
        per_token = next((router.per_token for router in self._routers.values()), 0)
        caches = range(self._manifest.decoder.num_caches)
        keys, values = ([_by_token(memory.pop(past(i, kind))) for i in caches] for kind in ("key", "value"))
        return [
            Observation(
                logits=_valid(all_logits[row], valid),
                states=[_valid(state[row], valid) for state in whole],
                keys=[_valid(layer[row], valid) for layer in keys],
                values=[_valid(layer[row], valid) for layer in values],
                scores=scores[:, :, row, valid],
                keep=keep[:, :, row, valid],
                routes=routes_of(
                    {layer: found[row][valid] for layer, found in all_routers.items()},
                    keep[:, _column("mlp"), row, valid],
                    per_token,
                ),
            )
            for row, valid in enumerate(mask.astype(bool))
        ]


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


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Parts [B, s, W] as one, without a copy if there is only one."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)


def _valid(rows: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The rows that are not padding, without a copy if none is."""
    return rows if valid.all() else rows[valid]


def _rows(x: torch.Tensor, row: int, valid: np.ndarray) -> np.ndarray:
    return _array(x[row])[valid]


def _array(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = x.float().cpu().numpy()
    return found


def _by_token(x: np.ndarray) -> np.ndarray:
    """[B, heads, T, D] -> [B, T, heads x D]."""
    return x.transpose(0, 2, 1, 3).reshape(len(x), x.shape[2], -1)
