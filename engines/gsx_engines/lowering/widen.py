"""A bfloat16 graph in float32, for ONNX Runtime on a CPU, which has no bfloat16 products.

Weights stay stored in bfloat16 and are widened when the graph is loaded, which is exact; activations are not rounded to
bfloat16. So the graph computes the same, only more exactly.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from gsx_plugins.graph import Graph

_NARROW, _WIDE = TensorProto.BFLOAT16, TensorProto.FLOAT
# Attributes that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision", "stash_type")
_STORED = ".bf16"


def in_float32(model: ModelProto) -> None:
    """Turn every bfloat16 of a model into float32, in place, also in its functions and in its nodes' graphs."""
    for function in model.functions:
        _nodes(function.node)
        _values(function.value_info)
    graph = Graph(model.graph)
    for part in list(graph.parts()):
        _graph(part)
    graph.store()


def _graph(graph: Graph) -> None:
    _nodes(graph.nodes)
    _values((*graph.proto.input, *graph.proto.output, *graph.proto.value_info))
    widened: list[NodeProto] = []
    constants = dict(graph.constants)
    graph.remove_constants(constants)
    for name, tensor in constants.items():
        if tensor.data_type == _NARROW:
            tensor.name = name + _STORED
            widened.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}/widened", to=_WIDE))
        graph.add_tensor(tensor)
    graph.prepend(*widened)


def _nodes(nodes: Iterable[NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == _NARROW:
                values = numpy_helper.to_array(attribute.t).astype("float32")
                attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))
            elif attribute.name in _TYPE_ATTRIBUTES and attribute.i == _NARROW:
                attribute.i = _WIDE


def _values(values: Iterable[ValueInfoProto]) -> None:
    for value in values:
        if value.type.tensor_type.elem_type == _NARROW:
            value.type.tensor_type.elem_type = _WIDE
