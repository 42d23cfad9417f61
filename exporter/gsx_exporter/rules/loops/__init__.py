"""The number of loops as a run-time input."""
