"""The text of a run: any source that `datasets` reads, as rows of token ids with labels, and a part that is held out.

A row has the columns `input_ids` and `labels`, and `row`, its number. A label is the token of its own place, or -100
where the run does not learn to write: in prompts and in what others say in a chat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.errors import TextError
from gsx_exporter.training.chat import encode_chat, encode_prompt
from gsx_exporter.training.corpus import SUFFIXES, read_corpus, split
from gsx_exporter.training.learner import IGNORED
from gsx_exporter.training.settings import DataSettings
from gsx_plugins.errors import UsageError

_READERS = {
    **dict.fromkeys((".jsonl", ".json"), "json"),
    ".parquet": "parquet",
    ".csv": "csv",
    **dict.fromkeys(SUFFIXES, "text"),
}
# Columns that are taken where none is named, by kind, in this order.
_KNOWN = {
    "messages": ("messages", "conversations"),
    "prompt": ("prompt",),
    "answer": ("answer", "completion"),
    "text": ("text",),
}
_PACKED_AT_A_TIME = 1000


@dataclass(frozen=True)
class Rows:
    """The text of a run, encoded.

    Args:
        train, held_out: `datasets` of rows; `train` may be iterable only.
        source: its name.
        column: what was read: a column, or two.
        tokens, predicted: of `train`, and of these the ones that are learnt; None where it is streamed.
    """

    train: Any
    held_out: Any
    source: str
    column: str
    tokens: int | None
    predicted: int | None

    @property
    def count(self) -> int | None:
        """Rows of `train`; None where it is streamed."""
        return None if self.tokens is None else len(self.train)


Encode = Callable[[dict[str, list[Any]]], dict[str, list[list[int]]]]


def read_rows(data: DataSettings, tokenizer: Any, *, end_of_text: int | None, seed: int, held_out_rows: int) -> Rows:
    """Read and encode a text.

    Args:
        tokenizer: transformers' tokenizer of the model.
        end_of_text: the token behind each text; None for none.
        held_out_rows: at most so many rows are held out where the source is streamed.
    Raises:
        TextError: the source cannot be read, has no such column, or is too short.
        UsageError: the settings contradict each other, or the tokenizer has no chat template.
    """
    source = data.source or "Python's standard library"
    train, held_out = _parts(data, seed)
    columns = _columns(train)
    encode, column = _encoder(data, source, columns, tokenizer, end_of_text)

    def rows_of(part: Any) -> Any:
        encoded = part.map(encode, batched=True, remove_columns=_columns(part))
        if data.packed:
            pack = _packing(data.length)
            encoded = encoded.map(pack, batched=True, batch_size=_PACKED_AT_A_TIME)
        else:
            encoded = encoded.filter(_has_answer)
        if data.streaming:
            return encoded.map(_numbered, with_indices=True)
        return encoded.add_column("row", np.arange(len(encoded)))

    train, held_out = rows_of(train), rows_of(held_out)
    if data.streaming:
        held_out = _as_dataset(list(held_out.take(held_out_rows)))
        _not_empty(list(train.take(1)), source, "training", data)
        _not_empty(held_out, source, "held-out", data)
        return Rows(train, held_out, source, column, None, None)
    _not_empty(train, source, "training", data)
    _not_empty(held_out, source, "held-out", data)
    tokens = predicted = 0
    for batch in train.with_format("arrow").iter(_PACKED_AT_A_TIME):
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        tokens, predicted = tokens + labels.size, predicted + int((labels != IGNORED).sum())
    return Rows(train, held_out, source, column, tokens, predicted)


def collate(rows: list[dict[str, Any]], *, pad: int) -> dict[str, torch.Tensor]:
    """A batch of rows, padded on the right to the longest; `attention_mask` only if one is padded."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([list(row[name]) + [filler] * (width - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", pad), "labels": padded("labels", IGNORED)}
    if any(len(row["input_ids"]) != width for row in rows):
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(width)[None] < lengths[:, None]).long()
    batch["row"] = torch.tensor([row["row"] for row in rows])
    return batch


