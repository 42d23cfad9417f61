"""Where a text ends: the end, beginning and padding tokens, as transformers' `generate` reads them.

`generation_config.json` decides alone where it is there, also if it names fewer tokens than `config.json`, or none.
Without it, the keys that `config.json` itself has are read, and no defaults of the family: a model whose files name no
end token has none. Both files are read by transformers' own `GenerationConfig`.

The file may ask for more than that. gsx chooses tokens by the logits alone, so every setting by which `generate` would
choose other ones, or end elsewhere, becomes a note. The tables below name all settings of transformers 5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gsx_exporter.checkpoint.json_file import one_line, read_json
from gsx_exporter.checkpoint.names import CONFIG, GENERATION_CONFIG
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError

READ = ("eos_token_id", "bos_token_id", "pad_token_id")

# Settings by which greedy decoding in transformers gives other tokens than the most probable ones, or ends a text
# elsewhere, with the value that changes nothing (besides null and an empty list).
NOT_APPLIED: Mapping[str, Any] = {
    # Logits processors, in the order of `_get_logits_processor`.
    "guidance_scale": 1,
    "sequence_bias": None,
    "encoder_repetition_penalty": 1,  # of a decoder-only model, the prompt takes the encoder's place
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "watermarking_config": None,
    # Other ways to decode.
    "num_beams": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    # Other prompts, other ends.
    "token_healing": False,
    "stop_strings": None,
    "is_assistant": False,
}
# These act only if there is an end token that they could delay.
_DELAY_THE_END = ("min_length", "min_new_tokens")

SAMPLES = "do_sample"
# What `do_sample` reads.
SAMPLING = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "num_return_sequences",
)

# How long a text may become. gsx has options of its own for it.
LIMITS = ("max_length", "max_new_tokens", "max_time")

# K and V rounded to a few bits; the other kinds of cache hold them as they are.
CACHE = "cache_implementation"
_ROUNDING_CACHE = "quantized"

# What changes no token of greedy decoding.
NO_EFFECT = (
    # Only with beams.
    "early_stopping",
    "length_penalty",
    "num_beam_groups",
    "diversity_penalty",
    "low_memory",
    # Monotonic, or only for logits that are not finite.
    "renormalize_logits",
    "remove_invalid_values",
    # Guesses that the model verifies.
    "use_mtp",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "assistant_early_exit",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",  # needs an assistant model, which no file names
    "speculation_type",
    # How it is computed.
    "use_cache",
    "cache_config",
    "max_cache_len",
    "prefill_chunk_size",
    "compile_config",
    "disable_compile",
    "continuous_batching_config",
    # What `generate` returns.
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    # Of encoder-decoder models.
    "decoder_start_token_id",
    # Where the settings come from.
    "_from_model_config",
    "transformers_version",
)

# A note shows no more of a value than this.
_VALUE_LETTERS = 40


@dataclass(frozen=True)
class TextEnds:
    """The tokens that begin, end and pad a text.

    Args:
        eos_ids: tokens that end a text, in the order of the file; those that the vocabulary lacks are left out.
        bos_id: the token that a text begins with; None without one.
        pad_id: the token that fills up rows of a batch; None without one.
        notes: what else the file asks for and gsx does not do, each a sentence for the user.
    """

    eos_ids: tuple[int, ...]
    bos_id: int | None
    pad_id: int | None
    notes: tuple[str, ...]

    def of(self, config: ModelConfig) -> ModelConfig:
        """The configuration with these tokens."""
        return replace(config, eos_ids=self.eos_ids, bos_id=self.bos_id, pad_id=self.pad_id)


def read_text_ends(directory: Path, values: Mapping[str, Any], config: ModelConfig) -> TextEnds:
    """What the files of a model directory say about beginning and end of a text.

    Args:
        directory: where `generation_config.json` may be.
        values: what `config.json` says of the model.
        config: of the model; its own ids are not read.
    Raises:
        CheckpointError: the file that decides is damaged, transformers refuses it, or its ids are none.
    """
    file = file_of_text_ends(directory)
    path = directory / file
    raw = dict(values) if file == CONFIG else _json(path)
    loaded = _loaded(path, raw)
    named = _ids(path, "eos_token_id", loaded.eos_token_id)
    pad = _one_id(path, "pad_token_id", loaded.pad_token_id)
    if loaded.eos_token_id == [] and pad is None:
        raise CheckpointError(
            f"{path}: eos_token_id is an empty list, which transformers cannot generate with",
            expected="an id, a list of ids, or null",
            todo="name the tokens that end a text",
        )
    vocabulary = range(config.vocab_size)
    ends = tuple(dict.fromkeys(token for token in named if token in vocabulary))
    begin = _one_id(path, "bos_token_id", loaded.bos_token_id)
    notes = [
        *_notes_on_ends(values, file, ends, [token for token in named if token not in vocabulary], vocabulary),
        *_notes_on_settings(file, raw, loaded, ends, config.max_positions),
    ]
    return TextEnds(
        eos_ids=ends,
        bos_id=begin if begin in vocabulary else None,
        pad_id=pad if pad in vocabulary else None,
        notes=tuple(notes),
    )


def file_of_text_ends(directory: Path) -> str:
    """The name of the file that says where a text begins and ends."""
    return GENERATION_CONFIG if (directory / GENERATION_CONFIG).is_file() else CONFIG


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, f"correct it, or remove it: {CONFIG} then says where a text ends")


def _loaded(path: Path, raw: dict[str, Any]) -> Any:
    """The file as transformers understands it."""
    from transformers import GenerationConfig

    try:
        with quiet_transformers():
            return GenerationConfig.from_model_config(raw) if path.name == CONFIG else GenerationConfig.from_dict(raw)
    except Exception as error:  # transformers raises many types of error here, all about this one file
        raise CheckpointError(f"{path}: transformers cannot read it", found=one_line(error)) from error


def _ids(path: Path, key: str, value: Any) -> list[int]:
    """The ids of a value, which may be one, a list, or null. Like transformers, 2.0 is taken for 2, and true for 1."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    for one in values:
        whole = isinstance(one, int) or (isinstance(one, float) and one.is_integer())
        if not whole or not -(2**63) <= one < 2**63:
            raise CheckpointError(
                f"{path}: {key} is not a token id",
                expected="a whole number, a list of them, or null",
                found=_shown(one),
            )
    return [int(one) for one in values]


