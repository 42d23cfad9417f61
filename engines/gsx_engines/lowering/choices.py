"""The nodes that choose rows in a graph; branches are found by them."""

from __future__ import annotations

import onnx

from gsx_plugins.domain import CHOICES
from gsx_plugins.graph import Graph


def is_choice(node: onnx.NodeProto) -> bool:
    """Whether a node chooses rows."""
    return node.op_type in CHOICES


def branch_choices(graph: Graph) -> list[onnx.NodeProto]:
    """The choices of the rows that branches run on, in order; keep rules may also choose rows for other purposes."""
    ends = (".attn.index", ".mlp.index")
    choices = [node for node in graph.nodes if is_choice(node)]
    for node in choices:
        graph.expect(len(node.output) == 3, node, "rows, their numbers, and how many", f"{len(node.output)} outputs")
    return [node for node in choices if node.output[1].endswith(ends)]
