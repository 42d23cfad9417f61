"""`--policy loops`: a looped model, with the number of loops for each request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import BeforeValidator

from gsx_engines.bundle.controls import KeepSettings, RuntimeValues
from gsx_engines.bundle.loops import Loops
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import LoopsPolicy, Policy, RuntimeInput
from gsx_engines.bundle.selection import Selection
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.reference.rule import ReferenceRule
from gsx_exporter.rules.loops.reference import CountedLoops
from gsx_exporter.rules.loops.traced import LoopCount
from gsx_exporter.rules.parameters import Parameters, bad_parameters, read_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan, Settled, refuse_budget, refuse_kv_policy, refuse_rank
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_exporter.rules.settings import Curve, Setting, note_unused_budgets
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress

_FORM = "the most loops and, if they are fewer, those of a request that says nothing: loops:4 or loops:4,default=2"
# Each loop is a part of the graph. More are a slip of the pen.
_MOST = 64


def _count(text: object) -> int:
    number = int(str(text)) if str(text).isdecimal() else 0
    if not 1 <= number <= _MOST:
        raise ValueError(f"numbers of loops from 1 to {_MOST}, as in loops:4 or loops:4,default=2")
    return number


class LoopsOptions(Parameters):
    """Args: most: the largest number of loops; default: of a request that says nothing. None for the model's own."""

    most: Annotated[int, BeforeValidator(_count)] | None = None
    default: Annotated[int, BeforeValidator(_count)] | None = None

    @classmethod
    def leading_word(cls) -> str:
        """See `Parameters`."""
        return "most"


@dataclass(frozen=True)
class LoopsPlan(RulePlan):
    """A number of loops, which requests may change up to the most."""

    loops: Loops = field(kw_only=True)

    def of_model(self, config: ModelConfig) -> ModelConfig:
        """See `RulePlan`: with the largest number of loops."""
        return config.of_loops(self.loops)

    def settle(self, checkpoint: Checkpoint, text: TokenText | None, on_progress: OnProgress) -> Settled:
        """See `RulePlan`."""
        if not self.branches:
            return Settled(None, None)
        policy = LoopsPolicy(
            branches=self.branches,
            layers=self.loops.optional,
            inputs=(RuntimeInput(name="loops", least=1, most=self.loops.most, default=self.loops.default),),
        )
        return Settled(LoopCount(self.loops), policy)


def plan_loops(options: PolicyOptions, config: ModelConfig, parameters: str) -> RulePlan:
    """The plan for `loops`.

    Raises:
        UsageError: a model that is not looped, or a number of loops that is none.
    """
    refuse_budget("loops", options, "the number of loops is given by --loops")
    refuse_rank("loops", options)
    if config.loops is None:
        raise UsageError(
            "--policy loops: the model is not looped, each of its layers runs once",
            expected="a looped model (docs/families.md)",
            found=f"a {config.family} model",
        )
    given = read_parameters("loops", LoopsOptions, parameters, _FORM)
    own = config.loops.default
    most = given.most or max(own, given.default or 1)
    default = given.default or min(own, most)
    if default > most:
        bad_parameters("loops", f"a default of at most {most}", str(default))
    loops = Loops(**{**config.loops.model_dump(), "most": most, "default": default})
    branches = BRANCHES if most > 1 else ()  # with one loop there is nothing to choose
    kv_policy = options.kv_policy or ("copy" if loops.share_caches else "none")
    refuse_kv_policy("loops", kv_policy, config.of_loops(loops))
    return LoopsPlan("loops", branches, kv_policy if branches else "compute", loops=loops)


def _traced(recorded: Recorded) -> LoopCount:
    assert recorded.config.loops is not None
    return LoopCount(recorded.config.loops)


def _reference(policy: Policy, selection: Selection | None, controls: RuntimeValues) -> ReferenceRule:
    return CountedLoops(controls["loops"])


def _shape(manifest: Manifest) -> Loops:
    assert manifest.decoder.loops is not None
    return manifest.decoder.loops


def _share(loops: Loops, count: int) -> float:
    """The share of the optional visits that run; 1 if there are none."""
    return (count - 1) / (loops.most - 1) if loops.most > 1 else 1.0


def _settings(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[Setting]:
    """Every number of loops."""
    note_unused_budgets(asked, notes)
    loops = _shape(manifest)
    return [
        Setting(KeepSettings(loops=count), f"{count} loop{'s' if count > 1 else ''}", _share(loops, count))
        for count in range(loops.most, 0, -1)
    ]


def _exported_share(manifest: Manifest) -> float:
    loops = _shape(manifest)
    return _share(loops, loops.default)


def _counts(manifest: Manifest) -> Curve:
    return {f"loops {count}": KeepSettings(loops=count) for count in range(_shape(manifest).most, 0, -1)}


LOOPS = Rule(
    name="loops",
    plan=plan_loops,
    traced=_traced,
    reference=_reference,
    settings=_settings,
    exported_share=_exported_share,
    compared={"loops": {"loops": _counts}},
    whole=KeepSettings(),
)
