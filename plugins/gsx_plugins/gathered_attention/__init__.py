"""`GatheredAttention`: attention whose queries are the kept rows (README.md in this folder)."""
