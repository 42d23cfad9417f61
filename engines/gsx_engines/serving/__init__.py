"""Serving a bundle: many requests on one runner, and the model repository of Triton Inference Server."""
