"""The configuration of a training run: every option that affects its result, in one value that can be stored as JSON.

The same configuration, text and thread count give the same run. The published recipes, and what is known of their
constants, are in docs/methods.md, 3.2 (GateSkip) and 4.1 (LayerSkip).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from gsx_exporter.config import GateConfig
from gsx_exporter.errors import CheckpointError
from gsx_plugins.errors import UsageError

BudgetRule = Literal["falling", "uniform"]
SaveType = Literal["float32", "bfloat16"]
OptimizerName = Literal["adamw", "muon"]
ExitTarget = Literal["text", "model"]


@dataclass(frozen=True)
class ModelShape:
    """The shape of a new Llama model. Sizes are counts of elements."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    max_positions: int = 1024
    rope_theta: float = 10000.0
    tied_head: bool = True

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ):
            _at_least(f"model.{name}", getattr(self, name), 1)
        # 256 bytes and <|endoftext|>: a smaller byte-level vocabulary cannot spell every text.
        _at_least("model.vocab_size", self.vocab_size, 257)
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                "training configuration: model.num_kv_heads does not divide model.num_heads",
                expected=f"a divisor of {self.num_heads}",
                found=str(self.num_kv_heads),
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Args:
        model: the shape of a new model; ignored when training starts from a checkpoint.
        gate: the gates to train. A checkpoint that has gates keeps them.
        exits: depths with an early-exit loss (LayerSkip), each below the number of layers; may be empty.
        seed: for the initial weights, the order of the text, the budgets and the dropped layers.
        steps: total number of optimizer steps.
        batch_size: sequences per step.
        sequence_length: tokens per sequence.
        warmup_steps: steps over which the learning rate rises linearly to its peak.
        decay_steps: last steps, over which the learning rate falls linearly to zero.
        learning_rate: the peak. It is constant between warm-up and decay, so a run can be made longer or shorter
            while it is in progress.
        weight_decay: for the branches' matrices only.
        betas: of AdamW.
        clip_norm: largest norm of the gradient.
        optimizer: "adamw" for all parameters, or "muon" for the branches' matrices and AdamW for the rest. Muon's
            updates are scaled to the size of AdamW's, so that one learning rate fits both.
        sparsity: lambda, the weight of the mean of g^2 (methods.md 3.2).
        gate_bias: initial bias of every gate; 5.0 means sigmoid 0.993.
        gate_std: initial standard deviation of the gates' weights.
        budget_end: final value of the lowest budget.
        budget_steps: steps over which the lowest budget falls from 1.0 to budget_end.
        budget_rule: "falling" trains each step at the lowest budget (the published recipe); "uniform" draws each
            step's budget between the lowest and 1.0, so that higher budgets are not forgotten.
        layer_dropout: p_max, the probability that the last layer is dropped for a sequence.
        exit_target: what an exit learns to predict: the "text", with LayerSkip's weights, or what the whole "model"
            predicts (its last layer's distribution, as in self-distillation, arXiv:1905.08094), each exit with the
            last layer's weight: a draft should agree with the model, whether that is right or wrong.
        exit_scale: factor on the weights of the exits below the last layer.
        qk_clip: bound on the attention logits, enforced by scaling down a head's queries (QK-Clip, arXiv:2507.20534,
            2.1; here with the product of the largest query and key norms); 0 for no bound. With Muon, logits grow
            without limit, and logits in the thousands cannot be computed in low precision.
        bf16: autocast to bfloat16; weights, scores and losses stay float32.
        compile: run the layers through torch.compile (needs a C++ compiler).
        save_dtype: type of the weights in the finished checkpoint.
    """

    model: ModelShape = field(default_factory=ModelShape)
    gate: GateConfig = field(default_factory=GateConfig)
    exits: tuple[int, ...] = ()
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 512
    warmup_steps: int = 100
    decay_steps: int = 200
    learning_rate: float = 1e-3
    weight_decay: float = 0.001
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    optimizer: OptimizerName = "adamw"
    sparsity: float = 0.1
    gate_bias: float = 5.0
    gate_std: float = 0.01
    budget_end: float = 0.8
    budget_steps: int = 500
    budget_rule: BudgetRule = "falling"
    layer_dropout: float = 0.1
    exit_target: ExitTarget = "text"
    exit_scale: float = 1.0
    qk_clip: float = 0.0
    bf16: bool = False
    compile: bool = False
    save_dtype: SaveType = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup_steps", "decay_steps", "budget_steps"):
            _at_least(name, getattr(self, name), 0)
        if self.warmup_steps + self.decay_steps > self.steps:
            raise UsageError(
                "training configuration: warm-up and decay are longer than the run",
                expected=f"warmup_steps + decay_steps <= steps ({self.steps})",
                found=f"{self.warmup_steps} + {self.decay_steps}",
            )
        _between("budget_end", self.budget_end, 0.0, 1.0)
        _between("layer_dropout", self.layer_dropout, 0.0, 0.9)
        for name in ("learning_rate", "clip_norm"):
            _positive(name, getattr(self, name))
        for name in ("sparsity", "weight_decay", "gate_std", "exit_scale", "qk_clip"):
            _between(name, getattr(self, name), 0.0, float("inf"))
        _one_of("budget_rule", self.budget_rule, ("falling", "uniform"))
        _one_of("save_dtype", self.save_dtype, ("float32", "bfloat16"))
        _one_of("exit_target", self.exit_target, ("text", "model"))
        _one_of("optimizer", self.optimizer, ("adamw", "muon"))
        if len(set(self.exits)) != len(self.exits) or any(depth < 1 for depth in self.exits):
            raise UsageError(
                "training configuration: exits is not a list of distinct depths",
                expected="whole numbers from 1 up",
                found=str(list(self.exits)),
            )

    def with_steps(self, steps: int, *, resumed: bool = False) -> TrainConfig:
        """The same recipe with another number of steps: warm-up, decay and budget steps are scaled with it.

        Args:
            steps: the new number.
            resumed: whether the run has begun already: then only the decay, which is still to come, is scaled.
        """
        names = ("decay_steps",) if resumed else ("decay_steps", "warmup_steps", "budget_steps")
        scaled = {name: getattr(self, name) * steps // self.steps for name in names}
        return replace(self, steps=steps, **scaled)

    @classmethod
    def from_json(cls, path: Path) -> TrainConfig:
        """Read a configuration file.

        Raises:
            UsageError: no such file, not JSON, an unknown key, or a value that cannot be used.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such file", expected="a training configuration (JSON)") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: is not readable JSON", found=str(error)) from error
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrainConfig:
        """Read an object such as `to_dict` returns; missing keys get their defaults.

        Raises:
            UsageError: an unknown key, or a value that cannot be used.
        """
        values = _checked(cls, "training configuration", raw)
        if "model" in values:
            values["model"] = ModelShape(**_checked(ModelShape, "training configuration: model", values["model"]))
        if "gate" in values:
            try:
                values["gate"] = GateConfig.from_dict(values["gate"])
            except CheckpointError as error:
                raise UsageError(
                    "training configuration: gate cannot be used", found=error.what, expected=error.expected
                ) from error
        for name in ("exits", "betas"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        values["gate"] = self.gate.to_dict()
        for name in ("exits", "betas"):
            values[name] = list(values[name])
        return values


_SIMPLE_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "str": str,
}


