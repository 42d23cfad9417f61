"""Changes to the files of a checkpoint that people make, tools make, or a bad download makes; each a line of words.

`candidates` is every change that the tables below describe; `drawn` is a seeded choice of them, for a suite of bounded
time.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import BASES, CHAT_TOKENS, PLAIN_TOKEN

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
JSON_FILES = (CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, INDEX)

Json = dict[str, Any]
Change = Callable[[Path], Any]


@dataclass(frozen=True)
class Mutation:
    """One change.

    Args:
        base: the checkpoint that it changes, a key of `tests.checkpoints.BASES`.
        file: the file that it changes.
        line: what it does.
        change: does it, given the directory.
    """

    base: str
    file: str
    line: str
    change: Change

    def __str__(self) -> str:
        return f"{self.base}, {self.file}: {self.line}"


# How many of each file the suite draws: most of config.json, which has most fields, and those of the computation.
SHARES = {
    CONFIG: 70,
    GENERATION: 28,
    TOKENIZER: 26,
    TOKENIZER_CONFIG: 28,
    SPECIAL_TOKENS: 9,
    ADDED_TOKENS: 9,
    INDEX: 14,
    WEIGHTS: 16,
}


def drawn(*, seed: int) -> list[Mutation]:
    """A choice of the candidates, by `SHARES`."""
    rng = random.Random(seed)
    every = list(candidates())
    return [
        one
        for file, number in SHARES.items()
        for one in rng.sample([candidate for candidate in every if candidate.file == file], number)
    ]


def candidates() -> Iterator[Mutation]:
    """Every mutation of the tables, each once."""
    for base in BASES:
        for file in JSON_FILES:
            for line, change in _of_file(file):
                yield Mutation(base, file, line, _at(file, change))
                if file in (SPECIAL_TOKENS, ADDED_TOKENS):  # read only where tokenizer_config.json has no such list
                    yield Mutation(
                        base, file, f"{line}, and no added_tokens_decoder", _both(_no_decoder, _at(file, change))
                    )
        for line, change in SHARDS.items():
            yield Mutation(base, WEIGHTS, line, change)


def _of_file(file: str) -> Iterator[tuple[str, Change]]:
    """The mutations of one JSON file; a change is given the file's path."""
    for field, odd in FIELDS.get(file, {}).items():
        for line, values in _of_field(field):
            yield line, partial(edit, change=values)
        yield from _with_values(field, odd)
    for field, odd in MORE.get(file, {}).items():
        yield from _with_values(field, odd)
    for line, rewrite in REWRITES[file].items():
        yield line, partial(edit, change=rewrite)
    for name, keys in FOREIGN.get(file, {}).items():
        yield f"keys of {name}", partial(edit, change=partial(_merge, keys=keys))
    yield from DAMAGE.items()


def _at(file: str, change: Change) -> Change:
    return lambda path: change(path / file)


def _both(first: Change, second: Change) -> Change:
    return lambda path: (first(path), second(path))


def _merge(values: Json, keys: Json) -> None:
    values.update(keys)


def _no_decoder(path: Path) -> None:
    """Added tokens as older tools leave them: in a file of their own, and not in the tokenizer's."""
    edit(path / TOKENIZER_CONFIG, lambda values: values.pop("added_tokens_decoder"))
    edit(path / TOKENIZER, lambda values: values.update(added_tokens=values["added_tokens"][:1]))


