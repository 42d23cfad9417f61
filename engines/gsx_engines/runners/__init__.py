"""Runners: one interface to execute a bundle's graphs, one module a runtime."""
