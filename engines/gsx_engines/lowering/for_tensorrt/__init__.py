"""The passes of the lowering for TensorRT, and what they share; `lowering/tensorrt.py` orders them."""
