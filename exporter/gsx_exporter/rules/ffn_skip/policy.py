"""`--policy ffn-skip` (FFN-SkipLLM): after an FFN that hardly changed a token's state, the next ones are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator, Field

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import FfnSkipParameters, FfnSkipPolicy, Policy, RuntimeInput
from gsx_engines.bundle.selection import Selection
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.reference.rule import ReferenceRule
from gsx_exporter.rules.ffn_skip.calibrate import FfnRegion, at_threshold, calibrate_ffn
from gsx_exporter.rules.ffn_skip.reference import FfnStride
from gsx_exporter.rules.ffn_skip.traced import FfnSkip
from gsx_exporter.rules.parameters import Parameters, bad_parameters, read_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan, Settled, refuse_both, refuse_budget, refuse_rank
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_exporter.rules.settings import LayerCurve, budget_settings, calibrated_budgets, exported_budget
from gsx_exporter.rules.thresholds import by_thresholds, grid_with
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress

# Share of FFNs kept by default, as in the paper's abstract; and the number of first new tokens that run in full, for
# which docs/methods.md section 5 has 5 to 10 % of an answer.
DEFAULT_BUDGET, WARM_UP = 0.75, 8
BRANCH: tuple[Branch, ...] = ("mlp",)


def _span(text: object) -> tuple[int, int]:
    first, dash, last = str(text).partition("-")
    return int(first), int(last if dash else first)


class FfnOptions(Parameters):
    """FFN-SkipLLM's parameters, as given; None for those to calibrate.

    Args:
        stride: FFNs that are skipped after one that hardly changed a state.
        layers: first and last layer that may skip; the others are cold.
        threshold: cosine from which a state counts as hardly changed; None for the one that the budget needs.
        warm_up: number of new tokens after the prompt that run in full.
    """

    stride: Annotated[int, Field(ge=1)] | None = None
    layers: Annotated[tuple[int, int], BeforeValidator(_span)] | None = None
    threshold: Annotated[float, Field(ge=-1, le=1)] | None = None
    warm_up: Annotated[int, Field(ge=0)] = WARM_UP


@dataclass(frozen=True)
class FfnSkipPlan(RulePlan):
    """The given parameters; the others are calibrated on text."""

    given: FfnOptions = field(kw_only=True)

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """See `RulePlan`. Raises: UsageError: the region is too short for the budget."""
        assert text is not None
        assert self.budget is not None
        given, budget = self.given, self.budget
        if given.threshold is not None:
            assert given.stride is not None
            assert given.layers is not None
            region = FfnRegion(*given.layers, given.stride)
            found = at_threshold(checkpoint, text.ids, region, given.threshold, on_progress)
            budget = found.points[-1].budget
        else:
            found = calibrate_ffn(
                checkpoint,
                text.ids,
                grid_with(budget),
                budget,
                stride=given.stride,
                skipping=given.layers,
                on_progress=on_progress,
            )
        region = found.region
        policy = FfnSkipPolicy(
            branches=BRANCH,
            inputs=(
                RuntimeInput(name="thresholds", least=0, most=2),
                RuntimeInput(name="full_until", least=0, most=None, default=0),
            ),
            parameters=FfnSkipParameters(
                stride=region.stride,
                layers=f"{region.first}-{region.last}",
                similarity=tuple(round(float(one), 6) for one in found.similarity),
            ),
            warm_up=given.warm_up,
        )
        return Settled(FfnSkip(region.stride), policy, by_thresholds(budget, found.points, text))


def plan_ffn_skip(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `ffn-skip`.

    Raises:
        UsageError: a model with fewer than 3 layers, wrong parameters, or options that the policy excludes.
    """
    refuse_rank("ffn-skip", options)
    if options.kv_policy not in (None, "compute"):
        refuse_both("ffn-skip", f"--kv-policy {options.kv_policy}", "attention always runs, and computes its K and V")
    layers = config.num_layers
    if layers < 3:
        raise UsageError(
            "--policy ffn-skip: the first and the last layer never skip",
            expected="a model with 3 layers or more",
            found=str(layers),
        )
    expected = f"stride=K, layers=FIRST-LAST (within 1 to {layers - 2}), threshold=COSINE (-1 to 1), warm_up=TOKENS"
    given = read_parameters("ffn-skip", FfnOptions, parameters, expected)
    within = given.layers is None or 1 <= given.layers[0] <= given.layers[1] <= layers - 2
    if not within or (given.stride or 1) >= layers:
        bad_parameters("ffn-skip", expected, parameters)
    if given.threshold is not None:
        refuse_budget("ffn-skip:threshold", options, "the threshold sets how much is kept")
        if given.stride is None or given.layers is None:
            bad_parameters("ffn-skip", "stride and layers with a threshold", parameters)
    return FfnSkipPlan("ffn-skip", BRANCH, "compute", options.budget or DEFAULT_BUDGET, calibrates=True, given=given)


def _recorded(policy: Policy) -> FfnSkipParameters:
    assert isinstance(policy, FfnSkipPolicy)
    return policy.parameters


def _traced(recorded: Recorded) -> FfnSkip:
    return FfnSkip(_recorded(recorded.policy).stride)


def _reference(policy: Policy, selection: Selection | None, controls: RuntimeValues) -> ReferenceRule:
    return FfnStride(controls["thresholds"], _recorded(policy).stride, controls["full_until"])


def _similarity(manifest: Manifest) -> Sequence[LayerCurve]:
    """A curve of the similarity of the states before and after each FFN, with the threshold at the exported budget."""
    assert manifest.policy is not None
    assert manifest.selection is not None
    parameters = _recorded(manifest.policy)
    first, last = parameters.span
    change = float(manifest.selection.thresholds_for(manifest.selection.budget)[first, BRANCHES.index("mlp")])
    return [
        LayerCurve(
            title="Similarity by layer",
            caption="Mean cosine of a token's state before and after each FFN on calibration text, with nothing "
            "skipped. Layers with a grey background are cold; the dashed line is the threshold at the exported budget.",
            label="cosine",
            values=parameters.similarity,
            shaded=((0, first - 1), (last + 1, len(parameters.similarity) - 1)),
            line=1 - change if change >= 0 else None,
        )
    ]


FFN_SKIP = Rule(
    name="ffn-skip",
    plan=plan_ffn_skip,
    traced=_traced,
    reference=_reference,
    settings=budget_settings,
    exported_share=exported_budget,
    compared={"ffn-skip": {"ffn-skip": calibrated_budgets}},
    layer_curves=_similarity,
)
