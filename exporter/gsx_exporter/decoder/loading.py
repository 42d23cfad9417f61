"""Where a checkpoint stores the decoder's parameters, and loading a part of the decoder from it.

Parameter names are those of the assembled graph: `layers.{i}.mlp.up_proj.weight`, `norm.weight`,
`lm_head.weight`, `embed_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.tensors import EMBEDDING, HEAD
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.ends import Entry, HeadRows, LoopEntry
from gsx_exporter.decoder.experts import ExpertWeights, RoutedMlp, StoredExperts
from gsx_exporter.decoder.layer import DecoderLayer, DecoderOptions
from gsx_exporter.decoder.modules import Linear
from gsx_exporter.decoder.norm import norm_of
from gsx_exporter.decoder.rule import exit_watcher


@dataclass(frozen=True)
class Source:
    """Where a parameter of the assembled graph comes from.

    Args:
        name: of the tensor in the checkpoint.
        transpose: whether it is a linear weight, [out, in] in the checkpoint and [in, out] in the graph.
        dtype: its type in the graph; of what scores tokens, only a vector gate's weight is not float32.
        stack: the tensors that it consists of, along a first axis, if it has the weights of all experts; `name` is then
            that of none of them.
        rows: which rows of the checkpoint's tensor it consists of, in order; empty if of all.
    """

    name: str
    transpose: bool
    dtype: torch.dtype
    stack: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()


def sources(module: nn.Module, prefix: str) -> dict[str, Source]:
    """The parameters of a part of the decoder, by their names in the graph (which begin with the prefix)."""
    found = {}
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(f"{prefix}{path}".rstrip("."), recurse=False):
            if isinstance(owner, ExpertWeights):
                place, _, product = _checkpoint_name(name).rpartition(".")
                stack = tuple(f"{place}.{expert}.{product}.weight" for expert in range(len(parameter)))
                found[name] = Source(f"{place}.{product}", True, parameter.dtype, stack)
                continue
            if isinstance(owner, HeadRows):
                found[name] = Source(EMBEDDING if owner.tied else HEAD, True, parameter.dtype, rows=owner.tokens)
                continue
            transpose = isinstance(owner, Linear) and name.endswith("weight")
            found[name] = Source(_checkpoint_name(name), transpose, parameter.dtype)
    return found


def _checkpoint_name(parameter: str) -> str:
    """The checkpoint's name for a parameter of the graph, without the `linear` inside a gate or router."""
    name = parameter.replace(".linear.", ".")
    if name == "embed_tokens":
        return EMBEDDING
    return name if name.startswith("lm_head.") else "model." + name


def load_layer(checkpoint: Checkpoint, index: int, options: DecoderOptions) -> DecoderLayer:
    """Layer `index` with its weights; in a looped model, a visit. Weights of routed experts are read when rows go to
    them."""
    with torch.device("meta"):
        layer = DecoderLayer(checkpoint.config, options, index)
    prefix = f"layers.{checkpoint.config.layer_of(index)}."
    if isinstance(layer.mlp, RoutedMlp):
        layer.mlp.experts = _stored_experts(layer.mlp.experts, checkpoint, f"{prefix}mlp.experts.")
    _fill(layer, checkpoint, prefix)
    return layer


def _stored_experts(experts: nn.Module, checkpoint: Checkpoint, prefix: str) -> StoredExperts:
    found = {name.removeprefix(prefix): source for name, source in sources(experts, prefix).items()}

    def read(product: str, expert: int) -> torch.Tensor:
        source = found[product]
        return _read(checkpoint, replace(source, name=source.stack[expert], stack=()))

    return StoredExperts(min(len(source.stack) for source in found.values()), read)


def load_entry(checkpoint: Checkpoint, options: DecoderOptions, tokens: torch.Tensor) -> Entry:
    """The module that computes what every layer reads, with the embeddings of some tokens [n] only, as its table."""
    with torch.device("meta"):
        entry = Entry(checkpoint.hf_config, checkpoint.config, options)
    rows = checkpoint.parameter(EMBEDDING)[tokens].to(options.dtype)
    entry.embed_tokens = nn.Parameter(rows, requires_grad=False)
    return entry


def load_final_norm(checkpoint: Checkpoint, options: DecoderOptions) -> nn.Module:
    """The norm before the head."""
    config = checkpoint.config
    with torch.device("meta"):
        norm = norm_of(config, config.hidden_size, options.dtype)
    _fill(norm, checkpoint, "norm.")
    return norm


def load_loop_entry(checkpoint: Checkpoint, options: DecoderOptions) -> LoopEntry:
    """The module that computes the state with which a loop of a looped model begins."""
    with torch.device("meta"):
        loop = LoopEntry(checkpoint.config, options.dtype)
    _fill(loop, checkpoint, "")
    return loop


def load_exit_modules(checkpoint: Checkpoint, options: DecoderOptions) -> dict[int, nn.Module]:
    """The modules with which the keep rule looks at states (`LooksAtExits`), by depth; empty if it does not."""
    return filled_exit_modules(checkpoint.config, options, lambda module, prefix: _fill(module, checkpoint, prefix))


def filled_exit_modules(
    config: ModelConfig, options: DecoderOptions, fill: Callable[[nn.Module, str], None]
) -> dict[int, nn.Module]:
    """As `load_exit_modules`, with parameters from another source than a checkpoint.

    Args: fill: gives the parameters to a module on the meta device, given the prefix of their names; called once for
        each distinct prefix.
    """
    rule = exit_watcher(options.rule)
    if rule is None:
        return {}
    found: dict[str, nn.Module] = {}
    for prefix in dict.fromkeys(map(rule.exit_prefix, rule.exit_depths())):
        with torch.device("meta"):
            found[prefix] = rule.exit_module(config, options.dtype)
        fill(found[prefix], prefix)
    return {depth: found[rule.exit_prefix(depth)] for depth in rule.exit_depths()}


def _fill(module: nn.Module, checkpoint: Checkpoint, prefix: str) -> None:
    state = {}
    for name, source in sources(module, prefix).items():
        state[name.removeprefix(prefix)] = _read(checkpoint, source)
    module.load_state_dict(state, assign=True)


def _read(checkpoint: Checkpoint, source: Source) -> torch.Tensor:
    tensor = checkpoint.parameter(source.name).to(source.dtype)
    return tensor.t() if source.transpose else tensor
