"""A checkpoint's tokenizer: its ids and texts are transformers' own, however it is stored, and the bundle's too."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import is_sentencepiece_available

from gsx_exporter.checkpoint import ouro
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.names import TOKENIZER
from gsx_exporter.checkpoint.tokenizer import has_tokenizer, load_tokenizer, write_tokenizer
from gsx_exporter.config import FAMILIES, ModelConfig
from gsx_exporter.errors import CheckpointError
from tests.tiny import FAMILY_KEYS
from tests.tokenizer_kinds import BYTES, WORDS, byte_level, sentencepiece, unigram, words

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "byte-level, no beginning": lambda: byte_level(begins=False),
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "words": words,
}
PROMPTS = (
    "",
    "a b",
    " a",
    "  the  a\n",
    "a\u00e9 \u4f60 \U0001f600",
    "<s>a</s> b <|tool|>a",
    "<|im_start|>the b <|im_end|> a",
    "a und \u00fc the, 'b' isn't.",
)
IDS = ([4, 5, 2, 6, 7], [1, 30, 40, 2], [260, 261, 262, 263, 264, 265, 266])
CHAT = ("<|im_start|>", "<|im_end|>")
FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def put(folder: Path, tokenizer: Tokenizer, *, family: str = "llama", **settings: Any) -> Checkpoint:
    """A model directory without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write(folder / "tokenizer_config.json", {key: value for key, value in {**names, **settings}.items() if value != ""})
    shape = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    ouro.register()
    config = AutoConfig.for_model(family, vocab_size=320, pad_token_id=None, **{**shape, **FAMILY_KEYS[family]})
    config.save_pretrained(folder)
    return opened(folder)


def opened(folder: Path) -> Checkpoint:
    config = AutoConfig.from_pretrained(folder)
    return Checkpoint(folder, str(folder), config, ModelConfig.from_hf(config), {})


def write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def check_as_transformers(checkpoint: Checkpoint) -> Tokenizer:
    """Compare ids and text with AutoTokenizer, of the tokenizer and of the file that a bundle gets."""
    reference = AutoTokenizer.from_pretrained(checkpoint.directory)
    written = checkpoint.directory.with_name(checkpoint.directory.name + ".json")
    write_tokenizer(checkpoint, written)
    for tokenizer in (load_tokenizer(checkpoint), Tokenizer.from_file(str(written))):
        for prompt in PROMPTS:
            assert tokenizer.encode(prompt).ids == reference(prompt)["input_ids"], prompt
            ids = reference(prompt)["input_ids"]
            assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True), prompt
        for some in IDS:
            assert tokenizer.decode(some) == reference.decode(some, skip_special_tokens=True)
    return load_tokenizer(checkpoint)


def sentencepiece_model() -> bytes:
    """A SentencePiece model of type BPE, written field by field (its protocol buffer needs no library for that)."""

    def field(number: int, value: bytes | int) -> bytes:
        if isinstance(value, int):
            return bytes([number << 3]) + bytes([value])
        return bytes([number << 3 | 2, len(value)]) + value

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + field(3, kind))

    pieces = [piece("<unk>", 0, 2), piece("<s>", 0, 3), piece("</s>", 0, 3), *(piece(token, 0, 6) for token in BYTES)]
    pieces += [piece(token, -float(n), 1) for n, token in enumerate(WORDS)]
    return b"".join(pieces) + field(2, field(3, 2) + bytes([35 << 3 & 0x7F | 0x80, 35 >> 4, 1]))


def _next_ids(tokenizer: Tokenizer) -> dict[str, int]:
    size = max(tokenizer.get_vocab().values()) + 1
    return {token: size + place for place, token in enumerate(CHAT)}


def _decoder_section(tokenizer: Tokenizer) -> dict[str, Any]:
    """`added_tokens_decoder` of all added tokens and the chat tokens."""
    own = tokenizer.get_added_tokens_decoder()
    new = {number: AddedToken(token, special=True, normalized=False) for token, number in _next_ids(tokenizer).items()}
    return {
        str(number): {name: getattr(token, name) for name in ("content", "special", *FLAGS)}
        for number, token in {**own, **new}.items()
    }


def _elsewhere(folder: Path, tokenizer: Tokenizer, file: str, value: Any) -> Checkpoint:
    checkpoint = put(folder, tokenizer)
    write(folder / file, value)
    return checkpoint


