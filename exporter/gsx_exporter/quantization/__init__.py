"""Quantization: which products of a graph run in few bits, with which scales and codes, and what that costs.

Read `scheme.py` first. `watch.py` records the inputs of every linear layer on the rows that it really gets,
`smoothing.py` moves large channels from activations to weights, `plan.py` decides what is quantized and how,
`choose.py` chooses the codes on a text, `qdq.py` writes all that into a graph, `simulate.py` measures what a plan
costs, and `sensitivity.py` spares the products that lose most.
"""
