"""Tokenizers of all kinds that text is decoded with, each with a few words and, where it has them, all 256 bytes."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIALS = ("<unk>", "<s>", "</s>")
MARK = "\u2581"
WORDS = (
    MARK,
    f"{MARK}a",
    f"{MARK}b",
    "a",
    "b",
    f"{MARK}the",
    "\u00e9",
    "\u4f60",
    "\ufffd",
    ".",
    "'",
    f"{MARK}'",
    "n't",
)
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


def _printable() -> list[str]:
    """The character that a byte-level tokenizer writes each byte as."""
    own = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(value if value in own else next(others)) for value in range(256)]


PRINTABLE = _printable()


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """Bytes as tokens of one byte each; none if the tokenizer has no such tokens."""
    names = BYTES if tokenizer.token_to_id(BYTES[0]) is not None else PRINTABLE
    return [number for value in data if (number := tokenizer.token_to_id(names[value])) is not None]


def number_of(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer has."""
    number = tokenizer.token_to_id(token)
    assert number is not None, token
    return number


def byte_level(*, begins: bool = True) -> Tokenizer:
    """As of Llama 3, Qwen and SmolLM: tokens are bytes, written as 256 printable characters.

    Args: begins: whether a text begins with <s>.
    """
    alphabet = sorted(PRINTABLE)
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *alphabet, "th", "the", "\u0120the"])}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_specials(tokenizer, begins=begins)


def sentencepiece(*, decoder: decoders.Decoder | None = None, begins: bool = True) -> Tokenizer:
    """As of Llama 2 and Mistral: U+2581 for a space, other characters as single bytes.

    Args: decoder: None for Llama 2's own; begins: as for `byte_level`.
    """
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *BYTES, *WORDS])}
    merges = [(MARK, "a"), (MARK, "b")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    tokenizer.decoder = decoder or chain(*spaces_and_bytes(), decoders.Strip(" ", 1, 0))
    return _with_specials(tokenizer, begins=begins)


def unigram() -> Tokenizer:
    """A Unigram model, whose decoder knows U+2581."""
    pieces = [*SPECIALS, *WORDS]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(n)) for n, piece in enumerate(pieces)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_specials(tokenizer)


def words() -> Tokenizer:
    """Whole words, without a decoder: they are joined by spaces."""
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_specials(tokenizer)


def spaces_and_bytes() -> list[decoders.Decoder]:
    """The first steps of Llama 2's decoder."""
    return [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]


def chain(*steps: decoders.Decoder) -> decoders.Decoder:
    """Decoders one behind the other."""
    return decoders.Sequence(list(steps))


def _with_specials(tokenizer: Tokenizer, *, begins: bool = True) -> Tokenizer:
    tokenizer.add_special_tokens(list(SPECIALS))
    if begins:
        single = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
        tokenizer.post_processor = single
    tokenizer.add_tokens(
        [AddedToken("<|tool|>", special=False), AddedToken(" und \u00fc", special=False, normalized=False)]
    )
    return tokenizer
