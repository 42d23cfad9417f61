"""What a keep rule is to the decoder: a score for every token at a branch, and what it needs to find it.

The layer (`layer.py`) asks its rule at each branch that the rule may skip, gathers the rows whose score exceeds the
bound, runs the branch on them, and adds the result back. Nothing else differs between methods. A rule reads

- run-time inputs of the graph (`inputs`);
- values that are computed once in a call (`call`), by `enter`, from the tokens and the run-time inputs;
- states that it carries from branch to branch for every token (`carried`): `enter` makes the first ones, and a rule
  that `WatchesBranches` or `LooksAtExits` changes them;
- parameters of its own (`HasModules`), which the checkpoint stores under the layer's name.

A layer gets its own part of what has an axis L.

A rule is a frozen dataclass: two with the same parameters are equal, and its `repr` shows all that it depends on.

Letters as in `layer.py`. How to add a rule: docs/keep-rules.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gsx_exporter.config import Branch, ModelConfig

# What a rule reads at one layer: name -> tensor.
Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Value:
    """A named tensor: its type, and its axes as numbers or letters (N tokens, B sequences, L layers)."""

    dtype: torch.dtype
    axes: tuple[int | str, ...]

    @property
    def by_layer(self) -> bool:
        """Whether every layer has a part of its own."""
        return "L" in self.axes

    @property
    def of_layer(self) -> Value:
        """What one layer gets."""
        return Value(self.dtype, tuple(axis for axis in self.axes if axis != "L"))


@dataclass(frozen=True)
class Tokens:
    """The tokens of a call. Args: ids [N] int64; valid [N] bool, not padding; positions [B, S] int64."""

    ids: Tensor
    valid: Tensor
    positions: Tensor


@dataclass(frozen=True)
class BranchInput:
    """A branch and what it reads.

    Args:
        branch: which.
        hidden: [N, H], the residual stream.
        normed: [N, H], after the branch's norm.
        gate: the checkpoint's gate on these: gate [N, H] or [N, 1] and score [N], both float32.
        modules: the rule's own, of the whole layer, by the names that `HasModules` gives them.
    """

    branch: Branch
    hidden: Tensor
    normed: Tensor
    gate: Callable[[], tuple[Tensor, Tensor]]
    modules: Mapping[str, nn.Module]


@dataclass(frozen=True)
class BranchScore:
    """What a rule says at a branch.

    Args:
        score: [N] float32, whatever the graph's type.
        bound: [] float32: rows with a higher score are kept; or, with selection by rank, [1] int64: how many are.
        gate: [N, H] or [N, 1] float32, which multiplies the branch's output; None: the checkpoint's own gate where it
            has one, else nothing.
        passed: values for the later branch of the same layer, which finds them among what it reads.
    """

    score: Tensor
    bound: Tensor
    gate: Tensor | None = None
    passed: Values = field(default_factory=dict)


class TracedRule(ABC):
    """How tokens are chosen, as a frozen value.

    Attributes:
        branches: those that it may skip, the same in every layer that it reaches; the others always run.
        layers: those that it reaches, ascending; None for all.
        hides_skipped: under the K/V policy `none`, whether tokens may differ in a layer, so that others must not see a
            skipped one there; False where no token looks at that layer again.
        by_rank: whether a bound is a number of rows.
        inputs: the run-time inputs of the graph that it reads: `enter` those without an axis L, layers the others.
        whole: of those with an axis L, the ones that `enter` reads instead.
        call: what `enter` computes once in a call.
        carried: what goes from branch to branch; float32 [N, 1] each.
    """

    @property
    @abstractmethod
    def branches(self) -> tuple[Branch, ...]: ...

    @property
    def layers(self) -> tuple[int, ...] | None:
        return None

    @property
    def hides_skipped(self) -> bool:
        return False

    @property
    def by_rank(self) -> bool:
        return False

    @property
    def inputs(self) -> Mapping[str, Value]:
        return {}

    @property
    def whole(self) -> frozenset[str]:
        return frozenset()

    @property
    def call(self) -> Mapping[str, Value]:
        return {}

    @property
    def carried(self) -> Mapping[str, Value]:
        return {}

    @abstractmethod
    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """Values of a call: those of `call` and the first ones of `carried`. Args: inputs: those of `of_call`."""

    @abstractmethod
    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """Score all tokens at a branch. Args: values: those of `values_of`, and what an earlier branch passed."""

    def entered(self) -> Mapping[str, Value]:
        """All that `enter` gives, in order."""
        return {**self.call, **self.carried}

    def of_call(self) -> Mapping[str, Value]:
        """The run-time inputs that `enter` reads."""
        return {name: value for name, value in self.inputs.items() if not value.by_layer or name in self.whole}

    def of_layer(self) -> Mapping[str, Value]:
        """The values that every layer has a part of: of the run-time inputs, and of what `enter` gives."""
        inputs = {name: value for name, value in self.inputs.items() if name not in self.of_call()}
        return {name: value for name, value in {**inputs, **self.call}.items() if value.by_layer}

    def values_of(self, layer: int, inputs: Values, entered: Values) -> Values:
        """What one layer reads.

        Args: inputs: all run-time inputs; entered: what `enter` gave, with the present carried states.
        """
        given = {**inputs, **entered}
        own = {name: given[name].select(value.axes.index("L"), layer) for name, value in self.of_layer().items()}
        return {**entered, **own}


# What only some rules do: a rule that does it inherits the class.


class HasModules(ABC):
    """A rule with trained parameters of its own at a branch."""

    @abstractmethod
    def modules(self, config: ModelConfig, branch: Branch) -> Mapping[str, nn.Module]:
        """Name -> module, under which the checkpoint stores its parameters (`model.layers.{i}.{name}`)."""


class JudgesOnce(ABC):
    """A rule that judges only some of its branches by themselves; another one does as the branch before it."""

    @property
    @abstractmethod
    def judged(self) -> tuple[Branch, ...]:
        """The branches that are judged by themselves."""


class ReplacesSkipped(ABC):
    """A rule under which a skipped token gets something in the branch's place (an adapter, for example)."""

    @abstractmethod
    def skipped(self, x: BranchInput, score: BranchScore, values: Values) -> Tensor:
        """What the kept rows' results are added to, [N, H]; the residual stream for other rules."""


