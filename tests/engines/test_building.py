"""Engines are really built, by TensorRT-RTX and without a GPU; and what a build must never do to a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gsx.cli import run
from gsx.cli.build import warnings_of
from gsx.workflows.quantize import Quantize
from gsx_engines.building import build as building
from gsx_engines.building import memory, placing
from gsx_engines.building.build import build
from gsx_engines.building.job import Job, run_job
from gsx_engines.building.placing import writing_engines
from gsx_engines.bundle.bundle import MANIFEST, Bundle, open_bundle, sha256_of
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.errors import BundleError, EngineError
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.cuda import Device
from gsx_engines.tensorrt.loading import ENGINE_FILE, ENGINES
from gsx_engines.tensorrt.preload import preload_tensorrt_rtx
from gsx_exporter.quantization.scheme import SchemeName
from gsx_plugins.domain import DOMAIN, OPSET_VERSION, node
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.library import find_library
from gsx_plugins.registry import OPS

preload_tensorrt_rtx()  # in the way that plugins work with, whichever test imports it first
rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
pytest.importorskip("polygraphy", reason='polygraphy is not installed: pip install "gsx[tensorrt]"')

LAYERS = 3  # of the tiny model
BRANCHES = 2 * LAYERS
INT8 = Quantize("int8", ("none",))
RTX = f"tensorrt-rtx-{rtx.__version__}"
SMALL = {"context": 64, "targets": ["8.9"]}


def needs_plugins() -> None:
    if find_library() is None:
        pytest.skip("no plugin library was built: gsx plugins build")


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def state(directory: Path) -> dict[str, str]:
    """Every file of a directory and its hash."""
    return {str(path.relative_to(directory)): sha256_of(path) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("plugins", ["none", "auto"])
def test_threshold_selection_with_and_without_plugins(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, precision: str, plugins: str
) -> None:
    if plugins == "auto":
        needs_plugins()
    options = {} if precision == "fp32" else {"precision": precision}
    directory = Path(shutil.copytree(make_tiny_bundle(**options), tmp_path / "bundle"))
    phases: list[str] = []
    name, entry = build(directory, plugins=plugins, on_progress=lambda p: phases.append(p.note), **SMALL)  # type: ignore[arg-type]
    assert name == f"{RTX}-sm89"
    check(directory, name, entry)
    graph = entry.graphs["model"]
    assert graph.layers["KV_CACHE_UPDATE"] == 2 * LAYERS
    assert graph.layers["ATTENTION_INPUT"] == LAYERS
    if plugins == "none":
        assert graph.forms == {"ThresholdGather": "mask", "GatheredAttention": "all", "GatedScatterAdd": "mask"}
        assert not any(layer.startswith("PLUGIN") for layer in graph.layers)
        assert entry.plugins is None
    else:
        assert graph.forms == {"ThresholdGather": "plugin", "GatheredAttention": "rows", "GatedScatterAdd": "plugin"}
        assert graph.layers["PLUGIN_V3"] == 2 * BRANCHES  # a choice and an addition each
        assert entry.plugins is not None
    assert {value.type for value in graph.inputs if value.name.startswith("past")} == {
        {"fp32": "float", "fp16": "float16", "bf16": "bfloat16"}[precision]
    }
    assert next(value for value in graph.outputs if value.name == "logits").type == "float"
    assert graph.peak_bytes > graph.size_bytes
    assert any("Building" in phase for phase in phases)


@pytest.mark.parametrize("plugins", ["none", "auto"])
def test_rank_selection_saves_without_plugins_too(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, plugins: str
) -> None:
    """TopKGather's body is imported, with k as an input on the host; with plugins the budget is the input."""
    if plugins == "auto":
        needs_plugins()
    directory = Path(shutil.copytree(make_tiny_bundle(select="rank", calibration=None), tmp_path / "bundle"))
    name, entry = build(directory, plugins=plugins, profiles=["prefill:2-16-48", "chunk:2-4-8", "decode:1"], **SMALL)  # type: ignore[arg-type]
    check(directory, name, entry)
    graph = entry.graphs["model"]
    inputs = {value.name for value in graph.inputs}
    if plugins == "none":
        assert graph.forms["TopKGather"] == "body"
        assert graph.layers["TOPK"] == 2 * BRANCHES
        assert "k" in inputs
        assert "budget" not in inputs
    else:
        assert graph.forms["TopKGather"] == "plugin"
        assert "budget" in inputs
    assert [profile.name for profile in entry.profiles] == ["prefill", "chunk", "decode"]


