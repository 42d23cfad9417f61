"""The C++ runtime: built here without TensorRT, and compared with Python."""
