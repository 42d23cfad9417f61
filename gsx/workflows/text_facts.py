"""What `gsx inspect` says about text: where it ends, special and added tokens, chat template and context, and the files
that say so. A bundle is looked at without transformers and PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsx_engines.bundle.bundle import MANIFEST, Bundle
from gsx_engines.chat import template_in

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gsx_exporter.checkpoint.checkpoint import Checkpoint

_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_ADDED_TOKENS = "added_tokens.json"
# A report shows no more of a list than this.
_FIRST = 8


@dataclass(frozen=True)
class Token:
    """A token and its text, which is None without a tokenizer that has the token."""

    id: int
    text: str | None


@dataclass(frozen=True)
class TokenList:
    """A list of tokens, of which only the first are shown; `files` says how many of them each file names."""

    count: int
    first: tuple[Token, ...]
    files: Mapping[str, int]


@dataclass(frozen=True)
class Context:
    """How long a text may be.

    Args:
        positions: the longest text, in tokens.
        stored: `max_position_embeddings` of the file, which RoPE scaling may extend.
        rope: the parameters of RoPE.
        file: the file that says so.
    """

    positions: int
    stored: int | None
    rope: Mapping[str, Any]
    file: str


@dataclass(frozen=True)
class TextFacts:
    """How text is read, and where it ends.

    Args:
        ends: tokens that end a text.
        begin: the token that a text begins with; None without one.
        ids_from: the file that names both.
        special: tokens that are left out of generated text; None without a tokenizer.
        added: tokens that are never split; None without a tokenizer.
        no_tokenizer: why there is none; None if there is one.
        chat_template: the file that has it; None without one.
        context: how long a text may be.
    """

    ends: tuple[Token, ...]
    begin: Token | None
    ids_from: str
    special: TokenList | None
    added: TokenList | None
    no_tokenizer: str | None
    chat_template: str | None
    context: Context


def facts_of_checkpoint(checkpoint: Checkpoint) -> TextFacts:
    """How the text of a checkpoint is understood."""
    from gsx_exporter.checkpoint.generation import file_of_text_ends
    from gsx_exporter.checkpoint.tokenizer import load_tokenizer
    from gsx_exporter.errors import CheckpointError

    config = checkpoint.config
    tokenizer, problem = None, None
    try:
        tokenizer = load_tokenizer(checkpoint)
    except CheckpointError as error:
        problem = error.what
    stored = checkpoint.config_values().get("max_position_embeddings")
    context = Context(config.max_positions, stored, _scaled(config.ropes), _CONFIG)
    file = file_of_text_ends(checkpoint.generation_directory)
    return _facts(checkpoint.tokenizer_directory, tokenizer, problem, (config.eos_ids, config.bos_id, file), context)


def facts_of_bundle(bundle: Bundle) -> TextFacts:
    """How the text of a bundle is understood."""
    from tokenizers import Tokenizer

    decoder = bundle.manifest.decoder
    path = bundle.directory / _TOKENIZER
    tokenizer, problem = None, None
    if path.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception on malformed files
            problem = f"{path}: cannot be read as a tokenizer: {error}"
    else:
        problem = f"bundle {bundle.directory}: has no tokenizer"
    raw = _json(bundle.directory / _CONFIG)
    # The name of transformers 5, or that of 4.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling")
    scaled = _scaled(rope if isinstance(rope, dict) else {})
    context = Context(decoder.max_positions, raw.get("max_position_embeddings"), scaled, _CONFIG)
    return _facts(bundle.directory, tokenizer, problem, (decoder.eos_ids, decoder.bos_id, MANIFEST), context)


def _scaled(rope: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of RoPE; where each kind of attention has its own, those that are scaled, or else the first."""
    kinds = [dict(value) for value in rope.values() if isinstance(value, Mapping)]
    return next((kind for kind in kinds if "factor" in kind), kinds[0]) if kinds else rope


def _facts(
    directory: Path,
    tokenizer: Tokenizer | None,
    problem: str | None,
    ids: tuple[Sequence[int], int | None, str],
    context: Context,
) -> TextFacts:
    def token(number: int) -> Token:
        return Token(number, tokenizer.id_to_token(number) if tokenizer is not None else None)

    ends, begin, file = ids
    added = sorted(tokenizer.get_added_tokens_decoder().items()) if tokenizer is not None else []
    named = _files_of_added(directory)

    def listed(chosen: list[tuple[int, Any]]) -> TokenList | None:
        if tokenizer is None:
            return None
        files: dict[str, int] = {}
        for _, one in chosen:
            where = next((name for name, texts in named.items() if one.content in texts), _TOKENIZER)
            files[where] = files.get(where, 0) + 1
        first = tuple(Token(number, one.content) for number, one in chosen[:_FIRST])
        return TokenList(len(chosen), first, files)

    return TextFacts(
        ends=tuple(map(token, ends)),
        begin=None if begin is None else token(begin),
        ids_from=file,
        special=listed([(number, one) for number, one in added if one.special]),
        added=listed(added),
        no_tokenizer=problem,
        chat_template=template.file if (template := template_in(directory)) else None,
        context=context,
    )


def _files_of_added(directory: Path) -> dict[str, set[str]]:
    """File -> texts of the added tokens that it names; the first file that names a token counts."""
    found: dict[str, set[str]] = {}
    whole = _json(directory / _TOKENIZER).get("added_tokens")
    if isinstance(whole, list):
        found[_TOKENIZER] = {str(one.get("content")) for one in whole if isinstance(one, dict)}
    decoder = _json(directory / _TOKENIZER_CONFIG).get("added_tokens_decoder")
    if isinstance(decoder, dict):
        found[_TOKENIZER_CONFIG] = {str(one.get("content")) for one in decoder.values() if isinstance(one, dict)}
    found[_ADDED_TOKENS] = set(_json(directory / _ADDED_TOKENS))
    return found


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
