"""A graph under construction: a part is added as many times as the decoder has it; constants are shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import helper

from gsx_exporter.graph.trace import Part
from gsx_plugins.domain import DOMAIN, ONNX_OPSET, OPSET_VERSION
from gsx_plugins.graph import Graph, copy_of, make_node
from gsx_plugins.registry import OPS

IR_VERSION = 11  # the one that opset 23 came with


class Layout(Graph):
    """A graph under construction, and the parameters that it may read (`parameters`, in order)."""

    def __init__(self) -> None:
        super().__init__(onnx.GraphProto())
        self.parameters: dict[str, None] = {}
        self._scopes: dict[int, str] = {}  # of the constants of each part, by its id

    def add(
        self, part: Part, prefix: str, reads: Mapping[str, str], writes: Mapping[str, str], scope: str | None = None
    ) -> None:
        """Add a part's nodes.

        Args:
            part: what to add.
            prefix: of its parameters' names.
            reads, writes: its inputs and outputs -> the names that they have in this graph.
            scope: prefix of the names of all its other values; None for `prefix`, or if that is empty its first output.
        """
        names = {name: reads.get(name, name) for name in part.inputs}
        names |= {name: writes[name] for name in part.outputs}
        for parameter, value in part.weights.items():
            name = prefix + parameter.removeprefix("layer.")
            names[value] = name
            self.parameters[name] = None
        scope = scope or prefix or f"{part.outputs[0]}."
        shared = self._scopes.setdefault(id(part), scope)  # layers of one kind share their constants
        for constant in part.graph.constants.values():
            names[constant.name] = shared + constant.name
            if shared == scope:
                copy = onnx.TensorProto()
                copy.CopyFrom(constant)
                copy.name = names[constant.name]
                self.add_tensor(copy)
        nodes = [copy_of(node) for node in part.graph.nodes]
        for node in nodes:
            node.name = scope + node.name
            node.input[:] = [n and names.get(n, scope + n) for n in node.input]
            node.output[:] = [n and names.get(n, scope + n) for n in node.output]
        self.append(*nodes)

    def reshape(self, source: str, shape: Sequence[int], out: str) -> None:
        """Add a Reshape to a fixed shape (one axis may be -1)."""
        self.append(make_node("Reshape", [source, self.add_constant(f"{out}.shape", shape)], out))

    def shaped_like_ids(self, source: str, width: int, out: str) -> None:
        """Add a Reshape [N, width] -> [B, S, width], with B and S of `input_ids`."""
        size, shape = f"{out}.ids", f"{out}.shape"
        last = self.add_constant(f"{out}.width", [width])
        self.append(
            make_node("Shape", ["input_ids"], size),
            make_node("Concat", [size, last], shape, axis=0),
            make_node("Reshape", [source, shape], out),
        )

    def name_output(self, source: str, out: str) -> None:
        """Give a value of the graph a second name, that of an output."""
        self.append(make_node("Identity", [source], out))

    def model_proto(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> tuple[onnx.ModelProto, list[str]]:
        """The model without weights, with function bodies for the custom ops in use; and the parameters that it reads.

        Nodes that no output depends on are left out: a graph that reads states needs no embedding, for example.
        """
        self.proto.name = name
        self.proto.input.extend(inputs)
        self.set_outputs(outputs)
        self.drop_unread()
        self.store()
        used = {node.op_type for node in self.nodes if node.domain == DOMAIN}
        model = helper.make_model(
            self.proto,
            producer_name="gsx",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
            functions=[op.function() for op_name, op in OPS.items() if op_name in used],
        )
        return model, [parameter for parameter in self.parameters if self.users(parameter)]