def edit(path: Path, change: Callable[[Json], Any]) -> None:
    """Change a JSON file in place."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _of_field(field: str) -> Iterator[tuple[str, Callable[[Json], Any]]]:
    """A field is removed, null, of another type."""
    yield f"{field} is removed", lambda values: values.pop(field, None)
    yield f"{field} is null", lambda values: values.update({field: None})
    yield f"{field} is of another type", lambda values: values.update({field: _of_another_type(values.get(field))})


def _with_values(field: str, odd: Sequence[Any]) -> Iterator[tuple[str, Change]]:
    for value in odd:
        line = f"{field} is {json.dumps(value)}"
        yield line if len(line) < 90 else f"{line[:87]}...", partial(edit, change=partial(_merge, keys={field: value}))


def _of_another_type(value: Any) -> Any:
    match value:
        case bool():
            return "yes"
        case int() | float():
            return str(value)
        case str():
            return 5
        case dict():
            return list(value)
        case list():
            return {"a": 1}
        case _:
            return [[]]


# Fields, and values that are out of range or only unusual. Those that a checkpoint has are also removed, made null, and
# given another type; of the others (`MORE`), only the values are set.
FIELDS: dict[str, dict[str, Sequence[Any]]] = {
    CONFIG: {
        "vocab_size": (100, 4096, 0, -1),
        "hidden_size": (33, 64, 0),
        "intermediate_size": (47, 0),
        "num_hidden_layers": (1, 3, 0, -1, 2.0, 2.5),
        "num_attention_heads": (2, 3, 8, 0),
        "num_key_value_heads": (1, 3, 4, 0),
        "head_dim": (7, 16, 0),
        "hidden_act": ("gelu", "swish", "SiLU", ""),
        "max_position_embeddings": (1, 8, 0, -1, 2**40),
        "rms_norm_eps": (1e-5, 0.0, -1.0, 1, "1e-06"),
        "rope_parameters": (
            {},
            {"rope_type": "default"},
            {"rope_theta": 500000.0},
            {"rope_theta": 0.0, "rope_type": "default"},
            {"rope_theta": 1e4, "rope_type": "yarn"},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 0.5},
            {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {"rope_theta": 1e4, "rope_type": "nonsense", "factor": 2.0},
            {"rope_theta": None, "rope_type": "default"},
        ),
        "attention_dropout": (0.5, 2.0),
        "tie_word_embeddings": (True, False, 1),
        "bos_token_id": (0, 5, -1, 99999, [1], True),
        "eos_token_id": (7, [2, 7], [], -1, 99999, [2, 99999], 2.0, True),
        "initializer_range": (-1.0,),
        "use_cache": (False,),
        "model_type": ("Llama", "llama", "mistral", "qwen2", "gpt2", "nonsense", ""),
        "architectures": (["LlamaModel"], ["Nonsense"], [], "LlamaForCausalLM", ["LlamaForSequenceClassification"]),
        "dtype": ("float16", "bfloat16", "float8", "torch.float32"),
        "transformers_version": ("4.30.0", "99.0"),
    },
    GENERATION: {
        "eos_token_id": (7, [2, 7], [7], [], -1, 99999, [2, 99999], 2.0, True, [[2]]),
        "bos_token_id": (0, 5, -1, 99999, [1]),
        "use_cache": (False,),
        "transformers_version": ("4.30.0",),
    },
    TOKENIZER: {
        "version": ("2.0", "0.9"),
        "added_tokens": ([], [{"id": 0}], [{"id": 5, "content": "x"}]),
        "normalizer": (
            {"type": "Lowercase"},
            {"type": "NFC"},
            {"type": "Nonsense"},
            {"type": "Sequence", "normalizers": []},
        ),
        "pre_tokenizer": (
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "Whitespace"},
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
            {"type": "Nonsense"},
        ),
        "post_processor": (
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "the", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"the": {"id": "the", "ids": [9], "tokens": ["the"]}},
            },
            {"type": "Nonsense"},
        ),
        "decoder": (
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
            {"type": "Fuse"},
            {"type": "Nonsense"},
        ),
        "truncation": (
            {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
            {"direction": "Left", "max_length": 3, "strategy": "OnlyFirst", "stride": 1},
            {"max_length": 4},
        ),
        "padding": (
            {
                "strategy": {"Fixed": 16},
                "direction": "Left",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<unk>",
            },
            {
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": 8,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<unk>",
            },
        ),
        "model": ({}, {"type": "BPE"}, {"type": "BPE", "vocab": {}, "merges": []}, {"type": "Nonsense"}),
    },
    TOKENIZER_CONFIG: {
        "tokenizer_class": (
            "LlamaTokenizer",
            "LlamaTokenizerFast",
            "Qwen2Tokenizer",
            "GPT2Tokenizer",
            "TokenizersBackend",
            "GemmaTokenizerFast",
            "BertTokenizer",
            "Nonsense",
        ),
        "added_tokens_decoder": ({}, {"x": {"content": "a"}}, {"5": "a"}, {"99999": {"content": "<far>"}}),
        "bos_token": ("the", "<new>", {"content": "<s>", "__type": "AddedToken"}),
        "eos_token": ("the", "<new>", {"content": "<new>", "special": True}),
        "additional_special_tokens": (["<new>"], ["the"], [5], ["<think>"]),
        "clean_up_tokenization_spaces": (True,),
        "model_max_length": (2, 1e30, -1),
    },
    SPECIAL_TOKENS: {
        "bos_token": ("the", "<new>", {"content": "<new>"}),
        "eos_token": ("the", "<new>", {"content": "the", "lstrip": True}),
    },
    INDEX: {
        "metadata": ({}, {"total_size": 0}, {"total_size": "many"}),
        "weight_map": ({}, {"model.norm.weight": "model-00001-of-00002.safetensors"}),
    },
}

# Fields that they do not all have.
MORE: dict[str, dict[str, Sequence[Any]]] = {
    CONFIG: {
        "rope_scaling": ({"type": "linear", "factor": 2.0}, {"rope_type": "default"}, {"factor": 2.0}, "linear"),
        "rope_theta": (1e6, 0, -1),
        "attention_bias": (True, None),
        "mlp_bias": (True, None),
        "pad_token_id": (None, 5, -1, 99999, [0], "0"),
        "sliding_window": (None, 4, 0, -1, 10**6),
        "torch_dtype": ("float16", "nonsense"),
        "gsx": ({}, {"gate": None}),
    },
    GENERATION: {
        "pad_token_id": (5, -1, 99999),
        "do_sample": (True,),
        "temperature": (0.6, 0, -1.0),
        "top_k": (50, -1),
        "top_p": (0.9, 2.0),
        "repetition_penalty": (1.3, 1.0, 0, -1.0),
        "no_repeat_ngram_size": (1, 2),
        "max_length": (5, 0),
        "max_new_tokens": (3, 0),
        "min_length": (40,),
        "min_new_tokens": (9,),
        "num_beams": (2, 0),
        "num_return_sequences": (2,),
        "suppress_tokens": ([7], [], [2]),
        "begin_suppress_tokens": ([7],),
        "bad_words_ids": ([[7]], []),
        "forced_eos_token_id": (2,),
        "forced_bos_token_id": (5,),
        "stop_strings": (["a"], "e"),
        "penalty_alpha": (0.6,),
        "renormalize_logits": (True,),
        "return_dict_in_generate": (True,),
        "cache_implementation": ("static", "nonsense"),
        "exponential_decay_length_penalty": ([2, 1.5],),
        "sequence_bias": ([[[7], -10.0]],),
        "guidance_scale": (1.5,),
    },
    TOKENIZER_CONFIG: {
        "pad_token": ("<pad>", ""),
        "unk_token": ("the", "<new>"),
        "extra_special_tokens": (["<new>"], {"image_token": "<image>"}),
        "add_bos_token": (True, False),
        "add_eos_token": (True, False),
        "add_prefix_space": (True, False),
        "legacy": (True, False),
        "padding_side": ("left", "nowhere"),
        "truncation_side": ("left",),
        "split_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "chat_template": ("{{ messages }}", "{% nonsense"),
        "auto_map": ({"AutoTokenizer": ["tokenization_x.X", None]},),
        "model_input_names": (["input_ids"], "input_ids"),
        "backend": ("tokenizers", "nonsense"),
        "name_or_path": ("org/name",),
    },
    SPECIAL_TOKENS: {
        "pad_token": ("<pad>",),
        "unk_token": ("<unk>",),
        "additional_special_tokens": (["the"], ["<new>", "<newer>"], "the"),
        "nonsense_token": ("x",),
    },
    ADDED_TOKENS: {
        "<new>": (9, 99999, -1, "9"),
        "the": (7,),
        "</s>": (7,),
        PLAIN_TOKEN: (9,),
        CHAT_TOKENS[0]: (9,),
    },
}


def _renamed(old: str, new: str) -> Callable[[Json], Any]:
    def change(values: Json) -> None:
        if old in values:
            values[new] = values.pop(old)

    return change


def _old_rope(values: Json) -> None:
    """The spelling of transformers 4."""
    rope = values.pop("rope_parameters", {})
    values["rope_theta"], values["rope_scaling"] = rope.get("rope_theta", 1e4), None


def _both_ropes(values: Json) -> None:
    values |= {"rope_theta": 77.0, "rope_scaling": None}


def _old_scaling(kind: str, **more: Any) -> Callable[[Json], Any]:
    def change(values: Json) -> None:
        _old_rope(values)
        values["rope_scaling"] = {kind: "linear", "factor": 2.0, **more}

    return change


def _added(change: Callable[[list[Json]], Any]) -> Callable[[Json], Any]:
    return lambda values: change(values["added_tokens"])


def _flag(name: str, value: bool) -> Callable[[Json], Any]:
    return _added(lambda tokens: [token.update({name: value}) for token in tokens])


def _of_map(change: Callable[[dict[str, str]], Any]) -> Callable[[Json], Any]:
    return lambda values: change(values["weight_map"])


def _other_names(rename: Callable[[str], str]) -> Callable[[Json], Any]:
    def change(values: Json) -> None:
        values["weight_map"] = {rename(name): file for name, file in values["weight_map"].items()}

    return change


def _listed_decoder(values: Json) -> None:
    tokens = values.pop("added_tokens_decoder")
    values["added_tokens_decoder"] = [{"id": int(number), **token} for number, token in tokens.items()]


def _swap_ids(values: Json) -> None:
    """Two tokens of the vocabulary change places."""
    vocab = values["model"]["vocab"]
    first, second = [name for name in vocab if len(name) == 1 and name.islower()][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _same_id(values: Json) -> None:
    """Two tokens of the vocabulary have one id."""
    vocab = values["model"]["vocab"]
    first, second = [name for name in vocab if len(name) == 1 and name.islower()][:2]
    vocab[first] = vocab[second]


def _old_merges(values: Json) -> None:
    """Merges as lines, the spelling of tokenizers before 0.20."""
    merges = values["model"]["merges"]
    values["model"]["merges"] = [one if isinstance(one, str) else " ".join(one) for one in merges]


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# Changes of more than one field: spellings, repetitions, parts of one file that do not fit those of another.
REWRITES: dict[str, dict[str, Callable[[Json], Any]]] = {
    CONFIG: {
        "RoPE as transformers 4 spells it": _old_rope,
        "RoPE in both spellings, which differ": _both_ropes,
        "linear RoPE scaling, rope_type": _old_scaling("rope_type"),
        "linear RoPE scaling, type": _old_scaling("type"),
        "linear RoPE scaling, both types": _old_scaling("type", rope_type="linear"),
        "dtype is called torch_dtype": _renamed("dtype", "torch_dtype"),
        "num_key_value_heads is called n_kv_heads": _renamed("num_key_value_heads", "n_kv_heads"),
        "hidden_size is called n_embd": _renamed("hidden_size", "n_embd"),
        "num_hidden_layers is called n_layer": _renamed("num_hidden_layers", "n_layer"),
        "hidden_act is called hidden_activation": _renamed("hidden_act", "hidden_activation"),
        "rms_norm_eps is called layer_norm_epsilon": _renamed("rms_norm_eps", "layer_norm_epsilon"),
        "max_position_embeddings is called max_seq_len": _renamed("max_position_embeddings", "max_seq_len"),
        "rope_parameters is called rope_params": _renamed("rope_parameters", "rope_params"),
        "everything is below text_config": lambda v: v.update(text_config=dict(v)),
        # Not without the sizes: transformers would make a model of 7 billion parameters.
        "only the sizes are left": lambda v: [
            v.pop(key) for key in list(v) if key != "model_type" and key not in SIZES
        ],
        "unknown fields": lambda v: v.update(my_field=1, another={"a": [1]}, nothing=None),
        "rope_parameters per kind of layer": lambda v: v.update(
            rope_parameters={"full_attention": v["rope_parameters"], "sliding_attention": v["rope_parameters"]}
        ),
    },
    GENERATION: {
        "eos_token_id is called eos_token_ids": _renamed("eos_token_id", "eos_token_ids"),
        "end tokens twice": lambda v: v.update(eos_token_id=[v["eos_token_id"]] * 2),
        "a second end token first": lambda v: v.update(eos_token_id=[7, v["eos_token_id"]]),
        "unknown fields": lambda v: v.update(my_field=1, another={"a": [1]}),
        "sampling as Qwen ships it": lambda v: v.update(
            do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.05
        ),
        "sampling as Llama ships it": lambda v: v.update(do_sample=True, temperature=0.6, top_p=0.9),
        "nothing is left": lambda v: v.clear(),
    },
    TOKENIZER: {
        "merges as lines": _old_merges,
        "merges the other way round": lambda v: v["model"]["merges"].reverse(),
        "half of the merges": lambda v: v["model"].update(merges=v["model"]["merges"][::2]),
        "no merges": lambda v: v["model"].update(merges=[]),
        "a merge of an unknown token": lambda v: v["model"]["merges"].append(["\u6f22", "\u5b57"]),
        "two tokens change places": _swap_ids,
        "two tokens with one id": _same_id,
        "a token beyond the model": lambda v: v["model"]["vocab"].update({"q": 99999}),
        "a negative id": lambda v: v["model"]["vocab"].update({"q": -3}),
        "half of the vocabulary": lambda v: v["model"].update(vocab=dict(list(v["model"]["vocab"].items())[::2])),
        "added tokens are not special": _flag("special", False),
        "added tokens strip to the left": _flag("lstrip", True),
        "added tokens strip to the right": _flag("rstrip", True),
        "added tokens are normalized": _flag("normalized", True),
        "added tokens are single words": _flag("single_word", True),
        "added tokens twice": _added(lambda tokens: tokens.extend([dict(token) for token in tokens])),
        "an added token twice, with two ids": _added(lambda tokens: tokens.append({**tokens[0], "id": 9})),
        "two added tokens with one id": _added(lambda tokens: tokens.append({**tokens[-1], "content": "<other>"})),
        "added tokens the other way round": _added(lambda tokens: tokens.reverse()),
        "an added token without flags": _added(
            lambda tokens: tokens.append({"id": tokens[-1]["id"], "content": tokens[-1]["content"]})
        ),
        "an added token in the middle of the vocabulary": _added(
            lambda tokens: tokens.append({**tokens[-1], "id": 9, "content": "<middle>"})
        ),
        "an added token that is a word": _added(
            lambda tokens: tokens.append({**tokens[-1], "id": 9, "content": "class", "special": False})
        ),
        "byte_fallback is the other way": lambda v: v["model"].update(byte_fallback=not v["model"]["byte_fallback"]),
        "ignore_merges is the other way": lambda v: v["model"].update(ignore_merges=not v["model"]["ignore_merges"]),
        "dropout": lambda v: v["model"].update(dropout=0.5),
        "an unknown unk_token": lambda v: v["model"].update(unk_token="<nonsense>"),
        "a suffix of words": lambda v: v["model"].update(end_of_word_suffix="</w>"),
        "unknown fields": lambda v: v.update(my_field=1),
        "the type of the model is missing": lambda v: v["model"].pop("type"),
        "a word model": lambda v: v.update(
            model={"type": "WordLevel", "vocab": v["model"]["vocab"], "unk_token": "<unk>"}
        ),
    },
    TOKENIZER_CONFIG: {
        "added_tokens_decoder is a list": _listed_decoder,
        "added_tokens_decoder has one more": lambda v: v["added_tokens_decoder"].update(
            {"9": {"content": "<nine>", "special": True}}
        ),
        "added_tokens_decoder gives another id": lambda v: v["added_tokens_decoder"].update(
            {"9": dict(v["added_tokens_decoder"]["0"])}
        ),
        "added tokens are not special": lambda v: [t.update(special=False) for t in v["added_tokens_decoder"].values()],
        "added tokens strip": lambda v: [
            t.update(lstrip=True, rstrip=True) for t in v["added_tokens_decoder"].values()
        ],
        "added tokens are normalized": lambda v: [
            t.update(normalized=True) for t in v["added_tokens_decoder"].values()
        ],
        "unknown fields": lambda v: v.update(my_field=1, another={"a": [1]}),
        "nothing is left": lambda v: v.clear(),
    },
    SPECIAL_TOKENS: {
        "nothing is left": lambda v: v.clear(),
        "tokens as texts": lambda v: v.update({key: token["content"] for key, token in v.items()}),
        "tokens strip": lambda v: [token.update(lstrip=True, rstrip=True) for token in v.values()],
    },
    ADDED_TOKENS: {
        "nothing is left": lambda v: v.clear(),
        "ids are texts": lambda v: v.update({name: str(number) for name, number in v.items()}),
        "one id for all": lambda v: v.update(dict.fromkeys(v, 9)),
        "every id is one higher": lambda v: v.update({name: number + 1 for name, number in v.items()}),
    },
    INDEX: {
        "a tensor is forgotten": _of_map(lambda m: m.pop("model.norm.weight")),
        "the embedding is forgotten": _of_map(lambda m: m.pop("model.embed_tokens.weight")),
        "half of the tensors are forgotten": _of_map(lambda m: [m.pop(name) for name in sorted(m)[::2]]),
        "a tensor is promised": _of_map(
            lambda m: m.update({"model.layers.0.self_attn.rotary_emb.inv_freq": min(m.values())})
        ),
        "a third layer is promised": _of_map(
            lambda m: m.update({"model.layers.2.mlp.up_proj.weight": max(m.values())})
        ),
        "two files change places": _of_map(
            lambda m: m.update({n: max(m.values()) if f == min(m.values()) else min(m.values()) for n, f in m.items()})
        ),
        "all tensors in the first file": _of_map(lambda m: m.update(dict.fromkeys(m, min(m.values())))),
        "a file that is not there": _of_map(lambda m: m.update({"model.norm.weight": "model-00003.safetensors"})),
        "a file outside": _of_map(lambda m: m.update({"model.norm.weight": "../other.safetensors"})),
        "a file that is a number": _of_map(lambda m: m.update({"model.norm.weight": 5})),
        "a file that is null": _of_map(lambda m: m.update({"model.norm.weight": None})),
        "names without model.": _other_names(lambda name: name.removeprefix("model.")),
        "names with another prefix": _other_names(lambda name: f"base_model.model.{name}"),
        "unknown fields": lambda v: v.update(my_field=1),
    },
}

# Keys of other models' files, as they come on the hub.
FOREIGN: dict[str, dict[str, Json]] = {
    CONFIG: {
        "Qwen2": {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 1, "rope_theta": 1e6},
        "Qwen2 with its window on": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        "Qwen3": {"head_dim": 8, "layer_types": ["full_attention"] * 2, "use_sliding_window": False},
        "Qwen3 with windows": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4},
        "Mistral": {"sliding_window": 4096, "rope_theta": 1e6},
        "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
        "Gemma": {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
        "Gemma 2": {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "sliding_window": 4096},
        "Gemma 3": {"rope_local_base_freq": 10000.0, "sliding_window_pattern": 6},
        "Phi 3": {"original_max_position_embeddings": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
        "Phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
        "Granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
        "Llama 3.1": {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
        },
        "DeepSeek": {"ep_size": 1, "first_k_dense_replace": 0, "kv_lora_rank": 512, "n_routed_experts": None},
        "GPT-2": {"n_embd": 768, "n_head": 12, "n_layer": 12, "activation_function": "gelu_new"},
        "MLX": {"quantization": {"group_size": 64, "bits": 4}},
        "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        "AWQ": {"quantization_config": {"quant_method": "awq", "bits": 4, "zero_point": True}},
        "bitsandbytes": {"quantization_config": {"load_in_4bit": True, "quant_method": "bitsandbytes"}},
        "an empty quantization_config": {"quantization_config": {}},
        "FP8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        "remote code": {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM", "AutoConfig": "x.XConfig"}},
        "a classifier": {"id2label": {"0": "no", "1": "yes"}, "problem_type": "single_label_classification"},
        "a vision model": {"vision_config": {"hidden_size": 32}, "image_token_id": 7},
        "an adapter": {"peft_type": "LORA", "base_model_name_or_path": "org/name", "r": 8},
    },
    GENERATION: {
        "Whisper": {"suppress_tokens": [7, 9], "begin_suppress_tokens": [5], "forced_decoder_ids": [[1, 7]]},
        "Bart": {"decoder_start_token_id": 2, "forced_eos_token_id": 2, "num_beams": 4, "early_stopping": True},
        "Gemma 3": {"cache_implementation": "hybrid", "do_sample": True, "top_k": 64, "top_p": 0.95},
    },
    TOKENIZER_CONFIG: {
        "Llama 2": {"add_bos_token": True, "add_eos_token": False, "legacy": False, "sp_model_kwargs": {}},
        "Qwen2": {"add_prefix_space": False, "errors": "replace", "split_special_tokens": False},
        "Gemma": {"add_bos_token": True, "spaces_between_special_tokens": False, "use_default_system_prompt": False},
        "BERT": {"do_lower_case": True, "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    },
}


def _text(change: Callable[[str], str]) -> Change:
    return lambda path: path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def _twice(text: str) -> str:
    """Its first key again at the end, null."""
    key = next(iter(json.loads(text)))
    return text.rstrip().removesuffix("}") + f', "{key}": null}}'


# What can happen to any of the files.
DAMAGE: dict[str, Change] = {
    "the file is missing": lambda path: path.unlink(),
    "the file is empty": lambda path: path.write_bytes(b""),
    "the file is cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "an empty object": lambda path: path.write_text("{}"),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "a Git LFS pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
    ),
    "begins with a byte order mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    "is UTF-16": lambda path: path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16")),
    "the first key twice": _text(_twice),
    "Windows line ends": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    "is a directory": lambda path: (path.unlink(), path.mkdir()),
}


def _shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in _shards(path) for name, tensor in load_file(shard).items()}


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})


def _in_shards(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    """Change the tensors, and keep the index as it is."""

    def apply(path: Path) -> None:
        for shard in _shards(path):
            tensors = load_file(shard)
            change(tensors)
            _save(tensors, shard)

    return apply


def _one_file(change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None, *, keep: bool = False) -> Change:
    """All tensors in one file, changed; the shards and the index go, or are kept beside it."""

    def apply(path: Path) -> None:
        tensors = _tensors(path)
        change(tensors)
        _save(tensors, path / WEIGHTS)
        if not keep:
            for old in (path / INDEX, *_shards(path)):
                old.unlink()

    return apply


def _renamed_tensors(rename: Callable[[str], str]) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        new = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(new)

    return change


def _scaled(tensors: dict[str, torch.Tensor]) -> None:
    """Other weights: the second half of the embedding is turned around."""
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()


def _other_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(1).contiguous()


def _same_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def _only_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)} if name in tensors else {})


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name, None)


def _reshaped(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()} if name in tensors else {})


_UP = "model.layers.0.mlp.up_proj.weight"
_NORM = "model.norm.weight"

# Changes of the weights and their index.
SHARDS: dict[str, Change] = {
    "one file, no index": _one_file(),
    "one file of other weights beside the index": _one_file(_scaled, keep=True),
    "one file of other weights beside the index, whose shards are gone": lambda path: (
        _one_file(_scaled, keep=True)(path),
        [shard.unlink() for shard in _shards(path)],
    ),
    "names without model.": _one_file(_renamed_tensors(lambda name: name.removeprefix("model."))),
    "names with a module. in front": _one_file(_renamed_tensors(lambda name: f"module.{name}")),
    "names of a LoRA base layer": _one_file(
        _renamed_tensors(lambda name: name.replace("_proj.weight", "_proj.base_layer.weight"))
    ),
    "names of a compiled model": _one_file(_renamed_tensors(lambda name: f"_orig_mod.{name}")),
    "a second table as head": _one_file(_other_head),
    "the embedding again as head": _one_file(_same_head),
    "a head and no embedding": _one_file(_only_head),
    "no final norm": _one_file(_without(_NORM)),
    "no projection": _one_file(_without(_UP)),
    "an unknown tensor": _one_file(lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)})),
    "stored rotary frequencies": _one_file(
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    ),
    "a bias that the configuration has not": _one_file(
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    ),
    "a projection has a row less": _in_shards(_reshaped(_UP)),
    "the embedding has a row less": _in_shards(_reshaped("model.embed_tokens.weight")),
    "the norm has an element less": _in_shards(_reshaped(_NORM)),
    "a projection in whole numbers": _in_shards(_cast(_UP, torch.int8)),
    "a projection in 8-bit floats": _in_shards(_cast(_UP, torch.float8_e4m3fn)),
    "a projection in 64 bits": _in_shards(_cast(_UP, torch.float64)),
    "a projection in 16 bits": _in_shards(_cast(_UP, torch.bfloat16)),
    "a norm in 16 bits": _in_shards(_cast(_NORM, torch.float16)),
    "a projection of NaN": _in_shards(
        lambda tensors: tensors.update({_UP: tensors[_UP] * float("nan")} if _UP in tensors else {})
    ),
    "the first shard is missing": lambda path: _shards(path)[0].unlink(),
    "the last shard is missing": lambda path: _shards(path)[-1].unlink(),
    "the first shard is cut": lambda path: _shards(path)[0].write_bytes(_shards(path)[0].read_bytes()[:-100]),
    "the first shard is empty": lambda path: _shards(path)[0].write_bytes(b""),
    "the first shard is a Git LFS pointer": lambda path: _shards(path)[0].write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"
    ),
    "shards without metadata": lambda path: [save_file(load_file(shard), shard) for shard in _shards(path)],
    "a third shard that the index does not know": lambda path: _save(
        {_NORM: torch.ones(32)}, path / "model-00003-of-00003.safetensors"
    ),
    "the shards have other names": lambda path: [shard.rename(path / f"x{shard.name}") for shard in _shards(path)],
    "pickles instead": lambda path: [
        (torch.save(load_file(shard), shard.with_suffix(".bin")), shard.unlink()) for shard in _shards(path)
    ],
}
