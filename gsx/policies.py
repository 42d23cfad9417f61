"""`--policy`: the keep rule of an export, what it needs of the checkpoint, and its place in the manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from pydantic import JsonValue

from engines.bundle import manifest as schema
from engines.bundle.layer_sets import Places, mask_of, parse_places, unified_places
from engines.errors import UsageError
from exporter.calibration import DEFAULT_GRID, GridPoint, at_constant, calibrate
from exporter.checkpoint import Checkpoint
from exporter.config import BRANCHES, KvPolicy, ModelConfig
from exporter.decoder.layer import DecoderOptions
from exporter.rules.base import KeepRule
from exporter.rules.ffn_skip import FfnSkip
from exporter.rules.gateskip import GateSkip, Selection
from exporter.rules.layers import Layers
from exporter.rules.router import Router
from exporter.similarity import Region, at_threshold, calibrate_ffn
from exporter.text import TokenText
from gsx.calm import CalmOptions, parse_calm, settle_calm
from gsx.progress import Progress

NAMES = ("gateskip", "router", "layers", "unified", "ffn-skip", "calm", "dense")
# Those whose bundles can leave any branch out, and so draft without some.
DRAFTS_LAYERS = ("gateskip", "layers", "unified")
# FFN-SkipLLM: share of FFNs kept by default, as in the paper's abstract; and new tokens that run in full, of which the
# notes on it say 5 to 10 % of an answer (docs/methods.md section 5).
FFN_BUDGET, WARM_UP = 0.75, 8
_INSTEAD_OF_BUDGET = {
    **dict.fromkeys(("layers", "unified"), "a set of layers is chosen by --layers, --exit or --speedup"),
    "calm": "what is kept follows from the exit threshold: calm:threshold=T, or calm:tolerance=D",
}
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Choice:
    """What is asked for.

    Args:
        policy: `NAME` or `NAME:parameters`; None for gateskip on a gated checkpoint, else dense.
        select: how GateSkip chooses.
        budget: share to keep, with rules that have thresholds; None for 1.
        kv_policy: None for the rule's own default.
    """

    policy: str | None = None
    select: Selection = "threshold"
    budget: float | None = None
    kv_policy: KvPolicy | None = None


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
class Plan:
    """A keep rule that fits a checkpoint.

    Args:
        name: of the policy.
        rule: as the decoder takes it; None for a dense export.
        kv_policy: K and V of skipped tokens.
        budget: the exported one, with rules that have thresholds.
        calibrates: whether it reads calibration text.
        kept: the branches that run by default, with a rule that reads a layer mask.
        speedup: of Unified Layer Skipping.
        exits: depths that the checkpoint was trained to leave at.
        calm: what CALM is given.
        ffn: parameters of FFN-SkipLLM.
    """

    name: str
    rule: KeepRule | None
    kv_policy: KvPolicy
    budget: float | None = None
    calibrates: bool = False
    kept: Places = ()
    speedup: float | None = None
    exits: tuple[int, ...] = ()
    calm: CalmOptions | None = None
    ffn: FfnParameters | None = None


def plan_policy(choice: Choice, config: ModelConfig) -> Plan:
    """The rule that is asked for, if the checkpoint has what it needs.

    Raises:
        UsageError: an unknown policy, options that exclude each other, a checkpoint without what the rule needs.
    """
    name, _, parameters = (choice.policy or _default(config)).partition(":")
    if name not in NAMES:
        raise UsageError(f"policy {name!r} is not known", expected="one of " + ", ".join(NAMES), found=repr(name))
    if name == "router":
        return _router(choice, config, parameters)
    if config.router is not None:
        raise UsageError(
            f"--policy {name}: the checkpoint has routers, which say what runs",
            expected="a checkpoint without routers",
            todo="export with router, the default; --budget 1 keeps everything",
        )
    if name == "dense":
        return _dense(choice, config, parameters)
    if name == "gateskip":
        return _gateskip(choice, config, parameters)
    if name == "ffn-skip":
        return _ffn_skip(choice, config, parameters)
    _refuse(name, "--budget", choice.budget is not None, _INSTEAD_OF_BUDGET[name])
    _refuse(name, "--select rank", choice.select == "rank", "it belongs to gateskip")
    if name == "calm":
        return _calm(choice, config, parameters)
    kv_policy = choice.kv_policy or "none"
    layers = config.num_layers
    speedup = None
    if name == "unified":
        speedup = _number(parameters)
        kept = unified_places(layers, speedup)
    else:
        kept = _set(parameters) if parameters else tuple((layer, b) for layer in range(layers) for b in BRANCHES)
    mask_of(kept, layers, kv_policy)
    return Plan(name, Layers(), kv_policy, kept=kept, speedup=speedup, exits=config.exits)


def settle(
    plan: Plan, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
) -> tuple[schema.Policy | None, schema.Selection | None]:
    """Calibrate what there is to calibrate. Returns: the manifest's sections.

    Args: text: where the plan reads one.
    """
    if plan.rule is None:
        return None, None
    if isinstance(plan.rule, GateSkip):
        selection = _selection(plan, checkpoint, options, text, on_progress)
        return schema.gateskip_policy(selection.mode, plan.rule.branches), selection
    if isinstance(plan.rule, Router):
        return _routed(plan, plan.rule, checkpoint, options, text, on_progress)
    if plan.calm is not None:
        return settle_calm(plan.calm, plan.rule, checkpoint, options, text, on_progress), None
    if plan.ffn is not None:
        assert text is not None
        return _calibrated_ffn(plan, plan.ffn, checkpoint, text, on_progress)
    layers = checkpoint.config.num_layers
    mask = mask_of(plan.kept, layers, plan.kv_policy).tolist()
    parameters: dict[str, JsonValue] = {"layers": schema.places_text(plan.kept)}
    if plan.speedup is not None:
        parameters["speedup"] = plan.speedup
    policy = schema.Policy(
        name=plan.name,
        branches=plan.rule.branches,
        inputs=(
            schema.RuntimeInput(name="layer_mask", least=0, most=1, default=mask),
            schema.RuntimeInput(name="full_until", least=0, most=None, default=0),
        ),
        parameters=parameters,
        exits=plan.exits,
        warm_up=0 if plan.name == "unified" else None,
    )
    return policy, None


def grid_with(budget: float) -> Sequence[float]:
    """The calibrated budgets: the default grid and the budget asked for, in falling order."""
    return sorted({*DEFAULT_GRID, budget}, reverse=True)


def text_entry(text: TokenText) -> schema.CalibrationText:
    """A text in the manifest."""
    return schema.CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)


def _dense(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    if parameters:
        _bad_parameters("dense", "none", parameters)
    if config.gate is not None:
        raise UsageError(
            "--policy dense: the checkpoint has gates, which multiply what branches give",
            expected="a checkpoint without gates",
            todo="export with gateskip, the default; --budget 1 keeps everything",
        )
    for name, given in (
        ("--budget", choice.budget is not None and choice.budget != 1),
        (f"--kv-policy {choice.kv_policy}", choice.kv_policy not in (None, "compute")),
    ):
        if given:
            raise UsageError(
                f"{name} needs gates, and this checkpoint has none",
                expected='a "gsx" section with "gate" in config.json, and gate tensors; or a policy that needs none',
                found="a dense model",
                todo="train gates first (gsx train), give --policy, or leave the option out for a dense export",
            )
    return Plan("dense", None, "compute")


def _refuse_none(expected: str) -> NoReturn:
    raise UsageError(
        "--kv-policy none is for sets of layers that stay the same for a request", expected=expected, found="none"
    )


def _calm(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    kv_policy = choice.kv_policy or "compute"
    if kv_policy == "none":
        _refuse_none("compute (K and V of the layers above, from the exit state) or copy with calm")
    options = parse_calm(parameters, config)
    return Plan(
        "calm", options.rule(), kv_policy, calibrates=options.guarantee is not None, exits=options.exits, calm=options
    )


def _gateskip(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    if parameters:
        _bad_parameters("gateskip", "none: --budget and --select are its options", parameters)
    gate = config.gate
    if gate is None:
        raise UsageError(
            "--policy gateskip needs gates, and this checkpoint has none",
            expected='"gate" in the "gsx" section of config.json, and the tensors model.layers.{i}.attn_gate.weight, '
            "attn_gate.bias, mlp_gate.weight and mlp_gate.bias",
            found="a dense model",
            todo="train gates (gsx train), or export with a policy that needs none: --policy layers",
        )
    kv_policy = choice.kv_policy or "compute"
    if kv_policy == "none":
        _refuse_none("compute or copy with gateskip, where another token may need a skipped token's K and V")
    if kv_policy == "copy" and "attn" not in gate.branches:
        raise UsageError(
            "--kv-policy copy needs gates on the attention branch", found="gates on " + ", ".join(gate.branches)
        )
    rule = GateSkip(gate, config.eos_ids, choice.select)
    return Plan("gateskip", rule, kv_policy, choice.budget or 1.0, calibrates=choice.select == "threshold")


def _default(config: ModelConfig) -> str:
    return "gateskip" if config.gate else "router" if config.router else "dense"


def _router(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    if parameters:
        _bad_parameters("router", "none: --budget and --select are its options", parameters)
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
    if choice.select == "rank" and router.predictor is not None:
        _refuse("router with a predictor", "--select rank", True, "the predictor decides in place of the rank")
    if choice.select == "rank" and router.adapter is not None:
        _refuse("router with an adapter", "--select rank", True, "an adapter runs where a score is below a threshold")
    by_threshold = choice.select == "threshold"
    # Without a budget, the method's own threshold holds where it has one.
    budget = choice.budget if by_threshold and router.threshold is not None else choice.budget or 1.0
    rule = Router(router, config, choice.select)
    return Plan("router", rule, router.kv_policy, budget, calibrates=by_threshold)


def _routed(
    plan: Plan,
    rule: Router,
    checkpoint: Checkpoint,
    options: DecoderOptions,
    text: TokenText | None,
    on_progress: OnProgress,
) -> tuple[schema.Policy, schema.Selection]:
    limits = rule.router.score_range or (None, None)
    if plan.budget is not None:
        selection = _selection(plan, checkpoint, options, text, on_progress)
    else:
        assert text is not None
        assert rule.router.threshold is not None
        point = at_constant(
            checkpoint,
            text.ids,
            rule.router.threshold,
            options,
            on_layer=lambda done, total: on_progress(Progress("counting what the routers keep", done, total)),
        )
        if point.budget <= 0:
            raise UsageError(
                "the routers keep nothing of the calibration text at their own threshold",
                expected="some tokens of some layers",
                found=f"threshold {rule.router.threshold:g}",
                todo="give --budget to calibrate thresholds, or text of the kind that the routers were trained on",
            )
        table = np.full_like(point.thresholds, -np.inf)
        everything = GridPoint(1.0, table, np.ones_like(point.kept), 1.0)
        points = [point] if point.budget == 1 else [everything, point]
        selection = _threshold_selection(point.budget, points, text)
    by_rank = selection.mode == "rank"
    read = (
        schema.RuntimeInput(name="budget", least=0, most=1)
        if by_rank
        else schema.RuntimeInput(name="thresholds", least=limits[0], most=limits[1])
    )
    policy = schema.Policy(
        name="router",
        branches=rule.branches,
        layers=rule.router.layers,
        inputs=(read,),
        parameters={"router": rule.router.to_dict()},
    )
    return policy, selection


def _ffn_skip(choice: Choice, config: ModelConfig, parameters: str) -> Plan:
    _refuse("ffn-skip", "--select rank", choice.select == "rank", "it belongs to gateskip")
    _refuse(
        "ffn-skip",
        f"--kv-policy {choice.kv_policy}",
        choice.kv_policy not in (None, "compute"),
        "attention always runs, and computes its K and V",
    )
    if config.num_layers < 3:
        raise UsageError(
            "--policy ffn-skip: the first and the last layer never skip",
            expected="a model with 3 layers or more",
            found=str(config.num_layers),
        )
    given = _ffn_parameters(parameters, config.num_layers)
    if given.threshold is not None:
        _refuse("ffn-skip:threshold", "--budget", choice.budget is not None, "the threshold says how much is kept")
        if given.stride is None or given.layers is None:
            _bad_parameters("ffn-skip", "stride and layers beside a threshold", parameters)
    return Plan("ffn-skip", FfnSkip(given.stride or 1), "compute", choice.budget or FFN_BUDGET, True, ffn=given)


def _ffn_parameters(text: str, layers: int) -> FfnParameters:
    """`stride=K,layers=FIRST-LAST,threshold=COSINE,warm_up=TOKENS`, each of them optional."""
    expected = f"stride=K, layers=FIRST-LAST (within 1 to {layers - 2}), threshold=COSINE (-1 to 1), warm_up=TOKENS"
    values: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in ("stride", "layers", "threshold", "warm_up") or name in values:
            _bad_parameters("ffn-skip", expected, part)
        values[name] = value
    try:
        stride = int(values["stride"]) if "stride" in values else None
        first, dash, last = values.get("layers", "").partition("-")
        span = (int(first), int(last or first)) if first or dash else None
        threshold = float(values["threshold"]) if "threshold" in values else None
        warm_up = int(values.get("warm_up", WARM_UP))
    except ValueError:
        _bad_parameters("ffn-skip", expected, text)
    if (
        (stride is not None and not 1 <= stride < layers)
        or (span is not None and not 1 <= span[0] <= span[1] <= layers - 2)
        or (threshold is not None and not -1 <= threshold <= 1)
        or warm_up < 0
    ):
        _bad_parameters("ffn-skip", expected, text)
    return FfnParameters(stride, span, threshold, warm_up)


def _calibrated_ffn(
    plan: Plan, given: FfnParameters, checkpoint: Checkpoint, text: TokenText, on_progress: OnProgress
) -> tuple[schema.Policy, schema.Selection]:
    def tell(what: str, done: int, total: int) -> None:
        on_progress(Progress(what, done, total))

    assert plan.budget is not None
    if given.threshold is not None:
        assert given.stride is not None
        assert given.layers is not None
        region = Region(*given.layers, given.stride)
        found = at_threshold(checkpoint, text.ids, region, given.threshold, tell)
    else:
        grid = grid_with(plan.budget)
        found = calibrate_ffn(
            checkpoint, text.ids, grid, plan.budget, stride=given.stride, skipping=given.layers, on_step=tell
        )
    budget = found.points[-1].budget if given.threshold is not None else plan.budget
    region = found.region
    policy = schema.Policy(
        name="ffn-skip",
        branches=FfnSkip.branches,
        inputs=(
            schema.RuntimeInput(name="thresholds", least=0, most=2),
            schema.RuntimeInput(name="full_until", least=0, most=None, default=0),
        ),
        parameters={
            "stride": region.stride,
            "layers": f"{region.first}-{region.last}",
            "similarity": [round(float(one), 6) for one in found.similarity],
        },
        warm_up=given.warm_up,
    )
    return policy, _threshold_selection(budget, found.points, text)


def _selection(
    plan: Plan, checkpoint: Checkpoint, options: DecoderOptions, text: TokenText | None, on_progress: OnProgress
) -> schema.Selection:
    assert plan.budget is not None
    if not plan.calibrates:
        return schema.Selection(mode="rank", budget=plan.budget)
    assert text is not None
    points = calibrate(
        checkpoint,
        text.ids,
        grid_with(plan.budget),
        options,
        on_layer=lambda done, total: on_progress(Progress("calibrating", done, total)),
    )
    return _threshold_selection(plan.budget, points, text)


def _threshold_selection(budget: float, points: Sequence[GridPoint], text: TokenText) -> schema.Selection:
    return schema.Selection(
        mode="threshold",
        budget=budget,
        grid=tuple(
            schema.GridPoint(
                budget=point.budget,
                thresholds=tuple((float(a), float(b)) for a, b in point.thresholds),
                kept_share=point.kept_share,
                kept=tuple((float(a), float(b)) for a, b in point.kept),
            )
            for point in points
        ),
        calibration=text_entry(text),
    )


def _refuse(name: str, option: str, given: bool, why: str) -> None:
    if given:
        raise UsageError(f"{option} and --policy {name} exclude each other", expected="one of them", todo=why)


def _number(parameters: str) -> float:
    try:
        return float(parameters)
    except ValueError:
        _bad_parameters("unified", "a target speed-up, e.g. unified:1.5", parameters)


def _set(parameters: str) -> Places:
    try:
        return parse_places(parameters)
    except ValueError:
        _bad_parameters("layers", "the layers that run, e.g. layers:0-5,8", parameters)


def _bad_parameters(name: str, expected: str, found: str) -> NoReturn:
    raise UsageError(f"--policy {name}: its parameters", expected=expected, found=repr(found)) from None
