"""Traced rules: what the decoder knows of a keep rule, which is a score for every token at a branch and its inputs.

At each branch that a rule may skip, the layer (`layer.py`) asks the rule for scores, gathers the rows whose score
exceeds the bound, runs the branch on them, and adds the result back. Nothing else differs between methods. A rule reads

- run-time inputs of the graph (`inputs`);
- values that `enter` computes once per call (`call`), from the tokens and the run-time inputs;
- states of every token that it carries from branch to branch (`carried`): `enter` makes the first ones, and a rule
  that `WatchesBranches` or `LooksAtExits` updates them;
- parameters of its own (`HasModules`), which the checkpoint stores under the layer's name.

Of a value with an axis L, each layer gets its own part.

A rule is a frozen dataclass: two with the same parameters are equal, and its `repr` shows everything it depends on.

Letters as in `layer.py`. How to add a rule: docs/keep-rules.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gsx_engines.bundle.words import Branch
from gsx_exporter.config import ModelConfig

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
        """The value as one layer gets it, without the axis L."""
        return Value(self.dtype, tuple(axis for axis in self.axes if axis != "L"))


@dataclass(frozen=True)
class Tokens:
    """The tokens of a call. Args: ids [N] int64; valid [N] bool, false for padding; positions [B, S] int64."""

    ids: Tensor
    valid: Tensor
    positions: Tensor


@dataclass(frozen=True)
class BranchInput:
    """A branch and what it reads.

    Args:
        branch: its name.
        hidden: [N, H], the residual stream.
        normed: [N, H], after the branch's norm.
        gate: computes the checkpoint's gate for these: gate [N, H] or [N, 1] and score [N], both float32. The gate is
            None where the score needs none (`GateConfig`): the layer then computes it for kept rows.
        modules: the rule's own modules of the whole layer, by the names that `HasModules` gives them.
    """

    branch: Branch
    hidden: Tensor
    normed: Tensor
    gate: Callable[[], tuple[Tensor | None, Tensor]]
    modules: Mapping[str, nn.Module]


@dataclass(frozen=True)
class BranchScore:
    """What a traced rule returns at a branch.

    Args:
        score: [N] float32, whatever the graph's type is.
        bound: [] or [N] float32: rows with a higher score are kept; with selection by rank, [1] int64: the number of
            kept rows.
        gate: [N, H] or [N, 1] float32, multiplies the branch's output; None to use the checkpoint's gate if the branch
            has one.
        passed: values for the next branch of the same layer, which reads them like its other values.
    """

    score: Tensor
    bound: Tensor
    gate: Tensor | None = None
    passed: Values = field(default_factory=dict)


class TracedRule(ABC):
    """A keep rule as the exporter traces it: a frozen value.

    Attributes:
        branches: those that it may skip, the same in every layer that it applies to; the others always run.
        layers: those that it applies to, ascending; None for all.
        hides_skipped: with the K/V policy `none`, whether decisions in a layer may differ between tokens, so that other
            tokens must not attend to a skipped one there; False if a layer is skipped for whole sequences.
        by_rank: whether a bound is a number of rows.
        inputs: the run-time inputs of the graph that it reads: those without an axis L in `enter`, the others in the
            layers.
        whole: names of inputs with an axis L that `enter` reads instead, as a whole.
        call: what `enter` computes once per call.
        carried: states that go from branch to branch; float32 [N, 1] each.
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
        """Compute the values of `call` and the first ones of `carried`. Args: inputs: those that `of_call` names."""

    @abstractmethod
    def score(self, x: BranchInput, values: Values) -> BranchScore:
        """Score all tokens at a branch. Args: values: those of `values_of`, and those that an earlier branch passed."""

    def entered(self) -> Mapping[str, Value]:
        """All values that `enter` returns, in order."""
        return {**self.call, **self.carried}

    def of_call(self) -> Mapping[str, Value]:
        """The run-time inputs that `enter` reads."""
        return {name: value for name, value in self.inputs.items() if not value.by_layer or name in self.whole}

    def of_layer(self) -> Mapping[str, Value]:
        """The values that every layer reads its part of: run-time inputs, and values that `enter` returns."""
        inputs = {name: value for name, value in self.inputs.items() if name not in self.of_call()}
        return {name: value for name, value in {**inputs, **self.call}.items() if value.by_layer}

    def values_of(self, layer: int, inputs: Values, entered: Values) -> Values:
        """The values that one layer reads.

        Args: inputs: all run-time inputs; entered: what `enter` returned, with the current carried states.
        """
        given = {**inputs, **entered}
        own = {name: given[name].select(value.axes.index("L"), layer) for name, value in self.of_layer().items()}
        return {**entered, **own}


