"""Snapshots of a training run: everything that is needed to continue it exactly, without pickle.

A snapshot is a directory such as `step-00001200`: weights and optimizer tensors as safetensors, the rest as JSON. It is
written completely or not at all. Random generators have no state to store: see `schedule.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gsx_exporter.errors import CheckpointError
from gsx_exporter.training.config import TrainConfig
from gsx_plugins.files import writing_folder

_WEIGHTS, _OPTIMIZER, _STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
_PREFIX = "step-"
# Number of snapshots to keep: the newest, and the one before it in case the newest is damaged.
_KEPT = 2


@dataclass(frozen=True)
class Snapshot:
    """A snapshot, read from disk.

    Args:
        step: number of steps done.
        config: of the run.
        weights: parameters by their checkpoint names, float32.
        optimizers: for each optimizer, parameter number -> its state (momenta, step count).
        text_sha256: hash of the token ids that the run trains on.
    """

    step: int
    config: TrainConfig
    weights: dict[str, torch.Tensor]
    optimizers: list[dict[int, dict[str, torch.Tensor]]]
    text_sha256: str


def write_snapshot(
    directory: Path,
    *,
    step: int,
    config: TrainConfig,
    weights: dict[str, torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    text_sha256: str,
) -> Path:
    """Write a snapshot and remove old ones. Returns: its directory."""
    tensors: dict[str, torch.Tensor] = {}
    for number, optimizer in enumerate(optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"{number}.{index}.{key}"] = value.contiguous()
    target = directory / f"{_PREFIX}{step:08d}"
    directory.mkdir(parents=True, exist_ok=True)
    with writing_folder(target) as made:
        save_file({name: p.detach().contiguous() for name, p in weights.items()}, made / _WEIGHTS)
        save_file(tensors, made / _OPTIMIZER)
        state = {
            "step": step,
            "config": config.to_dict(),
            "optimizers": len(optimizers),
            "text_sha256": text_sha256,
        }
        (made / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for old in snapshots(directory)[:-_KEPT]:
        shutil.rmtree(old)
    return target


def snapshots(directory: Path) -> list[Path]:
    """All snapshots of a run, oldest first."""
    return sorted(path for path in directory.glob(_PREFIX + "*") if path.is_dir())


def read_snapshot(path: Path) -> Snapshot:
    """Read one snapshot.

    Raises:
        CheckpointError: the snapshot is damaged.
    """
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        weights = load_file(path / _WEIGHTS)
        tensors = load_file(path / _OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: is not a complete snapshot of a training run",
            found=str(error),
            todo="remove this directory: the run then continues from the snapshot before it",
        ) from error
    optimizers: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in range(state["optimizers"])]
    for name, tensor in tensors.items():
        number, index, key = name.split(".", 2)
        optimizers[int(number)].setdefault(int(index), {})[key] = tensor
    config = TrainConfig.from_dict(state["config"])
    return Snapshot(state["step"], config, weights, optimizers, state["text_sha256"])
