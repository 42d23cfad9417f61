"""A checkpoint's tokenizer, as transformers reads it: what a prompt's ids are.

A tokenizer is spread over several files: tokens and their flags also stand in `tokenizer_config.json`,
`added_tokens.json` and `special_tokens_map.json`, and some classes build their own rules around the stored vocabulary.
So transformers' own `AutoTokenizer` reads them. What is used here, and written into a bundle as one complete
`tokenizer.json`, is the tokenizer of the `tokenizers` library behind it. Neither remote code nor a pickle is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.json_file import one_line, read_json
from gsx_exporter.checkpoint.names import (
    ADDED_TOKENS,
    CONFIG,
    SPECIAL_TOKENS,
    TOKENIZER,
    TOKENIZER_CONFIG,
    VOCABULARIES,
    has_vocabulary,
)
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.errors import CheckpointError

# What transformers' decode does to the text of a tokenizer with `clean_up_tokenization_spaces`, in this order.
_CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_NO_PREFIX = "\0\0"  # stands at the beginning of no token
_SPACE_MARK = "\u2581"


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has a vocabulary in any of the forms that transformers reads."""
    return has_vocabulary(checkpoint.tokenizer_directory) or bool(checkpoint.gguf and checkpoint.gguf.has_tokenizer)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer: it gives a text the ids that transformers' tokenizer gives it.

    Truncation and padding that are stored with a tokenizer are off. What is unusual about it is added to the
    checkpoint's notes. It is read once; do not change it.

    Raises:
        CheckpointError: the checkpoint has no tokenizer, transformers cannot read it, or its files contradict each
            other.
    """
    if checkpoint.tokenizer is None:
        checkpoint.tokenizer = _load(checkpoint)
    return checkpoint.tokenizer


def write_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    """Write the checkpoint's tokenizer as one complete `tokenizer.json`, which needs no other file.

    Raises:
        CheckpointError: as for `load_tokenizer`.
    """
    load_tokenizer(checkpoint).save(str(path))


def _load(checkpoint: Checkpoint) -> Tokenizer:
    directory, source = checkpoint.tokenizer_directory, checkpoint.source
    if not has_tokenizer(checkpoint):
        raise CheckpointError(
            f"{source}: has no tokenizer",
            expected=TOKENIZER,
            found="no such file",
            todo="save it with tokenizer.save_pretrained (a fast tokenizer writes tokenizer.json)",
        )
    stored = _json_if_there(directory / TOKENIZER)
    settings = _json_if_there(directory / TOKENIZER_CONFIG)
    _json_if_there(directory / SPECIAL_TOKENS)
    declared = _declared_tokens(directory, stored, settings)
    _check_class(directory / TOKENIZER_CONFIG, settings.get("tokenizer_class"))
    _check_class(checkpoint.directory / CONFIG, getattr(checkpoint.hf_config, "tokenizer_class", None))
    _check_converter(directory)
    with quiet_transformers():
        found = _read(checkpoint)
        tokenizer = _backend(found, source)
        if stored and (conflict := _conflict(stored, tokenizer)):
            checkpoint.notes.append(
                f"{TOKENIZER} {conflict[0]}, and the class {type(found).__name__}, which transformers takes for it, "
                f"{conflict[1]}: {TOKENIZER} is used as it is"
            )
            found = _read(checkpoint, generic=True)
            tokenizer = _backend(found, source)
    for content, (number, file) in declared.items():
        given = tokenizer.token_to_id(content)
        if given != number:
            raise CheckpointError(
                f"{directory / file}: the id of an added token cannot be kept",
                expected=f"{content!r} with id {number}",
                found="no id for it" if given is None else f"id {given} by transformers",
                todo=f"save the tokenizer with tokenizer.save_pretrained, or correct {file}",
            )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
        checkpoint.notes.append(
            f"{TOKENIZER} cuts words at random (dropout), which is for training: it is off, so that a prompt always "
            "has the same ids"
        )
    if _cleans_up(found, tokenizer):
        tokenizer.decoder = _cleaning(tokenizer.decoder)
    return _as_stored(tokenizer, source)


def _as_stored(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """The tokenizer as it is when it has been written and read again, so that gsx uses what a bundle gets."""
    try:
        again = Tokenizer.from_str(_with_flags(tokenizer))
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(
            f"{source}: the tokenizer cannot be written as one {TOKENIZER}",
            found=one_line(error),
            todo="correct its vocabulary: every token needs an id of its own",
        ) from error
    again.encode_special_tokens = tokenizer.encode_special_tokens  # a setting without a place in the file
    wanted, found = tokenizer.get_vocab(), again.get_vocab()
    if wanted != found:
        raise CheckpointError(
            f"{source}: the tokenizer cannot be written as one {TOKENIZER}",
            expected=f"{len(wanted)} tokens with their ids",
            found=f"{len(wanted.items() ^ found.items())} that differ when it is read again",
            todo="give the added tokens ids without gaps, behind the vocabulary",
        )
    return again


def _with_flags(tokenizer: Tokenizer) -> str:
    """The contents of tokenizer.json. A token that was ever special counts as such, whatever its flag says by now."""
    decoder, tokenizer.decoder = tokenizer.decoder, None  # so that decoding says only which tokens are left out
    hidden = [
        number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if not token.special and token.content and not tokenizer.decode([number])
    ]
    tokenizer.decoder = decoder
    text = tokenizer.to_str()
    if not hidden:
        return text
    raw = json.loads(text)
    for token in raw["added_tokens"]:
        token["special"] = token["special"] or token["id"] in hidden
    return json.dumps(raw, ensure_ascii=False)


def _read(checkpoint: Checkpoint, *, generic: bool = False) -> Any:
    """transformers' tokenizer of a checkpoint.

    Args: generic: take what tokenizer.json says, and not the rules of a class.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    directory = checkpoint.tokenizer_directory
    options = {}
    if checkpoint.gguf is not None and not has_vocabulary(directory):
        options = {"gguf_file": checkpoint.gguf.path.name}
    try:
        if generic:
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        return AutoTokenizer.from_pretrained(
            directory,
            config=checkpoint.hf_config,
            trust_remote_code=False,
            local_files_only=True,
            **options,
            mistral_format=False,  # else mistral-common, where it is installed, takes tekken.json before tokenizer.json
        )
    except Exception as error:  # transformers and tokenizers raise many types of error here, all about these files
        raise _unreadable(directory, error) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of the Rust library; it has no public name
            raise
        raise _unreadable(directory, error) from None


