"""Where a text ends, against transformers' own `generate`: the same tokens from the same two files, and a note wherever
`generate` would do more than choose the most probable token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from gsx_exporter.checkpoint.generation import (
    CACHE,
    LIMITS,
    NO_EFFECT,
    NOT_APPLIED,
    READ,
    SAMPLES,
    SAMPLING,
    TextEnds,
    read_text_ends,
)
from gsx_exporter.checkpoint.names import CONFIG, GENERATION_CONFIG
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError
from tests.tiny import tiny_checkpoint

VOCABULARY = 40
PROMPT = [5]
# Enough for every setting below to act.
NEW_TOKENS = 8

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A tiny model whose files can be rewritten."""

    path: Path
    config: Json

    def write(self, config: Json, generation: Json | str | None) -> None:
        """Write both files; `config` gives the ids of config.json, `generation` None: there is no such file."""
        plain = {name: value for name, value in self.config.items() if name not in READ}
        (self.path / CONFIG).write_text(json.dumps(plain | config))
        if generation is None:
            (self.path / GENERATION_CONFIG).unlink(missing_ok=True)
        else:
            text = generation if isinstance(generation, str) else json.dumps(generation)
            (self.path / GENERATION_CONFIG).write_text(text)

    def read(self) -> TextEnds:
        """What gsx understands."""
        checkpoint = open_checkpoint(self.path)
        return read_text_ends(self.path, checkpoint.config_values(), checkpoint.config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("ends") / "model"
    tiny_checkpoint(path, layers=1, hidden=16, heads=2, kv_heads=1, vocab=VOCABULARY, seed=3)
    return Model(path, json.loads((path / CONFIG).read_text()))


@pytest.fixture(scope="module")
def loaded(model: Model) -> Any:
    """The model in transformers, with files that ask for nothing."""
    model.write({}, {})
    return AutoModelForCausalLM.from_pretrained(model.path)


def ids_of_generate(model: Model) -> tuple[list[int], list[int], list[int]] | None:
    """End, beginning and padding ids that `generate` prepares; None if it refuses."""
    try:
        found = AutoModelForCausalLM.from_pretrained(model.path)
        prepared, _ = found._prepare_generation_config(None)
        found._prepare_special_tokens(prepared, device="cpu")
    except Exception:  # of many types
        return None
    tensors = prepared._eos_token_tensor, prepared._bos_token_tensor
    ends, begins = ([] if one is None else one.flatten().tolist() for one in tensors)
    padding = prepared.pad_token_id
    return ends, begins, [] if padding is None else [int(padding)]


def in_vocabulary(ids: list[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token for token in ids if 0 <= token < VOCABULARY))


def check(model: Model) -> None:
    """gsx understands the files as `generate` does, or refuses what `generate` refuses."""
    expected = ids_of_generate(model)
    if expected is None:
        with pytest.raises(CheckpointError):
            model.read()
        return
    ends = model.read()
    found = ends.eos_ids, ends.bos_id, ends.pad_id
    begin, padding = (next(iter(in_vocabulary(ids)), None) for ids in expected[1:])
    assert found == (in_vocabulary(expected[0]), begin, padding)
    config = open_checkpoint(model.path).config
    assert (config.eos_ids, config.bos_id, config.pad_id) == found


# Ids of config.json, and the other file.
FILES: dict[str, tuple[Json, Json | str | None]] = {
    "neither names one": ({}, None),
    "null": ({"eos_token_id": None}, None),
    "config.json alone": ({"eos_token_id": 3, "bos_token_id": 1, "pad_token_id": 0}, None),
    "config.json alone, a list": ({"eos_token_id": [3, 4]}, None),
    "the other file wins": ({"eos_token_id": 3}, {"eos_token_id": [2, 25]}),
    "the other file wins with fewer": ({"eos_token_id": [3, 4]}, {"eos_token_id": 2}),
    "the other file wins with none": ({"eos_token_id": [3, 4], "bos_token_id": 1}, {}),
    "the other file wins with null": ({"eos_token_id": 3}, {"eos_token_id": None}),
    "the other file alone": ({}, {"eos_token_id": 7, "bos_token_id": 0, "pad_token_id": 7}),
    "an empty list": ({"eos_token_id": 3}, {"eos_token_id": []}),
    "an empty list, and padding": ({"eos_token_id": 3}, {"eos_token_id": [], "pad_token_id": 0}),
    "twice": ({}, {"eos_token_id": [2, 2, 1, 2]}),
    "not in the vocabulary": ({}, {"eos_token_id": [2, VOCABULARY, 10**6], "bos_token_id": VOCABULARY}),
    "negative": ({}, {"eos_token_id": [-1, 2], "pad_token_id": -1, "bos_token_id": -1}),
    "numbers of other types": ({}, {"eos_token_id": [2.0, True], "bos_token_id": False}),
    "a text": ({}, {"eos_token_id": "</s>"}),
    "a text that is a number": ({}, {"eos_token_id": "2"}),
    "null in a list": ({}, {"eos_token_id": [2, None]}),
    "an object": ({}, {"eos_token_id": {}}),
    "beyond 64 bits": ({}, {"eos_token_id": 2**70}),
    "padding that is a text": ({}, {"eos_token_id": 2, "pad_token_id": "0"}),
    "beginning that is a text": ({}, {"bos_token_id": "<s>"}),
    "no object": ({"eos_token_id": 3}, "[]"),
    "a wrong value": ({"eos_token_id": 3}, {"early_stopping": "sometimes"}),
    "from a configuration": ({"eos_token_id": 3}, {"_from_model_config": True, "eos_token_id": 2}),
}


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_generate(model: Model, name: str) -> None:
    model.write(*FILES[name])
    check(model)


A_TOKEN = st.integers(-2, VOCABULARY + 2)
IDS = st.one_of(st.none(), A_TOKEN, st.lists(A_TOKEN, max_size=3))
ODD_IDS = st.one_of(
    st.booleans(), st.just(2.0), st.text("ab2", max_size=2), st.lists(st.none(), min_size=1, max_size=1)
)


def keys(values: st.SearchStrategy[Any], one: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({}, optional={"eos_token_id": values, "bos_token_id": one, "pad_token_id": one})


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys(IDS, st.none() | st.integers(0, VOCABULARY - 1)),
    st.none() | keys(IDS | ODD_IDS, st.none() | A_TOKEN),
)
def test_any_two_files(model: Model, config: Json, generation: Json | None) -> None:
    model.write(config, generation)
    check(model)


def test_generate_stops_there(model: Model) -> None:
    """Not only the prepared ids: the text that `generate` makes ends at the first token that gsx names."""
    model.write({}, {})
    ids = torch.tensor([PROMPT])
    free = AutoModelForCausalLM.from_pretrained(model.path).generate(ids, max_new_tokens=NEW_TOKENS)[0, 1:].tolist()
    model.write({"eos_token_id": free[5]}, {"eos_token_id": [free[3], free[2], VOCABULARY]})
    found = AutoModelForCausalLM.from_pretrained(model.path).generate(ids, max_new_tokens=NEW_TOKENS)[0, 1:].tolist()
    ends = model.read().eos_ids
    assert found == free[: 1 + min(free.index(token) for token in ends)]


# generation_config.json, and the message about it.
REFUSED: dict[str, tuple[Json | str, str]] = {
    "not JSON": ("{", r"generation_config.json: is not readable JSON\n.*found Expecting.*\n  correct it, or remove it"),
    "no object": ("[2]", r"generation_config.json: is not a JSON object\n  expected \{...\}, found \[2\]"),
    "a text": ({"eos_token_id": "</s>"}, r'eos_token_id is not a token id\n  expected a whole number.*found "</s>"'),
    "two beginnings": ({"bos_token_id": [1, 2]}, r"bos_token_id is not a token id\n  expected a single one"),
    "half a token": ({"eos_token_id": 1.5}, r"eos_token_id is not a token id\n.*found 1.5"),
    "lists in a list": ({"eos_token_id": [[2]]}, r"eos_token_id is not a token id\n.*found \[2\]"),
    "an empty list": ({"eos_token_id": []}, r"an empty list.*\n  expected an id, a list of ids, or null"),
    # The whole reason of transformers.
    "a value": ({"num_return_sequences": 2}, r"found ValueError: Greedy methods .*without beam.* \(got 2\)\."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(model: Model, name: str) -> None:
    generation, message = REFUSED[name]
    model.write({"eos_token_id": 3}, generation)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(model.path)


# Settings and the parts of the notes about them, for a vocabulary of 40 tokens and a context of 512.
NOTES: dict[str, tuple[Json, list[str]]] = {
    "what every model has": ({"do_sample": False, "temperature": 1.0, "top_k": 50, "repetition_penalty": 1.0}, []),
    "nulls and empty lists": ({"suppress_tokens": [], "bad_words_ids": None, "min_length": 0}, []),
    "what other programs read": ({"chat_format": "chatml", "max_window_size": 6144}, []),
    "as long as the context": ({"max_length": 512}, []),
    "one": (
        {"repetition_penalty": 1.05},
        ["generation_config.json sets repetition_penalty 1.05, which gsx does not apply: its tokens can differ"],
    ),
    "several": ({"no_repeat_ngram_size": 3, "num_beams": 4}, ["sets no_repeat_ngram_size 3, num_beams 4, which"]),
    "a long value": ({"bad_words_ids": [[n] for n in range(30)]}, ["sets bad_words_ids [[0], [1], [2]", "..., which"]),
    "a rounding cache": ({"cache_implementation": "quantized"}, ['cache_implementation "quantized", which']),
    "sampling": (
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        ["asks for sampling (temperature 0.6, top_p 0.9): gsx takes the most probable token, unless you give"],
    ),
    "shorter": ({"max_length": 20, "max_new_tokens": 9}, ["limits texts (max_length 20, max_new_tokens 9)"]),
    "an end beyond": (
        {"eos_token_id": [2, 151645]},
        ["names ends of a text that are not in the vocabulary of 40 tokens (151645): no text ends there"],
    ),
    "no end": (
        {"eos_token_id": None, "min_length": 5},  # there is no end to delay
        ["names no token that ends a text; that of config.json (3) does not count beside it: a text ends at its limit"],
    ),
}


@pytest.mark.parametrize("name", NOTES)
def test_notes(model: Model, name: str) -> None:
    generation, parts = NOTES[name]
    model.write({"eos_token_id": 3}, {"eos_token_id": 2, **generation})
    notes = open_checkpoint(model.path).notes
    assert len(notes) == (1 if parts else 0)
    assert all(part in notes[0] for part in parts)


def test_settings_in_config_json_count_without_the_other_file(model: Model) -> None:
    settings = {"eos_token_id": 3, "repetition_penalty": 1.3}
    model.write(settings, {"eos_token_id": 2})
    assert open_checkpoint(model.path).notes == []
    model.write(settings, None)
    (note,) = open_checkpoint(model.path).notes
    assert note.startswith("config.json sets repetition_penalty 1.3, which gsx does not apply")


GROUPS = {
    "read": READ,
    "not applied": (*NOT_APPLIED, CACHE),
    "sampling": (SAMPLES, *SAMPLING),
    "limits": LIMITS,
    "no effect": NO_EFFECT,
}


def test_every_setting_of_transformers_is_in_one_group() -> None:
    """If this fails with a new transformers: find out what the new setting does to greedy decoding, and add it."""
    ours = [name for names in GROUPS.values() for name in names]
    assert sorted(ours) == sorted(set(ours))
    assert set(vars(GenerationConfig())) - {"_original_object_hash"} == set(ours)


@dataclass(frozen=True)
class Acts:
    """A setting with a value that acts; other settings that it needs, and whether it needs the long prompt."""

    value: Any
    needs: Json | None = None
    long: bool = False


def acting(free: list[int]) -> dict[str, Acts]:
    """A value for every setting that changes tokens: `free` are those without it."""
    first = free[0]
    return {
        "guidance_scale": Acts(5.0, long=True),
        "sequence_bias": Acts([[[first], -100.0]]),
        "encoder_repetition_penalty": Acts(0.02, long=True),
        "repetition_penalty": Acts(5.0, long=True),
        "no_repeat_ngram_size": Acts(1, long=True),
        "encoder_no_repeat_ngram_size": Acts(1, long=True),
        "bad_words_ids": Acts([[first]]),
        "min_length": Acts(10, {"eos_token_id": free[2]}),
        "min_new_tokens": Acts(10, {"eos_token_id": free[2]}),
        "forced_bos_token_id": Acts((first + 1) % VOCABULARY),
        "forced_eos_token_id": Acts((free[-1] + 1) % VOCABULARY),
        "exponential_decay_length_penalty": Acts([1, 100.0], {"eos_token_id": (first + 1) % VOCABULARY}),
        "suppress_tokens": Acts([first]),
        "begin_suppress_tokens": Acts([first]),
        "watermarking_config": Acts({"bias": 100.0, "greenlist_ratio": 0.25}),
        "num_beams": Acts(4),
        "penalty_alpha": Acts(0.6, {"top_k": 4}),
        "dola_layers": Acts("low"),
        "constraints": Acts([1]),
        "force_words_ids": Acts([[[1]]]),
        "token_healing": Acts(True),
        "stop_strings": Acts(["a"]),
        "is_assistant": Acts(True),
    }


# Settings of no effect, with values that are not their defaults, in sets that go together.
IDLE: dict[str, Json] = {
    "of beams, of results, of caches": {
        "early_stopping": True,
        "length_penalty": 3.0,
        "num_beam_groups": 2,
        "diversity_penalty": 0.5,
        "low_memory": True,
        "renormalize_logits": True,
        "remove_invalid_values": True,
        "max_cache_len": 64,
        "prefill_chunk_size": 2,
        "disable_compile": True,
        "output_scores": True,
        "output_logits": True,
        "decoder_start_token_id": 1,
        "assistant_ensemble_weight": 0.5,
        "transformers_version": "4.0.0",
        "_from_model_config": True,
    },
    "of guesses": {
        "prompt_lookup_num_tokens": 3,
        "max_matching_ngram_size": 1,
        "num_assistant_tokens": 3,
        "num_assistant_tokens_schedule": "heuristic",
        "assistant_confidence_threshold": 0.9,
        "assistant_lookbehind": 2,
        "target_lookbehind": 2,
        "speculation_type": "any",
    },
    "without a cache": {"use_cache": False, "cache_config": {}},
    "of sampling": {
        "temperature": 0.3,
        "top_k": 2,
        "top_p": 0.3,
        "min_p": 0.5,
        "top_h": 0.5,
        "typical_p": 0.4,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
    },
}
# Without an example: they need what no file can give (a head for several tokens, objects), or `generate` returns
# something else than ids.
NO_EXAMPLE = {
    "use_mtp",
    "assistant_early_exit",
    "compile_config",
    "continuous_batching_config",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "num_return_sequences",
}


def greedy(model: Any, settings: Json, prompt: list[int]) -> list[int]:
    """Tokens that `generate` makes with these settings in its file."""
    model.generation_config = GenerationConfig.from_dict({"do_sample": False, **settings})
    tokens: list[int] = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS)[0, len(prompt) :].tolist()
    return tokens


@pytest.fixture(scope="module")
def prompts(loaded: Any) -> list[list[int]]:
    """A token, and a text that the model would go on to repeat."""
    short, long = PROMPT, [7, 12, 30]
    return [short, long + greedy(loaded, {}, long)]


@pytest.fixture(scope="module")
def plain(loaded: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The most probable tokens."""
    return [greedy(loaded, {}, prompt) for prompt in prompts]


# `generate` refuses them without a tokenizer, the scores of an assistant, or code from elsewhere.
REFUSING = {
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "token_healing",
    "stop_strings",
    "is_assistant",
}


@pytest.mark.parametrize("name", NOT_APPLIED)
@pytest.mark.filterwarnings("ignore")
def test_settings_that_are_not_applied_change_what_generate_does(
    model: Model, loaded: Any, prompts: list[list[int]], plain: list[list[int]], name: str
) -> None:
    """Other tokens, or a refusal, and a note."""
    acts = acting(plain[0])[name]
    needs = acts.needs or {}
    settings = {**needs, name: acts.value}
    if name in REFUSING:
        with pytest.raises((ValueError, TypeError)):
            greedy(loaded, settings, prompts[0])
    else:
        without = greedy(loaded, needs, prompts[acts.long]) if needs else plain[acts.long]
        assert greedy(loaded, settings, prompts[acts.long]) != without
    model.write({}, {"eos_token_id": 2, **settings})
    assert any(f"sets {name} " in note for note in open_checkpoint(model.path).notes)


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.filterwarnings("ignore")
def test_settings_of_no_effect_change_nothing(
    model: Model, loaded: Any, prompts: list[list[int]], plain: list[list[int]], name: str
) -> None:
    for prompt, expected in zip(prompts, plain, strict=True):
        assert greedy(loaded, IDLE[name], prompt) == expected
    model.write({}, {"eos_token_id": 2, **IDLE[name]})
    assert open_checkpoint(model.path).notes == []


def test_examples_are_complete() -> None:
    examples = [name for settings in IDLE.values() for name in settings]
    assert {*examples, *NO_EXAMPLE} == {*NO_EFFECT, *SAMPLING}
    assert set(acting(list(range(9)))) == set(NOT_APPLIED)
