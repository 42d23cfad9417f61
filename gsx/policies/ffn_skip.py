"""`--policy ffn-skip` (FFN-SkipLLM): FFNs are skipped after one that hardly changed a token's state."""

from __future__ import annotations

from dataclasses import dataclass

from gsx.policies.base import (
    Choice,
    OnProgress,
    Plan,
    Sections,
    bad_parameters,
    refuse_both,
    refuse_budget,
    refuse_rank,
)
from gsx.policies.thresholds import by_thresholds, grid_with
from gsx_engines.bundle.policy import Policy, RuntimeInput
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.rules.ffn_skip import FfnSkip
from gsx_exporter.similarity import Region, at_threshold, calibrate_ffn
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import Progress

# Share of FFNs kept by default, as in the paper's abstract; and new tokens that run in full, of which the notes on it
# say 5 to 10 % of an answer (docs/methods.md section 5).
DEFAULT_BUDGET, WARM_UP = 0.75, 8
_NAMES = ("stride", "layers", "threshold", "warm_up")


@dataclass(frozen=True)
class FfnParameters:
    """FFN-SkipLLM's parameters as they are given; None is calibrated.

    Args:
        stride: layers that skip on account of one.
        layers: first and last layer that may skip; the others are cold.
        threshold: cosine from which a state counts as unchanged; None for the one of the budget.
        warm_up: new tokens that run in full, after the prompt.
    """

    stride: int | None = None
    layers: tuple[int, int] | None = None
    threshold: float | None = None
    warm_up: int = WARM_UP


@dataclass(frozen=True)
class FfnSkipPlan(Plan):
    """What is given; the rest is calibrated on text."""

    given: FfnParameters = FfnParameters()

    def settle(
        self, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
    ) -> Sections:
        def tell(what: str, done: int, total: int) -> None:
            on_progress(Progress(what, done, total))

        assert text is not None
        assert self.budget is not None
        given, budget = self.given, self.budget
        if given.threshold is not None:
            assert given.stride is not None
            assert given.layers is not None
            region = Region(*given.layers, given.stride)
            found = at_threshold(checkpoint, text.ids, region, given.threshold, tell)
            budget = found.points[-1].budget
        else:
            grid = grid_with(budget)
            found = calibrate_ffn(
                checkpoint, text.ids, grid, budget, stride=given.stride, skipping=given.layers, on_step=tell
            )
        region = found.region
        policy = Policy(
            name="ffn-skip",
            branches=FfnSkip.branches,
            inputs=(
                RuntimeInput(name="thresholds", least=0, most=2),
                RuntimeInput(name="full_until", least=0, most=None, default=0),
            ),
            parameters={
                "stride": region.stride,
                "layers": f"{region.first}-{region.last}",
                "similarity": [round(float(one), 6) for one in found.similarity],
            },
            warm_up=given.warm_up,
        )
        return policy, by_thresholds(budget, found.points, text)


def plan_ffn_skip(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    """Raises: UsageError: a model of fewer than 3 layers, wrong parameters, options that it excludes."""
    refuse_rank("ffn-skip", choice)
    if choice.kv_policy not in (None, "compute"):
        refuse_both("ffn-skip", f"--kv-policy {choice.kv_policy}", "attention always runs, and computes its K and V")
    if config.num_layers < 3:
        raise UsageError(
            "--policy ffn-skip: the first and the last layer never skip",
            expected="a model with 3 layers or more",
            found=str(config.num_layers),
        )
    given = _parse(parameters, config.num_layers)
    if given.threshold is not None:
        refuse_budget("ffn-skip:threshold", choice, "the threshold says how much is kept")
        if given.stride is None or given.layers is None:
            bad_parameters("ffn-skip", "stride and layers beside a threshold", parameters)
    budget = choice.budget or DEFAULT_BUDGET
    return FfnSkipPlan("ffn-skip", FfnSkip(given.stride or 1), "compute", budget, calibrates=True, given=given)


def _parse(text: str, layers: int) -> FfnParameters:
    """`stride=K,layers=FIRST-LAST,threshold=COSINE,warm_up=TOKENS`, each of them optional."""
    expected = f"stride=K, layers=FIRST-LAST (within 1 to {layers - 2}), threshold=COSINE (-1 to 1), warm_up=TOKENS"
    values: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in _NAMES or name in values:
            bad_parameters("ffn-skip", expected, part)
        values[name] = value
    try:
        stride = int(values["stride"]) if "stride" in values else None
        first, dash, last = values.get("layers", "").partition("-")
        span = (int(first), int(last or first)) if first or dash else None
        threshold = float(values["threshold"]) if "threshold" in values else None
        warm_up = int(values.get("warm_up", WARM_UP))
    except ValueError:
        bad_parameters("ffn-skip", expected, text)
    if (
        (stride is not None and not 1 <= stride < layers)
        or (span is not None and not 1 <= span[0] <= span[1] <= layers - 2)
        or (threshold is not None and not -1 <= threshold <= 1)
        or warm_up < 0
    ):
        bad_parameters("ffn-skip", expected, text)
    return FfnParameters(stride, span, threshold, warm_up)
