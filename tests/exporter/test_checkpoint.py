"""Checkpoints as people have them on disk: read as transformers reads them, or refused in words.

What gsx reads is compared through the traceable decoder, run eagerly; what is right is what transformers'
`from_pretrained` gives for the same directory.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.errors import CheckpointError
from gsx_exporter.quantization.smoothing import smooth
from gsx_exporter.quantization.statistics import Statistics
from gsx_exporter.reference.model import Reference
from tests.tiny import tiny_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Longer than the windows and the original contexts of these tests.
IDS = np.random.default_rng(0).integers(3, 90, (2, 24))
Change = Callable[[Path], Any]


def logits(model: Path) -> torch.Tensor:
    """Logits of IDS as gsx reads the checkpoint."""
    walk = Walk(open_checkpoint(model), IDS, DecoderOptions(None, "compute", torch.float32))
    with torch.no_grad():
        stream = walk.stream({})
        for number, layer in walk.layers():
            walk.through(number, layer, stream)
        return torch.cat([found for _, found in walk.logits(stream)])


def expected(model: Path) -> torch.Tensor:
    """The same by transformers."""
    with quiet_transformers(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        return loaded.eval()(torch.from_numpy(IDS)).logits


def same(found: torch.Tensor, want: torch.Tensor) -> bool:
    """Within float32 rounding: logits are of order 10, a wrong tensor or field changes them by more than 0.1."""
    return torch.allclose(found, want, atol=2e-4, rtol=2e-4)


def config(**keys: Any) -> Change:
    """Set keys of config.json."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def without(*keys: str) -> Change:
    """Remove keys of config.json."""

    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))

    return change


