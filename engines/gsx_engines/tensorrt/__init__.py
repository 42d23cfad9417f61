"""TensorRT and TensorRT-RTX: choosing between them, loading their libraries, and using the GPU."""
