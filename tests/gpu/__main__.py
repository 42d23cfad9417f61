"""Build, check and time everything that needs a GPU, in one call; the output is one table.

    python -m tests.gpu                 all of it; exit code 1 if a check fails or a figure is missed
    python -m tests.gpu --emulated      only the checks, on the CPU, with the emulated kernels

Needs a GPU, nvcc, CMake and PyTorch. Uses compute-sanitizer, TensorRT and TensorRT-RTX if they are installed; if not, a
row says so. A part that fails is a row, and the next part runs. Where a call may not take long, run the parts one by
one: kernels (`checks`, `timing`), memory (`sanitizer`), PyTorch with the kernels (`prefill`, `torch`), `engines`.

On a machine that is available for only minutes, use this order, each in a separate call, so that a hang loses only one:

    python -m tests.gpu --quick --parts checks      does a kernel fail? seconds
    python -m tests.gpu --parts step                what decides: products that skip against cuBLAS, and a whole step
    python -m tests.gpu --parts checks timing       kernels: needs the least
    python -m tests.gpu --parts engines             do engines run on this GPU
    python -m tests.gpu --parts prefill torch
    GSX_GPU=1 pytest -m gpu tests/gpu tests/gsx/test_torch_runtime.py
    python -m tests.gpu --parts sanitizer

`checks`, `step`, `timing`, `prefill` and `sanitizer` need no package but PyTorch; `torch` those of a plain installation
and of the extra `export`; `engines` also those of the extra `tensorrt`, and TensorRT-RTX, whose libraries are about
95 MB: split that wheel if only small files can be copied.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from gsx_plugins.build import build
from gsx_plugins.cuda import Kernels
from gsx_plugins.errors import PluginLibraryError
from tests.gpu.attention import attention_checks, attention_measurements
from tests.gpu.checks import check_graph, run_checks
from tests.gpu.rows import Row, goal_row, table
from tests.gpu.step import step_checks, step_measurements
from tests.gpu.timing import measurements
from tests.plugins.kernel_cases import GuardedKernels

# Tools of compute-sanitizer, and what each finds. (initcheck would report the map of the scatter-add, which is read
# before it is written and not believed: gsx_plugins/gated_scatter_add/kernel.cu.)
SANITIZERS = {
    "memcheck": "accesses outside of memory",
    "racecheck": "races in shared memory",
    "synccheck": "wrong barriers",
}
PARTS = ("checks", "step", "timing", "prefill", "torch", "engines", "sanitizer")
_SANITIZER_SECONDS = 150
_SANITIZER_FAILED = 99
# PyTorch's setting: without its cache, a read past a tensor is one past an allocation, which the checker sees.
_OWN_ALLOCATIONS = "PYTORCH_NO_CUDA_MEMORY_CACHING"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.emulated:
        from tests.plugins.emulation import emulated_library

        kernels = GuardedKernels(emulated_library())
        rows = [*step_checks(kernels, "cpu"), *attention_checks(kernels, "cpu")]
        return _finish([*run_checks(kernels, "cpu", quick=options.quick), *rows])
    if not torch.cuda.is_available():
        print("tests.gpu: PyTorch sees no GPU here; --emulated runs the checks on the CPU", file=sys.stderr)
        return 1
    major, minor = torch.cuda.get_device_capability()
    try:
        built = build(architectures=(f"{major}{minor}",), kernels_only=True)
        kernels = GuardedKernels(built.path)
    except PluginLibraryError as error:
        print(error, file=sys.stderr)
        return 1
    build_row = Row("build for this GPU", f"{built.record.seconds:g} s, nvcc {built.record.nvcc}")
    parts: dict[str, Callable[[], list[Row]]] = {
        "checks": lambda: [
            *run_checks(kernels, "cuda", quick=options.quick),
            *rows_of("products that skip", lambda: step_checks(kernels, "cuda")),
            *rows_of("attention of a step", lambda: attention_checks(kernels, "cuda")),
            *rows_of("graph", lambda: _graph(kernels)),
        ],
        "step": lambda: [
            *_measured(step_measurements(Kernels(built.path))),
            *_measured(attention_measurements(Kernels(built.path))),
        ],
        "timing": lambda: [build_row, *_measured(measurements(Kernels(built.path)))],
        "prefill": _prefill,
        "torch": _torch,
        "engines": lambda: [_plugins_row(f"{major}{minor}"), *_engines()],
        "sanitizer": lambda: [sanitize(tool, finds) for tool, finds in SANITIZERS.items()],
    }
    return _finish([row for name in PARTS if name in options.parts for row in rows_of(name, parts[name])])


def _graph(kernels: GuardedKernels) -> list[Row]:
    # Under a memory checker every tensor has an allocation of its own, and a capture allows none.
    return [] if os.environ.get(_OWN_ALLOCATIONS) else [check_graph(kernels)]


def _measured(measurements: Iterator[tuple[str, Callable[[], list[Row]]]]) -> list[Row]:
    return [row for name, measurement in measurements for row in rows_of(name, measurement)]


# What needs more than PyTorch is imported when its turn comes.
def _prefill() -> list[Row]:
    from tests.gpu.prefill import prefill_rows

    return prefill_rows()


def _torch() -> list[Row]:
    from tests.gpu.whole_models import torch_rows

    return torch_rows()


def _engines() -> list[Row]:
    from tests.gpu.whole_models import engine_rows

    return engine_rows()


def _plugins_row(architecture: str) -> Row:
    """The plugin library, which needs TensorRT's headers; without it engines are still built, with masks."""
    try:
        return Row("plugins for engines", f"built in {build(architectures=(architecture,)).record.seconds:g} s")
    except PluginLibraryError as error:
        return Row("plugins for engines", f"none, engines have masks: {error.what}", verdict="missing")


def rows_of(name: str, part: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a part; if it fails as a whole, one row that says why, with the traceback on stderr."""
    try:
        return part()
    except Exception as error:  # time on a GPU is expensive: the other parts must still run
        traceback.print_exc()
        return [Row(f"the part {name}", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", "", "fail")]
    finally:
        torch.cuda.empty_cache()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--emulated", action="store_true", help="the checks alone, on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="what to do; all of it by default",
    )
    return parser.parse_args(arguments)


def sanitize(tool: str, finds: str) -> Row:
    """The quick checks, run under one tool of compute-sanitizer."""
    what = f"compute-sanitizer {tool} ({finds})"
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).is_file():
        return Row(what, "compute-sanitizer is not installed", "nothing found", "missing")
    # Errors of CUDA's own calls are not ours: PyTorch asks for functions that a driver may lack.
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(_SANITIZER_FAILED)]
    command += [sys.executable, "-m", "tests.gpu", "--quick", "--parts", "checks"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SANITIZER_SECONDS,
            env={**os.environ, _OWN_ALLOCATIONS: "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Row(what, f"no answer within {_SANITIZER_SECONDS} s", "nothing found", "fail")
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "=========" in line]
    last = lines[-1].replace("=", "").strip() if lines else f"exit code {done.returncode}"
    if "| pass" not in done.stdout:  # the table of the checks: without it nothing has run
        last = f"the checks did not run: {last}"
        return Row(what, last, "nothing found", "fail")
    return goal_row(what, last, "nothing found", done.returncode == 0)


def _finish(rows: list[Row]) -> int:
    print(table(rows))
    return int(any(row.verdict == "fail" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
