"""TensorRT and TensorRT-RTX: which of the two, its libraries, and the GPU under them."""
