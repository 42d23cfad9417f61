"""Tiny random checkpoints of every family, gated or dense, for tests that do not need a trained model.

The weights are random but scaled like a working model's: states stay of order 1, logits are of order 1 to 10,
and gate scores spread around 0.5, so that thresholds and ranks have something to choose between.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gsx_exporter.checkpoint import ouro
from gsx_exporter.checkpoint.experts import spelling_of, stored_name
from gsx_exporter.checkpoint.tensors import expected_tensors, is_gate, rule_module_kind
from gsx_exporter.config import ModelConfig
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.router_config import RouterConfig

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIALS = ("<|pad|>", "<|begin|>", "<|endoftext|>")
TOKENIZER_VOCAB = 256 + len(SPECIALS)
# What a tiny model of a family needs, so that each of its traits shows.
FAMILY_KEYS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 56,
    },
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True},
    "gemma2": {
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 8.0,
        "sliding_window": 8,
    },
    "gemma3_text": {"query_pre_attn_scalar": 24, "sliding_window": 8},
    "phi3": {},
    "granite": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0] * 16},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "ouro": {"total_ut_steps": 3},
    "dory": {"sliding_window": 8, "n_input_layers": 1, "n_output_layers": 0, "n_recurrent_loops": 3},
}
FAMILY_NAMES = tuple(FAMILY_KEYS)
# Families whose layers slide and see everything in turn; a tiny model has too few layers for their own patterns.
_IN_TURN = ("gemma2", "gemma3_text", "olmo3", "dory")


def tiny_checkpoint(
    path: Path,
    family: str = "llama",
    *,
    gate: GateConfig | None = None,
    router: RouterConfig | None = None,
    layers: int = 3,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    tied: bool = False,
    seed: int = 0,
    tokenizer: bool = False,
    exits: tuple[int, ...] = (),
    exit_classifiers: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    **hf_overrides: Any,
) -> Path:
    """Write a Hugging Face model directory with random weights.

    Args:
        path: the directory; made if it is not there.
        gate, router: the gates or routers to add; None for a dense model.
        tokenizer: add a byte-level tokenizer without merges; the vocabulary then has at least 259 tokens.
        exits, exit_classifiers: the depths to name in `gsx.exits`; those that get a classifier.
        hf_overrides: further keys of the family's transformers configuration, e.g. `sliding_window=8`.
    Returns: path.
    """
    if tokenizer:
        vocab = max(vocab, TOKENIZER_VOCAB)
    keys: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + 16,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        **FAMILY_KEYS[family],
        **hf_overrides,
    }
    if family in _IN_TURN:
        keys.setdefault("layer_types", (["sliding_attention", "full_attention"] * layers)[:layers])
    ouro.register()
    hf = AutoConfig.for_model(family, **keys)
    hf.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, f"{family.title()}ForCausalLM")]
    section: dict[str, Any] = {}
    if gate is not None:
        section |= {"method": "gateskip", "gate": gate.to_dict()}
    if router is not None:
        section["router"] = router.to_dict()
    if exits:
        section["exits"] = list(exits)
    if exit_classifiers:
        section["exit_classifiers"] = list(exit_classifiers)
    if section:
        hf.gsx = section
    path.mkdir(parents=True, exist_ok=True)
    hf.save_pretrained(path)
    config = ModelConfig.from_hf(hf)
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        name: _random(name, shape, rng, config).to(dtype).contiguous()
        for name, shape in expected_tensors(config).items()
    }
    tensors = {stored_name(name, spelling_of(config)): tensor for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "generation_config.json").write_text(
        json.dumps({name: keys[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    )
    if tokenizer:
        write_byte_tokenizer(path)
    return path


def write_byte_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: ids 0 to 2 are the special tokens, then the 256 bytes."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "pad_token": SPECIALS[PAD_ID],
                "bos_token": SPECIALS[BOS_ID],
                "eos_token": SPECIALS[EOS_ID],
                "clean_up_tokenization_spaces": False,
            }
        )
    )


def _random(name: str, shape: tuple[int, ...], rng: torch.Generator, config: ModelConfig) -> torch.Tensor:
    noise = torch.randn(shape, generator=rng)
    if is_gate(name):
        if name.endswith("bias"):
            return 0.3 * noise
        # One common direction for all rows: independent rows would average to the same score for every token.
        common = torch.randn(shape[-1], generator=rng)
        return (1.5 * common + noise) / shape[-1] ** 0.5
    if rule_module_kind(name) == "router" and name.endswith("bias"):
        return 0.1 * noise
    if config.sphere is not None and len(shape) == 1 and not name.endswith("bias"):
        # Factors that are stored in units: states move half of the way, logits are of order 1 to 10.
        units = {"lambda": 0.5 / config.sphere.rate, "suv": 1.0, "logit": 6.0 / config.sphere.logits}
        unit = next((one for part, one in units.items() if part in name), 1 / config.sphere.logits)
        return unit * (1 + 0.2 * noise)
    if name.endswith("norm.weight"):
        return 1 - config.norm_offset + 0.1 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 3 * noise / shape[-1] ** 0.5
    return noise / shape[-1] ** 0.5
