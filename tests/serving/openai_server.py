"""A real `gsx serve` in a process of its own, and clients for it."""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from tests.gsx.command_line import GSX


@dataclass(frozen=True)
class HttpServer:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    key: str = "none"

    @property
    def client(self) -> OpenAI:
        """The official client, which does not hide a refusal by asking again."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, str, Any]:
        """Status, body and headers of a plain request; a body is posted, as JSON unless it is bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        known = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url + path, data, known | (headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(), error.headers

    def metric(self, name: str) -> float:
        """A counter or gauge."""
        lines = self.ask("/metrics")[1].splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[-1])


@contextmanager
def serving(bundle: Path, *options: object, key: str | None = None) -> Iterator[HttpServer]:
    """A server of a bundle on a free port."""
    command = [*GSX, "serve", str(bundle), "--port", "0", "--name", "tiny", "--threads", "1", *map(str, options)]
    environment = os.environ | ({"GSX_API_KEY": key} if key else {})
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        assert "http://" in line, line + process.stderr.read().decode()
        try:
            yield HttpServer("http://" + line.split("http://")[1].split("/")[0], process, key or "none")
        finally:
            process.kill()


def until(holds: Callable[[], bool], seconds: float = 60) -> bool:
    """Whether something comes to hold in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
