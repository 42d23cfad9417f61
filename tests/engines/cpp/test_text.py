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
from gsx_engines.tokens import BundleTokenizer, TextWriter
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
NFC = {"type": "NFC"}
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


@pytest.fixture(scope="module")
def composing(chat_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose tokenizer composes characters, as Qwen's do."""
    bundle = Path(shutil.copytree(chat_bundle, tmp_path_factory.mktemp("nfc") / "bundle"))
    edit_json(bundle / "tokenizer.json", lambda t: t.update(normalizer={"type": "Sequence", "normalizers": [NFC]}))
    edit_json(bundle / "tokenizer.json", lambda t: [one.update(normalized=False) for one in t["added_tokens"]])
    return bundle


def test_ids_of_composed_texts(ask: Callable[..., Any], composing: Path) -> None:
    """NFC: marks behind letters, in another order, behind an added token; Hangul; signs that are another character."""
    tokenizer = BundleTokenizer(open_bundle(composing))
    rng = random.Random(2)
    marks = "\u0300\u0301\u0308\u0323\u0327\u0338\u3099"
    letters = "aeEoc<>=\u304b\u1100\u1161\u11a8\uac00\u212b\u2126\u00e9\u1e9b \n"
    texts = ["".join(rng.choice(letters + marks) for _ in range(12)) for _ in range(200)]
    texts += [*TEXTS, *varied(100), "<|im_start|>\u0338 a<think>\u0301", "e\u0301<|im_end|>e\u0301"]
    assert ask(composing, [{"rendered": text} for text in texts]) == [tokenizer.encode_rendered(one) for one in texts]
    edit_json(composing / "tokenizer.json", lambda t: t["added_tokens"][-1].update(content="<\u00c5>"))
    (found,) = ask(composing, [{"encode": "<\u212b>"}])
    assert "cannot read this text" in found["error"]


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


STOPS = [["e"], ["zz", "\n"], ["in ", "n '"], ["世界"], ["\u00e4", "ns"], ["absent"], []]


def test_stop_texts(ask: Callable[..., Any], chat_bundle: Path) -> None:
    """Over the borders of tokens and within characters; what only begins like one is written in the end."""
    tokenizer = BundleTokenizer(open_bundle(chat_bundle))
    asked = [(tokenizer.encode(text), stops) for text in [*TEXTS, *varied(20)] for stops in STOPS]
    found = ask(chat_bundle, [{"ids": ids, "stop": stops} for ids, stops in asked])
    for (ids, stops), answer in zip(asked, found, strict=True):
        writer, read, stopped = TextWriter(tokenizer.stream(), stops, lambda _: None), 0, False
        for token in ids:
            stopped, read = writer.push(token), read + 1
            if stopped:
                break
        assert answer == [writer.finish(), stopped, read]
    (refused,) = ask(chat_bundle, [{"ids": [], "stop": [""]}])
    assert "a stop text is empty" in refused["error"]


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
    "a normalized token": (
        lambda t: [t.update(normalizer=NFC), t["added_tokens"][0].update(normalized=True)],
        "an added token with normalized",
    ),
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
