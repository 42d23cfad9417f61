"""Tracing one part of the decoder to ONNX nodes, with weights as inputs.

A decoder has few distinct parts (entry, one or two kinds of layer, exit). Each is traced once with `torch.export` and
translated by `torch.onnx.export(dynamo=True)`; `assemble.py` repeats the nodes for every layer. So tracing time and
memory do not grow with depth, no weight is ever in memory, and the name of every value shows where it belongs.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from onnxscript import opset23, values
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gsx_plugins import domain, library
from gsx_plugins.graph import Graph
from gsx_plugins.registry import register_all

_GSX = values.Opset(domain.DOMAIN, domain.OPSET_VERSION)
_PLUGIN = {"plugin_namespace": library.PLUGIN_NAMESPACE, "plugin_version": library.PLUGIN_VERSION}


@dataclass(frozen=True)
class Input:
    """An input of a part: shape and type of an example, and which axes are dynamic."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    dynamic: tuple[int, ...] = ()


@dataclass(frozen=True)
class Part:
    """ONNX nodes of a part of the decoder.

    Args:
        graph: the nodes, and the small constants that they read.
        weights: parameter name of the torch module -> value name in the graph.
        inputs, outputs: value names, in the order of the traced function.
    """

    graph: Graph
    weights: Mapping[str, str]
    inputs: Sequence[str]
    outputs: Sequence[str]


class _Functional(nn.Module):
    """Calls a module with weights that are passed as an argument (the module itself stays on the meta device)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._hidden = [module]  # a list hides it from torch's module tree, so that no weight is exported

    def forward(self, weights: dict[str, Tensor], inputs: Sequence[Tensor]) -> Any:
        return torch.func.functional_call(self._hidden[0], weights, tuple(inputs))


def trace(module: nn.Module, inputs: Mapping[str, Input], outputs: Sequence[str]) -> Part:
    """Trace a module whose parameters are on the meta device.

    Args:
        module: takes the inputs in order and returns a tensor or a tuple of tensors.
        inputs: name -> example; an example's dynamic axes should have distinct sizes above 1.
        outputs: names of the values that it returns.
    Returns: the part, with the inputs and outputs under these names.
    """
    register_all()
    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in module.named_parameters()}
        examples = [torch.empty(i.shape, dtype=i.dtype) for i in inputs.values()]
    dynamic = [dict.fromkeys(i.dynamic, torch.export.Dim.AUTO) for i in inputs.values()]
    with _quiet():
        exported = torch.export.export(
            _Functional(module),
            (weights, examples),
            dynamic_shapes=({name: {} for name in weights}, dynamic),
            strict=False,
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=domain.ONNX_OPSET,
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    assert not model.functions, "standard ops only: a function of onnxscript was left in the graph"
    names = [value.name for value in model.graph.input]
    assert len(names) == len(weights) + len(examples), "an input was dropped in tracing"
    renamed = dict(zip(names[len(weights) :], inputs, strict=True))
    renamed.update(zip((value.name for value in model.graph.output), outputs, strict=True))
    graph = Graph(model.graph)
    taken = set(renamed.values())
    for node in graph.nodes:  # torch's names for intermediate values must not collide with ours
        renamed |= {name: graph.fresh(name, taken) for name in node.output if name in taken and name not in renamed}
        del node.metadata_props[:]
        node.doc_string = ""
    graph.rename(renamed)
    return Part(graph, dict(zip(weights, names[: len(weights)], strict=True)), list(inputs), list(outputs))


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


def _given(**numbers: float) -> dict[str, float]:
    """Attributes that are set; 0 stands for their default."""
    return {name: number for name, number in numbers.items() if number}


@contextmanager
def _quiet() -> Any:
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
