"""`gsx convert` on public layouts of routers: files made from a tiny checkpoint as the released code saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import rule_module_kind
from gsx_exporter.convert import convert
from gsx_exporter.errors import CheckpointError
from gsx_exporter.router_config import RouterConfig
from tests.exporter.test_routers import METHODS
from tests.tiny import tiny_checkpoint

LAYERS = 3
State = dict[str, Any]


def tensors_of(directory: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def routed(path: Path, name: str) -> dict[str, Tensor]:
    """The expected result: a checkpoint with a method's routers."""
    return tensors_of(tiny_checkpoint(path, layers=LAYERS, router=METHODS[name], tokenizer=True, seed=6))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "base", layers=LAYERS, tokenizer=True, seed=7)


def as_skipgpt(tensors: dict[str, Tensor]) -> State:
    """`torch.save(model.state_dict())` of SkipGPT: layers wrapped in `block`, routers beside it."""
    found: State = {}
    names = {"attn_router": "router_attention", "mlp_router": "router_mlp"}
    inner = {"hidden": "hidden_layer", "out": "weight_predictor"}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if rule_module_kind(name):
            parts = [*parts[:3], names[parts[3]], inner[parts[4]], parts[5]]
        elif parts[1] == "layers":
            parts.insert(3, "block")
        found[".".join(parts)] = tensor
    return found


