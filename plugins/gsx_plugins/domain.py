"""What all ops of domain `gsx` share: the domain, its version, and the description of an op's ONNX half.

An op has a schema (registered with onnx, so that exporters and checkers know it) and a model-local function whose body
consists of standard ops. ONNX Runtime inlines the body; TensorRT uses the plugin registered under the op's name,
`PLUGIN_NAMESPACE` and `PLUGIN_VERSION` if there is one, else the body.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import defs, helper, parser

from gsx_plugins.library import PLUGIN_NAMESPACE, PLUGIN_VERSION

DOMAIN = "gsx"
OPSET_VERSION = 1
# Opset of the standard ops in bodies and graphs (docs/design.md, section 6).
ONNX_OPSET = 23
# The ops that choose rows: their outputs are the rows, the rows' numbers, and how many there are.
CHOICES = ("ThresholdGather", "TopKGather")

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = {
    "T": _FLOATS,
    "float": ["tensor(float)"],
    "int64": ["tensor(int64)"],
    "bool": ["tensor(bool)"],
}


@dataclass(frozen=True)
class OnnxOp:
    """The ONNX half of one op.

    Args:
        name: op type; never that of a standard op, since TensorRT's parser ignores the domain.
        inputs: (name, type) of every input; the type is `T` (float32, float16, bfloat16), `float` (float32),
            `int64` or `bool`.
        outputs: the same for the outputs.
        body: the function body in ONNX's textual syntax, which uses the names of inputs and outputs.
        doc: one line that says what the op computes.
        attributes: int attributes of the op besides `plugin_namespace` and `plugin_version`; the body refers to them
            as `@name`.
        numbers: float attributes that a node may leave out; the body refers to them as `@name` in attributes that then
            have their own default.
    """

    name: str
    inputs: Sequence[tuple[str, str]]
    outputs: Sequence[tuple[str, str]]
    body: str
    doc: str
    attributes: Sequence[str] = ()
    numbers: Sequence[str] = ()

    def schema(self) -> defs.OpSchema:
        """The op's schema."""
        param = defs.OpSchema.FormalParameter
        uses_t = any(kind == "T" for _, kind in (*self.inputs, *self.outputs))

        def spell(kind: str) -> str:
            return "T" if kind == "T" else _TYPES[kind][0]

        return defs.OpSchema(
            self.name,
            DOMAIN,
            OPSET_VERSION,
            self.doc,
            inputs=[param(name, spell(kind)) for name, kind in self.inputs],
            outputs=[param(name, spell(kind)) for name, kind in self.outputs],
            type_constraints=[("T", _FLOATS, "floating point")] if uses_t else [],
            attributes=[
                *(defs.OpSchema.Attribute(a, defs.OpSchema.AttrType.INT, required=True) for a in self.attributes),
                *(defs.OpSchema.Attribute(a, defs.OpSchema.AttrType.FLOAT, required=False) for a in self.numbers),
                defs.OpSchema.Attribute("plugin_namespace", defs.OpSchema.AttrType.STRING, required=False),
                defs.OpSchema.Attribute("plugin_version", defs.OpSchema.AttrType.STRING, required=False),
            ],
        )

    def function(self) -> onnx.FunctionProto:
        """The op as a model-local function whose body consists of standard ops."""
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["" : {ONNX_OPSET}]> '
            f"{self.name} <{', '.join((*self.attributes, *self.numbers, 'plugin_namespace', 'plugin_version'))}>"
            f" ({', '.join(n for n, _ in self.inputs)})"
            f" => ({', '.join(n for n, _ in self.outputs)})"
            f" {{ {self.body} }}"
        )
        function = parser.parse_function(text)
        function.doc_string = self.doc
        return function

    def register(self) -> None:
        """Register the schema with onnx in this process; calling it again changes nothing."""
        if not defs.has(self.name, DOMAIN):
            defs.register_schema(self.schema())


def node(op: OnnxOp, inputs: Sequence[str], outputs: Sequence[str], name: str, **attributes: float) -> onnx.NodeProto:
    """A node of the op, with the attributes by which TensorRT finds its plugin."""
    return helper.make_node(
        op.name,
        list(inputs),
        list(outputs),
        name=name,
        domain=DOMAIN,
        plugin_namespace=PLUGIN_NAMESPACE,
        plugin_version=PLUGIN_VERSION,
        **attributes,
    )
