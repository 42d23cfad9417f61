"""GGUF files are read as transformers reads them, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.llama import interleaved
from gsx.workflows.export import export
from gsx.workflows.inspect import inspect
from gsx.workflows.verify import verify
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import has_tokenizer, load_tokenizer
from gsx_exporter.errors import CheckpointError
from gsx_exporter.reference.model import Reference
from tests.exporter.test_checkpoint import IDS, logits, same
from tests.tiny import tiny_checkpoint

gguf = pytest.importorskip("gguf", reason='pip install "gsx[dev]"')


def write(model: Path, path: Path, kind: str, **more: Any) -> Path:
    """A checkpoint as one file. Args: kind: type of the matrices; more: keys of the file that are texts."""
    config = json.loads((model / "config.json").read_text())
    family, heads = config["model_type"], {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q"])
    writer.add_head_count_kv(heads["k"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    tokenizer = model / "tokenizer.json"
    writer.add_tokenizer_model("gpt2" if tokenizer.is_file() else "no_vocab")
    if tokenizer.is_file():
        stored = json.loads(tokenizer.read_text())["model"]
        vocabulary = stored["vocab"]
        writer.add_tokenizer_pre("default")
        writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
        writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
        writer.add_token_merges([" ".join(merge) for merge in stored["merges"]])
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), config["num_hidden_layers"])
    for name, tensor in load_file(model / "model.safetensors").items():
        stem, _, part = name.rpartition(".")
        value = tensor.float().numpy()
        if family == "llama" and stem[-6:] in ("q_proj", "k_proj"):  # as llama.cpp's converter does
            value = interleaved(value, heads[stem[-6]])
        form = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        writer.add_tensor(f"{names.get_name(stem)}.{part}", gguf.quantize(value, form), raw_dtype=form)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


# Family, keys of the model, type of the matrices, largest share that its rounding may change logits by.
FILES = [
    ("llama", {}, "F32", 1e-4),
    ("llama", {"tied": True}, "F16", 1e-2),
    ("qwen2", {}, "BF16", 5e-2),
    ("llama", {}, "Q8_0", 5e-2),
    ("qwen3", {"head_dim": 128}, "Q8_0", 5e-2),  # transformers takes this size for granted
    ("llama", {}, "Q4_0", 0.6),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file[0]} {file[2]}")
def test_read_as_transformers_reads_it(tmp_path: Path, file: tuple[str, dict[str, Any], str, float]) -> None:
    family, keys, kind, tolerance = file
    model = tiny_checkpoint(tmp_path / "model", family, layers=2, **{"intermediate_size": 160, **keys})
    path = write(model, tmp_path / "file.gguf", kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.tied_head is bool(keys.get("tied"))
    assert (checkpoint.config.eos_ids, checkpoint.config.bos_id) == ((2,), 1)
    for streamed in (False, True):
        assert same(logits(path), Reference.load(checkpoint, streamed=streamed)(torch.from_numpy(IDS)).logits)
    original = logits(model)
    assert float((logits(path) - original).norm() / original.norm()) < tolerance
    assert kind in next(note for note in checkpoint.notes if "GGUF" in note)


def test_a_bundle_of_a_gguf_file(tmp_path: Path) -> None:
    """With the tokenizer that is in the file; the directory is the model too, if it has only that file."""
    model = tiny_checkpoint(tmp_path / "model", layers=2, tokenizer=True, vocab=260, intermediate_size=160)
    stored = json.loads((model / "tokenizer.json").read_text())
    stored["model"]["vocab"]["ab"], stored["model"]["merges"] = 259, [["a", "b"]]
    (model / "tokenizer.json").write_text(json.dumps(stored))
    folder = tmp_path / "folder"
    folder.mkdir()
    path = write(model, folder / "file.gguf", "Q8_0")
    found, want = (load_tokenizer(open_checkpoint(one)) for one in (path, model))
    assert found.encode("abc ab").ids == want.encode("abc ab").ids
    bundle = export(folder, tmp_path / "bundle")
    assert json.loads((bundle.directory / "config.json").read_text())["model_type"] == "llama"
    assert verify(bundle.directory, tokens=256, greedy_tokens=8).passed
    sample = verify(bundle.directory, tokens=16, sample=True)
    assert sample.passed
    assert any("read as gsx reads them" in note for note in sample.notes)
    assert inspect(path).types == ("f32", "q8_0")
    assert inspect(folder).files == {"file.gguf": path.stat().st_size}


def test_without_a_vocabulary(tmp_path: Path) -> None:
    path = write(tiny_checkpoint(tmp_path / "model", layers=1), tmp_path / "file.gguf", "F32")
    assert not has_tokenizer(open_checkpoint(path))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(open_checkpoint(path))
    tiny_checkpoint(tmp_path / "other", layers=1, tokenizer=True)
    shutil.copy(tmp_path / "other" / "tokenizer.json", tmp_path)
    assert load_tokenizer(open_checkpoint(path)).get_vocab_size() == 259


def test_refused_in_words(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", layers=1)
    scaled = write(model, tmp_path / "scaled.gguf", "F32", llama__rope__scaling__type="yarn")
    with pytest.raises(CheckpointError, match=r"scaled rotary positions[\s\S]*llama.rope.scaling.type"):
        open_checkpoint(scaled)
    shutil.copy(scaled, tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"several GGUF files[\s\S]*a.gguf, scaled.gguf"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.gguf").write_bytes(scaled.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="transformers cannot read it"):
        open_checkpoint(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"no such format")
    with pytest.raises(CheckpointError, match="transformers cannot read it"):
        open_checkpoint(tmp_path / "a.gguf")
    assert np.isfinite(logits(model)).all()