def test_skipgpt(tmp_path: Path, base: Path) -> None:
    expected = routed(tmp_path / "routed", "skipgpt")
    torch.save({**as_skipgpt(expected), "model.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.pth")
    result = convert(tmp_path / "model.pth", tmp_path / "out", base=base)
    assert result.layout == "SkipGPT state dict"
    assert result.router == METHODS["skipgpt"]
    assert result.left_out == ("model.rotary_emb.inv_freq",)
    found = tensors_of(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    section = json.loads((tmp_path / "out" / "config.json").read_text())["gsx"]
    assert section == {"method": "skipgpt", "router": METHODS["skipgpt"].to_dict()}


def as_dllm(tensors: dict[str, Tensor], rank: int = 2, heads: tuple[int, int] = (4, 2)) -> tuple[State, State]:
    """D-LLM's file (routers, LoRA weights, the optimizer's state), and what is added to Q, K and V in its order."""
    inner = {"hidden": "linear_1", "norm": "norm", "out": "linear_2"}
    state: State = {}
    for name, tensor in tensors.items():
        if rule_module_kind(name):
            _, _, layer, _, module, kind = name.split(".")
            state[f"layers.{layer}.router.{inner[module]}.{kind}"] = tensor
    rng = torch.Generator().manual_seed(1)
    added: State = {}
    for layer in range(LAYERS):
        for which, count in (("q", heads[0]), ("k", heads[1]), ("v", heads[1])):
            a, b = torch.randn(rank, 64, generator=rng), torch.randn(count * 16, rank, generator=rng)
            state[f"layers.{layer}.attention.lora_{which}.linear_A.weight"] = a
            state[f"layers.{layer}.attention.lora_{which}.linear_B.weight"] = b
            added[f"model.layers.{layer}.self_attn.{which}_proj.weight"] = b @ a
    return {"epoch": 9, "model": state, "optimizer": {"state": {}, "param_groups": []}, "scaler": {"scale": 1.0}}, added


def test_dllm(tmp_path: Path, base: Path) -> None:
    expected = routed(tmp_path / "routed", "d-llm")
    file, added = as_dllm(expected)
    torch.save(file, tmp_path / "checkpoint-9.pth")
    result = convert(tmp_path / "checkpoint-9.pth", tmp_path / "out", base=base)
    assert result.layout == "D-LLM file of routers"
    assert result.router == METHODS["d-llm"]
    found, plain = tensors_of(tmp_path / "out"), tensors_of(base)
    for name, tensor in found.items():
        if rule_module_kind(name):
            assert torch.equal(tensor, expected[name])
        elif name in added:
            delta = added[name]
            if "v_proj" not in name:
                # Channel 2j of a head is at j, channel 2j + 1 at j + D/2: one half rotates with the other.
                head = torch.arange(16).view(8, 2).T.reshape(-1)
                rows = torch.cat([head + 16 * n for n in range(len(delta) // 16)])
                delta = delta[rows]
            torch.testing.assert_close(tensor, plain[name] + delta)
        else:
            assert torch.equal(tensor, plain[name])


def as_flexidepth(tensors: dict[str, Tensor]) -> tuple[State, dict[int, Tensor]]:
    """FlexiDepth's released names, and what its two last router layers amount to."""
    names = {
        "router.hidden": "router.router_enc",
        "router.norm": "router.router_norm",
        "mlp_adapter.gate_proj": "router_proj.gate_proj",
        "mlp_adapter.up_proj": "router_proj.down_proj",
        "mlp_adapter.down_proj": "router_proj.up_proj",
    }
    rng = torch.Generator().manual_seed(2)
    state, heads = {}, {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        if name.endswith("router.out.weight"):
            dec, head = torch.randn(64, 8, generator=rng), torch.randn(1, 64, generator=rng)
            state[f"model.layers.{parts[2]}.router.router_dec.weight"] = dec
            state[f"model.layers.{parts[2]}.router.router_head.weight"] = head
            heads[int(parts[2])] = head @ dec
        elif rule_module_kind(name):
            state[".".join([*parts[:3], names[".".join(parts[3:5])], parts[5]])] = tensor
        else:
            state[name] = tensor
    return state, heads


@pytest.mark.parametrize("whole", [True, False])
def test_flexidepth(tmp_path: Path, base: Path, whole: bool) -> None:
    expected = routed(tmp_path / "routed", "flexidepth")
    state, heads = as_flexidepth(expected)
    source = tmp_path / "source"
    source.mkdir()
    kept = {name: tensor for name, tensor in state.items() if whole or "router" in name}
    save_file(kept, source / "model.safetensors")
    result = convert(source if whole else source / "model.safetensors", tmp_path / "out", base=base)
    assert result.router == METHODS["flexidepth"]
    found, plain = tensors_of(tmp_path / "out"), tensors_of(base)
    for name, tensor in found.items():
        if name.endswith("router.out.weight"):
            torch.testing.assert_close(tensor, heads[int(name.split(".")[2])])
        else:
            assert torch.equal(tensor, expected[name] if whole or rule_module_kind(name) else plain[name]), name


def without(pattern: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if pattern not in key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("layers.1.router_mlp.weight_predictor.bias"), "(?s)routers are incomplete.*mlp_router.out.bias"),
        (without("layers.2.block.mlp.up_proj"), "(?s)the model is incomplete.*up_proj"),
        (lambda s: {**s, "model.layers.0.router_mlp.extra.weight": torch.ones(2)}, "has 1 tensors that a llama"),
        (
            lambda s: {**s, "model.layers.0.router_mlp.hidden_layer.weight": torch.ones(7, 64)},
            "has the wrong shape",
        ),
        (lambda s: {**s, "model.layers.0.block.self_attn.q_proj.lora_A.weight": torch.ones(2)}, "is a LoRA checkpoint"),
        (lambda s: {**s, "model.layers.0.router_mlp.hidden_layer.bias": 3}, "not a tensor of floats"),
        (
            lambda s: {f"model.layers.1.router.weight_predictor.{k}": torch.ones(1) for k in ("weight", "bias")},
            "whole state is multiplied",
        ),
    ],
)
def test_refused(tmp_path: Path, base: Path, change: Callable[[State], State], message: str) -> None:
    state = change(as_skipgpt(routed(tmp_path / "routed", "skipgpt")))
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "model.pth", tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_dllm_without_half_of_a_lora_weight(tmp_path: Path, base: Path) -> None:
    file, _ = as_dllm(routed(tmp_path / "routed", "d-llm"))
    del file["model"]["layers.1.attention.lora_k.linear_B.weight"]
    torch.save(file, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"(?s)half of a LoRA weight.*lora_k.linear_B"):
        convert(tmp_path / "checkpoint.pth", tmp_path / "out", base=base)


def test_entries_of_the_layouts_are_those_of_the_page() -> None:
    """docs/routers.md shows each method's section as `gsx convert` writes it."""
    page = Path("docs/routers.md").read_text(encoding="utf-8")
    blocks = [json.loads("{" + part.split("```")[0] + "}") for part in page.split("```json\n")[1:]]
    found = [RouterConfig.from_dict(block["router"], 32) for block in blocks]
    assert {router.output for router in found} == {"logit", "softmax", "difference", "sigmoid"}
