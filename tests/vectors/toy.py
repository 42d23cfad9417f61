"""A toy model in integers, with the interface of a TensorRT engine (`gsx_engines.runners.tensorrt.Engine`).

Its arithmetic is that of engines/cpp/tests/toy_engine.cpp, so both languages must agree to the bit: states are integers
below 2**16, all randomness is a hash, logits are multiples of a quarter, and many of them are equal. It stores K and V,
attends to what the mask allows, skips by thresholds, by rank, by a set of layers, by confidence or by loops, and has an
exit that often agrees with the model. The inputs of a call are hashed, so that vectors cover every byte that a runtime
would get.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gsx_engines.bundle.counting import kept_count
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.words import BRANCHES, Branch

# How many of the likeliest tokens engines for steps give.
LIKELY = 8
_MASK = 0xFFFFFFFF


def mix(*values: int) -> int:
    """A hash of whole numbers, 32 bits."""
    z = 0x9E3779B9
    for value in values:
        z = ((z ^ value) + 0x85EBCA6B) & _MASK
        z = ((z ^ (z >> 16)) * 0x7FEB352D) & _MASK
        z = ((z ^ (z >> 15)) * 0x846CA68B) & _MASK
        z ^= z >> 16
    return z


def float_text(value: float) -> str:
    """A float64's bits, so that no reader rounds it."""
    return struct.pack(">d", value).hex()


