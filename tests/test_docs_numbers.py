"""Numbers in the documentation that are constants of the code: each phrase is written from the constant."""

from __future__ import annotations

import math
from inspect import signature
from pathlib import Path

import pytest

from gsx.defaults import QUALITY_TOKENS, VERIFY_TOKENS
from gsx.parity.quality import ACTIVATIONS, FOUR_BITS, HALF, WEIGHTS
from gsx.workflows import skip_set_search
from gsx.workflows.export_text import MEASURED_TOKENS
from gsx.workflows.kept_exports import WINDOW_TOKENS
from gsx.workflows.study import SEQUENCE_TOKENS
from gsx_engines.building.profiles import DEFAULT_PREFILL_TOKENS
from gsx_engines.defaults import BUILD_CONTEXT
from gsx_engines.lowering.for_tensorrt.task import MAX_TOPK
from gsx_engines.runners.tensorrt import WINDOW_STEP
from gsx_engines.serving import limits
from gsx_engines.serving.cache_rows import LEAST_SHARED
from gsx_engines.serving.request import Request
from gsx_engines.serving.scheduler import PIECE, Scheduler
from gsx_engines.speculation import adapt
from gsx_exporter.defaults import BUDGET_GRID, CALIBRATION_TOKENS, CLASSIFIER_TOKENS
from gsx_exporter.quantization.scheme import SCHEMES
from gsx_exporter.rules.calibration import NEAR_SHARE
from gsx_exporter.rules.calm import calibrate as exit_calibration
from gsx_exporter.rules.calm import policy as calm
from gsx_exporter.rules.calm.traced import DECAYING
from gsx_exporter.rules.ffn_skip import calibrate as similarity
from gsx_exporter.rules.ffn_skip import policy as ffn_skip
from gsx_exporter.rules.layers import policy as layers
from gsx_exporter.text import MIN_TOKENS
from gsx_exporter.training import frozen
from gsx_plugins.build import MIN_CMAKE, MIN_NVCC

ROOT = Path(__file__).parent.parent
WORDS = {1 / 8: "an eighth", 2: "two", 3: "three", 4: "four"}
SLOTS, QUEUE = (signature(Scheduler).parameters[name].default for name in ("slots", "queue"))
NEW_TOKENS = signature(Request).parameters["max_new_tokens"].default
INT8, INT4, FP8 = (SCHEMES[name] for name in ("int8", "int4", "fp8"))
ROUNDED = (ACTIVATIONS, WEIGHTS, FOUR_BITS, HALF)


def percent(share: float | None) -> str:
    assert share is not None
    return f"{100 * share:g} %"


def listed(values: tuple[float, ...], last: str) -> str:
    *first, end = (f"{value:.2f}".rstrip("0").rstrip(".") for value in values)
    return f"{', '.join(first)} {last} {end}"


