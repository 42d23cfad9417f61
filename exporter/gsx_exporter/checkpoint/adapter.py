"""LoRA adapters, as PEFT writes them: merged into the tensors of their base while these are read.

The rules are PEFT's (tuners/lora/layer.py and dora.py: `get_delta_weight`, `merge`; names: utils/save_and_load.py).
What cannot be merged, or is not known here, is refused by name before anything is read. The reference loads the same
adapter by PEFT itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsx_exporter.checkpoint.files import canonical_name, open_safetensors
from gsx_exporter.checkpoint.json_file import read_json
from gsx_exporter.checkpoint.names import ADAPTER, ADAPTER_WEIGHTS, GATES
from gsx_exporter.checkpoint.stored import StoredTensors, Tensors
from gsx_exporter.checkpoint.tensors import EMBEDDING, HEAD
from gsx_exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# What PEFT puts before the names of the model's own modules.
_PREFIX = "base_model.model."
# Keys that decide how weights are merged, with those of the same meaning by layer.
_READ = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias")
# Keys that change nothing of the merged weights: what was trained shows in the tensors.
_NO_EFFECT = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "lora_dropout", "fan_in_fan_out",  # the latter only for layers that no supported family has
    "init_lora_weights", "eva_config", "corda_config", "lora_ga_config", "loftq_config",  # see _check_start
    "velora_config", "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config", "gsx",
)  # fmt: skip
# Ways to begin that leave the base's weights as they are; the others (PiSSA, OLoRA, LoftQ, ...) train a residual of it.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_TASKS = ("CAUSAL_LM", None)
_PARTS = re.compile(
    r"(?P<module>.+?)\.(?:(?P<factor>lora_[AB])\.(?P<kind>weight|bias)|(?P<table>lora_embedding_[AB])(?:\.weight)?"
    r"|(?P<size>lora_magnitude_vector)(?:\.weight)?)"
)
_MERGE = "merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR)"


@dataclass(frozen=True)
class LoraSettings:
    """How an adapter's factors are merged.

    Args:
        rank, alpha: of layers that no pattern names; the delta is B A alpha / rank.
        by_root: divided by the root of the rank instead.
        ranks, alphas: regular expression of a module's name -> its own value; the first that matches counts.
        resized: whether the rows of a merged weight get the sizes that the adapter stores (DoRA).
    """

    rank: int
    alpha: float
    by_root: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    resized: bool

    def scale(self, module: str, rank: int) -> float:
        """What B A is multiplied by. Args: module: its name in transformers' model; rank: of its factors."""
        alpha = matched(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.by_root else rank)

    def rank_of(self, module: str) -> int:
        """The rank of a module's factors."""
        return matched(self.ranks, module, self.rank)


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter's directory, its configuration read.

    Args:
        directory: where it is.
        base: the model that it was trained on, a directory or a hub id; revision: of the hub's.
        settings: how it is merged.
        target_modules: names of the modules that it was trained on; None if they are given in another way.
        section: the section `gsx` that the model has with this adapter; None for that of its base.
        base_sha256: hash of the base's weights; None if it is not recorded.
    """

    directory: Path
    base: str
    revision: str | None
    settings: LoraSettings
    target_modules: tuple[str, ...] | None
    section: Mapping[str, Any] | None
    base_sha256: str | None


def read_adapter(directory: Path) -> Adapter:
    """The configuration of an adapter's directory.

    Raises:
        CheckpointError: it is damaged, not a LoRA adapter of a language model, or has an option that cannot be merged.
    """
    path = directory / ADAPTER
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{directory}: is an adapter of another kind than LoRA",
            expected="peft_type LORA",
            found=repr(raw.get("peft_type")),
            todo=f"if PEFT can merge it, {_MERGE}",
        )
    if raw.get("task_type") not in _TASKS:
        raise CheckpointError(
            f"{path}: the adapter is not of a model that writes text",
            expected="task_type CAUSAL_LM",
            found=repr(raw["task_type"]),
        )
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path}: does not name the model that the adapter belongs to",
            expected="base_model_name_or_path, a directory or a hub id",
            found=repr(base),
            todo="add it",
        )
    for key, value in raw.items():
        if value and key not in _READ and key not in _NO_EFFECT:
            raise CheckpointError(
                f"{path}: the adapter has an option that gsx does not merge",
                expected="plain LoRA, rsLoRA or DoRA",
                found=f"{key} {value!r}",
                todo=f"if PEFT can merge it, {_MERGE}",
            )
    _check_start(path, raw)
    section, targets = raw.get("gsx"), raw.get("target_modules")
    if section is not None and not isinstance(section, dict):
        raise CheckpointError(f"{path}: gsx is not a section", expected="an object", found=repr(section))
    own = dict(section or {})
    base_sha256 = own.pop("base_sha256", None)
    if base_sha256 is not None and not isinstance(base_sha256, str):
        raise CheckpointError(f"{path}: gsx.base_sha256 is no hash", expected="a text", found=repr(base_sha256))
    some = any(raw.get(key) is not None for key in ("exclude_modules", "layers_to_transform"))
    return Adapter(
        directory=directory,
        base=base,
        revision=raw.get("revision"),
        settings=_settings(path, raw),
        target_modules=tuple(map(str, targets)) if isinstance(targets, list) and not some else None,
        section=own or None,
        base_sha256=base_sha256,
    )


def _check_start(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse adapters of a base whose weights were changed before training began."""
    start = raw.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: the adapter belongs not to the base, but to what init_lora_weights made of it",
            expected="an adapter of the base itself",
            found=f"init_lora_weights {start!r}",
            todo="save it with path_initial_model_for_weight_conversion, which makes it one, or merge it by PEFT",
        )


