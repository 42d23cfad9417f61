"""FFN-SkipLLM: after an FFN that hardly changed a token's state, the next FFNs are skipped for that token."""
