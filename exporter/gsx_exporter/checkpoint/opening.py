"""Opening a checkpoint: everything in its directory is read as transformers reads it, and checked, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gsx_exporter.checkpoint.adapter import Adapter, MergedTensors, read_adapter
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.checks import check_tensors
from gsx_exporter.checkpoint.experts import Piece, fused_tensors, named_by_qwen, pieces_of, spelling_of
from gsx_exporter.checkpoint.files import decoder_names, sha256_of_files, weight_files
from gsx_exporter.checkpoint.folder import locate
from gsx_exporter.checkpoint.generation import read_text_ends
from gsx_exporter.checkpoint.gguf_file import GgufFile, find_gguf, read_gguf
from gsx_exporter.checkpoint.hf_config import config_from, read_config
from gsx_exporter.checkpoint.layer_pairs import as_whole_layers
from gsx_exporter.checkpoint.layouts.layout import DequantizedTensors, Layout
from gsx_exporter.checkpoint.names import ADAPTER, CONFIG
from gsx_exporter.checkpoint.skeleton import check_skeleton
from gsx_exporter.checkpoint.stored import StoredTensors
from gsx_exporter.checkpoint.tensors import EMBEDDING, HEAD, expected_tensors
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError
from gsx_exporter.families import FAMILIES


def open_checkpoint(model: str | Path, context: int | None = None) -> Checkpoint:
    """Open a model directory or a hub id, and check that it is complete and of a supported family.

    Args:
        model: a local directory, or a hub id such as "org/name" (needs a connection the first time): a model, or a LoRA
            adapter, which is merged into its base while that is read.
        context: the longest text, in tokens; None for what the model was made for, with LongRoPE for what its short
            factors were made for.
    Raises:
        CheckpointError: the checkpoint is missing, empty, truncated or damaged; it is quantized in a way that is not
            read, or is something else (an ONNX model); it has only pickled weights or an unsupported family; a field of
            its configuration has no meaning; a tensor is missing or has the wrong shape; its gates are incomplete; an
            adapter does not fit its base.
        UsageError: the model was not made for this context.
    """
    directory = locate(str(model))
    gguf = find_gguf(directory)
    if gguf is not None:
        checkpoint = _of_gguf(read_gguf(gguf), str(model))
    elif not (directory / ADAPTER).is_file():
        checkpoint = _read(directory, str(model))
    else:
        adapter = read_adapter(directory)
        checkpoint = _with_adapter(_read(_base_of(adapter), str(model), adapter), adapter)
    if context is not None:
        checkpoint.config = checkpoint.config.of_context(context)
    if checkpoint.config.switches:
        checkpoint.notes.append(
            f"its LongRoPE has short factors, for texts of up to {checkpoint.config.max_positions:,} tokens, and long "
            f"ones: the short ones are used; --context {checkpoint.config.most_positions} takes the long ones"
        )
    check_tensors(checkpoint)
    check_skeleton(checkpoint)
    return checkpoint


def _read(directory: Path, source: str, adapter: Adapter | None = None) -> Checkpoint:
    """A model as it is stored. Args: adapter: it may have a section `gsx` of its own."""
    read = read_config(directory, adapter.section if adapter is not None else None)
    config = ModelConfig.from_hf(read.hf)
    files = weight_files(directory, getattr(read.hf, "transformers_weights", None))
    names = decoder_names(files, source, of_whole=read.whole is not None)
    names = named_by_qwen(names, spelling_of(config))
    if config.loops is not None:
        names = as_whole_layers(names)
    places = {name: (files[stored], stored) for name, stored in names.items()}
    checkpoint = Checkpoint(
        directory, source, read.hf, config, StoredTensors(places), [], adapter, read.own, read.whole, read.layout
    )
    _settle_head(checkpoint, places)
    checkpoint.stored = _with_single_experts(checkpoint, places)
    if read.layout is not None:
        _dequantize(checkpoint, read.layout)
    ends = read_text_ends(checkpoint.generation_directory, checkpoint.config_values(), config)
    checkpoint.config = ends.of(checkpoint.config)
    checkpoint.notes += ends.notes
    if FAMILIES[config.family].described:
        checkpoint.notes.append(
            f"transformers has no {config.family}: the reference is written from its published description"
        )
    if read.whole is not None:
        checkpoint.notes.append(f"this is the text part of a multimodal model ({read.whole}): the rest is left out")
    if getattr(read.hf, "auto_map", None):
        checkpoint.notes.append(f"{CONFIG} names code of its own (auto_map), which is never run")
    return checkpoint


def _dequantize(checkpoint: Checkpoint, layout: Layout) -> None:
    """Read quantized weights as floats."""
    if isinstance(checkpoint.stored, StoredTensors) and checkpoint.stored.pieces:
        _refuse_experts(checkpoint, f"in one quantized tensor for each layer ({layout.method})")
    floats = DequantizedTensors(checkpoint.stored, layout, checkpoint.source)
    floats.check()
    checkpoint.stored = floats
    checkpoint.notes.append(
        f"the weights are quantized already ({layout.method}): they are read as the floats that they stand for, and "
        "activations are in full precision"
    )
    if checkpoint.config.tied_head and HEAD in floats.names:
        _untie(checkpoint)


def _refuse_experts(checkpoint: Checkpoint, how: str) -> None:
    """Refuse forms of a model in which routed experts are not read. Args: how: they are stored."""
    if checkpoint.config.experts is not None:
        raise CheckpointError(
            f"{checkpoint.source}: has routed experts, which are not read where they are {how}",
            expected="float weights in safetensors, or quantized ones with each expert by itself",
            todo="export the original checkpoint",
        )


def _of_gguf(file: GgufFile, source: str) -> Checkpoint:
    """A model in a GGUF file."""
    directory = file.path.parent
    hf_config = config_from(directory, file.values)
    config = ModelConfig.from_hf(hf_config)
    checkpoint = Checkpoint(directory, source, hf_config, config, file.tensors, own_config=file.values, gguf=file)
    _refuse_experts(checkpoint, "in a GGUF file")
    ends = read_text_ends(directory, file.values, config)
    checkpoint.config = ends.of(config)
    checkpoint.notes += ends.notes
    checkpoint.notes.append(f"the weights are those of a GGUF file ({', '.join(file.tensors.kinds)}), read as floats")
    return checkpoint


def _base_of(adapter: Adapter) -> Path:
    """The directory of an adapter's base."""
    todo = f"correct base_model_name_or_path of {ADAPTER}: a directory or a hub id"
    try:
        directory = locate(adapter.base, adapter.revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"{adapter.directory}: the base of the adapter cannot be opened", found=error.what, todo=todo
        ) from error
    if directory.is_file():
        raise CheckpointError(
            f"{adapter.directory}: the base of the adapter is a GGUF file", found=str(directory), todo=todo
        )
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{adapter.directory}: the base of the adapter is an adapter itself, {adapter.base}",
            todo="merge that one into its own base first (PEFT: merge_and_unload)",
        )
    return directory


