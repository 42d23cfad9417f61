"""`ThresholdGather`: the rows whose score exceeds a threshold, in token order (README.md in this folder)."""
