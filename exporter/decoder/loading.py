"""Where the decoder's parameters lie in a checkpoint, and loading a part of the decoder from it.

Parameter names are those of the assembled graph: `layers.{i}.mlp.up_proj.weight`, `norm.weight`,
`lm_head.weight`, `embed_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from exporter.checkpoint import Checkpoint
from exporter.decoder.ends import Entry, Exit
from exporter.decoder.layer import DecoderLayer, DecoderOptions

_LINEAR = ("_proj.weight", "_gate.weight", "lm_head.weight")


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint.

    Args:
        name: its name there.
        transpose: whether it is a linear weight, [out, in] there and [in, out] here.
        is_gate: whether it belongs to a gate, and so stays float32.
    """

    name: str
    transpose: bool
    is_gate: bool


def source_of(parameter: str) -> Source:
    """Where a parameter of the assembled graph comes from."""
    is_gate = "_gate.linear." in parameter
    name = parameter.replace("_gate.linear.", "_gate.")
    if name == "embed_tokens":
        name = "model.embed_tokens.weight"
    elif not name.startswith("lm_head."):
        name = "model." + name
    return Source(name, name.endswith(_LINEAR), is_gate)


def load_layer(checkpoint: Checkpoint, index: int, options: DecoderOptions) -> DecoderLayer:
    """Layer `index` with its weights."""
    with torch.device("meta"):
        layer = DecoderLayer(checkpoint.config, options, has_below=index > 0)
    _fill(layer, checkpoint, f"layers.{index}.")
    return layer


def load_entry(checkpoint: Checkpoint, options: DecoderOptions) -> Entry:
    """The embeddings and the call's state."""
    with torch.device("meta"):
        entry = Entry(checkpoint.hf_config, checkpoint.config, options)
    _fill(entry, checkpoint, "")
    return entry


def load_exit(checkpoint: Checkpoint, options: DecoderOptions) -> Exit:
    """The final norm and the head."""
    with torch.device("meta"):
        leave = Exit(checkpoint.config, options)
    _fill(leave, checkpoint, "")
    return leave


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    state = {}
    for name, parameter in module.named_parameters():
        source = source_of(prefix + name)
        tensor = checkpoint.tensor(source.name).to(parameter.dtype)
        state[name] = tensor.t() if source.transpose else tensor
    module.load_state_dict(state, assign=True)
