"""From torch modules to ONNX graphs: trace each part, put the parts together, write the weights once."""
