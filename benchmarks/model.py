"""The benchmark model: Llama-shaped, random weights, in a dense and a gated form with the same backbone.

12 layers, hidden 768, 12 heads, 4 K/V heads, MLP 2,048, vocabulary 4,096, fp32 (81.8 M parameters). Scalar gates cost
almost nothing, so that they show what skipping saves; vector gates show what a vector gate costs. Its tokenizer has one
word per token, so that the project's own export command runs on it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig

from gsx_exporter.checkpoint.tensors import expected_tensors, is_gate, rule_module_kind
from gsx_exporter.config import ModelConfig
from gsx_exporter.router_config import NetConfig, RouterConfig

SHAPES = {
    # To try out a benchmark.
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "vocab_size": 256,
    },
    "small": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 4096,
    },
    # The shape of TinyLlama 1.1B.
    "1b": {
        "num_hidden_layers": 22,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
    },
    # Two layers of Llama-3-8B, but for its vocabulary; with a thin MLP; and of a quarter of its width.
    "8b-width": {
        "num_hidden_layers": 2,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 4096,
    },
    "8b-thin": {
        "num_hidden_layers": 2,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 1024,
        "vocab_size": 4096,
    },
    "8b-quarter": {
        "num_hidden_layers": 2,
        "hidden_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 3584,
        "vocab_size": 4096,
    },
}
WORDS_OF_TEXT = 6000
POSITIONS = 2048
# A router for each layer, as in D-LLM except for its K and V, and one for each branch, as in SkipGPT.
ROUTERS = {
    "layer-routers": RouterConfig(net=NetConfig(hidden=128, activation="silu", norm=True), output="softmax"),
    "branch-routers": RouterConfig(decides="branch", net=NetConfig(hidden=192), output="difference"),
}


def make_model(
    path: Path,
    shape: str,
    gate: str | None,
    seed: int = 0,
    positions: int = POSITIONS,
    router: RouterConfig | None = None,
) -> Path:
    """Write a checkpoint directory with random weights; the backbone depends only on the seed.

    Args:
        shape: a key of `SHAPES`.
        gate: `scalar`, `vector`, `linear` (vector gates with linear scores) or None for the dense form.
        positions: the longest context.
        router: routers instead of gates.
    """
    path.mkdir(parents=True, exist_ok=True)
    hf = configuration(shape, gate, positions)
    if router is not None:
        hf.gsx = {"router": router.to_dict()}
    config = ModelConfig.from_hf(hf)
    backbone, gates = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    tensors = {}
    for name, size in expected_tensors(config).items():
        if "norm" in name:
            tensors[name] = torch.ones(size)
        elif rule_module_kind(name):
            # Scores spread around 0.5, like those of a gate that has learnt to distinguish tokens.
            std = 0.0 if name.endswith("bias") else 1.0 / config.hidden_size**0.5
            tensors[name] = torch.randn(size, generator=gates) * std
        else:
            tensors[name] = torch.randn(size, generator=backbone) * 0.02
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_companions(path, hf)
    return path


def make_large(path: Path, shape: str = "1b", gate: str | None = None) -> Path:
    """Write a checkpoint in fp16 from one block of random numbers, with another offset for each tensor.

    Ten times as fast as `make_model`, for benchmarks of sizes and times. The backbone is the same with gates.
    """
    hf = configuration(shape, gate)
    config = ModelConfig.from_hf(hf)
    block = (np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02).astype(np.float16)
    tensors: dict[str, np.ndarray] = {}
    place = 0
    for name, size in expected_tensors(config).items():
        place += not is_gate(name)
        tensors[name] = np.ones(size, np.float16) if "norm" in name else np.resize(np.roll(block, 1009 * place), size)
    path.mkdir(parents=True, exist_ok=True)
    save_arrays(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_companions(path, hf)
    return path


def configuration(shape: str, gate: str | None, positions: int = POSITIONS) -> LlamaConfig:
    """A shape as transformers writes it. Args: as `make_model`."""
    kind = {"kind": "vector", "score": "linear"} if gate == "linear" else {"kind": gate}
    section = {"method": "gateskip", "gate": {**kind, "branches": ["attn", "mlp"]}} if gate else {}
    hf = LlamaConfig(
        **SHAPES[shape], max_position_embeddings=positions, tie_word_embeddings=False, eos_token_id=0, gsx=section
    )
    hf.architectures = ["LlamaForCausalLM"]
    return hf


def write_companions(path: Path, hf: LlamaConfig) -> None:
    """Write the configuration, and a tokenizer with one word per token."""
    (path / "config.json").write_text(json.dumps(hf.to_dict(), indent=2))
    vocabulary = {f"w{n}": n for n in range(hf.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))


def random_text(path: Path, vocab_size: int, words: int = WORDS_OF_TEXT, seed: int = 7) -> Path:
    """A text of random words that the tokenizer has, to calibrate on."""
    ids = np.random.default_rng(seed).integers(0, vocab_size, words)
    path.write_text(" ".join(f"w{n}" for n in ids))
    return path


def main() -> None:
    """Write one form of the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--gate", choices=["scalar", "vector"])
    args = parser.parse_args()
    make_model(args.output, args.shape, args.gate)


if __name__ == "__main__":
    main()
