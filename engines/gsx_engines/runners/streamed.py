"""The portable graph, a layer at a time: for bundles that are larger than memory.

The graph is cut behind every layer. Each part is opened with its own weights, run once, and closed; the values that
later parts read wait in between. What it computes is what `portable.py` computes, operation by operation, without a
cache of earlier calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

from gsx_engines.bundle import tensor_names
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.runners.portable import TYPES, portable_model
from gsx_engines.runners.session import open_session, session_config
from gsx_plugins.graph import Graph
from gsx_plugins.progress import OnProgress, Progress, silent

Values = dict[str, np.ndarray]


@dataclass
class _Part:
    """Nodes that are run together.

    Args:
        nodes: in the graph's order.
        reads: values from outside: inputs of the graph, or what earlier parts give.
        gives: values that are wanted, or that later parts read.
    """

    nodes: list[onnx.NodeProto]
    reads: list[str]
    gives: list[str] = field(default_factory=list)


class StreamedStage:
    """Runs the main graph of a bundle, one call without a past at a time.

    Args:
        bundle: an opened bundle.
        capture: names of values inside the graph that every call leaves in `captured`.
        on_progress: called after each part.
    Raises:
        BundleError: ONNX Runtime does not load a part.
    """

    def __init__(self, bundle: Bundle, *, capture: Sequence[str] = (), on_progress: OnProgress = silent) -> None:
        self.manifest = bundle.manifest
        self.dtype = TYPES[self.manifest.precision]
        self.captured: Values = {}
        self._bundle, self._capture, self._on_progress = bundle, list(capture), on_progress
        self._model = portable_model(bundle)
        self._graph = Graph(self._model.graph)
        self._inputs = {value.name: value for value in self._model.graph.input}
        self._parts = self._cut()

    def new_memory(self, batch: int, capacity: int) -> Values:
        """K and V by input name: nothing, before the call."""
        return {}

    def execute(
        self,
        memory: Values,
        input_ids: np.ndarray,
        attention_mask: np.ndarray,
        position_ids: np.ndarray,
        controls: RuntimeValues,
    ) -> Values:
        """As `PortableStage.execute`, from the beginning of a text.

        Args: memory: filled with K and V of the call, by input name.
        """
        shape = self.manifest.decoder
        empty = np.zeros((len(input_ids), shape.num_kv_heads, 0, shape.head_dim), self.dtype)
        past = tensor_names.past_of(range(shape.num_caches))
        values: Values = {
            tensor_names.INPUT_IDS: input_ids,
            tensor_names.POSITION_IDS: position_ids,
            tensor_names.ATTENTION_MASK: attention_mask,
            **{name: np.asarray(value) for name, value in controls.items()},
            **dict.fromkeys(past, empty),
        }
        last = {name: number for number, part in enumerate(self._parts) for name in part.reads}
        wanted = {*self._capture, *(tensor_names.present_after(name) for name in past), tensor_names.LOGITS}
        for number, part in enumerate(self._parts):
            values |= self._run(part, values)
            for name in [name for name in values if last.get(name, -1) <= number and name not in wanted]:
                del values[name]
            self._on_progress(Progress("portable graph, part by part", number + 1, len(self._parts)))
        for name in past:
            memory[name] = values.pop(tensor_names.present_after(name))
        self.captured = {name: values[name] for name in self._capture}
        return {name: values[name] for name in (tensor_names.LOGITS, *self._capture)}

    def _run(self, part: _Part, values: Mapping[str, np.ndarray]) -> Values:
        graph = self._graph
        inputs = []
        for name in part.reads:
            if name in self._inputs:
                inputs.append(self._inputs[name])
            elif name in values:
                array = values[name]
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                inputs.append(helper.make_tensor_value_info(name, kind, [None] * array.ndim))
        read = {name for node in part.nodes for name in graph.reads(node)} | set(part.reads)
        made = helper.make_graph(
            part.nodes,
            self._model.graph.name,
            inputs,
            [onnx.ValueInfoProto(name=name) for name in part.gives],
            [tensor for name, tensor in graph.constants.items() if name in read],
        )
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        model.graph.CopyFrom(made)
        config = session_config(self.manifest)
        session = open_session(model.SerializeToString(), self._bundle.directory, None, config)
        feeds: dict[str, Any] = {value.name: values[value.name] for value in inputs if value.name in values}
        return dict(zip(part.gives, session.run(part.gives, feeds), strict=True))

    def _cut(self) -> list[_Part]:
        """The graph in parts, each with what a layer gives; the last one gives the logits."""
        graph, layers = self._graph, range(self.manifest.decoder.num_layers)
        order = {id(node): number for number, node in enumerate(graph.nodes)}
        fixed = self._fixed()
        parts: list[_Part] = []
        done: set[str] = set()
        for targets in [*map(self._targets, layers), [tensor_names.LOGITS]]:
            found: dict[int, onnx.NodeProto] = {}
            reads: set[str] = set()
            left = list(targets)
            while left:
                name = left.pop()
                node = graph.producer(name)
                if name in done or node is None:
                    if name in done or name in self._inputs:
                        reads.add(name)
                elif id(node) not in found:
                    found[id(node)] = node
                    left += graph.reads(node)
            nodes = sorted(found.values(), key=lambda node: order[id(node)])
            parts.append(_Part(nodes, sorted(reads)))
            # What no input decides (weights made floats) is computed wherever it is read, and waits nowhere.
            done |= {name for node in nodes for name in node.output if name and name not in fixed}
        for number, part in enumerate(parts):
            later = {name for other in parts[number + 1 :] for name in other.reads}
            own = dict.fromkeys(name for node in part.nodes for name in node.output if name)
            wanted = self._targets(number) if number in layers else [tensor_names.LOGITS]
            part.gives = [name for name in own if name in later or name in wanted]
        return parts

    def _targets(self, layer: int) -> list[str]:
        """What is wanted of a layer, besides what later ones read."""
        own = f"layers.{layer}."
        return [
            *(self.manifest.decoder.present_of(layer, kind) for kind in tensor_names.KINDS),
            *(name for name in self._capture if name.startswith(own)),
        ]

    def _fixed(self) -> set[str]:
        """Values that depend on no input of the graph."""
        fixed = {name for name in self._graph.constants if name not in self._inputs}
        for node in self._graph.nodes:
            if all(name in fixed for name in self._graph.reads(node)):
                fixed |= {name for name in node.output if name}
        return fixed
