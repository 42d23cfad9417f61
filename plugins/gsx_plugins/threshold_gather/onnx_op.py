"""`ThresholdGather` for ONNX: schema and body.

The body needs NonZero, which TensorRT-RTX 1.7 refuses; there the plugin is used. A comparison with a NaN score is
false, so it is not kept.
"""

from gsx_plugins.domain import OnnxOp

THRESHOLD_GATHER = OnnxOp(
    name="ThresholdGather",
    inputs=[("x", "T"), ("score", "float"), ("threshold", "float")],
    outputs=[("rows", "T"), ("index", "int64"), ("count", "int64")],
    body="""
        kept = Greater (score, threshold)
        found = NonZero (kept)
        flat = Constant <value_ints = [-1]> ()
        index = Reshape (found, flat)
        rows = Gather <axis = 0> (x, index)
        count = Size (index)
    """,
    doc="rows of x whose score exceeds their threshold, in token order",
)
