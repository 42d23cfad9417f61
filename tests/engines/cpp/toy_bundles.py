"""Bundles of the toy models of the vectors, with engines for the stand-in for TensorRT (engines/cpp/tests/standin)."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gsx_engines.tensorrt.backend import platform_name
from gsx_engines.tensorrt.loading import ENGINE_FILE, ENGINES

BACKEND = "tensorrt"
# The stand-in's GPU has compute capability 9.0.
TARGET = "90"
# The inputs that TensorRT needs on the host: values that shapes depend on.
ON_HOST = ("k",)

Change = Callable[[dict[str, Any]], object]


def version_of(headers: Path) -> str:
    """TensorRT's version as its headers have it, e.g. "10.16.0.72"."""
    text = (headers / "NvInferVersion.h").read_text(encoding="utf-8")
    found = dict(re.findall(r"#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH|BUILD)(?:_ENTERPRISE)? (\d+)", text))
    return ".".join(found[part] for part in ("MAJOR", "MINOR", "PATCH", "BUILD"))


def write_bundle(
    directory: Path,
    manifest: Mapping[str, Any],
    version: str,
    *,
    record: Change = lambda entry: None,
    plan: Change = lambda plan: None,
) -> None:
    """Write a toy model as a bundle whose engines fit the stand-in.

    Args:
        manifest: as in the vectors: without hashes, and with engines of another backend.
        version: TensorRT's version, as the library reports it.
        record: changes the engines' record, which gsx reads.
        plan: changes every engine, which the stand-in reads.
    """
    made = copy.deepcopy(dict(manifest))
    directory.mkdir(parents=True)
    made["weights"] |= _write(directory / made["weights"]["file"], b"weights")
    for name, graph in made["graphs"].items():
        graph["sha256"] = _write(directory / graph["file"], name.encode())["sha256"]
    for engines, entry in made["engines"].items():
        folder = directory / ENGINES / engines
        folder.mkdir(parents=True)
        for name, one in entry["graphs"].items():
            engine = {"manifest": manifest, "set": engines, "graph": name, "on_host": ON_HOST, "plugins": False}
            plan(engine)
            one |= _write(folder / one["file"], json.dumps(engine).encode())
            one |= {"graph_sha256": made["graphs"][name]["sha256"], "weights_sha256": made["weights"]["sha256"]}
        entry |= {"backend": BACKEND, "tensorrt_version": version, "targets": [TARGET], "platform": platform_name()}
        record(entry)
        (folder / ENGINE_FILE).write_text(json.dumps(entry), encoding="utf-8")
    (directory / "gsx.json").write_text(json.dumps(made), encoding="utf-8")


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file. Returns: its entry in a manifest."""
    path.write_bytes(content)
    return {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
