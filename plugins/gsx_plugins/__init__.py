"""Floor 1: the custom ops of domain `gsx`, with one folder for each op.

Every op has a torch op (eager, fake for tracing, autograd), an ONNX schema, and a function body of standard ops, so
that one file runs everywhere (docs/design.md, section 4). This package imports nothing else from the project, and the
ONNX half of every op does not import torch.
"""
