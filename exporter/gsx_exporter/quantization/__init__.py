"""Low precision: which products of a graph run in 8 bits, with which scales, and what that costs.

Read `scheme.py` first. `watch.py` looks at the inputs of every linear layer on the rows that it really gets,
`smoothing.py` moves large channels from activations to weights, `plan.py` says what is quantized how, `qdq.py` writes
it into a graph, and `sensitivity.py` finds out which layers are better left alone.
"""
