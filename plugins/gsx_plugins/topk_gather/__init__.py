"""`TopKGather`: the rows of the K best scores, in token order (README.md in this folder)."""
