"""Checkpoints with routed experts: the spellings that are read, what is refused, and the layer against transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.experts import RoutedMlp, StoredExperts
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.loading import load_layer
from gsx_exporter.errors import CheckpointError
from gsx_exporter.graph.weights import Weight, write_weights
from tests.exporter.test_checkpoint import expected, logits, same
from tests.tiny import tiny_checkpoint

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


def fused(tensors: Tensors) -> Tensors:
    """The names of transformers' own modules: all experts of a layer in one tensor."""
    order = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    found: Tensors = {}
    for name, tensor in tensors.items():
        name = name.replace(".block_sparse_moe.", ".mlp.")
        expert = re.match(r"(.*\.mlp\.experts)\.(\d+)\.(\w+)\.weight$", name)
        if expert is None:
            found[name] = tensor
        else:
            stacks.setdefault(f"{expert[1]}.{order.get(expert[3], expert[3])}", {})[int(expert[2])] = tensor
    whole = {name: torch.stack([parts[n] for n in range(len(parts))]) for name, parts in stacks.items()}
    for name, stack in whole.items():
        if name.endswith("gate_proj"):
            up = whole[name.replace("gate_proj", "up_proj")]
            found[name.replace("gate_proj", "gate_up_proj")] = torch.cat((stack, up), dim=1).contiguous()
        elif name.endswith("down_proj"):
            found[name] = stack
    return found


def rewritten(model: Path, edit: Callable[[Tensors], Tensors]) -> Path:
    tensors = {name: tensor.clone() for name, tensor in edit(load_file(model / WEIGHTS)).items()}
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    return model


def with_keys(model: Path, **keys: Any) -> Path:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", ["by expert", "together"])
def test_both_spellings_are_read(tmp_path: Path, family: str, stored: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", family, layers=2)
    if stored == "together":
        rewritten(model, fused)
        assert not [name for name in load_file(model / WEIGHTS) if ".experts.0." in name]
    assert same(logits(model), expected(model))


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen2_moe", {"mlp_only_layers": [0, 2], "norm_topk_prob": True, "qkv_bias": False}),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}),
        ("qwen3_moe", {"num_experts": 1, "num_experts_per_tok": 1}),
        ("qwen3_moe", {"num_experts": 0}),
        ("mixtral", {"num_experts_per_tok": 4}),
        ("mixtral", {"num_local_experts": 2, "head_dim": 24, "sliding_window": 5}),
    ],
    ids=str,
)
def test_keys_mean_what_they_mean_to_transformers(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    model = tiny_checkpoint(tmp_path / "model", family, **keys)
    assert same(logits(model), expected(model))


def test_layers_are_as_transformers_chooses_them() -> None:
    hf = AutoConfig.for_model("qwen2_moe", num_hidden_layers=9, decoder_sparse_step=2, mlp_only_layers=[3])
    config = ModelConfig.from_hf(hf)
    assert config.experts is not None
    assert config.experts.layers == (1, 5, 7)
    assert config.experts.shared_width == hf.shared_expert_intermediate_size


def test_weights_of_experts_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A stack is written part by part, and is what the decoder itself loads."""
    checkpoint = open_checkpoint(tiny_checkpoint(tmp_path / "model", "qwen3_moe"))
    names = tuple(f"model.layers.1.mlp.experts.{n}.down_proj.weight" for n in range(6))
    read = []

    def reading(name: str) -> torch.Tensor:
        read.append(name)
        return checkpoint.tensor(name)

    weight = Weight("down", "", True, torch.float32, stack=names)
    written = write_weights(tmp_path / "weights.bin", [weight], reading, checkpoint.parameter_size)
    assert tuple(read) == names
    assert list(written.initializers["down"].dims) == [6, 40, 64]
    content = torch.frombuffer(bytearray((tmp_path / "weights.bin").read_bytes()), dtype=torch.float32)
    routed = load_layer(checkpoint, 1, DecoderOptions()).mlp
    assert isinstance(routed, RoutedMlp)
    assert isinstance(routed.experts, StoredExperts)
    assert not list(routed.experts.parameters())
    assert torch.equal(content.view(6, 40, 64), torch.stack(list(routed.experts.weights("down_proj"))))


def _without(name: str) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        assert name in tensors
        return {key: tensor for key, tensor in tensors.items() if key != name}

    return edit


def _cut(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name][:-1]}


def _both(tensors: Tensors) -> Tensors:
    return tensors | {name: tensor for name, tensor in fused(tensors).items() if name.endswith("experts.down_proj")}


def _qwen_names(tensors: Tensors) -> Tensors:
    return {name.replace("block_sparse_moe", "mlp").replace(".w1.", ".gate_proj."): t for name, t in tensors.items()}


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"
# Family, what is done to the weights, keys of the configuration, and what the refusal says.
REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors] | None, dict[str, Any], str]] = {
    "a missing expert": ("qwen3_moe", _without(DOWN), {}, rf"a tensor is missing\n  expected {re.escape(DOWN)}"),
    "a missing router": ("qwen2_moe", _without("model.layers.0.mlp.gate.weight"), {}, r"layers\.0\.mlp\.gate\.weight"),
    "a missing expert, by Mixtral's name": (
        "mixtral",
        _without("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        {},
        r"expected model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight",
    ),
    "experts of unequal shape": (
        "qwen3_moe",
        _cut(DOWN),
        {},
        "wrong shape\n.*\n  all experts of a model must have one",
    ),
    "fewer experts than the configuration has": (
        "qwen3_moe",
        None,
        {"num_local_experts": 7},
        r"mlp\.gate\.weight .*\n.*\[7, 64\]",
    ),
    "more experts than the configuration has": (
        "qwen3_moe",
        None,
        {"num_local_experts": 5},
        "more experts than config.json",
    ),
    "more experts per token than there are": (
        "mixtral",
        None,
        {"num_experts_per_tok": 5},
        "more experts than there are\n  expected num_experts_per_tok up to num_local_experts 4, found 5",
    ),
    "experts together, of another number": (
        "qwen3_moe",
        fused,
        {"num_local_experts": 7},
        r"(?s)wrong shape.*\[7, 64, 40\]: experts, outputs, inputs, found \[6, 64, 40\]",
    ),
    "an expert twice": ("qwen3_moe", _both, {}, "has two tensors for"),
    "Qwen's names in a Mixtral": ("mixtral", _qwen_names, {}, r"expected .*block_sparse_moe\.experts\.0\.w1\.weight"),
    "another activation": (
        "mixtral",
        None,
        {"hidden_act": "gelu"},
        "hidden_act is not supported in a model with routed",
    ),
    "steps of no layer": ("qwen2_moe", None, {"decoder_sparse_step": 0}, "decoder_sparse_step is not a count"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    family, edit, keys, message = REFUSED[case]
    model = with_keys(tiny_checkpoint(tmp_path / "model", family, layers=2), **keys)
    if edit is not None:
        rewritten(model, edit)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model)
