"""A stand-in for a TensorRT engine on a CPU: the same lowered graph, run by ONNX Runtime.

It has the interface of `CudaEngine`, so the runner's logic and the lowering are executed without a GPU. Two things
differ from TensorRT: ops that would be plugins run their function bodies, and Attention is written out in other ops,
since ONNX Runtime's op refuses a query without rows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import helper, parser

from gsx_engines.building.build import input_ranges
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.engine_entry import EngineEntry, EngineGraph, EngineProfile, KvLayout, Sizes
from gsx_engines.bundle.manifest import DecoderShape
from gsx_engines.bundle.tensors import tensor_info
from gsx_engines.lowering.for_tensorrt.shared_weights import write_joined
from gsx_engines.lowering.tensorrt import OPSET, Lowered, lower
from gsx_engines.lowering.widen import in_float32
from gsx_engines.runners.base import StepOutput
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.session import open_session
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.tensorrt.backend import platform_name
from gsx_engines.tensorrt.profile_choice import most_rows
from gsx_plugins.graph import number
from tests.engines.cpu_step_attention import spell_step_attention

# With a cap of scores, and without; both are Attention.
_SCORES = {
    "": "scores = Mul (products, factor)",
    "Capped": """scaled = Mul (products, factor)
    cap_float = Constant <value_float: float = @softcap> ()
    cap = CastLike (cap_float, query)
    over_cap = Div (scaled, cap)
    bounded = Tanh (over_cap)
    scores = Mul (bounded, cap)""",
}
_ATTENTION = """
<domain: "test", opset_import: ["" : {OPSET}]>
{kind}Attention <kv_heads, scale, softcap> (query, key, value, mask) => (out)
{{
    outer = Shape <start = 0, end = 1> (query)
    rows = Shape <start = 2, end = 4> (query)
    heads = Constant <value_int: int = @kv_heads> ()
    zero = Constant <value_ints = [0]> ()
    two = Constant <value_ints = [2]> ()
    heads_1d = Unsqueeze (heads, zero)
    all_heads = Shape <start = 1, end = 2> (query)
    shared = Div (all_heads, heads_1d)
    grouped_shape = Concat <axis = 0> (outer, heads_1d, shared, rows)
    grouped = Reshape <allowzero = 1> (query, grouped_shape)
    key_5d = Unsqueeze (key, two)
    value_5d = Unsqueeze (value, two)
    key_turned = Transpose <perm = [0, 1, 2, 4, 3]> (key_5d)
    scale_float = Constant <value_float: float = @scale> ()
    factor = CastLike (scale_float, query)
    products = MatMul (grouped, key_turned)
    {scores}
    batch_heads = Shape <start = 0, end = 2> (query)
    columns = Shape <start = 2, end = 4> (mask)
    mask_shape = Concat <axis = 0> (batch_heads, columns)
    mask_of_heads = Expand (mask, mask_shape)
    mask_grouped = Concat <axis = 0> (outer, heads_1d, shared, columns)
    mask_5d = Reshape <allowzero = 1> (mask_of_heads, mask_grouped)
    lowest_float = Constant <value_float = -1e9> ()
    lowest = CastLike (lowest_float, query)
    seen = Where (mask_5d, scores, lowest)
    weights = Softmax <axis = -1> (seen)
    attended = MatMul (weights, value_5d)
    shape = Shape (query)
    out = Reshape <allowzero = 1> (attended, shape)
}}
"""


def cpu_model(lowered: Lowered, shape: DecoderShape) -> onnx.ModelProto:
    """A lowered graph in the form that ONNX Runtime executes."""
    model = onnx.ModelProto()
    model.CopyFrom(lowered.model)
    spell_step_attention(model.graph, shape)
    for node in model.graph.node:
        if node.op_type == "Attention":
            scale, softcap = number(node, "scale") or shape.head_dim**-0.5, number(node, "softcap")
            node.domain, node.op_type = "test", "CappedAttention" if softcap else "Attention"
            del node.attribute[:]
            for name, value in (("kv_heads", shape.num_kv_heads), ("scale", scale), ("softcap", softcap)):
                node.attribute.append(helper.make_attribute(name, value))
    _unpack_codes(model)
    model.functions.extend(
        parser.parse_function(_ATTENTION.format(OPSET=OPSET, kind=kind, scores=scores))
        for kind, scores in _SCORES.items()
    )
    used = {node.op_type for node in model.graph.node}
    model.functions.extend(
        parser.parse_function(f'<domain: "gsx", opset_import: ["" : {OPSET}]> {head} {{ {body} }}')
        for op, (head, body) in _STEP_OPS.items()
        if op in used
    )
    model.opset_import.append(helper.make_opsetid("test", 1))
    return model


def _unpack_codes(model: onnx.ModelProto) -> None:
    """Dequantize the codes of a step's products, int32 constants, before the op for weights of the rows' type."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:  # scales of a gate, which are stored in float32
        if node.op_type == "Cast" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    kinds = {"Int8": onnx.TensorProto.INT8, "E4M3": onnx.TensorProto.FLOAT8E4M3FN}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        ending = next((ending for ending in kinds if node.domain == "gsx" and node.op_type.endswith(ending)), None)
        if ending is not None:
            first = len(node.input) - (4 if node.op_type.startswith("SkipGateUp") else 2)
            pairs = [node.input[at : at + 2] for at in range(first, len(node.input), 2)]
            for codes, scales in pairs:
                packed, blocks = constants[codes], constants[scales].dims[0]
                if packed.data_type == onnx.TensorProto.INT32:
                    packed.data_type, packed.dims[1] = kinds[ending], packed.dims[1] * 4
                nodes.append(
                    helper.make_node(
                        "DequantizeLinear",
                        [codes, scales],
                        [f"{node.name}.{codes}"],
                        axis=0,
                        block_size=packed.dims[0] // blocks,
                    )
                )
            node.input[first:] = [f"{node.name}.{codes}" for codes, _ in pairs]
            node.op_type = node.op_type.removesuffix(ending)
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


