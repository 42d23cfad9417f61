"""What all fits to a frozen model share: the text to fit on, and writing the checkpoint with the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.experts import spelling_of
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.convert import write_config, write_safetensors
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.text import WINDOW_TOKENS
from gsx_exporter.training.corpus import read_corpus, split
from gsx_exporter.training.tokenizer import encode_documents
from gsx_plugins.progress import OnProgress

# Share of the windows that is held out, to measure the result on.
HELD_OUT = 1 / 8
FEWEST_WINDOWS = 4
_SEED = 0


def text_windows(checkpoint: Checkpoint, text: Path | None, tokens: int) -> np.ndarray:
    """Windows [M, S] int64 of the training part of a corpus.

    Args:
        text: a directory of text files; None for the standard library of the running Python.
        tokens: the largest number to take.
    Raises:
        TextError: the text has too few.
        CheckpointError: the tokenizer does not fit the model.
    """
    documents = split(read_corpus(text))["train"]
    # A random sample of the files; a token rarely has more than 16 characters.
    order = np.random.default_rng(_SEED).permutation(len(documents))
    sizes = np.cumsum([len(documents[n].text) for n in order])
    some = [documents[n] for n in order[: 1 + int(np.searchsorted(sizes, 16 * tokens))]]
    end = next(iter(checkpoint.config.eos_ids), None)
    ids = encode_documents(load_tokenizer(checkpoint), some, end_of_text=end)[:tokens]
    width = min(WINDOW_TOKENS, checkpoint.config.max_positions)
    count = len(ids) // width
    if count < FEWEST_WINDOWS:
        raise TextError(
            "the text is too short to fit on",
            expected=f"{FEWEST_WINDOWS * width} tokens or more",
            found=f"{len(ids)} tokens",
            todo="give more text, or allow more tokens",
        )
    highest = int(ids.max())
    if highest >= checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.source}: the tokenizer does not fit the model",
            expected=f"token ids below {checkpoint.config.vocab_size}",
            found=str(highest),
        )
    return ids[: count * width].astype(np.int64).reshape(count, width)


def learnt_windows(windows: int) -> int:
    """How many of the windows are learnt from: the first ones. The rest is held out."""
    return windows - max(1, int(windows * HELD_OUT))


def write_with(
    checkpoint: Checkpoint,
    own: Mapping[str, Tensor],
    work: Path,
    on_progress: OnProgress,
    *,
    section: Mapping[str, Any] | None = None,
    without: str | None = None,
) -> None:
    """Write a checkpoint with further tensors, or with others in place of its own.

    Args:
        own: these tensors, by name.
        work: the folder to write to.
        section: what the section `gsx` of `config.json` says about them; None if `config.json` implies them already.
        without: tensors with this in their names are left out.
    """
    checkpoint.copy_companions(work)
    kept = [name for name in checkpoint.names if name not in own and (without is None or without not in name)]

    def read(name: str) -> Tensor:
        return own[name] if name in own else checkpoint.tensor(name)

    sizes = {name: read(name).numel() * read(name).element_size() for name in (*kept, *own)}
    if section is None:
        (work / CONFIG).write_text(json.dumps(checkpoint.config_values(), indent=2) + "\n", encoding="utf-8")
    else:
        write_config(checkpoint, section, set(), work / CONFIG)
    write_safetensors(work, sizes, read, spelling=spelling_of(checkpoint.config), on_progress=on_progress)
