"""File names of a Hugging Face model directory."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# Beside an adapter: gates by their names in a checkpoint.
GATES = "gates.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
# Each of them alone makes a tokenizer, or is refused by name.
VOCABULARIES = (TOKENIZER, "tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json")
_SETTINGS = (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS, "chat_template.jinja")
# What a checkpoint may have beside its weights. A checkpoint that gsx makes from another one gets that one's files.
COMPANION_FILES = (*_SETTINGS, *VOCABULARIES, "merges.txt", ADDED_TOKENS)
# Those that a bundle copies. Its `tokenizer.json` is written (`tokenizer.py`) and complete.
BUNDLE_COMPANIONS = _SETTINGS


def has_vocabulary(directory: Path) -> bool:
    """Whether a directory has a tokenizer in any of the forms that transformers reads."""
    return any((directory / name).is_file() for name in VOCABULARIES)
