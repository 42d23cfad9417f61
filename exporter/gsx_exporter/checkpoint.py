"""Checkpoints on disk: finding, checking and reading a Hugging Face model directory.

Weights are read only from safetensors: no pickle, no remote code. Tensors are read one at a time from the mapped
file, so a model larger than memory can still be exported. Gate tensors and the `"gsx"` section are described in
docs/design.md, section 5.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from gsx_engines.bundle.bundle import MANIFEST
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# Files that a bundle copies from the checkpoint, so that it can be run without it.
COMPANION_FILES = (
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass
class Checkpoint:
    """A model directory, checked and open for reading.

    Args:
        directory: where it is stored.
        source: the name that the user gave (a path or a hub id).
        hf_config: the transformers configuration object.
        config: the part of it that the exporter needs.
        files: tensor name -> file that holds it.
    """

    directory: Path
    source: str
    hf_config: Any
    config: ModelConfig
    files: dict[str, Path]
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; only the header is read."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def stored_type(self, name: str) -> str:
        """Type of a tensor as safetensors writes it ("F32", "BF16"); only the header is read."""
        return str(self._handle(name).get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored type.

        Raises:
            CheckpointError: the checkpoint has no tensor of this name.
        """
        return self._handle(name).get_tensor(name)

    def weight_bytes(self) -> int:
        """Bytes that all tensors would take as 32-bit floats."""
        total = 0
        for name in self.files:
            count = 1
            for size in self.shape(name):
                count *= size
            total += 4 * count
        return total

    def weights_sha256(self) -> str:
        """Hash over the bytes of the weight files, in the order of their names."""
        digest = hashlib.sha256()
        for path in sorted(set(self.files.values())):
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        return digest.hexdigest()

    def companions(self) -> Iterator[Path]:
        """The configuration and tokenizer files that the model has."""
        for name in COMPANION_FILES:
            path = self.directory / name
            if path.is_file():
                yield path

    def _handle(self, name: str) -> Any:
        path = self.files.get(name)
        if path is None:
            raise CheckpointError(
                f"{self.source}: the weights have no tensor {name}",
                expected=f"a {self.config.family} model with {self.config.num_layers} layers",
                todo="the checkpoint does not fit its config.json",
            )
        if path not in self._open:
            self._open[path] = _open_safetensors(path)
        return self._open[path]


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open a model directory or a hub id, and check that it is complete and of a supported family.

    Args:
        model: a local directory, or a hub id such as "org/name" (needs a connection the first time).
    Raises:
        CheckpointError: the checkpoint is missing, empty, truncated or damaged; it has only pickled weights or an
            unsupported family; a tensor is missing or has the wrong shape; its gates are incomplete.
    """
    directory = _locate(str(model))
    hf_config = read_config(directory)
    config = ModelConfig.from_hf(hf_config)
    checkpoint = Checkpoint(directory, str(model), hf_config, config, _index(directory))
    _check_tensors(checkpoint)
    return checkpoint


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint with this configuration must have.

    Linear weights are [out, in], as in torch.
    """
    H, F = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, H)}
    for i in range(config.num_layers):
        p = f"model.layers.{i}."
        for name, out, width, bias in (
            ("self_attn.q_proj", q, H, config.qkv_bias),
            ("self_attn.k_proj", kv, H, config.qkv_bias),
            ("self_attn.v_proj", kv, H, config.qkv_bias),
            ("self_attn.o_proj", H, q, config.o_bias),
            ("mlp.gate_proj", F, H, config.mlp_bias),
            ("mlp.up_proj", F, H, config.mlp_bias),
            ("mlp.down_proj", H, F, config.mlp_bias),
        ):
            shapes[f"{p}{name}.weight"] = (out, width)
            if bias:
                shapes[f"{p}{name}.bias"] = (out,)
        shapes[p + "input_layernorm.weight"] = (H,)
        shapes[p + "post_attention_layernorm.weight"] = (H,)
        if config.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[p + "self_attn.k_norm.weight"] = (config.head_dim,)
        if config.gate:
            rows = H if config.gate.kind == "vector" else 1
            for branch in config.gate.branches:
                shapes[f"{p}{branch}_gate.weight"] = (rows, H)
                shapes[f"{p}{branch}_gate.bias"] = (rows,)
        if i + 1 in config.exit_classifiers:
            shapes[f"{p}{EXIT_CLASSIFIER}.weight"] = (1, H)
            shapes[f"{p}{EXIT_CLASSIFIER}.bias"] = (1,)
        if config.router and i in config.router.routed(config.num_layers):
            shapes |= {p + name: shape for name, shape in config.router.shapes(H).items()}
    shapes["model.norm.weight"] = (H,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, H)
    return shapes


