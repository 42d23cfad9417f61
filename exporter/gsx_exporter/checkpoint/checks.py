"""Checks of the stored tensors against the configuration, before any work."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from gsx_exporter.checkpoint.experts import expert_number, spelling_of, stored_name
from gsx_exporter.checkpoint.quantized import quantized_by, refuse_quantized
from gsx_exporter.checkpoint.tensors import EMBEDDING, HEAD, expected_tensors, is_adapter, rule_module_kind
from gsx_exporter.errors import CheckpointError

if TYPE_CHECKING:
    from gsx_exporter.checkpoint.checkpoint import Checkpoint

# Float types, as safetensors writes them.
_FLOATS = ("F16", "BF16", "F32", "F64")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# Norms, layers and heads of exits, as Balcony's code names them.
_EXIT_MODULES = "model.exit_modules."


def check_tensors(checkpoint: Checkpoint) -> None:
    """Check that every expected tensor exists and has its shape, and that gates and routers are complete and finite.

    Raises:
        CheckpointError: the first thing that is wrong.
    """
    _check_kinds(checkpoint)
    _check_depth(checkpoint)
    _check_experts(checkpoint)
    _check_exits(checkpoint)
    expected = expected_tensors(checkpoint.config)
    _check_stray(checkpoint, expected)
    for name, shape in expected.items():
        if name not in checkpoint.stored.names:
            raise _missing(checkpoint, name)
        found = checkpoint.shape(name)
        if found != shape:
            raise CheckpointError(
                f"{checkpoint.source}: {name} has the wrong shape",
                expected=str(list(shape)),
                found=str(list(found)),
                todo=None if expert_number(name) is None else "all experts of a model must have one shape",
            )
        if checkpoint.stored_type(name) not in _FLOATS:
            refuse_quantized(checkpoint.source, f"{name} in {checkpoint.stored_type(name)}")
    for name in expected:
        part = rule_module_kind(name)
        if part and not bool(checkpoint.tensor(name).isfinite().all()):
            raise CheckpointError(
                f"{checkpoint.source}: {name} contains NaN or infinity",
                expected=f"finite {part}s",
                todo="the training run diverged: use an earlier checkpoint",
            )


def _missing(checkpoint: Checkpoint, name: str) -> CheckpointError:
    """The refusal of a checkpoint that lacks a tensor: what is nearest to it, and what that may mean."""
    part = rule_module_kind(name)
    unknown = set(checkpoint.names) - set(expected_tensors(checkpoint.config))
    near = difflib.get_close_matches(name, sorted(unknown), n=1, cutoff=0.8)
    todo = f"the checkpoint does not fit its config.json, {checkpoint.config.stored_layers} layers of its family"
    if part:
        todo = f"config.json promises {part}s in the section gsx: train them, or remove the entry"
    elif name == HEAD:
        todo = (
            "if the model uses its embedding as head, set tie_word_embeddings to true; an embedding model has no head"
        )
    elif name == EMBEDDING:
        todo = "save the whole model again (model.save_pretrained)"
    return CheckpointError(
        f"{checkpoint.source}: {f'{part}s are incomplete' if part else 'a tensor is missing'}",
        expected=stored_name(name, spelling_of(checkpoint.config)),
        found="no such tensor" + (f"; the nearest name that gsx does not know is {near[0]}" if near else ""),
        todo=todo,
    )


def _check_kinds(checkpoint: Checkpoint) -> None:
    """Refuse what the names give away: quantized weights and unmerged adapters."""
    for name in checkpoint.names:
        if method := quantized_by(name):
            refuse_quantized(checkpoint.source, f"{name}, as {method} stores it")
        if is_adapter(name):
            raise CheckpointError(
                f"{checkpoint.source}: has LoRA weights that are not merged",
                found=name,
                todo="merge the adapter first (PEFT: merge_and_unload), then save the model again",
            )


def _check_depth(checkpoint: Checkpoint) -> None:
    """Refuse a configuration with more layers than are stored, before a loop over them."""
    stored = {int(match[1]) for name in checkpoint.names if (match := _LAYER.match(name))}
    layers = checkpoint.config.stored_layers
    if layers > len(stored):
        raise CheckpointError(
            f"{checkpoint.source}: config.json has more layers than the weights",
            expected=f"num_hidden_layers {layers}",
            found=f"{len(stored)} layers" if stored else f"no layers; {checkpoint.names[0]} is the first tensor",
            todo="the configuration and the weights are not of the same model",
        )


def _check_experts(checkpoint: Checkpoint) -> None:
    """Refuse weights with more experts than the configuration says, of which transformers would make another model."""
    experts = checkpoint.config.experts
    numbers = {number: name for name in checkpoint.names if (number := expert_number(name)) is not None}
    if experts is not None and numbers and max(numbers) >= experts.count:
        raise CheckpointError(
            f"{checkpoint.source}: has more experts than config.json says",
            expected=f"{experts.count} experts in a layer",
            found=numbers[max(numbers)],
            todo="the configuration and the weights are not of the same model",
        )


def _check_exits(checkpoint: Checkpoint) -> None:
    """Refuse exits that would be run without their own norms and layers."""
    own = [name for name in checkpoint.names if name.startswith(_EXIT_MODULES)]
    if own and getattr(checkpoint.hf_config, "exit_layer_indices", None):
        raise CheckpointError(
            f"{checkpoint.source}: its exits have norms or layers of their own, which gsx does not read",
            expected="exits that read the model's final norm and head",
            found=f"{len(own)} such tensors, {own[0]} first",
            todo="the whole model does not need them: remove exit_layer_indices from config.json to export it",
        )


def _check_stray(checkpoint: Checkpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse modules of keep rules that the section `gsx` does not mention."""
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
