"""Opening a checkpoint: everything in its directory is read as transformers reads it, and checked, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.checks import check_tensors
from gsx_exporter.checkpoint.experts import fused_tensors, named_by_qwen, pieces_of, spelling_of
from gsx_exporter.checkpoint.files import decoder_names, weight_files
from gsx_exporter.checkpoint.folder import locate
from gsx_exporter.checkpoint.generation import read_text_ends
from gsx_exporter.checkpoint.hf_config import read_config
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.skeleton import check_skeleton
from gsx_exporter.checkpoint.tensors import EMBEDDING, HEAD
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError


def open_checkpoint(model: str | Path, context: int | None = None) -> Checkpoint:
    """Open a model directory or a hub id, and check that it is complete and of a supported family.

    Args:
        model: a local directory, or a hub id such as "org/name" (needs a connection the first time).
        context: the longest text, in tokens; None for what the model was made for, with LongRoPE for what its short
            factors were made for.
    Raises:
        CheckpointError: the checkpoint is missing, empty, truncated, damaged or quantized; it is something else (an
            adapter, a GGUF file); it has only pickled weights or an unsupported family; a field of its configuration
            has no meaning; a tensor is missing or has the wrong shape; its gates are incomplete.
    """
    directory = locate(str(model))
    hf_config = read_config(directory)
    config = ModelConfig.from_hf(hf_config)
    if context is not None:
        config = config.of_context(context)
    ends = read_text_ends(directory, config)
    files = weight_files(directory, getattr(hf_config, "transformers_weights", None))
    names = decoder_names(files, str(model))
    names = named_by_qwen(names, spelling_of(config))
    by_name = {name: files[stored] for name, stored in names.items()}
    renamed = {name: stored for name, stored in names.items() if name != stored}
    checkpoint = Checkpoint(directory, str(model), hf_config, ends.of(config), by_name, renamed, notes=[*ends.notes])
    if getattr(hf_config, "auto_map", None):
        checkpoint.notes.append(f"{CONFIG} names code of its own (auto_map), which is never run")
    if config.switches:
        checkpoint.notes.append(
            f"its LongRoPE has short factors, for texts of up to {config.max_positions:,} tokens, and long ones: the "
            f"short ones are used; --context {config.most_positions} takes the long ones"
        )
    _settle_head(checkpoint)
    _settle_experts(checkpoint)
    check_tensors(checkpoint)
    check_skeleton(checkpoint)
    return checkpoint


def _settle_head(checkpoint: Checkpoint) -> None:
    """Whether embedding and head are one table: as transformers decides it, by the flag and by what is stored.

    With the flag set and both tables stored, they are one only if they are equal: a head that was trained separately
    is often saved beside a flag that nobody changed. If only one is stored, it serves as both.
    """
    files, renamed = checkpoint.files, checkpoint.renamed
    if not checkpoint.config.tied_head or HEAD not in files:
        return
    if EMBEDDING not in files:
        files[EMBEDDING], renamed[EMBEDDING] = files[HEAD], renamed.get(HEAD, HEAD)
    elif not _equal(checkpoint, EMBEDDING, HEAD):
        checkpoint.config = replace(checkpoint.config, tied_head=False)
        checkpoint.notes.append(
            f"{CONFIG} says that embedding and head are one table, but two different ones are stored: both are used"
        )
        return
    del files[HEAD]


def _settle_experts(checkpoint: Checkpoint) -> None:
    """Give the experts of tensors that hold all those of a layer their names: they are read one at a time."""
    config, files = checkpoint.config, checkpoint.files
    fused = fused_tensors(config, files)
    for name, shape in fused.items():
        if checkpoint.shape(name) != shape:
            raise CheckpointError(
                f"{checkpoint.source}: {name} has the wrong shape",
                expected=f"{list(shape)}: experts, outputs, inputs",
                found=str(list(checkpoint.shape(name))),
            )
    stored = {name: checkpoint.renamed.pop(name, name) for name in fused}
    for name, pieces in pieces_of(stored, config.experts).items() if config.experts else ():
        file = files.pop(name)
        for piece in pieces:
            if piece in files:
                raise CheckpointError(f"{checkpoint.source}: has two tensors for {piece}", found=f"it, and {name}")
        files |= dict.fromkeys(pieces, file)
        checkpoint.pieces |= pieces


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if checkpoint.shape(one) != checkpoint.shape(other):
        return False
    first, second = checkpoint.tensor(one), checkpoint.tensor(other)
    return first.dtype == second.dtype and first.equal(second)
