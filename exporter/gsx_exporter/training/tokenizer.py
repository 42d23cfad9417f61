"""A byte-level BPE tokenizer for a new model, trained on the model's training text.

The only special token, `<|endoftext|>` with id 0, separates documents and is also the beginning, end and padding token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gsx_exporter.errors import TextError
from gsx_exporter.training.corpus import Document

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0


def train_tokenizer(documents: Iterable[Document], *, vocab_size: int) -> Tokenizer:
    """Train a tokenizer with exactly vocab_size tokens.

    Raises:
        TextError: the text is too small for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    found = tokenizer.get_vocab_size()
    if found != vocab_size:
        raise TextError(
            "the training text is too small for the vocabulary",
            expected=f"{vocab_size} tokens",
            found=f"{found} tokens",
            todo="give more text, or a smaller model.vocab_size",
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, directory: Path, *, max_positions: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for a tokenizer from `train_tokenizer`."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode_documents(tokenizer: Tokenizer, documents: Iterable[Document], *, end_of_text: int | None) -> np.ndarray:
    """The tokens of all documents in one array, each document followed by the end-of-text token if there is one.

    Returns: token ids [N] int32.
    """
    pieces = []
    for encoding in tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False):
        pieces.append(np.asarray(encoding.ids, dtype=np.int32))
        if end_of_text is not None:
            pieces.append(np.array([end_of_text], dtype=np.int32))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
