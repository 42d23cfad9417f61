"""The PyTorch runtime: the traced decoder itself, run eagerly on a bundle's weights.

On a GPU the kernels of `plugins/` are bound to its ops (`gsx_plugins/cuda.py`), on a CPU the ops' own PyTorch code
runs; every precision runs on both. It is above `gsx_engines`, which never imports torch. Where a graph takes K/V as
inputs and returns them longer, this runtime writes into buffers.

Letters as in `gsx_exporter/decoder/layer.py`; C capacity of the buffers, T columns of them that a call reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch._dynamo  # PyTorch would import it in the first call of an op of ours, where seconds are a user's
from onnx import numpy_helper
from torch import Tensor, nn

from gsx.backend_names import Device
from gsx_engines.bundle import tensor_names
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.manifest import DecoderShape, Gates
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_engines.errors import BundleError, EngineError
from gsx_engines.runners.base import Call, ExitState, Logits, StageOutput, grown
from gsx_engines.runners.kept import KeptTable
from gsx_exporter.checkpoint.hf_config import read_config
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.ends import Entry, Exit, LoopEntry, ShortExit, shared_values
from gsx_exporter.decoder.layer import CallState, DecoderLayer, DecoderOptions, KeptRows, KeyValue
from gsx_exporter.decoder.loading import filled_exit_modules
from gsx_exporter.rules.registry import traced_rule

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_STORED_TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
}


class TorchRuntime:
    """Opens stages of bundles in PyTorch; stages of one bundle share their weights.

    Args:
        device: None for the GPU where PyTorch sees one, else the CPU.
        threads: within an op on a CPU, in this whole process; None leaves them as they are.
    Raises:
        EngineError: a GPU was requested, and PyTorch sees no GPU.
        PluginLibraryError: the kernels for it are not built.
    """

    def __init__(self, device: Device | None = None, *, threads: int | None = None) -> None:
        self.device = _device(device)
        if threads is not None:
            torch.set_num_threads(threads)
        self._weights: dict[Path, _Weights] = {}

    def stage(self, bundle: Bundle, graph: str) -> TorchStage:
        """A graph of a bundle, with its weights on the device.

        Raises:
            EngineError: a bundle with 8-bit products, or K and V in 8 bits.
            BundleError: `config.json` or the weights do not match the manifest, or there is no such graph.
        """
        if bundle.manifest.quantization is not None:
            raise EngineError(
                "the PyTorch runtime has no 8-bit products",
                expected="a bundle in fp32, fp16 or bf16",
                found=bundle.manifest.quantization.scheme,
                todo="run it without --backend torch, or export without 8 bits",
            )
        if bundle.manifest.kv_cache is not None:
            raise EngineError(
                "the PyTorch runtime keeps K and V in the type of the activations",
                expected=f"a bundle exported without --kv-cache {bundle.manifest.kv_cache.type}",
                todo="run it without --backend torch, or export again",
            )
        bundle.graph_path(graph)
        key = bundle.directory.resolve()
        if key not in self._weights:
            self._weights[key] = _Weights(bundle, self.device)
        return TorchStage(bundle, graph, self._weights[key], self.device)


class TorchStage:
    """Runs some layers of the decoder; see `Stage`.

    Args:
        bundle: an opened bundle.
        graph: `model`, `draft` or `verify`.
        weights: the bundle's weights.
        device: the device that they are on.
    """

    def __init__(self, bundle: Bundle, graph: str, weights: _Weights, device: torch.device) -> None:
        self.manifest = manifest = bundle.manifest
        self.layers = manifest.layers_of(graph)
        self._device = device
        hf_config = read_config(bundle.directory).hf
        self._config = config = _checked(hf_config, bundle)
        self._rule = traced_rule(manifest.policy, manifest.selection, config)
        options = DecoderOptions(self._rule, manifest.kv_policy, _TYPES[manifest.precision])
        self._dtype = options.dtype
        self._exits = manifest.exit_state
        with torch.device("meta"):
            self._entry = Entry(hf_config, config, options)
            self._layers = [_Layer(config, options, i) for i in self.layers]
            self._exit, self._places = self._leave(weights, graph)
            self._loop_entry = LoopEntry(config, options.dtype) if config.loops is not None else None
        self._entered = tuple(self._rule.entered()) if self._rule else ()
        weights.fill(self._entry, "")
        for i, layer in zip(self.layers, self._layers, strict=True):
            weights.fill(layer, f"layers.{config.layer_of(i)}.")
        weights.fill(self._exit, "")
        if self._loop_entry is not None:
            weights.fill(self._loop_entry, "")
        self._exit_modules = filled_exit_modules(config, options, weights.fill)
        self._table = KeptTable(manifest, self.layers)
        self.counts_tokens = True

    def new_memory(self, batch: int, capacity: int) -> dict[int, _Buffers]:
        """See `Stage`: buffers of every cache, for all the tokens that may come."""
        size = (batch * capacity + 1, self._config.num_kv_heads, self._config.head_dim)

        def zeros() -> Tensor:
            return torch.zeros(size, dtype=self._dtype, device=self._device)

        return {cache: _Buffers(zeros(), zeros(), batch) for cache in self.manifest.decoder.caches_of(self.layers)}

    @torch.inference_mode()
    def run(self, memory: dict[int, _Buffers], call: Call, state: ExitState | None, logits: Logits) -> StageOutput:
        """See `Stage`."""
        batch, length = call.ids.shape
        capacity = next(iter(memory.values())).capacity
        steps = np.arange(length)
        valid = steps < np.array(call.counts)[:, None]
        positions = np.array(call.lengths)[:, None] + steps
        # The row for each token's K and V; padding after a sequence's count goes to the row that nobody reads.
        rows = np.where(valid, np.arange(batch)[:, None] * capacity + positions, batch * capacity)
        copied = torch.from_numpy(np.stack([call.ids, positions, valid, rows])).to(self._device)
        ids, device_positions, device_valid, device_rows = copied
        hidden, calls = self._enter(ids, device_valid, device_positions, max(grown(call.lengths, call.counts)), call)
        new: dict[int, KeyValue] = {}  # of each layer, K and V of the call's tokens
        first: Tensor | None = None  # the state that entered the first loop
        carried = {name: calls[0].values[name] for name in (self._rule.carried if self._rule else ())}
        if state is not None:
            hidden = self._to_device(state["exit_hidden"]).reshape(batch * length, -1)
            if "exit_key" in state:
                passed = KeyValue(self._to_device(state["exit_key"]), self._to_device(state["exit_value"]))
                new[self.layers.start - 1] = passed
            carried = {n: self._to_device(state[f"exit_{n}"], torch.float32).reshape(-1, 1) for n in carried}
        kept: list[Tensor] = []  # the rows of each branch that may be skipped
        for number, layer, layer_call in zip(self.layers, self._layers, calls, strict=True):
            past = _Past(memory[self._config.cache_of(number)], device_rows.reshape(-1), layer_call.mask.shape[3])
            layer_call = layer_call._replace(values={**layer_call.values, **carried})
            entering = hidden
            if self._loop_entry is not None and self._config.enters_loop(number):
                first = hidden if first is None else first
                hidden, layer_call = self._loop_entry.before(layer, hidden, first, layer_call)
            below = new.pop(self._config.below(number), None)
            hidden, _, new[number], values = layer(hidden, layer_call, past, below)
            carried = {name: values[name] for name in carried}
            if number + 1 in self._exit_modules:
                entered = [{**values, **carried}[name] for name in self._entered]
                carried = dict(zip(carried, self._exit_modules[number + 1](hidden, entering, *entered), strict=True))
            kept += [layer.kept[branch] for branch in BRANCHES if branch in layer.skippable]
        leaving = None
        if self.layers.stop < self._config.num_layers:
            leaving = {"exit_hidden": _to_host(hidden.view(batch, length, -1))}
            if "exit_key" in self._exits:
                last = new[self.layers.stop - 1]
                leaving |= {"exit_key": _to_host(last.key), "exit_value": _to_host(last.value)}
            leaving |= {f"exit_{n}": _to_host(value.view(batch, length, 1)) for n, value in carried.items()}
        scores = self._scores(hidden, ids, call, logits)
        # One copy for all branches.
        indices = torch.cat(kept or [torch.empty(0, dtype=torch.int64)]).cpu().numpy()
        ends = np.cumsum([len(index) for index in kept])[:-1]
        rows = self._table.rows(np.split(indices, ends)[: len(kept)], batch, length)
        return StageOutput(scores, leaving, *self._table.counts(rows))

    @torch.inference_mode()
    def copy(self, memory: dict[int, _Buffers], source: int, target: int, length: int) -> None:
        """See `Stage`."""
        for buffers in memory.values():
            start, end = source * buffers.capacity, target * buffers.capacity
            for kv in (buffers.key, buffers.value):
                kv[end : end + length] = kv[start : start + length]

    def _enter(
        self, ids: Tensor, valid: Tensor, positions: Tensor, columns: int, call: Call
    ) -> tuple[Tensor, list[CallState]]:
        """Embeddings [N, H] of a call, and what each layer reads."""
        rule = self._rule
        types = {name: value.dtype for name, value in (rule.inputs if rule else {}).items()}
        inputs = {name: self._to_device(call.controls[name], dtype) for name, dtype in types.items()}
        with torch.device(self._device):  # the entry makes small tensors of its own
            once = [inputs[name] for name in (rule.of_call() if rule else ())]
            hidden, *rest = self._entry(ids, valid, positions, *once)
        shared, own = shared_values(self._config, rest)
        shared = shared._replace(masks={window: _mask(positions, columns, window) for window in shared.masks})
        entered = dict(zip(rule.entered() if rule else (), own, strict=True))
        if rule is not None and rule.by_rank:
            entered["k"] = entered["k"].cpu()  # K on the host: waits for the GPU once here, so that no branch has to
        return hidden, [
            shared.of_layer(self._config, i, rule.values_of(i, inputs, entered) if rule else {}) for i in self.layers
        ]

    def _scores(self, hidden: Tensor, ids: Tensor, call: Call, logits: Logits) -> np.ndarray:
        batch, length = call.ids.shape
        if logits == "none":
            return np.zeros((batch, 0, self._config.vocab_size), np.float32)
        if logits == "last":
            last = [row * length + max(count - 1, 0) for row, count in enumerate(call.counts)]
            hidden, ids = hidden[last], ids[:, :1]
        return _to_host(self._exit(hidden, ids, *self._places))

    def _leave(self, weights: _Weights, graph: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """Final norm and head of a graph, and what the head reads besides states: in a draft that chooses among few
        tokens, their places."""
        draft = self.manifest.draft
        if graph != "draft" or draft is None or draft.vocabulary is None:
            return Exit(self._config, self._dtype), ()
        places = weights.constant(graph, tensor_names.DRAFT_PLACES)
        tokens = [0] * draft.vocabulary.tokens  # which of them is in their weights
        return ShortExit(self._config, tokens, self._dtype), (places,)

    def _to_device(self, array: np.ndarray | None, dtype: torch.dtype | None = None) -> Tensor:
        return torch.as_tensor(array).to(self._device, dtype or self._dtype)


class _Layer(DecoderLayer):
    """A layer that remembers which rows each branch ran on in its last call."""

    def __init__(self, config: ModelConfig, options: DecoderOptions, number: int) -> None:
        super().__init__(config, options, number)
        self.kept: dict[Branch, Tensor] = {}

    def choose(self, branch: Branch, hidden: Tensor, normed: Tensor, call: CallState) -> KeptRows:
        """See `DecoderLayer`."""
        kept = super().choose(branch, hidden, normed, call)
        self.kept[branch] = kept.index
        return kept


@dataclass(frozen=True)
class _Buffers:
    """K and V of one layer, [B x C + 1, kv heads, D]: the tokens of each sequence in turn, and a row nobody reads."""

    key: Tensor
    value: Tensor
    batch: int

    @property
    def capacity(self) -> int:
        """C."""
        return (len(self.key) - 1) // self.batch


@dataclass(frozen=True)
class _Past:
    """The buffers during a call; see `Past`.

    Args:
        rows: [N] int64, rows of the call's tokens in the buffers.
        columns: T.
    """

    buffers: _Buffers
    rows: Tensor
    columns: int

    def append(self, new: KeyValue) -> KeyValue:
        """Write the call's K and V; returns views of the buffers."""
        return KeyValue(self._written(self.buffers.key, new.key), self._written(self.buffers.value, new.value))

    def _written(self, buffer: Tensor, new: Tensor) -> Tensor:
        buffer.index_copy_(0, self.rows, new.transpose(1, 2).flatten(0, 1))
        sequences = buffer[:-1].view(self.buffers.batch, self.buffers.capacity, *buffer.shape[1:])
        return sequences[:, : self.columns].transpose(1, 2)


