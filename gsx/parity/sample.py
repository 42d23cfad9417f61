"""A sample of a bundle that is larger than memory: a few tokens through every layer, one layer at a time.

The reference's weights stay in the mapped files of the checkpoint, and a layer is widened when it is computed; the
portable graph runs part by part (`gsx_engines/runners/streamed.py`). Compared are the logits, the states, K and V of
every layer, and the decisions. What needs many calls is left out: the cache, padding, greedy text, drafts, and the
runner that generates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gsx.parity.closeness import Comparer, Observation
from gsx.parity.measure import EngineSide, ReferenceSide
from gsx.parity.memory import give_back, keep_apart
from gsx.parity.quality import QualityCounter, frequency_nats
from gsx.parity.result import BudgetResult, Tokens
from gsx.parity.tolerances import TOLERANCES, Tolerances, kind_of
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import controls_for
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.evaluation import next_tokens
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.registry import reference_rule
from gsx_exporter.rules.settings import Setting
from gsx_plugins.progress import OnProgress, Progress

_WEIGHT_BYTES = 1 << 20


class SampleRun:
    """Measures a bundle on a few tokens at one setting.

    Args:
        ids: [1, S] token ids.
    """

    def __init__(
        self, bundle: Bundle, checkpoint: Checkpoint, setting: Setting, ids: np.ndarray, on_progress: OnProgress
    ) -> None:
        self.manifest, self.setting, self.ids, self.on_progress = bundle.manifest, setting, ids, on_progress
        self.limits_of = kind_of(self.manifest, checkpoint)
        self.limits: Tolerances = TOLERANCES[self.limits_of]
        self.reference_type = torch.float64 if self.limits_of == "fp32" else torch.float32
        self.first_keep: dict[Setting, np.ndarray] = {}
        self._bundle, self._checkpoint = bundle, checkpoint

    def results(self) -> Sequence[BudgetResult]:
        """The measurements."""
        keep_apart(from_bytes=_WEIGHT_BYTES)
        controls = controls_for(self.manifest, self.setting.keep)
        mask, tokens = np.ones_like(self.ids), self.ids.shape[1]
        want, rounding = self._by_reference(mask)
        give_back(cycles=True)
        self.first_keep[self.setting] = want.keep
        engine = EngineSide(self._bundle, streamed=True, on_progress=self.on_progress)
        (have,) = engine.observe(self.ids, mask, controls)
        against = self._comparer()
        against.add([want], [have])
        quality = QualityCounter([BRANCHES.index(branch) for branch in self.manifest.skippable])
        quality.add(next_tokens(self.ids[0], np.asarray(want.logits), have.logits), want.keep != have.keep)
        kept = want.keep.mean(axis=-1)
        shares = [kept[layer, BRANCHES.index(branch)] for layer, branch in self.manifest.skippable_places]
        reference_nats, engine_nats = quality.nats
        result = BudgetResult(
            setting=self.setting.name,
            budget=self.setting.share,
            kept=tuple((float(attn), float(mlp)) for attn, mlp in kept),
            kept_share=float(np.mean(shares)) if shares else None,
            windows=against.result(),
            rounding=None if rounding is None else rounding.result(),
            single_steps=None,
            one_chunk=None,
            padded=None,
            fast_logits=None,
            fast_wrong_counts=0,
            greedy={},
            speculation=None,
            reference_nats=reference_nats,
            engine_nats=engine_nats,
            frequency_nats=frequency_nats(self.ids[:, 1:]),
            scored_tokens=quality.scored_tokens,
            quality=quality.result(),
            tokens=Tokens(tokens, tokens, 0 if rounding is None else tokens, 0, 0, 0),
            part=True,
        )
        return [result]

    def _by_reference(self, mask: np.ndarray) -> tuple[Observation, Comparer | None]:
        """What the reference finds, and its own rounding where it is in float64."""
        reference = Reference.load(self._checkpoint, dtype=self.reference_type, streamed=True)
        rule = reference_rule(self.manifest, controls_for(self.manifest, self.setting.keep))
        side = ReferenceSide(reference, rule, self.manifest.kv_policy)
        self._report_layers(reference)
        (want,) = side.observe(self.ids, mask)
        if self.reference_type == torch.float32:
            return want, None
        rounding = self._comparer()
        with reference.computing_in(torch.float32):
            rounding.add([want], side.observe(self.ids, mask))
        return want, rounding

    def _report_layers(self, reference: Reference) -> None:
        layers = reference.model.model.layers
        runs = len(layers) * (2 if self.reference_type == torch.float64 else 1)
        done = 0

        def report(*_: object) -> None:
            nonlocal done
            done += 1
            give_back()
            self.on_progress(Progress("reference, layer by layer", done, runs))

        for layer in layers:
            layer.register_forward_hook(report)

    def _comparer(self) -> Comparer:
        return self.limits.comparer(self.manifest)
