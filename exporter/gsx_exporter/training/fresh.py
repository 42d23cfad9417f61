"""What a new model begins with: its configuration, and a tokenizer that is trained on its text."""

from __future__ import annotations

import json
from pathlib import Path

from gsx_exporter.checkpoint.names import GENERATION_CONFIG
from gsx_exporter.errors import TextError
from gsx_exporter.training.corpus import Document, read_corpus, split
from gsx_exporter.training.model import new_config
from gsx_exporter.training.settings import TrainSettings
from gsx_exporter.training.tokenizer import END_OF_TEXT_ID, train_tokenizer, write_tokenizer
from gsx_plugins.files import writing_folder
from gsx_plugins.progress import OnProgress, Progress


def write_base(settings: TrainSettings, base: Path, on_progress: OnProgress) -> None:
    """Write configuration and tokenizer of a new model.

    Raises:
        TextError: the text is no directory of text files, or too small for the vocabulary.
    """
    shape = settings.new
    assert shape is not None
    on_progress(Progress("training the tokenizer"))
    with writing_folder(base) as made:
        tokenizer = train_tokenizer(_documents(settings.data.source), vocab_size=shape.vocab_size)
        write_tokenizer(tokenizer, made, max_positions=shape.max_positions)
        generation = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT_ID)
        (made / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        new_config(shape).save_pretrained(made)


def _documents(source: str | None) -> list[Document]:
    if source is not None and not Path(source).is_dir():
        raise TextError(
            f"{source}: a new model's tokenizer is trained on text files",
            expected="a directory of text files, or no data.source for Python's standard library",
            todo="to train on other data, begin with a model that has a tokenizer",
        )
    return split(read_corpus(Path(source) if source is not None else None))["train"]
