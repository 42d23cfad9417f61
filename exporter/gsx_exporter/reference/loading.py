"""Loading the reference's model: by transformers' own loader, and an adapter by PEFT's.

Only they decide which files, which tensors and whether embedding and head are one table: what gsx understood of the
checkpoint is what parity is there to check.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gsx_exporter.checkpoint.adapter import Adapter, MergedTensors
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.experts import of_module
from gsx_exporter.checkpoint.files import WHOLE_TO_TEXT
from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.stored import Tensors
from gsx_exporter.checkpoint.tensors import HEAD, rule_module_kind
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError
from gsx_exporter.families import FAMILIES

_NARROW = {"BF16": torch.bfloat16, "F16": torch.float16}


# A parameter whose values are not in memory -> a function that reads them, float32.
Unread = dict[nn.Parameter, Callable[[], torch.Tensor]]


def load_model(checkpoint: Checkpoint) -> Any:
    """transformers' model of a checkpoint with eager attention, its weights in float32 or as narrow as they are stored.

    Raises:
        CheckpointError: transformers cannot load it, or does not find all weights.
    """
    layout = checkpoint.layout
    by_transformers = layout is None or (layout.by_transformers and checkpoint.whole is None)
    model = _stored(checkpoint, _narrow_type(checkpoint)) if by_transformers else _dequantized(checkpoint)
    if checkpoint.adapter is not None:
        _untie(model, {})
        model = _with_adapter(model, checkpoint.adapter, merge=True)
    return _completed(model, checkpoint)


def load_streamed(checkpoint: Checkpoint) -> tuple[Any, Unread]:
    """The same model, for a checkpoint that is larger than memory.

    Stored floats stay in the mapped files. Weights that transformers could only dequantize all at once are read when
    they are needed, as gsx reads them. PEFT leaves an adapter beside its base, except at embedding and head.

    Returns: the model, and those of its parameters that have no values yet.
    """
    unread: Unread = {}
    if checkpoint.layout is None and checkpoint.gguf is None:
        model = _stored(checkpoint, _stored_type(checkpoint))
    else:
        model, unread = _unread(checkpoint)
    if checkpoint.adapter is not None:
        _untie(model, unread)
        model = _with_adapter(model, checkpoint.adapter, merge=False)
        for place, name in ((model.model, "embed_tokens"), (model, "lm_head")):
            _merge_table(place, name, unread)
    return _completed(model, checkpoint), unread


def _completed(model: Any, checkpoint: Checkpoint) -> Any:
    """The model with what is not a weight."""
    if checkpoint.adapter is not None or checkpoint.gguf is not None:
        model.generation_config = _generation_config(checkpoint)
    if checkpoint.config.loops is not None:
        keys = FAMILIES[checkpoint.config.family].loops
        assert keys is not None
        setattr(model.model.config, keys.count, checkpoint.config.loops.most)
    # Inverse frequencies are not weights: they are computed again, in float32.
    model.model.rotary_emb = rotary = type(model.model.rotary_emb)(config=model.config)
    _long_factors(rotary, checkpoint.config)
    return model


def _long_factors(rotary: Any, config: ModelConfig) -> None:
    """Where the context exceeds LongRoPE's original one: take the long factors for every text.

    transformers takes them by the length of a call, and keeps those for shorter ones in `original_inv_freq`.
    """
    if getattr(rotary, "rope_type", None) != "longrope":
        return
    if config.max_positions <= rotary.config.rope_parameters["original_max_position_embeddings"]:
        return
    longer, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, None, seq_len=config.max_positions)
    rotary.original_inv_freq = longer


def _stored(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model as transformers loads it: quantized weights become floats there too.

    Weights that all have one narrow type keep it: transformers then leaves them in the mapped files, where they take no
    memory until a layer is computed.
    """
    model = _from_pretrained(checkpoint, dtype)
    if dtype != torch.float32 and any("rotary" not in name for name, _ in model.named_buffers()):
        return _from_pretrained(checkpoint, torch.float32)  # a buffer may have been rounded
    return model


def _narrow_type(checkpoint: Checkpoint) -> torch.dtype:
    """The type that holds all weights as they are stored; float32 where they are computed first."""
    if checkpoint.adapter is not None or checkpoint.layout is not None or checkpoint.gguf is not None:
        return torch.float32
    return _stored_type(checkpoint)


def _stored_type(checkpoint: Checkpoint) -> torch.dtype:
    """The type that all weights of the model, or of an adapter's base, have in their files; float32 if several."""
    types = {checkpoint.stored_type(name) for name in checkpoint.names if not rule_module_kind(name)}
    return _NARROW.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


