"""How far two computations of the same thing may differ, by precision, and why: all limits are defined here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gsx.parity.closeness import Compared, Comparer
from gsx_engines.bundle.manifest import Manifest
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import is_gate


@dataclass(frozen=True)
class Tolerances:
    """Limits of one precision.

    Args:
        logits: largest absolute error where logits are of order 1 to 10; in proportion where they are larger. None:
            only reported.
        relative: largest error of states, K and V over their own scale (`Comparison.max_relative`). None: only
            reported.
        near_tie: a decision may flip if the reference's score is this near to where it flips.
        differing_share: share of decisions that may differ; None: only near ties may.
        nats: difference of the mean loss per token; None: only reported.
        runners: root mean square of the difference between the two runners' logits, over that of the logits. None:
            the fast runner is compared with the reference, within `logits`. Infinite: only reported.
        tokens_must_agree: whether greedy tokens are a check, or only reported.
        reason: why the numeric limits are what they are.
    """

    logits: float | None
    relative: float | None
    near_tie: float
    differing_share: float | None
    nats: float | None
    tokens_must_agree: bool
    reason: str
    runners: float | None = None

    def logit_limit(self, reference_max: float, rounding: Compared | None = None) -> float | None:
        """Limit for logits whose largest absolute value is this one: a float's error grows with the float.

        Args: rounding: the reference's own error in float32, if it was measured.
        """
        if self.logits is None:
            return None
        base = self.logits * max(1.0, reference_max / 10)
        return _allowed(base, [] if rounding is None else [rounding.logits.max_abs])

    def relative_limit(self, rounding: Compared | None = None) -> float | None:
        """Limit for states, K and V."""
        if self.relative is None:
            return None
        layers = [] if rounding is None else [*rounding.states, *rounding.keys, *rounding.values]
        return _allowed(self.relative, [layer.max_relative for layer in layers])

    def comparer(self, manifest: Manifest) -> Comparer:
        """Compares a bundle's observations with the reference's, within these limits."""
        selection = manifest.selection
        return Comparer(
            manifest.decoder.num_layers,
            manifest.skippable,
            causal=selection is None or selection.mode == "threshold",
            near_tie=self.near_tie,
            copies=manifest.kv_policy != "compute",
            # Logits of routers may differ as the states that they are computed from.
            near_route=self.relative,
            caches=manifest.decoder.left_caches,
        )


def kind_of(manifest: Manifest, checkpoint: Checkpoint) -> str:
    """Which limits apply to a bundle: a key of `TOLERANCES`.

    A bfloat16 graph of a checkpoint that is stored in bfloat16 has the checkpoint's own weights (unless a factor is
    folded into them), and is computed in float32, so float32's limits apply. (Gates are float32 in every graph.)
    """
    quantization = manifest.quantization
    if quantization is not None and quantization.quantizes_activations and not quantization.is_float8:
        return "INT8 inputs"
    if manifest.rounds:
        return "quantized"
    weights = (name for name in checkpoint.names if not is_gate(name))
    own = not checkpoint.config.changes_weights
    if manifest.precision == "bf16" and own and all(checkpoint.stored_type(name) == "BF16" for name in weights):
        return "fp32"
    return manifest.precision


# The smallest p-value of a test that is not a sign of a bias.
P_LEAST = 1e-6
# The largest errors of two equally good computations may differ by this factor: tails are heavy.
TAIL = 4
# A limit grows by at most this factor, whatever the reference's own error: real errors must show.
_MOST = 10


def _allowed(base: float, own: Sequence[float]) -> float:
    """A limit or, if PyTorch's own float32 is no better on this model, a multiple of its error."""
    return min(max(base, TAIL * max(own, default=0.0)), _MOST * base)


TOLERANCES: dict[str, Tolerances] = {
    # A rounding error is 6e-8 of its number. Sums of thousands, tens of layers, and attention that depends on small
    # differences of large products make it 1e-6 to 1e-5 of the scale, and the largest of 10^5 errors is about ten
    # times the usual one. An MLP that makes a massive activation amplifies the error of what it reads: 1.4e-3 became
    # 2.6e-2 (4.5e-4 of the scale) at a token of SmolLM2 with gates, where layer 28 adds 1,342 to one value. A wrong
    # weight, mask or position shows at 1e-2 and above. Here the reference is in float64, so that only the engine's
    # rounding counts; the other limits are so much coarser that one in float32 will do.
    "fp32": Tolerances(
        logits=1e-4,
        relative=1e-3,
        near_tie=1e-6,
        differing_share=None,
        nats=2e-4,
        tokens_must_agree=True,
        reason="float32 rounding, up to 1e-5 of the scale; the largest of many values. Real errors show at 1e-2",
    ),
    # The reference stays in float32, so weights and activations are each rounded once to 11 significant bits
    # (2^-11 = 5e-4 of their scale) per layer; the largest of many errors is about ten times that.
    "fp16": Tolerances(
        logits=0.1,
        relative=0.05,
        near_tie=1e-6,
        differing_share=0.01,
        nats=0.01,
        tokens_must_agree=False,
        reason="half precision: weights and activations rounded to 11 bits, against a float32 reference",
    ),
    # The graph is computed in float32 (`gsx_engines/lowering/widen.py`): of the two roundings that float16's limits
    # allow for, only the one of the weights remains, with a step eight times as large.
    "bf16": Tolerances(
        logits=0.4,
        relative=0.2,
        near_tie=1e-6,
        differing_share=0.04,
        nats=0.04,
        tokens_must_agree=False,
        reason="bfloat16 weights, rounded to 8 bits, against a float32 reference; computed in float32",
    ),
    # Rounding to 8 bits changes everything, so the numbers are not compared with the reference's; quality is measured
    # (`quality.py`). The two runners compute the same integers, but a value halfway between two codes may go either way
    # (a float32 rounding decides), which is a step of 1/127 of a tensor's range.
    "quantized": Tolerances(
        logits=None,
        relative=None,
        near_tie=1e-6,
        differing_share=1.0,
        nats=None,
        tokens_must_agree=False,
        reason="8 bits: quality is what matters, and it has checks of its own",
        runners=0.05,
    ),
}
# The fast runner has a scale for each row of activations, and the portable graph one for all: they round differently,
# and how far that takes the fast runner from the reference is a check of quality.
TOLERANCES["INT8 inputs"] = replace(TOLERANCES["quantized"], runners=math.inf)
