"""Text in C++: the ids, texts and chats of Python, or a refusal that says which part of a tokenizer is not read."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.chat import ChatTemplate
from gsx_engines.tokens import BundleTokenizer
from tests.gsx.command_line import edit_json

SOURCES = Path(__file__)
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\n\nlines\t\ttabs \r\n",
    "def main(args):\n    return {'a': 1, \"b\": [2, 3]}\n",
    "it's I'll you've DON'T",
    "12345 67.89 1,000,000",
    "Ünïcödé ñ é e\u0301 你好，世界 مرحبا हिन्दी",
    "\U0001f389\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "a\u00a0b\u2003c\u200bd",
    "\x00\x01\x7f",
    "<|im_start|>user\nhi<|im_end|>\n<think>",
    "<|im_start|<|im_end|>>",
    "x" * 300,
]
CHAT = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "The model."}]
SYSTEM = {"role": "system", "content": " Be brief.\n"}


def varied(count: int) -> list[str]:
    """Texts of characters of all kinds."""
    rng = random.Random(0)
    kinds = [(32, 127), (32, 127), (10, 11), (160, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    return ["".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


@pytest.fixture(scope="module")
def ask(cpp_build: Path) -> Callable[[Path, Sequence[dict[str, Any]]], Any]:
    """Answers of C++ about a bundle, or its refusal to open the tokenizer."""
    program = cpp_build / "tests/gsx_text_of"
    if not program.is_file():
        pytest.skip("text in C++ needs PyTorch's tokenizers and minja: name CMake's options in GSX_TEST_CPP_TEXT")

    def answers(bundle: Path, requests: Sequence[dict[str, Any]]) -> Any:
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        done = subprocess.run(
            [program, bundle], input=lines, capture_output=True, text=True, check=False, timeout=120, encoding="utf-8"
        )
        if done.returncode:
            return done.stdout
        return [json.loads(line) for line in done.stdout.splitlines()]

    return answers


def test_ids(ask: Callable[..., Any], chat_bundle: Path) -> None:
    tokenizer = BundleTokenizer(open_bundle(chat_bundle))
    texts = [*TEXTS, *varied(200), SOURCES.read_text(encoding="utf-8")]
    assert ask(chat_bundle, [{"encode": text} for text in texts]) == [tokenizer.encode(text) for text in texts]
    assert ask(chat_bundle, [{"rendered": text} for text in texts]) == [
        tokenizer.encode_rendered(text) for text in texts
    ]


def test_texts(ask: Callable[..., Any], chat_bundle: Path) -> None:
    """Whole texts, and piece by piece as tokens come: also where a character is cut, and of any ids at all."""
    bundle = open_bundle(chat_bundle)
    tokenizer, rng = BundleTokenizer(bundle), random.Random(1)
    rows = [tokenizer.encode(text) for text in [*TEXTS, *varied(50)]]
    rows += [[rng.randrange(bundle.manifest.decoder.vocab_size) for _ in range(12)] for _ in range(200)]
    for ids, (text, pieces) in zip(rows, ask(chat_bundle, [{"decode": ids} for ids in rows]), strict=True):
        assert text == tokenizer.decode(ids)
        stream = tokenizer.stream()
        wanted = [*(stream.push(token) for token in ids), stream.finish()]
        assert "".join(pieces) == "".join(wanted) == text


def test_chats(ask: Callable[..., Any], chat_bundle: Path) -> None:
    bundle = open_bundle(chat_bundle)
    template = ChatTemplate(bundle, BundleTokenizer(bundle))
    chats = [CHAT[:1], [*CHAT, CHAT[0]], [SYSTEM, CHAT[0]]]
    for chat, (text, ids, stops) in zip(chats, ask(chat_bundle, [{"chat": chat} for chat in chats]), strict=True):
        assert (text, ids) == (template.render(chat), template.prompt(chat))
        assert set(stops) == template.stop_ids


def test_a_changed_template(ask: Callable[..., Any], chat_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(chat_bundle, tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text("{{ 1 }}", encoding="utf-8")
    (found,) = ask(bundle, [{"chat": CHAT[:1]}])
    assert "its chat template does not match gsx.json" in found["error"]


# What is edited in tokenizer.json -> the part that is named.
EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another model": (lambda t: t["model"].update(type="Unigram"), "a model of type"),
    "byte fallback": (lambda t: t["model"].update(byte_fallback=True), "a model with byte_fallback"),
    "a normalizer": (lambda t: t.update(normalizer={"type": "Lowercase"}), "a normalizer"),
    "a decoder": (lambda t: t.update(decoder={"type": "Fuse"}), "a decoder"),
    "words": (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "a pre-tokenizer"),
    "a stripped token": (lambda t: t["added_tokens"][0].update(lstrip=True), "an added token with lstrip"),
    "nothing in it": (lambda t: t.clear(), "a model of type"),
}


@pytest.mark.parametrize("name", EDITS)
def test_other_tokenizers_are_refused(ask: Callable[..., Any], chat_bundle: Path, tmp_path: Path, name: str) -> None:
    change, says = EDITS[name]
    bundle = shutil.copytree(chat_bundle, tmp_path / "bundle")
    edit_json(bundle / "tokenizer.json", change)
    found = ask(bundle, [])
    assert "is a tokenizer that is not read here" in found
    assert says in found