def _unreadable(directory: Path, error: BaseException) -> CheckpointError:
    reason = str(error).strip()
    if not isinstance(error, OSError | ValueError | ImportError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    return CheckpointError(
        f"{_at_fault(directory)}: cannot be read as a tokenizer",
        found=reason,
        todo="save it again with tokenizer.save_pretrained, or remove it: token ids work without a tokenizer",
    )


def _at_fault(directory: Path) -> Path:
    """The file that is most likely wrong: the settings, where the vocabulary itself can be read."""
    vocabulary = next((directory / name for name in VOCABULARIES if (directory / name).is_file()), directory)
    if vocabulary.name != TOKENIZER or not (directory / TOKENIZER_CONFIG).is_file():
        return vocabulary
    try:
        Tokenizer.from_file(str(vocabulary))
    except Exception:  # the library raises a bare Exception on malformed files
        return vocabulary
    return directory / TOKENIZER_CONFIG


def _backend(found: Any, source: str) -> Tokenizer:
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CheckpointError(
            f"{source}: the tokenizer runs as Python code of transformers only",
            expected=f"one of the tokenizers library, as {TOKENIZER} stores it",
            found=type(found).__name__,
            todo="convert it and save it with tokenizer.save_pretrained, or remove it: token ids work without",
        )
    return backend


def _json_if_there(path: Path) -> dict[str, Any]:
    """The contents of a JSON file; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _declared_tokens(
    directory: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, tuple[int, str]]:
    """Added tokens whose id is written down: content -> id and file. Later files of those that count win.

    As in transformers, `added_tokens.json` does not count beside `added_tokens_decoder`.
    """
    found: dict[str, tuple[int, str]] = {}

    def add(file: str, content: Any, number: Any) -> None:
        if not isinstance(content, str) or not content or isinstance(number, bool) or not isinstance(number, int):
            raise CheckpointError(
                f"{directory / file}: an added token has the wrong form",
                expected="a text and an id",
                found=f"{content!r} and {number!r}",
            )
        if not 0 <= number < 1 << 31:
            raise CheckpointError(
                f"{directory / file}: an added token has an impossible id",
                expected=f"an id for {content!r} that the model has",
                found=str(number),
            )
        found[content] = number, file

    listed = stored.get("added_tokens") or []
    for token in listed if isinstance(listed, list) else [listed]:
        token = token if isinstance(token, dict) else {"content": token}
        add(TOKENIZER, token.get("content"), token.get("id"))
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        for number, token in decoder.items() if isinstance(decoder, dict) else [(decoder, None)]:
            content = token.get("content") if isinstance(token, dict) else token
            add(TOKENIZER_CONFIG, content, int(number) if _is_number(number) else number)
    else:
        for content, number in _json_if_there(directory / ADDED_TOKENS).items():
            add(ADDED_TOKENS, content, number)
    return found


def _is_number(text: Any) -> bool:
    return isinstance(text, str) and text.isascii() and text.lstrip("-").isdigit() and len(text) < 12


def _check_class(path: Path, name: Any) -> None:
    """Refuse a class that is none of a tokenizer: transformers would load whatever of its classes is named."""
    from transformers import PreTrainedTokenizerBase
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if name is None:
        return
    if not isinstance(name, str):
        raise CheckpointError(f"{path}: tokenizer_class is no name", expected="a text", found=repr(name))
    with quiet_transformers():
        try:
            named = tokenizer_class_from_name(name)
        except Exception:  # of a module that cannot be imported: AutoTokenizer says what is missing
            return
    is_stand_in = getattr(named, "is_dummy", False)  # of a class whose packages are not installed
    if named is None or is_stand_in or (isinstance(named, type) and issubclass(named, PreTrainedTokenizerBase)):
        return
    raise CheckpointError(f"{path}: tokenizer_class {name!r} is no tokenizer", todo="name the tokenizer's own class")


def _check_converter(directory: Path) -> None:
    """Refuse a SentencePiece model by itself, if what converts it is missing; transformers gives another reason."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    path = directory / "tokenizer.model"
    if (directory / TOKENIZER).is_file() or not path.is_file():
        return
    with path.open("rb") as stream:
        is_sentencepiece = stream.read(1) == b"\n"  # the first field of its protocol buffer; tiktoken's file is text
    needed = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [name for name, is_there in needed.items() if not is_there]
    if is_sentencepiece and missing:
        raise CheckpointError(
            f"{path}: is a SentencePiece model, which must be converted",
            expected=TOKENIZER,
            found=f"no {' and no '.join(missing)} installed to convert it",
            todo=f"pip install {' '.join(missing)}, or save it once with tokenizer.save_pretrained of a fast tokenizer",
        )


def _conflict(stored: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[str, str] | None:
    """What tokenizer.json says and what the class made of it, where the class cannot be right; None if it can.

    A class that builds its own rules takes only the vocabulary from the file. If the file's model is of another kind,
    or its vocabulary writes spaces in another way, the class reads it wrong (Llama's class with byte-level files).
    """
    model = stored.get("model")
    own = model.get("type") if isinstance(model, dict) else None
    built = type(tokenizer.model).__name__
    if own is not None and own != built:
        return f"is a {own} model", f"makes it a {built} model"
    parts = [_state(part) for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)]
    written = _spaces([stored.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")])
    read = _spaces(parts)
    if written is not None and read is not None and written != read:
        return f"writes spaces as {written}", f"as {read}"
    return None


def _state(part: Any) -> Any:
    """A part of a tokenizer as it stands in tokenizer.json."""
    return None if part is None else json.loads(part.__getstate__())


def _spaces(parts: Any) -> str | None:
    """How the vocabulary that these parts belong to writes spaces; None if that cannot be seen."""
    nodes = list(_nodes(parts))
    if any(node.get("type") == "ByteLevel" for node in nodes):
        return "bytes"
    marking = [node for node in nodes if node.get("type") in ("Metaspace", "Prepend", "Replace")]
    return _SPACE_MARK if _SPACE_MARK in json.dumps(marking, ensure_ascii=False) else None


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """All objects with a type inside a JSON value."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from _nodes(part)


def _cleans_up(found: Any, tokenizer: Tokenizer) -> bool:
    """Whether transformers' decode removes the spaces before punctuation. It does not for BPE, unless forced."""
    forced = found.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return bool(found.clean_up_tokenization_spaces) and (type(tokenizer.model).__name__ != "BPE" or bool(forced))


def _cleaning(decoder: Any) -> Any:
    """A decoder that also removes the spaces before punctuation. Without a decoder, tokens are joined by spaces."""
    own = decoder or decoders.WordPiece(prefix=_NO_PREFIX, cleanup=False)
    replaced = [decoders.Replace(text, text.strip()) for text in _CLEANED]
    return decoders.Sequence([own, decoders.Fuse(), *replaced])
