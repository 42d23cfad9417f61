"""Opening the runtime that `--backend` names."""

from __future__ import annotations

from importlib.util import find_spec

from gsx.backend_names import BackendName, Device
from gsx_engines.errors import EngineError
from gsx_engines.runners.select import Backend
from gsx_plugins.errors import UsageError


def open_backend(name: BackendName, device: Device | None = None, threads: int | None = None) -> Backend:
    """The backend to open runners with: a name, or a PyTorch runtime.

    Args:
        device: where PyTorch runs; None for a GPU if PyTorch sees one, else the CPU.
        threads: PyTorch's threads within an op; the other runtimes take theirs when a runner is opened.
    Raises:
        UsageError: a device is given for another backend.
        EngineError: PyTorch is requested but is not installed, or cannot run there.
    """
    if name != "torch":
        if device is not None:
            raise UsageError("--device is only for --backend torch", found=f"--backend {name}")
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