def _parts(data: DataSettings, seed: int) -> tuple[Any, Any]:
    """The source's rows, as they are, to train on and held out."""
    if data.source is None:
        return _standard_library(data)
    found = _load(data, data.source, data.split)
    if data.rows is not None:
        found = found.take(data.rows)
    if isinstance(data.held_out, str):
        return found, _held_out(data, data.source, data.held_out)
    if data.streaming:
        # What comes first is held out: nothing else is known of a stream.
        first = max(1, round(data.held_out * _PACKED_AT_A_TIME))
        return found.skip(first), found.take(first)
    if len(found) < 2:
        raise TextError(
            f"{data.source}: too little to hold a part out",
            expected="two rows or more, or the name of a split that is held out",
            found=f"{len(found)} rows in split {data.split}",
        )
    count = min(len(found) - 1, max(1, round(data.held_out * len(found))))
    cut = found.train_test_split(test_size=count, seed=seed)
    return cut["train"], cut["test"]


def _held_out(data: DataSettings, source: str, named: str) -> Any:
    """What is held out by name: a file or directory, or a split of the source."""
    if Path(named).expanduser().exists():
        return _load(data, named, data.split)
    if Path(source).expanduser().is_file():
        raise TextError(
            f"{source}: a file has no split to hold out",
            expected="data.held_out to be a share, or another file",
            found=named,
        )
    return _load(data, source, named)


def _standard_library(data: DataSettings) -> tuple[Any, Any]:
    from datasets import Dataset

    parts = split(read_corpus(None))
    named = {name: Dataset.from_list([{"text": one.text} for one in parts[name]]) for name in ("train", "heldout")}
    return named["train"] if data.rows is None else named["train"].take(data.rows), named["heldout"]


def _load(data: DataSettings, source: str, split_name: str) -> Any:
    import datasets

    path = Path(source).expanduser()
    options: dict[str, Any] = {"split": split_name, "streaming": data.streaming}
    try:
        datasets.disable_progress_bars()
        if path.is_file():
            reader = _READERS.get(path.suffix)
            if reader is None:
                raise TextError(
                    f"{path}: the kind of file is not known",
                    expected="one of " + ", ".join(_READERS),
                    found=path.suffix,
                )
            more = {"sample_by": "paragraph"} if reader == "text" else {}
            return datasets.load_dataset(reader, data_files={split_name: str(path)}, **options, **more)
        if path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(path))
            found = found[split_name] if isinstance(found, datasets.DatasetDict) else found
            return found.to_iterable_dataset() if data.streaming else found
        if path.is_dir() and data.name is None and (texts := _texts(path)):
            more = {"sample_by": "document"}
            return datasets.load_dataset("text", data_files={split_name: texts}, **options, **more)
        return datasets.load_dataset(
            str(path) if path.is_dir() else source, data.name, revision=data.revision, **options
        )
    except TextError:
        raise
    except Exception as error:  # many types, all about this source
        raise _unread(source, error) from error


def _unread(source: str, error: Exception) -> TextError:
    """What is wrong with a source that `datasets` does not read."""
    from datasets.exceptions import DatasetNotFoundError

    if isinstance(error, ConnectionError):
        return TextError(
            f"{source}: the hub cannot be reached, and no file or directory has this name",
            expected="a file, a directory, or the id of a data set and a connection (HF_HUB_OFFLINE not set)",
            found=one_line(error),
            todo="check the name and the connection, or give --data a file",
        )
    if isinstance(error, DatasetNotFoundError):
        return TextError(
            f"{source}: no such data set on the hub, or it needs a login; and no file or directory has this name",
            found=one_line(error),
            todo="check the name; hf auth login for one that is private or gated",
        )
    return TextError(
        f"{source}: cannot be read as data",
        expected="a file, a directory or a data set of the hub, with this split",
        found=one_line(error),
    )


