"""`TopKGather` for ONNX: schema and body.

ONNX's TopK breaks ties by the smaller index, which is the rule that we need. The second TopK sorts the chosen rows into
token order (ONNX has no sort). NaN counts as the lowest finite score, which is above that of padding (-inf).
"""

from gsx_plugins.domain import OnnxOp

TOPK_GATHER = OnnxOp(
    name="TopKGather",
    inputs=[("x", "T"), ("score", "float"), ("k", "int64")],
    outputs=[("rows", "T"), ("index", "int64"), ("count", "int64")],
    body="""
        nan = IsNaN (score)
        lowest = Constant <value_float = -3.4028234663852886e38> ()
        ranked = Where (nan, lowest, score)
        best, chosen = TopK <axis = 0, largest = 1, sorted = 1> (ranked, k)
        index, order = TopK <axis = 0, largest = 0, sorted = 1> (chosen, k)
        rows = Gather <axis = 0> (x, index)
        count = Size (index)
    """,
    doc="rows of x with the k best scores, in token order",
)