_ATTRIBUTES = "<plugin_namespace, plugin_version>"
# Of kept rows, as a column.
_KEPT = "keeps = Greater (score, bound) last = Constant <value_ints = [-1]> () kept = Unsqueeze (keeps, last) "
# The plugins of a step as `plugins/gsx_plugins/skip_branch/kernel.h` defines them: what a function computes, and how.
# What the rule leaves open is 7 here.
_STEP_OPS = {
    "GateLinear": (
        f"GateLinear {_ATTRIBUTES} (x, w) => (out)",
        "x_wide = Cast <to = 1> (x) w_wide = Cast <to = 1> (w) out = MatMul (x_wide, w_wide)",
    ),
    "SkipLinear": (
        f"SkipLinear {_ATTRIBUTES} (x, score, bound, w) => (out)",
        _KEPT + "y = MatMul (x, w) zero = Sub (y, y) out = Where (kept, y, zero)",
    ),
    "SkipGateUp": (
        f"SkipGateUp {_ATTRIBUTES} (x, score, bound, g, u) => (out)",
        _KEPT + "a = MatMul (x, g) s = Sigmoid (a) silu = Mul (a, s) b = MatMul (x, u) y = Mul (silu, b) "
        "open = Constant <value_float = 7.0> () other = CastLike (open, y) out = Where (kept, y, other)",
    ),
    "SkipLinearAdd": (
        f"SkipLinearAdd {_ATTRIBUTES} (residual, x, gate, score, bound, w) => (out)",
        _KEPT + "y = MatMul (x, w) gated = Mul (gate, y) sum = Add (residual, gated) out = Where (kept, sum, residual)",
    ),
}


class CpuEngine:
    """See `gsx_engines.runners.tensorrt.Engine`. Calls outside of the profile that is named are refused, as TensorRT
    does.

    Args:
        bundle: the graph's bundle, for its weights.
        lowered: the graph.
        profiles: the engine's profiles.
        config: of ONNX Runtime's session.
    """

    def __init__(
        self,
        bundle: Bundle,
        lowered: Lowered,
        profiles: Sequence[EngineProfile],
        config: Mapping[str, str] | None = None,
    ) -> None:
        model = cpu_model(lowered, bundle.manifest.decoder)
        with TemporaryDirectory(dir=bundle.directory) as folder:
            write_joined(model, lowered.joined, bundle.directory, Path(folder) / "joined")
            if bundle.manifest.precision == "bf16":
                in_float32(model)  # as the portable stage
            self.session = open_session(model.SerializeToString(), bundle.directory, 1, config)
        self.types = {
            value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in (*model.graph.input, *model.graph.output)
        }
        self.ranges = [input_ranges(lowered.model, profile) for profile in profiles]
        self.calls: list[tuple[int, dict[str, tuple[int, ...]]]] = []

    def buffer(self, shape: tuple[int, ...], name: str) -> np.ndarray:
        """Zeros."""
        return np.zeros(shape, self.types[name])

    def move(self, buffer: np.ndarray, shape: tuple[int, ...], source: int, target: int) -> None:
        """A row over another one."""
        assert buffer.shape == shape
        buffer[target] = buffer[source]

    def rows(self, buffer: np.ndarray, shape: tuple[int, ...], rows: slice) -> np.ndarray:
        """A view."""
        assert buffer.shape == shape
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
        """One call; outputs that share memory with an input are written there."""
        inputs = {value.name for value in self.session.get_inputs()}
        given = {**feeds, **{name: array[: shape[0]] for name, (array, shape) in buffers.items() if name in inputs}}
        assert given.keys() == inputs
        for name, (least, _, most) in self.ranges[profile].items():
            found = tuple(given[name]) if name == "k" else given[name].shape
            assert all(a <= size <= b for a, size, b in zip(least, found, most, strict=True)), (name, found)
        self.calls.append((profile, {name: array.shape for name, array in feeds.items()}))
        names = [value.name for value in self.session.get_outputs()]
        found_all = dict(zip(names, self.session.run(names, given), strict=True))
        for name, (array, shape) in buffers.items():
            if name in found_all:
                array[: shape[0]] = found_all.pop(name)
        assert {name: array.shape for name, array in found_all.items()} == dict(results)
        return found_all