class ToyEngine:
    """One graph of the toy model.

    Args:
        manifest: its shape, gates, and K/V policy.
        graph: `model`, `draft` or `verify`.
        digest: updated with every call.
    """

    def __init__(self, manifest: Manifest, graph: str, digest: Any) -> None:
        self.manifest, self.graph, self.digest = manifest, graph, digest
        self.layers = manifest.layers_of(graph)
        self.places = manifest.skippable_in(self.layers)
        self.ends = set(manifest.decoder.eos_ids)

    def buffer(self, shape: tuple[int, ...], name: str) -> np.ndarray:
        """Zeros."""
        return np.zeros(shape, np.float32)

    def rows(self, buffer: np.ndarray, shape: tuple[int, ...], rows: slice) -> np.ndarray:
        """A view."""
        return buffer[rows]

    def read(self, buffer: np.ndarray, shape: tuple[int, ...], row: int) -> np.ndarray:
        """A copy."""
        return buffer.reshape(shape)[row].copy()

    def run(
        self,
        profile: int,
        feeds: Mapping[str, np.ndarray],
        buffers: Mapping[str, tuple[Any, tuple[int, ...]]],
        results: Mapping[str, tuple[int, ...]],
    ) -> dict[str, np.ndarray]:
        """One call, and its digest."""
        self._take_in(profile, feeds, results)
        ids, mask, write_at = feeds["input_ids"], feeds["attention_mask"], feeds["write_at"]
        batch, size = ids.shape
        filled = mask.sum(axis=1)
        assert (feeds["position_ids"] == write_at[:, None] + np.arange(size)).all()
        tokens = [(b, s) for b in range(batch) for s in range(size) if write_at[b] + s < filled[b]]
        state = np.zeros((batch, size), np.int64)
        below: dict[str, np.ndarray] = {kv: np.zeros((batch, 1, size, 1), np.float32) for kv in ("key", "value")}
        if self.graph == "verify":
            state = feeds["exit_hidden"][:, :, 0].astype(np.int64)
            if "exit_key" in feeds:
                below = {kv: feeds[f"exit_{kv}"] for kv in below}
        else:
            for b, s in tokens:
                state[b, s] = mix(int(ids[b, s])) & 0xFFFF
        kept = []
        by_token = np.zeros((batch, size), np.int64)
        for layer in self.layers:
            rows = {branch: self._kept(layer, branch, state, tokens, feeds) for branch in BRANCHES}
            below = self._write(layer, state, tokens, write_at, rows["attn"], buffers, below)
            for b, s in rows["attn"]:
                seen = self._attend(layer, b, int(write_at[b]) + s, mask, buffers)
                if mix(seen, layer, 2) % 7 == 0:
                    state[b, s] = mix(int(state[b, s]), seen) & 0xFFFF
            rows["mlp"] = self._kept(layer, "mlp", state, tokens, feeds)
            for b, s in rows["mlp"]:
                change = mix(int(state[b, s]), layer, 3)
                if change % 6 == 0:
                    state[b, s] = change >> 8 & 0xFFFF
            chosen = [rows[branch] for place, branch in self.places if place == layer]
            kept += [len(one) for one in chosen]
            for b, s in (token for one in chosen for token in one):
                by_token[b, s] += 1
        found = {
            "logits": self._logits(state, set(tokens), feeds["logits_at"]),
            "exit_hidden": state[:, :, None].astype(np.float32),
            "exit_key": below["key"],
            "exit_value": below["value"],
            "kept": np.array(kept, np.int64),
            "kept_by_token": by_token,
        }
        found |= _likeliest(found["logits"])
        if "logits" in buffers:
            buffers["logits"][0][:] = found["logits"]
        assert all(found[name].shape == tuple(shape) for name, shape in results.items())
        return {name: found[name] for name in results}

    def _take_in(self, profile: int, feeds: Mapping[str, np.ndarray], results: Mapping[str, tuple[int, ...]]) -> None:
        self.digest.update(f"{self.graph} {profile}\n".encode())
        for name in sorted(feeds):
            value = feeds[name]
            self.digest.update(f"{name} {value.dtype.name} {_spell(value.shape)}\n".encode() + value.tobytes())
        for name in sorted(results):
            self.digest.update(f"{name} {_spell(results[name])}\n".encode())

    def _kept(
        self,
        layer: int,
        branch: Branch,
        state: np.ndarray,
        tokens: Sequence[tuple[int, int]],
        feeds: Mapping[str, np.ndarray],
    ) -> list[tuple[int, int]]:
        if (layer, branch) not in self.places:
            return list(tokens)
        column = BRANCHES.index(branch)
        scores = {
            (b, s): 2.0
            if int(feeds["input_ids"][b, s]) in self.ends
            else (mix(int(state[b, s]), layer, 10 + column) & 0xFF) / 256
            for b, s in tokens
        }
        if "full_until" in feeds:
            first, place = feeds["full_until"], feeds["write_at"]
            if "layer_mask" in feeds:
                runs = {(b, s): feeds["layer_mask"][b, layer, column] for b, s in tokens}
            else:
                limits = np.broadcast_to(feeds["exit_threshold"], len(state))
                runs = {(b, s): scores[b, s] < limits[b] for b, s in tokens}
            return [(b, s) for b, s in tokens if runs[b, s] or place[b] + s < first[b] or scores[b, s] == 2.0]
        if "loops" in feeds:
            assert self.manifest.decoder.loops is not None
            loop = self.manifest.decoder.loops.loop_of(layer) or 0
            return [(b, s) for b, s in tokens if loop < feeds["loops"][b]]
        if "thresholds" in feeds:
            limits = np.broadcast_to(feeds["thresholds"][..., layer, column], len(state))
            return [(b, s) for b, s in tokens if scores[b, s] > limits[b]]
        if "k" in feeds:
            k = int(feeds["k"][0])
        else:
            ends = sum(score == 2.0 for score in scores.values())
            k = kept_count(len(tokens) - ends, float(feeds["budget"])) + ends
        return sorted(sorted(tokens, key=lambda token: -scores[token])[:k])

    def _write(
        self,
        layer: int,
        state: np.ndarray,
        tokens: Sequence[tuple[int, int]],
        write_at: np.ndarray,
        kept: Sequence[tuple[int, int]],
        buffers: Mapping[str, tuple[Any, tuple[int, ...]]],
        below: Mapping[str, np.ndarray],
    ) -> dict[str, np.ndarray]:
        """Write K and V of a layer; under the policy `copy` a skipped token takes those of the layer below."""
        copies = self.manifest.kv_policy == "copy" and layer > 0
        written = {}
        for number, kv in enumerate(("key", "value")):
            buffer = buffers[f"past_key_values.{layer}.{kv}"][0]
            new = np.zeros_like(below[kv])
            for b, s in tokens:
                own = mix(int(state[b, s]), layer, number) & 0xFFFF
                new[b, 0, s, 0] = below[kv][b, 0, s, 0] if copies and (b, s) not in kept else own
                buffer[b, 0, write_at[b] + s, 0] = new[b, 0, s, 0]
            written[kv] = new
        return written

    def _attend(
        self, layer: int, b: int, place: int, mask: np.ndarray, buffers: Mapping[str, tuple[Any, tuple[int, ...]]]
    ) -> int:
        key, value = (buffers[f"past_key_values.{layer}.{kv}"][0] for kv in ("key", "value"))
        seen = 0
        for column in range(place + 1):
            if mask[b, column]:
                seen = mix(seen, int(key[b, 0, column, 0]), int(value[b, 0, column, 0]))
        return seen

    def _logits(self, state: np.ndarray, tokens: set[tuple[int, int]], logits_at: np.ndarray) -> np.ndarray:
        size = state.shape[1]
        logits = np.zeros((*logits_at.shape, self.manifest.decoder.vocab_size), np.float32)
        for place, flat in np.ndenumerate(logits_at):
            token = divmod(int(flat), size)
            if token in tokens:
                logits[place] = _logits_of(int(state[token]), logits.shape[-1])
        return logits


def new_digest() -> Any:
    """A new digest for `ToyEngine`'s calls."""
    return hashlib.sha256()


@functools.lru_cache(maxsize=4096)
def _logits_of(state: int, vocabulary: int) -> np.ndarray:
    return np.array([(mix(state, v, 7) % 61 - 30) / 4 for v in range(vocabulary)], np.float32)


def _likeliest(logits: np.ndarray) -> dict[str, np.ndarray]:
    """The likeliest tokens behind [B, O, V] as an engine for steps gives them: of equal ones the last, out of order."""
    order = np.argsort(logits, axis=-1, kind="stable")[..., -LIKELY:]
    largest = logits.max(axis=-1, keepdims=True)
    return {
        "likely_ids": order,
        "likely_logits": np.take_along_axis(logits, order, axis=-1),
        "likely_total": np.exp(logits - largest).sum(axis=-1),
    }


def _spell(shape: Sequence[int]) -> str:
    return ",".join(str(int(size)) for size in shape)
