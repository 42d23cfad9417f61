"""Tuning a model for a machine: the limit, what is remembered between runs, and the report."""
