"""Names of the graphs' inputs and outputs (docs/design.md, section 6), with shape and type: here once for every floor.

Letters: B sequences, S tokens of each in the call, P columns of the K/V cache before it, V vocabulary, H hidden size,
D head size, L layers. Floats have the graph's precision. The run-time inputs of keep rules are described in
`bundle/policy.py`. The C++ runtime has the same names in `engines/cpp/src/tensor_names.h`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

# Inputs.
INPUT_IDS = "input_ids"  # [B, S] int64
ATTENTION_MASK = "attention_mask"  # [B, P + S] int64: 1 for a token, 0 for padding
POSITION_IDS = "position_ids"  # [B, S] int64

# Output.
LOGITS = "logits"  # [B, S, V] float

# What `draft.onnx` gives and `verify.onnx` takes. Besides these, each state that a keep rule carries: `exit_state`.
EXIT_HIDDEN = "exit_hidden"  # [B, S, H] float
EXIT_KEY, EXIT_VALUE = "exit_key", "exit_value"  # [B, K/V heads, S, D] float; K/V policy `copy` only

# Constants of a `draft.onnx` that chooses among N of the V tokens: their rows of the head [H, N], and the place of each
# token among them [V] int64 (N: not there).
DRAFT_HEAD, DRAFT_PLACES = "draft_head", "draft.places"

# K and V of one cache: `past_key_values.3.key` goes in, `present.3.key` comes out. Layers have a cache each, of the
# same number; visits of a looped model may share some (`DecoderShape.cache_of`).
PAST = "past_key_values."  # [B, K/V heads, P, D] float
PRESENT = "present."  # [B, K/V heads, P + S, D] float

KeyOrValue = Literal["key", "value"]
KINDS: tuple[KeyOrValue, KeyOrValue] = ("key", "value")


def past(cache: int, kind: str) -> str:
    """Name of the input with a cache's K or V; kind: `key` or `value`."""
    return f"{PAST}{cache}.{kind}"


def present(cache: int, kind: str) -> str:
    """Name of the output with a cache's K or V; kind: `key` or `value`."""
    return f"{PRESENT}{cache}.{kind}"


def passing(cache: int, kind: str, visit: int) -> str:
    """Name of a cache's K or V during a visit whose own ones a later visit replaces: a value inside the graph."""
    return f"{PRESENT}{cache}.{kind}.visit.{visit}"


def past_of(caches: Iterable[int]) -> list[str]:
    """Names of the K/V inputs of some caches, K before V."""
    return [past(cache, kind) for cache in caches for kind in KINDS]


def present_after(name: str) -> str:
    """Name of the K/V output that continues a K/V input."""
    return PRESENT + name.removeprefix(PAST)


def cache_and_kind(name: str) -> tuple[int, str]:
    """The cache, and `key` or `value`, of a K/V input or output."""
    _, cache, kind = name.split(".")
    return int(cache), kind


def exit_state(name: str) -> str:
    """Name under which a state that a keep rule carries from layer to layer passes the exit: [B, S, 1] float32."""
    return f"exit_{name}"


def kept_index(layer: int, branch: str) -> str:
    """Name of the value inside a graph that has the numbers of the rows kept by a branch, [K] int64."""
    return f"layers.{layer}.{branch}.index"