class _Weights:
    """The weights file of a bundle, mapped; each tensor goes to the device once."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        self._bundle, self._device = bundle, device
        graphs = [self._graph(name) for name in ("model", "draft") if name in bundle.manifest.graphs]
        self._stored = {one.name: one for graph in graphs for one in graph.initializer if one.external_data}
        # Copy on write: PyTorch requires writable memory, although nothing writes to it.
        self._file = np.memmap(bundle.directory / bundle.manifest.weights.file, np.uint8, mode="c")
        self._tensors: dict[str, Tensor] = {}

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module on the meta device its parameters.

        Raises:
            BundleError: the bundle lacks a parameter, or has it in another shape or type.
        """
        state = {}
        for name, parameter in module.named_parameters():
            tensor = state[name] = self._tensor(prefix + name)
            if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
                raise self._error(prefix + name, _spell(parameter), _spell(tensor))
        module.load_state_dict(state, assign=True)

    def constant(self, graph: str, name: str) -> Tensor:
        """A constant that is in a graph's file."""
        found = next((one for one in self._graph(graph).initializer if one.name == name), None)
        if found is None or found.external_data:
            raise self._error(name, f"a constant of {graph}.onnx", "no such constant")
        return torch.from_numpy(numpy_helper.to_array(found).copy()).to(self._device)

    def _graph(self, name: str) -> onnx.GraphProto:
        return onnx.load(str(self._bundle.graph_path(name)), load_external_data=False).graph

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            stored = self._stored.get(name)
            if stored is None or stored.data_type not in _STORED_TYPES:
                raise self._error(name, "a tensor of floats", "no such tensor" if stored is None else "another type")
            place = {entry.key: entry.value for entry in stored.external_data}
            start = int(place["offset"])
            content = torch.from_numpy(self._file[start : start + int(place["length"])])
            found = content.view(_STORED_TYPES[stored.data_type]).reshape(tuple(stored.dims))
            self._tensors[name] = found.to(self._device)
        return self._tensors[name]

    def _error(self, name: str, expected: str, found: str) -> BundleError:
        return BundleError(
            f"bundle {self._bundle.directory}: the weight {name} does not fit {CONFIG}",
            expected=expected,
            found=found,
            todo="restore both, or run `gsx export` again",
        )


