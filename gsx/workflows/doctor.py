"""`gsx doctor`: what works on this machine, and why the rest does not.

Every check runs something, since a version number by itself says little. What may crash the process (drivers, native
libraries) is tried in a process of its own.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gsx_plugins.progress import OnProgress, Progress, silent

Status = Literal["ok", "missing", "broken"]
# "run": needed to run a bundle; "export": needed to export, verify or train; "more": optional.
Need = Literal["run", "export", "more"]

_TRY_SECONDS = 120
_MIN_PYTHON = (3, 11)
_MIN_FREE_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One thing that was tried.

    Args:
        name: the thing.
        status: `ok`, `missing` (not installed) or `broken` (installed, but does not work).
        detail: its version and what was run, or what went wrong.
        todo: how to get it; None if it works.
        need: what cannot be done without it.
    """

    name: str
    status: Status
    detail: str
    todo: str | None
    need: Need


@dataclass(frozen=True)
class DoctorReport:
    """All rows; `passed` is false when the CPU chain cannot work."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether everything needed works. A missing export extra may be intended; a broken one is an error."""
        return not any(
            row.need != "more" and (row.status == "broken" or (row.status == "missing" and row.need == "run"))
            for row in self.rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"passed": self.passed, "rows": [asdict(row) for row in self.rows]}


# A module, what to run with it (prints its version and what it did), how to get it, what needs it.
_MODULES: tuple[tuple[str, str, str, Need], ...] = (
    ("numpy", "import numpy as m; m.ones(2) @ m.ones(2); print(m.__version__)", "pip install gsx", "run"),
    (
        "tokenizers",
        "import tokenizers as m; m.Tokenizer(m.models.BPE()); print(m.__version__)",
        "pip install gsx",
        "run",
    ),
    ("onnx", "import onnx as m; m.parser.parse_model; print(m.__version__)", "pip install gsx", "run"),
    (
        "onnxruntime",
        "import onnxruntime as m; print(m.__version__, 'providers', ' '.join(m.get_available_providers()))",
        "pip install gsx",
        "run",
    ),
    (
        "torch",
        "import torch as m; m.ones(2, 2) @ m.ones(2, 2); print(m.__version__, 'cuda', m.cuda.is_available())",
        'pip install "gsx[export]"',
        "export",
    ),
    (
        "transformers",
        "import transformers as m; m.AutoConfig.for_model('llama'); print(m.__version__)",
        'pip install "gsx[export]"',
        "export",
    ),
    (
        "safetensors",
        "import safetensors as m; from safetensors.torch import save; import torch; "
        "save({'a': torch.ones(1)}); print(m.__version__)",
        'pip install "gsx[export]"',
        "export",
    ),
    (
        "onnxscript",
        "import onnxscript as m; print(m.__version__)",
        'pip install "gsx[export]"',
        "export",
    ),
    (
        "matplotlib",
        "import matplotlib as m; m.use('Agg'); from matplotlib.figure import Figure as F; F(); print(m.__version__)",
        'pip install "gsx[export]" (plots of the parity report)',
        "export",
    ),
    (
        "onnxruntime-genai",
        "import onnxruntime_genai as m; m.Model; print(m.__version__)",
        "pip install onnxruntime-genai (another client for bundles)",
        "more",
    ),
    (
        "tensorrt-rtx",
        "import tensorrt_rtx as m; assert m.Builder(m.Logger(m.Logger.ERROR)); print(m.__version__, 'builder')",
        "pip install tensorrt-rtx (engines for RTX GPUs; builds without a GPU)",
        "more",
    ),
    (
        "tensorrt",
        "import tensorrt as m; assert m.Builder(m.Logger(m.Logger.ERROR)); print(m.__version__, 'builder')",
        "pip install tensorrt (needs an NVIDIA GPU)",
        "more",
    ),
    (
        "polygraphy",
        "import polygraphy as m; from polygraphy.backend.trt import Profile; Profile(); print(m.__version__)",
        'pip install "gsx[tensorrt]" (gsx build)',
        "more",
    ),
    (
        "cuda-bindings",
        "from cuda.bindings import runtime as m, __version__ as v; code, count = m.cudaGetDeviceCount(); "
        "print(v, 'CUDA devices', 0 if int(code) else count)",
        'pip install "gsx[tensorrt]" (to run engines)',
        "more",
    ),
)
_IMPORT_NAMES = {
    "onnxruntime-genai": "onnxruntime_genai",
    "tensorrt-rtx": "tensorrt_rtx",
    "cuda-bindings": "cuda",
}

