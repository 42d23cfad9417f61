"""`--policy router`: the checkpoint's routers decide (Mixture-of-Depths and similar). The default with routers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gsx_engines.bundle.controls import KeepSettings, RuntimeValues
from gsx_engines.bundle.policy import Policy, RouterParameters, RouterPolicy, score_input
from gsx_engines.bundle.selection import Selection
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.reference.rule import ReferenceRule
from gsx_exporter.rules.calibration import CalibratedPoint, at_constant
from gsx_exporter.rules.parameters import bad_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan, Settled, refuse_both
from gsx_exporter.rules.router.reference import RoutedByRank, RoutedByThreshold
from gsx_exporter.rules.router.traced import Router
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_exporter.rules.settings import budget_settings, calibrated_budgets, exported_budget
from gsx_exporter.rules.thresholds import at_budget, by_thresholds
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress


@dataclass(frozen=True)
class RouterPlan(RulePlan):
    """The routers of a checkpoint, and a budget; without a budget, the method's own threshold applies."""

    rule: Router = field(kw_only=True)

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """See `RulePlan`. Raises: UsageError: at the method's own threshold nothing is kept."""
        router = self.rule.router
        if self.budget is not None:
            selection = at_budget(self, self.rule, checkpoint, text, on_progress)
        else:
            assert text is not None
            assert router.threshold is not None
            options = DecoderOptions(self.rule, self.kv_policy)
            selection = _own_threshold(router.threshold, checkpoint, options, text, on_progress)
        policy = RouterPolicy(
            branches=self.rule.branches,
            layers=router.layers,
            inputs=(score_input(selection.mode, *(router.score_range or (None, None))),),
            parameters=RouterParameters(router=router.to_dict()),
        )
        return Settled(self.rule, policy, selection)


def plan_router(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `router`.

    Raises:
        UsageError: a checkpoint without routers, or options that its routers were not trained with.
    """
    if parameters:
        bad_parameters("router", "no parameters: its options are --budget and --select", parameters)
    router = config.router
    if router is None:
        raise UsageError(
            "--policy router needs routers, and this checkpoint has none",
            expected='"router" in the "gsx" section of config.json, and tensors such as model.layers.{i}.router.weight',
            found="gates" if config.gate else "a dense model",
            todo="docs/routers.md shows the section of each method; gsx convert converts public checkpoints",
        )
    if options.kv_policy not in (None, router.kv_policy):
        raise UsageError(
            f"--kv-policy {options.kv_policy}: the routers were trained with another K/V policy",
            expected=f"{router.kv_policy}, as in gsx.router.kv_policy",
            found=str(options.kv_policy),
            todo="leave the option out",
        )
    by_rank = options.select == "rank"
    if by_rank and router.predictor is not None:
        refuse_both("router with a predictor", "--select rank", "the predictor decides instead of the rank")
    if by_rank and router.adapter is not None:
        refuse_both("router with an adapter", "--select rank", "an adapter runs if a score is below a threshold")
    own = not by_rank and router.threshold is not None
    rule = Router(router, config.num_layers, options.select)
    return RouterPlan(
        "router",
        rule.branches,
        router.kv_policy,
        options.budget if own else options.budget or 1.0,
        calibrates=not by_rank,
        by_rank=by_rank,
        rule=rule,
    )


def _own_threshold(
    threshold: float, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText, on_progress: OnProgress
) -> Selection:
    """The selection with the method's own threshold at every branch; what it keeps is counted on a text."""
    point = at_constant(checkpoint, text.ids, threshold, options, on_progress)
    if point.budget <= 0:
        raise UsageError(
            "the routers keep nothing of the calibration text at their own threshold",
            expected="some tokens kept in some layers",
            found=f"threshold {threshold:g}",
            todo="give --budget to calibrate thresholds, or text of the kind that the routers were trained on",
        )
    table = np.full_like(point.thresholds, -np.inf)
    everything = CalibratedPoint(1.0, table, np.ones_like(point.kept), 1.0)
    return by_thresholds(point.budget, [point] if point.budget == 1 else [everything, point], text)


def _traced(recorded: Recorded) -> Router:
    assert recorded.config.router is not None
    assert recorded.selection is not None
    return Router(recorded.config.router, recorded.config.num_layers, recorded.selection.mode)


def _reference(policy: Policy, selection: Selection | None, controls: RuntimeValues) -> ReferenceRule:
    assert selection is not None
    if selection.mode == "rank":
        return RoutedByRank(float(controls["budget"]))
    return RoutedByThreshold(controls["thresholds"])


ROUTER = Rule(
    name="router",
    plan=plan_router,
    traced=_traced,
    reference=_reference,
    settings=budget_settings,
    exported_share=exported_budget,
    compared={"router": {"router": calibrated_budgets}},
    whole=KeepSettings(budget=1.0),
)
