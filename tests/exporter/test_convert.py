"""`gsx convert`: files in the official layout, made from a tiny checkpoint, and everything that is refused."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import expected_tensors, is_gate
from gsx_exporter.convert import convert, write_safetensors
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.progress import Progress
from tests.tiny import tiny_checkpoint

State = dict[str, Any]
GATES = {
    "vector": GateConfig(),
    "scalar": GateConfig(kind="scalar"),
    "attn": GateConfig(branches=("attn",)),
    "mlp": GateConfig(branches=("mlp",)),
}


class Pair:
    """A gated checkpoint, its plain base, and the gated one as the official code stores it."""

    def __init__(self, path: Path, gate: GateConfig, **options: Any) -> None:
        options = {"hidden": 48, "layers": 3, **options}
        self.gated = tiny_checkpoint(path / "gated", gate=gate, seed=3, tokenizer=True, **options)
        self.base = tiny_checkpoint(path / "base", seed=4, tokenizer=True, **options)
        self.checkpoint = open_checkpoint(self.gated)
        self.tensors = {name: self.checkpoint.tensor(name) for name in self.checkpoint.names}

    def state(self) -> State:
        """The full state dict: wrapped branches, and one extra `model.` in front."""
        return {f"model.{self.official(name)}": tensor for name, tensor in self.tensors.items()}

    def official(self, name: str) -> str:
        parts = name.split(".")
        modules = {"attn_gate": "self_attn", "mlp_gate": "mlp"}
        if is_gate(name):
            return ".".join([*parts[:3], modules[parts[3]], "gate", "gate", parts[4]])
        gated = {modules[f"{b}_gate"] for b in self.checkpoint.config.gated_branches}
        if len(parts) > 4 and parts[3] in gated:
            return ".".join([*parts[:4], "module", *parts[4:]])
        return name

    def gates(self) -> State:
        """The file that has only gates."""
        found: State = {}
        for name, tensor in self.tensors.items():
            if is_gate(name):
                parts = name.split(".")
                key = f"{parts[3].removesuffix('_gate')}_{parts[2]}"
                found.setdefault(key, {})[f"gate.{parts[4]}"] = tensor
        return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"), GateConfig())


def save(tmp_path: Path, state: Any) -> Path:
    path = tmp_path / "gateskip_42.pt"
    torch.save(state, path)
    return path


def tensors_of(directory: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", list(GATES))
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": OrderedDict(s), "epoch": 1}])
def test_full_state_dict(tmp_path: Path, kind: str, wrap: Callable[[State], Any]) -> None:
    pair = Pair(tmp_path, GATES[kind])
    result = convert(save(tmp_path, wrap(pair.state())), tmp_path / "out", base=pair.base)
    assert result.layout == "full state dict"
    assert result.gate == GATES[kind]
    assert_equal(tensors_of(tmp_path / "out"), pair.tensors)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (pair.base / "tokenizer.json").read_bytes()
    section = json.loads((tmp_path / "out" / "config.json").read_text())["gsx"]
    assert section == {"method": "gateskip", "gate": GATES[kind].to_dict()}


@pytest.mark.parametrize("kind", list(GATES))
def test_only_gates(tmp_path: Path, kind: str) -> None:
    pair = Pair(tmp_path, GATES[kind])
    result = convert(save(tmp_path, pair.gates()), tmp_path / "out", base=pair.base)
    assert result.layout == "gates only"
    base = tensors_of(pair.base)
    assert_equal(tensors_of(tmp_path / "out"), {**base, **{n: t for n, t in pair.tensors.items() if is_gate(n)}})


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_other_families(tmp_path: Path, family: str) -> None:
    pair = Pair(tmp_path, GateConfig(), family=family)
    convert(save(tmp_path, pair.state()), tmp_path / "out", base=pair.base)
    assert_equal(tensors_of(tmp_path / "out"), pair.tensors)


def test_without_the_extra_prefix(tmp_path: Path, pair: Pair) -> None:
    state = {key.removeprefix("model."): tensor for key, tensor in pair.state().items()}
    convert(save(tmp_path, state), tmp_path / "out", base=pair.base)
    assert_equal(tensors_of(tmp_path / "out"), pair.tensors)


def test_legacy_file_format(tmp_path: Path, pair: Pair) -> None:
    path = tmp_path / "old.pt"
    torch.save(pair.state(), path, _use_new_zipfile_serialization=False)
    convert(path, tmp_path / "out", base=pair.base)
    assert_equal(tensors_of(tmp_path / "out"), pair.tensors)


def test_tied_head(tmp_path: Path) -> None:
    pair = Pair(tmp_path, GateConfig(), tied=True)
    state = pair.state()
    state["model.lm_head.weight"] = state["model.model.embed_tokens.weight"]
    result = convert(save(tmp_path, state), tmp_path / "out", base=pair.base)
    assert result.left_out == ("lm_head.weight",)
    assert_equal(tensors_of(tmp_path / "out"), pair.tensors)
    state["model.lm_head.weight"] = state["model.lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        convert(save(tmp_path, state), tmp_path / "other", base=pair.base)


def test_rope_tables_are_left_out(tmp_path: Path, pair: Pair) -> None:
    key = "model.model.layers.0.self_attn.module.rotary_emb.inv_freq"
    result = convert(save(tmp_path, {**pair.state(), key: torch.ones(6)}), tmp_path / "out", base=pair.base)
    assert result.left_out == (key,)


def test_one_gate_shared_by_all_layers(tmp_path: Path, pair: Pair) -> None:
    state = pair.state()
    for part in ("weight", "bias"):
        for module in ("self_attn", "mlp"):
            shared = state[f"model.model.layers.0.{module}.gate.gate.{part}"]
            for layer in range(3):
                state[f"model.model.layers.{layer}.{module}.gate.gate.{part}"] = shared
    convert(save(tmp_path, state), tmp_path / "out", base=pair.base)
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["model.layers.2.mlp_gate.weight"], pair.tensors["model.layers.0.mlp_gate.weight"])


def test_type_follows_the_file(tmp_path: Path, pair: Pair) -> None:
    state = {key: tensor.to(torch.bfloat16) for key, tensor in pair.state().items()}
    convert(save(tmp_path, state), tmp_path / "out", base=pair.base)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards(tmp_path: Path, pair: Pair) -> None:
    expected = expected_tensors(pair.checkpoint.config)
    sizes = {name: pair.tensors[name].numel() * 4 for name in expected}
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_bytes((pair.gated / "config.json").read_bytes())
    steps: list[Progress] = []
    write_safetensors(out, sizes, pair.tensors.__getitem__, shard_bytes=50_000, on_progress=steps.append)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert steps[-1] == Progress("writing weights", sum(sizes.values()), sum(sizes.values()), unit="bytes")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert_equal(tensors_of(out), pair.tensors)


class Anything:
    """An object that only real unpickling brings back."""


def _without(part: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if part not in key}


def _with(key: str, value: Any) -> Callable[[State], State]:
    return lambda state: {**state, key: value}


LAYER = "model.model.layers.1."
REFUSED: dict[str, tuple[Callable[[State], Any], str]] = {
    "two-layer gates": (
        lambda s: {k.replace(".gate.gate.", ".gate.gate.0."): t for k, t in s.items()},
        "two-layer gates",
    ),
    "LoRA": (lambda s: {f"base_model.model.{k}": t for k, t in s.items()}, "LoRA"),
    "LoRA parts": (_with(LAYER + "self_attn.module.q_proj.lora_A.weight", torch.ones(2)), "LoRA"),
    "unknown key": (
        _with("model.model.extra.weight", torch.ones(2)),
        "a llama model with 3 layers",
    ),
    "more layers": (_with("model.model.layers.3.input_layernorm.weight", torch.ones(48)), "layers.3"),
    "missing layer": (_without(".layers.2."), "the model is incomplete"),
    "missing gate": (_without("layers.1.mlp.gate."), "gates are incomplete"),
    "missing gate bias": (_without("layers.1.mlp.gate.gate.bias"), "mlp_gate.bias"),
    "gate of unknown name": (_with(LAYER + "mlp.gate.scale", torch.ones(1)), "unknown name"),
    "no gates": (_without(".gate.gate."), "has no gates"),
    "wrong gate shape": (
        _with("model.model.layers.0.self_attn.gate.gate.weight", torch.ones(2, 48)),
        r"\[48, 48\] \(vector\) or \[1, 48\] \(scalar\), found \[2, 48\]",
    ),
    "wrong shape later": (_with(LAYER + "mlp.gate.gate.weight", torch.ones(1, 48)), "wrong shape"),
    "wrong weight shape": (
        _with(LAYER + "mlp.module.gate_proj.weight", torch.ones(3, 48)),
        "gate_proj.weight",
    ),
    "NaN gate": (_with(LAYER + "mlp.gate.gate.bias", torch.full((48,), torch.nan)), "NaN"),
    "NaN weight": (_with("model.model.norm.weight", torch.full((48,), torch.inf)), "NaN or infinity"),
    "integers": (_with("model.model.norm.weight", torch.ones(48, dtype=torch.int64)), "expected floats"),
    "not a tensor": (_with("model.model.norm.weight", 3.0), "is not a tensor"),
    "twice": (_with(LAYER + "mlp.up_proj.weight", torch.ones(112, 48)), "two tensors for"),
    "empty": (lambda s: {}, "is not a state dict"),
    "a list": (lambda s: list(s.values()), "is not a state dict"),
    "real unpickling": (_with("optimizer", Anything()), "unpickling it would run code"),
    "gates not dicts": (lambda s: {"attn_0": torch.ones(2)}, "attn_0 is not a gate"),
    "two-layer gates alone": (lambda s: {"attn_0": {"gate.0.weight": torch.ones(96, 48)}}, "two-layer gates"),
    "gates of one layer": (
        lambda s: {"attn_0": {"gate.weight": torch.ones(48, 48), "gate.bias": torch.ones(48)}},
        "gates are incomplete",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused(tmp_path: Path, pair: Pair, case: str) -> None:
    change, message = REFUSED[case]
    path = save(tmp_path, change(pair.state()))
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "out", base=pair.base)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_files_that_are_not_torch_files(tmp_path: Path, pair: Pair) -> None:
    whole = save(tmp_path, pair.state())
    cases = {
        "no.pt": (None, "no such file"),
        "empty.pt": (b"", "not a torch file"),
        "text.pt": (b"hello world", "not a torch file"),
        "cut.pt": (whole.read_bytes()[: whole.stat().st_size // 2], "is truncated"),
        "garbage.pt": (b"\x80\x02garbage", "not a complete torch file"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / name, tmp_path / "out", base=pair.base)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no weights"):
        convert(tmp_path / "empty", tmp_path / "out", base=pair.base)
    assert not (tmp_path / "out").exists()


def test_base_and_output(tmp_path: Path, pair: Pair) -> None:
    path = save(tmp_path, pair.state())
    with pytest.raises(UsageError, match="already has gates"):
        convert(path, tmp_path / "out", base=pair.gated)
    with pytest.raises(CheckpointError, match="no such directory"):
        convert(path, tmp_path / "out", base=tmp_path / "nowhere")
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("mine")
    with pytest.raises(GsxError, match="exists and is not empty"):
        convert(path, used, base=pair.base)
    assert [entry.name for entry in used.iterdir()] == ["mine.txt"]
