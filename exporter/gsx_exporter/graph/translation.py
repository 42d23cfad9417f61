"""Translating a traced program to ONNX, with a cache on disk.

Translating takes most of the time of a dense export (measured: three quarters of tracing), and many exports of a model
differ only in what is stored beside the graph: budget, thresholds, quantization. The cache's key is the program itself,
so that whatever changes a node changes the key.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from google.protobuf.message import DecodeError
from onnxscript import opset23, values

from gsx_plugins import domain, library
from gsx_plugins.files import cache_folder, writing_file

if TYPE_CHECKING:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

_GSX = values.Opset(domain.DOMAIN, domain.OPSET_VERSION)
_PLUGIN = {"plugin_namespace": library.PLUGIN_NAMESPACE, "plugin_version": library.PLUGIN_VERSION}


def translate(exported: torch.export.ExportedProgram) -> onnx.ModelProto:
    """A program as an ONNX model, by `torch.onnx.export(dynamo=True)` or from the cache."""
    path = cache_folder() / "translations" / f"{_key(exported)}.onnx"
    with suppress(OSError, DecodeError):
        return onnx.load_model_from_string(path.read_bytes())
    with quiet(), _torchlib_made_once():
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=domain.ONNX_OPSET,
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    with suppress(OSError):  # a cache that cannot be written is not an error
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_file(path) as work:
            work.write_bytes(model.SerializeToString(deterministic=True))
    return model


def _key(exported: torch.export.ExportedProgram) -> str:
    """Hash of everything that the ONNX model depends on: who translates, and the program with its shapes, types, and
    constants."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    parts: list[object] = [*(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript", "gsx"))]
    parts += [domain.DOMAIN, domain.OPSET_VERSION, domain.ONNX_OPSET, _PLUGIN, exported.graph_signature]
    parts += [(node.format_node(), node.meta.get("val")) for node in exported.graph.nodes]
    parts += [sorted(exported.range_constraints.items(), key=str)]
    digest.update("\n".join(map(str, parts)).encode())
    for name, value in sorted({**exported.constants, **exported.state_dict}.items()):
        digest.update(f"\n{name} {value.dtype} {value.shape}\n".encode() + _bytes(value))
    return digest.hexdigest()


def _bytes(value: torch.Tensor) -> bytes:
    return value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _translations() -> dict[Any, Any]:
    """Torch op -> the function that translates it to ONNX nodes."""

    def threshold(x: Any, score: Any, tau: Any) -> Any:
        return _GSX.ThresholdGather(x, score, tau, **_PLUGIN)

    def topk(x: Any, score: Any, k: Any) -> Any:
        return _GSX.TopKGather(x, score, k, **_PLUGIN)

    def scatter(residual: Any, rows: Any, gate: Any, index: Any) -> Any:
        return _GSX.GatedScatterAdd(residual, rows, gate, index, **_PLUGIN)

    def attention(
        query: Any,
        index: Any,
        key: Any,
        value: Any,
        mask: Any,
        num_heads: int,
        scale: float = 0.0,
        softcap: float = 0.0,
    ) -> Any:
        given = _given(scale=scale, softcap=softcap)
        return _GSX.GatheredAttention(query, index, key, value, mask, num_heads=num_heads, **given, **_PLUGIN)

    def every(
        query: Any, key: Any, value: Any, mask: Any, num_heads: int, scale: float = 0.0, softcap: float = 0.0
    ) -> Any:
        given = _given(scale=scale, softcap=softcap)
        return _GSX.FullAttention(query, key, value, mask, num_heads=num_heads, **given, **_PLUGIN)

    def experts(x: Any, logits: Any, gate: Any, up: Any, down: Any, top_k: int, normalized: bool) -> Any:
        form = {"top_k": top_k, "normalized": int(normalized)}
        return _GSX.RoutedExperts(x, logits, gate, up, down, **form, **_PLUGIN)

    def norm(x: Any, weight: Any, eps: float) -> Any:
        return opset23.RMSNormalization(x, weight, epsilon=eps)

    return {
        torch.ops.gsx.rms_norm.default: norm,
        torch.ops.gsx.full_attention.default: every,
        torch.ops.gsx.routed_experts.default: experts,
        torch.ops.gsx.threshold_gather.default: threshold,
        torch.ops.gsx.topk_gather.default: topk,
        torch.ops.gsx.gated_scatter_add.default: scatter,
        torch.ops.gsx.gathered_attention.default: attention,
    }


@functools.cache
def _torchlib(opset_version: int) -> ONNXRegistry:
    """PyTorch's own translations of its ops."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return ONNXRegistry.from_torchlib(opset_version)


@contextmanager
def _torchlib_made_once() -> Iterator[None]:
    """Let `torch.onnx.export` read PyTorch's own translations from memory.

    It reads the sources of all of them in every call, which takes almost half of its time, and has no option for
    another way. So its private maker is replaced while it runs; each call gets a copy, since it adds our ops to it. In
    a version of PyTorch that lacks it, translating takes longer and nothing else changes.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        made = ONNXRegistry.__dict__["from_torchlib"]
        _torchlib(domain.ONNX_OPSET)
    except (ImportError, KeyError, TypeError):
        yield
        return

    def copied(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(_torchlib(opset_version))
        registry.functions = {target: list(known) for target, known in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = made  # type: ignore[method-assign]


def _given(**numbers: float) -> dict[str, float]:
    """Attributes that are set; 0 stands for their default."""
    return {name: number for name, number in numbers.items() if number}


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch's notes about packages that are not installed; errors are still raised."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