# Float types, as safetensors writes them.
_FLOATS = ("F16", "BF16", "F32", "F64")
# After a layer: predicts whether the layers above would still change the model's answer (CALM).
EXIT_CLASSIFIER = "exit_classifier"
# Modules of a layer that belong to a keep rule, not to the plain model, and what messages call them.
_RULE_MODULES = {
    EXIT_CLASSIFIER: "exit classifier",
    **dict.fromkeys(("attn_gate", "mlp_gate"), "gate"),
    **{f"{prefix}router{suffix}": "router" for prefix in ("", "attn_", "mlp_") for suffix in ("", "_predictor")},
    "mlp_adapter": "router",
}


def is_gate(name: str) -> bool:
    """Whether a tensor belongs to a gate, by its name."""
    return rule_module_kind(name) == "gate"


def rule_module_kind(name: str) -> str | None:
    """Which module of a keep rule a tensor belongs to, by its name: "gate", "router" or "exit classifier".

    None for tensors of the model itself.
    """
    return next((_RULE_MODULES[part] for part in name.split(".") if part in _RULE_MODULES), None)


def _locate(model: str) -> Path:
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory
    if directory.is_file():
        if directory.suffix in (".pt", ".pth", ".bin", ".ckpt"):
            todo = "a pickled checkpoint is converted first: gsx convert FILE.pt -o DIR"
        else:
            todo = "give the directory that holds config.json and model.safetensors"
        raise CheckpointError(f"{model}: is a file", expected="a model directory or a hub id", todo=todo)
    if directory.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such directory", expected="a model directory or a hub id")
    return _download(model)