# Optional parts of a rule: a rule that has one inherits the class.


class HasModules(ABC):
    """A rule with trained parameters of its own at a branch."""

    @abstractmethod
    def modules(self, config: ModelConfig, branch: Branch) -> Mapping[str, nn.Module]:
        """Name -> module; the checkpoint stores its parameters under that name (`model.layers.{i}.{name}`)."""


class DividesBudget(ABC):
    """A rule whose branches keep different shares at one budget."""

    @abstractmethod
    def skip_weight(self, layer: int, branch: Branch) -> float:
        """How much of the skipping a branch takes, at least 0 (`gate_shares.py`); 0 if it always runs."""


class SharesScore(ABC):
    """A rule that scores only some of its branches; any other branch follows the decision of the branch before it."""

    @property
    @abstractmethod
    def scored(self) -> tuple[Branch, ...]:
        """The branches that have a score of their own."""


class ReplacesSkipped(ABC):
    """A rule that runs something else for skipped tokens (an adapter, for example)."""

    @abstractmethod
    def skipped(self, x: BranchInput, score: BranchScore, values: Values) -> Tensor:
        """What the kept rows' results are added to, [N, H]; with other rules this is the residual stream."""


class WatchesBranches(ABC):
    """A rule that updates its carried states after a branch."""

    @abstractmethod
    def after(self, branch: Branch, before: Tensor, after: Tensor, index: Tensor, values: Values) -> Values:
        """The carried states that changed.

        Args: before, after: [N, H], the residual stream before and after the branch; index: [K], the rows that ran.
        """


class LooksAtExits(ABC):
    """A rule that looks at all tokens' states after some layers, and updates its carried states there."""

    @abstractmethod
    def exit_depths(self) -> tuple[int, ...]:
        """Numbers of layers after which it looks, ascending."""

    @abstractmethod
    def exit_module(self, config: ModelConfig, dtype: torch.dtype) -> nn.Module:
        """The module that looks at the states.

        Args: dtype: type of the final norm's and the head's parameters, if the module has them.
        Returns: a module that takes hidden and entering [N, H], the states after and before the layer, and the values
            that `entered` names, in order; it returns the carried states, in order.
        """

    @abstractmethod
    def exit_prefix(self, depth: int) -> str:
        """Prefix of the module's parameter names after `depth` layers: `""` if all depths share the parameters, or the
        layer's own (`layers.{depth - 1}.`)."""


def exit_watcher(rule: TracedRule | None) -> LooksAtExits | None:
    """The rule, if it looks at states after some layers; None otherwise."""
    found: object = rule
    return found if isinstance(found, LooksAtExits) and found.exit_depths() else None


def own_modules(rule: TracedRule, config: ModelConfig) -> dict[str, nn.Module]:
    """The rule's own modules of one layer, by name."""
    found: object = rule
    if not isinstance(found, HasModules):
        return {}
    return {name: module for branch in rule.branches for name, module in found.modules(config, branch).items()}


def scored_branches(rule: TracedRule) -> tuple[Branch, ...]:
    """The branches that have a score of their own."""
    return rule.scored if isinstance(rule, SharesScore) else rule.branches


# Values for tokens whose decision does not depend on the score: see `forced`.
FORCED: Mapping[str, Value] = {
    "forced": Value(torch.bool, ("N",)),
    "forced_score": Value(torch.float32, ("N",)),
}


def forced(tokens: Tokens, always: Tensor) -> Values:
    """The values `FORCED`: padding is never kept, and the tokens `always` [N] bool always are.

    Returns: forced [N] bool; forced_score [N] float32: minus infinity for padding, else infinity.
    """
    infinity = torch.tensor(float("inf"))
    return {
        "forced": always | ~tokens.valid,
        "forced_score": torch.where(tokens.valid, infinity, -infinity),
    }


def apply_forced(score: Tensor, values: Values) -> Tensor:
    """A score [N], with the forced scores in place of those of forced tokens."""
    return torch.where(values["forced"], values["forced_score"], score)


def before(positions: Tensor, full_until: Tensor) -> Tensor:
    """Tokens that run every branch, [N] bool: positions [B, S] below the sequence's full_until [B] or [1]."""
    return (positions < full_until.unsqueeze(1)).reshape(-1)
