"""Whole models on this machine's GPU: PyTorch with the kernels, and engines if TensorRT is installed.

Everything is made on the spot from the example model, or from random weights if only time matters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks import torch_backend
from gsx.torch_runtime import TorchRuntime
from gsx.workflows.export import export
from gsx_engines.building import build as building
from gsx_engines.building.build import build
from gsx_engines.building.job import run_job
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.generation.generate import generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.tensorrt import TensorRTStage, open_stage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.tensorrt import cuda
from gsx_engines.tensorrt.backend import Backend, dotted, known_targets, load_module
from gsx_engines.tensorrt.loading import ENGINES
from gsx_engines.tokens import BundleTokenizer
from gsx_plugins.errors import GsxError
from gsx_plugins.library import find_library
from tests.gpu.rows import Row, goal_row

EXAMPLE = Path(__file__).parents[2] / "examples" / "model"
BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")
BUDGETS = (1.0, 0.5)
_PROMPT = "import os\n\n\ndef read(path):\n    with open("
_TOKENS = 64
_CONTEXT = 256


@contextmanager
def example(**options: Any) -> Iterator[Bundle]:
    """The example model as a bundle that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gsx-gpu-") as folder:
        yield export(EXAMPLE, Path(folder) / "bundle", calibration_tokens=2048, **options)


def torch_rows() -> list[Row]:
    """`--backend torch`: the example model's text against ONNX Runtime's, and speed from prompt to text."""
    with example(budget=0.5, draft="exit:4") as bundle:
        rows = [
            same_text("torch: the example model", bundle, lambda: open_runner(bundle, backend=TorchRuntime("cuda")))
        ]
    with tempfile.TemporaryDirectory(prefix="gsx-gpu-") as folder:
        dense, gated = torch_backend.bundles(Path(folder), "1b", "bf16")
        speeds = torch_backend.measure(dense, gated, "cuda", 1536, 64, 5)
    first = speeds[0]
    for one in speeds:
        ratios = f"{one.prefill / first.prefill:.3f} and {one.step / first.step:.3f} of dense"
        kept = "" if one.kept is None else f", kept {one.kept:.3f}"
        found = f"prefill {one.prefill * 1e3:.1f} ms, a token {one.step * 1e3:.2f} ms; {ratios}{kept}"
        rows.append(Row(f"torch, 1.1 B, bf16, 1536 tokens, {one.form}", found))
    return rows


def engine_rows() -> list[Row]:
    """Engines of the example model on each TensorRT that is installed; FP8 and bf16 if both are supported."""
    rows = []
    for backend in BACKENDS:
        what = f"{backend}: an engine of the example model"
        try:
            load_module(backend)
        except GsxError as error:
            rows.append(Row(what, _line(error), "ONNX Runtime's text", "missing"))
            continue
        with example(budget=0.5) as bundle:
            rows.append(same_text(what, bundle, lambda backend=backend, bundle=bundle: _built(bundle, backend)))
            if not _is_target(backend):
                with _for_the_gpu_at_hand():
                    built = partial(_built, bundle, backend)
                    rows.append(same_text(f"{what}, built for the GPU at hand", bundle, built))
        rows += _eight_bit_rows(backend)
    return rows


def same_text(what: str, bundle: Bundle, open_other: Callable[[], Runner]) -> Row:
    """Greedy tokens of another runtime against ONNX Runtime's, at each budget."""
    prompt = [BundleTokenizer(bundle).encode(_PROMPT)]
    goal = "ONNX Runtime's text"
    try:
        runners = (open_runner(bundle), open_other())
        equal, speed = 0, 0.0
        for budget in BUDGETS:
            texts = [
                generate(one, prompt, max_new_tokens=_TOKENS, keep=KeepSettings(budget=budget), stop_ids=[])
                for one in runners
            ]
            equal += texts[0].sequences == texts[1].sequences
            speed = texts[1].stats.decode_tokens_per_second or 0.0
    except GsxError as error:
        return Row(what, _line(error), goal, "fail")
    found = f"equal at {equal} of {len(BUDGETS)} budgets, {speed:.0f} tokens/s at budget {BUDGETS[-1]:g}"
    return goal_row(what, found, goal, equal == len(BUDGETS))


def _is_target(backend: Backend) -> bool:
    """Whether a backend builds for this GPU by name: TensorRT-RTX does not for all GPUs (1.7 has no 9.0)."""
    device = cuda.device()
    return backend == "tensorrt" or device is None or device.capability in known_targets(load_module(backend))


@contextmanager
def _for_the_gpu_at_hand() -> Iterator[None]:
    """Builds without named targets: TensorRT-RTX then takes the GPU that it finds (ComputeCapability.CURRENT)."""
    with mock.patch.object(building, "run_job", lambda job, *rest: run_job(replace(job, targets=()), *rest)):
        yield


def _built(bundle: Bundle, backend: Backend) -> Runner:
    """The engine of a bundle, built now and opened here.

    If this GPU is not a target, the engine is given to TensorRT unchanged, to find out whether TensorRT accepts it and
    runs it.
    """
    name, entry = build(bundle, backend=backend, context=_CONTEXT)
    opened = open_bundle(bundle.directory)
    device = cuda.device()
    assert device is not None
    if device.capability in entry.targets:
        return WholeRunner(open_stage(opened, backend))
    from gsx_engines.tensorrt.execution import CudaEngine

    print(f"{backend}: {dotted(device.capability)} is no target of its; trying {', '.join(map(dotted, entry.targets))}")
    plan = (opened.directory / ENGINES / name / entry.graphs["model"].file).read_bytes()
    library = find_library() if entry.plugins else None
    engine = CudaEngine(backend, plan, library=library, cuda_graphs=False, kernels=None)
    return WholeRunner(TensorRTStage(opened.manifest, entry, "model", engine))


def _eight_bit_rows(backend: Backend) -> list[Row]:
    """Prefill of 1.1 B parameters, dense, in FP8 and in bf16."""
    what = f"{backend}: FP8 beside bf16, 1.1 B dense, prefill of 1024 tokens"
    if find_spec("modelopt") is None:
        return [Row(what, "NVIDIA ModelOpt is not installed", verdict="missing")]
    from gsx.workflows.quantize import Quantize

    with tempfile.TemporaryDirectory(prefix="gsx-gpu-") as folder:
        work = Path(folder)
        plain, _ = torch_backend.bundles(work, "1b", "bf16")
        text = work / "1b.txt"
        small = work / "fp8"
        try:
            export(work / "1b-dense", small, precision="bf16", quantize=Quantize("fp8"), calibration=text)
            milliseconds = []
            for path in (plain, small):
                runner = _built(open_bundle(path), backend)
                prompt = [list(range(1, 1025))]
                times = [generate(runner, prompt, max_new_tokens=1).stats.prefill_seconds * 1e3 for _ in range(5)]
                milliseconds.append(min(times))
        except GsxError as error:
            return [Row(what, _line(error), verdict="fail")]
    found = f"{milliseconds[1]:.1f} ms, bf16 {milliseconds[0]:.1f} ms: {milliseconds[0] / milliseconds[1]:.2f} times"
    return [Row(what, found)]


def _line(error: GsxError) -> str:
    return " ".join(error.message.split())