def _settings(path: Path, raw: Mapping[str, Any]) -> LoraSettings:
    def number(key: str, value: Any, *, whole: bool = False) -> Any:
        kinds = int if whole else int | float
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(
                f"{path}: {key} is not a number", expected=f"a positive {'whole ' * whole}number", found=repr(value)
            )
        return value

    def numbers(key: str, *, whole: bool = False) -> dict[str, Any]:
        found = raw.get(key) or {}
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: {key} is not an object", expected="names and numbers", found=repr(found))
        for pattern, value in found.items():
            number(f"{key}.{pattern}", value, whole=whole)
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{path}: {key} has a damaged name", found=f"{pattern!r}: {error}") from error
        return found

    return LoraSettings(
        rank=number("r", raw.get("r", 8), whole=True),
        alpha=number("lora_alpha", raw.get("lora_alpha", 8)),
        by_root=bool(raw.get("use_rslora")),
        ranks=numbers("rank_pattern", whole=True),
        alphas=numbers("alpha_pattern"),
        resized=bool(raw.get("use_dora")),
    )


def matched(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """What the first pattern that fits says of a module. PEFT's `get_pattern_key`: a pattern names a module, or the end
    of its path."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


@dataclass
class MergedTensors:
    """The tensors of a base with an adapter merged into them, each when it is read, in float32.

    Args:
        base: the base's tensors.
        adapter: the adapter's configuration.
        tied: whether the base's embedding is its head.
        unties: whether they are two tables with the adapter.
    """

    base: Tensors
    adapter: Adapter
    tied: bool
    unties: bool = field(default=False, init=False)
    # Tensor -> what the adapter stores of it: factors A and B, DoRA's sizes, a bias.
    _parts: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)
    # Tensors that the adapter replaces.
    _whole: dict[str, str] = field(default_factory=dict, repr=False)
    _names: set[str] = field(init=False, repr=False)
    _own: StoredTensors = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gates = self.adapter.directory / GATES
        files = [self._weights(), *([gates] if gates.is_file() else [])]
        self._own = StoredTensors({name: (path, name) for path in files for name in open_safetensors(path).keys()})  # noqa: SIM118
        for name in self._own.names:
            self._place(name)
        if self._stores_one_table():
            del self._whole[HEAD]
        else:
            # PEFT changes the one that it was told to, and writes down both where it kept them equal.
            changed = {EMBEDDING, HEAD} & (self._parts.keys() | self._whole.keys())
            self.unties = self.tied and bool(changed)
        self._names = {*self.base.names, *self._whole, *([HEAD] if self.unties else [])}

    @property
    def names(self) -> Collection[str]:
        """See `Tensors`."""
        return self._names

    @property
    def files(self) -> Sequence[Path]:
        """See `Tensors`."""
        return [*self.base.files, *self._own.files]

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        if name in self._whole:
            return self._own.shape(self._whole[name])
        return self.base.shape(self._of_base(name))

    def stored_type(self, name: str) -> str:
        """See `Tensors`."""
        if name in self._parts:
            return "F32"
        if name in self._whole:
            return self._own.stored_type(self._whole[name])
        return self.base.stored_type(self._of_base(name))

    def tensor(self, name: str) -> torch.Tensor:
        """See `Tensors`."""
        own = self._whole.get(name)
        found = self.base.tensor(self._of_base(name)) if own is None else self._own.tensor(own)
        return self._merged(name, found) if name in self._parts else found

    def _of_base(self, name: str) -> str:
        return EMBEDDING if name == HEAD and self.unties else name

    def _merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        import torch

        parts = {part: self._own.tensor(stored).float() for part, stored in self._parts[name].items()}
        settings, module = self.adapter.settings, name.rpartition(".")[0]
        scale = settings.scale(module, settings.rank_of(module))
        merged = weight.to(torch.float32, copy=True)
        if "bias" in parts:
            return merged.add_(parts["bias"], alpha=scale)
        left, right = (parts["A"].t(), parts["B"].t()) if name == EMBEDDING else (parts["B"], parts["A"])
        merged.addmm_(left, right, alpha=scale)
        if "size" in parts:
            merged *= (parts["size"] / merged.norm(dim=1))[:, None]
        return merged

    def check(self, known: Collection[str]) -> None:
        """Refuse an adapter that does not fit its base, or is incomplete.

        Args: known: the names of all tensors that the model must have.
        """
        if not self._parts and not self._whole:
            raise CheckpointError(f"{self.adapter.directory}: the adapter has no tensors")
        for name, stored in self._whole.items():
            if name not in known:
                raise self._of_another_base(stored, f"no tensor {name} in the model")
            if name in self.base.names and self._own.shape(stored) != self.base.shape(name):
                raise self._of_another_base(self._shown(stored), f"{name} {list(self.base.shape(name))}")
        for name, parts in self._parts.items():
            self._check_parts(name, parts, known)
        for name in known:
            module, _, kind = name.rpartition(".")
            named = any(f".{module}".endswith(f".{target}") for target in self.adapter.target_modules or ())
            if named and kind == "weight" and name not in self._parts:
                raise CheckpointError(
                    f"{self.adapter.directory}: the adapter is incomplete",
                    expected=f"lora_A and lora_B for {module}, which target_modules names",
                    found="no such tensors",
                    todo="copy or download it again",
                )

    def _weights(self) -> Path:
        directory = self.adapter.directory
        path = directory / ADAPTER_WEIGHTS
        if path.is_file():
            return path
        pickle = directory / "adapter_model.bin"
        raise CheckpointError(
            f"{directory}: the adapter has {'only pickled' if pickle.is_file() else 'no'} weights",
            expected=ADAPTER_WEIGHTS,
            todo="load it with PEFT and save it again (save_pretrained), which writes safetensors"
            if pickle.is_file()
            else "copy or download it again",
        )

    def _stores_one_table(self) -> bool:
        """Whether the adapter replaces the base's one table by another one."""
        if not self.tied or not {EMBEDDING, HEAD} <= self._whole.keys() or {EMBEDDING, HEAD} & self._parts.keys():
            return False
        return self._own.tensor(self._whole[EMBEDDING]).equal(self._own.tensor(self._whole[HEAD]))

    def _place(self, stored: str) -> None:
        """Find out what a tensor of the adapter is."""
        path = stored.removeprefix(_PREFIX)
        found = _PARTS.fullmatch(path)
        if found is None:
            name = canonical_name(path.replace(".base_layer.", ".").replace(".modules_to_save.", "."))
            self._whole[name] = stored
            return
        module = canonical_name(found["module"] + ".weight").removesuffix(".weight")
        name, part = f"{module}.weight", (found["factor"] or found["table"] or found["size"])[-1]
        if found["size"]:
            part = "size"
        elif found["kind"] == "bias":
            name, part = f"{module}.bias", "bias"
        self._parts.setdefault(name, {})[part] = stored

    def _check_parts(self, name: str, parts: Mapping[str, str], known: Collection[str]) -> None:
        """Refuse parts that do not fit the base or each other."""
        settings, first = self.adapter.settings, next(iter(parts.values()))
        if name not in known or self._of_base(name) not in self.base.names:
            raise self._of_another_base(first, f"no tensor {name} in the model")
        shape, rank = self.shape(name), settings.rank_of(name.rpartition(".")[0])
        wanted: dict[str, tuple[int, ...]] = {"bias": shape}
        if "bias" not in parts:
            if len(shape) != 2:
                raise self._of_another_base(self._shown(first), f"{name} {list(shape)}, which is no matrix")
            out, width = reversed(shape) if name == EMBEDDING else shape
            wanted = {"A": (rank, width), "B": (out, rank)}
            if settings.resized:
                wanted["size"] = (out,)
        if missing := [part for part in wanted if part not in parts]:
            raise CheckpointError(
                f"{self.adapter.directory}: the adapter is incomplete",
                expected=f"{' and '.join(wanted)} for {name}, as PEFT names its factors",
                found=f"{', '.join(parts.values())}, and no {missing[0]}",
                todo="copy or download it again",
            )
        if stray := [parts[part] for part in parts if part not in wanted]:
            raise CheckpointError(
                f"{self.adapter.directory}: the adapter has a part that its configuration does not mention",
                found=stray[0],
                todo=f"correct {ADAPTER}: use_dora says whether there are magnitudes",
            )
        for part, expected in wanted.items():
            if self._own.shape(parts[part]) != expected:
                raise self._of_another_base(
                    self._shown(parts[part]), f"{list(expected)}, for {name} {list(shape)} at rank {rank}"
                )

    def _shown(self, stored: str) -> str:
        return f"{stored} {list(self._own.shape(stored))}"

    def _of_another_base(self, found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.adapter.directory}: the adapter does not fit its base, {self.adapter.base}",
            expected=expected,
            found=found,
            todo=f"name the base that it was trained on in {ADAPTER}, base_model_name_or_path",
        )