# A program, its arguments, how to get it.
_PROGRAMS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        "nvidia-smi",
        ("--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader"),
        "a machine with an NVIDIA GPU and its driver (everything else works without one)",
    ),
    ("tritonserver", ("--help",), "Triton Inference Server's container (to serve bundles)"),
    ("c++", ("--version",), 'install a C++ compiler (to build the plugins; gsx train with "compile": true)'),
)
_PROGRAM_TITLES = {"nvidia-smi": "NVIDIA GPU", "tritonserver": "Triton server", "c++": "C++ compiler"}


def doctor(*, on_progress: OnProgress = silent) -> DoctorReport:
    """Check everything that gsx can use on this machine, and show how to get what is missing.

    Args:
        on_progress: called before each check.
    Returns: a row per check; `passed` says whether exporting and running on a CPU can work.
    Example:
        >>> gsx.doctor().passed
        True
    """
    rows = []

    def add(name: str, check: Callable[[], Row]) -> None:
        on_progress(Progress(f"trying {name}"))
        rows.append(check())

    add("python", _python)
    for name, code, todo, need in _MODULES:
        add(name, lambda n=name, c=code, t=todo, k=need: _module(n, c, t, k))  # type: ignore[misc]
    from gsx_plugins.registry import OPS

    for op in OPS:
        add(f"op {op}", lambda o=op: _op(o))  # type: ignore[misc]
    for program, arguments, todo in _PROGRAMS:
        add(program, lambda p=program, a=arguments, t=todo: _program(p, a, t))  # type: ignore[misc]
    add("nvcc", _nvcc)
    add("cmake", _cmake)
    add("TensorRT headers", _headers)
    add("plugin library", _library)
    add("disk", _disk)
    add("memory", _memory)
    return DoctorReport(tuple(rows))


def _python() -> Row:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    if sys.version_info < _MIN_PYTHON:
        return Row("python", "broken", found, "install Python 3.11 or later", "run")
    return Row("python", "ok", found, None, "run")


def _module(name: str, code: str, todo: str, need: Need) -> Row:
    from importlib.util import find_spec

    if find_spec(_IMPORT_NAMES.get(name, name)) is None:
        return Row(name, "missing", "not installed", todo, need)
    worked, answer = _try([sys.executable, "-W", "ignore", "-c", code])
    return Row(name, "ok" if worked else "broken", answer, None if worked else todo, need)


def _program(program: str, arguments: tuple[str, ...], todo: str) -> Row:
    title = _PROGRAM_TITLES.get(program, program)
    path = shutil.which(program)
    if path is None:
        return Row(title, "missing", f"no {program} on the PATH", todo, "more")
    worked, answer = _try([path, *arguments], first=True)
    return Row(title, "ok" if worked else "broken", answer, None if worked else todo, "more")


def _try(command: list[str], *, first: bool = False) -> tuple[bool, str]:
    """Run a command. Returns: whether it worked, and one line of its output (the last one, or the first)."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRY_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {_TRY_SECONDS} s"
    except OSError as error:
        return False, str(error)
    lines = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip().splitlines()
    line = (lines[0] if first and done.returncode == 0 else lines[-1]) if lines else "no output"
    if done.returncode < 0:
        line = f"ended by signal {-done.returncode}: {line}"
    return done.returncode == 0, line


# A tiny call of every op: inputs as (type, shape, values) in order, and the values of the first output.
_OP_CALLS: Mapping[str, tuple[Mapping[str, Any], list[float]]] = {
    "TopKGather": ({"x": [[1.0], [2.0], [3.0]], "score": [0.5, 0.9, 0.5], "k": [2]}, [1.0, 2.0]),
    "ThresholdGather": ({"x": [[1.0], [2.0], [3.0]], "score": [0.5, 0.9, 0.7], "threshold": 0.6}, [2.0, 3.0]),
    "GatedScatterAdd": (
        {"residual": [[1.0], [2.0]], "rows": [[10.0]], "gate": [[0.5]], "index": [1]},
        [1.0, 7.0],
    ),
    "FullAttention": (
        {
            "query": [[[1.0]]],
            "key": [[[[1.0], [1.0]]]],
            "value": [[[[2.0], [4.0]]]],
            "mask": [[[[True, True]]]],
        },
        [3.0],
    ),
    "RoutedExperts": (
        {
            "rows": [[1.0]],
            "logits": [[0.0, 1.0]],
            "gate": [[[1.0]], [[1.0]]],
            "up": [[[2.0]], [[4.0]]],
            "down": [[[1.0]], [[0.5]]],
        },
        [1.46212],  # 4 x 0.5 x 1 x sigmoid(1): the second expert
    ),
    "GatheredAttention": (
        {
            "query": [[1.0]],
            "index": [1],
            "key": [[[[1.0], [1.0]]]],
            "value": [[[[2.0], [4.0]]]],
            "mask": [[[[True, False], [True, True]]]],
        },
        [3.0],
    ),
}


def _op(name: str) -> Row:
    """Run an op's portable body in ONNX Runtime and compare the result with the expected values."""
    todo = "pip install --upgrade onnx onnxruntime"
    call = _OP_CALLS.get(name)
    if call is None:
        return Row(f"op {name}", "broken", "gsx doctor has no test call for it", "report this", "run")
    try:
        found = _run_op(name, call[0])
    except Exception as error:  # whatever the libraries raise is the answer
        return Row(f"op {name}", "broken", str(error).strip().splitlines()[0], todo, "run")
    if [round(value, 5) for value in found] != call[1]:
        return Row(f"op {name}", "broken", f"gives {found}, expected {call[1]}", todo, "run")
    return Row(f"op {name}", "ok", "runs in ONNX Runtime, with the right values", None, "run")


