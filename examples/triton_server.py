"""Runs Triton Inference Server on this machine's CPU, without a container: the server in the wheel nvidia-pytriton.

    make serve                                  or, with your own environment and model repository:
    python examples/triton_server.py out/models --environment .venv-triton --port 8000

`make triton` sets up the environment. The tests and benchmarks/serving.py start their servers with it. For production
use NVIDIA's images (docs/triton.md).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = Path(__file__).resolve().parent.parent / ".venv-triton"


@dataclass(frozen=True)
class Server:
    """A server that is ready.

    Args:
        process: the process of tritonserver.
        port: port for HTTP; gRPC has the next one, metrics the one after.
        log: the file that it writes.
    """

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        """The server's HTTP address."""
        return f"http://127.0.0.1:{self.port}"


def find_server(environment: Path = ENVIRONMENT) -> Path | None:
    """The folder of the server's files in an environment; None if it is not installed."""
    found = sorted(environment.glob("lib/python3.*/site-packages/pytriton/tritonserver"))
    return found[0] if found and (found[0] / "bin" / "tritonserver").is_file() else None


@contextmanager
def running(
    repository: Path,
    *,
    port: int,
    environment: Path = ENVIRONMENT,
    options: Sequence[str] = (),
    seconds: float = 120.0,
) -> Iterator[Server]:
    """A context manager that runs a server of a model repository, ready for requests; the server ends with the block.

    Args:
        port: port for HTTP; the next two must be free too.
        options: further options of tritonserver.
        seconds: time to become ready. A server whose model process cannot start waits forever without an error.
    Raises:
        RuntimeError: the server ended, or was not ready in time; has the end of its log.
    """
    home = find_server(environment)
    if home is None:
        raise RuntimeError(f"{environment}: no tritonserver there; `make triton` installs it")
    _check_ports(port)
    python = environment / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_python_version(), sysconfig.get_config_var('LIBDIR'))"
    version, libraries = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    folder = Path(tempfile.mkdtemp(prefix="gsx-triton-"))
    backend = folder / "backends" / "python"
    backend.mkdir(parents=True)
    for file in [*(home / "backends" / "python").iterdir(), *(home / "python_backend_stubs" / version).iterdir()]:
        (backend / file.name).symlink_to(file)
    # The model process uses the Python that it finds first, and that Python's library.
    surroundings = {
        **os.environ,
        "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "LD_LIBRARY_PATH": libraries,
    }
    command = [
        str(home / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={folder / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={port + 1}",
        "--metrics-address=127.0.0.1",
        f"--metrics-port={port + 2}",
        "--allow-gpu-metrics=false",
        "--pinned-memory-pool-byte-size=0",
        "--exit-timeout-secs=5",
        # Servers of one machine must not share a name.
        f"--backend-config=python,shm-region-prefix-name=gsx-{os.getpid()}-{port}",
        *options,
    ]
    log = folder / "server.log"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=surroundings)
        server = Server(process, port, log)
        try:
            _wait(server, seconds)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_ports(first: int) -> None:
    """Refuse ports that are in use: the other server would be taken for ours."""
    for port in range(first, first + 3):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise RuntimeError(f"port {port} is in use: choose others with --port") from error


def _wait(server: Server, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended with code {server.process.returncode}\n{_tail(server.log)}")
        try:
            with urllib.request.urlopen(f"{server.url}/v2/health/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the server was not ready after {seconds:g} s\n{_tail(server.log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def main() -> None:
    """Serve a repository until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Run Triton on this machine's CPU.")
    parser.add_argument("repository", type=Path)
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT)
    parser.add_argument("--port", type=int, default=8000, help="of HTTP; gRPC is the next one, metrics the one after")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the server ends too
    try:
        with running(arguments.repository, port=arguments.port, environment=arguments.environment) as server:
            print(f"{server.url} is ready; Ctrl-C ends it", flush=True)
            server.process.wait()
    except KeyboardInterrupt:
        pass
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
