"""Quantization: which products of a graph run in 8 bits, with which scales, and what that costs.

Read `scheme.py` first. `watch.py` records the inputs of every linear layer on the rows that it really gets,
`smoothing.py` moves large channels from activations to weights, `plan.py` decides what is quantized and how, `qdq.py`
writes that into a graph, and `sensitivity.py` finds the layers that should stay in full precision.
"""
