"""The settings of a training run: one value, which is one YAML file (`reading.py`).

What a method is, is set here by name. How a run goes (batch, learning rate, schedule, precision, devices, logging) is
transformers' own: the section `trainer` takes every field of its `TrainingArguments`. The published recipes, and what
is known of their constants, are in docs/methods.md: 3.2 (GateSkip), 4.1 (LayerSkip), 8 (Sorted LLaMA).
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import UsageError

Share = Annotated[float, Field(ge=0, le=1)]
Mode = Literal["lora", "full", "frozen"]


class _Section(BaseModel):
    """A section of the file: unknown keys are refused, and values are not converted from other types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GateSettings(_Section):
    """Gates, and the budget that they are trained at (GateSkip).

    Args:
        kind, input, branches: see `GateConfig`. A model that has gates keeps its own.
        start: "random" (the published recipe), or "change": each new gate begins as a prediction of how much its branch
            changes a token (`warm_start.py`), so that fewer of the wrong tokens are skipped in the beginning.
        bias, std: of the new gates: their bias (5.0 means sigmoid 0.993), and the spread of their random weights.
        open_layers: layers, from 0, whose gates are held open: their branches always run, and the others make up for
        it.
        weights: "equal": every gate keeps the same share of tokens (the published recipe). "measured": a branch takes
            the more of the skipping, the less its skipping costs before training (`branch_costs.py`).
        rate: factor on the learning rate of the gates; new ones learn faster than what is already trained.
        estimator: how a gate learns from being closed. "kept": only kept tokens teach it (the published recipe).
            "straight-through": a skipped token also does, by what its branch would have added; the decision then has
            the slope of a sigmoid of the score's distance from the threshold, in standard deviations of the row's
            scores.
        sparsity: lambda, the weight of the mean of g^2.
        budget_start, budget_end: the lowest budget falls linearly from the first to the second.
        budget_ramp: share of the run's steps over which it falls.
        budget_rule: "falling" trains each step at the lowest budget (the published recipe); "uniform" draws each step's
            budget between the lowest and 1.0, so that one model serves all of them.
    """

    kind: Literal["vector", "scalar"] = "vector"
    input: Literal["post_norm", "pre_norm"] = "post_norm"
    branches: tuple[Branch, ...] = Field(default=BRANCHES, strict=False)
    start: Literal["random", "change"] = "random"
    bias: float = 5.0
    std: Annotated[float, Field(gt=0)] = 0.01
    open_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), strict=False)
    weights: Literal["equal", "measured"] = "equal"
    rate: Annotated[float, Field(gt=0)] = 1.0
    estimator: Literal["kept", "straight-through"] = "kept"
    sparsity: Annotated[float, Field(ge=0)] = 0.1
    budget_start: Share = 1.0
    budget_end: Share = 0.8
    budget_ramp: Share = 1.0
    budget_rule: Literal["falling", "uniform"] = "falling"

    @property
    def config(self) -> GateConfig:
        """The gates alone. Scalar ones are ranked by their logits, which do not run out of room near 1."""
        return GateConfig(self.kind, self.input, self.branches, "logit" if self.kind == "scalar" else "mean")


class ExitSettings(_Section):
    """Exits that the model is trained for (LayerSkip, Sorted LLaMA).

    Args:
        depths: layers before each exit; every: instead, an exit after each so many layers.
        weights: "depth" gives the losses weights that grow about quadratically with depth (LayerSkip); "equal" gives
            all the same (Sorted LLaMA, whose sub-models these are).
        scale: factor on the weights of the exits below the last layer.
        turns: "rotate" trains one exit a step, in turn; "gradual" begins with the deepest and reaches all of them in
            the middle of the run; "all" trains all of them in every step.
        target: what an exit learns: the "text", or what the whole "model" predicts (self-distillation,
            arXiv:1905.08094): a draft should agree with the model, whether that is right or wrong.
        dropout: p_max, the probability that the last layer is dropped for a sequence; it falls towards the first.
    """

    depths: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    every: Annotated[int, Field(ge=1)] | None = None
    weights: Literal["depth", "equal"] = "depth"
    scale: Annotated[float, Field(ge=0)] = 1.0
    turns: Literal["rotate", "gradual", "all"] = "rotate"
    target: Literal["text", "model"] = "text"
    dropout: Annotated[float, Field(ge=0, le=0.9)] = 0.1

    @model_validator(mode="after")
    def _one_way(self) -> ExitSettings:
        if bool(self.depths) == (self.every is not None):
            raise ValueError("one of depths and every")
        return self

    def of(self, layers: int) -> tuple[int, ...]:
        """The depths in a model of so many layers.

        Raises:
            UsageError: the model does not have them.
        """
        found = self.depths or tuple(range(self.every or layers, layers, self.every or 1))
        outside = [depth for depth in found if depth >= layers]
        if outside or not found or len(set(found)) != len(found):
            raise UsageError(
                "training: exits are outside the model, or named twice",
                expected=f"depths from 1 to {layers - 1}, each once",
                found=", ".join(map(str, found)) or f"every {self.every}",
            )
        return tuple(sorted(found))


