"""Shared by tests of the command line: an outcome, a snapshot of a directory, ways to damage files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

# gsx in a process of its own, for signals and pipes, and how long it may take.
GSX = [sys.executable, "-c", "from gsx.cli import main; main()"]
SECONDS = 120


class Outcome(NamedTuple):
    """Exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Gsx = Callable[..., Outcome]
Spoil = Callable[[Path], Any]


def snapshot(directory: Path) -> dict[str, str]:
    """Every file below a directory, hidden ones too, with its hash."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        for path in sorted(directory.rglob("*"))
    }


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
