"""The ONNX files of a bundle: written with references to its weights file, and their entries in the manifest."""

from __future__ import annotations

from pathlib import Path

import onnx

from gsx_engines.bundle.bundle import sha256_of
from gsx_engines.bundle.manifest import GraphEntry
from gsx_engines.bundle.tensors import tensor_info
from gsx_exporter.graph.assemble import Graphs
from gsx_exporter.graph.weights import WeightsFile


def write_graphs(work: Path, graphs: Graphs, weights: WeightsFile) -> dict[str, GraphEntry]:
    """Write `{name}.onnx` for each graph; initializers refer to the weights file. Returns: the manifest's entries."""
    entries = {}
    for name, model in graphs.models.items():
        read = {value for node in model.graph.node for value in node.input}
        model.graph.initializer.extend(tensor for key, tensor in weights.initializers.items() if key in read)
        path = work / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        entries[name] = _entry(model, path)
    return entries


def _entry(model: onnx.ModelProto, path: Path) -> GraphEntry:
    ops = {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node}
    return GraphEntry(
        file=path.name,
        sha256=sha256_of(path),
        inputs=tuple(tensor_info(value) for value in model.graph.input),
        outputs=tuple(tensor_info(value) for value in model.graph.output),
        ops=tuple(sorted(ops)),
    )
