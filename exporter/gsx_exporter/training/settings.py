"""The settings of a training run: one value, one YAML file, and the recipes that ship as such files.

What a method is, is set here by name. How a run goes (batch, learning rate, schedule, precision, devices, logging) is
transformers' own: the section `trainer` takes every field of its `TrainingArguments`. The published recipes, and what
is known of their constants, are in docs/methods.md: 3.2 (GateSkip), 4.1 (LayerSkip), 8 (Sorted LLaMA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.config import GateConfig
from gsx_plugins.errors import UsageError

Share = Annotated[float, Field(ge=0, le=1)]
Mode = Literal["lora", "full", "frozen"]
_RECIPES = "gsx_exporter.training.recipes"


class _Section(BaseModel):
    """A section of the file: unknown keys are refused, and values are not converted from other types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class GateSettings(_Section):
    """Gates, and the budget that they are trained at (GateSkip).

    Args:
        kind, input, branches: see `GateConfig`. A model that has gates keeps its own.
        bias, std: of the new gates: their bias (5.0 means sigmoid 0.993), and the spread of their weights.
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
    bias: float = 5.0
    std: Annotated[float, Field(ge=0)] = 0.01
    rate: Annotated[float, Field(gt=0)] = 1.0
    estimator: Literal["kept", "straight-through"] = "kept"
    sparsity: Annotated[float, Field(ge=0)] = 0.1
    budget_start: Share = 1.0
    budget_end: Share = 0.8
    budget_ramp: Share = 1.0
    budget_rule: Literal["falling", "uniform"] = "falling"

    @property
    def config(self) -> GateConfig:
        """The gates alone."""
        return GateConfig(self.kind, self.input, self.branches)


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
        targets: names of the layers that get one, or "all-linear" for all of the branches.
        dropout: of their input.
        rslora: whether the delta is divided by the root of the rank.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False)] = "all-linear"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    rslora: bool = False


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


def recipes() -> tuple[str, ...]:
    """The names of the recipes that ship."""
    files = resources.files(_RECIPES).iterdir()
    return tuple(sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")))


def recipe_source(recipe: str | Path) -> tuple[str, str]:
    """What messages call a recipe, and its YAML text. Args: recipe: the name of one that ships, or a file.

    Raises:
        UsageError: no such recipe or file.
    """
    if str(recipe) in recipes():
        file = resources.files(_RECIPES).joinpath(f"{recipe}.yaml")
        return f"recipe {recipe}", file.read_text(encoding="utf-8")
    try:
        return str(recipe), Path(recipe).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{recipe}: no such recipe or file",
            expected=f"a YAML file, or one of {', '.join(recipes())}",
            found=str(getattr(error, "strerror", None) or error),
        ) from error


def read_settings(recipe: str | Path, changes: Mapping[str, Any] | Sequence[str] = ()) -> TrainSettings:
    """Settings from a recipe's name or a YAML file, with some of them changed.

    Args:
        changes: dotted name -> value; or texts such as `gate.kind=scalar`, whose values are read as YAML.
    Raises:
        UsageError: no such recipe or file, not YAML, an unknown key, or a value that does not fit.
    """
    import yaml

    source, text = recipe_source(recipe)
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{source}: is not YAML", found=" ".join(str(error).split())) from error
    if not isinstance(raw, dict):
        raise UsageError(f"{source}: is no settings file", expected="names and values", found=type(raw).__name__)
    for name, value in (changes if isinstance(changes, Mapping) else _parsed(changes)).items():
        _put(raw, name, value)
    return settings_of(raw, source)


def settings_of(raw: Mapping[str, Any], source: str = "training settings") -> TrainSettings:
    """Settings from plain values.

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    try:
        return TrainSettings.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part in _plain_parts(raw, first["loc"])) or "settings"
        cause = first.get("ctx", {}).get("error")
        if first["type"] == "extra_forbidden":
            raise UsageError(
                f"{source}: {place} is not a setting",
                expected=f"one of {', '.join(_keys_beside(first['loc']))}",
            ) from None
        raise UsageError(
            f"{source}: {place} cannot be used",
            expected=str(cause) if isinstance(cause, ValueError) else first["msg"],
            found=repr(first["input"]) if place != "settings" and not isinstance(cause, ValueError) else None,
        ) from None


def _parsed(changes: Sequence[str]) -> dict[str, Any]:
    import yaml

    found = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise UsageError(f"{change!r} is not a setting", expected="NAME=VALUE, e.g. trainer.learning_rate=1e-4")
        try:
            found[name] = _number(yaml.safe_load(value))
        except yaml.YAMLError as error:
            raise UsageError(f"{change!r}: its value is not YAML", found=" ".join(str(error).split())) from error
    return found


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a text; nobody means one."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _put(raw: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    place = raw
    for section in sections:
        inner = place.get(section)
        if inner is None:
            inner = place[section] = {}
        if not isinstance(inner, dict):
            raise UsageError(f"{name} is not a setting", expected=f"{section} has no parts", found=repr(inner))
        place = inner
    place[last] = value


def _plain_parts(raw: Any, loc: Sequence[int | str]) -> set[int | str]:
    """The parts of an error's place that are keys of the file: pydantic adds the names of alternatives."""
    found: set[int | str] = set()
    for part in loc:
        if isinstance(raw, Mapping) and part in raw:
            raw = raw[part]
            found.add(part)
        elif isinstance(raw, list) and isinstance(part, int):
            found.add(part)
    return found


def _keys_beside(loc: Sequence[int | str]) -> list[str]:
    model: Any = TrainSettings
    for part in loc[:-1]:
        kinds = model.model_fields[part].annotation
        model = next(
            (
                kind
                for kind in (kinds, *getattr(kinds, "__args__", ()))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ),
            model,
        )
    return list(model.model_fields)