class WatchesBranches(ABC):
    """A rule that changes its carried states behind a branch."""

    @abstractmethod
    def after(self, branch: Branch, before: Tensor, after: Tensor, index: Tensor, values: Values) -> Values:
        """The carried states that changed.

        Args: before, after [N, H], the residual stream; index [K], the rows that ran.
        """


class LooksAtExits(ABC):
    """A rule that looks at the whole state behind some layers, and changes its carried states there."""

    @abstractmethod
    def exit_depths(self) -> tuple[int, ...]:
        """Depths behind which it looks, ascending."""

    @abstractmethod
    def exit_module(self, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
        """What looks, with the final norm's and head's parameters where it reads them, in `dtype`.

        Returns: a module that takes hidden and entering [N, H], the states behind and before the layer, and the values
            that `entered` names, in order; it gives the carried states, in order.
        """

    @abstractmethod
    def exit_prefix(self, depth: int) -> str:
        """What the names of the module's parameters begin with behind `depth` layers: `""` where all depths share them,
        or each layer's own (`layers.{depth - 1}.`)."""


def exit_watcher(rule: TracedRule | None) -> LooksAtExits | None:
    """A rule that looks at the state behind some layers; None for another rule."""
    found: object = rule
    return found if isinstance(found, LooksAtExits) and found.exit_depths() else None


def own_modules(rule: TracedRule, config: ModelConfig) -> dict[str, nn.Module]:
    """The rule's own modules of one layer, by name."""
    found: object = rule
    if not isinstance(found, HasModules):
        return {}
    return {name: module for branch in rule.branches for name, module in found.modules(config, branch).items()}


def judged_branches(rule: TracedRule) -> tuple[Branch, ...]:
    """The branches at which a rule finds a score of its own."""
    return rule.judged if isinstance(rule, JudgesOnce) else rule.branches


# The values of tokens whose keeping is not left to the score: see `forced`.
FORCED: Mapping[str, Value] = {
    "forced": Value(torch.bool, ("N",)),
    "forced_score": Value(torch.float32, ("N",)),
}


def forced(tokens: Tokens, always: Tensor) -> Values:
    """The values `FORCED`: padding is never kept, and what must `always` [N] run is.

    Returns: forced [N] bool; forced_score [N]: minus infinity for padding, else infinity.
    """
    infinity = torch.tensor(float("inf"))
    return {
        "forced": always | ~tokens.valid,
        "forced_score": torch.where(tokens.valid, infinity, -infinity),
    }


def apply_forced(score: Tensor, values: Values) -> Tensor:
    """A score [N] with the forced ones put in."""
    return torch.where(values["forced"], values["forced_score"], score)


def before(positions: Tensor, full_until: Tensor) -> Tensor:
    """Tokens that run in full, [N] bool: positions [B, S] below their sequence's full_until [B] (or [1], for all)."""
    return (positions < full_until.unsqueeze(1)).reshape(-1)
