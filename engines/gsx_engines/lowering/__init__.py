"""Rewriting a portable graph, while it is loaded, into what a runtime runs best. The file stays as it is."""
