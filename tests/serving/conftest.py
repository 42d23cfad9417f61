"""A real Triton server for the session: a model as `gsx triton` makes it, one with a tiny queue, one as Triton's OpenAI
front end calls it, two of other rules.

`make triton` installs it; without it, these tests are skipped, and say so.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from examples.triton_server import ENVIRONMENT, Server, find_server, running
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.serving.repository import write_repository

CLIENT = Path(__file__).parents[2] / "examples" / "triton_client.py"


@pytest.fixture(scope="session")
def served(make_tiny_bundle: Callable[..., Path]) -> Bundle:
    """The bundle that is served: gates, a tokenizer, a draft."""
    return open_bundle(make_tiny_bundle(draft="exit:2"))


@pytest.fixture(scope="session")
def other_rules(
    make_tiny_bundle: Callable[..., Path], make_looped_bundle: Callable[[str], Bundle]
) -> dict[str, Bundle]:
    """Bundles, by model name, whose requests have other keep settings than a budget."""
    policies = {"layers": "layers", "calm": "calm:threshold=0.02"}
    found = {
        name: open_bundle(make_tiny_bundle(policy=policy, budget=None, calibration=None))
        for name, policy in policies.items()
    }
    return found | {"loops": make_looped_bundle("per_loop"), "one-cache": make_looped_bundle("last_loop")}


@pytest.fixture(scope="session")
def server(
    served: Bundle,
    other_rules: dict[str, Bundle],
    base_bundles: dict[str, Bundle],
    chat_bundle: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Models `gsx`, with four slots, `small`, with one slot and room for one more request, `chat`, with a chat
    template, those of other rules, and those of other tokenizers."""
    if find_server() is None:
        pytest.skip(f"no Triton server in {ENVIRONMENT.name}: `make triton` installs it")
    folder = tmp_path_factory.mktemp("triton")
    write_repository(served, folder / "models", name="gsx", slots=4, threads=1)
    write_repository(served, folder / "more", name="small", slots=1, queue=1, context=256, threads=1)
    write_repository(served, folder / "front", name="front", slots=4, threads=1, form="openai")
    others = (
        other_rules
        | {"chat": open_bundle(chat_bundle)}
        | {model_of(name): bundle for name, bundle in base_bundles.items()}
    )
    for name, bundle in others.items():
        write_repository(bundle, folder / name, name=name, slots=4, threads=1)
    repositories = [f"--model-repository={folder / name}" for name in ("more", "front", *others)]
    models = [f"--load-model={name}" for name in ("gsx", "small", "front", *others)]
    options = [*repositories, "--model-control-mode=explicit", *models]
    with running(folder / "models", port=free_ports(), options=options) as server:
        yield server


def model_of(base: str) -> str:
    """The server's name for one of `base_bundles`."""
    return base.replace(" ", "-")


def free_ports() -> int:
    """The first of three consecutive unused ports."""
    for first in range(18100, 18900, 3):
        try:
            for port in range(first, first + 3):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@dataclass(frozen=True)
class Grpc:
    """Clients that stream over gRPC, in the server's own environment."""

    port: int

    def __call__(
        self, requests: Sequence[dict[str, Any]], concurrency: int = 1, model: str = "gsx"
    ) -> list[dict[str, Any]]:
        """Answers of the example client, in the order of the requests."""
        command = [ENVIRONMENT / "bin" / "python", CLIENT, "--json", "--url", f"127.0.0.1:{self.port}"]
        done = subprocess.run(
            [*command, "--model", model, "--concurrency", str(concurrency)],
            input="\n".join(map(json.dumps, requests)),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def grpc(server: Server) -> Grpc:
    return Grpc(server.port + 1)
