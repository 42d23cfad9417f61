"""The types that an exported model computes in and stores, and which of them can be combined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.words import Precision
from gsx_engines.lowering.for_onnxruntime.probe import is_supported
from gsx_exporter.config import ModelConfig
from gsx_exporter.quantization.scheme import SCHEMES
from gsx_exporter.rules.plan import RulePlan
from gsx_plugins.errors import UsageError

KvCacheType = Literal["int8"]
_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True)
class NumberTypes:
    """The types requested for an export.

    Args:
        precision: of weights and activations.
        quantize: what runs in 8 bits; None if nothing does.
        kv_cache: type in which ONNX Runtime stores K and V; None for that of the activations.
    """

    precision: Precision = "fp32"
    quantize: Quantize | None = None
    kv_cache: KvCacheType | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and activations."""
        return _DTYPES[self.precision]

    @property
    def reads_text(self) -> bool:
        """Whether text is needed, to find ranges or to measure a cost."""
        return self.kv_cache is not None or self.quantize is not None

    def check(self, config: ModelConfig, keep: RulePlan) -> None:
        """Refuse types that the checkpoint, its keep rule or the runtimes do not support.

        Raises:
            UsageError: 8-bit products together with routers; 8-bit K and V of loops, or that no runtime can store.
        """
        if config.loops is not None and self.kv_cache is not None:
            raise UsageError(
                "K and V in 8 bits are not supported for looped models",
                expected=f"K and V in {self.precision}",
                found=f"a {config.family} model, whose caches of later loops have ranges of their own",
                todo="export without --kv-cache",
            )
        if self.quantize is not None and config.router is not None:
            raise UsageError(
                "quantization is not supported for checkpoints with routers",
                expected="fp32, fp16 or bf16",
                found="routers, whose inputs smoothing would change",
                todo="export without --int8, --int4 and --fp8",
            )
        if self.kv_cache is not None:
            self._check_kv_cache(config, keep)

    def _check_kv_cache(self, config: ModelConfig, keep: RulePlan) -> None:
        reason: str | None = None
        found = ""
        float8 = self.quantize is not None and SCHEMES[self.quantize.scheme].is_float8
        if self.precision != "fp32" or float8:
            reason = (
                "ONNX Runtime combines codes only with float32 on a CPU, and TensorRT's K/V update takes only floats"
            )
            found = self.precision if self.precision != "fp32" or self.quantize is None else self.quantize.scheme
        elif keep.kv_policy == "none" and config.router is not None:
            reason = "a skipped token is recognized by its zeros in the cache, and other values round to zero codes"
            found = "routers"
        elif not is_supported(config.head_dim, eight_bits=True):
            reason = "this ONNX Runtime has no attention over 8-bit codes for this head size"
            found = f"head size {config.head_dim}"
        if reason is not None:
            raise UsageError(
                f"--kv-cache int8: {reason}",
                expected="fp32, with or without --int8; no routers; a head size that is a multiple of 8",
                found=found,
                todo="export without --kv-cache",
            )
