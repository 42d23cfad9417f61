"""Serving a bundle: many requests on one runner, and model repositories for Triton Inference Server."""
