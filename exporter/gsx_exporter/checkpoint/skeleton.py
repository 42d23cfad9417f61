"""The model that transformers would build from a configuration, without its weights.

A last check before work: what transformers refuses to build, gsx refuses too, in its words; what it would build with
other parameters, or another K/V cache, than gsx knows has a trait that gsx does not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gsx_exporter.checkpoint.experts import as_modules
from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.tensors import HEAD, expected_tensors, rule_module_kind
from gsx_exporter.errors import CheckpointError

# Keys of a configuration that decide what the cache holds (transformers' cache_utils.py).
_CACHE_KEYS = ("sliding_window", "layer_types", "attention_chunk_size")

if TYPE_CHECKING:
    from gsx_exporter.checkpoint.checkpoint import Checkpoint


def check_skeleton(checkpoint: Checkpoint) -> None:
    """Build the model without weights, and compare its parameters and its cache with those that gsx reads.

    Raises:
        CheckpointError: transformers cannot build it, or builds another model.
    """
    model, cache = _build(checkpoint)
    _check_cache(checkpoint, cache)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = {n: shape for n, shape in expected_tensors(checkpoint.config).items() if not rule_module_kind(n)}
    known = as_modules(known)
    for names in (built, known):
        names.pop(HEAD, None)  # present or not by what is stored: `Checkpoint.config` decides
    if built != known:
        name = sorted(set(built.items()) ^ set(known.items()))[0][0]
        raise CheckpointError(
            f"{checkpoint.source}: transformers builds another model from {CONFIG} than gsx knows",
            expected=f"{name}: {known.get(name, 'no such parameter')}",
            found=f"{built.get(name, 'no such parameter')}",
            todo="a field of it is not supported; please report it with the file",
        )


def _check_cache(checkpoint: Checkpoint, cache: Any) -> None:
    """Refuse keys that only transformers' cache reads: it forgets K and V that the attention would still see.

    A `sliding_window` in a Llama's configuration is such a key. transformers then gives other tokens with its cache
    than without, so that there are no right ones to give.
    """
    config, hf = checkpoint.config, checkpoint.hf_config
    windows = {config.layer_of(number): window for number, window in enumerate(config.windows)}
    for number, layer in enumerate(cache.layers):
        window = windows[number]
        held = getattr(layer, "sliding_window", None)
        if held is None or held >= (window or config.max_positions):
            continue
        found = {key: getattr(hf, key) for key in _CACHE_KEYS if getattr(hf, key, None) is not None}
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG}: transformers' cache forgets what the attention of layer {number} sees",
            expected=f"{window or 'all'} tokens, as the attention of {config.family} sees them",
            found=f"{held} tokens; " + ", ".join(f"{key} {value!r}" for key, value in found.items()),
            todo="remove the key, which the attention does not read",
        )


def _build(checkpoint: Checkpoint) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    try:
        with quiet_transformers():
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(checkpoint.hf_config, trust_remote_code=False)
            rotary = type(model.model.rotary_emb)(config=checkpoint.hf_config)
            cache = DynamicCache(config=checkpoint.hf_config)
        finite = all(bool(frequencies.isfinite().all()) for frequencies in rotary.buffers())
    except Exception as error:  # whatever transformers raises is about this configuration
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG}: transformers cannot build a model from it", found=one_line(error)
        ) from error
    if not finite:
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG}: its rope_parameters give no finite frequencies",
            found=repr(checkpoint.hf_config.rope_parameters),
        )
    return model, cache
