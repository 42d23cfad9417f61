"""The passes of the lowering for ONNX Runtime, and what they share; `lowering/onnxruntime.py` orders them."""
