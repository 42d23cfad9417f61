"""The GPU scripts: the parts that can run without a GPU, and on a GPU the checks as tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_prefill, torch_backend
from gsx.torch_runtime import TorchRuntime
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.runners.select import open_runner
from gsx_exporter.gate_config import GateConfig
from tests.gpu.__main__ import main, rows_of, sanitize
from tests.gpu.rows import Row, goal_row, table
from tests.gpu.whole_models import same_text

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the scripts would use it")


@no_gpu
@pytest.mark.parametrize(
    ("script", "arguments"),
    [(main, []), (gpu_prefill.main, []), (torch_backend.main, ["--work", "unused"])],
    ids=["tests.gpu", "gpu_prefill", "torch_backend"],
)
def test_no_gpu(script: Callable[[list[str]], int], arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert script(arguments) == 1
    assert "PyTorch sees no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--parts", "speed"], ["--device", "tpu"]])
def test_wrong_arguments(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)


def test_kernels_need_no_package_but_pytorch() -> None:
    """So that a machine that is available for only minutes needs little for the kernels' parts."""
    script = """
import sys
from importlib.metadata import requires
from re import match

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(name)

Missing.names = {match(r"[\\w-]+", one)[0].replace("-", "_") for one in requires("gsx")} - {"torch", "numpy"}
sys.meta_path.insert(0, Missing())
import tests.gpu.__main__, tests.gpu.prefill
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("prints", "code", "verdict"),
    [
        ("| row gather | 39 equal | all | pass |", 0, "pass"),
        ("| row gather | 39 equal | all | pass |", 99, "fail"),
        ("", 0, "fail"),  # seen of some versions: a clean summary, and the program never ran
    ],
)
def test_sanitizer_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, code: int, verdict: str) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '{prints}'\necho '========= ERROR SUMMARY: 0 errors'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    row = sanitize("memcheck", "accesses outside of memory")
    assert row.verdict == verdict
    assert "ERROR SUMMARY: 0 errors" in row.found


@pytest.mark.slow
def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The checks that a GPU runs, with the emulated kernels."""
    assert main(["--emulated", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6
    assert all("| pass" in line for line in lines[2:])


def test_table_and_verdicts() -> None:
    rows = [Row("a", "1"), goal_row("b", "2", "3", False), goal_row("c", "4", "3", True)]
    assert [row.verdict for row in rows] == ["-", "fail", "pass"]
    assert table(rows).splitlines()[3].split("|")[1:5] == [" b    ", " 2     ", " 3    ", " fail    "]


def test_prefill_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole script with a tiny shape; a CPU's times decide nothing."""
    assert gpu_prefill.main(["--device", "cpu", "--small", "--tokens", "16", "--rounds", "1"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == [
        "| form",
        "| dense",
        "| budget 1",
        "| budget 0.7",
        "| budget 0.5",
    ]


def test_text_rows(tiny_bundle: Path) -> None:
    """A runtime that writes ONNX Runtime's text, and one that cannot be opened: a row that says why, no traceback."""
    bundle = open_bundle(tiny_bundle)
    row = same_text("torch", bundle, lambda: open_runner(bundle, backend=TorchRuntime("cpu")))
    assert row.found.startswith("equal at 2 of 2 budgets")
    assert row.verdict == "pass"
    row = same_text("engine", bundle, lambda: open_runner(bundle, backend="tensorrt-rtx"))
    assert "has no engines for tensorrt-rtx found none gsx build" in row.found
    assert row.verdict == "fail"


def test_torch_backend_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole script with a tiny shape; a CPU's times decide nothing."""
    arguments = ["--shape", "tiny", "--device", "cpu", "--tokens", "16", "--new-tokens", "4", "--rounds", "1"]
    assert torch_backend.main(["--work", str(tmp_path), *arguments]) == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines] == ["| form", "| dense", "| budget 1", "| budget 0.5"]
    assert [line[1] for line in lines[1:3]] == ["", "1.000"]
    assert 0.2 < float(lines[3][1]) < 0.8


def test_a_part_that_fails_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    def part() -> list[Row]:
        raise RuntimeError("out of memory\nreally")

    assert rows_of("torch", part) == [Row("the part torch", "RuntimeError: out of memory really", "", "fail")]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("kept", [24, 12])
def test_flops_are_those_that_torch_counts(kept: int) -> None:
    """Every matrix product of the layers. torch does not look into our attention ops, so that term is taken off."""
    shape, tokens = gpu_prefill.SMALL, 24
    gate = GateConfig(kind="scalar")
    layers = gpu_prefill.make_layers(shape, gate, torch.float32, "cpu")
    call = gpu_prefill.call_state(shape, tokens, kept, torch.float32, "cpu")
    with FlopCounterMode(display=False) as counter:
        gpu_prefill.prefill(layers, torch.randn(tokens, shape.hidden), call)
    attention = shape.layers * 4 * kept * tokens * shape.hidden
    assert counter.get_total_flops() == gpu_prefill.flops(shape, tokens, kept, gated=True) - attention


@pytest.mark.gpu
def test_kernels_on_this_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU: run this on a machine with an NVIDIA GPU, nvcc and PyTorch with CUDA")
    assert main(["--parts", "checks"]) == 0
