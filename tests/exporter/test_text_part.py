"""The text part of a multimodal model is read as transformers computes it, and what is no near relative is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from gsx.workflows.export import export
from gsx.workflows.inspect import inspect
from gsx_exporter.checkpoint.hf_config import read_config
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.errors import CheckpointError
from gsx_exporter.reference.model import Reference
from tests.exporter.test_checkpoint import IDS, logits, same

TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 144,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 32,
}
# The whole model, the family of its text part, its vision tower, whether embedding and head are one table.
WHOLES = [
    ("llava", "llama", "clip_vision_model", False),
    ("llava", "mistral", "clip_vision_model", True),
    ("mistral3", "mistral", "pixtral", True),
    ("llava_onevision", "qwen2", "siglip_vision_model", False),
    ("smolvlm", "llama", "smolvlm_vision", False),
    ("idefics3", "llama", "idefics3_vision", True),
    ("internvl", "qwen2", "internvl_vision", False),
    ("gemma3", "gemma3_text", "siglip_vision_model", True),
]


def whole_model(path: Path, whole: str, family: str, vision: str, tied: bool) -> torch.Tensor:
    """Write a random multimodal model, as transformers saves it. Returns: its logits of IDS."""
    config = AutoConfig.for_model(
        whole,
        text_config={**TEXT, "model_type": family},
        vision_config={**VISION, "model_type": vision},
        tie_word_embeddings=tied,
    )
    rng = torch.Generator().manual_seed(0)
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(config).eval()
        for name, weight in sorted(model.named_parameters()):
            weight.copy_(0.2 * torch.randn(weight.shape, generator=rng) + ("norm" in name))
        model.save_pretrained(path)
        return model(input_ids=torch.from_numpy(IDS)).logits


@pytest.mark.parametrize("case", WHOLES, ids=lambda case: f"{case[0]} of {case[1]}")
def test_the_text_part_computes_what_the_whole_does(tmp_path: Path, case: tuple[str, str, str, bool]) -> None:
    want = whole_model(tmp_path / "model", *case)
    assert same(logits(tmp_path / "model"), want)
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config.tied_head is case[3]
    assert same(Reference.load(checkpoint)(torch.from_numpy(IDS)).logits, want)


def test_a_bundle_is_of_the_text_part(tmp_path: Path) -> None:
    whole_model(tmp_path / "model", *WHOLES[0])
    bundle = export(tmp_path / "model", tmp_path / "bundle")
    assert read_config(bundle.directory).hf.model_type == "llama"
    assert bundle.manifest.decoder.eos_ids == (2,)
    assert any("text part of a multimodal model (llava)" in note for note in bundle.manifest.source.notes)
    assert inspect(tmp_path / "model").parameters["dense"] == inspect(bundle.directory).parameters["dense"]


# `config.json` -> what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a family of no known kind": ({"model_type": "magic"}, ["model_type 'magic' is not supported", "expected one of"]),
    "a state-space model": ({"model_type": "mamba2", "state_size": 128}, ["no attention", "(state_size)"]),
    "a hybrid": (
        {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]},
        ["no attention", "(layer_types linear_attention)"],
    ),
    "another hybrid": ({"model_type": "jamba", "mamba_d_state": 16, "num_experts": 16}, ["(mamba_d_state)"]),
    "an encoder-decoder": ({"model_type": "t5", "is_encoder_decoder": True}, ["an encoder-decoder"]),
    "MLA with experts": (
        {"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 256},
        ["compresses K and V (MLA) (kv_lora_rank)", "experts in a way of its own (n_routed_experts)"],
    ),
    "ALiBi": ({"model_type": "falcon", "alibi": True, "parallel_attn": True}, ["ALiBi", "in parallel"]),
    "LayerNorm": ({"model_type": "stablelm", "layer_norm_eps": 1e-5}, ["LayerNorm (layer_norm_eps)"]),
    "an encoder": ({"model_type": "bert", "type_vocab_size": 2}, ["reads texts in both directions"]),
    "code of its own": ({"model_type": "mine", "auto_map": {"AutoModel": "x.Y"}}, ["code of its own"]),
    "images without a text part": ({"model_type": "qwen2_vl", "vision_config": {"depth": 32}}, ["cannot be separated"]),
    "a text part of another family": (
        {
            "model_type": "qwen2_5_vl",
            "text_config": {"model_type": "qwen2_5_vl_text", "rope_scaling": {"mrope_section": [16, 24, 24]}},
        },
        ["the text part, of model_type 'qwen2_5_vl_text', is not supported", "several axes"],
    ),
    "a text part that is a word": ({"model_type": "llava", "text_config": "llama"}, ["'llava' is not supported"]),
    "a model_type that is none": ({"model_type": [1]}, ["model_type [1] is not supported"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_not_supported_is_named(tmp_path: Path, case: str) -> None:
    values, parts = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(values))
    for ask in (open_checkpoint, inspect):
        with pytest.raises(CheckpointError) as found:
            ask(tmp_path)
        assert not [part for part in parts if part not in str(found.value)], str(found.value)
