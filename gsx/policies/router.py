"""`--policy router`: the checkpoint's own routers choose (Mixture-of-Depths and its like). The default with routers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gsx.policies.base import Choice, OnProgress, Plan, Sections, bad_parameters, refuse_both
from gsx.policies.thresholds import at_budget, by_thresholds
from gsx_engines.bundle.policy import Policy, RuntimeInput
from gsx_engines.bundle.selection import Selection
from gsx_exporter.calibration import GridPoint, at_constant
from gsx_exporter.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.rules.router import Router
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import Progress


@dataclass(frozen=True)
class RouterPlan(Plan):
    """Routers, and a budget; without one, the method's own threshold holds."""

    def settle(
        self, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
    ) -> Sections:
        assert isinstance(self.rule, Router)
        router = self.rule.router
        if self.budget is not None:
            selection = at_budget(self, checkpoint, options, text, on_progress)
        else:
            assert text is not None
            assert router.threshold is not None
            selection = _own_threshold(router.threshold, checkpoint, options, text, on_progress)
        least, most = router.score_range or (None, None)
        read = (
            RuntimeInput(name="budget", least=0, most=1)
            if selection.mode == "rank"
            else RuntimeInput(name="thresholds", least=least, most=most)
        )
        policy = Policy(
            name="router",
            branches=self.rule.branches,
            layers=router.layers,
            inputs=(read,),
            parameters={"router": router.to_dict()},
        )
        return policy, selection


def plan_router(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    """Raises: UsageError: a checkpoint without routers, or options that they were not trained with."""
    if parameters:
        bad_parameters("router", "none: --budget and --select are its options", parameters)
    router = config.router
    if router is None:
        raise UsageError(
            "--policy router needs routers, and this checkpoint has none",
            expected='"router" in the "gsx" section of config.json, and its tensors, as model.layers.{i}.router.weight',
            found="gates" if config.gate else "a dense model",
            todo="docs/routers.md says which section a method has; gsx convert takes public checkpoints over",
        )
    if choice.kv_policy not in (None, router.kv_policy):
        raise UsageError(
            f"--kv-policy {choice.kv_policy}: the routers were trained with another",
            expected=f"{router.kv_policy}, as gsx.router.kv_policy says",
            found=str(choice.kv_policy),
            todo="leave the option out",
        )
    by_rank = choice.select == "rank"
    if by_rank and router.predictor is not None:
        refuse_both("router with a predictor", "--select rank", "the predictor decides in place of the rank")
    if by_rank and router.adapter is not None:
        refuse_both("router with an adapter", "--select rank", "an adapter runs where a score is below a threshold")
    own = not by_rank and router.threshold is not None
    budget = choice.budget if own else choice.budget or 1.0
    return RouterPlan("router", Router(router, config, choice.select), router.kv_policy, budget, calibrates=not by_rank)


def _own_threshold(
    threshold: float, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText, on_progress: OnProgress
) -> Selection:
    """The method's own threshold everywhere, and what it keeps of a text."""
    point = at_constant(
        checkpoint,
        text.ids,
        threshold,
        options,
        on_layer=lambda done, total: on_progress(Progress("counting what the routers keep", done, total)),
    )
    if point.budget <= 0:
        raise UsageError(
            "the routers keep nothing of the calibration text at their own threshold",
            expected="some tokens of some layers",
            found=f"threshold {threshold:g}",
            todo="give --budget to calibrate thresholds, or text of the kind that the routers were trained on",
        )
    table = np.full_like(point.thresholds, -np.inf)
    everything = GridPoint(1.0, table, np.ones_like(point.kept), 1.0)
    return by_thresholds(point.budget, [point] if point.budget == 1 else [everything, point], text)