def _mask(positions: Tensor, columns: int, window: int | None) -> Tensor:
    """Attention mask, [B, 1, S, T] bool. A buffer's column is the position of the token stored in it.

    Args: positions [B, S] int64.
    """
    column = torch.arange(columns, device=positions.device)
    position = positions[:, None, :, None]
    seen = column <= position
    return seen if window is None else seen & (column > position - window)


def _checked(hf_config: Any, bundle: Bundle) -> ModelConfig:
    """The configuration, checked against the bundle's manifest, which alone says where a text begins and ends."""
    manifest = bundle.manifest
    ids = {name: getattr(manifest.decoder, name) for name in ("bos_id", "eos_ids", "pad_id")}
    config = ModelConfig.from_hf(hf_config)
    config = config.of_context(min(manifest.decoder.max_positions, config.most_positions))
    config = replace(config, **ids)
    if config.loops is not None and manifest.decoder.loops is not None:
        config = config.of_loops(manifest.decoder.loops)
    facts = {name: (getattr(manifest.decoder, name), getattr(config, name)) for name in DecoderShape.model_fields}
    gate = config.gate
    facts["gates"] = (
        manifest.gates,
        Gates(kind=gate.kind, input=gate.input, branches=gate.branches) if gate else None,
    )
    for name, (expected, found) in facts.items():
        if expected != found:
            raise BundleError(
                f"bundle {bundle.directory}: {CONFIG} does not match gsx.json",
                expected=f"{name} {expected}",
                found=str(found),
                todo="the file was edited: restore it, or run `gsx export` again",
            )
    return config


def _device(requested: Device | None) -> torch.device:
    """The device to run on. For a GPU, the kernels are bound to the ops."""
    if requested == "cpu" or (requested is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise EngineError(
            "PyTorch sees no GPU here",
            expected="an NVIDIA GPU, its driver, and a PyTorch built for CUDA",
            found=f"PyTorch {torch.__version__}, {built}",
            todo="use --device cpu to run it here; gsx doctor shows what works on this machine",
        )
    from gsx_plugins.cuda import bind

    bind()
    return torch.device("cuda")


def _to_host(tensor: Tensor) -> np.ndarray:
    """A tensor on the host, float32."""
    found: np.ndarray = tensor.float().cpu().numpy()
    return found


def _spell(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
