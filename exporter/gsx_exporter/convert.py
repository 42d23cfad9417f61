"""Converting checkpoints that other training code wrote into gated or routed checkpoints.

GateSkip writes two kinds of file: a full state dict (plain, or under the key `state_dict`; DeepSpeed runs converted to
fp32 have the same keys), and only the gates (`attn_{i}` / `mlp_{i}` -> state dict), where the other weights come from
the base model. Layout: docs/methods.md, 3.7. Routers are handled in `rules/router/layouts.py`. Keys are compared as
parts between dots, never as substrings, since `mlp.gate_proj` is a weight. A `.pt` is opened with `weights_only=True`:
nothing in it is executed.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gsx_engines.bundle.bundle import writing
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.experts import spelling_of, stored_name
from gsx_exporter.checkpoint.files import stored_tensors
from gsx_exporter.checkpoint.names import CONFIG, WEIGHTS, WEIGHTS_INDEX
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import expected_tensors, is_adapter, is_gate, rule_module_kind
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError
from gsx_exporter.experts import Spelling
from gsx_exporter.gate_config import GateConfig, GateInput
from gsx_exporter.router_config import RouterConfig
from gsx_exporter.rules.router.layouts import convert_routers
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

# As `save_pretrained` splits by default.
SHARD_BYTES = 5_000_000_000
_MODULES: Mapping[str, Branch] = {"self_attn": "attn", "mlp": "mlp"}
_GATE_KEY = re.compile(r"(attn|mlp)_(\d+)")
_TIED_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Disk space for configuration and tokenizer, besides the weights.
SLACK_BYTES = 64 << 20

Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class ConvertResult:
    """A converted checkpoint.

    Args:
        directory: where it is stored.
        layout: the kind of file it came from: the method, and whether the file had the whole model.
        gate, router: the gates or routers that it has.
        tensors: number of tensors written.
        left_out: keys of the file that a checkpoint does not store (tied heads, RoPE tables).
    """

    directory: Path
    layout: str
    gate: GateConfig | None
    router: RouterConfig | None
    tensors: int
    left_out: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "directory": str(self.directory),
            "layout": self.layout,
            "gate": self.gate.to_dict() if self.gate else None,
            "router": self.router.to_dict() if self.router else None,
            "tensors": self.tensors,
            "left_out": list(self.left_out),
        }


@dataclass(frozen=True)
class _Taken:
    """The contents of a file, under a checkpoint's names.

    Args:
        whole: whether the file has the whole model, so that nothing comes from the base.
        section: the `gsx` section of config.json, which describes the gates or routers.
    """

    layout: str
    tensors: dict[str, Tensor]
    whole: bool
    config: ModelConfig
    section: dict[str, Any]
    left_out: list[str]


def convert(
    file: str | Path,
    output: str | Path,
    *,
    base: str | Path,
    gate_input: GateInput = "post_norm",
    on_progress: OnProgress = silent,
) -> ConvertResult:
    """Convert a file saved by a method's training code into a gated or routed checkpoint.

    Args:
        file: a `.pt` of GateSkip, SkipGPT or D-LLM, or safetensors (a file, or a directory of them) of FlexiDepth.
        output: the new model directory, which must be new or empty; it is written completely or not at all.
        base: the model that was trained, a directory or a hub id. It provides the configuration, the tokenizer and,
            if the file has only gates or routers, the weights.
        gate_input: what GateSkip's gates read; the released code's wrapper reads the normalized input.
        on_progress: called before and after each step.
    Returns: the new directory, the kind of file it came from, and which keys were left out.
    Raises:
        CheckpointError: the file or the base cannot be used; the message says why.
        UsageError: the output is not empty, or the base already has gates or routers.
    Example:
        >>> result = gsx.convert("gates.pt", "out/converted", base="my-dense-model")
        >>> result.gate.kind
        'vector'
    """
    file, output = Path(file), Path(output)
    on_progress(Progress("opening"))
    raw = _load(file)
    model = open_checkpoint(base)
    if model.config.gate is not None or model.config.router is not None:
        kind = "gates" if model.config.gate is not None else "routers"
        raise UsageError(f"--base {base}: already has {kind}", expected="the plain model that was trained")
    taken = _routed(file, raw, model) or _gated(file, raw, model, gate_input)
    tensors, config = taken.tensors, taken.config
    if config.tied_head and _TIED_HEAD in tensors:
        _check_tie(file, tensors)
        taken.left_out.append(_TIED_HEAD)
        del tensors[_TIED_HEAD]
    expected = expected_tensors(config)
    _check(file, tensors, expected, model, whole=taken.whole)
    read: Read = lambda name: tensors[name] if name in tensors else model.tensor(name)  # noqa: E731
    sizes = {name: _bytes(read(name)) for name in expected}
    with writing(output, overwrite=False, needed_bytes=sum(sizes.values()) + SLACK_BYTES) as work:
        model.copy_companions(work)
        types = {read(name).dtype for name in expected if rule_module_kind(name) is None}
        write_config(model, taken.section, types, work / CONFIG)
        write_safetensors(work, sizes, read, spelling=spelling_of(config), on_progress=on_progress)
        on_progress(Progress("checking"))
        open_checkpoint(work)
    left_out = tuple(sorted(taken.left_out))
    return ConvertResult(output, taken.layout, config.gate, config.router, len(expected), left_out)


def _gated(file: Path, raw: Mapping[str, Any], model: Checkpoint, gate_input: GateInput) -> _Taken:
    """Read a file of the official GateSkip code."""
    left_out: list[str] = []
    whole = not _is_gates_only(raw)
    if whole:
        tensors, left_out = _full(file, raw)
    else:
        tensors = _gates_only(file, raw)
    gate = _gate_config(file, tensors, model.config, gate_input)
    section = {"method": "gateskip", "gate": gate.to_dict()}
    layout = "full state dict" if whole else "gates only"
    return _Taken(layout, tensors, whole, replace(model.config, gate=gate), section, left_out)


def _routed(file: Path, raw: Mapping[str, Any], model: Checkpoint) -> _Taken | None:
    """Read a file with routers; None if it has no routers."""
    _refuse_lora(file, raw)
    routed = convert_routers(str(file), raw, model)
    if routed is None:
        return None
    tables = [name for name in routed.tensors if name.endswith("rotary_emb.inv_freq")]
    tensors = {name: tensor for name, tensor in routed.tensors.items() if name not in tables}
    section = {"method": routed.method.lower(), "router": routed.router.to_dict()}
    layout = f"{routed.method} {'state dict' if routed.whole else 'file of routers'}"
    config = replace(model.config, router=routed.router)
    return _Taken(layout, tensors, routed.whole, config, section, [*routed.left_out, *tables])


def write_safetensors(
    directory: Path,
    sizes: Mapping[str, int],
    read: Read,
    *,
    spelling: Spelling = "qwen",
    shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress = silent,
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index if they exceed `shard_bytes`.

    One shard is in memory at a time.

    Args:
        sizes: name -> bytes, in the order in which they are written.
        read: name -> tensor.
        spelling: whose names they get in the file, if they belong to experts.
        on_progress: called after each file.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    done = 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Tensors of a .pt may share memory (one gate for all layers), which the format cannot express.
        tensors = {stored_name(name, spelling): read(name).clone() for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        done += sum(sizes[name] for name in names)
        on_progress(Progress("writing weights", done, sum(sizes.values()), unit="bytes"))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _load(file: Path) -> Mapping[str, Any]:
    """The file's state dict or its dict of gates; for safetensors, the tensors."""
    if file.is_dir() or file.suffix == ".safetensors":
        return stored_tensors(file)
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file" if not file.exists() else f"{file}: is not a file",
            expected="a .pt file that the GateSkip training code wrote",
        )
    with file.open("rb") as stream:
        head = stream.read(4)
    zipped = zipfile.is_zipfile(file)
    if not zipped and head.startswith(b"PK"):
        raise CheckpointError(
            f"{file}: is truncated", found=f"{file.stat().st_size} bytes", todo="copy or download it again"
        )
    if not zipped and not head.startswith(b"\x80"):
        raise CheckpointError(
            f"{file}: is not a torch file",
            expected="a .pt file that the GateSkip training code wrote",
            found=f"{file.stat().st_size} bytes that begin with {head!r}",
        )
    try:
        raw = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise CheckpointError(
                f"{file}: is not a complete torch file, or of another kind", found=_unsupported(error)
            ) from error
        raise CheckpointError(
            f"{file}: contains more than tensors, and unpickling it would run code",
            expected="a state dict (torch.load with weights_only=True)",
            found=refused.group(1),
            todo="save it again where it was trained: torch.save(model.state_dict(), FILE)",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{file}: is not a complete torch file", found=_first_line(error), todo="copy or download it again"
        ) from error
    if isinstance(raw, Mapping) and isinstance(raw.get("state_dict"), Mapping):
        raw = raw["state_dict"]
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(key, str) for key in raw):
        raise CheckpointError(
            f"{file}: is not a state dict",
            expected='tensors by name, or a dict with "state_dict"',
            found="nothing" if isinstance(raw, Mapping) and not raw else type(raw).__name__,
        )
    return raw


