"""The routers of a checkpoint: `config.json`, section `"gsx"`, key `"router"` (docs/routers.md).

A router is a small network, trained with the model or added to it, that decides for every token whether a layer, or one
of its branches, runs. Mixture-of-Depths, D-LLM, SkipGPT and FlexiDepth differ only in the values of this section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from gsx_engines.bundle.words import KvPolicy
from gsx_exporter.errors import CheckpointError
from gsx_exporter.section import finite, flag, known_keys, one_of, whole

Activation = Literal["relu", "silu", "tanh", "gelu"]
RouterOutput = Literal["logit", "sigmoid", "softmax", "difference"]
Multiplies = Literal["nothing", "branch", "mlp", "layer"]

# Range of the score, by output: a threshold outside it keeps everything or nothing.
_RANGES: Mapping[RouterOutput, tuple[float, float]] = {"sigmoid": (0.0, 1.0), "softmax": (0.0, 1.0)}


@dataclass(frozen=True)
class NetConfig:
    """A router's network: one linear layer, or two with an activation between them.

    Args:
        hidden: width between the two layers; None for one layer.
        activation: between the two layers.
        norm: whether an RMSNorm comes before the activation.
        bias: whether the linear layers have a bias.
    """

    hidden: int | None = None
    activation: Activation = "relu"
    norm: bool = False
    bias: bool = True

    @classmethod
    def from_dict(cls, name: str, section: Mapping[str, Any]) -> NetConfig:
        """Read a network's section.

        Raises:
            CheckpointError: an unknown key, or a value that is not allowed.
        """
        known_keys(name, section, tuple(field.name for field in fields(cls)))
        net = cls(**section)
        if net.hidden is not None:
            whole(f"{name}.hidden", net.hidden, 1)
        one_of(f"{name}.activation", net.activation, ("relu", "silu", "tanh", "gelu"))
        flag(f"{name}.norm", net.norm)
        flag(f"{name}.bias", net.bias)
        if net.norm and net.hidden is None:
            raise CheckpointError(
                f"config.json: {name}.norm needs two layers",
                expected=f"{name}.hidden, the width between them",
                found="one linear layer",
            )
        return net

    def shapes(self, width: int, out: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the network's tensors ([out, in], as in torch), by their names within the router."""
        linear = (
            {"": (out, width)} if self.hidden is None else {"hidden.": (self.hidden, width), "out.": (out, self.hidden)}
        )
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in linear.items():
            shapes[f"{name}weight"] = shape
            if self.bias:
                shapes[f"{name}bias"] = shape[:1]
        if self.norm:
            assert self.hidden is not None
            shapes["norm.weight"] = (self.hidden,)
        return shapes


