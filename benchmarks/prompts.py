"""Prompts of real text: Python source that no model of ours was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.training.corpus import read_corpus, split


def held_out_prompts(model: Path, count: int, tokens: int, text: Path | None = None) -> list[list[int]]:
    """Windows spread over the standard library's held-out files. Args: tokens: tokens of each prompt; text: a file to
    take them from instead."""
    tokenizer = load_tokenizer(open_checkpoint(model))
    prefix = tokenizer.encode("").ids
    rows = []
    documents = [document.text for document in split(read_corpus())["heldout"]] if text is None else [text.read_text()]
    for document in documents:
        ids = tokenizer.encode(document, add_special_tokens=False).ids
        size = tokens - len(prefix)
        rows += [prefix + ids[at : at + size] for at in range(0, len(ids) - size, 4 * size)]
    return [rows[number] for number in np.linspace(0, len(rows) - 1, count).astype(int)]
