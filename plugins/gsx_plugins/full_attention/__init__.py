"""`FullAttention`: attention of every token (README.md in this folder)."""
