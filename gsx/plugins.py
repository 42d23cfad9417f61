"""The custom ops: a list of them, and the native library with their CUDA kernels and TensorRT plugins.

`gsx.plugins.build()` is the command `gsx plugins build`, and `gsx.plugins.list()` is `gsx plugins list`.
"""

from gsx.workflows.plugins import build_plugins as build
from gsx.workflows.plugins import list_plugins as list

__all__ = ["build", "list"]
