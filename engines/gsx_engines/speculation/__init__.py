"""Self-speculative decoding: what drafts, how it is written, how far it goes before the model looks."""
