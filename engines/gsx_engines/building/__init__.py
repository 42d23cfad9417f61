"""Building TensorRT engines from the graphs of a bundle; see docs/engines.md."""
