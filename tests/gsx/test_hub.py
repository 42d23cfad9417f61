"""Bundles on a hub: pushed with a card, fetched by name, checked by hash.

The library is the real one; the server speaks the hub's protocol as far as these two need it.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import gsx
from gsx.workflows.hub import card, open_named
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.errors import BundleError
from tests.hub_server import COMMIT, HubHandler, entry, serving

REPO = "someone/tiny-gsx"


class Hub(HubHandler):
    """Takes a commit of one repository, and gives its files."""

    files: dict[str, bytes]

    def post(self) -> None:
        body = self._body()
        if self.path == "/api/repos/create":
            self.send_json({"url": f"{self._address}/{REPO}", "name": REPO})
        elif self.path == "/api/validate-yaml":  # of a card
            self.send_json({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            names = [one["path"] for one in json.loads(body)["files"]]
            self.send_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif self.path.endswith("/commit/main"):
            for line in body.splitlines():
                one = json.loads(line)
                if one["key"] == "file":
                    self.files[one["value"]["path"]] = base64.b64decode(one["value"]["content"])
            self.send_json({"commitUrl": f"{self._address}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self.send_json({}, 404)

    def get(self) -> None:
        if self.path.startswith(f"/api/models/{REPO}/revision/main"):
            self.send_json({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]})
            return
        if self.path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            rows = [entry(name, content) for name, content in self.files.items()]
            self.send_json(rows)
            return
        content = self.files.get(self.path.partition(f"/{REPO}/resolve/{COMMIT}/")[2])
        if content is None:
            self.send_json({"error": "Repository not found"}, 404)
            return
        self.send_file(content)

    @property
    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, dict[str, bytes]]]:
    files: dict[str, bytes] = {}
    with serving(type("OneHub", (Hub,), {"files": files})) as address:
        yield address, files


def python(code: str, address: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that knows this hub: its library reads the address when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home / "cache"),
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def pushed(
    hub: tuple[str, dict[str, bytes]], tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    address, files = hub
    code = f"import gsx; print(gsx.push({str(tiny_bundle)!r}, {REPO!r}))"
    done = python(code, address, tmp_path_factory.mktemp("hub"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(COMMIT)
    return files


def test_a_bundle_is_pushed_whole_with_a_card(pushed: dict[str, bytes], tiny_bundle: Path) -> None:
    own = {path.relative_to(tiny_bundle).as_posix(): path for path in tiny_bundle.rglob("*") if path.is_file()}
    assert set(pushed) == {*own, "README.md"}
    assert all(pushed[name] == path.read_bytes() for name, path in own.items())


def test_the_card_says_what_it_is(tiny_bundle: Path) -> None:
    text = card(open_bundle(tiny_bundle), REPO)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "gsx"
    assert "| policy | gateskip, budget 0.7 |" in body
    assert f'print(gsx.generate("{REPO}", "Once upon a time").text)' in body
    for way in ("ONNX Runtime", "Optimum", "C++", "Triton"):
        assert way in body


def test_a_bundle_is_fetched_by_its_name(
    pushed: dict[str, bytes], hub: tuple[str, dict[str, bytes]], tiny_bundle: Path, tmp_path: Path
) -> None:
    pushed["evil.py"] = b"raise SystemExit('code was run')"
    code = f"""
import sys, gsx
print(gsx.generate({REPO!r}, ids=[5, 6, 7], max_new_tokens=8).ids)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = python(code, hub[0], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(gsx.generate(tiny_bundle, ids=[5, 6, 7], max_new_tokens=8).ids)
    fetched = [path.name for path in (tmp_path / "cache" / "gsx" / "hub").rglob("*") if path.is_file()]
    assert "weights.bin" in fetched
    assert "evil.py" not in fetched


def test_changed_weights_are_refused(
    pushed: dict[str, bytes], hub: tuple[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = pushed["weights.bin"]
    monkeypatch.setitem(pushed, "weights.bin", bytes([weights[0] ^ 1]) + weights[1:])
    done = python(f"import gsx; gsx.generate({REPO!r}, ids=[5], max_new_tokens=2)", hub[0], tmp_path)
    assert done.returncode != 0
    assert "weights.bin does not match gsx.json" in done.stderr


def test_a_hub_that_cannot_be_reached(tiny_bundle: Path, tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    done = python(f"import gsx; gsx.push({str(tiny_bundle)!r}, {REPO!r})", nowhere, tmp_path)
    assert "the bundle could not be pushed to the hub" in done.stderr
    assert f"the bundle stays in {tiny_bundle}" in done.stderr
    done = python(f"import gsx; gsx.generate({REPO!r}, ids=[5])", nowhere, tmp_path)
    assert "neither a local bundle nor one that could be fetched from the hub" in done.stderr


@pytest.mark.parametrize("name", ["./out/demo", "/out/demo", "demo", "a/b/c"])
def test_what_is_no_name_of_the_hub_is_a_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        open_named(name)
