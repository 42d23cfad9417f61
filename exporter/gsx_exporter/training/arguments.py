"""How a run goes, and whether it may go on: transformers' arguments from the settings, and what is in a working
directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.errors import CheckpointError
from gsx_exporter.training.reading import settings_of
from gsx_exporter.training.settings import TrainSettings
from gsx_plugins.errors import UsageError

# What a working directory has beside the Trainer's own files.
SETTINGS_FILE = "settings.yaml"
_CHECKPOINT, _STATE = "checkpoint-", "trainer_state.json"
# Fields of TrainingArguments that are this module's, and those that a resumed run may change.
_OURS = ("output_dir", "remove_unused_columns", "label_names", "disable_tqdm", "resume_from_checkpoint", "do_train")
_FREE = ("logging_steps", "save_steps", "save_total_limit", "eval_steps", "eval_strategy", "report_to", "run_name")
_DEFAULTS: Mapping[str, Any] = {
    "logging_steps": 10,
    "save_steps": 200,
    "save_total_limit": 2,
    "eval_strategy": "steps",
    "eval_steps": 200,
    "report_to": "none",
    "num_train_epochs": 1,
    "per_device_eval_batch_size": 4,
}


def arguments_of(settings: TrainSettings, work: Path) -> TrainingArguments:
    """transformers' arguments.

    Raises:
        UsageError: an unknown field, one that gsx sets itself, or a value that transformers refuses.
    """
    known = {field.name for field in fields(TrainingArguments) if field.init} - set(_OURS)
    for name in settings.trainer:
        if name not in known:
            raise UsageError(
                f"trainer.{name} is not a setting",
                expected="a field of transformers' TrainingArguments that gsx does not set itself",
                todo="https://huggingface.co/docs/transformers/main_classes/trainer lists them",
            )
    values = {**_DEFAULTS, **settings.trainer}
    if settings.trainer.get("eval_strategy") == "no":
        values.pop("eval_steps")
    if not torch.cuda.is_available():
        values.setdefault("use_cpu", True)
        values.setdefault("dataloader_pin_memory", False)
        if "WORLD_SIZE" in os.environ:
            values.setdefault("ddp_backend", "gloo")
    try:
        arguments = TrainingArguments(
            output_dir=str(work), remove_unused_columns=False, label_names=["labels"], disable_tqdm=True, **values
        )
        for reporter in get_reporting_integration_callbacks(arguments.report_to):
            reporter()  # refuses where its package is not installed
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise UsageError("the section trainer cannot be used", found=one_line(error)) from error
    return arguments


def newest_checkpoint(work: Path, settings: TrainSettings) -> Path:
    """The newest complete checkpoint, after checking that the run had the same settings."""
    found = sorted(
        (path for path in work.glob(_CHECKPOINT + "*") if (path / _STATE).is_file()),
        key=step_of,
    )
    if not found:
        raise UsageError(
            f"{work}: has no checkpoint to resume from", todo="start the run without --resume, in an empty directory"
        )
    import yaml

    path = work / SETTINGS_FILE
    try:
        before = settings_of(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    except (OSError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot be read", found=one_line(error)) from error
    old, new = (_flat(_lasting(one)) for one in (before, settings))
    differing = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if differing:
        name = differing[0]
        raise UsageError(
            f"{work}: the run was started with other settings",
            expected=f"{name} {old.get(name)!r}",
            found=repr(new.get(name)),
            todo=f"give {path} as the recipe, or start a new run in an empty directory",
        )
    return found[-1]


def _lasting(settings: TrainSettings) -> dict[str, Any]:
    """The settings that a resumed run may not change."""
    values = settings.model_dump(mode="json")
    values["trainer"] = {name: value for name, value in values["trainer"].items() if name not in _FREE}
    values.pop("evaluation")
    values.pop("save_dtype")
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def step_of(checkpoint: Path | None) -> int:
    """The step after which a checkpoint was written; 0 for None."""
    return 0 if checkpoint is None else int(checkpoint.name.removeprefix(_CHECKPOINT))


def check_free(directory: Path, *, overwrite: bool, todo: str) -> None:
    """Refuse a directory that has something in it.

    Raises:
        UsageError: it does, and may not be overwritten.
    """
    if directory.is_file():
        raise UsageError(f"{directory}: is a file", expected="a directory")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(f"{directory}: exists and is not empty", todo=f"give another directory, {todo}")
