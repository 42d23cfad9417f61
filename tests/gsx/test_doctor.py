"""`gsx doctor`: real checks, and what counts as a failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gsx import doctor as look
from gsx.cli import run
from gsx.workflows.doctor import (
    _OP_CALLS,
    DoctorReport,
    Need,
    Row,
    Status,
    _headers,
    _library,
    _module,
    _nvcc,
    _op,
    _try,
)
from gsx_plugins.registry import OPS


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["passed"] is True
    rows = {row["name"]: row for row in report["rows"]}
    for name in ("python", "onnxruntime", "torch", "transformers", *(f"op {op}" for op in OPS)):
        assert rows[name]["status"] == "ok", rows[name]
    assert "CPUExecutionProvider" in rows["onnxruntime"]["detail"]
    for row in rows.values():
        assert row["detail"]
        assert row["status"] == "ok" or row["todo"] or row["name"] == "memory"
    assert "trying torch" in captured.err


def test_every_op_has_a_call() -> None:
    assert set(_OP_CALLS) == set(OPS)


def test_op_with_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (_OP_CALLS["TopKGather"][0], [7.0])
    monkeypatch.setattr("gsx.workflows.doctor._OP_CALLS", {**_OP_CALLS, "TopKGather": wrong})
    row = _op("TopKGather")
    assert row.status == "broken"
    assert "expected [7.0]" in row.detail


@pytest.mark.parametrize(
    ("status", "need", "passed"),
    [
        ("ok", "run", True),
        ("missing", "run", False),
        ("broken", "run", False),
        ("missing", "export", True),
        ("broken", "export", False),
        ("missing", "more", True),
        ("broken", "more", True),
    ],
)
def test_verdict(status: Status, need: Need, passed: bool) -> None:
    row = Row("thing", status, "found", "get it", need)
    assert DoctorReport((row,)).passed is passed


def test_modules() -> None:
    missing = _module("no-such-module", "pass", "pip install it", "more")
    assert (missing.status, missing.todo) == ("missing", "pip install it")
    broken = _module("json", "import json; json.loads('{')", "mend it", "run")
    assert broken.status == "broken"
    assert "JSONDecodeError" in broken.detail


def test_what_crashes_is_contained() -> None:
    worked, answer = _try([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"])
    assert not worked
    assert "signal 11" in answer
    assert _try([str(Path("/no/such/program"))])[0] is False


def test_broken_machine_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(look)
    rows = (Row("onnxruntime", "broken", "no kernels", "pip install gsx", "run"),)
    monkeypatch.setattr(sys.modules["gsx"], "doctor", lambda on_progress: DoctorReport(rows))
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no kernels" in out
    assert "does not work" in out


def test_plugin_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GSX_PLUGIN_LIBRARY", raising=False)
    row = _library()
    assert (row.status, row.todo) == ("missing", "gsx plugins build (for TensorRT and GPUs)")
    named = tmp_path / "libgsx_plugins.so"
    monkeypatch.setenv("GSX_PLUGIN_LIBRARY", str(named))
    assert _library().status == "broken"
    named.write_bytes(b"not a library")
    row = _library()
    assert row.status == "broken"
    assert row.todo == "gsx plugins build --force"


def test_tensorrt_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    row = _headers()
    assert row.status == "missing"
    assert "git clone" in str(row.todo)
    for version, status in ((8, "broken"), (10, "broken"), (11, "ok"), (12, "broken")):
        (tmp_path / "NvInferRuntime.h").touch()
        lines = f"#define NV_TENSORRT_MAJOR {version} // major\n#define NV_TENSORRT_MINOR 1 // minor\n"
        (tmp_path / "NvInferVersion.h").write_text(lines)
        assert _headers().status == status, version


def test_an_old_compiler_is_reported_as_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tools that build the plugins need a certain version."""
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'release 12.4'\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    row = _nvcc()
    assert (row.status, row.need) == ("broken", "more")
    assert "12.4" in row.detail
    assert "12.8 or later" in str(row.todo)
