"""`GatheredAttention` for ONNX: schema and body.

The portable body scatters the query rows to their positions, computes dense attention, and gathers the rows again:
Attention needs a rectangular query with at least one row (ONNX Runtime refuses a query of length 0, and TensorRT
refuses Attention inside `If`). This wastes the attention product of skipped rows, but no projection. A runner may
replace the body by one that avoids this waste (gsx_engines/lowering).
"""

from gsx_plugins.domain import OnnxOp

GATHERED_ATTENTION = OnnxOp(
    name="GatheredAttention",
    inputs=[("query", "T"), ("index", "int64"), ("key", "T"), ("value", "T"), ("mask", "bool")],
    outputs=[("rows", "T")],
    attributes=("num_heads",),
    numbers=("scale", "softcap"),
    body="""
        batch = Shape <start = 0, end = 1> (mask)
        length = Shape <start = 2, end = 3> (mask)
        tokens = Mul (batch, length)
        width = Shape <start = 1, end = 2> (query)
        flat_shape = Concat <axis = 0> (tokens, width)
        zeros = ConstantOfShape (flat_shape)
        empty = CastLike (zeros, query)
        last = Constant <value_ints = [-1]> ()
        place = Unsqueeze (index, last)
        full = ScatterND (empty, place, query)
        heads = Constant <value_int: int = @num_heads> ()
        first = Constant <value_ints = [0]> ()
        heads_1d = Unsqueeze (heads, first)
        split_shape = Concat <axis = 0> (batch, length, heads_1d, last)
        split = Reshape (full, split_shape)
        query_4d = Transpose <perm = [0, 2, 1, 3]> (split)
        attended = Attention <scale: float = @scale, softcap: float = @softcap> (query_4d, key, value, mask)
        merged = Transpose <perm = [0, 2, 1, 3]> (attended)
        all_rows = Reshape (merged, flat_shape)
        rows = Gather <axis = 0> (all_rows, index)
    """,
    doc="attention of the rows that index names, among all tokens' keys and values",
)
