"""Runners: one interface for executing a bundle's graphs, with one module for each runtime."""