PHRASES = {
    "docs/calm.md": (
        f"`confidence` is {calm.DEFAULT_CONFIDENCE:g} by default",
        f"a number of tokens ({calm.DEFAULT_DECAY_TOKENS} by default)",
        f"`threshold x ({1 - DECAYING:g} + {DECAYING:g} exp(-t n / tokens))`",
        f"{CLASSIFIER_TOKENS:,} by default, of which {WORDS[frozen.HELD_OUT]} is held out",
        f"cut into prompts of {exit_calibration.PROMPT_TOKENS} tokens",
        f"({math.ceil(math.log(0.05) / math.log(0.9))} for D 0.1 and C 0.95)",
    ),
    "docs/compare.md": (
        f"in windows of {WINDOW_TOKENS} tokens",
        f"speed-ups of {listed(layers._SPEEDUPS, 'and')}",
        f"from {max(calm._COMPARED):g} to {min(calm._COMPARED):g}",
    ),
    "docs/design.md": (f"moved by at most {percent(NEAR_SHARE)} of the tokens",),
    "docs/engines.md": (
        f"the model's context, at most {BUILD_CONTEXT:,}",
        f"`prefill`, 2 to {DEFAULT_PREFILL_TOKENS:,} tokens per sequence",
        f"`any`, 1 to {DEFAULT_PREFILL_TOKENS:,} tokens",
        f"more than {MAX_TOPK:,} tokens, TopK's limit",
        f"a multiple of {WINDOW_STEP} columns",
    ),
    "docs/export.md": (
        f"| `--calibration-tokens` | {MIN_TOKENS} and more | how much of it to use; default {CALIBRATION_TOKENS} |",
        f"a grid of budgets from {max(BUDGET_GRID):g} to {min(BUDGET_GRID):g}",
    ),
    "docs/layer-study.md": (f"each sequence of {SEQUENCE_TOKENS} tokens",),
    "docs/policies.md": (
        f"the default is {ffn_skip.DEFAULT_BUDGET:g}",
        f"| `stride=K` | k | {listed(similarity.STRIDES, 'or')}:",
        f"{similarity.ROOM:g} times as long as the budget needs",
        f"according to a note on it | {ffn_skip.WARM_UP} |",
    ),
    "docs/quantization.md": (
        f"SmoothQuant, alpha {INT8.smoothing:g} for INT8 and {INT4.smoothing:g} for INT4",
        f"layers {FP8.high_layers} to {FP8.high_layers + FP8.weight_only_layers - 1} have only their weights in 8 bits",
        f"on {MEASURED_TOKENS:,} tokens after the calibration text",
        f"| `--max-divergence` | {' | '.join(f'{rounded.divergence} nats' for rounded in ROUNDED)} |",
        f"| `--min-top1` | {' | '.join(percent(rounded.top1) for rounded in ROUNDED)} |",
        f"| `--max-perplexity-increase` | {' | '.join(percent(rounded.perplexity_increase) for rounded in ROUNDED)} |",
        f"| `--max-flipped` | {' | '.join(percent(rounded.flipped) for rounded in ROUNDED[:3])} |",
        f"With 8 bits {QUALITY_TOKENS:,} tokens are read by default: with {VERIFY_TOKENS:,},",
    ),
    "docs/speculation.md": (
        f"up to {skip_set_search.TRIALS} sets or {skip_set_search.SECONDS:g} seconds",
        f"{percent(adapt.FIRST_SHARE)} of the branches between the first layer and the last",
        f"Every {adapt.EVERY} rounds, {WORDS[adapt.CANDIDATES]} sets",
        f"read the last {adapt.WINDOW} tokens again",
        f"better by {percent(adapt.MARGIN)} on the same tokens",
        f"After {WORDS[adapt.PATIENCE]} looks in a row without a change, or {adapt.MOST_LOOKS} in all",
    ),
    "docs/tensorrt-plugins.md": (f"nvcc {MIN_NVCC[0]}.{MIN_NVCC[1]} or later, CMake {MIN_CMAKE[0]}.{MIN_CMAKE[1]}",),
    "docs/triton.md": (
        f"whose steps share one batch; {SLOTS}.",
        f"requests that may wait; {QUEUE}.",
        f"read in pieces of {PIECE} tokens between",
        f"if at least {LEAST_SHARED} tokens are the same",
        f"the most new tokens; {NEW_TOKENS}",
        f"at most {limits.MAX_STOPS}, of at most {limits.MAX_STOP_BYTES} bytes",
        f"`layers` has at most {limits.MAX_LAYERS_BYTES:,} bytes",
    ),
    "plugins/gsx_plugins/topk_gather/README.md": (f"K is at most {MAX_TOPK:,}",),
}


@pytest.mark.parametrize(("page", "phrase"), [(page, phrase) for page in PHRASES for phrase in PHRASES[page]])
def test_numbers_are_those_of_the_code(page: str, phrase: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert phrase in text
