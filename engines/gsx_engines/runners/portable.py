"""The file as anybody's ONNX Runtime runs it: past in, present out, nothing lowered.

Parity is measured on this runner, since it executes `model.onnx` unchanged, with two exceptions: a bundle's 8-bit K/V
is rounded (`gsx_engines/lowering/kv_cache.py`) and kept in the graph's type, and bfloat16, which a CPU has no products
in, becomes float32 (`gsx_engines/lowering/widen.py`). On request it also gives values from inside the graph. It copies
the K/V cache at every call: `onnxruntime.py` is the fast one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import Controls
from gsx_engines.bundle.fields import BRANCHES, Branch
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.errors import BundleError
from gsx_engines.lowering.kv_cache import round_cache
from gsx_engines.lowering.widen import in_float32
from gsx_engines.runners.base import Call, ExitState, Logits, StageOutput, exit_names, grown
from gsx_plugins.graph import Graph

# Types that a graph of each precision has here.
_TYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.float32),
}


class PortableStage:
    """Runs a graph of a bundle as it is.

    Args:
        bundle: an opened bundle.
        graph: `model`, `draft` or `verify`.
        capture: names of values inside the graph to keep of every call (`captured`).
        threads: of ONNX Runtime within an op; None for its own choice.
    Raises:
        BundleError: no such graph, or ONNX Runtime does not load it.
    """

    def __init__(
        self, bundle: Bundle, graph: str = "model", *, capture: Sequence[str] = (), threads: int | None = None
    ) -> None:
        self.manifest: Manifest = bundle.manifest
        self.dtype = _TYPES[self.manifest.precision]
        self.layers = layers_of(self.manifest, graph)
        self.captured: dict[str, np.ndarray] = {}
        self._capture = list(capture)
        model = onnx.load(str(bundle.graph_path(graph)), load_external_data=False)
        if self.manifest.precision == "bf16":
            in_float32(model)
        if self.manifest.kv_cache is not None:
            portable = Graph(model.graph)
            round_cache(portable, self.manifest.kv_cache, self.layers)
            portable.store()
        self._inputs = {value.name for value in model.graph.input}
        outputs = {value.name for value in model.graph.output}
        self._exits = [name for name in exit_names(self.manifest) if name in outputs]
        places = skippable_places(self.manifest, self.layers)
        self._table = KeptTable(self.manifest, places)
        self._kept = [f"layers.{layer}.{branch}.count" for layer, branch in places]
        for name in dict.fromkeys([*self._kept, *capture]):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
        config = session_config(self.manifest)
        self._session = open_session(model.SerializeToString(), bundle.directory, threads, config)

    def new_memory(self, batch: int, capacity: int) -> dict[str, np.ndarray]:
        """K and V by name, [B, kv heads, T, D]: as long as they must be, and new after every call."""
        shape = self.manifest.decoder
        empty = np.zeros((batch, shape.num_kv_heads, 0, shape.head_dim), self.dtype)
        return {f"{i}.{kv}": empty for i in self.layers for kv in ("key", "value")}

    def run(self, memory: dict[str, np.ndarray], call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """See `Stage`."""
        past = max(call.lengths)
        steps = np.arange(call.ids.shape[1])
        lengths, counts = np.array(call.lengths)[:, None], np.array(call.counts)[:, None]
        # Columns behind a sequence's own length, old and new, are padding.
        mask = np.concatenate([np.arange(past) < lengths, steps < counts], axis=1)
        positions = lengths + steps
        for name, value in memory.items():
            memory[name] = value[:, :, :past]
        results = self.execute(
            memory, call.ids, mask.astype(np.int64), positions, call.controls, state, logits=logits != "none"
        )
        for name, value in memory.items():
            memory[name] = _closed_up(value, call, past)
        leaving = None
        if self._exits:
            leaving = {name: results[name] for name in self._exits}
        return StageOutput(
            logits=self._logits(results.get("logits"), call, logits),
            state=leaving,
            kept=self._table.of([int(results[name]) for name in self._kept]),
        )

    def move(self, memory: dict[str, np.ndarray], source: int, target: int, length: int) -> None:
        """See `Stage`."""
        for name, value in memory.items():
            moved = memory[name] = value.copy()  # what a session gave may be its own
            moved[target, :, :length] = value[source, :, :length]

    def execute(
        self,
        memory: dict[str, np.ndarray],
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        controls: Controls,
        state: ExitState | None = None,
        *,
        logits: bool = True,
    ) -> dict[str, np.ndarray]:
        """Run the graph on inputs as any client gives them, padded wherever it likes.

        Args:
            memory: past K and V; this call's are appended for all columns, padding too.
            input_ids, position_ids: [B, S] int64.
            attention_mask: [B, past + S] int64: 1 for a token, 0 for padding.
            controls: as in `Call`.
        Returns: the outputs and captured values by name, but K and V.
        """
        feeds = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        feeds |= {**controls, **(state or {})}
        feeds |= {f"past_key_values.{name}": value for name, value in memory.items()}
        feeds = {name: value for name, value in feeds.items() if name in self._inputs}
        presents = [f"present.{name}" for name in memory]
        names = [*(["logits"] if logits else []), *self._exits, *presents, *self._kept, *self._capture]
        results = dict(zip(names, self._session.run(names, feeds), strict=True))
        for name in memory:
            memory[name] = results.pop(f"present.{name}")
        self.captured = {name: results[name] for name in self._capture}
        return results

    def _logits(self, scores: np.ndarray | None, call: Call, logits: Logits) -> np.ndarray:
        if scores is None:
            return np.zeros((len(call.ids), 0, self.manifest.decoder.vocab_size), np.float32)
        scores = scores.astype(np.float32, copy=False)
        if logits == "all":
            return scores
        return scores[np.arange(len(scores)), [max(count - 1, 0) for count in call.counts]][:, None]


def _closed_up(present: np.ndarray, call: Call, past: int) -> np.ndarray:
    """K or V with every sequence's new tokens next to its old ones: [B, heads, past + S, D]."""
    for row, (start, count) in enumerate(zip(call.lengths, call.counts, strict=True)):
        if start < past and count:
            present[row, :, start : start + count] = present[row, :, past : past + count].copy()
    return present[:, :, : max(grown(call.lengths, call.counts))]


