"""What each keep rule costs in quality on a model: perplexity at equal shares, in one table.

    python -m benchmarks.rule_quality

Rules are calibrated on the first half of the text that ships with gsx and measured on the other half, by the reference.
"every token" applies the rule to all of a window; "prompt in full" runs a window's first half in full, as Unified Layer
Skipping and FFN-SkipLLM do with a prompt, and scores the second half. Both columns have the full model's own
perplexity. CALM's classifier needs a checkpoint that has it (`gsx train --exit-classifiers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.bundles import EXAMPLE
from benchmarks.measure import Table, parse, parser, print_header
from gsx_engines.bundle.confidence import Measure
from gsx_engines.bundle.layer_sets import Places, exit_places, mask_of, unified_places
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.evaluation import losses
from gsx_exporter.reference.model import Reference
from gsx_exporter.reference.rule import KeepAll, ReferenceRule
from gsx_exporter.rules.calibration import calibrate
from gsx_exporter.rules.calm.reference import Confident
from gsx_exporter.rules.ffn_skip.calibrate import calibrate_ffn
from gsx_exporter.rules.ffn_skip.reference import FfnStride
from gsx_exporter.rules.gateskip.reference import Threshold
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_exporter.rules.layers.reference import LayerMask
from gsx_exporter.text import tokenize

# CALM's thresholds, from careful to bold.
CALM_THRESHOLDS: dict[Measure, tuple[float, ...]] = {
    "softmax": (0.7, 0.5, 0.3),
    "state": (0.95, 0.9, 0.8),
    "classifier": (0.9, 0.8, 0.7),
}
# A rule by the position from which it applies.
RuleFrom = Callable[[np.ndarray], ReferenceRule]


def rules_of(checkpoint: Checkpoint, ids: np.ndarray) -> dict[str, tuple[RuleFrom, bool]]:
    """Name -> rule, and whether it can run a prompt in full. Args: ids: calibration text."""
    layers = checkpoint.config.num_layers

    def of_set(places: Places) -> RuleFrom:
        mask = mask_of(places, layers, "none")[None]
        return lambda until: LayerMask(mask, until)

    found: dict[str, tuple[RuleFrom, bool]] = {"full model": (lambda until: KeepAll(), True)}
    ffn = calibrate_ffn(checkpoint, ids, (0.75,), 0.75)
    table, stride = ffn.points[-1].thresholds, ffn.region.stride
    name = f"ffn-skip, 25 % of FFNs skipped (stride {stride}, layers {ffn.region.first}-{ffn.region.last})"
    found[name] = (lambda until: FfnStride(table, stride, until), True)
    found["unified 1.33"] = (of_set(unified_places(layers, 4 / 3)), True)
    found["unified 2"] = (of_set(unified_places(layers, 2)), True)
    for depth in sorted({*checkpoint.config.exits, round(layers * 0.75), layers // 2}, reverse=True):
        trained = "" if depth in checkpoint.config.exits else " (not trained)"
        found[f"exit {depth} of {layers}{trained}"] = (of_set(exit_places(depth, layers)), True)
    for measure, thresholds in CALM_THRESHOLDS.items():
        exits = checkpoint.config.exit_classifiers if measure == "classifier" else checkpoint.config.exits
        for one in thresholds if exits else ():
            leaving: RuleFrom = partial(_confident, exits, measure, one)
            found[f"calm, {measure} {one:g} at {', '.join(map(str, exits))}"] = (leaving, True)
    if checkpoint.config.gate is not None:
        for point in calibrate(checkpoint, ids, (0.75, 0.5), DecoderOptions(GateSkip.of(checkpoint.config))):
            found[f"gateskip {point.budget:g}"] = (partial(_the_same, Threshold(point.thresholds)), False)
    return found


def _the_same(rule: Threshold, until: np.ndarray) -> Threshold:
    return rule


def _confident(exits: tuple[int, ...], measure: Measure, threshold: float, until: np.ndarray) -> ReferenceRule:
    return Confident(exits, measure, threshold, until, 0.0, 1)


def perplexity(reference: Reference, rule: RuleFrom, windows: np.ndarray, *, prompt: int) -> tuple[float, float]:
    """Perplexity after the first `prompt` tokens of each window, which run in full; share of branches that ran."""
    nats, tokens, kept = 0.0, 0, []
    for window in windows:
        output = reference(torch.from_numpy(window[None]), rule=rule(np.array([prompt])))
        found = losses(output.logits[0].float().numpy(), window)[max(prompt - 1, 0) :]
        nats, tokens = nats + float(found.sum()), tokens + found.size
        kept.append([[float(keep[0, prompt:].float().mean()) for keep in row] for row in output.keep])
    return math.exp(nats / tokens), float(np.mean(kept))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    made = parser("rule_quality", __doc__, quick={"tokens": 1024})
    made.add_argument("model", nargs="?", default=EXAMPLE, help="a checkpoint (default: the example model)")
    made.add_argument("--tokens", type=int, default=16384, help="of the text, half of them measured (default: 16384)")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    checkpoint = open_checkpoint(args.model)
    ids: np.ndarray[Any, Any] = tokenize(checkpoint, None, max_tokens=args.tokens).ids
    half = len(ids) // 2
    reference = Reference.load(checkpoint)
    windows = ids[half:]
    middle = windows.shape[1] // 2
    print(f"{windows.size:,} tokens in windows of {windows.shape[1]}\n")
    lines = Table("rule", "branches that run", "perplexity, every token", "prompt in full")
    for name, (rule, runs_prompt) in rules_of(checkpoint, ids[:half]).items():
        whole, share = perplexity(reference, rule, windows, prompt=0)
        behind = f"{perplexity(reference, rule, windows, prompt=middle)[0]:.2f}" if runs_prompt else None
        lines.row(name, f"{share:.3f}", f"{whole:.2f}", behind)


if __name__ == "__main__":
    main()
