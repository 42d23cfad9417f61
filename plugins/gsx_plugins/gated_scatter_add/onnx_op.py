"""`GatedScatterAdd` for ONNX: schema and body.

Written as gather, add and scatter, since TensorRT-RTX refuses ScatterND with a reduction. This works because the
indices are distinct.
"""

from gsx_plugins.domain import OnnxOp

GATED_SCATTER_ADD = OnnxOp(
    name="GatedScatterAdd",
    inputs=[("residual", "T"), ("rows", "T"), ("gate", "T"), ("index", "int64")],
    outputs=[("out", "T")],
    body="""
        before = Gather <axis = 0> (residual, index)
        gated = Mul (gate, rows)
        after = Add (before, gated)
        last = Constant <value_ints = [-1]> ()
        place = Unsqueeze (index, last)
        out = ScatterND (residual, place, after)
    """,
    doc="residual with gate * rows added at the rows that index names",
)
