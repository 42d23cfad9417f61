"""What else a directory may be than a transformers checkpoint: people give gsx what they have.

An adapter, a converted model, the hub's cache: each is called by its name, with the way out.
"""

from __future__ import annotations

from pathlib import Path

from gsx_engines.bundle.bundle import MANIFEST
from gsx_exporter.checkpoint.gguf_file import find_gguf
from gsx_exporter.checkpoint.names import ADAPTER, CONFIG, WEIGHTS, WEIGHTS_INDEX
from gsx_exporter.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
# Files that give away what a directory without safetensors of transformers' layout is, and the way out.
_OTHERS = (
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


def check_kind(directory: Path) -> None:
    """Refuse a directory that is recognized as something else, before anything in it is read."""
    if (directory / ADAPTER).is_file():
        _check_adapter(directory)
    elif not (directory / CONFIG).is_file() and find_gguf(directory) is None:
        snapshots = sorted(path for path in (directory / "snapshots").glob("*") if (path / CONFIG).is_file())
        if snapshots:
            raise CheckpointError(
                f"{directory}: is a folder of the hub's cache, which keeps the model one level down",
                todo=f"give {snapshots[-1]}, or the model's hub id",
            )
        _refuse_other_kinds(directory)


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
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLES)
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


def listing(directory: Path) -> str:
    """What a directory holds, shortened."""
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return "an empty directory"
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _check_adapter(directory: Path) -> None:
    """Refuse an adapter with a whole model beside it.

    transformers would load the adapter's base and add the adapter; which of the two models is meant cannot be known.
    """
    if (directory / WEIGHTS).is_file() or (directory / WEIGHTS_INDEX).is_file():
        raise CheckpointError(
            f"{directory}: is a whole model with an adapter beside it",
            expected="one of them",
            found=", ".join(name for name in (WEIGHTS, WEIGHTS_INDEX, ADAPTER) if (directory / name).is_file()),
            todo=f"remove {ADAPTER} if the model contains the adapter, else keep that in a directory of its own",
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
