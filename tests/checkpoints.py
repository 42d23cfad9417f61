"""Small checkpoints that look like downloaded ones: a real tokenizer, every companion file, weights in two shards.

The weights are random, but large enough that no two logits are close, and the rows of special tokens in the head are
larger than others, so that a text of a few tokens has some of them and comes to an end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

EXAMPLE = Path(__file__).parent.parent / "examples" / "model"
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
# A ChatML template.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TOKEN = "<think>"  # an added token that is not special
_SPACE = "\u2581"
_WORDS = "the of and a to in is that it for on as with was he be class def return self import from model token"


def chat_llama(path: Path) -> Path:
    """A Llama with the example model's byte-level tokenizer, two chat tokens and a plain added one; tied."""
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    first = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(list(CHAT_TOKENS))
    tokenizer.add_tokens([PLAIN_TOKEN])
    names = ("<|endoftext|>", *CHAT_TOKENS, PLAIN_TOKEN)
    ids = {name: tokenizer.token_to_id(name) for name in names}
    keys = {"bos_token_id": 0, "eos_token_id": ids["<|im_end|>"], "pad_token_id": 0, "tie_word_embeddings": True}
    write_model(path, "llama", louder=[*ids.values()], vocab_size=first + 3, seed=SEEDS["llama"], **keys)
    roles = {"bos_token": names[0], "eos_token": "<|im_end|>", "pad_token": names[0]}
    write_tokenizer(path, tokenizer, ids, roles, special=(names[0], *CHAT_TOKENS))
    return path


def piece_mistral(path: Path) -> Path:
    """A Mistral with a window and a tokenizer of SentencePiece's kind: word pieces, bytes for the rest; not tied."""
    tokenizer = piece_tokenizer()
    ids = {name: number for number, name in enumerate(("<unk>", "<s>", "</s>"))}
    keys = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False}
    size = tokenizer.get_vocab_size()
    write_model(path, "mistral", louder=[2], vocab_size=size, seed=SEEDS["mistral"], sliding_window=6, **keys)
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_tokenizer(path, tokenizer, ids, roles, special=tuple(ids))
    return path


BASES = {"chat llama": chat_llama, "piece mistral": piece_mistral}
# Weights whose texts, for the prompts of the tests, have special tokens and end.
SEEDS = {"llama": 28, "mistral": 17}


def write_model(path: Path, family: str, *, louder: list[int], seed: int, **keys: Any) -> None:
    """Random weights in two shards, and the two configurations, as transformers saves them.

    Args: louder: ids whose rows in the embeddings and the head are larger.
    """
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **keys}))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=rng)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.5 * noise)
        for table in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            table[louder] *= 2
    half = sum(one.numel() * one.element_size() for one in model.parameters()) // 2
    model.save_pretrained(path, max_shard_size=half + 60_000)


def write_tokenizer(
    path: Path, tokenizer: Tokenizer, ids: Mapping[str, int], roles: Mapping[str, str], special: tuple[str, ...]
) -> None:
    """The tokenizer files of transformers 4, where added tokens stand in four of them."""
    tokenizer.save(str(path / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {str(number): {"content": name, **flags, "special": name in special} for name, number in ids.items()}
    config = {
        "added_tokens_decoder": added,
        **roles,
        "additional_special_tokens": [name for name in special if name not in roles.values()],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write(path / "tokenizer_config.json", config)
    _write(path / "special_tokens_map.json", {role: {"content": name, **flags} for role, name in roles.items()})
    _write(path / "added_tokens.json", dict(ids))


def piece_tokenizer() -> Tokenizer:
    """Like Llama 2's: U+2581 for a space, pieces of words, 256 bytes for the rest, a space before the first word."""
    words = _WORDS.split()
    letters = sorted({letter for word in words for letter in word} | set("bglpvxyz.,:()"))
    pieces, merges = [_SPACE, *letters], []
    for word in words:
        left = _SPACE
        for letter in word:
            if (left, letter) not in merges:
                merges.append((left, letter))
                pieces.append(left + letter)
            left += letter
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def copy(base: Path, path: Path) -> Path:
    """A copy, to damage."""
    return Path(shutil.copytree(base, path))


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False), encoding="utf-8")