def _texts(directory: Path) -> list[str]:
    """The text files of a directory that has nothing else to read."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    if any(path.suffix in _READERS and path.suffix not in SUFFIXES for path in files):
        return []
    return [str(path) for path in files if path.suffix in SUFFIXES and path.stat().st_size]


def _columns(part: Any) -> list[str]:
    if part.column_names is not None:
        return list(part.column_names)
    return list(next(iter(part), {}))


def _encoder(
    data: DataSettings, source: str, columns: list[str], tokenizer: Any, end_of_text: int | None
) -> tuple[Encode, str]:
    """How the source's rows become token ids, and from which column."""
    named = {kind: getattr(data, kind) for kind in _KNOWN}
    for kind, column in named.items():
        if column is not None and column not in columns:
            raise TextError(
                f"{source}: has no column {column!r}",
                expected=f"data.{kind} to be one of {', '.join(columns)}",
                todo=f"name another: --set data.{kind}=NAME",
            )
    if not any(named.values()):
        named = {kind: next((one for one in known if one in columns), None) for kind, known in _KNOWN.items()}
    ending = [] if end_of_text is None else [end_of_text]
    limit = None if data.packed else data.length
    if (messages := named["messages"]) is not None:
        _check_template(tokenizer, source)
        return lambda rows: _encoded((encode_chat(tokenizer, chat) for chat in rows[messages]), [], limit), messages
    if (prompt := named["prompt"]) is not None and (answer := named["answer"]) is not None:

        def pairs(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
            both = zip(rows[prompt], rows[answer], strict=True)
            return _encoded((encode_prompt(tokenizer, *one) for one in both), ending, limit)

        return pairs, f"{prompt} and {answer}"
    if (text := named["text"]) is not None:

        def plain(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
            found = tokenizer([one or "" for one in rows[text]], verbose=False).input_ids
            return _encoded(((ids, list(ids)) for ids in found), ending, limit)

        return plain, text
    raise TextError(
        f"{source}: which column is the text?",
        expected="data.text, data.messages, or data.prompt and data.answer",
        found=f"columns {', '.join(columns)}",
        todo="name it: --set data.text=NAME",
    )


def _check_template(tokenizer: Any, source: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{source}: chats need a chat template, and the model's tokenizer has none",
            expected="chat_template in tokenizer_config.json, or chat_template.jinja",
            todo="train on texts (data.text), or start from a model that was made for chats",
        )


def _encoded(
    pieces: Iterator[tuple[list[int], list[int]]], ending: list[int], limit: int | None
) -> dict[str, list[list[int]]]:
    """Columns of ids and labels; empty texts are left out."""
    rows = [
        (ids, labels) if ids[-len(ending) :] == ending else (ids + ending, labels + ending)
        for ids, labels in pieces
        if ids
    ]
    return {"input_ids": [ids[:limit] for ids, _ in rows], "labels": [labels[:limit] for _, labels in rows]}


def _packing(length: int) -> Encode:
    """Texts one behind the other, cut into rows of `length`; what is left at the end of so many texts is dropped."""

    def pack(texts: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        packed = {}
        for name in ("input_ids", "labels"):
            flat = [token for text in texts[name] for token in text]
            packed[name] = [flat[at : at + length] for at in range(0, len(flat) - length + 1, length)]
        return packed

    return pack


def _has_answer(row: dict[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"][1:])


def _numbered(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, "row": number}


def _as_dataset(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _not_empty(rows: Any, source: str, part: str, data: DataSettings) -> None:
    if len(rows):
        return
    raise TextError(
        f"{source}: the {part} part is empty",
        expected=f"at least one row of {data.length} tokens" if data.packed else "at least one text with an answer",
        found="none",
        todo="give more text, a smaller data.length, or another data.held_out",
    )
