"""The runtimes that run a bundle and the devices that PyTorch runs on, as `--backend` and `--device` name them."""

from __future__ import annotations

from typing import Literal

BackendName = Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "torch"]
Device = Literal["cpu", "cuda"]