class DistillSettings(_Section):
    """Learning from what the dense model predicts, by KL divergence, besides the text.

    Args:
        weight: share of the loss that comes from it.
        temperature: of both distributions.
    """

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0


class LoraSettings(_Section):
    """The adapters of mode "lora".

    Args:
        rank, alpha: as PEFT has them; None for twice the rank.
        rank_pattern: regular expressions of module names -> their own rank, as PEFT has them: an exit's own layers have
            more to learn than those above it.
        targets: names of the layers that get one, or "all-linear" for all of the branches.
        dropout: of their input.
        rslora: whether the delta is divided by the root of the rank.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False)] = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False

    @field_validator("rank_pattern")
    @classmethod
    def _expressions(cls, patterns: dict[str, int]) -> dict[str, int]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern} is a regular expression ({error})") from error
        return patterns


class DataSettings(_Section):
    """The text.

    Args:
        source: a JSON Lines, JSON, Parquet, CSV or text file, a directory of these or of `datasets`, or the id of a
            data set of the hub; None for the standard library of the running Python.
        name, split, revision: of a data set that has several.
        text, messages, prompt, answer: the columns: of plain text; of chats, lists of {role, content}; of prompts and
            answers. None takes what is there, in this order. Only answers are trained on, in the last two forms.
        held_out: the share of the rows that is held out, or the split or the file that is.
        length: tokens of a row.
        packed: whether rows are filled with several texts, one behind the other.
        streaming: whether the data is read while the run goes on, for what does not fit on the disk.
        rows: read at most so many rows of the source; None for all.
    """

    source: str | None = None
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] | str = 0.02
    length: Annotated[int, Field(ge=2)] = 512
    packed: bool = True
    streaming: bool = False
    rows: Annotated[int, Field(ge=1)] | None = None


class EvaluationSettings(_Section):
    """What is measured on the held-out text.

    Args:
        budgets: with gates, the perplexity at each of these.
        rows: how many rows of it.
    """

    budgets: tuple[Share, ...] = Field(default=(1.0, 0.9, 0.8, 0.7, 0.5), strict=False)
    rows: Annotated[int, Field(ge=1)] = 64


class ModelShape(_Section):
    """The shape of a new Llama model. Sizes are counts of elements."""

    vocab_size: Annotated[int, Field(ge=257)] = 2048  # 256 bytes and <|endoftext|>
    hidden_size: Annotated[int, Field(ge=1)] = 128
    intermediate_size: Annotated[int, Field(ge=1)] = 352
    num_layers: Annotated[int, Field(ge=1)] = 8
    num_heads: Annotated[int, Field(ge=1)] = 4
    num_kv_heads: Annotated[int, Field(ge=1)] = 2
    head_dim: Annotated[int, Field(ge=2)] = 32
    max_positions: Annotated[int, Field(ge=1)] = 1024
    rope_theta: float = 10000.0
    tied_head: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelShape:
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_kv_heads divides num_heads")
        return self


class MuonSettings(_Section):
    """Muon for the branches' matrices, and AdamW for the rest, in mode "full".

    Args:
        qk_clip: bound on the attention logits, enforced by scaling down a head's queries (QK-Clip, arXiv:2507.20534,
            2.1; here with the product of the largest query and key norms); 0 for no bound. With Muon, logits grow
            without limit, and logits in the thousands cannot be computed in low precision.
    """

    qk_clip: Annotated[float, Field(ge=0)] = 0.0


class TrainSettings(_Section):
    """One training run.

    Args:
        model: a directory or a hub id; None for a new model of the shape `new`.
        new: the shape of a new model.
        mode: what is trained: "lora" gates and exits with adapters on a frozen model, "full" everything, "frozen" gates
            alone.
        lora: the adapters of mode "lora".
        gate, exits, distill: the method; at least one of the first two.
        muon: another optimizer than `trainer.optim` for the branches' matrices.
        data: the text.
        evaluation: what is measured on the text that is held out.
        save_dtype: of the trained weights in the result.
        trainer: fields of transformers' TrainingArguments.
    """

    model: str | None = None
    new: ModelShape | None = None
    mode: Mode = "lora"
    lora: LoraSettings = LoraSettings()
    gate: GateSettings | None = None
    exits: ExitSettings | None = None
    distill: DistillSettings | None = None
    muon: MuonSettings | None = None
    data: DataSettings = DataSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    trainer: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fit(self) -> TrainSettings:
        if self.gate is None and self.exits is None:
            raise ValueError("gate, exits or both: without them there is no method")
        if (self.model is None) == (self.new is None):
            raise ValueError("one of model and new")
        if self.mode != "full" and (self.new is not None or self.muon is not None):
            raise ValueError("mode full with new or muon")
        if self.mode == "frozen" and (self.gate is None or self.exits is not None):
            raise ValueError("gates alone with mode frozen: an exit has no weights of its own")
        if self.new is not None and self.distill is not None:
            raise ValueError("no distill with new: a new model has nothing to teach")
        return self

    def to_yaml(self) -> str:
        """The file that `read_settings` reads."""
        import yaml

        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
