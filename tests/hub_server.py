"""A hub for tests that use Hugging Face's libraries: what all such servers say in the hub's protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

# Of the only version of a repository.
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    """Answers of a hub. Subclasses say in `get` and `post` to which requests."""

    def get(self) -> None:
        """Answer a GET request, or a HEAD, which gets no body."""
        raise NotImplementedError

    def post(self) -> None:
        """Answer a POST request."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """See `http.server`."""
        self.get()

    def do_HEAD(self) -> None:
        """See `http.server`."""
        self.get()

    def do_POST(self) -> None:
        """See `http.server`."""
        self.post()

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def send_json(self, value: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with JSON."""
        content = json.dumps(value).encode()
        self.send_response(code)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self._send(content)

    def send_file(self, content: bytes) -> None:
        """Answer with a file, or with the part of it that was asked for."""
        first, last, code = 0, len(content) - 1, 200
        if (asked := self.headers.get("Range")) is not None:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            first, last, code = int(begin), min(int(end or last), last), 206
        self.send_response(code)
        self.send_header("ETag", f'"{sha(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self._send(content[first : last + 1])

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file in the list of a repository's files."""
    return {"type": "file", "path": name, "size": len(content), "oid": sha(content)[:40]}


def sha(content: bytes) -> str:
    """The hash by which the hub names contents."""
    return hashlib.sha256(content).hexdigest()


@contextmanager
def serving(handler: type[HubHandler]) -> Iterator[str]:
    """Run a hub. Yields: its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
