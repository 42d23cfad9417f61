"""Training data from a hub: by id, by the name of a part, streamed; and a hub that cannot be reached.

`datasets` is the real library; the server speaks the hub's protocol as far as reading needs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import COMMIT, HubHandler, entry, serving
from tests.tiny import tiny_checkpoint

REPO = "someone/tiny-texts"


def _lines(word: str, count: int) -> bytes:
    return "".join(json.dumps({"text": f"{word} {n} says {n * n}"}) + "\n" for n in range(count)).encode()


# A data set with two parts, each with two splits, as its card says.
FILES: Mapping[str, bytes] = {
    "README.md": b"""---
configs:
- config_name: first
  default: true
  data_files:
  - {split: train, path: first/train.jsonl}
  - {split: test, path: first/test.jsonl}
- config_name: second
  data_files:
  - {split: train, path: second/a-*.jsonl}
  - {split: test, path: second/test.jsonl}
---
# Tiny texts
""",
    "first/train.jsonl": _lines("one", 40),
    "first/test.jsonl": _lines("held", 4),
    "second/a-0.jsonl": _lines("two", 30),
    "second/a-1.jsonl": _lines("three", 30),
    "second/test.jsonl": _lines("held two", 4),
}
# Reads a data set with each of several settings, and prints the texts that it gave. Arguments: model, source, settings.
READ = """
import json, sys
from transformers import AutoTokenizer
from gsx_exporter.training.data import read_rows
from gsx_exporter.training.settings import DataSettings
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for values in json.loads(sys.argv[3]):
    data = DataSettings(source=sys.argv[2], packed=False, length=64, **values)
    rows = read_rows(data, tokenizer, end_of_text=None, seed=0, held_out_rows=3)
    texts = [[tokenizer.decode(row["input_ids"]) for row in part] for part in (rows.train, rows.held_out)]
    print(json.dumps(texts))
"""
SETTINGS: list[dict[str, Any]] = [
    {"held_out": "test"},
    {"name": "second", "held_out": "test"},
    {"name": "second", "held_out": "test", "streaming": True},
    {"name": "second", "split": "test", "held_out": 0.5},
    {"name": "first", "rows": 10, "held_out": 0.1, "revision": COMMIT},
]


class DataHub(HubHandler):
    """Gives the files of one data set."""

    def get(self) -> None:
        base = f"/api/datasets/{REPO}"
        tree, _, query = self.path.partition("?")
        if tree in (base, f"{base}/revision/main", f"{base}/revision/{COMMIT}"):
            self.send_json({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]})
        elif tree.startswith(f"{base}/tree/{COMMIT}"):
            self.send_json(
                self._listed(tree.removeprefix(f"{base}/tree/{COMMIT}").strip("/"), "recursive=True" in query)
            )
        else:
            revision, _, name = tree.removeprefix(f"/datasets/{REPO}/resolve/").partition("/")
            self._file(FILES.get(name) if revision in ("main", COMMIT) else None)

    def post(self) -> None:
        """What is known of some paths."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.send_json([one for one in self._listed("", True) if one["path"] in asked])

    def _listed(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        names = [name for name in FILES if not folder or name.startswith(f"{folder}/")]
        folders = {name.rpartition("/")[0] for name in names} - {"", folder}
        found += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        for name in names:
            if recursive or name.rpartition("/")[0] == folder:
                found.append(entry(name, FILES[name]))
        return found

    def _file(self, content: bytes | None) -> None:
        if content is not None:
            self.send_file(content)
            return
        missing = "EntryNotFound" if f"/{REPO}/" in self.path else "RepoNotFound"
        self.send_json({"error": "not found"}, 404, {"X-Error-Code": missing})


@pytest.fixture
def hub() -> Iterator[str]:
    with serving(DataHub) as address:
        yield address


def python(arguments: list[str], home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own: the libraries read the hub's address when they are imported."""
    own = {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=120, check=False)


def check(done: subprocess.CompletedProcess[str]) -> None:
    """What each of `SETTINGS` must give."""
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    first, second, streamed, test, few = [(sorted(train), held) for train, held in found]
    texts = {name: [json.loads(line)["text"] for line in content.splitlines()] for name, content in _data().items()}
    both = sorted(texts["second/a-0.jsonl"] + texts["second/a-1.jsonl"])
    assert first == (sorted(texts["first/train.jsonl"]), texts["first/test.jsonl"])
    assert second == (both, texts["second/test.jsonl"])
    assert streamed == (both, texts["second/test.jsonl"][:3])
    assert sorted(test[0] + test[1]) == texts["second/test.jsonl"]
    assert sorted(few[0] + few[1]) == sorted(texts["first/train.jsonl"][:10])


def _data() -> dict[str, bytes]:
    return {name: content for name, content in FILES.items() if name.endswith(".jsonl")}


def test_by_id(hub: str, tmp_path: Path) -> None:
    """Downloaded and streamed, the default part and a named one, splits, and a revision."""
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True)
    check(python(["-c", READ, str(model), REPO, json.dumps(SETTINGS)], tmp_path, HF_ENDPOINT=hub))


def test_a_copy_of_it(tmp_path: Path) -> None:
    """A directory with the files of a data set of the hub, read offline: its card says what its parts are."""
    for name, content in FILES.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(content)
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True)
    settings = [{key: value for key, value in one.items() if key != "revision"} for one in SETTINGS]
    source = str(tmp_path / "data")
    check(python(["-c", READ, str(model), source, json.dumps(settings)], tmp_path, HF_HUB_OFFLINE="1"))


@pytest.mark.parametrize(
    ("source", "options", "part"),
    [
        (REPO, {"HF_HUB_OFFLINE": "1"}, "the hub cannot be reached"),
        ("someone/else", {}, "no such data set on the hub"),
    ],
)
def test_a_hub_without_it(hub: str, tmp_path: Path, source: str, options: dict[str, str], part: str) -> None:
    """One message, and nothing is written."""
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True)
    out = tmp_path / "out"
    arguments = [
        "-m",
        "gsx",
        "train",
        "--model",
        str(model),
        "--data",
        source,
        "--set",
        "data.length=64",
        "-o",
        str(out),
    ]
    done = python(arguments, tmp_path, **{"HF_ENDPOINT": hub, **options})
    assert done.returncode == 1
    assert f"{source}: {part}" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []
