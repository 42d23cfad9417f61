"""Kernels of TensorRT-RTX across runs: the files. TensorRT's own cache needs a GPU (test_tensorrt_gpu.py)."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gsx_engines.tensorrt.kernel_cache import attach, kernel_cache_path, load, save
from gsx_engines.tensorrt.preload import preload_tensorrt_rtx
from gsx_engines.tensorrt.rtx import runtime_config, why_refused

SHA256 = "ab" * 32


class Cache:
    """TensorRT-RTX's runtime cache, as far as its bytes go: it accepts its own kind, and returns everything it has."""

    def __init__(self, compiled: bytes = b"") -> None:
        self.content = compiled

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self.content = blob
        return True

    def serialize(self) -> memoryview:
        return memoryview(self.content)


class Config:
    """A runtime configuration and its cache."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.used: Cache | None = None

    def create_runtime_cache(self) -> Cache:
        return self.cache

    def set_runtime_cache(self, cache: Cache) -> None:
        self.used = cache


class Owner:
    """An object that owns an engine."""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return kernel_cache_path(SHA256, "89")


def test_the_next_run_has_what_this_one_compiled(path: Path, tmp_path: Path) -> None:
    first, owner = Config(), Owner()
    attach(first, path, owner)
    assert first.used is first.cache
    first.cache.content = b"kernels of a first run"
    assert not path.exists()
    del owner
    gc.collect()
    assert path.is_relative_to(tmp_path)
    second = Config()
    attach(second, path, Owner())
    assert second.cache.content == b"kernels of a first run"
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_other_engines_and_gpus_have_files_of_their_own(path: Path) -> None:
    assert len({path, kernel_cache_path(SHA256, "120"), kernel_cache_path("cd" * 32, "89")}) == 3


@pytest.mark.parametrize("content", [b"", b"of another driver", None])
def test_what_does_not_fit_is_written_anew(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    cache = Cache()
    known = load(cache, path)
    assert (known, cache.content) == (b"", b"")
    cache.content = b"kernels"
    save(cache, path, known)
    assert path.read_bytes() == b"kernels"


def test_nothing_new_is_not_written(path: Path) -> None:
    save(Cache(b"kernels"), path, b"kernels")
    save(Cache(), path, b"")
    assert not path.exists()


def test_a_full_disk_is_not_a_failure(path: Path) -> None:
    path.parent.parent.mkdir(parents=True)
    path.parent.write_text("a file where the folder should be")
    save(Cache(b"kernels"), path, b"")


def test_tensorrt_rtx_has_these_calls() -> None:
    preload_tensorrt_rtx()
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    for owner, name in (
        (rtx.ICudaEngine, "create_runtime_config"),
        (rtx.IRuntimeConfig, "create_runtime_cache"),
        (rtx.IRuntimeConfig, "set_runtime_cache"),
        (rtx.IRuntimeCache, "deserialize"),
        (rtx.IRuntimeCache, "serialize"),
    ):
        assert callable(getattr(owner, name))
    assert "runtime_config:" in rtx.ICudaEngine.create_execution_context.__doc__
    assert isinstance(rtx.IRuntimeConfig.cuda_graph_strategy, property)
    assert rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE


@pytest.mark.parametrize("fixed_rows", [True, False])
def test_nothing_is_compiled_for_rows_that_the_gpu_counts(fixed_rows: bool) -> None:
    preload_tensorrt_rtx()
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    made = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="as TensorRT-RTX has it", memory=[])
    made.set_execution_context_allocation_strategy = made.memory.append
    engine = SimpleNamespace(create_runtime_config=lambda: made, num_io_tensors=0)
    options: dict[str, Any] = {"cuda_graphs": fixed_rows, "fixed_rows": fixed_rows}
    assert runtime_config(rtx, engine, kernels=None, owner=Owner(), **options) is made
    none = rtx.DynamicShapesKernelSpecializationStrategy.NONE
    assert (made.dynamic_shapes_kernel_specialization_strategy == none) is not fixed_rows
    assert isinstance(rtx.IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy, property)
    assert made.memory == [rtx.ExecutionContextAllocationStrategy.USER_MANAGED]


def test_tensorrt_rtx_says_why_it_refuses() -> None:
    """The part that needs no GPU: bytes that are not an engine."""
    preload_tensorrt_rtx()
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    runtime = rtx.Runtime(rtx.Logger(rtx.Logger.INTERNAL_ERROR))
    assert why_refused(rtx, runtime, b"no engine" * 100) == "malformed engine"
