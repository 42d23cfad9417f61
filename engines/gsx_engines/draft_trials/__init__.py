"""Trying drafts out: what of them would be accepted, and what they gain over plain decoding."""