def _download(model: str) -> Path:
    """Download a model into the hub's own cache: only configuration, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*COMPANION_FILES, "*.safetensors", WEIGHTS_INDEX]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: neither a local directory nor a model that could be fetched from the hub",
            found=str(error).strip().splitlines()[0],
            todo="check the spelling and the connection, or give a local directory",
        ) from error


def read_config(directory: Path) -> Any:
    """The transformers configuration of a model directory or a bundle.

    Raises:
        CheckpointError: there is no configuration, it is unreadable, or its family is not supported.
    """
    from transformers import AutoConfig

    path = directory / CONFIG
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no {CONFIG}", expected="a Hugging Face model directory", found=_listing(directory)
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is not readable JSON", found=str(error)) from error
    if not isinstance(raw, dict) or "model_type" not in raw:
        raise CheckpointError(f"{path}: has no model_type", todo="is this a Hugging Face model directory?")
    from gsx_exporter.config import FAMILIES

    if raw["model_type"] not in FAMILIES:
        raise CheckpointError(
            f"{path}: model_type {raw['model_type']!r} is not supported",
            expected="one of " + ", ".join(FAMILIES),
            todo="docs/add-a-family.md explains how to add one",
        )
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise _already_quantized(path, method or "a quantization_config")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # transformers raises many types of error here, all about this one file
        raise CheckpointError(
            f"{path}: transformers cannot read it", found=str(error).strip().splitlines()[0]
        ) from error


def _index(directory: Path) -> dict[str, Path]:
    """Tensor name -> file. Only headers are read, which also finds truncated files."""
    index = directory / WEIGHTS_INDEX
    single = directory / WEIGHTS
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{index}: is not a safetensors index", found=str(error)) from error
        files = {}
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name:
                raise CheckpointError(f"{index}: names a file outside the model directory", found=name)
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory}: a shard of the weights is missing", expected=name)
        stored = {name: set(_open_safetensors(directory / name).keys()) for name in set(weight_map.values())}
        for tensor, name in weight_map.items():
            if tensor not in stored[name]:
                raise CheckpointError(f"{directory / name}: lacks a tensor that the index promises", expected=tensor)
            files[tensor] = directory / name
        return files
    if single.is_file():
        return dict.fromkeys(_open_safetensors(single).keys(), single)
    if (directory / MANIFEST).is_file():
        raise CheckpointError(
            f"{directory}: is a bundle, exported already",
            expected=f"a checkpoint, with {WEIGHTS} or {WEIGHTS_INDEX}",
            todo="give the model that it was exported from; gsx inspect shows it",
        )
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory}: has only pickled weights, and unpickling runs code",
            expected=WEIGHTS,
            found=", ".join(pickles[:3]),
            todo="save it as safetensors (model.save_pretrained), or use gsx convert for a GateSkip .pt",
        )
    raise CheckpointError(
        f"{directory}: has no weights", expected=f"{WEIGHTS} or {WEIGHTS_INDEX}", found=_listing(directory)
    )


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: is not a complete safetensors file",
            found=f"{path.stat().st_size} bytes, {error}",
            todo="copy or download it again",
        ) from error


def _already_quantized(where: str | Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the checkpoint is already quantized",
        expected="float weights",
        found=found,
        todo="export the original checkpoint: gsx quantizes it itself",
    )


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Check that every expected tensor exists and has its shape, and that gates and routers are complete and finite."""
    config = checkpoint.config
    expected = expected_tensors(config)
    for kind, todo in (
        ("gate", '{"gsx": {"gate": {"kind": ..., "branches": [...]}}}'),
        ("router", '{"gsx": {"router": {...}}}, as docs/routers.md shows it for the method,'),
        ("exit classifier", '{"gsx": {"exit_classifiers": [...]}} with the depths'),
    ):
        stray = [n for n in checkpoint.names if rule_module_kind(n) == kind and n not in expected]
        if stray:
            raise CheckpointError(
                f"{checkpoint.source}: has {kind}s that config.json does not mention",
                found=f"{len(stray)} such tensors, {stray[0]} first",
                todo=f"add {todo} to config.json (docs/checkpoints.md)",
            )
    for name, shape in expected.items():
        part = rule_module_kind(name)
        if name not in checkpoint.files:
            what = f"{part}s are incomplete" if part else "a tensor is missing"
            raise CheckpointError(f"{checkpoint.source}: {what}", expected=name, found="no such tensor")
        found = checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.source}: {name} has the wrong shape", expected=str(list(shape)), found=str(list(found))
            )
        if checkpoint.stored_type(name) not in _FLOATS:
            raise _already_quantized(checkpoint.source, f"{name} in {checkpoint.stored_type(name)}")
    for name in expected:
        part = rule_module_kind(name)
        if part and not bool(checkpoint.tensor(name).isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.source}: {name} contains NaN or infinity",
                expected=f"finite {part}s",
                todo="the training run diverged: use an earlier checkpoint",
            )


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, or of a directory of them, whatever the model is.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    files = _index(path) if path.is_dir() else dict.fromkeys(_open_safetensors(path).keys(), path)
    handles = {file: _open_safetensors(file) for file in set(files.values())}
    return {name: handles[file].get_tensor(name) for name, file in files.items()}


def _listing(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return "an empty directory"
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
