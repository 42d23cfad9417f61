"""Products of quantized graphs run in 8 bits in the engine, or the build names those that do not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from gsx.cli import run
from gsx.cli.build import warnings_of
from gsx.workflows.quantize import Quantize
from gsx_engines.building.build import build
from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.loading import ENGINES
from gsx_exporter.quantization.scheme import SchemeName
from tests.engines.built import BRANCHES, LAYERS, Plugins, build_small, check, edit_graph, needs_plugins

INT8 = Quantize("int8", ("none",))


@pytest.mark.parametrize("plugins", ["none", "auto"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_products_run_in_8_bits(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, scheme: SchemeName, plugins: Plugins
) -> None:
    """Every quantized product of the graph, according to the builder's report of the engine; FP8 if the GPU has it."""
    if plugins == "auto":
        needs_plugins()
    quantize = Quantize(scheme, ("none",))
    directory = Path(shutil.copytree(make_tiny_bundle(precision="fp16", quantize=quantize), tmp_path / "bundle"))
    name, entry = build(directory, plugins=plugins, context=64)
    check(directory, name, entry)
    assert ("80" in entry.targets) == (scheme == "int8")
    assert {"89", "120"} <= set(entry.targets)
    graph = entry.graphs["model"]
    # Seven a layer; gates are in float32; of the head, only the weights are in 8 bits.
    assert graph.products == {{"int8": "int8", "fp8": "float8"}[scheme]: 7 * LAYERS, "float": BRANCHES, "float16": 1}
    assert graph.widened == ()
    assert not [warning for warning in warnings_of(entry) if "8 BITS" in warning]


def test_weights_in_4_bits_are_built_without_zero_points(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """The engine has the 4-bit codes; what zero-points add is computed beside each product."""
    directory = Path(
        shutil.copytree(make_tiny_bundle(precision="fp16", quantize=Quantize("int4", ("none",))), tmp_path / "bundle")
    )
    name, entry = build_small(directory, plugins="none")
    check(directory, name, entry)
    graph = entry.graphs["model"]
    assert graph.products == {"float16": 7 * LAYERS + 1, "float": BRANCHES}


def test_a_product_that_does_not_run_in_8_bits_is_named(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes with a scale for each channel must be dequantized before they are multiplied."""
    directory = Path(shutil.copytree(make_tiny_bundle(precision="fp16", quantize=INT8), tmp_path / "bundle"))
    name = "layers.1.self_attn.o_proj"

    def scale_channels(model: onnx.ModelProto) -> None:
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        width = constants[f"{name}.weight"].dims[0]
        for tensor in (constants[f"{name}.input.scale"], constants[f"{name}.input.zero"]):
            values = np.repeat(numpy_helper.to_array(tensor), width)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    edit_graph(directory, scale_channels)
    _, entry = build_small(directory, plugins="none")
    graph = entry.graphs["model"]
    assert graph.widened == (f"{name}.weight",)
    assert graph.products["int8"] == 7 * LAYERS - 1
    (loud, _) = warnings_of(entry)
    assert loud.startswith("WARNING: 1 quantized product DOES NOT RUN IN 8 BITS")
    assert f"model: {name}.weight" in loud
    assert run(["inspect", str(directory)]) == 0
    assert "20 int8; 1 quantized ones do not run in 8 bits" in capsys.readouterr().out


def test_a_target_without_fp8_is_refused(make_tiny_bundle: Callable[..., Path]) -> None:
    directory = make_tiny_bundle(precision="fp16", quantize=Quantize("fp8", ("none",)))
    with pytest.raises(EngineError, match=r"FP8 products.*\n.*8\.9 \(Ada\).*12\.0.*found 8\.6\n.*--int8"):
        build(directory, targets=["8.6", "8.9"])
    assert not (directory / ENGINES).exists()