def weights(edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    """Store other tensors."""

    def change(model: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in edit(load_file(model / WEIGHTS)).items()}
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return change


def together(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def sharded(model: Path) -> dict[str, str]:
    """Store the weights in two files with an index; returns its weight map."""
    tensors = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    return write_shards(model, tensors)


def write_index(model: Path, weight_map: Any) -> None:
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_shards(model: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    names = sorted(tensors)
    weight_map = {}
    for part, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{part:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    write_index(model, weight_map)
    return weight_map


def stale_shards(model: Path) -> None:
    """An earlier save in shards, left beside a newer one in a single file."""
    old = {name: tensor + 0.5 for name, tensor in load_file(model / WEIGHTS).items()}
    write_shards(model, old)


def index_forgets(model: Path) -> None:
    weight_map = sharded(model)
    del weight_map["model.norm.weight"]
    write_index(model, weight_map)


def index_promises(model: Path) -> None:
    weight_map = sharded(model)
    weight_map["model.layers.0.self_attn.rotary_emb.inv_freq"] = "model-00001-of-00002.safetensors"
    write_index(model, weight_map)


def other_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, HEAD: tensors[EMBEDDING].flip(0)}


def hub_snapshot(model: Path) -> None:
    """As the hub's cache stores a model: links into a folder of blobs, all read-only."""
    blobs = model.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        blob = blobs / f"{number:040x}"
        shutil.move(path, blob)
        blob.chmod(0o444)
        path.symlink_to(Path("../blobs") / blob.name)


def renamed(rename: Callable[[str], str]) -> Change:
    return weights(lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def legacy_rope(scaling: dict[str, Any] | None) -> Change:
    """RoPE as transformers 4 spelled it."""
    return together(without("rope_parameters"), config(rope_theta=5000.0, rope_scaling=scaling))


YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FORMS: dict[str, tuple[str, dict[str, Any], Change]] = {
    "one file": ("llama", {}, lambda model: None),
    "shards": ("llama", {}, sharded),
    "an old index without its shards": (
        "llama",
        {},
        lambda m: (stale_shards(m), [p.unlink() for p in m.glob("model-*")]),
    ),
    "an old index with its shards": ("llama", {}, stale_shards),
    "an index that forgets a tensor": ("llama", {}, index_forgets),
    "an index that promises one more": ("llama", {}, index_promises),
    "links into the hub's cache": ("llama", {}, hub_snapshot),
    "another file name": (
        "llama",
        {},
        together(
            lambda m: (m / WEIGHTS).rename(m / "mine.safetensors"), config(transformers_weights="mine.safetensors")
        ),
    ),
    "tied": ("qwen3", {"tied": True}, lambda model: None),
    "tied, both tables, different": ("llama", {"tied": True}, weights(other_head)),
    "tied, both tables, equal": ("llama", {"tied": True}, weights(lambda t: {**t, HEAD: t[EMBEDDING]})),
    "tied, the head only": (
        "llama",
        {"tied": True},
        renamed(lambda name: HEAD if name == EMBEDDING else name),
    ),
    "tied in shards, both different": ("qwen2", {"tied": True}, together(weights(other_head), sharded)),
    "names without model.": ("qwen3", {"tied": True}, renamed(lambda name: name.removeprefix("model."))),
    "names with another model.": ("mistral", {}, renamed(lambda name: f"model.{name}")),
    "more layers than the configuration": ("llama", {"layers": 4}, config(num_hidden_layers=2)),
    "biases that the configuration denies": (
        "llama",
        {},
        weights(lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
    ),
    "a window on a Llama, wider than its context": ("llama", {}, config(sliding_window=4096)),
    "a window": ("mistral", {"sliding_window": 4}, lambda model: None),
    "no window": ("mistral", {}, config(sliding_window=None)),
    "a window that is off": (
        "qwen2",
        {},
        together(without("layer_types"), config(sliding_window=4, max_window_layers=0)),
    ),
    "a window that is on": (
        "qwen2",
        {},
        together(without("layer_types"), config(use_sliding_window=True, sliding_window=4, max_window_layers=1)),
    ),
    "swish": ("llama", {}, config(hidden_act="swish")),
    "squared ReLU": ("llama", {}, config(hidden_act="relu2")),
    "exits as Sorted LLaMA spells them": ("llama", {}, config(exit_layer_indices=[1])),
    "a share of the head that a Llama ignores": ("llama", {}, config(partial_rotary_factor=0.5)),
    "no kv heads": ("llama", {"kv_heads": 4}, config(num_key_value_heads=None)),
    "no head size": ("llama", {}, config(head_dim=None)),
    "code of its own": ("llama", {}, config(auto_map={"AutoModelForCausalLM": "evil.Model"})),
    "torch_dtype": ("llama", {}, together(without("dtype"), config(torch_dtype="float16"))),
    "rope_theta": ("llama", {}, legacy_rope(None)),
    "rope: linear": ("mistral", {}, legacy_rope({"type": "linear", "factor": 4.0})),
    "rope: dynamic": ("llama", {"max_position_embeddings": 16}, legacy_rope({"type": "dynamic", "factor": 4.0})),
    "rope: yarn": ("qwen2", {"max_position_embeddings": 16}, legacy_rope({"type": "yarn", **YARN})),
    "rope: yarn, bare": ("qwen3", {}, legacy_rope({"rope_type": "yarn", "factor": 4.0})),
    "rope: yarn without factor": (
        "llama",
        {"max_position_embeddings": 64},
        legacy_rope({"type": "yarn", **YARN, "factor": None}),
    ),
    "rope: llama3": ("llama", {}, legacy_rope({"rope_type": "llama3", **LLAMA3})),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    def build(family: str = "llama", keys: dict[str, Any] | None = None, change: Change = lambda model: None) -> Path:
        model = tiny_checkpoint(tmp_path / "model", family, **{"layers": 2, **(keys or {})})
        change(model)
        return model

    return build


@pytest.mark.parametrize("form", list(FORMS))
def test_read_as_transformers_reads_it(make: Callable[..., Path], form: str) -> None:
    model = make(*FORMS[form])
    assert same(logits(model), expected(model))


@pytest.mark.parametrize(
    ("keys", "exits"),
    [
        ({"exit_layer_indices": [2, 1]}, (1, 2)),
        ({"exit_layer_indices": None}, ()),
        ({"exit_layer_indices": [1], "gsx": {"exits": [2]}}, (2,)),
        ({"exit_layer_indices": [1], "exit_decoder_layer": False, "exit_mlp": False}, (1,)),
    ],
)
def test_exits_may_be_spelled_as_sorted_llama_does(
    make: Callable[..., Path], keys: dict[str, Any], exits: tuple[int, ...]
) -> None:
    assert open_checkpoint(make(change=config(**keys))).config.exits == exits


def test_quantizing_finds_tensors_of_other_names(make: Callable[..., Path]) -> None:
    model = make("qwen3", {"tied": True}, renamed(lambda name: name.removeprefix("model.")))
    checkpoint = open_checkpoint(model)
    smoothed, _ = smooth(checkpoint, Statistics({}, {}), alpha=0.0)
    assert smoothed.tensor(EMBEDDING).equal(checkpoint.tensor(EMBEDDING))


def test_the_reference_follows_transformers_not_gsx(make: Callable[..., Path]) -> None:
    """Parity would pass a mistake of gsx's reading if the reference made it too."""
    model = make("llama", {"tied": True}, weights(other_head))
    checkpoint = open_checkpoint(model)
    checkpoint.config = dataclasses.replace(checkpoint.config, tied_head=True)
    assert torch.equal(Reference.load(checkpoint)(torch.from_numpy(IDS)).logits, expected(model))


@pytest.mark.parametrize(
    ("change", "note"),
    [(weights(other_head), "two different ones are stored"), (config(auto_map={"AutoModel": "x.Y"}), "never run")],
)
def test_what_is_unusual_is_noted(make: Callable[..., Path], change: Change, note: str) -> None:
    found = open_checkpoint(make("llama", {"tied": True}, change)).notes
    assert any(note in line for line in found), found


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 32),
        ({"type": "linear", "factor": 4.0}, 128),
        ({"type": "dynamic", "factor": 4.0}, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4}, 32),
        ({"type": "yarn", "factor": 4.0}, 128),
        ({"rope_type": "llama3", **LLAMA3}, 128),
    ],
)
def test_scaling_extends_the_context(make: Callable[..., Path], scaling: dict[str, Any] | None, positions: int) -> None:
    model = make("qwen2", {"max_position_embeddings": 32}, legacy_rope(scaling))
    assert open_checkpoint(model).config.max_positions == positions


def test_a_balcony_without_its_exits(tmp_path: Path) -> None:
    """What its refusal says: the whole model is a Llama, and the tensors of its exits are not read."""
    model = tiny_checkpoint(tmp_path / "model", layers=2)
    exit_layer = {
        name.replace("layers.1", "exit_modules.0.0"): tensor.clone()
        for name, tensor in load_file(model / WEIGHTS).items()
        if ".layers.1." in name
    }
    plain = logits(model)
    weights(lambda t: {**t, **exit_layer, "model.exit_modules.0.1.weight": torch.ones(64)})(model)
    assert same(logits(model), plain)


def listing_only(*names: str) -> Change:
    """Leave empty files of these names only."""

    def change(model: Path) -> None:
        shutil.rmtree(model)
        model.mkdir()
        for name in names:
            (model / name).write_text("{}")

    return change


REFUSED: dict[str, tuple[Change, list[str]]] = {
    "an adapter inside": (
        renamed(lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight")),
        ["LoRA weights that are not merged", "base_layer.weight"],
    ),
    "exits with layers of their own": (
        config(exit_layer_indices=[1], exit_decoder_layer=True),
        ["layers of their own (exit_decoder_layer)", "exit_layer_indices [1]", "remove exit_layer_indices"],
    ),
    "exits with norms of their own": (
        together(
            config(exit_layer_indices=[1]),
            weights(lambda t: {**t, "model.exit_modules.0.0.weight": torch.ones(64)}),
        ),
        ["norms or layers of their own", "1 such tensors, model.exit_modules.0.0.weight first"],
    ),
    "exits outside of the model": (
        config(exit_layer_indices=[1, 9]),
        ["exit_layer_indices names a depth that the model does not have", "1 to 2", "9"],
    ),
    "Balcony": (
        config(model_type="nested_llama", exit_layer_indices=[1], exit_decoder_layer=True),
        [
            "'nested_llama' is not supported",
            "norms or layers of their own (Balcony) (exit_decoder_layer)",
            "set model_type to llama and remove exit_layer_indices, exit_decoder_layer",
        ],
    ),
    "GenAI": (listing_only("genai_config.json", "model.onnx"), ["is a model of ONNX Runtime GenAI"]),
    "Mistral's own layout": (
        listing_only("params.json", "consolidated.safetensors"),
        ["original layout of Meta or Mistral"],
    ),
    "the hub's folder": (
        lambda m: (hub_snapshot(m), (m.parent / "snapshots").mkdir(), m.rename(m.parent / "snapshots" / "abc")),
        ["no such directory"],
    ),
    "pickles": (lambda m: (m / WEIGHTS).rename(m / "pytorch_model.bin"), ["only pickled weights"]),
    "safetensors of another name": (
        lambda m: (m / WEIGHTS).rename(m / "weights.safetensors"),
        ["neither of the names", "weights.safetensors"],
    ),
    "MLX": (config(quantization={"bits": 4, "group_size": 64}), ["already quantized", "an MLX model"]),
    "GPTQ": (lambda m: (m / "quantize_config.json").write_text("{}"), ["already quantized", "GPTQ"]),
    "packed weights": (
        renamed(lambda name: name.replace("q_proj.weight", "q_proj.qweight")),
        ["already quantized", "q_proj.qweight", "GPTQ or AWQ"],
    ),
    "FP8": (
        weights(lambda t: {n: x.to(torch.float8_e4m3fn) if "proj" in n else x for n, x in t.items()}),
        ["already quantized", "F8_E4M3"],
    ),
    "a missing shard": (
        lambda m: (sharded(m), (m / "model-00002-of-00002.safetensors").unlink()),
        ["a shard of the weights is missing", "model-00002-of-00002.safetensors"],
    ),
    "an index outside": (
        lambda m: (
            sharded(m),
            write_index(m, {"a": "../a.safetensors"}),
        ),
        ["outside the model directory"],
    ),
    "a file name that is none": (config(transformers_weights=[5]), ["transformers_weights", "names no file", "[5]"]),
    "a file outside": (config(transformers_weights="../model/model.safetensors"), ["names no file in this directory"]),
    "an index of lists": (
        lambda m: (sharded(m), write_index(m, [1])),
        ["not a safetensors index"],
    ),
    "a tensor in two shards": (
        lambda m: (
            sharded(m),
            shutil.copy(m / "model-00001-of-00002.safetensors", m / "model-00003.safetensors"),
            write_index(m, {"a": "model-00001-of-00002.safetensors", "b": "model-00003.safetensors"}),
        ),
        ["two shards hold"],
    ),
    "two names of a tensor": (
        weights(lambda t: {**t, "norm.weight": t["model.norm.weight"]}),
        ["has two tensors for model.norm.weight"],
    ),
    "no head": (
        weights(lambda t: {n: x for n, x in t.items() if n != HEAD}),
        ["a tensor is missing", HEAD, "embedding model"],
    ),
    "another name": (
        renamed(lambda name: name.replace("q_proj", "query")),
        ["a tensor is missing", "does not know is model.layers.0.self_attn.query.weight"],
    ),
    "more layers than stored": (config(num_hidden_layers=10**9), ["num_hidden_layers is out of range", "10000"]),
    "three layers of two": (config(num_hidden_layers=3), ["more layers than the weights", "found 2 layers"]),
    "a window on a Llama": (
        config(sliding_window=4),
        ["cache forgets", "found 4 tokens", "sliding_window 4", "remove the key"],
    ),
    "chunks on a Llama": (
        config(attention_chunk_size=4),
        ["cache forgets", "found 4 tokens", "attention_chunk_size 4"],
    ),
    "both directions": (config(is_causal=False), ["both directions", "is_causal False"]),
    "an index without metadata": (
        lambda m: (weight_map := sharded(m), (m / INDEX).write_text(json.dumps({"weight_map": weight_map}))),
        ["has no metadata"],
    ),
    "another activation": (config(hidden_act="relu"), ["hidden_act", "gelu_pytorch_tanh", "'relu'"]),
    "RoPE without base": (
        together(without("rope_parameters"), config(rope_theta=None)),
        ["rope_theta", "finite number", "None"],
    ),
    "RoPE without factor": (legacy_rope({"type": "linear"}), ["factor"]),
    "RoPE of another kind": (legacy_rope({"type": "longrope", "factor": 2.0}), ["RoPE", "longrope"]),
    "a list where an id belongs": (
        config(pad_token_id=[2]),
        ["transformers cannot read it", "pad_token_id", "expected int"],
    ),
    "a word where a size belongs": (config(hidden_size="64"), ["transformers cannot read it", "hidden_size"]),
    "a pad token outside": (
        config(pad_token_id=97),
        ["pad_token_id is not in the vocabulary", "below 97", "set it to null"],
    ),
    "heads that do not divide": (config(num_key_value_heads=3), ["multiple of num_key_value_heads"]),
    "no model_type": (without("model_type"), ["has no model_type"]),
    "not an object": (lambda m: (m / "config.json").write_text("[1]"), ["is not a JSON object"]),
    "gates that are a word": (config(gsx={"gate": {"branches": "attn mlp"}}), ["gsx.gate.branches"]),
    "gates that are null": (config(gsx={"gate": {"branches": [None, {}]}}), ["gsx.gate.branches"]),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_in_words(make: Callable[..., Path], case: str) -> None:
    change, parts = REFUSED[case]
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(make("llama", {}, change))
    assert not [part for part in parts if part not in str(found.value)], str(found.value)


def test_the_hub_s_folder_names_its_snapshot(make: Callable[..., Path], tmp_path: Path) -> None:
    model = make()
    place = tmp_path / "models--org--name"
    (place / "snapshots").mkdir(parents=True)
    model.rename(place / "snapshots" / "abc")
    with pytest.raises(CheckpointError, match=r"keeps the model one level down\n.*snapshots/abc"):
        open_checkpoint(place)
