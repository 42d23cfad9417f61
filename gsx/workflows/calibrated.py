"""What an export determines before it traces: thresholds, scales, and the default run-time values."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gsx.workflows.export_text import ExportText
from gsx.workflows.number_types import NumberTypes
from gsx.workflows.quantization import plan_for
from gsx_engines.bundle.controls import RuntimeValues, default_controls
from gsx_engines.bundle.manifest import KvCache, Quantization
from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import Selection
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.rounded_gates import with_rounded_gates
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.graph.assemble import GraphBuilder
from gsx_exporter.quantization.kv_cache import int8_kv_cache
from gsx_exporter.quantization.plan import QuantizationPlan
from gsx_exporter.quantization.qdq import quantize_graphs
from gsx_exporter.rules.plan import RulePlan
from gsx_plugins.progress import OnProgress


@dataclass(frozen=True)
class Calibrated:
    """A checkpoint with everything that a bundle adds to it.

    Args:
        checkpoint: with its original weights.
        options: of the decoder, with the calibrated rule.
        policy, selection: the manifest's sections.
        defaults: exported values of the rule's run-time inputs.
        plan, quantization: which products get which scales, and the manifest's entry; None in full precision.
        kv_cache: scales of K and V; None if they are stored in the type of the activations.
    """

    checkpoint: Checkpoint
    options: DecoderOptions
    policy: Policy | None
    selection: Selection | None
    defaults: RuntimeValues
    plan: QuantizationPlan | None
    quantization: Quantization | None
    kv_cache: KvCache | None

    @property
    def weights(self) -> Checkpoint:
        """The tensors to write: smoothed where the quantization plan smooths them."""
        return self.checkpoint if self.plan is None else self.plan.checkpoint

    def graph_builder(self, draft_tokens: Sequence[int] | None) -> GraphBuilder:
        """The builder that traces the decoder. Its graphs are quantized if there is a plan.

        Args: draft_tokens: ids that a draft chooses among; None for all.
        """
        rewrite = None
        if self.plan is not None:
            rewrite = functools.partial(quantize_graphs, plan=self.plan, dtype=self.options.dtype)
        return GraphBuilder(self.checkpoint, self.options, self.defaults, rewrite, draft_tokens)


def calibrate_all(
    checkpoint: Checkpoint, keep: RulePlan, types: NumberTypes, text: ExportText, scratch: Path, on_progress: OnProgress
) -> Calibrated:
    """Find the rule's thresholds, then the scales and codes of products, then the scales of K and V.

    Args: scratch: folder for codes until the weights are written.
    Raises:
        GsxError: what was requested cannot be met on this text.
    """
    checkpoint = with_rounded_gates(checkpoint, types.dtype)
    settled = keep.settle(checkpoint, text.seen, on_progress)
    section, selection = settled.policy, settled.selection
    options = DecoderOptions(settled.rule, keep.kv_policy, types.dtype)
    defaults = default_controls(section, selection)
    plan = quantization = kv_cache = None
    if types.quantize is not None:
        assert text.seen is not None
        assert text.unseen is not None
        plan, quantization = plan_for(
            checkpoint,
            options,
            types.quantize,
            selection,
            defaults,
            text.seen,
            text.unseen,
            scratch,
            on_progress,
        )
    if types.kv_cache is not None:
        assert text.seen is not None
        kv_cache = int8_kv_cache(checkpoint, text.seen, defaults, options, on_progress)
    return Calibrated(checkpoint, options, section, selection, defaults, plan, quantization, kv_cache)