@dataclass(frozen=True)
class RouterConfig:
    """The routers of a checkpoint.

    Args:
        decides: `layer`: one router for both branches of a layer; `branch`: one for each branch.
        branches: with `branch`, those that have a router; with `layer`, both.
        layers: those that have routers, ascending; None for all.
        reads: the residual stream that enters the `layer`, or the `branch`.
        input: that stream itself (`pre_norm`), or after the layer's or branch's norm (`post_norm`).
        net: the router's network.
        output: how its output becomes the score: the `logit` itself; its `sigmoid`; with two logits, the `softmax`
            probability of running, or the `difference` running minus skipping.
        keep_logit: which of two logits means running.
        threshold: the score above which a token runs; None if the method defines no constant (then it is calibrated).
        multiplies: what the score multiplies: `nothing`; the output of each kept `branch`; only the `mlp`'s output
            (and an adapter's, by one minus the score); or what the whole `layer` adds to the residual stream
            (Mixture-of-Depths).
        predictor: network whose sigmoid decides at inference, for methods whose score selects by top-k, which is
            possible only in training.
        kv_policy: K and V of a skipped token: `compute` its own, `copy` those of the layer below, or `none`: no token
            sees it in that layer.
        full_first: number of tokens at the start of a sequence that always run.
        adapter: width of the gated linear unit that runs in place of a skipped MLP; None if nothing does.
    """

    decides: Literal["branch", "layer"] = "layer"
    branches: tuple[Literal["attn", "mlp"], ...] = ("attn", "mlp")
    layers: tuple[int, ...] | None = None
    reads: Literal["branch", "layer"] = "layer"
    input: Literal["pre_norm", "post_norm"] = "pre_norm"
    net: NetConfig = NetConfig()
    output: RouterOutput = "logit"
    keep_logit: Literal[0, 1] = 1
    threshold: float | None = None
    multiplies: Multiplies = "nothing"
    predictor: NetConfig | None = None
    kv_policy: KvPolicy = "compute"
    full_first: int = 0
    adapter: int | None = None

    @classmethod
    def from_dict(cls, section: Mapping[str, Any], num_layers: int) -> RouterConfig:
        """Read the section.

        Raises:
            CheckpointError: an unknown key, a value of the wrong type, a layer that the model does not have, or keys
                that exclude each other.
        """
        known_keys("gsx.router", section, tuple(field.name for field in fields(cls)))
        values = dict(section)
        for key in ("branches", "layers"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        for key in ("net", "predictor"):
            if values.get(key) is not None:
                values[key] = NetConfig.from_dict(f"gsx.router.{key}", values[key])
        router = cls(**values)
        router._check(num_layers)
        return router

    def to_dict(self) -> dict[str, Any]:
        """The section as `config.json` stores it."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def logits(self) -> int:
        """Number of outputs of the network."""
        return 2 if self.output in ("softmax", "difference") else 1

    @property
    def score_range(self) -> tuple[float, float] | None:
        """Range of the score that decides; None if it has no bounds."""
        return (0.0, 1.0) if self.predictor is not None else _RANGES.get(self.output)

    def routed(self, num_layers: int) -> tuple[int, ...]:
        """The layers that have routers."""
        return tuple(range(num_layers)) if self.layers is None else self.layers

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a layer's routers and adapter ([out, in], as in torch), by name within the layer."""
        names = ["router"] if self.decides == "layer" else [f"{branch}_router" for branch in self.branches]
        nets = dict.fromkeys(names, (self.net, self.logits))
        if self.predictor is not None:
            nets |= {f"{name}_predictor": (self.predictor, 1) for name in names}
        shapes = {
            f"{name}.{inner}": shape
            for name, (net, out) in nets.items()
            for inner, shape in net.shapes(hidden_size, out).items()
        }
        if self.adapter is not None:
            shapes |= {
                "mlp_adapter.gate_proj.weight": (self.adapter, hidden_size),
                "mlp_adapter.up_proj.weight": (self.adapter, hidden_size),
                "mlp_adapter.down_proj.weight": (hidden_size, self.adapter),
            }
        return shapes

    def _check(self, num_layers: int) -> None:
        for key, allowed in _WORDS.items():
            one_of(f"gsx.router.{key}", getattr(self, key), allowed)
        if not isinstance(self.net, NetConfig):
            raise CheckpointError("config.json: gsx.router.net is not a section", expected="an object", found="null")
        if not isinstance(self.branches, tuple) or not self.branches or len(set(self.branches)) != len(self.branches):
            raise CheckpointError(
                "config.json: gsx.router.branches is not a list of distinct branches",
                expected='one or both of "attn", "mlp"',
                found=repr(self.branches),
            )
        for branch in self.branches:
            one_of("gsx.router.branches", branch, ("attn", "mlp"))
        if self.layers is not None:
            self._check_layers(num_layers)
        whole("gsx.router.keep_logit", self.keep_logit, 0)
        if self.keep_logit > 1:
            raise CheckpointError(
                "config.json: gsx.router.keep_logit has an unknown value", expected="0 or 1", found=str(self.keep_logit)
            )
        whole("gsx.router.full_first", self.full_first, 0)
        if self.adapter is not None:
            whole("gsx.router.adapter", self.adapter, 1)
        if self.threshold is not None:
            self._check_threshold(self.threshold)
        for problem, expected in self._contradictions():
            raise CheckpointError(f"config.json: gsx.router: {problem}", expected=expected)

    def _check_layers(self, num_layers: int) -> None:
        known = isinstance(self.layers, tuple) and all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < num_layers for n in self.layers
        )
        if not known or not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise CheckpointError(
                "config.json: gsx.router.layers is not a list of the model's layers",
                expected=f"distinct ascending numbers from 0 to {num_layers - 1}",
                found=repr(list(self.layers) if isinstance(self.layers, tuple) else self.layers),
            )

    def _check_threshold(self, threshold: float) -> None:
        finite("gsx.router.threshold", threshold)
        limits = self.score_range
        if limits is not None and not limits[0] <= threshold < limits[1]:
            raise CheckpointError(
                "config.json: gsx.router.threshold is outside the score's range",
                expected=f"a number of at least {limits[0]:g} and below {limits[1]:g}",
                found=f"{threshold:g}",
            )

    def _contradictions(self) -> list[tuple[str, str]]:
        """Keys that contradict each other: what is wrong, and what was expected."""
        whole_layer = self.decides == "layer"
        both = set(self.branches) == {"attn", "mlp"}
        rows = (
            (whole_layer and not both, "one router for the layer decides both branches", '"branches": ["attn", "mlp"]'),
            (
                whole_layer and self.reads != "layer",
                "one router for the layer reads the layer's input",
                '"reads": "layer"',
            ),
            (
                self.reads == "layer" and "attn" not in self.branches,
                "the layer's input is known only at the attention branch",
                '"reads": "branch" if only MLPs have routers',
            ),
            (
                self.multiplies == "layer" and not whole_layer,
                "what the layer adds is multiplied by one score",
                '"decides": "layer"',
            ),
            (
                self.multiplies == "mlp" and "mlp" not in self.branches,
                "the MLP is multiplied, but has no router",
                '"mlp" among the branches',
            ),
            (
                self.multiplies != "nothing" and self.output == "difference",
                "a difference of logits cannot multiply an output",
                '"output": "softmax", "sigmoid" or "logit"',
            ),
            (
                self.adapter is not None and "mlp" not in self.branches,
                "an adapter replaces a skipped MLP, but no MLP is skipped",
                '"mlp" among the branches',
            ),
            (
                self.adapter is not None and self.multiplies == "layer",
                "an adapter cannot be combined with a score that multiplies the layer",
                '"multiplies": "nothing", "branch" or "mlp"',
            ),
            (
                self.kv_policy != "compute" and "attn" not in self.branches,
                "attention always runs, so K and V are always computed",
                '"kv_policy": "compute"',
            ),
        )
        return [(problem, expected) for wrong, problem, expected in rows if wrong]


_WORDS: Mapping[str, tuple[str, ...]] = {
    "decides": ("branch", "layer"),
    "reads": ("branch", "layer"),
    "input": ("pre_norm", "post_norm"),
    "output": ("logit", "sigmoid", "softmax", "difference"),
    "multiplies": ("nothing", "branch", "mlp", "layer"),
    "kv_policy": ("compute", "copy", "none"),
}
