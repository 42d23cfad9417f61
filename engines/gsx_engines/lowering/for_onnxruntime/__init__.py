"""The lowering passes for ONNX Runtime, and what they share; `lowering/onnxruntime.py` has their order."""
