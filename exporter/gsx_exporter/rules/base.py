"""What a keep rule is to the decoder: a score for every token at a branch, and what it needs to find it.

The layer (`gsx_exporter/decoder/layer.py`) asks its rule at each branch that the rule may skip, gathers the rows whose
score exceeds the bound, runs the branch on them, and adds the result back. Nothing else differs between methods. A rule
reads

- run-time inputs of the graph (`inputs`);
- values that are computed once in a call (`call`), by `enter`, from the tokens and the run-time inputs;
- states that it carries from branch to branch for every token (`carried`): `enter` begins them, `after` changes them;
- parameters of its own (`modules`), which lie in the checkpoint under the layer's name.

What has an axis L comes to a layer as the layer's own part.

Letters as in `layer.py`. How to add a rule: docs/keep-rules.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from gsx_exporter.config import Branch, ModelConfig

if TYPE_CHECKING:
    from gsx_exporter.decoder.layer import DecoderLayer, DecoderOptions

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
class Verdict:
    """What a rule says at a branch.

    Args:
        score: [N] float32, whatever the graph's type.
        bound: [] float32: rows with a higher score are kept; or, with selection by rank, [1] int64: so many are.
        gate: [N, H] or [N, 1] float32, what the branch's output is multiplied by; None: the checkpoint's own gate where
            it has one, else nothing.
        passes: values for the later branch of the same layer, which finds them among what it reads.
    """

    score: Tensor
    bound: Tensor
    gate: Tensor | None = None
    passes: Values = field(default_factory=dict)


class KeepRule(ABC):
    """How tokens are chosen.

    Attributes:
        name: of the policy, as `gsx export --policy` takes it.
        branches: those that it may skip, the same in every layer that it reaches; the others always run.
        layers: those that it reaches, ascending; None for all.
        hides_skipped: under the K/V policy `none`, whether tokens may differ in a layer, so that a skipped one must not
            be seen there; False where nobody looks at that layer any more.
        by_rank: whether a verdict's bound is a number of rows.
        inputs: the run-time inputs of the graph that it reads: `enter` those without an axis L, layers the others.
        whole: of those with an axis L, the ones that `enter` reads instead.
        call: what `enter` computes once in a call.
        carried: what goes from branch to branch; float32 [N, 1] each.
    """

    name: ClassVar[str]
    branches: tuple[Branch, ...]
    layers: tuple[int, ...] | None = None
    hides_skipped: bool = False
    by_rank: bool = False
    inputs: Mapping[str, Value] = {}
    whole: frozenset[str] = frozenset()
    call: Mapping[str, Value] = {}
    carried: Mapping[str, Value] = {}

    def modules(self, config: ModelConfig, branch: Branch) -> Mapping[str, nn.Module]:
        """Parameters of a branch: name -> module, under which the checkpoint has them (`model.layers.{i}.{name}`)."""
        return {}

    @abstractmethod
    def enter(self, tokens: Tokens, inputs: Values) -> Values:
        """Values of a call: those of `call` and the first ones of `carried`. Args: inputs: those of `of_call`."""

    @abstractmethod
    def judge(self, layer: DecoderLayer, branch: Branch, hidden: Tensor, normed: Tensor, values: Values) -> Verdict:
        """Score all tokens at a branch.

        Args: hidden [N, H], the residual stream; normed [N, H], the branch's input.
        """

    @property
    def chosen(self) -> tuple[Branch, ...]:
        """The branches that are judged by themselves; another one does what the one before it was told."""
        return self.branches

    def skipped(
        self, layer: DecoderLayer, branch: Branch, hidden: Tensor, normed: Tensor, verdict: Verdict, values: Values
    ) -> Tensor:
        """What the kept rows' results are added to, [N, H]: the residual stream, unless a skipped branch has a stand-in
        (an adapter, for one)."""
        return hidden

    def after(self, branch: Branch, before: Tensor, after: Tensor, index: Tensor, values: Values) -> Values:
        """The carried states behind a branch.

        Args: before, after [N, H], the residual stream; index [K], the rows that ran.
        Returns: the states that changed.
        """
        return {}

    def asked(self) -> tuple[int, ...]:
        """Depths behind which the rule looks at the whole state (`asker`), ascending."""
        return ()

    def asker(self, config: ModelConfig, options: DecoderOptions) -> nn.Module:
        """What looks at the state behind the layers that `asked` names, with the final norm's and head's parameters.

        Returns: a module that takes hidden and entering [N, H], the states behind and before the layer, and the values
            that `entered` names, in order; it gives the carried states, in order.
        """
        raise NotImplementedError("a rule that asks has an asker")

    def asker_prefix(self, depth: int) -> str:
        """What the names of the asker's parameters begin with behind `depth` layers: the same asker is laid out behind
        each, with the same parameters or with each layer's own (`layers.{depth - 1}.`)."""
        return ""

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

        Args: inputs: all run-time inputs; entered: what `enter` gave, the carried states as of now.
        """
        given = {**inputs, **entered}
        own = {name: given[name].select(value.axes.index("L"), layer) for name, value in self.of_layer().items()}
        return {**entered, **own}


# What tokens whose keeping is not the score's to decide get: see `forced`.
FORCED: Mapping[str, Value] = {
    "forced": Value(torch.bool, ("N",)),
    "forced_score": Value(torch.float32, ("N",)),
}


def forced(tokens: Tokens, always: Tensor) -> Values:
    """The values `FORCED`: padding is never kept, and what must `always` [N] run is.

    Returns: forced [N] bool; forced_score [N]: minus infinity for padding, infinity else.
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
