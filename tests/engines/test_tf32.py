"""TensorFloat-32 is switched on only where it changes no factor of a product."""

from __future__ import annotations

import pytest
from onnx import parser

from gsx_engines.lowering.for_tensorrt.gates import _ONE, exact_in_tf32
from gsx_plugins.graph import Graph

# The factors of a product, made from 16-bit rows x, float32 rows f, codes c, and an op that is not known.
PRODUCTS = {
    "a gate's product": ("a = Cast <to = 1> (x) b = Cast <to = 1> (w)", True),
    "codes": ("a = Cast <to = 1> (x) b = DequantizeLinear (c, one)", True),
    "a weight that is turned": (
        "a = Cast <to = 1> (x) wide = Cast <to = 1> (w) b = Transpose <perm = [1, 0]> (wide)",
        True,
    ),
    "16 bits": ("a = Identity (x) b = Transpose <perm = [1, 0]> (w)", False),
    "float32 weights": ("a = Cast <to = 1> (x) b = Identity (f)", False),
    "weights that are scaled": ("a = Cast <to = 1> (x) wide = Cast <to = 1> (w) b = Mul (wide, f)", False),
    "codes with scales": ("a = Cast <to = 1> (x) b = DequantizeLinear (c, scale)", False),
    "two computed values": ("once = Cast <to = 1> (x) a = Sigmoid (once) b = Transpose <perm = [1, 0]> (a)", False),
    "a type that is not known": ("a = Cast <to = 1> (x) b = gsx.Unknown (x)", False),
}


def parsed(text: str) -> Graph:
    """A graph; `one` is the scale that lowering gives codes."""
    graph = Graph(parser.parse_model(text).graph)
    graph.rename({"one": _ONE})
    return graph


@pytest.mark.parametrize("name", PRODUCTS)
def test_which_products_are_exact(name: str) -> None:
    nodes, exact = PRODUCTS[name]
    text = f"""
    <ir_version: 10, opset_import: ["" : 24, "gsx" : 1]>
    agraph (float16[2, 4] x) => (out)
    <float16[4, 4] w = {{{", ".join("1" * 16)}}}, float[4, 4] f = {{{", ".join("1" * 16)}}},
     int8[4, 4] c = {{{", ".join("1" * 16)}}}, float[4] scale = {{1, 1, 1, 1}}, float one = {{1}}>
    {{ {nodes} out = MatMul (a, b) }}
    """
    assert exact_in_tf32(parsed(text)) is exact


def test_one_inexact_product_is_enough() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 24]>
    agraph (float16[2, 2] x, float16[2, 2] w) => (out)
    <float[2, 2] f = {1, 1, 1, 1}>
    { a = Cast <to = 1> (x) b = Cast <to = 1> (w) gate = MatMul (a, b) out = MatMul (gate, f) }
    """
    assert not exact_in_tf32(parsed(text))
