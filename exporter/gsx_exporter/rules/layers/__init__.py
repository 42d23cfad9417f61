"""Sets of layers as a run-time input, including Unified Layer Skipping."""
