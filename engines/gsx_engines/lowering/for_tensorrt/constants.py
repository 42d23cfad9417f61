"""8-bit codes in the only place where TensorRT takes them: as the first input of DequantizeLinear."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from gsx_engines.lowering.for_tensorrt.task import Task
from gsx_plugins.graph import Graph, attribute, make_node


def dequantize_constants(graph: Graph, task: Task) -> int:
    """Pass codes of an embedding or a gate through a DequantizeLinear, an embedding's before its rows are read.

    codes -> Gather(ids) -> DequantizeLinear -> Mul <- Unsqueeze <- Gather(ids) <- scales      becomes
    codes, scales -> DequantizeLinear -> Gather(ids)

    codes -> Gather(ids), scales -> Gather(ids), both -> DequantizeLinear in blocks      becomes
    codes, scales -> DequantizeLinear in blocks -> Gather(ids)

    codes -> Cast -> Mul <- scales      becomes      codes, scales -> DequantizeLinear
    """
    codes = {name for name, tensor in graph.constants.items() if tensor.data_type == TensorProto.INT8}

    def dequantized(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        if node.op_type == "DequantizeLinear" and attribute(node, "block_size"):
            rows = graph.producer(node.input[0])
            if rows is None or rows.op_type != "Gather" or rows.input[0] not in codes:
                return None
            scales = graph.expect_producer(node.input[1], "Gather").input[0]
            table, ids = graph.expect_inputs(rows, 2)
            out, whole = node.output[0], f"lowered.{table}"
            node.input[:], node.output[0], node.name = [table, scales], whole, whole
            return [node, make_node("Gather", [whole, ids], out, axis=0)]
        floats = graph.producer(node.input[0]) if node.op_type == "Mul" else None
        if floats is None:
            return None
        if floats.op_type == "Cast" and floats.input[0] in codes:
            return [make_node("DequantizeLinear", [floats.input[0], node.input[1]], node.output[0], axis=1)]
        rows = graph.producer(floats.input[0]) if floats.op_type == "DequantizeLinear" else None
        if rows is None or rows.op_type != "Gather":
            return None
        table, ids = graph.expect_inputs(rows, 2)
        column = graph.expect_producer(node.input[1], "Unsqueeze")
        scales = graph.expect_producer(column.input[0], "Gather").input[0]
        whole = f"lowered.{table}"
        return [
            make_node("DequantizeLinear", [table, scales], whole, axis=0),
            make_node("Gather", [whole, ids], node.output[0], axis=0),
        ]

    return graph.rewrite(dequantized)
