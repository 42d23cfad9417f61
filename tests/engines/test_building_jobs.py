"""One build in its process: what TensorRT refuses is reported in a message, and a crash stays in that process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gsx_engines.building.build import build
from gsx_engines.building.job import Job, run_job
from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.loading import ENGINES
from gsx_plugins.domain import DOMAIN, OPSET_VERSION, node
from gsx_plugins.library import find_library
from gsx_plugins.registry import OPS
from tests.engines.built import needs_plugins


def job_of(model: onnx.ModelProto, folder: Path) -> Job:
    graph = folder / "graph.onnx"
    graph.write_bytes(model.SerializeToString())
    return Job(
        backend="tensorrt-rtx",
        graph=str(graph),
        beside=str(graph),
        engine=str(folder / "out.engine"),
        targets=("89",),
        profiles=(),
        plugins=None,
        plugin_nodes=(),
        products=tuple(node.name for node in model.graph.node if node.op_type == "MatMul"),
        timing_cache=None,
    )


@pytest.mark.parametrize(
    ("op", "kind", "reason"),
    [("NonZero", TensorProto.INT64, "plugin"), ("Unique", TensorProto.FLOAT, "UNSUPPORTED_NODE, says checkUnique")],
)
def test_a_refused_op_is_named_with_its_node(tmp_path: Path, op: str, kind: int, reason: str) -> None:
    refused = helper.make_node(op, ["x"], ["y"], name="layers.7.refused")
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("y", kind, None),
    ]
    graph = helper.make_graph([refused], "refused", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    with pytest.raises(EngineError, match=rf"refuses the op {op} of node 'layers.7.refused'\n.*{reason}"):
        run_job(job_of(model, tmp_path), "model")
    assert not (tmp_path / "out.engine").exists()


def test_a_parser_that_crashes_takes_only_its_own_process_down(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """TensorRT-RTX 1.7.1 segfaults on a TopK whose k only the device knows, as in the portable graph."""
    directory = make_tiny_bundle(select="rank", calibration=None)
    model = onnx.load(str(directory / "model.onnx"))
    with pytest.raises(EngineError, match=r"crashed while|refuses the op|could not build"):
        run_job(job_of(model, tmp_path), "model")


def test_fewer_plugin_layers_than_meant_is_an_error(bundle: Path, tmp_path: Path) -> None:
    """If TensorRT ignored a plugin, the engine would not match its record."""
    plain = helper.make_node("Neg", ["x"], ["y"], name="neg")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([plain], "plain", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    job = job_of(model, tmp_path)
    with pytest.raises(
        EngineError, match="1 of 1 nodes that should be plugins became other layers, the first is 'neg'"
    ):
        run_job(Job(**{**job.__dict__, "plugin_nodes": ("neg",)}), "model")


def test_peak_memory_is_that_of_the_process_that_builds(tmp_path: Path) -> None:
    """And not of the process that started it, which has loaded PyTorch in `gsx export --build`."""
    plain = helper.make_node("Neg", ["x"], ["y"], name="neg")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([plain], "plain", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    ballast = np.ones(1 << 27)
    built = run_job(job_of(model, tmp_path), "model")
    assert 1 << 26 < built.peak_bytes < ballast.nbytes


def test_what_a_plugin_refuses_is_reported_with_its_message(tmp_path: Path) -> None:
    """Scores must be float32 whatever the graph's precision: the plugin says so, and its message reaches the user."""
    needs_plugins()
    op = OPS["ThresholdGather"]
    types = {"x": TensorProto.FLOAT16, "score": TensorProto.FLOAT16, "threshold": TensorProto.FLOAT}
    shapes: dict[str, list[int]] = {"x": [8, 16], "score": [8], "threshold": []}
    call = node(op, list(types), ["rows", "index", "count"], "layers.0.choice")
    graph = helper.make_graph(
        [call],
        "half scores",
        [helper.make_tensor_value_info(name, kind, shapes[name]) for name, kind in types.items()],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT16, ["k", 16])],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11, functions=[op.function()])
    job = Job(**{**job_of(model, tmp_path).__dict__, "plugins": str(find_library()), "plugin_nodes": (call.name,)})
    with pytest.raises(EngineError, match=r"ThresholdGather: input score is .*, expected float"):
        run_job(job, "model")


def test_the_reason_of_a_failure_and_not_the_missing_driver(bundle: Path) -> None:
    with pytest.raises(
        EngineError,
        match=r"could not build an engine\n.*Turing \(SM75\): FP32 GEMM is not supported.*\n.*8\.0 or later",
    ):
        build(bundle, plugins="none", context=64, targets=["7.5"])
    assert not (bundle / ENGINES).exists()
