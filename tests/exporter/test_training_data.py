"""Training: any source becomes rows of token ids and labels, and what cannot be read is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from gsx_exporter.errors import TextError
from gsx_exporter.training import corpus
from gsx_exporter.training.data import Rows, collate, read_rows
from gsx_exporter.training.learner import IGNORED
from gsx_exporter.training.settings import DataSettings
from gsx_plugins.errors import UsageError
from tests.tiny import EOS_ID, tiny_checkpoint

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a>{% generation %}{{ m.content }};{% endgeneration %}"
    "{% else %}<u>{{ m.content }};{% endif %}{% endfor %}"
)
# Its answers lose what came before them: the text so far is no beginning of the whole.
FORGETFUL = "{% for m in messages %}<{{ m.role }}{{ loop.length }}>{{ m.content }};{% endfor %}"
CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("model"), tokenizer=True))


def read(tokenizer: Any, **values: Any) -> Rows:
    data = DataSettings(**{"length": 16, **values})
    return read_rows(data, tokenizer, end_of_text=EOS_ID, seed=0, held_out_rows=3)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count: int = 30) -> list[dict[str, Any]]:
    return [{"text": f"text {n} says {n * n}"} for n in range(count)]


def all_ids(rows: Rows) -> list[int]:
    return [token for part in (rows.train, rows.held_out) for row in part for token in row["input_ids"]]


SOURCES = {
    "JSON Lines": lambda path: jsonl(path / "a.jsonl", texts()),
    "Parquet": lambda path: (Dataset.from_list(texts()).to_parquet(str(path / "a.parquet")), str(path / "a.parquet"))[
        1
    ],
    "CSV": lambda path: (Dataset.from_list(texts()).to_csv(str(path / "a.csv")), str(path / "a.csv"))[1],
    "saved by datasets": lambda path: (Dataset.from_list(texts()).save_to_disk(str(path / "d")), str(path / "d"))[1],
    "a directory of Parquet": lambda path: (Dataset.from_list(texts()).to_parquet(str(path / "x.parquet")), str(path))[
        1
    ],
}


@pytest.mark.parametrize("kind", list(SOURCES))
def test_sources_give_the_same_rows(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    rows = read(tokenizer, source=SOURCES[kind](tmp_path), packed=False, length=64, held_out=0.2)
    found = {tokenizer.decode(row["input_ids"]) for part in (rows.train, rows.held_out) for row in part}
    assert found == {f"{row['text']}<|endoftext|>" for row in texts()}
    assert (len(rows.train), len(rows.held_out), rows.column) == (24, 6, "text")
    assert rows.tokens == rows.predicted == sum(len(row["input_ids"]) for row in rows.train)
    assert [row["row"] for row in rows.train] == list(range(24))


def test_text_files_are_split_into_paragraphs_and_folders_into_files(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    rows = read(tokenizer, source=str(tmp_path / "a.txt"), packed=False)
    assert len(rows.train) + len(rows.held_out) == 3
    (tmp_path / "b.md").write_text("four\n\nfive\n")
    assert sum(map(len, (lambda r: (r.train, r.held_out))(read(tokenizer, source=str(tmp_path), packed=False)))) == 2


def test_packed_rows_are_full_and_lose_only_the_last_piece(tmp_path: Path, tokenizer: Any) -> None:
    rows = read(tokenizer, source=jsonl(tmp_path / "a.jsonl", texts()), held_out=0.2)
    assert {len(row["input_ids"]) for row in rows.train} == {16}
    flat = [token for row in rows.train for token in row["input_ids"]]
    whole = sum(len(row["text"]) + 1 for row in texts())  # the tokenizer has a token for each byte
    assert rows.tokens == len(flat)
    assert whole - len(all_ids(rows)) < 2 * 16 + 40
    assert flat.count(EOS_ID) > 10


def test_answers_of_a_chat_are_learnt_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    for template, written in ((TEMPLATE, "two;four;"), (MARKED, "two;four;")):
        tokenizer.chat_template = template
        rows = read(tokenizer, source=source, packed=False, length=99, held_out=0.5)
        both = sorted([*rows.train, *rows.held_out], key=lambda row: len(row["input_ids"]))
        learnt = [[label for label in row["labels"] if label != IGNORED] for row in both]
        assert [tokenizer.decode(ids) for ids in learnt] == ["two;", written]
        wanted = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
        assert both[1]["input_ids"] == list(wanted)


def test_another_file_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    other = jsonl(tmp_path / "b.jsonl", [{"text": "held"}])
    rows = read(tokenizer, source=jsonl(tmp_path / "a.jsonl", texts()), held_out=other, packed=False, length=64)
    assert len(rows.train) == 30
    assert tokenizer.decode(rows.held_out[0]["input_ids"]) == "held<|endoftext|>"


def test_prompts_and_answers(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"q": "why?", "a": "so"}] * 2)
    rows = read(tokenizer, source=source, prompt="q", answer="a", packed=False, held_out=0.5)
    (row,) = rows.train
    assert tokenizer.decode(row["input_ids"]) == "why?so<|endoftext|>"
    assert row["labels"] == [IGNORED] * 4 + row["input_ids"][4:]


def test_a_stream_gives_what_a_file_does(tmp_path: Path, tokenizer: Any) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(60))
    rows = read(tokenizer, source=source, streaming=True, held_out=0.01)
    assert (rows.count, rows.tokens) == (None, None)
    first = next(iter(rows.train))
    assert len(first["input_ids"]) == 16
    assert first["row"] == 0
    assert 1 <= len(rows.held_out) <= 3


def test_a_batch_is_padded_on_the_right() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "row": 4}, {"input_ids": [8], "labels": [8], "row": 2}]
    batch = collate(rows, pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in collate(rows[:1], pad=0)


def test_corpus_of_the_standard_library() -> None:
    parts = corpus.split(corpus.read_corpus())
    names = {part: [document.name for document in documents] for part, documents in parts.items()}
    assert not any("site-packages" in name or "encodings/" in name for part in names.values() for name in part)
    assert not any("test" in name.split("/")[:-1] for name in names["heldout"] + names["calibration"])
    assert min(len(names["heldout"]), len(names["calibration"])) >= 10
    assert len(names["train"]) > 20 * len(names["heldout"])
    assert corpus.part_of("ast.py") == "heldout"
    assert corpus.part_of("bisect.py") == "calibration"
    assert corpus.part_of("test/ast.py") == "train"


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], type[Exception], str]] = {
    "no such column": (texts(), {"text": "body"}, TextError, r"no column 'body'\n.*one of text\n.*data\.text=NAME"),
    "no known column": ([{"body": "x"}] * 3, {}, TextError, r"which column is the text\?\n.*found columns body"),
    "no template": ([{"messages": CHAT}] * 2, {}, UsageError, "has none"),
    "too short": (texts(3), {"length": 500}, TextError, r"the training part is empty\n.*500 tokens"),
    "nothing to hold out": (texts(1), {}, TextError, "too little to hold a part out"),
    "no such split": (texts(), {"held_out": "test"}, TextError, "a file has no split to hold out"),
    "no answer": ([{"prompt": "why?", "answer": ""}] * 4, {"packed": False}, TextError, "part is empty"),
    "not a chat": ([{"messages": "hello"}] * 2, {"template": TEMPLATE}, TextError, "cannot be written by the model's"),
    "a template that forgets": ([{"messages": CHAT}] * 2, {"template": FORGETFUL}, TextError, "one behind the other"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(tmp_path: Path, tokenizer: Any, case: str) -> None:
    rows, values, error, message = REFUSED[case]
    values = dict(values)
    tokenizer.chat_template = values.pop("template", None)
    if case == "no answer":
        tokenizer.chat_template = None
        values["prompt"], values["answer"] = "prompt", "answer"
    with pytest.raises(error, match=message):
        read_rows(
            DataSettings(source=jsonl(tmp_path / "a.jsonl", rows), **{"length": 16, **values}),
            tokenizer,
            end_of_text=None if case == "no answer" else EOS_ID,
            seed=0,
            held_out_rows=3,
        )


def test_a_source_that_is_not_there(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.xyz").write_text("text")
    with pytest.raises(TextError, match=r"a\.xyz: the kind of file is not known\n.*\.jsonl"):
        read(tokenizer, source=str(tmp_path / "a.xyz"))
    with pytest.raises(TextError, match="cannot be read as data"):
        read(tokenizer, source=str(tmp_path / "nowhere"))
