"""Loading the reference's model: by transformers' own loader, and an adapter by PEFT's.

Only they decide which files, which tensors and whether embedding and head are one table: what gsx understood of the
checkpoint is what parity is there to check.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from gsx_exporter.checkpoint.adapter import Adapter
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.files import WHOLE_TO_TEXT
from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.tensors import rule_module_kind
from gsx_exporter.errors import CheckpointError


def load_model(checkpoint: Checkpoint) -> Any:
    """transformers' model of a checkpoint, in float32, with eager attention.

    Raises:
        CheckpointError: transformers cannot load it, or does not find all weights.
    """
    whole = {}
    if checkpoint.whole is not None:
        names = {f"^{re.escape(old)}": new for old, new in WHOLE_TO_TEXT.items()}
        whole = {"config": checkpoint.hf_config, "key_mapping": names}
    with quiet_transformers():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory,
                **whole,
                dtype=torch.float32,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # many types, all about this directory
            raise CheckpointError(f"{checkpoint.source}: transformers cannot load it", found=one_line(error)) from error
    if found["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.source}: transformers does not find all weights",
            expected=", ".join(sorted(found["missing_keys"])[:3]),
            found="no such tensors",
        )
    if checkpoint.adapter is not None:
        model = _with_adapter(model, checkpoint.adapter)
        model.generation_config = _generation_config(checkpoint)
    # Inverse frequencies are not weights: they are computed again, in float32.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def _with_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with an adapter, merged by PEFT. Modules of a keep rule are no part of transformers' model."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise CheckpointError(
            f"{adapter.directory}: the reference of an adapter needs PEFT", todo='pip install "gsx[formats]"'
        ) from error
    try:
        with quiet_transformers():
            settings: Any = PeftConfig.from_pretrained(str(adapter.directory))
            for key in ("modules_to_save", "target_modules"):
                named = getattr(settings, key)
                if isinstance(named, list | set):
                    setattr(settings, key, [name for name in named if not rule_module_kind(name)] or None)
            if model.lm_head.weight is model.model.embed_tokens.weight:
                # PEFT trains them apart from each other, but merges into the one weight that both are.
                model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
            merged = PeftModel.from_pretrained(model, str(adapter.directory), config=settings).merge_and_unload()
    except Exception as error:  # many types, all about this directory
        raise CheckpointError(f"{adapter.directory}: PEFT cannot load it", found=one_line(error)) from error
    return merged


def _generation_config(checkpoint: Checkpoint) -> Any:
    """As transformers reads it, from the directory whose file counts."""
    with quiet_transformers():
        try:
            return GenerationConfig.from_pretrained(checkpoint.generation_directory, local_files_only=True)
        except OSError:  # without such a file
            return GenerationConfig.from_model_config(checkpoint.hf_config)
