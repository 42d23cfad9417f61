"""Self-speculative decoding: the drafts, their textual form, and how many tokens they draft before a verification."""