def test_a_batch_and_targets_side_by_side(bundle: Path) -> None:
    """Engines for other targets stay; the same ones are replaced."""
    first, _ = build(bundle, plugins="none", batch=2, **SMALL)  # type: ignore[arg-type]
    second, entry = build(bundle, plugins="none", context=64, targets=["sm80", "12.0"])
    assert (first, second) == (f"{RTX}-sm89", f"{RTX}-sm80-120")
    assert entry.targets == ("80", "120")
    before = open_bundle(bundle).manifest.engines
    assert set(before) == {first, second}
    assert before[first].profiles[0].batch.most == 2
    build(bundle, plugins="none", **SMALL)  # type: ignore[arg-type]
    after = open_bundle(bundle).manifest.engines
    assert after[first].profiles[0].batch.most == 1
    assert after[second] == before[second]
    assert sorted(path.name for path in (bundle / ENGINES).iterdir()) == sorted([first, second])


@pytest.mark.parametrize(
    ("plugins", "options"),
    [
        ("none", {}),
        ("auto", {}),
        ("none", {"precision": "fp16", "quantize": INT8}),
        ("auto", {"precision": "fp16"}),
    ],
    ids=["fp32, masks", "fp32, plugins", "int8, masks", "fp16, plugins"],
)
def test_k_and_v_that_grow(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, plugins: str, options: dict[str, Any]
) -> None:
    """The engine has the graph's own inputs and outputs, and stands beside the one that gsx runs."""
    if plugins == "auto":
        needs_plugins()
    directory = Path(shutil.copytree(make_tiny_bundle(**options), tmp_path / "bundle"))
    profiles = ["prompt:2-8-32", "step:1:1-1-4"]
    name, entry = build(directory, plugins=plugins, kv_layout="growing", profiles=profiles, **SMALL)  # type: ignore[arg-type]
    check(directory, name, entry)
    assert (name, entry.kv_layout) == (f"{RTX}-sm89-growing", "growing")
    graph, portable = entry.graphs["model"], open_bundle(directory).manifest.graphs["model"]
    assert (set(graph.inputs), set(graph.outputs)) == (set(portable.inputs), set(portable.outputs))
    assert "KV_CACHE_UPDATE" not in graph.layers
    assert graph.layers["ATTENTION_INPUT"] == LAYERS
    assert graph.forms["ThresholdGather"] == {"none": "mask", "auto": "plugin"}[plugins]
    assert graph.products.get("int8", 0) == (7 * LAYERS if "quantize" in options else 0)
    second, _ = build(directory, plugins="none", **SMALL)  # type: ignore[arg-type]
    assert set(open_bundle(directory).manifest.engines) == {name, second}


def check(directory: Path, name: str, entry: EngineEntry) -> None:
    """What every build leaves: the files, and two equal records of them."""
    manifest = open_bundle(directory).manifest
    assert manifest.engines[name] == entry
    folder = directory / ENGINES / name
    assert EngineEntry.model_validate(json.loads((folder / ENGINE_FILE).read_text())) == entry
    assert {path.name for path in folder.iterdir()} == {ENGINE_FILE, *(f"{graph}.engine" for graph in manifest.graphs)}
    for key, graph in entry.graphs.items():
        assert sha256_of(folder / graph.file) == graph.sha256
        assert graph.graph_sha256 == manifest.graphs[key].sha256
    assert [path.name for path in (directory / ENGINES).iterdir()] == [name]


# -- what goes wrong ---------------------------------------------------------------------------------------------


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
    """TensorRT-RTX 1.7.1 segfaults on TopK whose k the device alone knows, as in the portable graph."""
    directory = make_tiny_bundle(select="rank", calibration=None)
    model = onnx.load(str(directory / "model.onnx"))
    with pytest.raises(EngineError, match=r"crashed while|refuses the op|could not build"):
        run_job(job_of(model, tmp_path), "model")


