"""The reference: Hugging Face's model with a keep rule applied by masks. Parity compares the graphs with it."""
