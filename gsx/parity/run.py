"""Runs both sides of a parity report, and measures everything at the settings of the keep rule.

One side is in memory at a time. The fast runner writes its greedy text; the reference reads this text and the windows,
and what it finds waits on disk (`store.py`); then each of the engine's runners reads them too, and is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gsx.parity.closeness import Compared, Comparer, Observation
from gsx.parity.difference import Comparison
from gsx.parity.found import Found, Padded
from gsx.parity.greedy import write
from gsx.parity.measure import EngineSide, ReferenceSide, runner_logits
from gsx.parity.memory import give_back, keep_apart
from gsx.parity.padding import padded_batch, padded_keeps
from gsx.parity.quality import QualityCounter
from gsx.parity.result import BudgetResult
from gsx.parity.scope import Scope
from gsx.parity.speculation import HalvesInput, SpeculationResult, SpeculationSide, TextsInput
from gsx.parity.store import Store
from gsx.parity.tolerances import TOLERANCES, Tolerances, kind_of
from gsx.parity.work import Work
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues, controls_for
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_engines.runners.base import Runner
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.select import Backend, open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.evaluation import next_tokens
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.registry import reference_rule
from gsx_exporter.rules.settings import Setting
from gsx_plugins.files import check_room
from gsx_plugins.progress import OnProgress

_ATTEMPTS = 4
PROMPT_TOKENS = 32
# A session keeps its weights, most of which are this large, until it is closed. PyTorch asks for the same blocks again
# in every layer: there only the largest are worth their price.
_WEIGHT_BYTES, _ACTIVATION_BYTES = 1 << 20, 4 << 20


class Run:
    """Measures a bundle at its settings.

    Args:
        scopes: all settings that are measured, and how much of the text each of them reads.
        windows: [M, S] token ids.
    """

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Checkpoint,
        scopes: dict[Setting, Scope],
        windows: np.ndarray,
        backend: Backend,
        notes: list[str],
        on_progress: OnProgress,
    ) -> None:
        self.manifest, self.scopes, self.windows = bundle.manifest, scopes, windows
        self.limits_of = kind_of(self.manifest, checkpoint)
        self.limits: Tolerances = TOLERANCES[self.limits_of]
        # In float32 the reference's own rounding is as large as the engine's, and the two add up. Where limits leave
        # room for nothing else, it computes in float64, so that only the engine's rounding is measured.
        self.reference_type = torch.float64 if self.limits_of == "fp32" else torch.float32
        self.speculation = SpeculationSide(bundle, backend) if self.manifest.draft else None
        # Which tokens of the first window keep which branch, [L, 2, S], by setting.
        self.first_keep: dict[Setting, np.ndarray] = {}
        self._bundle, self._checkpoint, self._backend = bundle, checkpoint, backend
        selection = self.manifest.selection
        self.causal = selection is None or selection.mode == "threshold"
        if not self.causal:
            notes.append(
                "With rank selection a decision depends on the whole call, so a run with the cache is another "
                "computation. Whole calls are compared, and greedy steps, which keep their only token."
            )
        elif self.manifest.depends_on_call:
            notes.append(
                "The loops share a cache, so a text in one call and the same in several are two computations. Whole "
                "calls are compared, and a prompt with single steps behind it."
            )
        self._work = Work(
            scopes.values(),
            on_progress,
            double=self.reference_type == torch.float64,
            speculates=self.speculation is not None,
        )

    def results(self) -> list[BudgetResult]:
        """Measure everything, with the rule applied to every token; only for greedy text, a rule that runs the prompt
        in full does so."""
        keep_apart(from_bytes=_WEIGHT_BYTES)
        # Settings that are measured on everything would fill the disk together.
        together = (
            [list(self.scopes)]
            if not all(s.portable_greedy for s in self.scopes.values())
            else [[setting] for setting in self.scopes]
        )
        return [result for settings in together for result in self._together(settings)]

    def _together(self, settings: Sequence[Setting]) -> list[BudgetResult]:
        folder = self._bundle.directory
        self._check_room(folder, settings)
        with Store(folder) as store:
            found = self._greedy_texts(settings, store)
            give_back()
            self._by_reference(found, store)
            keep_apart(from_bytes=_WEIGHT_BYTES)
            give_back(cycles=True)  # modules of transformers refer to each other
            self._by_portable(found, store)
            give_back()
            self._by_fast(found)
            give_back()
            speculated = self._speculated(found)
            return [at.result(self.manifest, self.limits, self.windows, speculated.get(at.setting)) for at in found]

    def _greedy_texts(self, settings: Sequence[Setting], store: Store) -> list[Found]:
        runner = open_runner(self._bundle, backend=self._backend)
        found = []
        for setting in settings:
            scope, controls = self.scopes[setting], controls_for(self.manifest, setting.keep)
            self._work.begin(f"greedy text, {setting.name}", self._work.text(scope))
            text = write(
                runner,
                self._prompt,
                scope.greedy_tokens,
                controls_for(self.manifest, setting.keep, [PROMPT_TOKENS]),
                store,
            )
            counter = QualityCounter([BRANCHES.index(branch) for branch in self._branches])
            found.append(Found(setting, scope, controls, text, self._comparer(), counter))
        return found

    def _by_reference(self, found: list[Found], store: Store) -> None:
        reference = Reference.load(self._checkpoint, dtype=self.reference_type)
        give_back()
        if self.reference_type == torch.float32:  # in float64 there are few windows, and their blocks are large
            keep_apart(from_bytes=_ACTIVATION_BYTES)
        exit_layer = self.speculation.exit_layer if self.speculation else None
        for at in found:
            side = self._side(reference, at.controls)
            if self.reference_type == torch.float64:
                at.rounding = self._comparer()
            for number, window in enumerate(self.windows[: at.scope.windows]):
                rounded = at.rounding is not None and number < at.scope.rounded
                self._work.begin(f"reference, {at.setting.name}", self._work.window * (1 + rounded))
                ids, mask = _call(window)
                compared = number < at.scope.compared
                (want,) = side.observe(
                    ids, mask, store, states=compared, exit_layer=exit_layer if compared and at.scope.texts else None
                )
                at.windows.append(want)
                if rounded and at.rounding is not None:
                    with reference.computing_in(torch.float32):
                        at.rounding.add([want], side.observe(ids, mask, store))
                give_back()
            self.first_keep[at.setting] = at.windows[0].keep
            self._pad(reference, at, store)
            text_side = self._side(reference, controls_for(self.manifest, at.setting.keep, [PROMPT_TOKENS]))
            at.steps = text_side.read(at.text, store, causal=not self.manifest.depends_on_call)

    def _pad(self, reference: Reference, at: Found, store: Store) -> None:
        """Two sequences of different lengths, padded on the left, in one call.

        Each must give what it gives by itself. Rank selection depends on the whole call, so there the reference sees
        the same batch (in float32: transformers masks padding in float64 by a number that its softmax, always in
        float32, takes for infinite, and gives NaN). There, too, one near tie that flips affects all tokens: then
        another stretch of text is tried.
        """
        sides = [self._side(reference, controls_for(self.manifest, keep)) for keep in self._padded_keeps(at)]
        for attempt in range(_ATTEMPTS):
            ids, mask = padded_batch(self.windows, self.manifest.decoder.eos_ids, attempt)
            if self.causal:
                rows = [ids[row : row + 1, mask[row] == 1] for row in range(len(ids))]
                want = [side.observe(row, np.ones_like(row), store)[0] for side, row in zip(sides, rows, strict=True)]
            else:
                with reference.computing_in(torch.float32):
                    want = sides[0].observe(ids, mask, store)
            at.padded.append(Padded(ids, mask, want))
            if all(np.isinf(one.margins).all() for one in want if one.margins is not None):
                break  # no decision can flip

    def _by_portable(self, found: list[Found], store: Store) -> None:
        engine = EngineSide(self._bundle)
        for at in found:
            for number, want in enumerate(at.windows):
                self._work.begin(f"portable runner, {at.setting.name}", self._work.window)
                window = self.windows[number]
                (have,) = engine.observe(*_call(window), at.controls)
                at.against.add([want], [have])
                at.quality.add(next_tokens(window, want.logits, have.logits), want.keep != have.keep)
                at.portable_keep.append(have.keep)
                at.portable_elsewhere.append(_elsewhere(want, have, like=self.limits.runners is not None))
                if self.limits.runners is not None and number < at.scope.compared:
                    at.portable.append(store.put(np.asarray(have.logits)))
                del have
            if not self.manifest.depends_on_call:
                at.cached = self._cached(engine, at)
            self._padded(engine, at)
            if at.scope.portable_greedy:
                text = at.text
                at.portable_text = write(
                    engine.runner,
                    text.prompt,
                    len(text.tokens),
                    controls_for(self.manifest, at.setting.keep, [PROMPT_TOKENS]),
                    store,
                    text.tokens,
                )

    def _cached(self, engine: EngineSide, at: Found) -> tuple[Compared, Compared]:
        """Half of a stretch, then the rest with the cache: the result must be that of one call."""
        count = min(at.scope.cached_tokens, at.windows[0].tokens)
        half = count // 2
        ids = self.windows[:1, :count]
        found = []
        for chunks in ([half, *[1] * (count - half)], [half, count - half]):
            comparer = self._comparer()
            comparer.add([at.windows[0].head(count)], engine.observe(ids, np.ones_like(ids), at.controls, chunks))
            found.append(comparer.result())
        return found[0], found[1]

    def _padded(self, engine: EngineSide, at: Found) -> None:
        controls = controls_for(self.manifest, self._padded_keeps(at))
        for batch in at.padded:
            comparer = self._comparer()
            have = engine.observe(batch.ids, batch.mask, controls)
            if self.causal:
                for want, observed in zip(batch.want, have, strict=True):
                    comparer.add([want], [observed])
            else:
                comparer.add(batch.want, have)
            result = at.padded_result = comparer.result()
            if result.decisions is None or result.decisions.wrong or result.logits.values:
                break

    def _by_fast(self, found: list[Found]) -> None:
        runner = open_runner(self._bundle, backend=self._backend)
        for at in found:
            for number, want in enumerate(at.windows):
                self._work.begin(f"fast runner, {at.setting.name}", self._work.window)
                if number >= at.scope.compared and _is_portable(runner):
                    at.quality.add_fast_like_portable()
                    continue
                window = self.windows[number]
                fast, counts = runner_logits(runner, window[None], at.controls)
                at.quality.add_fast(next_tokens(window, want.logits, fast[0]).divergence)
                if number < at.scope.compared:
                    self._compare_fast(at, number, fast[0], counts)
                del fast

    def _compare_fast(self, at: Found, number: int, logits: np.ndarray, counts: np.ndarray | None) -> None:
        """Compare the fast runner's logits [S, V] over a window; for a quantized bundle, with the portable runner's.

        The fast runner does not report which rows it kept, only how many. Where decisions may flip, everything after
        the first one that did (in half precision: for the portable runner) or could have (in single) is left out.
        """
        want, keep = at.windows[number], at.portable_keep[number]
        assert want.margins is not None
        clean = np.ones(want.tokens, bool)
        alone = self.limits.runners is None
        base, base_keep = (want.logits, want.keep) if alone else (at.portable[number], keep)
        places = [(layer, BRANCHES.index(branch)) for layer, branch in self.manifest.skippable_places]
        differ = [] if counts is None else [place for place in places if counts[place] != base_keep[place].sum()]
        if self.limits.differing_share is None:
            flipped = (want.margins <= self.limits.near_tie) if differ else np.zeros_like(want.keep)
        else:
            flipped = keep != base_keep
        # Nor does it report experts: those of the portable runner's that differ, or two that were nearly equal.
        elsewhere = want.routes.nearest(want.tokens) <= at.own_error
        if not alone or self.limits.differing_share is not None:
            elsewhere = at.portable_elsewhere[number]
        flipped_at = np.flatnonzero(flipped.any(axis=(0, 1)) | elsewhere)
        if len(flipped_at):
            clean[flipped_at[0] if self.causal else 0 :] = False
        at.fast.add(base, logits, clean, number)
        at.clean.append(clean)
        at.wrong_counts += 0 if len(flipped_at) else len(differ)

    def _speculated(self, found: list[Found]) -> dict[Setting, SpeculationResult]:
        """Speculative text of the bundle's draft against plain text, and the halves of a split model."""
        side = self.speculation
        if side is None:
            return {}
        halves: dict[Setting, dict[str, Comparison]] = {}
        if side.exit_layer is not None:
            self._work.begin("draft and verify")
            inputs = {
                at.setting: [
                    HalvesInput(self.windows[number : number + 1], at.controls, at.windows[number], clean)
                    for number, clean in enumerate(at.clean)
                ]
                for at in found
                if at.scope.texts
            }
            halves = side.halves(inputs)
        texts = {
            # Thousands of draws are enough to show that weights were rounded to bfloat16.
            at.setting: TextsInput(at.setting.keep, at.scope.texts, None if self.limits_of == "bf16" else at.windows[0])
            for at in found
            if at.scope.texts
        }
        work = sum(self._work.speculation(at.scope) for at in found) / (2 * max(1, len(texts)))
        return side.results(self.windows, texts, halves, lambda step: self._work.begin(step.stage, work))

    def _padded_keeps(self, at: Found) -> list[KeepSettings]:
        return padded_keeps(self.manifest, list(self.scopes), at.setting)

    def _side(self, reference: Reference, controls: RuntimeValues) -> ReferenceSide:
        return ReferenceSide(reference, reference_rule(self.manifest, controls), self.manifest.kv_policy)

    def _comparer(self) -> Comparer:
        return self.limits.comparer(self.manifest)

    @property
    def _branches(self) -> tuple[Branch, ...]:
        return self.manifest.skippable

    @property
    def _prompt(self) -> list[int]:
        return [int(token) for token in self.windows[0, :PROMPT_TOKENS]]

    def _check_room(self, folder: Path, settings: Sequence[Setting]) -> None:
        """Refuse to begin if what the reference finds would not fit on the disk."""
        shape, length = self.manifest.decoder, self.windows.shape[1]
        state = shape.num_layers * (shape.hidden_size + 2 * shape.num_kv_heads * shape.head_dim)
        scopes = [self.scopes[setting] for setting in settings]
        tokens = [
            (scope.windows + 2 * scope.compared) * length + 2 * scope.greedy_tokens for scope in scopes
        ]  # logits: the reference's; of some windows, those at an exit or of the portable runner; of text, both sides'
        values = sum(tokens) * shape.vocab_size + sum(scope.compared for scope in scopes) * length * state
        check_room(folder, 4 * values, todo="free some space, or compare fewer tokens with --tokens")


def _elsewhere(want: Observation, have: Observation, *, like: bool) -> np.ndarray:
    """Which tokens went to other experts in the portable runner than in the reference, [S] bool; none where its numbers
    are what others are compared with (`like`)."""
    found = np.zeros(want.tokens, bool)
    for layer, chosen in want.routes.chosen.items() if not like else ():
        found |= (chosen != have.routes.chosen[layer]).any(axis=1)
    return found


def _is_portable(runner: Runner) -> bool:
    """Whether a runner runs the portable graph too, so that it gives the same numbers."""
    stage = runner.stage if isinstance(runner, WholeRunner) else None
    return isinstance(stage, OnnxRuntimeStage) and not stage.is_lowered(batch=1)


def _call(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of a window as a batch of one."""
    return window[None], np.ones((1, len(window)), np.int64)
