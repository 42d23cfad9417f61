"""The reference: Hugging Face's own model under a keep rule, said with masks. Parity compares the graphs with it."""