def _stored(change: Callable[[Tokenizer], object]) -> Callable[[Path, Tokenizer], Checkpoint]:
    def make(folder: Path, tokenizer: Tokenizer) -> Checkpoint:
        change(tokenizer)
        return put(folder, tokenizer, pad_token="<unk>")

    return make


def _bare(folder: Path, tokenizer: Tokenizer) -> Checkpoint:
    checkpoint = put(folder, tokenizer)
    (folder / "tokenizer_config.json").unlink()
    return checkpoint


SPELLINGS: dict[str, Callable[[Path, Tokenizer], Checkpoint]] = {
    "complete": put,
    "no tokenizer_config.json": _bare,
    "no class": lambda f, t: put(f, t, tokenizer_class=""),
    "class of nobody": lambda f, t: put(f, t, tokenizer_class="MyOwnTokenizer"),
    "add_bos_token": lambda f, t: put(f, t, add_bos_token=True),
    "no add_bos_token": lambda f, t: put(f, t, add_bos_token=False, add_eos_token=True),
    "in added_tokens_decoder": lambda f, t: put(f, t, added_tokens_decoder=_decoder_section(t)),
    "in added_tokens.json": lambda f, t: _elsewhere(f, t, "added_tokens.json", _next_ids(t)),
    "in special_tokens_map.json": lambda f, t: _elsewhere(
        f,
        t,
        "special_tokens_map.json",
        {"eos_token": {"content": CHAT[1], **FLAGS}, "additional_special_tokens": [CHAT[0]]},
    ),
    "by name": lambda f, t: put(
        f, t, eos_token=CHAT[1], pad_token={"__type": "AddedToken", "content": CHAT[0], **FLAGS}
    ),
    "additional_special_tokens": lambda f, t: put(f, t, additional_special_tokens=list(CHAT)),
    "extra_special_tokens": lambda f, t: put(f, t, extra_special_tokens={"begin_token": CHAT[0], "end_token": CHAT[1]}),
    "end without its flag": lambda f, t: put(_unflagged(f, t), t, eos_token=CHAT[1]),
    "flags that contradict each other": lambda f, t: put(
        f, t, added_tokens_decoder={n: {**token, "special": False} for n, token in _decoder_section(t).items()}
    ),
    "truncation": _stored(lambda t: t.enable_truncation(3)),
    "padding": _stored(lambda t: t.enable_padding(length=16, pad_token="<unk>")),
    "spaces cleaned up": lambda f, t: put(f, t, clean_up_tokenization_spaces=True),
    "strips around": _stored(
        lambda t: t.add_tokens([AddedToken("<|im_end|>", lstrip=True, rstrip=True, special=True)])
    ),
}


