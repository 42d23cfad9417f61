"""The traceable decoder: every family in one small set of torch modules, written for export.

Read `layer.py` first. Weights are laid out [in, out], as ONNX's MatMul wants them.
"""
