"""Explicit Q/DQ: a float graph and a plan -> a graph whose large products run in 8 bits.

    x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- codes

A runtime that knows the pattern turns it into one 8-bit product. For that (details and pitfalls: docs/quantization.md),
the codes of weights are stored [in, out] and feed their DequantizeLinear directly, scales have the type of the
activations, there is no Cast in between, zero-points are 0, and products that read the same value share one pair. A
pair comes directly before its MatMul, after the gather, so that skipped rows are not quantized either.

Rows of an embedding are dequantized after they are read, in blocks of their channels:

    ids -> Gather <- codes; ids -> Gather <- scales; both -> DequantizeLinear (axis 1, block_size)

or, of a width that has no whole blocks, each with its own scale:

    ids -> Gather <- codes -> DequantizeLinear (scale 1) -> Mul <- Unsqueeze <- Gather <- scales

A head that shares the embedding's table reads the same codes, whose rows are its output channels:

    codes -> DequantizeLinear -> Transpose -> MatMul

Weights in 4 bits are in blocks along the inputs:

    codes, scales, zero-points -> DequantizeLinear (axis 0, block_size) -> MatMul

Weights of experts are [E, in, out], in blocks along the inputs of each:

    codes, scales, zero-points -> DequantizeLinear (axis 1, block_size) -> RoutedExperts

A gate's weights are stored as codes too, but its product runs in float32, since it decides. So they are dequantized by
nodes that no runtime takes for an 8-bit product. (From Q/DQ around only the weights, ONNX Runtime makes a product that
rounds the input.)

    codes -> Cast -> Mul <- scales
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import onnx
import torch
from onnx import helper
from torch import Tensor

from gsx_exporter.graph.assemble import Graphs
from gsx_exporter.graph.weights import ONNX_TYPES, Weight
from gsx_exporter.quantization.codes import Encoded
from gsx_exporter.quantization.layers import input_width
from gsx_exporter.quantization.plan import QuantizationPlan, scale_value
from gsx_exporter.quantization.scheme import EMBEDDING, GATES, INT8, TABLES, WeightFormat
from gsx_plugins.graph import Graph, make_node

_HALF = {"BF16": torch.bfloat16, "F16": torch.float16}
_GATES = tuple(GATES.values())


def quantize_graphs(graphs: Graphs, plan: QuantizationPlan, dtype: torch.dtype) -> Graphs:
    """Graphs whose products run in 8 bits as the plan says, and whose other matrices are stored in 16 bits if possible.

    Args: dtype: of the graphs' activations, and so of the scales.
    """
    plan = plan.with_draft_head()
    weights: dict[str, Weight] = {}
    stored: dict[str, str] = {}  # a matrix that is stored in 16 bits -> its name in the file
    for weight in graphs.weights:
        narrow = _narrow_type(weight, plan)
        matrix = weight.name.removesuffix(".weight")
        if matrix in plan.matrices:
            weights |= {one.name: one for one in _stored(weight, matrix, plan)}
        elif narrow is not None:
            stored[weight.name] = f"{weight.name}.stored"
            weights[stored[weight.name]] = replace(weight, name=stored[weight.name], dtype=narrow)
        else:
            weights[weight.name] = weight
    for model in graphs.models.values():
        graph = Graph(model.graph)
        _dequantize_gates(graph, plan)
        _quantize_products(graph, plan, dtype)
        _dequantize_experts(graph, plan)
        if EMBEDDING in plan.matrices:
            _quantize_embedding(graph, plan.matrices[EMBEDDING].format, dtype)
        _read_16_bits(graph, stored)
        graph.store()
    return Graphs(graphs.models, list(weights.values()))


def _dequantize_gates(graph: Graph, plan: QuantizationPlan) -> None:
    """Convert the codes of gates to float32 weights; where a Cast widened 16-bit weights, this replaces it."""
    made: dict[str, str] = {}
    same: dict[str, str] = {}  # output of such a Cast -> the weight from the codes

    def dequantized(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        gates = [name for name in node.input if name.removesuffix(".weight").endswith(_GATES)]
        gates = [name for name in gates if name.removesuffix(".weight") in plan.matrices]
        nodes = []
        for codes in gates:
            if codes not in made:
                made[codes], unscaled = f"{codes}.dequantized", f"{codes}.unscaled"
                nodes += [_cast(codes, unscaled), make_node("Mul", [unscaled, f"{codes}_scale"], made[codes])]
        if gates and node.op_type == "Cast":
            same[node.output[0]] = made[gates[0]]
            return nodes
        if not gates and same.keys().isdisjoint(node.input):
            return None
        node.input[:] = [same.get(name, made.get(name, name)) for name in node.input]
        return [*nodes, node]

    graph.rewrite(dequantized)


def _quantize_products(graph: Graph, plan: QuantizationPlan, dtype: torch.dtype) -> None:
    """Insert Q/DQ before the products that the plan quantizes."""
    pairs: dict[tuple[str, float], str] = {}  # (value, scale) -> the value quantized and dequantized
    read: Counter[str] = Counter()  # how often each matrix was read so far: a looped layer's in every loop

    def quantized(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        linear = node.input[1].removesuffix(".weight") if node.op_type == "MatMul" else ""
        if linear not in plan.matrices or linear.endswith(_GATES):
            return None
        visit = f".{read[linear]}" if read[linear] else ""
        read[linear] += 1
        codes, floats = node.input[1], f"{linear}.weight.dequantized{visit}"
        parameters, size = [codes, f"{codes}_scale"], plan.matrices[linear].format.block_size
        if size is None:
            nodes = [make_node("DequantizeLinear", parameters, floats, axis=1)]
        else:
            parameters += [f"{codes}_zero_point"] if plan.matrices[linear].format.zero_points else []
            nodes = [make_node("DequantizeLinear", parameters, floats, axis=0, block_size=size)]
        value, scale = node.input[0], plan.matrices[linear].input_scale
        if scale is not None:
            if (value, scale) not in pairs:
                nodes += _pair(graph, f"{linear}.input{visit}", value, scale, plan, dtype)
                pairs[value, scale] = nodes[-1].output[0]
            node.input[0] = pairs[value, scale]
        node.input[1] = floats
        return [*nodes, node]

    graph.rewrite(quantized)


def _dequantize_experts(graph: Graph, plan: QuantizationPlan) -> None:
    """Dequantize the weights of experts before the op that reads them."""

    def dequantized(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type != "RoutedExperts":
            return None
        nodes = []
        for place, codes in enumerate(node.input):
            if codes not in plan.matrices:
                continue
            form, floats = plan.matrices[codes].format, f"{codes}.dequantized"
            # One scale for all inputs is a block of all inputs: scales are [E, blocks, out].
            size = form.block_size or input_width(plan.checkpoint.config, codes)
            parameters = [codes, f"{codes}_scale", *([f"{codes}_zero_point"] if form.zero_points else [])]
            nodes.append(make_node("DequantizeLinear", parameters, floats, axis=1, block_size=size))
            node.input[place] = floats
        return [*nodes, node]

    graph.rewrite(dequantized)


def _quantize_embedding(graph: Graph, form: WeightFormat, dtype: torch.dtype) -> None:
    """Read the embedding's rows as codes and their scales; for a head that shares the table, dequantize all of it."""
    scale = f"{EMBEDDING}_scale"

    def quantized(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "Transpose" and node.input[0] == EMBEDDING:
            floats = node.input[0] = f"{EMBEDDING}.dequantized"
            blocks = {} if form.block_size is None else {"block_size": form.block_size}
            axis = 0 if form.block_size is None else 1
            return [make_node("DequantizeLinear", [EMBEDDING, scale], floats, axis=axis, **blocks), node]
        if node.op_type != "Gather" or node.input[0] != EMBEDDING:
            return None
        out, ids = node.output[0], node.input[1]
        codes, scales = f"{out}.codes", f"{out}.scales"
        read = [make_node("Gather", [EMBEDDING, ids], codes), make_node("Gather", [scale, ids], scales)]
        if form.block_size is not None:
            return [*read, make_node("DequantizeLinear", [codes, scales], out, axis=1, block_size=form.block_size)]
        one, zero, last = f"{EMBEDDING}.one", f"{EMBEDDING}.zero", f"{EMBEDDING}.last"
        floats, column = f"{out}.unscaled", f"{out}.column"
        graph.add_tensor(helper.make_tensor(last, onnx.TensorProto.INT64, [1], [-1]))
        graph.add_tensor(helper.make_tensor(one, ONNX_TYPES[dtype], [], [1.0]))
        graph.add_tensor(helper.make_tensor(zero, ONNX_TYPES[INT8.dtype], [], [0]))
        return [
            *read,
            make_node("DequantizeLinear", [codes, one, zero], floats),
            make_node("Unsqueeze", [scales, last], column),
            make_node("Mul", [floats, column], out),
        ]

    graph.rewrite(quantized)


def _narrow_type(weight: Weight, plan: QuantizationPlan) -> torch.dtype | None:
    """The 16-bit type that a float32 matrix is stored in; None if it is not.

    Gates of a float32 graph are stored in 16 bits only if the checkpoint has them in 16 bits, so that no decision
    changes. Tables (embedding and head) of a float32 checkpoint are rounded to half precision, which rounds a sixteenth
    as much as 8 bits do.
    """
    is_table = weight.name.removesuffix(".weight") in TABLES
    if weight.dtype != torch.float32 or not (is_table or weight.transpose):
        return None
    source = weight.stack[0] if weight.stack else weight.source
    return _HALF.get(plan.checkpoint.parameter_type(source), torch.float16 if is_table else None)


def _read_16_bits(graph: Graph, stored: Mapping[str, str]) -> None:
    """Cast matrices that are stored in 16 bits where they are read."""
    casts: dict[str, onnx.NodeProto] = {}

    def widened(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "Gather" and node.input[0] in stored:  # cast after the Gather: the table stays in 16 bits
            out, rows = node.output[0], f"{node.output[0]}.stored"
            node.input[0], node.output[0] = stored[node.input[0]], rows
            return [node, _cast(rows, out)]
        casts.update((name, _cast(stored[name], name)) for name in node.input if name in stored)
        return None

    graph.rewrite(widened)
    graph.prepend(*casts.values())


def _cast(value: str, out: str) -> onnx.NodeProto:
    return make_node("Cast", [value], out, to=onnx.TensorProto.FLOAT)


def _stored(weight: Weight, matrix: str, plan: QuantizationPlan) -> list[Weight]:
    """A weight as codes, under its own name; the scales of its output channels or blocks (for an embedding, of its
    rows); and the zero-points if its format has them.

    Scales have the type that the product runs in: the graph's type, or float32 for a gate.
    """
    by_row, form = weight.name == EMBEDDING, plan.matrices[matrix].format
    dtype = torch.float32 if matrix.endswith(_GATES) else weight.dtype

    def part(read: Callable[[Encoded], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda w: read(plan.encoded(matrix, w.t() if by_row else w, dtype))

    def named(ending: str, kind: torch.dtype, read: Callable[[Encoded], Tensor]) -> Weight:
        return replace(weight, name=weight.name + ending, dtype=kind, encode=part(read))

    stored = [named("", form.dtype, lambda one: one.codes.t() if by_row else one.codes)]
    if form.block_size is None and not weight.stack:
        return [*stored, named("_scale", dtype, lambda one: one.scales[0])]
    stored.append(named("_scale", dtype, lambda one: one.scales.t() if by_row else one.scales))
    return [*stored, named("_zero_point", form.dtype, _zero_points)] if form.zero_points else stored


def _zero_points(one: Encoded) -> Tensor:
    assert one.zero_points is not None
    return one.zero_points


def _pair(
    graph: Graph, name: str, value: str, scale: float, plan: QuantizationPlan, dtype: torch.dtype
) -> Iterable[onnx.NodeProto]:
    """QuantizeLinear and DequantizeLinear of a value, with a scale of their own."""
    graph.add_tensor(helper.make_tensor(f"{name}.scale", ONNX_TYPES[dtype], [], [scale_value(scale, dtype)]))
    graph.add_tensor(helper.make_tensor(f"{name}.zero", ONNX_TYPES[plan.scheme.weights.dtype], [], [0]))
    parameters = [f"{name}.scale", f"{name}.zero"]
    codes, floats = f"{name}.quantized", f"{name}.dequantized"
    return (
        make_node("QuantizeLinear", [value, *parameters], codes),
        make_node("DequantizeLinear", [codes, *parameters], floats),
    )
