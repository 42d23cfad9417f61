"""Text as ids come in: all pieces together are what transformers' decode gives for the whole, behind the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerFast

from gsx_engines.tokens import Decoding, TextStream, TextWriter
from tests.tokenizer_kinds import (
    MARK,
    byte_ids,
    byte_level,
    chain,
    number_of,
    sentencepiece,
    spaces_and_bytes,
    unigram,
    words,
)

_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def _with(make: Callable[[], Tokenizer], *steps: decoders.Decoder) -> Tokenizer:
    tokenizer = make()
    tokenizer.decoder = chain(*steps)
    return tokenizer


KINDS: dict[str, Tokenizer] = {
    "byte-level": byte_level(),
    "sentencepiece": sentencepiece(),
    "sentencepiece, first space kept": sentencepiece(decoder=chain(*spaces_and_bytes())),
    "two spaces stripped": sentencepiece(decoder=chain(*spaces_and_bytes(), decoders.Strip(" ", 2, 0))),
    "spaces thrown away": sentencepiece(
        decoder=chain(decoders.Replace(MARK, ""), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("a", 1, 0))
    ),
    "metaspace": unigram(),
    "bytes and metaspace": _with(sentencepiece, decoders.ByteFallback(), decoders.Metaspace()),
    "no decoder": words(),
    "word pieces": _with(words, decoders.WordPiece(prefix=MARK, cleanup=True)),
    "spaces cleaned up": _with(
        unigram, decoders.Metaspace(), decoders.Fuse(), *(decoders.Replace(text, text.strip()) for text in _CLEANED)
    ),
    # These are given out at the end only, since anything may change before it.
    "pairs replaced": sentencepiece(decoder=chain(*spaces_and_bytes(), decoders.Replace("aa", "b"))),
    "end of word": _with(words, decoders.BPEDecoder(suffix="a")),
}
# Letters, blanks, characters of two to four bytes, what looks like their beginning and is none, and U+FFFD itself.
_BYTES = "\n A\u00e9\u2581\U0001f600\ufffd".encode() + b"\xe0\x80\xff"


def _interesting(tokenizer: Tokenizer) -> list[int]:
    """Bytes that often meet, special tokens, ids that do not exist, words and added tokens."""
    size = tokenizer.get_vocab_size()
    return [*byte_ids(tokenizer, _BYTES), 0, 1, 2, size, size + 7, *range(size - 16, size)]


def _streamed(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int], *, window: int = 4) -> list[str]:
    decoding = Decoding(tokenizer)
    decoding.window = window
    stream = TextStream(decoding, prompt)
    return [*map(stream.push, new), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=80)
@given(data=st.data(), window=st.sampled_from([0, 1, 24]))
def test_the_pieces_are_the_text_behind_the_prompt(kind: str, data: st.DataObject, window: int) -> None:
    tokenizer = KINDS[kind]
    ids = st.lists(st.sampled_from(_interesting(tokenizer)), max_size=60)
    prompt, new = data.draw(ids), data.draw(ids)
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    before, whole = (reference.decode(part, skip_special_tokens=True) for part in (prompt, prompt + new))
    assert "".join(_streamed(tokenizer, prompt, new, window=window)) == whole[len(before) :]


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    byte, piece = KINDS["byte-level"], KINDS["sentencepiece"]
    the, e_acute = number_of(byte, "the"), byte_ids(byte, "\u00e9".encode())
    assert _streamed(byte, [], [the, 2, the, *e_acute, the]) == ["the", "", "the", "", "\u00e9", "the", ""]
    assert _streamed(byte, [the], [*e_acute[:1], the]) == ["", "\ufffdthe", ""], "unfinished, and then something else"
    a, b = number_of(piece, f"{MARK}a"), number_of(piece, f"{MARK}b")
    smile = byte_ids(piece, "\U0001f600".encode())
    assert _streamed(piece, [], [a, b]) == ["a", " b", ""], "the first space of a text is no text"
    assert _streamed(piece, [1, a], [a, b, 2]) == [" a", " b", "", ""], "behind a prompt it is"
    assert _streamed(piece, [a], [*smile, b]) == ["", "", "", "", "\U0001f600 b", ""]
    cleaned = KINDS["spaces cleaned up"]
    some = [number_of(cleaned, token) for token in (f"{MARK}a", MARK, ".", MARK, "b")]
    assert _streamed(cleaned, [], some) == ["a", "", ".", "", " b", ""]


@pytest.mark.parametrize(
    ("kind", "new", "text"),
    [
        ("byte-level", b"b\xef\xbf\xbd", "b\ufffd"),
        ("byte-level", b"b \xe4\xbd", "b \ufffd"),
        ("byte-level", b"\xff\xfe\xef\xbf\xbd\xef\xbf\xbd", "\ufffd" * 4),
        ("sentencepiece", b"\n\xf0\x9f", "\ufffd" * 3),
        ("sentencepiece", b"\n\xf0\x9f\x98\x80", "\n\U0001f600"),
    ],
)
@pytest.mark.parametrize("end", [[], [2]])
def test_the_end_of_a_text_is_not_lost(kind: str, new: bytes, text: str, end: list[int]) -> None:
    tokenizer = KINDS[kind]
    shown: list[str] = []
    writer = TextWriter(TextStream(Decoding(tokenizer), [1]), [], shown.append)
    for token in [*byte_ids(tokenizer, new), *end]:
        writer.push(token)
    assert writer.finish() == "".join(shown) == text


def test_a_stop_text_in_what_is_held_until_the_end() -> None:
    tokenizer = KINDS["sentencepiece"]
    writer = TextWriter(TextStream(Decoding(tokenizer), []), ["\n\n"], lambda text: None)
    assert not any(writer.push(token) for token in byte_ids(tokenizer, b"A\n\nA"))
    assert writer.finish() == "A"


def test_a_long_run_of_bytes_is_decoded_once() -> None:
    tokenizer = KINDS["sentencepiece"]
    decoding, calls = Decoding(tokenizer), []
    text = decoding.text
    decoding.text = lambda ids: calls.append(len(ids)) or text(ids)  # type: ignore[method-assign, func-returns-value]
    stream = TextStream(decoding, [])
    pieces = [stream.push(token) for token in byte_ids(tokenizer, "\u4f60".encode() * 500)]
    pieces.append(stream.push(number_of(tokenizer, ".")))
    assert "".join(pieces) == "\u4f60" * 500 + "."
    assert len(calls) <= 3


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_the_decoder_ends_nothing() -> None:
    """The library panics where `Strip` takes more from the end than there is."""
    tokenizer = sentencepiece(decoder=chain(*spaces_and_bytes(), decoders.Strip(" ", 1, 1)))
    mark = number_of(tokenizer, MARK)
    with pytest.raises(BaseException, match="slice index"):
        tokenizer.decode([mark])
    assert _streamed(tokenizer, [], [mark]) == ["", ""]
