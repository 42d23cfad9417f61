"""Prompts of real text: Python source that no model of ours was trained on, or chats from a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from gsx_engines.bundle.bundle import Bundle
from gsx_engines.chat import ChatTemplate
from gsx_engines.tokens import BundleTokenizer
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


def chat_prompts(bundle: Bundle, path: Path, count: int) -> tuple[list[list[int]], list[int]]:
    """The first chats of a file (JSON Lines with `messages`) up to their last answers, and the tokens that end one."""
    template = ChatTemplate(bundle, BundleTokenizer(bundle))
    chats = [json.loads(line)["messages"][:-1] for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [template.prompt(chat) for chat in chats], sorted(template.stop_ids)
