"""Tracing one part of the decoder to ONNX nodes, with weights as inputs.

A decoder has few distinct parts (entry, one or two kinds of layer, exit). Each is traced once with `torch.export` and
translated to ONNX (`translation.py`); `assemble.py` repeats the nodes for every layer. So tracing time and
memory do not grow with depth, no weight is ever in memory, and the name of every value shows where it belongs.

Exports of one process (`gsx compare` and `gsx tune` make many) share the traces of equal parts: another budget, other
thresholds and scales, or a draft beside the model leave most parts as they are.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gsx_exporter.graph.translation import quiet, translate
from gsx_plugins.graph import Graph
from gsx_plugins.registry import register_all


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
    model = onnx.load_model_from_string(translated(Asked(_description(module), tuple(inputs.values()), module)))
    weights = [name for name, _ in module.named_parameters()]
    names = [value.name for value in model.graph.input]
    assert len(names) == len(weights) + len(inputs), "an input was dropped in tracing"
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


# Parts of different decoders that are remembered. A decoder has about three, of some 20 KB each.
_MOST_PARTS = 128


@dataclass(frozen=True)
class Asked:
    """What to trace; equal for modules that have the same description.

    Args: description: see `_description`; inputs: the examples, in order; module: any with this description.
    """

    description: bytes | int
    inputs: tuple[Input, ...]
    module: nn.Module = field(compare=False)


def _description(module: nn.Module) -> bytes | int:
    """All that a module is: its classes, its attributes, the shapes and types of its parameters.

    Returns: the hash of its pickled form; its id if it has none (a rule from outside may hold a function without a
        name): such a module is equal only to itself.
    """
    try:
        return hashlib.sha256(pickle.dumps(module)).digest()
    except (pickle.PicklingError, AttributeError, TypeError):
        return id(module)


@functools.lru_cache(_MOST_PARTS)
def translated(asked: Asked) -> bytes:
    """A traced module as a serialized ONNX model, which its readers may change: each gets its own."""
    register_all()
    with FakeTensorMode():
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in asked.module.named_parameters()}
        examples = [torch.empty(i.shape, dtype=i.dtype) for i in asked.inputs]
    dynamic = [dict.fromkeys(i.dynamic, torch.export.Dim.AUTO) for i in asked.inputs]
    with quiet():
        exported = torch.export.export(
            _Functional(asked.module),
            (weights, examples),
            dynamic_shapes=({name: {} for name in weights}, dynamic),
            strict=False,
        )
    model = translate(exported)
    assert not model.functions, "standard ops only: a function of onnxscript was left in the graph"
    return model.SerializeToString()
