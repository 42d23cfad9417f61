"""From traced torch modules to one ONNX model: trace the parts, stitch them, write the weights once."""
