"""RoPE as `config.json` states it: its kinds, which layers each applies to, and how far it extends the context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gsx_exporter.errors import CheckpointError
from gsx_exporter.families import Family
from gsx_exporter.section import finite, whole

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# What a family with one kind of RoPE calls it; others have one for each kind of attention.
ONLY_ROPE = "all"


def read_ropes(hf: Any, family: Family) -> dict[str, dict[str, Any]]:
    """The kinds of RoPE, checked, in order of first use."""
    given = dict(hf.rope_parameters or {})
    if not family.ropes_by_layer_type:
        return {ONLY_ROPE: _rope(given, family)}
    return {kind: _rope(dict(given.get(kind) or {}), family) for kind in dict.fromkeys(hf.layer_types)}


def _rope(rope: dict[str, Any], family: Family) -> dict[str, Any]:
    """The parameters of one kind of RoPE, checked."""
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KINDS:
        raise CheckpointError(
            "config.json: this kind of RoPE scaling is not supported",
            expected="one of " + ", ".join(ROPE_KINDS),
            found=repr(kind),
        )
    finite("rope_theta", rope.get("rope_theta"))
    if kind in ("linear", "dynamic"):  # the other kinds find a factor themselves where there is none
        finite("the factor of RoPE scaling", rope.get("factor"))
    part = rope.get("partial_rotary_factor", 1.0)
    if kind == "default" and not family.partial_rotary:
        return {**rope, "partial_rotary_factor": 1.0}  # transformers does not read the key either
    if part != 1.0 and not family.partial_rotary:
        raise CheckpointError(
            "config.json: a partial rotary embedding is not supported in this family",
            expected="partial_rotary_factor 1.0",
            found=str(part),
        )
    return rope


def rotary_kinds(hf: Any, family: Family, ropes: Mapping[str, Any]) -> tuple[str | None, ...]:
    """Per layer, its kind of RoPE; None for a layer without."""
    layers = hf.num_hidden_layers
    kinds = [ONLY_ROPE] * layers if ONLY_ROPE in ropes else list(hf.layer_types)
    if family.unrotated is None:
        return tuple(kinds)
    rotates = getattr(hf, family.unrotated)
    if not isinstance(rotates, list) or len(rotates) < layers:
        raise CheckpointError(
            f"config.json: {family.unrotated} does not say for every layer whether it has RoPE",
            expected=f"a list of {layers} or more numbers 0 and 1",
            found=repr(rotates),
        )
    return tuple(kind if rotated else None for kind, rotated in zip(kinds, rotates, strict=False))


def rotary_dim(head_dim: int, ropes: Mapping[str, Mapping[str, Any]]) -> int:
    """The part of a head that is rotated, as transformers counts it."""
    parts = {rope.get("partial_rotary_factor", 1.0) for rope in ropes.values()}
    part = parts.pop()
    finite("partial_rotary_factor", part)
    dim = int(head_dim * part)
    if parts or not 0 < dim <= head_dim or dim % 2:
        raise CheckpointError(
            "config.json: partial_rotary_factor gives no part of a head that RoPE can rotate",
            expected=f"one factor for all layers, which makes an even number of the head's {head_dim} elements",
            found=str(part),
        )
    return dim


def extended_context(positions: int, ropes: Mapping[str, Mapping[str, Any]]) -> int:
    """The number of positions that the model was made for.

    Scaled RoPE extends the context over `max_position_embeddings`, which model cards advise to leave as it is: to the
    factor times the original length (vLLM reads it so).
    """
    return max(_extended(positions, rope) for rope in ropes.values())


def switch_lengths(ropes: Mapping[str, Mapping[str, Any]]) -> list[int]:
    """The lengths of a text above which LongRoPE takes other factors."""
    found = [rope["original_max_position_embeddings"] for rope in ropes.values() if rope.get("rope_type") == "longrope"]
    for length in found:
        whole("original_max_position_embeddings", length, 2)
    return found


def _extended(positions: int, rope: Mapping[str, Any]) -> int:
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or not math.isfinite(factor):
        return positions
    original = rope.get("original_max_position_embeddings")
    return max(positions, int(factor * (original if isinstance(original, int) else positions)))