def _with_adapter(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The model with the adapter merged into it."""
    if checkpoint.whole is not None:
        raise CheckpointError(
            f"{adapter.directory}: the adapter belongs to a multimodal model ({checkpoint.whole})",
            expected="an adapter of a model that has only text",
            found=f"the base {adapter.base}",
            todo="merge it by PEFT (merge_and_unload), save the model and export that",
        )
    wanted = adapter.base_sha256
    if wanted is not None and (found := sha256_of_files(checkpoint.stored.files)) != wanted:
        raise CheckpointError(
            f"{adapter.directory}: the adapter was trained on another base than {adapter.base}",
            expected=f"weights with sha256 {wanted[:12]}..., as {ADAPTER} records",
            found=f"{found[:12]}...",
            todo="name the base that it was trained on in base_model_name_or_path",
        )
    merged = MergedTensors(checkpoint.stored, adapter, checkpoint.config.tied_head)
    checkpoint.stored = merged
    if merged.unties:
        checkpoint.config = replace(checkpoint.config, tied_head=False)
        checkpoint.notes.append(
            "the adapter changes embedding or head, which are one table in its base: they are two tables now"
        )
    merged.check(expected_tensors(checkpoint.config))
    kind = "DoRA" if adapter.settings.resized else "LoRA"
    checkpoint.notes.append(f"a {kind} adapter is merged into its base, {adapter.base}")
    return checkpoint


def _settle_head(checkpoint: Checkpoint, places: dict[str, tuple[Path, str]]) -> None:
    """Whether embedding and head are one table: as transformers decides it, by the flag and by what is stored.

    With the flag set and both tables stored, they are one only if they are equal: a head that was trained separately
    is often saved beside a flag that nobody changed. If only one is stored, it serves as both.
    """
    if not checkpoint.config.tied_head or HEAD not in places:
        return
    if EMBEDDING not in places:
        places[EMBEDDING] = places[HEAD]
    elif not _equal(checkpoint, EMBEDDING, HEAD):
        _untie(checkpoint)
        return
    del places[HEAD]


def _untie(checkpoint: Checkpoint) -> None:
    checkpoint.config = replace(checkpoint.config, tied_head=False)
    checkpoint.notes.append(
        f"{CONFIG} says that embedding and head are one table, but two different ones are stored: both are used"
    )


def _with_single_experts(checkpoint: Checkpoint, places: dict[str, tuple[Path, str]]) -> StoredTensors:
    """Give the experts of tensors that hold all those of a layer their names: they are read one at a time."""
    config = checkpoint.config
    fused = fused_tensors(config, places)
    for name, shape in fused.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.source}: {name} has the wrong shape",
                expected=f"{list(shape)}: experts, outputs, inputs",
                found=str(list(checkpoint.shape(name))),
            )
    stored = {name: places[name][1] for name in fused}
    found: dict[str, Piece] = {}
    for name, pieces in pieces_of(stored, config.experts).items() if config.experts else ():
        place = places.pop(name)
        for piece in pieces:
            if piece in places:
                raise CheckpointError(f"{checkpoint.source}: has two tensors for {piece}", found=f"it, and {name}")
        places |= dict.fromkeys(pieces, place)
        found |= pieces
    return StoredTensors(places, found)


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    first, second = checkpoint.tensor(one), checkpoint.tensor(other)
    return first.dtype == second.dtype and first.equal(second)
