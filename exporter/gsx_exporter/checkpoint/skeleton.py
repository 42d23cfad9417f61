"""The model that transformers would build from a configuration, without its weights.

A last check before work: what transformers refuses to build, gsx refuses too, in its words; and what transformers would
build with other parameters than gsx knows has a trait that gsx does not read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gsx_exporter.checkpoint.hf_config import one_line
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.tensors import HEAD, expected_tensors, rule_module_kind
from gsx_exporter.errors import CheckpointError

if TYPE_CHECKING:
    from gsx_exporter.checkpoint.checkpoint import Checkpoint


def check_skeleton(checkpoint: Checkpoint) -> None:
    """Build the model without weights, and compare its parameters with those that gsx reads.

    Raises:
        CheckpointError: transformers cannot build it, or builds another model.
    """
    model = _build(checkpoint)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = {n: shape for n, shape in expected_tensors(checkpoint.config).items() if not rule_module_kind(n)}
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


def _build(checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(checkpoint.hf_config, trust_remote_code=False)
        with torch.device("cpu"):
            rotary = type(model.model.rotary_emb)(config=checkpoint.hf_config)
        finite = bool(rotary.inv_freq.isfinite().all())
    except Exception as error:  # whatever transformers raises is about this configuration
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG}: transformers cannot build a model from it", found=one_line(error)
        ) from error
    if not finite:
        raise CheckpointError(
            f"{checkpoint.directory / CONFIG}: its rope_parameters give no finite frequencies",
            found=repr(checkpoint.hf_config.rope_parameters),
        )
    return model