def _run_op(name: str, inputs: Mapping[str, Any]) -> list[float]:
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper

    from gsx_plugins.domain import DOMAIN, ONNX_OPSET, OPSET_VERSION, node
    from gsx_plugins.registry import OPS

    numpy_types = {"T": np.float32, "float": np.float32, "int64": np.int64, "bool": np.bool_}
    op = OPS[name]
    feeds: dict[str, Any] = {n: np.asarray(inputs[n], numpy_types[kind]) for n, kind in op.inputs}
    call = node(op, [n for n, _ in op.inputs], [n for n, _ in op.outputs], "call", **dict.fromkeys(op.attributes, 1))
    graph = helper.make_graph(
        [call],
        "doctor",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info(op.outputs[0][0], TensorProto.FLOAT, None)],  # its shape depends on data
    )
    model = helper.make_model(
        graph,
        ir_version=11,
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        functions=[op.function()],
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [float(value) for value in session.run([op.outputs[0][0]], feeds)[0].ravel()]


def _nvcc() -> Row:
    from gsx_plugins.build import find_nvcc

    return _build_tool("nvcc", find_nvcc)


def _cmake() -> Row:
    from gsx_plugins.build import find_cmake

    return _build_tool("cmake", find_cmake)


def _headers() -> Row:
    from gsx_plugins.build import find_headers

    def find() -> tuple[Path, tuple[int, int]]:
        found = find_headers()
        return found.folder, found.version

    return _build_tool("TensorRT headers", find)


def _build_tool(name: str, find: Callable[[], tuple[Path, tuple[int, int]]]) -> Row:
    """The tool that `gsx plugins build` finds, and whether its version is recent enough."""
    from gsx_plugins.errors import PluginLibraryError

    try:
        place, version = find()
    except PluginLibraryError as error:
        status: Status = "broken" if error.found else "missing"
        detail = f"{error.what}: {error.found}" if error.found else error.what
        return Row(name, status, detail, f"{error.todo} (to build the plugins)", "more")
    return Row(name, "ok", f"{'.'.join(map(str, version))}, {place}", None, "more")


def _library() -> Row:
    """The library of kernels and plugins: loaded and called in a process of its own."""
    from gsx_plugins.errors import PluginLibraryError
    from gsx_plugins.library import find_kernels, record_of

    todo = "gsx plugins build"
    try:
        path = find_kernels()
    except PluginLibraryError as error:
        return Row("plugin library", "broken", f"{error.what}: {error.found}", error.todo, "more")
    if path is None:
        return Row(
            "plugin library", "missing", "not built for these sources", f"{todo} (for TensorRT and GPUs)", "more"
        )
    code = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).gsx_error_string; f.restype = ctypes.c_char_p; "
        "assert f(0) == b'success'; print('loads and answers')"
    )
    worked, answer = _try([sys.executable, "-c", code, str(path)])
    record = record_of(path)
    built = f", for {', '.join(record.architectures)}" if record else ""
    detail = f"{path.name}: {answer}{built}"
    return Row("plugin library", "ok" if worked else "broken", detail, None if worked else f"{todo} --force", "more")


def _disk() -> Row:
    """Free space in the working directory, and whether it is writable."""
    place = Path.cwd()
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free in the working directory"
    if not os.access(place, os.W_OK):
        return Row("disk", "broken", f"the working directory is not writable, {found}", "give -o elsewhere", "more")
    if free < _MIN_FREE_BYTES:
        return Row("disk", "broken", found, "free some space: a bundle is as large as its model", "more")
    return Row("disk", "ok", found, None, "more")


def _memory() -> Row:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):
        return Row("memory", "missing", "this system does not report it", None, "more")
    text = Path("/proc/meminfo")
    if text.is_file():  # memory used by caches is available too
        for line in text.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return Row("memory", "ok", f"{free / 1e9:.1f} GB of {total / 1e9:.1f} GB available", None, "more")
