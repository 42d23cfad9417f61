"""LoRA adapters as PEFT writes them: gsx's merged weights give what PEFT's own model gives, not merged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gsx.workflows.export import export
from gsx.workflows.inspect import inspect
from gsx.workflows.verify import verify
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.reference.model import Reference
from tests.exporter.test_checkpoint import HEAD, IDS, logits, same
from tests.tiny import tiny_checkpoint

peft = pytest.importorskip("peft", reason='pip install "gsx[dev]"')

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
Change = Callable[[Path], Any]


def make_adapter(base: Path, directory: Path, **settings: Any) -> torch.Tensor:
    """Train nothing, but give every weight of a new adapter a random value, and save it. Returns: logits of IDS."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    rng = torch.Generator().manual_seed(1)
    with quiet_transformers(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
        model = peft.get_peft_model(loaded, peft.LoraConfig(**options)).eval()
        for _, weight in sorted(model.named_parameters()):
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=rng)
        model.save_pretrained(str(directory))
        return model(input_ids=torch.from_numpy(IDS)).logits


# Name -> family, keys of the base, settings of the adapter.
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "two layers": ("llama", {}, {}),
    "all linear layers": ("qwen3", {}, {"target_modules": [*ATTENTION, *MLP]}),
    "all linear layers by word": ("mistral", {}, {"target_modules": "all-linear"}),
    "by a regular expression": ("llama", {}, {"target_modules": r".*\.1\.mlp\.(up|down)_proj"}),
    "some layers": ("llama", {}, {"layers_to_transform": [1]}),
    "over the root of the rank": ("llama", {}, {"use_rslora": True}),
    "ranks and alphas of their own": (
        "llama",
        {},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    ),
    "DoRA": ("llama", {}, {"use_dora": True, "target_modules": [*ATTENTION, *MLP]}),
    "stored in, out": ("llama", {}, {"fan_in_fan_out": True}),
    "biases": ("qwen2", {}, {"bias": "all"}),
    "biases of its layers": ("qwen2", {}, {"bias": "lora_only"}),
    "a bias of the second factor": ("qwen2", {}, {"lora_bias": True}),
    "the embedding": ("llama", {}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "the head": ("llama", {}, {"target_modules": ["lm_head", "q_proj"]}),
    "a tied embedding": ("llama", {"tied": True}, {"target_modules": ["embed_tokens", "q_proj"]}),
    "a tied head": ("llama", {"tied": True}, {"target_modules": ["lm_head", "q_proj"]}),
    "both tables whole": ("llama", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "both tied tables whole": ("llama", {"tied": True}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "a tied embedding whole": ("llama", {"tied": True}, {"modules_to_save": ["embed_tokens"]}),
    "a tied head whole": ("llama", {"tied": True}, {"modules_to_save": ["lm_head"]}),
    "tied and kept so": (
        "llama",
        {"tied": True},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "LoRA on tied tables, kept so": (
        "llama",
        {"tied": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "norms": ("llama", {}, {"modules_to_save": ["norm"]}),
    "over 16 bits": ("llama", {"dtype": torch.bfloat16}, {"target_modules": [*ATTENTION, *MLP]}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_merged_as_peft_computes_it(tmp_path: Path, kind: str) -> None:
    family, keys, settings = KINDS[kind]
    base = tiny_checkpoint(tmp_path / "base", family, layers=2, **keys)
    adapter = tmp_path / "adapter"
    want = make_adapter(base, adapter, **settings)
    assert same(logits(adapter), want)
    with torch.no_grad():
        assert same(Reference.load(open_checkpoint(adapter))(torch.from_numpy(IDS)).logits, want)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", layers=2, tokenizer=True)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    make_adapter(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(adapter: Path, **keys: Any) -> None:
    path = adapter / SETTINGS
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def write(adapter: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(adapter / WEIGHTS).items()}
        save_file({name: tensor.contiguous() for name, tensor in change(found).items()}, adapter / WEIGHTS)

    return write


def add_gates(adapter: Path) -> GateConfig:
    """Gates beside the adapter, as docs/checkpoints.md describes them: those of another checkpoint."""
    gate = GateConfig(kind="scalar")
    gated = load_file(tiny_checkpoint(adapter.parent / "gated", layers=2, gate=gate) / "model.safetensors")
    prefix = "base_model.model."
    tensors(lambda t: {**t, **{prefix + name: x for name, x in gated.items() if "_gate." in name}})(adapter)
    edit(adapter, gsx={"method": "gateskip", "gate": gate.to_dict()})
    return gate


def test_gates_beside_an_adapter(tmp_path: Path, adapter: Path, tiny_text: Path) -> None:
    """The reference of such a bundle is loaded by PEFT."""
    gate = add_gates(adapter)
    assert open_checkpoint(adapter).config.gate == gate
    bundle = export(adapter, tmp_path / "bundle", budget=0.6, calibration=tiny_text, calibration_tokens=512)
    assert json.loads((bundle.directory / "config.json").read_text())["gsx"]["gate"] == gate.to_dict()
    assert any("LoRA adapter is merged" in note for note in bundle.manifest.source.notes)
    assert verify(bundle.directory, tokens=256, greedy_tokens=8, budgets=[0.6]).passed


def test_without_an_adapter_of_its_own_the_base_s_gates_count(tmp_path: Path) -> None:
    base = tiny_checkpoint(tmp_path / "base", layers=2, gate=GateConfig())
    make_adapter(base, tmp_path / "adapter")
    assert open_checkpoint(tmp_path / "adapter").config.gate == GateConfig()


def test_text_is_read_by_the_adapter_s_files(base: Path, adapter: Path) -> None:
    assert open_checkpoint(adapter).config.eos_ids == (2,)
    (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter / name)
    found = json.loads((adapter / "tokenizer.json").read_text())
    found["added_tokens"].append({**found["added_tokens"][2], "id": 259, "content": "<|end|>"})
    (adapter / "tokenizer.json").write_text(json.dumps(found))
    checkpoint = open_checkpoint(adapter)
    assert checkpoint.config.eos_ids == (2, 5)
    assert load_tokenizer(checkpoint).token_to_id("<|end|>") is not None
    assert load_tokenizer(open_checkpoint(base)).token_to_id("<|end|>") is None
    ids = torch.tensor([[5]])
    assert bool(torch.isin(ids, Reference.load(checkpoint)._ends).all())


def test_inspect_shows_both(base: Path, adapter: Path) -> None:
    report = inspect(adapter)
    assert report.adapter is not None
    assert (report.adapter["base"], report.adapter["rank"]) == (str(base), 4)
    assert WEIGHTS in report.files


def test_another_scale_is_another_model(adapter: Path) -> None:
    before = open_checkpoint(adapter).weights_sha256()
    edit(adapter, lora_alpha=7)
    assert open_checkpoint(adapter).weights_sha256() != before


def test_a_recorded_hash_of_the_base(base: Path, adapter: Path) -> None:
    edit(adapter, gsx={"base_sha256": open_checkpoint(base).weights_sha256()})
    assert open_checkpoint(adapter).config.gate is None
    edit(adapter, gsx={"base_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match=r"trained on another base than[^\n]*\n *expected [^\n]* 0000"):
        open_checkpoint(adapter)


def other_base(**keys: Any) -> Change:
    """Give the adapter another model for its base."""

    def change(adapter: Path) -> None:
        edit(adapter, base_model_name_or_path=str(tiny_checkpoint(adapter.parent / "other", **keys)))

    return change


def without(part: str) -> Change:
    return tensors(lambda t: {name: x for name, x in t.items() if part not in name})


REFUSED: dict[str, tuple[Change, list[str]]] = {
    "another width": (other_base(hidden=32, layers=2), ["does not fit its base", "other", "lora_A.weight [4, 64]"]),
    "fewer layers": (other_base(layers=1), ["does not fit its base", "layers.1.self_attn.q_proj"]),
    "another rank": (lambda a: edit(a, r=8), ["does not fit its base", "[8, 64]", "at rank 8"]),
    "no base": (lambda a: edit(a, base_model_name_or_path=None), ["does not name the model"]),
    "a base that is gone": (
        lambda a: edit(a, base_model_name_or_path="/no/such/base"),
        ["the base of the adapter cannot be opened", "/no/such/base: no such directory"],
    ),
    "a base that is an adapter": (
        lambda a: edit(a, base_model_name_or_path=str(a)),
        ["is an adapter itself", "merge_and_unload"],
    ),
    "IA3": (lambda a: edit(a, peft_type="IA3"), ["another kind than LoRA", "'IA3'", "merge_and_unload"]),
    "a classifier": (lambda a: edit(a, task_type="SEQ_CLS"), ["task_type CAUSAL_LM", "'SEQ_CLS'"]),
    "PiSSA": (lambda a: edit(a, init_lora_weights="pissa"), ["what init_lora_weights made of it", "'pissa'"]),
    "a later option": (lambda a: edit(a, use_magic=True), ["an option that gsx does not merge", "use_magic True"]),
    "aLoRA": (lambda a: edit(a, alora_invocation_tokens=[1, 2]), ["alora_invocation_tokens [1, 2]"]),
    "a word where a number belongs": (lambda a: edit(a, lora_alpha="16"), ["lora_alpha is not a number", "'16'"]),
    "a pattern that is none": (lambda a: edit(a, rank_pattern={"(": 4}), ["rank_pattern has a damaged name", "'('"]),
    "a factor is missing": (
        without("layers.1.self_attn.q_proj.lora_B"),
        ["the adapter is incomplete", "A and B for model.layers.1.self_attn.q_proj", "no B"],
    ),
    "a layer is missing": (
        without("layers.1.self_attn.q_proj"),
        ["the adapter is incomplete", "model.layers.1.self_attn.q_proj, which target_modules names"],
    ),
    "DoRA without magnitudes": (lambda a: edit(a, use_dora=True), ["the adapter is incomplete", "no size"]),
    "a tensor of nobody": (
        tensors(lambda t: {**t, "base_model.model.model.layers.0.extra.weight": torch.ones(3)}),
        ["does not fit its base", "no tensor model.layers.0.extra.weight in the model"],
    ),
    "a longer table": (
        tensors(lambda t: {**t, f"base_model.model.{HEAD}": torch.zeros(300, 64)}),
        ["does not fit its base", "lm_head.weight [300, 64]"],
    ),
    "pickles": (
        lambda a: (a / WEIGHTS).rename(a / "adapter_model.bin"),
        ["the adapter has only pickled weights", "save it again"],
    ),
    "no weights": (lambda a: (a / WEIGHTS).unlink(), ["the adapter has no weights"]),
    "a damaged file": (lambda a: (a / WEIGHTS).write_bytes(b"12345678"), ["not a complete safetensors file"]),
    "a damaged configuration": (lambda a: (a / SETTINGS).write_text("{"), ["is not readable JSON"]),
    "gates without a section": (
        lambda a: (add_gates(a), edit(a, gsx=None)),
        ["does not fit its base", "no tensor model.layers.0.attn_gate.bias in the model"],
    ),
    "a section without gates": (
        lambda a: edit(a, gsx={"gate": {"kind": "scalar"}}),
        ["gates are incomplete", "model.layers.0.attn_gate.weight"],
    ),
    "a section that is a word": (lambda a: edit(a, gsx="gates"), ["gsx is not a section", "'gates'"]),
    "a whole model beside it": (
        lambda a: shutil.copy(a.parent / "base" / "model.safetensors", a),
        ["a whole model with an adapter beside it", "remove adapter_config.json"],
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_in_words(adapter: Path, case: str) -> None:
    change, parts = REFUSED[case]
    change(adapter)
    with pytest.raises(CheckpointError) as found:
        open_checkpoint(adapter)
    assert not [part for part in parts if part not in str(found.value)], str(found.value)
