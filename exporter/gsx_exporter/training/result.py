"""Writing what a run gave: a small directory with an adapter and gates, or a whole checkpoint.

In modes "lora" and "frozen", the directory is a PEFT adapter as PEFT writes it, `gates.safetensors` with the gates by
their names in a checkpoint, and in `adapter_config.json` the section `gsx` with the base's hash. In mode "full" it is a
Hugging Face checkpoint as transformers writes it, with gates among its tensors. Either is written completely or not at
all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.names import ADAPTER, CONFIG, GATES, GENERATION_CONFIG
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.tensors import is_gate
from gsx_exporter.training.model import Subject, section_of
from gsx_exporter.training.settings import TrainSettings

SETTINGS, HISTORY = "training.yaml", "training.json"


Weights = Mapping[str, torch.Tensor]  # by the names of transformers' model


def write_adapter(
    subject: Subject, weights: Weights, checkpoint: Checkpoint, base_sha256: str, dtype: torch.dtype, folder: Path
) -> None:
    """Write adapter, gates and section.

    Args: weights: of the whole model; checkpoint: the base; base_sha256: the hash of its weights.
    """
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from peft.utils.constants import DUMMY_TARGET_MODULES

    adapted = subject.adapted
    if adapted is None:  # gates alone: an adapter of no layer, which PEFT and gsx read like any other
        config = LoraConfig(r=1, target_modules=DUMMY_TARGET_MODULES, task_type="CAUSAL_LM")
        with quiet_transformers():
            adapted = PeftModel(subject.hf, config)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path, config.revision = base_name(checkpoint)
    named = {f"base_model.model.{name}": tensor for name, tensor in weights.items()}
    state = {name: tensor.to(dtype) for name, tensor in get_peft_model_state_dict(adapted, named).items()}
    with quiet_transformers():
        adapted.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's; the card takes its place
    path = folder / ADAPTER
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["gsx"] = {**section_of(subject.config), "base_sha256": base_sha256}
    path.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    gates = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in weights.items() if is_gate(name)}
    if gates:
        save_file(gates, folder / GATES, metadata={"format": "pt"})


def write_checkpoint(subject: Subject, weights: Weights, base: Path, settings: TrainSettings, folder: Path) -> None:
    """Write a whole model.

    Args: weights: of it; base: a directory with configuration and tokenizer of the result.
    """
    dtype = getattr(torch, settings.save_dtype)
    hf = subject.hf
    hf.config.gsx = section_of(subject.config)
    hf.config.dtype = settings.save_dtype
    state = {name: tensor.to(dtype) for name, tensor in weights.items()}
    with quiet_transformers():
        hf.save_pretrained(str(folder), state_dict=state, safe_serialization=True)
    for path in sorted(base.iterdir()):
        if path.name != CONFIG:
            (folder / path.name).write_bytes(path.read_bytes())
    if not (base / GENERATION_CONFIG).is_file():
        # Then config.json decides; the family's defaults, which are not in the file, must not be written into it.
        (folder / GENERATION_CONFIG).unlink(missing_ok=True)


def base_name(checkpoint: Checkpoint) -> tuple[str, str | None]:
    """What an adapter's configuration calls its base: a path, or a hub id with the commit."""
    directory = Path(checkpoint.source).expanduser()
    if directory.is_dir():
        return str(directory.resolve()), None
    # The hub's cache calls a snapshot's folder by its commit.
    return checkpoint.source, checkpoint.directory.name


def history_json(log: list[dict[str, Any]]) -> str:
    """The Trainer's log as a file."""
    return json.dumps(log, indent=1) + "\n"
