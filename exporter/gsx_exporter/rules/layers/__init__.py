"""Sets of layers as a run-time input, and Unified Layer Skipping."""