def _checked(cls: type, what: str, raw: Any) -> dict[str, Any]:
    """The object's values, after a look at keys and simple types."""
    if not isinstance(raw, Mapping):
        raise UsageError(f"{what} is not an object", found=repr(raw))
    known = {item.name: item.type for item in fields(cls)}
    for key, value in raw.items():
        if key not in known:
            raise UsageError(f"{what} has an unknown key", expected="one of " + ", ".join(known), found=repr(key))
        kind = _SIMPLE_TYPES.get(str(known[key]))
        wrong_bool = isinstance(value, bool) and known[key] != "bool"
        if kind is not None and (wrong_bool or not isinstance(value, kind)):
            raise UsageError(f"{what}: {key} has the wrong type", expected=str(known[key]), found=repr(value))
        if str(known[key]).startswith("tuple") and not isinstance(value, (list, tuple)):
            raise UsageError(f"{what}: {key} has the wrong type", expected="a list", found=repr(value))
    return dict(raw)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"training configuration: {name} is too small", expected=f">= {least}", found=str(value))


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(
            f"training configuration: {name} is out of range", expected=f"{low} to {high}", found=str(value)
        )


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise UsageError(f"training configuration: {name} is not positive", expected="> 0", found=str(value))


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(
            f"training configuration: {name} has an unknown value",
            expected="one of " + ", ".join(allowed),
            found=repr(value),
        )
