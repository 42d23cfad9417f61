"""`GatheredAttention`: attention whose queries are the kept rows (README.md beside this file)."""