def _unflagged(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.add_tokens([AddedToken(CHAT[1], special=False, normalized=False)])
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_transformers(tmp_path: Path, kind: str, spelling: str) -> None:
    checkpoint = SPELLINGS[spelling](tmp_path / "model", KINDS[kind]())
    tokenizer = check_as_transformers(checkpoint)
    assert tokenizer.truncation is None
    assert tokenizer.padding is None
    assert checkpoint.notes == []


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("spaced", [True, False, None])
def test_classes_with_rules_of_their_own(
    tmp_path: Path, family: str, kind: str, begins: bool, spaced: bool | None
) -> None:
    """The classes that transformers takes for these families build their own rules around the stored vocabulary."""
    name, make = {
        "byte-level": ("Qwen2Tokenizer", byte_level),
        "sentencepiece": ("LlamaTokenizerFast", sentencepiece),
    }[kind]
    settings = {"legacy": spaced, "add_prefix_space": spaced, "add_bos_token": begins, "tokenizer_class": name}
    checkpoint = put(tmp_path / "model", make(begins=begins), family=family, **settings)
    if (kind, family) != ("sentencepiece", "qwen2"):  # transformers takes its byte-level class there, see below
        check_as_transformers(checkpoint)


@pytest.mark.parametrize(
    ("family", "make", "name"),
    [
        ("llama", byte_level, "LlamaTokenizer"),
        ("llama", byte_level, "CodeLlamaTokenizer"),
        ("llama", byte_level, "GemmaTokenizer"),
        ("llama", unigram, "LlamaTokenizer"),
        ("qwen2", sentencepiece, "LlamaTokenizerFast"),
        ("qwen2", words, "PreTrainedTokenizerFast"),
        ("llama", sentencepiece, "Qwen2Tokenizer"),
    ],
)
def test_a_class_that_cannot_read_the_file_does_not_count(
    tmp_path: Path, family: str, make: Callable[[], Tokenizer], name: str
) -> None:
    """Classes that take the vocabulary only, and read it by rules of another kind, lose spaces or whole words."""
    made = make()
    checkpoint = put(tmp_path / "model", made, family=family, tokenizer_class=name, eos_token=CHAT[1])
    tokenizer = load_tokenizer(checkpoint)
    for prompt in PROMPTS:
        if CHAT[1] not in prompt:
            assert tokenizer.encode(prompt).ids == made.encode(prompt).ids
    assert tokenizer.encode(CHAT[1], add_special_tokens=False).ids == [made.get_vocab_size()]
    by_transformers = name == "LlamaTokenizer" and make is byte_level  # which takes the generic class by itself
    assert [TOKENIZER in note for note in checkpoint.notes] == ([] if by_transformers else [True])


def test_words_are_never_cut_at_random(tmp_path: Path) -> None:
    """Dropout is for training: with it, a prompt has other ids each time, in transformers too."""
    tokenizer = KINDS["byte-level"]()
    tokenizer.model.dropout = 0.5
    checkpoint = put(tmp_path, tokenizer)
    loaded = load_tokenizer(checkpoint)
    assert len({tuple(loaded.encode("the class of the words").ids) for _ in range(20)}) == 1
    assert any("dropout" in note for note in checkpoint.notes)


def test_a_bundle_needs_no_other_file(tmp_path: Path) -> None:
    """One file has it all; and the hub's own folders of links, which cannot be written to, are read like others."""
    made = byte_level()
    section = _decoder_section(made)
    real = put(tmp_path / "blobs", made, added_tokens_decoder=section)
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc def"
    snapshot.mkdir(parents=True)
    for path in real.directory.iterdir():
        path.chmod(0o444)
        (snapshot / path.name).symlink_to(path)
    checkpoint = opened(snapshot)
    assert load_tokenizer(checkpoint) is load_tokenizer(checkpoint)
    write_tokenizer(checkpoint, tmp_path / "tokenizer.json")
    tokens = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_added_tokens_decoder()
    assert {number: token.content for number, token in tokens.items()} == {
        int(number): token["content"] for number, token in section.items()
    }


# What is wrong with the files: how it comes about, and words of the message.
def _json(name: str, **keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        raw = json.loads(path.read_text()) if path.is_file() else {}
        write(path, {**raw, **keys})

    return change


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / name, text)


def _only(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        (folder / name).write_bytes(data)

    return change


CONFIG_FILE, FILE = "tokenizer_config.json", "tokenizer.json"
WRONG: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut": (_text(FILE, '{"model": {"vocab": {"a"'), [FILE, "not readable JSON"]),
    "not UTF-8": (lambda f: (f / FILE).write_bytes(b"\xff\xfe{}"), [FILE, "not readable JSON"]),
    "nested": (_text(FILE, "[" * 100_000), [FILE, "not readable JSON"]),
    "null": (_text(FILE, "null"), [FILE, "not a JSON object", "null"]),
    "empty": (_text(FILE, "{}"), [FILE, "cannot be read as a tokenizer"]),
    "no model": (_json(FILE, model=None), [FILE, "cannot be read as a tokenizer"]),
    "unknown model": (_json(FILE, model={"type": "GPE", "vocab": {}}), [FILE, "cannot be read as a tokenizer"]),
    "unknown decoder": (_json(FILE, decoder={"type": "Base64"}), [FILE, "cannot be read as a tokenizer"]),
    "added tokens of a wrong type": (_json(FILE, added_tokens=7), [FILE, "an added token has the wrong form"]),
    "an added token without an id": (_json(FILE, added_tokens=[{"content": "a"}]), [FILE, "a text and an id", "None"]),
    "an added token far away": (
        _json(FILE, added_tokens=[{"id": 9999, "content": "<x>", **FLAGS, "special": True}]),
        [FILE, "the id of an added token cannot be kept", "'<x>' with id 9999"],
    ),
    "an added token twice": (
        _json("added_tokens.json", **{"<x>": 264, "<y>": 264}),
        ["added_tokens.json", "cannot be kept", "'<x>' with id 264"],
    ),
    "an impossible id": (_json("added_tokens.json", **{"<x>": 2**40}), ["added_tokens.json", "impossible id"]),
    "a negative id": (_json("added_tokens.json", **{"<x>": -1}), ["added_tokens.json", "impossible id"]),
    "an id that is no number": (_json("added_tokens.json", **{"<x>": None}), ["added_tokens.json", "wrong form"]),
    "settings cut": (_text(CONFIG_FILE, '{"bos_token": '), [CONFIG_FILE, "not readable JSON"]),
    "settings that are a list": (_text(CONFIG_FILE, "[]"), [CONFIG_FILE, "not a JSON object", "found []"]),
    "a null section": (_json(CONFIG_FILE, added_tokens_decoder=None), [CONFIG_FILE, "wrong form"]),
    "a section of texts": (_json(CONFIG_FILE, added_tokens_decoder={"1": "<s>"}), ["should be a dictionary"]),
    "an id in words": (
        _json(CONFIG_FILE, added_tokens_decoder={"one": {"content": "<s>", **FLAGS}}),
        [CONFIG_FILE, "wrong form", "'one'"],
    ),
    "an id of another token": (
        _json(CONFIG_FILE, added_tokens_decoder={"7": {"content": "<s>", **FLAGS}}),
        [CONFIG_FILE, "'<s>' with id 7", "id 1 by transformers"],
    ),
    "a number for a token": (_json(CONFIG_FILE, eos_token=2), ["eos_token has to be either str or AddedToken"]),
    "special tokens of a wrong type": (_text("special_tokens_map.json", "3"), ["special_tokens_map.json", "found 3"]),
    "a class of another kind": (_json(CONFIG_FILE, tokenizer_class="LlamaForCausalLM"), [CONFIG_FILE, "no tokenizer"]),
    "a class that is no name": (_json(CONFIG_FILE, tokenizer_class=["a"]), [CONFIG_FILE, "is no name"]),
    "remote code": (
        _json(CONFIG_FILE, tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}),
        ["cannot be read as a tokenizer", "custom code"],
    ),
    "remote code of a wrong type": (_json(CONFIG_FILE, auto_map=3), ["cannot be read as a tokenizer"]),
    "tekken.json of another program": (_only("tekken.json", b"{}"), ["tekken.json", "cannot be read as a tokenizer"]),
    "nothing for its class": (_only("vocab.json", b"{}"), ["vocab.json", "cannot be read as a tokenizer"]),
    "a damaged SentencePiece model": (_only("tokenizer.model", b"\n\xff\xff"), ["tokenizer.model"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    change, parts = WRONG[case]
    checkpoint = put(tmp_path, byte_level())
    (tmp_path / "mine.py").write_text("raise SystemExit('remote code has been run')")
    change(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(checkpoint)
    for part in parts:
        assert part in error.value.message
    assert capfd.readouterr().err == ""


def test_a_sentencepiece_model_alone_is_converted_or_refused_by_name(tmp_path: Path) -> None:
    checkpoint = put(tmp_path / "model", sentencepiece())
    (checkpoint.directory / FILE).unlink()
    (checkpoint.directory / "tokenizer.model").write_bytes(sentencepiece_model())
    if is_sentencepiece_available():
        check_as_transformers(checkpoint)
    else:
        with pytest.raises(CheckpointError, match=r"(?s)is a SentencePiece model.*no sentencepiece.*pip install"):
            load_tokenizer(checkpoint)


def test_tekken_json_alone_is_converted(tmp_path: Path) -> None:
    checkpoint = put(tmp_path / "model", byte_level(), family="mistral")
    (checkpoint.directory / FILE).unlink()
    pieces = [bytes([value]) for value in range(256)] + [b"th", b"the"]
    vocabulary = [{"rank": n, "token_bytes": base64.b64encode(p).decode()} for n, p in enumerate(pieces)]
    settings = {
        "pattern": r"\s+|\S+",
        "num_vocab_tokens": 258,
        "default_vocab_size": 261,
        "default_num_special_tokens": 3,
    }
    special = [{"rank": n, "token_str": token, "is_control": True} for n, token in enumerate(("<unk>", "<s>", "</s>"))]
    tekken = {"config": {**settings, "version": "v7"}, "vocab": vocabulary, "special_tokens": special}
    write(checkpoint.directory / "tekken.json", tekken)
    check_as_transformers(checkpoint)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    checkpoint = put(tmp_path, byte_level())
    (tmp_path / FILE).unlink()
    assert not has_tokenizer(checkpoint)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(checkpoint)
