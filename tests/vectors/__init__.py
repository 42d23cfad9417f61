"""Vectors that the Python loop wrote and that the C++ runtime must repeat, and the toy model that both run."""
