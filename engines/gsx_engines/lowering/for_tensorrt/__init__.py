"""The lowering passes for TensorRT, and what they share; `lowering/tensorrt.py` has their order."""