def layers_of(manifest: Manifest, graph: str) -> range:
    """The layers that a graph of the bundle holds."""
    depth = manifest.decoder.num_layers
    if graph == "model":
        return range(depth)
    assert manifest.draft is not None
    assert manifest.draft.draft.kind == "exit"
    split = manifest.draft.draft.layer
    return range(split) if graph == "draft" else range(split, depth)


class KeptTable:
    """Puts kept rows, counted branch by branch, into a table.

    Args:
        manifest: of the bundle.
        places: the skippable branches, in the order of the counts.
    """

    def __init__(self, manifest: Manifest, places: Sequence[tuple[int, Branch]]) -> None:
        self._gated = manifest.policy is not None
        self._shape = (manifest.decoder.num_layers, len(BRANCHES))
        self._flat = np.array([layer * len(BRANCHES) + BRANCHES.index(branch) for layer, branch in places], np.int64)

    def of(self, counts: Sequence[int] | np.ndarray | None) -> np.ndarray | None:
        """The table [L, 2] int64; None for a dense model."""
        if counts is None or not self._gated:
            return None
        kept = np.zeros(self._shape, np.int64)
        kept.put(self._flat, counts)
        return kept


def skippable_places(manifest: Manifest, layers: range | None = None) -> list[tuple[int, Branch]]:
    """(layer, branch) of every branch that the keep rule may skip, of all layers or of some, in the graph's order."""
    return [place for place in manifest.skippable_places if layers is None or place[0] in layers]


def session_config(manifest: Manifest) -> Mapping[str, str]:
    """Session configuration that a graph needs on ONNX Runtime, or runs faster with.

    FP8: its rewriting of Q/DQ picks kernels that have no FP8, and the session does not load. INT8 weights alone (a
    head's are always) become MatMulNBits; blocks of 128 were the fastest of those tried in decoding and in prefill
    (docs/quantization.md).
    """
    if manifest.quantization is None:
        return {}
    if manifest.quantization.scheme == "fp8":
        return {"session.disable_quant_qdq": "1"}
    return {"session.qdq_matmulnbits_block_size": "128"}


def open_session(
    model: bytes,
    directory: Path,
    threads: int | None,
    config: Mapping[str, str] | None = None,
    *,
    profile: Path | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session of a model whose external data lies in a directory.

    Args:
        config: entries of the session's configuration (`session_config`).
        profile: what the names of its profiles begin with; None for no profile.
    Raises:
        BundleError: ONNX Runtime refuses the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warnings are about our run-time defaults, which are wanted
    # Sessions take turns within a step: threads of one that still wait for work would slow down the next (seen: 1.9
    # times the time of a step on two cores).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    for name, value in (config or {}).items():
        options.add_session_config_entry(name, value)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the bindings raise many kinds, all about this model
        raise BundleError(
            f"bundle {directory}: ONNX Runtime {ort.__version__} does not load the graph",
            found=str(error).strip().splitlines()[0],
            todo="gsx doctor says what works on this machine",
        ) from error