def _unsupported(error: Exception) -> str:
    """What torch's unpickler refused, without its advice to turn the check off."""
    found = re.search(r"Unsupported \w+:? \S+", str(error))
    return found.group(0) if found else "no readable pickle"


def _is_gates_only(raw: Mapping[str, Any]) -> bool:
    return all(_GATE_KEY.fullmatch(key) for key in raw)


def _gates_only(file: Path, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gate tensors of a checkpoint, from a dict `attn_{i}` / `mlp_{i}` -> gate state dict."""
    tensors = {}
    for key, state in raw.items():
        branch, layer = key.split("_")
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{file}: {key} is not a gate", expected="a state dict", found=type(state).__name__)
        for inner, value in state.items():
            name = _gate_name(file, f"{key}.{inner}", int(layer), branch, inner.split("."))
            tensors[name] = _tensor(file, f"{key}.{inner}", value)
    return tensors


def _full(file: Path, raw: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """A whole state dict under a checkpoint's names, and the keys that a checkpoint does not store."""
    tensors: dict[str, Tensor] = {}
    left_out = []
    strip = any(key.startswith("model.model.") for key in raw)
    for key, value in raw.items():
        tensor = _tensor(file, key, value)
        name = _full_name(file, key, key.removeprefix("model.") if strip else key)
        if name is None:
            left_out.append(key)
        elif name in tensors:
            raise CheckpointError(f"{file}: has two tensors for {name}", found=key)
        else:
            tensors[name] = tensor
    return tensors, left_out


def _refuse_lora(file: Path, raw: Mapping[str, Any]) -> None:
    for key in raw:
        if is_adapter(key):
            raise CheckpointError(
                f"{file}: is a LoRA checkpoint, whose weights are not merged",
                found=key,
                todo="merge the adapters first (PEFT: merge_and_unload), then save the state dict again",
            )


def _full_name(file: Path, key: str, stripped: str) -> str | None:
    """The checkpoint's name for a key; None for what a checkpoint does not store."""
    parts = stripped.split(".")
    if parts[-2:] == ["rotary_emb", "inv_freq"]:
        return None  # a table that older versions of transformers saved; it follows from the configuration
    if len(parts) > 5 and parts[:2] == ["model", "layers"] and parts[3] in _MODULES:
        if parts[4] == "module":
            return ".".join((*parts[:4], *parts[5:]))
        if parts[4] == "gate":
            return _gate_name(file, key, int(parts[2]), _MODULES[parts[3]], parts[5:])
    return stripped


def _gate_name(file: Path, key: str, layer: int, branch: str, inner: list[str]) -> str:
    """The checkpoint's name for `gate.weight` and `gate.bias` of a gate."""
    if len(inner) == 3 and inner[0] == "gate" and inner[1].isdigit():
        raise CheckpointError(
            f"{file}: has two-layer gates, which gated checkpoints cannot store",
            expected="linear gates: gate.weight and gate.bias",
            found=key,
            todo="train with linear gates",
        )
    if inner not in (["gate", "weight"], ["gate", "bias"]):
        raise CheckpointError(
            f"{file}: has a gate tensor with an unknown name", expected="gate.weight and gate.bias", found=key
        )
    return f"model.layers.{layer}.{branch}_gate.{inner[1]}"


def _tensor(file: Path, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CheckpointError(
            f"{file}: {key} is not a tensor",
            expected="a state dict: tensors by name",
            found=type(value).__name__,
        )
    if not value.is_floating_point():
        raise CheckpointError(f"{file}: {key} has the wrong type", expected="floats", found=str(value.dtype))
    return value.detach()


def _gate_config(file: Path, tensors: Mapping[str, Tensor], config: ModelConfig, gate_input: GateInput) -> GateConfig:
    """The gates' configuration, derived from their names and shapes."""
    weights = [name for name in tensors if is_gate(name) and name.endswith(".weight")]
    if not weights:
        raise CheckpointError(
            f"{file}: has no gates",
            expected="keys such as model.layers.0.self_attn.gate.gate.weight, or attn_0",
            found=", ".join(list(tensors)[:3]),
            todo="is it a GateSkip checkpoint? a dense model needs no conversion",
        )
    shape = tuple(tensors[weights[0]].shape)
    H = config.hidden_size
    if shape not in ((H, H), (1, H)):
        raise CheckpointError(
            f"{file}: {weights[0]} has the wrong shape",
            expected=f"[{H}, {H}] (vector) or [1, {H}] (scalar)",
            found=str(list(shape)),
            todo="is --base the model that was trained?",
        )
    found = {name.split(".")[3].removesuffix("_gate") for name in weights}
    branches = tuple(branch for branch in BRANCHES if branch in found)
    return GateConfig("scalar" if shape[0] == 1 else "vector", gate_input, branches)


def _check_tie(file: Path, tensors: Mapping[str, Tensor]) -> None:
    if _EMBEDDING in tensors and not torch.equal(tensors[_TIED_HEAD], tensors[_EMBEDDING]):
        raise CheckpointError(
            f"{file}: lm_head.weight differs from the embedding",
            expected="equal tensors: the base model ties them",
            todo='set "tie_word_embeddings": false in the base\'s config.json, if they were trained separately',
        )


def _check(
    file: Path,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    base: Checkpoint,
    *,
    whole: bool,
) -> None:
    """Check that the file has the expected tensors and no others, and that all are finite."""
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise CheckpointError(
            f"{file}: has {len(unknown)} tensors that a {base.config.family} model with "
            f"{base.config.num_layers} layers does not have",
            found=", ".join(unknown[:3]),
            todo="is --base the model that was trained?",
        )
    missing = [name for name in expected if name not in tensors and (whole or rule_module_kind(name))]
    if missing:
        gates = all(rule_module_kind(name) for name in missing)
        raise CheckpointError(
            f"{file}: {f'{rule_module_kind(missing[0])}s are' if gates else 'the model is'} incomplete",
            expected=", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            found="no such tensors",
            todo="in a gated checkpoint every layer has gates" if is_gate(missing[0]) else None,
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{file}: {name} has the wrong shape",
                expected=str(list(expected[name])),
                found=str(list(tensor.shape)),
                todo="is --base the model that was trained?",
            )
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{file}: {name} contains NaN or infinity", todo="the training run diverged: use an earlier file"
            )


def write_config(base: Checkpoint, section: Mapping[str, Any], types: set[torch.dtype], path: Path) -> None:
    """Write the base's `config.json` with the given `gsx` section added.

    Args: types: of the weights; recorded if it is a single one.
    """
    raw = base.config_values()
    if len(types) == 1:
        key = "torch_dtype" if "torch_dtype" in raw else "dtype"
        raw[key] = str(next(iter(types))).removeprefix("torch.")
    raw["gsx"] = {**(raw.get("gsx") or {}), **section}
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