def _from_pretrained(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    options: dict[str, Any] = {}
    if checkpoint.whole is not None:
        names = {f"^{re.escape(old)}": new for old, new in WHOLE_TO_TEXT.items()}
        options = {"config": checkpoint.hf_config, "key_mapping": names}
    if checkpoint.gguf is not None:
        options = {"gguf_file": checkpoint.gguf.path.name}
    with quiet_transformers():
        try:
            if checkpoint.layout is not None:
                config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
                config.quantization_config = {**config.quantization_config, "dequantize": True}
                options = {"config": config}
            model, found = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
        except Exception as error:  # many types, all about this directory
            raise CheckpointError(f"{checkpoint.source}: transformers cannot load it", found=one_line(error)) from error
    if found["missing_keys"]:
        raise CheckpointError(
            f"{checkpoint.source}: transformers does not find all weights",
            expected=", ".join(sorted(found["missing_keys"])[:3]),
            found="no such tensors",
        )
    return model


def _dequantized(checkpoint: Checkpoint) -> Any:
    """The model with the floats that gsx reads: transformers has no dequantization of this layout that runs here.

    Parity does not check these floats then; `tests/exporter/test_layouts.py` does.
    """
    stored = _base(checkpoint)
    model = _from_config(checkpoint, stored)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(of_module(name, stored.tensor, checkpoint.config.experts))
    model.generation_config = _generation_config(checkpoint)
    return model


def _unread(checkpoint: Checkpoint) -> tuple[Any, Unread]:
    """The model without its weights: each has the memory of one number for all of its values."""
    try:
        from accelerate import init_empty_weights
    except ImportError as error:
        raise CheckpointError(
            f"{checkpoint.source}: the reference needs accelerate to stream this form of weights",
            todo='pip install "gsx[formats]"',
        ) from error
    stored, unread = _base(checkpoint), Unread()
    with init_empty_weights(include_buffers=False):
        model = _from_config(checkpoint, stored)
    for name, parameter in list(model.named_parameters()):
        place, _, last = name.rpartition(".")
        setattr(model.get_submodule(place), last, _empty(parameter.shape))
        read = functools.partial(of_module, name, stored.tensor, checkpoint.config.experts)
        unread[model.get_parameter(name)] = read
    if HEAD not in stored.names:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.generation_config = _generation_config(checkpoint)
    return model, unread


def _empty(shape: torch.Size) -> nn.Parameter:
    return nn.Parameter(torch.zeros(1).expand(shape), requires_grad=False)


def _base(checkpoint: Checkpoint) -> Tensors:
    """The tensors as floats, without an adapter."""
    return checkpoint.stored.base if isinstance(checkpoint.stored, MergedTensors) else checkpoint.stored


def _from_config(checkpoint: Checkpoint, stored: Tensors) -> Any:
    config = copy.deepcopy(checkpoint.hf_config)
    config.tie_word_embeddings = HEAD not in stored.names
    with quiet_transformers():
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )


def _with_adapter(model: Any, adapter: Adapter, *, merge: bool) -> Any:
    """The model with an adapter, by PEFT. Modules of a keep rule are no part of transformers' model.

    Args: merge: into the weights of its base; else it stays beside them.
    """
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
            # With `low_cpu_mem_usage` a module that the adapter has whole gets its weights, and none of its base's.
            found = PeftModel.from_pretrained(
                model, str(adapter.directory), config=settings, low_cpu_mem_usage=not merge
            )
            return found.merge_and_unload() if merge else found.get_base_model()
    except Exception as error:  # many types, all about this directory
        raise CheckpointError(f"{adapter.directory}: PEFT cannot load it", found=one_line(error)) from error


def _untie(model: Any, unread: Unread) -> None:
    """Make two tables of a shared one: PEFT trains them apart from each other, but merges into the one weight."""
    shared = model.lm_head.weight
    if shared is model.model.embed_tokens.weight:
        read = unread.get(shared)
        own = nn.Parameter(shared.detach().clone()) if read is None else _empty(shared.shape)
        model.lm_head.weight = own
        if read is not None:
            unread[own] = read


def _merge_table(place: Any, name: str, unread: Unread) -> None:
    """Merge what an adapter has for embedding or head, of which the reference reads some rows at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    module = getattr(place, name)
    if isinstance(module, AuxiliaryTrainingWrapper):
        setattr(place, name, module.modules_to_save[module.active_adapter])
    elif isinstance(module, BaseTunerLayer):
        table = module.get_base_layer()
        read = unread.pop(table.weight, None)
        table.weight.data = table.weight.data.float() if read is None else read().float()
        module.merge()
        setattr(place, name, table)


def _generation_config(checkpoint: Checkpoint) -> Any:
    """As transformers reads it, from the directory whose file counts."""
    with quiet_transformers():
        try:
            return GenerationConfig.from_pretrained(checkpoint.generation_directory, local_files_only=True)
        except OSError:  # without such a file
            return GenerationConfig.from_model_config(checkpoint.hf_config)
