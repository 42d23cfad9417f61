"""`FullAttention`: attention of every token (README.md beside this file)."""