def _one_id(path: Path, key: str, value: Any) -> int | None:
    ids = _ids(path, key, value)
    if len(ids) > 1:
        raise CheckpointError(f"{path}: {key} is not a token id", expected="a single one", found=_shown(value))
    return ids[0] if ids else None


def _notes_on_ends(
    values: Mapping[str, Any], file: str, ends: Sequence[int], unknown: Sequence[int], vocabulary: Sequence[int]
) -> list[str]:
    notes = []
    if unknown:
        tokens = ", ".join(map(str, unknown))
        notes.append(
            f"{file} names ends of a text that are not in the vocabulary of {len(vocabulary)} tokens ({tokens}): "
            "no text ends there"
        )
    if not ends:
        other = values.get("eos_token_id") if file != CONFIG else None
        but = f"; that of {CONFIG} ({_shown(other)}) does not count beside it" if other is not None else ""
        notes.append(f"{file} names no token that ends a text{but}: a text ends at its limit, as in transformers")
    return notes


def _notes_on_settings(
    file: str, raw: Mapping[str, Any], loaded: Any, ends: Sequence[int], max_positions: int
) -> list[str]:
    """What `generate` would do and gsx does not."""

    def listed(names: Sequence[str]) -> str:
        return ", ".join(f"{name} {_shown(raw.get(name, getattr(loaded, name)))}" for name in names)

    notes = []
    other = [name for name, neutral in NOT_APPLIED.items() if not _is_neutral(getattr(loaded, name, None), neutral)]
    if not ends:
        other = [name for name in other if name not in _DELAY_THE_END]
    if getattr(loaded, CACHE, None) == _ROUNDING_CACHE:
        other.append(CACHE)
    if other:
        notes.append(
            f"{file} sets {listed(other)}, which gsx does not apply: its tokens can differ from those of "
            "model.generate(), though the logits are equal"
        )
    if getattr(loaded, SAMPLES, None) is True:
        how = [name for name in SAMPLING if getattr(loaded, name, None) is not None]
        by = f" ({listed(how)})" if how else ""
        notes.append(f"{file} asks for sampling{by}: gsx takes the most probable token, unless you give a temperature")
    limits = [name for name in LIMITS if getattr(loaded, name, None) is not None]
    if not _is_shorter(loaded.max_length, max_positions):
        limits = [name for name in limits if name != "max_length"]
    if limits:
        notes.append(f"{file} limits texts ({listed(limits)}): gsx has an option of its own for it, --max-new-tokens")
    return notes


def _is_neutral(value: Any, neutral: Any) -> bool:
    return value is None or value == neutral or (isinstance(value, list | dict) and not value)


def _is_shorter(limit: Any, context: int) -> bool:
    return not isinstance(limit, int | float) or math.isnan(limit) or limit < context


def _shown(value: Any) -> str:
    """A value of a JSON file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _VALUE_LETTERS else text[: _VALUE_LETTERS - 3] + "..."
