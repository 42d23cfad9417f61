"""`FullAttention` for ONNX: schema and body.

A name for "attention over the cache" in models and branches without gates, so that a runner can replace it by its own
kernel. The body is ONNX's Attention, with the heads on an axis of their own.
"""

from gsx_plugins.domain import OnnxOp

FULL_ATTENTION = OnnxOp(
    name="FullAttention",
    inputs=[("query", "T"), ("key", "T"), ("value", "T"), ("mask", "bool")],
    outputs=[("rows", "T")],
    attributes=("num_heads",),
    numbers=("scale", "softcap"),
    body="""
        outer = Shape <start = 0, end = 2> (query)
        heads = Constant <value_int: int = @num_heads> ()
        first = Constant <value_ints = [0]> ()
        heads_1d = Unsqueeze (heads, first)
        rest = Constant <value_ints = [-1]> ()
        split_shape = Concat <axis = 0> (outer, heads_1d, rest)
        split = Reshape (query, split_shape)
        query_4d = Transpose <perm = [0, 2, 1, 3]> (split)
        attended = Attention <scale: float = @scale, softcap: float = @softcap> (query_4d, key, value, mask)
        merged = Transpose <perm = [0, 2, 1, 3]> (attended)
        flat_shape = Concat <axis = 0> (outer, rest)
        rows = Reshape (merged, flat_shape)
    """,
    doc="attention of all tokens of the call among all tokens' keys and values",
)
