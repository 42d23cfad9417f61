"""Trying out drafts: how many of their tokens would be accepted, and how much they gain over plain decoding."""