def test_fewer_plugin_layers_than_meant_is_an_error(bundle: Path, tmp_path: Path) -> None:
    """A plugin that TensorRT passes over would leave an engine that is not what its record says."""
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
    """And not of the one that started it, which `gsx export --build` has PyTorch in."""
    plain = helper.make_node("Neg", ["x"], ["y"], name="neg")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph([plain], "plain", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    ballast = np.ones(1 << 27)
    built = run_job(job_of(model, tmp_path), "model")
    assert 1 << 26 < built.peak_bytes < ballast.nbytes


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineError("refused"), OSError(28, "no space")])
def test_a_build_that_fails_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = state(bundle)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(building, "run_job", fail)
    with pytest.raises((KeyboardInterrupt, GsxError)):
        build(bundle, plugins="none", **SMALL)  # type: ignore[arg-type]
    assert state(bundle) == before
    assert not (bundle / ENGINES).exists()


def test_a_manifest_that_cannot_be_written_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines are in their place by then, and have taken that of older ones."""
    build(bundle, plugins="none", **SMALL)  # type: ignore[arg-type]
    before = state(bundle)

    def fail(*args: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(placing, "write_manifest", fail)
    with pytest.raises(GsxError, match=r"the disk is full\n  free some space, or build on a copy"):
        build(bundle, plugins="none", **SMALL)  # type: ignore[arg-type]
    assert state(bundle) == before


def test_two_builds_of_one_bundle_and_what_a_killed_one_left(bundle: Path) -> None:
    """Each adds its engines to those of the other. A folder is removed when nobody works in it any more."""
    opened = open_bundle(bundle)
    _, entry = build(bundle, plugins="none", **SMALL)  # type: ignore[arg-type]
    killed = bundle / ENGINES / ".other.abc.partial"
    killed.mkdir()
    with writing_engines(opened, "first", 0) as (one, finish_one):
        assert not killed.exists()
        with writing_engines(opened, "second", 0) as (_, finish_two):
            assert one.is_dir()
            finish_two(entry)
        finish_one(entry)
    assert {"first", "second"} < set(open_bundle(bundle).manifest.engines)
    assert sorted(path.name for path in (bundle / ENGINES).iterdir()) == sorted(open_bundle(bundle).manifest.engines)


def test_a_bundle_that_is_exported_again_while_it_is_built(bundle: Path) -> None:
    """In place of the folder that the build works in, or with other graphs."""
    opened = open_bundle(bundle)
    _, entry = build(bundle, plugins="none", **SMALL)  # type: ignore[arg-type]
    before = state(bundle)
    other = opened.manifest.model_copy(update={"graphs": {}})
    for elsewhere, edit in ((Bundle(bundle, other), lambda work: None), (opened, shutil.rmtree)):
        with pytest.raises(BundleError, match="was replaced while its engines were built"):
            finish_after(elsewhere, entry, edit)
        assert state(bundle) == before


def finish_after(bundle: Bundle, entry: EngineEntry, edit: Callable[[Path], None]) -> None:
    with writing_engines(bundle, "new", 0) as (work, finish):
        edit(work)
        finish(entry)


def test_memory_and_disk_are_asked_first(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(bundle)
    monkeypatch.setattr(building, "run_job", lambda *args: pytest.fail("a build was begun"))
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory", lambda: 1 << 20)
        with pytest.raises(EngineError, match=r"not enough memory.*\n.*expected 1.1 GB available.*found 0.0 GB"):
            build(bundle, **SMALL)  # type: ignore[arg-type]
    usage = shutil.disk_usage(bundle)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(GsxError, match=r"not enough room on the disk.*\n.*expected 0.13 GB free, found 0.00 GB"):
        build(bundle, **SMALL)  # type: ignore[arg-type]
    assert state(bundle) == before


@pytest.mark.parametrize("plugins", ["none", "auto"])
@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_products_run_in_8_bits(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, scheme: SchemeName, plugins: str
) -> None:
    """Every quantized product of the graph, by what the builder says of the engine; FP8 where the GPU has it."""
    if plugins == "auto":
        needs_plugins()
    quantize = Quantize(scheme, ("none",))
    directory = Path(shutil.copytree(make_tiny_bundle(precision="fp16", quantize=quantize), tmp_path / "bundle"))
    name, entry = build(directory, plugins=plugins, context=64)  # type: ignore[arg-type]
    check(directory, name, entry)
    assert ("80" in entry.targets) == (scheme == "int8")
    assert {"89", "120"} <= set(entry.targets)
    graph = entry.graphs["model"]
    # Seven a layer; gates are in float32; embedding and head share a table, which stays in half precision.
    assert graph.products == {{"int8": "int8", "fp8": "float8"}[scheme]: 7 * LAYERS, "float": BRANCHES, "float16": 1}
    assert graph.widened == ()
    assert not [warning for warning in warnings_of(entry) if "8 BITS" in warning]


def test_a_product_that_does_not_run_in_8_bits_is_named(
    make_tiny_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Codes by a scale for each channel have to be made numbers again before they are multiplied."""
    directory = Path(shutil.copytree(make_tiny_bundle(precision="fp16", quantize=INT8), tmp_path / "bundle"))
    name = "layers.1.self_attn.o_proj"

    def scale_channels(model: onnx.ModelProto) -> None:
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        width = constants[f"{name}.weight"].dims[0]
        for tensor in (constants[f"{name}.input.scale"], constants[f"{name}.input.zero"]):
            values = np.repeat(numpy_helper.to_array(tensor), width)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    edit_graph(directory, scale_channels)
    _, entry = build(directory, plugins="none", **SMALL)  # type: ignore[arg-type]
    graph = entry.graphs["model"]
    assert graph.widened == (f"{name}.weight",)
    assert graph.products["int8"] == 7 * LAYERS - 1
    (loud, _) = warnings_of(entry)
    assert loud.startswith("WARNING: 1 quantized product DOES NOT RUN IN 8 BITS")
    assert f"model: {name}.weight" in loud
    assert run(["inspect", str(directory)]) == 0
    assert "20 int8; 1 quantized ones are not in 8 bits" in capsys.readouterr().out


