"""The traceable decoder: one small set of torch modules for all families, written for export.

Read `layer.py` first. Linear weights are [in, out], as ONNX's MatMul reads them.
"""
