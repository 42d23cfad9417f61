"""Benchmarks: measured, never asserted. Each is a module with a command line; results go to RESULTS.md."""