def cpu_stages(
    bundle: Bundle,
    profiles: Sequence[EngineProfile],
    *,
    capacity: int,
    plugins: Collection[str] = (),
    rows: int | None = None,
) -> dict[str, tuple[TensorRTStage, CpuEngine]]:
    """Stages of every graph of a bundle as `gsx build` would make them, to run on a CPU; see `cpu_engines`."""
    entry, engines = cpu_engines(bundle, profiles, capacity=capacity, plugins=plugins, rows=rows)
    return {name: (TensorRTStage(bundle.manifest, entry, name, engine), engine) for name, engine in engines.items()}


def cpu_engines(
    bundle: Bundle,
    profiles: Sequence[EngineProfile],
    *,
    capacity: int,
    plugins: Collection[str] = (),
    rows: int | None = None,
    step: tuple[int, int] | None = None,
    config: Mapping[str, str] | None = None,
) -> tuple[EngineEntry, dict[str, CpuEngine]]:
    """The record of a bundle's engines, and the engines by graph.

    Args:
        rows: largest number of tokens of a call; None for that of the profiles.
        step: sequences, and tokens of each, of engines for calls of one size; the profile is theirs.
        config: of ONNX Runtime's sessions.
    """
    kv_layout: KvLayout = "in-place" if step is None else "step"
    if step is not None:
        sizes = [Sizes(size, size, size) for size in (*step, capacity)]
        profiles = [EngineProfile(name="step", batch=sizes[0], tokens=sizes[1], window=sizes[2])]
    manifest = bundle.manifest
    lowered = {
        name: lower(
            onnx.load(str(bundle.graph_path(name)), load_external_data=False),
            manifest,
            capacity=capacity,
            rows=most_rows(profiles) if rows is None else rows,
            plugins=plugins,
            kv_layout=kv_layout,
            step=step,
        )
        for name in manifest.graphs
    }
    graphs = {
        name: EngineGraph(
            file=f"{name}.engine",
            sha256="0" * 64,
            size_bytes=0,
            graph_sha256=manifest.graphs[name].sha256,
            weights_sha256=manifest.weights.sha256,
            forms=dict(made.forms),
            layers={},
            inputs=tuple(tensor_info(value) for value in made.model.graph.input),
            outputs=tuple(tensor_info(value) for value in made.model.graph.output),
            build_seconds=0.0,
            peak_bytes=0,
        )
        for name, made in lowered.items()
    }
    entry = EngineEntry(
        schema_version=1,
        backend="tensorrt-rtx",
        tensorrt_version="0",
        targets=("89",),
        platform=platform_name(),
        gpu=None,
        precision=manifest.precision,
        kv_layout=kv_layout,
        capacity=capacity,
        profiles=tuple(profiles),
        plugins=None,
        graphs=graphs,
    )
    return entry, {name: CpuEngine(bundle, made, profiles, config) for name, made in lowered.items()}


def equal_steps(
    bundle: Bundle,
    stage: TensorRTStage,
    controls: RuntimeValues,
    sizes: Sequence[tuple[int, ...]],
    capacity: int,
    atol: float,
) -> Iterator[StepOutput]:
    """Take the portable runner and one on `stage` through calls with so many tokens of each sequence, and compare their
    logits and kept rows. Yields: what the latter gave."""
    batch = len(sizes[0])
    runners = WholeRunner(PortableStage(bundle)), WholeRunner(stage)
    caches = [runner.new_cache(batch, capacity) for runner in runners]
    rng = np.random.default_rng(0)
    for counts in sizes:
        ids = rng.integers(3, 250, (batch, max(counts)))
        want, found = (
            runner.step(cache, ids, controls, counts=list(counts), logits="all")
            for runner, cache in zip(runners, caches, strict=True)
        )
        for row, count in enumerate(counts):
            np.testing.assert_allclose(found.logits[row, :count], want.logits[row, :count], atol=atol)
        np.testing.assert_array_equal(found.kept, want.kept)
        yield found
