"""Rewrites a portable graph, while it is loaded, into the form that a runtime runs best. The file is unchanged."""
