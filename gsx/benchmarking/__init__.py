"""Timing runtimes against each other: rounds in turn, a process for each, and what `gsx bench` reports."""