def test_a_target_without_fp8_is_refused(make_tiny_bundle: Callable[..., Path]) -> None:
    directory = make_tiny_bundle(precision="fp16", quantize=Quantize("fp8", ("none",)))
    with pytest.raises(EngineError, match=r"FP8 products.*\n.*8\.9 \(Ada\).*12\.0.*found 8\.6\n.*--int8"):
        build(directory, targets=["8.6", "8.9"])
    assert not (directory / ENGINES).exists()


def test_a_gpu_that_tensorrt_rtx_does_not_know(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines for other GPUs are built all the same; that they do not run here is said, and what does."""
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    monkeypatch.setattr(cuda, "device", lambda: Device("NVIDIA H200", "90", 141 << 30))
    command = ["build", str(directory), "--context", "64"]
    assert run(command) == 0
    found = capsys.readouterr()
    assert "NOT FOR THE GPU OF THIS MACHINE (NVIDIA H200, 9.0)" in found.err
    assert "8.9" in found.out
    assert run([*command, "--target", "8.9"]) == 0
    assert "NOT FOR THE GPU" not in capsys.readouterr().err


def test_without_polygraphy(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX alone is easily installed without it."""
    monkeypatch.setattr(building, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r'needs Polygraphy.*\n.*\n  pip install "gsx\[tensorrt\]"'):
        build(tiny_bundle, **SMALL)  # type: ignore[arg-type]


def test_profiles_without_single_tokens(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["build", str(bundle), "--context", "64", "--plugins", "none", "--profile"]
    assert run([*command, "prefill:2-32"]) == 0
    assert "NO PROFILE TAKES CALLS OF ONE TOKEN" in capsys.readouterr().err
    assert run([*command, "prefill:2-32", "--profile", "decode:1"]) == 0
    assert "ONE TOKEN" not in capsys.readouterr().err


def test_what_the_system_says_about_memory_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's, or the container's where that is less; what it caches can be had."""
    found = memory.available_memory()
    assert found is None or found > 1 << 20
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("4000\n")
    (tmp_path / "memory.stat").write_text("anon 3400\ninactive_file 600\n")
    monkeypatch.setattr(memory, "_GROUPS", ((tmp_path, *memory._GROUPS[0][1:]),))
    assert memory.available_memory() == 5000 - 4000 + 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() == memory._of_machine()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"context": 1}, UsageError, r"--context\n.*2 to 512, the model's context, found 1"),
        ({"context": 1000}, UsageError, "found 1000"),
        ({"batch": 0}, UsageError, r"--batch\n.*at least 1"),
        ({"targets": ["9.0"]}, UsageError, r"--target.*\n.*8\.9.*found 9\.0"),
        ({"targets": ["many"]}, UsageError, "--target"),
        ({"profiles": ["decode:1", "decode:1"]}, UsageError, "two profiles have the same name"),
        ({"plugins": Path("nowhere.so")}, UsageError, r"nowhere.so: there is no such plugin library\n.*plugins build"),
        ({"backend": "tensorrt"}, EngineError, "backend tensorrt"),
    ],
)
def test_options_that_cannot_be(
    tiny_bundle: Path, options: dict[str, object], error: type[GsxError], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(tiny_bundle, **options)  # type: ignore[arg-type]


def edit_graph(directory: Path, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Change a bundle's graph, and the hash that stands in its manifest."""
    path = directory / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["graphs"]["model"]["sha256"] = sha256_of(path)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_graph_of_another_layout_is_refused(bundle: Path) -> None:
    def turn(model: onnx.ModelProto) -> None:
        for concat in model.graph.node:
            if concat.op_type == "Concat" and concat.output[0].startswith("present."):
                concat.input[:] = concat.input[::-1]

    edit_graph(bundle, turn)
    with pytest.raises(BundleError, match=r"not laid out as this version of gsx.*\n.*\n.*gsx export"):
        build(bundle, **SMALL)  # type: ignore[arg-type]


def test_a_plugin_library_that_is_none(bundle: Path, tmp_path: Path) -> None:
    """A file that is no library, and a library of something else: each in the words that say so."""
    empty = tmp_path / "libnothing.so"
    empty.write_bytes(b"\x7fELF" + bytes(np.zeros(64, np.uint8)))
    for library, reason in ((empty, "wrong ELF class"), (Path(onnxruntime_library()), "no getCreators: it holds no")):
        message = rf"the plugin library .*{library.name} does not load: .*{reason}.*\n  gsx plugins build"
        with pytest.raises(EngineError, match=message):
            build(bundle, plugins=library, **SMALL)  # type: ignore[arg-type]
        assert not (bundle / ENGINES).exists()


def test_a_plugin_library_of_others_and_half_of_one(bundle: Path, tmp_path: Path) -> None:
    needs_plugins()
    named = find_library()
    assert named is not None
    content = named.read_bytes()
    renamed = tmp_path / "librenamed.so"
    renamed.write_bytes(content.replace(b"TopKGather\0", b"TopKOthers\0"))
    half = tmp_path / "libhalf.so"
    half.write_bytes(content[: len(content) // 2])
    for library, message in (
        (renamed, r"it has no plugin for TopKGather: it is from another version of gsx"),
        (half, r"(?s)loading the plugin library|does not load"),
    ):
        with pytest.raises(EngineError, match=message):
            build(bundle, plugins=library, **SMALL)  # type: ignore[arg-type]
        assert not (bundle / ENGINES).exists()


def onnxruntime_library() -> str:
    """Some shared library that is installed wherever these tests run."""
    from onnxruntime.capi import onnxruntime_pybind11_state

    return str(onnxruntime_pybind11_state.__file__)


def test_the_reason_of_a_failure_and_not_the_missing_driver(bundle: Path) -> None:
    with pytest.raises(
        EngineError,
        match=r"could not build an engine\n.*Turing \(SM75\): FP32 GEMM is not supported.*\n.*8\.0 or later",
    ):
        build(bundle, plugins="none", context=64, targets=["7.5"])
    assert not (bundle / ENGINES).exists()


def test_what_a_plugin_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    """Scores must be float32 whatever the graph's precision: the plugin says so, and its words reach the user."""
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
