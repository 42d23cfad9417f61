"""FFN-SkipLLM: FFNs are skipped after one that hardly changed a token's state."""
