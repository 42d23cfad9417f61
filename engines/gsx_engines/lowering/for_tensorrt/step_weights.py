"""The weights of a step's product as its plugin takes them: in the rows' type, or as codes of 8 bits with scales.

TensorRT takes 8-bit constants only before a DequantizeLinear, so codes are declared as int32, four in each: the same
bytes of the bundle's file, with another type and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.domain import DOMAIN
from gsx_plugins.graph import Graph, attribute
from gsx_plugins.library import MOST_STEP_ROWS, PLUGIN_NAMESPACE, PLUGIN_VERSION, STEP_OPS, STEP_WEIGHTS

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_CODES = {TensorProto.INT8: "int8", TensorProto.FLOAT8E4M3FN: "e4m3"}
# What the kernels ask of codes (`plugins/gsx_plugins/skip_branch/kernel.h`).
CODES_AT_A_TIME, LEAST_BLOCK = 16, 8
_IN_ONE_INT32 = 4


@dataclass(frozen=True)
class StepWeights:
    """A matrix [I, O] that a plugin can read.

    Args:
        form: a key of `STEP_WEIGHTS`.
        inputs: the names of the matrix; or of the codes, int32 [I, O / 4], and their scales [B, O].
    """

    form: str
    inputs: tuple[str, ...]


def has_step_plugins(task: Task) -> bool:
    """Whether a task is a step of few rows, and the library has its plugins."""
    few = task.step is not None and task.step[0] * task.step[1] <= MOST_STEP_ROWS
    return few and task.plugins.issuperset(STEP_OPS)


def weights_of(graph: Graph, task: Task, product: onnx.NodeProto) -> StepWeights | None:
    """The weights of a MatMul, if a plugin of a step can read them.

    They are constants of the graph's type, or codes behind a DequantizeLinear with a scale for each column or for each
    block of a column's inputs, in a graph of 16 bits.
    """
    if product.op_type != "MatMul":
        return None
    name = product.input[1]
    constant = graph.constants.get(name)
    if constant is not None:
        return StepWeights("rows", (name,)) if constant.data_type == task.float_type in _FLOATS else None
    node = graph.producer(name)
    if node is None or node.op_type != "DequantizeLinear" or len(node.input) != 2:
        return None
    size = attribute(node, "block_size")
    if attribute(node, "axis", 1) != (0 if size else 1) or not has_codes(graph, node.input[0], size):
        return None
    codes, scales = (graph.constants.get(value) for value in node.input)
    if codes is None or scales is None or scales.data_type != task.float_type != TensorProto.FLOAT:
        return None
    return as_codes(graph, codes, scales)


def has_codes(graph: Graph, name: str, block_size: int = 0) -> bool:
    """Whether a constant is a matrix of codes that the kernels can read.

    Args: block_size: how many inputs of a column share a scale; 0: all.
    """
    codes = graph.constants.get(name)
    if codes is None or codes.data_type not in _CODES or len(codes.dims) != 2 or codes.dims[1] % CODES_AT_A_TIME:
        return False
    if not (uses_external_data(codes) or codes.raw_data):
        return False
    blocks = codes.data_type == TensorProto.INT8 and block_size % LEAST_BLOCK == 0
    return not block_size or codes.dims[0] == block_size or blocks


def as_codes(graph: Graph, codes: TensorProto, scales: TensorProto) -> StepWeights:
    """Codes [I, O] as int32 [I, O / 4], and scales [O] or [B, O] as [B, O]."""
    inner, width = codes.dims
    packed = _again(graph, codes, f"{codes.name}.packed", TensorProto.INT32, (inner, width // _IN_ONE_INT32))
    blocks = scales.dims[0] if len(scales.dims) > 1 else 1
    return StepWeights(
        _CODES[codes.data_type],
        (packed, _again(graph, scales, f"{scales.name}.rows", scales.data_type, (blocks, width))),
    )


def step_product(op: str, before: Sequence[str], weights: Sequence[StepWeights], out: str) -> onnx.NodeProto:
    """A node of a product's plugin. Args: op: without the ending for the weights' form; before: its inputs before them;
    weights: all of one form."""
    (form,) = {one.form for one in weights}
    return step_plugin(op + STEP_WEIGHTS[form], [*before, *(value for one in weights for value in one.inputs)], [out])


def step_plugin(op: str, inputs: Sequence[str], outputs: Sequence[str], **numbers: float) -> onnx.NodeProto:
    """A node of a step's plugin, with its numbers as attributes."""
    return onnx.helper.make_node(
        op,
        inputs,
        outputs,
        name=f"{outputs[0]}.{op}",
        domain=DOMAIN,
        plugin_namespace=PLUGIN_NAMESPACE,
        plugin_version=PLUGIN_VERSION,
        **numbers,
    )


def _again(graph: Graph, tensor: TensorProto, name: str, kind: int, shape: Sequence[int]) -> str:
    """The same bytes as a constant of another type and shape. Returns: its name."""
    if name not in graph.constants:
        made = TensorProto()
        made.CopyFrom(tensor)
        made.name, made.data_type = name, kind
        made.dims[:] = shape
        graph.add_tensor(made)
    return name
