"""Opening the runtime that `--backend` names."""

from __future__ import annotations

from importlib.util import find_spec

from gsx.backend_names import BackendName, Device
from gsx_engines.errors import EngineError
from gsx_engines.runners.select import Backend
from gsx_plugins.errors import UsageError


def open_backend(name: BackendName, device: Device | None = None, threads: int | None = None) -> Backend:
    """What runners are opened with.

    Args:
        device: where PyTorch runs; None for its GPU if it has one.
        threads: of PyTorch within an op; the other runtimes are told when a runner is opened.
    Raises:
        UsageError: a device for another backend.
        EngineError: PyTorch is asked for and not installed, or cannot run there.
    """
    if name != "torch":
        if device is not None:
            raise UsageError("--device is for --backend torch alone", found=f"--backend {name}")
        return name
    missing = [package for package in ("torch", "transformers") if find_spec(package) is None]
    if missing:
        raise EngineError(
            "backend torch: is not installed",
            expected="the packages torch and transformers",
            found=f"no {' and no '.join(missing)}",
            todo='pip install "gsx[export]"',
        )
    from gsx.torch_runtime import TorchRuntime

    return TorchRuntime(device, threads=threads)
