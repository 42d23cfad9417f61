"""From what the user names (a directory or a hub id) to a model directory, and what else a directory may be.

People give gsx what they have: an adapter, a quantized or converted model, the hub's cache. Each is called by its
name, with the way out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from gsx_engines.bundle.bundle import MANIFEST
from gsx_exporter.checkpoint.names import COMPANION_FILES, CONFIG, WEIGHTS, WEIGHTS_INDEX
from gsx_exporter.errors import CheckpointError

_ADAPTER = "adapter_config.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Files that give away what a directory without safetensors of transformers' layout is, and the way out.
_OTHERS = (
    ("*.gguf", "is a GGUF model", "export the original checkpoint: a GGUF file is quantized already"),
    ("genai_config.json", "is a model of ONNX Runtime GenAI", "export the checkpoint that it was made from"),
    ("*.onnx", "is an exported ONNX model", "export the checkpoint that it was made from"),
    ("*.engine", "is a built TensorRT engine", "export the checkpoint that it was made from"),
    ("consolidated*", "has its weights in the original layout of Meta or Mistral", "take the transformers version"),
    ("params.json", "has its weights in the original layout of Meta or Mistral", "take the transformers version"),
    ("tf_model.h5", "has TensorFlow weights", "save it from PyTorch (model.save_pretrained)"),
    ("flax_model.msgpack", "has Flax weights", "save it from PyTorch (model.save_pretrained)"),
    ("model_index.json", "is a pipeline of Diffusers, not a language model", None),
    ("modules.json", "is a model of Sentence Transformers", "it gives embeddings, and has no head that writes text"),
)
# Files that quantizers write beside config.json, without a quantization_config in it.
_QUANTIZER_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
# Ends of tensor names that only quantized weights have.
_QUANTIZED_PARTS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".scales": "MLX, GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_format": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
}


def locate(model: str) -> Path:
    """The directory of a model: as it is given, or from the hub's cache, downloaded the first time.

    Raises:
        CheckpointError: there is no such directory, or it is something else than a transformers checkpoint.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        _check_kind(directory)
        return directory
    if directory.is_file():
        raise CheckpointError(
            f"{model}: is a file", expected="a model directory or a hub id", todo=_way_out_of_a_file(directory.suffix)
        )
    if directory.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model}: no such directory", expected="a model directory or a hub id")
    return _download(model)


def without_weights(directory: Path) -> CheckpointError:
    """The refusal of a directory without weights in transformers' layout, which says what it is."""
    wanted = f"{WEIGHTS} or {WEIGHTS_INDEX}"
    if (directory / MANIFEST).is_file():
        return CheckpointError(
            f"{directory}: is a bundle, exported already",
            expected=f"a checkpoint, with {wanted}",
            todo="give the model that it was exported from; gsx inspect shows it",
        )
    _refuse_other_kinds(directory)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{directory}: has only pickled weights, and unpickling runs code",
            expected=WEIGHTS,
            found=", ".join(pickles[:3]),
            todo="save it as safetensors (model.save_pretrained), or use gsx convert for a GateSkip .pt",
        )
    shards = sorted(path.name for path in directory.glob("*.safetensors"))
    if shards:
        return CheckpointError(
            f"{directory}: has safetensors files, but neither of the names that transformers looks for",
            expected=wanted,
            found=", ".join(shards[:3]),
            todo="rename a single file; with several, download the index too, or save the model again",
        )
    return CheckpointError(f"{directory}: has no weights", expected=wanted, found=listing(directory))


def refuse_quantized(source: str | Path, found: str) -> NoReturn:
    """Refuse weights that are not floats."""
    raise CheckpointError(
        f"{source}: the checkpoint is already quantized",
        expected="float weights",
        found=found,
        todo="export the original checkpoint: gsx quantizes it itself",
    )


def check_not_quantized(directory: Path, raw: dict[str, Any]) -> None:
    """Refuse a quantized checkpoint by what its configuration files say.

    Args: raw: `config.json` as plain values.
    """
    for key in ("quantization_config", "compression_config"):
        if section := raw.get(key):
            method = section.get("quant_method") if isinstance(section, dict) else None
            refuse_quantized(directory / CONFIG, f"{method}" if method else f"a {key}")
    if raw.get("quantization"):
        refuse_quantized(directory / CONFIG, f"an MLX model, quantization {raw['quantization']!r}")
    for name, method in _QUANTIZER_FILES.items():
        if (directory / name).is_file():
            refuse_quantized(directory, f"{name}, as {method} writes it")


def quantized_by(name: str) -> str | None:
    """Which quantizers give a tensor such a name; None for the name of a float tensor."""
    return next((method for end, method in _QUANTIZED_PARTS.items() if name.endswith(end)), None)


def listing(directory: Path) -> str:
    """What a directory holds, shortened."""
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return "an empty directory"
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_kind(directory: Path) -> None:
    """Refuse a directory that is recognized as something else, before anything in it is read."""
    if (directory / _ADAPTER).is_file():
        _refuse_adapter(directory)
    if not (directory / CONFIG).is_file():
        snapshots = sorted(path for path in (directory / "snapshots").glob("*") if (path / CONFIG).is_file())
        if snapshots:
            raise CheckpointError(
                f"{directory}: is a folder of the hub's cache, which keeps the model one level down",
                todo=f"give {snapshots[-1]}, or the model's hub id",
            )
        _refuse_other_kinds(directory)


def _refuse_adapter(directory: Path) -> NoReturn:
    """A LoRA or other PEFT adapter.

    With a whole model beside it, transformers would load the adapter's base and add the adapter; which of the two is
    meant cannot be known.
    """
    try:
        raw = json.loads((directory / _ADAPTER).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raw = {}
    raw = raw if isinstance(raw, dict) else {}
    base, kind = raw.get("base_model_name_or_path") or "a base that it does not name", raw.get("peft_type") or "PEFT"
    whole = (directory / WEIGHTS).is_file() or (directory / WEIGHTS_INDEX).is_file()
    what = f"a whole model with a {kind} adapter beside it" if whole else f"a {kind} adapter, not a whole model"
    raise CheckpointError(
        f"{directory}: is {what}",
        expected="a model with all its weights",
        found=f"an adapter of {base}",
        todo=(
            f"remove {_ADAPTER} if the model already contains the adapter, else merge it first"
            if whole
            else "merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR)"
        ),
    )


def _refuse_other_kinds(directory: Path) -> None:
    for pattern, what, todo in _OTHERS:
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            raise CheckpointError(
                f"{directory}: {what}",
                expected=f"a checkpoint of transformers, with {CONFIG} and {WEIGHTS}",
                found=", ".join(found[:3]),
                todo=todo,
            )


def _way_out_of_a_file(suffix: str) -> str:
    if suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return "a pickled checkpoint is converted first: gsx convert FILE.pt -o DIR"
    if suffix == ".gguf":
        return "a GGUF file is quantized already: export the original checkpoint"
    return "give the directory that holds config.json and model.safetensors"


def _download(model: str) -> Path:
    """Download a model into the hub's own cache: only configuration, tokenizer and safetensors."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*COMPANION_FILES, _ADAPTER, *_QUANTIZER_FILES, "*.safetensors", WEIGHTS_INDEX]
    try:
        directory = Path(snapshot_download(model, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model}: neither a local directory nor a model that could be fetched from the hub",
            found=str(error).strip().splitlines()[0],
            todo="check the spelling and the connection, or give a local directory",
        ) from error
    _check_kind(directory)
    return directory
