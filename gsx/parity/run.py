"""Runs both sides of a parity report, and measures everything at one setting of the keep rule."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import DynamicCache

from gsx.parity.closeness import Accumulator, Compared, Comparer, Observation
from gsx.parity.measure import EngineSide, Greedy, ReferenceSide, follow, reference_continuation, runner_logits
from gsx.parity.quality import QualityCounter, frequency_nats
from gsx.parity.result import BudgetResult
from gsx.parity.speculation import SpeculationResult, SpeculationSide
from gsx.parity.tolerances import TOLERANCES, Tolerances, kind_of
from gsx.parity.windows import WindowSums
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues, controls_for
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_engines.runners.base import Runner
from gsx_engines.runners.select import Backend, open_runner
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.registry import reference_rule
from gsx_exporter.rules.settings import Setting
from gsx_plugins.progress import OnProgress, Progress

# A stretch with a cache: half in one call, the rest in single steps or in one chunk.
_STRETCH_TOKENS = 64
# Two sequences of one batch, of different lengths, so that one is padded.
_PADDED_TOKENS = (48, 29)
_ATTEMPTS = 4
_PROMPT_TOKENS = 32
# Up to this width a layer's matrix fits in a core's cache.
_SMALL_HIDDEN = 512


class Run:
    """Both sides, opened once, and the measurements at each setting.

    Args:
        settings: all settings that will be measured; one batch has two of them at once.
    """

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Checkpoint,
        settings: Sequence[Setting],
        windows: np.ndarray,
        greedy_tokens: int,
        backend: Backend,
        notes: list[str],
        on_progress: OnProgress,
    ) -> None:
        self.manifest, self.settings = bundle.manifest, settings
        self.limits_of = kind_of(self.manifest, checkpoint)
        self.limits: Tolerances = TOLERANCES[self.limits_of]
        self.windows = windows
        self.reference_type = _reference_type(checkpoint, self.limits_of)
        self.reference = Reference.load(checkpoint, dtype=self.reference_type)
        self.single = Reference.load(checkpoint) if self.reference_type == torch.float64 else None
        self.engine = EngineSide(bundle)
        self.runners: dict[str, Runner] = {"fast": open_runner(bundle, backend=backend), "portable": self.engine.runner}
        self.speculation = SpeculationSide(bundle, backend) if self.manifest.draft else None
        self.stage = ""
        self.on_progress = on_progress
        # The reference's observation of the first window, by setting.
        self.first_window: dict[Setting, Observation] = {}
        positions_left = self.manifest.decoder.max_positions - _PROMPT_TOKENS
        self.greedy_tokens = min(greedy_tokens, positions_left)
        if self.greedy_tokens < greedy_tokens:
            notes.append(f"The model's context leaves room for {self.greedy_tokens} greedy tokens.")
        selection = self.manifest.selection
        self.causal = selection is None or selection.mode == "threshold"
        if not self.causal:
            notes.append(
                "With rank selection a decision depends on the whole call, so a run with the cache is another "
                "computation. Whole calls are compared, and greedy steps, which keep their only token."
            )

    def at(self, setting: Setting) -> BudgetResult:
        """Measure everything at one setting, with the rule applied to every token; only for greedy text, a rule that
        runs the prompt in full does so."""
        controls = controls_for(self.manifest, setting.keep)
        sums = self._whole_windows(controls)
        assert sums.first is not None, "a text has at least one window"
        rounding = sums.rounding.result() if sums.rounding is not None else None
        self.first_window[setting] = sums.first
        single_steps = one_chunk = None
        if self.causal:
            self._report("with the cache")
            single_steps, one_chunk = self._cached(sums.first, controls)
        self._report("with padding")
        padded = self._padded(setting)
        kept = sums.kept
        shares = [kept[layer, BRANCHES.index(branch)] for layer, branch in self.manifest.skippable_places]
        reference_nats, engine_nats = sums.nats
        return BudgetResult(
            setting=setting.name,
            budget=setting.share,
            kept=tuple((float(attn), float(mlp)) for attn, mlp in kept),
            kept_share=float(np.mean(shares)) if shares else None,
            windows=sums.against_reference.result(),
            rounding=rounding,
            single_steps=single_steps,
            one_chunk=one_chunk,
            padded=padded,
            fast_logits=sums.fast.result(),
            fast_wrong_counts=sums.wrong_counts,
            greedy=self._greedy(setting, rounding),
            speculation=self._speculated(setting, sums.first),
            reference_nats=reference_nats,
            engine_nats=engine_nats,
            frequency_nats=frequency_nats(self.windows[:, 1:]),
            scored_tokens=sums.scored_tokens,
            quality=sums.quality.result(),
        )

    def _whole_windows(self, controls: RuntimeValues) -> WindowSums:
        """All windows, each in one call: both sides, the fast runner, and the halves of a draft."""
        side, single = self._sides(controls)
        sums = WindowSums(
            self._comparer(),
            self._comparer() if single is not None else None,
            QualityCounter([BRANCHES.index(branch) for branch in self._branches]),
        )
        if self.speculation is not None:
            self.speculation.start()
        for number, window in enumerate(self.windows):
            self._report("whole windows", number, len(self.windows))
            ids, mask = window[None], np.ones((1, len(window)), np.int64)
            (want,), (have,) = side.observe(ids, mask), self.engine.observe(ids, mask, controls)
            fast, counts = runner_logits(self.runners["fast"], ids, controls)
            sums.add(window, want, have, fast[0], None if single is None else single.observe(ids, mask))
            clean, wrong = self._fast(want, have, fast[0], counts, sums.fast, number)
            sums.wrong_counts += wrong
            if self.speculation is not None:
                self._halves(self.speculation, side, ids, controls, clean, number)
        return sums

    def _greedy(self, setting: Setting, rounding: Compared | None) -> dict[str, Greedy]:
        """Compare every runner along the reference's own greedy text. Args: rounding: error of the reference itself."""
        self._report("greedy continuation")
        controls = controls_for(self.manifest, setting.keep, [_PROMPT_TOKENS])
        with _torch_threads_for(self.manifest):
            steps = reference_continuation(
                self._sides(controls)[0], self.windows[:1, :_PROMPT_TOKENS], self.greedy_tokens
            )

        def tolerance(logits: np.ndarray) -> float:
            return self.limits.logit_limit(float(np.abs(logits).max()), rounding) or 0.0

        return {
            name: follow(runner, steps, controls, logit_tolerance=tolerance, near_tie=self.limits.near_tie)
            for name, runner in self.runners.items()
        }

    def _speculated(self, setting: Setting, first: Observation) -> SpeculationResult | None:
        """Speculative text of the bundle's draft against plain text; None if it has no draft."""
        if self.speculation is None:
            return None
        self._report("draft and verify")
        # Thousands of draws are enough to show that weights were rounded to bfloat16.
        reference_logits = None if self.limits_of == "bf16" else first.logits
        return self.speculation.result(self.windows, setting.keep, reference_logits)

    def _cached(self, want: Observation, controls: RuntimeValues) -> tuple[Compared, Compared]:
        """Half of a stretch, then the rest with the cache: the result must be that of one call."""
        count = min(_STRETCH_TOKENS, want.tokens)
        half = count // 2
        ids = self.windows[:1, :count]
        found = []
        for chunks in ([half, *[1] * (count - half)], [half, count - half]):
            comparer = self._comparer()
            comparer.add([want.head(count)], self.engine.observe(ids, np.ones_like(ids), controls, chunks))
            found.append(comparer.result())
        return found[0], found[1]

    def _padded(self, setting: Setting) -> Compared:
        """Two sequences of different lengths, padded on the left, in one call.

        Both have an end-of-text token, which running text does not have, and which GateSkip always keeps. With sets of
        layers the second sequence has the set of the next setting. Each must give what it gives by itself. Rank
        selection depends on the whole call, so there the reference sees the same batch (in float32: transformers masks
        padding in float64 by a number that its softmax, always in float32, takes for infinite, and gives NaN). There,
        too, one near tie that flips affects all tokens: then another stretch of text is tried.
        """
        policy = self.manifest.policy
        by_sequence = policy is not None and policy.input("layer_mask") is not None
        other = self.settings[(self.settings.index(setting) + 1) % len(self.settings)] if by_sequence else setting
        keeps = [setting.keep, other.keep]
        sides = [self._sides(controls_for(self.manifest, keep)) for keep in keeps]
        for attempt in range(_ATTEMPTS):
            ids, mask = self._padded_batch(attempt)
            have = self.engine.observe(ids, mask, controls_for(self.manifest, keeps))
            comparer = self._comparer()
            if self.causal:
                for row, observed in enumerate(have):
                    unpadded = ids[row : row + 1, mask[row] == 1]
                    comparer.add(sides[row][0].observe(unpadded, np.ones_like(unpadded)), [observed])
            else:
                side, single = sides[0]
                comparer.add((single or side).observe(ids, mask), have)
            result = comparer.result()
            if result.decisions is None or result.decisions.wrong or result.logits.values:
                break
        return result

    def _padded_batch(self, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of two stretches; they begin differently, since equal beginnings have equal scores."""
        first, last = self.windows[0], self.windows[-1]
        # At most this long, so that another attempt can begin at another position.
        long, short = (min(count, len(first) - 1) for count in _PADDED_TOKENS)
        ids, mask = np.zeros((2, long), np.int64), np.zeros((2, long), np.int64)
        start = long * attempt % (len(first) - long)
        ids[0], mask[0] = first[start : start + long], 1
        differing = np.flatnonzero(last[: len(last) - short] != ids[0, 0])
        start = int(differing[-1 - attempt]) if len(differing) > attempt else len(last) - short
        ids[1, long - short :], mask[1, long - short :] = last[start : start + short], 1
        if self.manifest.decoder.eos_ids:
            ids[:, long - short // 2] = self.manifest.decoder.eos_ids[0]
        return ids, mask

    def _fast(
        self,
        want: Observation,
        portable: Observation,
        logits: np.ndarray,
        counts: np.ndarray | None,
        found: Accumulator,
        window: int,
    ) -> tuple[np.ndarray, int]:
        """Compare the fast runner's logits [S, V] over a window; for a quantized bundle, with the portable runner's.

        The fast runner does not report which rows it kept, only how many. Where decisions may flip, everything after
        the first one that did (in half precision: for the portable runner) or could have (in single) is left out.

        Returns: the tokens [S] bool that were compared, and the branches that kept a wrong count.
        """
        assert want.margins is not None
        clean = np.ones(want.tokens, bool)
        base = want if self.limits.runners is None else portable
        places = [(layer, BRANCHES.index(branch)) for layer, branch in self.manifest.skippable_places]
        differ = [] if counts is None else [p for p in places if counts[p] != base.keep[p].sum()]
        if self.limits.differing_share is None:
            flipped = (want.margins <= self.limits.near_tie) if differ else np.zeros_like(want.keep)
        else:
            flipped = portable.keep != base.keep
        flipped_at = np.flatnonzero(flipped.any(axis=(0, 1)))
        if len(flipped_at):
            clean[flipped_at[0] if self.causal else 0 :] = False
        found.add(base.logits, logits, clean, window)
        return clean, 0 if len(flipped_at) else len(differ)

    def _halves(
        self,
        speculation: SpeculationSide,
        side: ReferenceSide,
        ids: np.ndarray,
        controls: RuntimeValues,
        clean: np.ndarray,
        window: int,
    ) -> None:
        """Compare draft and verify with the reference's exit and full logits over a window."""
        if speculation.exit_layer is None:
            return
        output = side.step(ids, np.ones_like(ids), DynamicCache())
        at_exit = self.reference.exit_logits(output, speculation.exit_layer)
        speculation.compare(ids, controls, at_exit[0].float().numpy(), output.logits[0].float().numpy(), clean, window)

    def _comparer(self) -> Comparer:
        return Comparer(
            self.manifest.decoder.num_layers,
            self._branches,
            causal=self.causal,
            near_tie=self.limits.near_tie,
            copies=self.manifest.kv_policy != "compute",
        )

    @property
    def _branches(self) -> tuple[Branch, ...]:
        return self.manifest.skippable

    def _sides(self, controls: RuntimeValues) -> tuple[ReferenceSide, ReferenceSide | None]:
        """The reference with these run-time values and, if it is in float64, the same in float32."""
        rule = reference_rule(self.manifest, controls)
        side = ReferenceSide(self.reference, rule, self.manifest.kv_policy)
        return side, ReferenceSide(self.single, rule, self.manifest.kv_policy) if self.single else None

    def _report(self, what: str, done: int = 0, total: int = 0) -> None:
        self.on_progress(Progress(f"{self.stage}: {what}", done, total))


def _reference_type(checkpoint: Checkpoint, limits_of: str) -> torch.dtype:
    """Type of the reference's weights and activations.

    Double precision for a float32 engine, if there is enough memory: then only the engine's rounding is measured. In
    float32 the reference's own rounding is as large, and the two add up.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limits_of == "fp32" and 2 * checkpoint.weight_bytes() <= memory / 3:
        return torch.float64
    return torch.float32


@contextmanager
def _torch_threads_for(manifest: Manifest) -> Iterator[None]:
    """Use one thread for single tokens of a small model: waiting for others would take longer than the work."""
    before = torch.get_num_threads()
    small = manifest.decoder.hidden_size <= _SMALL_HIDDEN
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
