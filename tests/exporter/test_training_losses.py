"""Training: the loss of a method is that of the reference's decisions, schedules, and what gates learn from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.gate_config import GateConfig, GateInput, GateKind
from gsx_exporter.reference.model import Reference
from gsx_exporter.reference.rule import KeepAll
from gsx_exporter.rules.gateskip.reference import Rank
from gsx_exporter.training import schedule
from gsx_exporter.training.gated import is_constant
from gsx_exporter.training.learner import IGNORED, Learner
from gsx_exporter.training.model import load_subject
from gsx_exporter.training.muon import clip_attention
from gsx_exporter.training.reading import settings_of
from gsx_exporter.training.schedule import Plan, Schedule
from gsx_exporter.training.settings import ExitSettings, GateSettings, TrainSettings
from gsx_exporter.training.warm_start import predict_changes
from tests.tiny import EOS_ID, tiny_checkpoint

CLOSE = 1e-5  # float32 sums in another order


def settings(model: Path, **sections: Any) -> TrainSettings:
    given = {"model": str(model), "mode": "full", "gate": {"sparsity": 0.0}, **sections}
    return settings_of(given)


def learner(model: Path, **sections: Any) -> Learner:
    made = settings(model, **sections)
    return load_subject(open_checkpoint(model), made, seed=3).learner(made, steps=10, seed=3)


def plan(made: Learner, **changes: Any) -> None:
    """Fix the plan of the next pass."""
    values: dict[str, Any] = {"step": 0, "budget": 1.0, "exits": {}, "whole": 1.0, "dropout": 0.0}
    made._plan = Plan(**{**values, "straight_through": False, **changes})


def ids_of(rows: int, length: int = 25) -> torch.Tensor:
    """Different tokens: equal ones have equal scores in layer 0, and training skips all of the equal ones."""
    generator = torch.Generator().manual_seed(1)
    return torch.stack([EOS_ID + 1 + torch.randperm(256, generator=generator)[:length] for _ in range(rows)])


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "olmo2", "granite", "qwen3_moe", "phi3"])
@pytest.mark.parametrize(("kind", "gate_input"), [("vector", "post_norm"), ("scalar", "pre_norm")])
def test_losses_are_those_of_the_reference(tmp_path: Path, family: str, kind: GateKind, gate_input: GateInput) -> None:
    gate = GateConfig(kind=kind, input=gate_input)
    model = tiny_checkpoint(tmp_path, family, gate=gate, tokenizer=True, exits=(2,))
    made = learner(model, exits={"depths": [2]})
    ids = ids_of(3)
    ids[1, 4] = EOS_ID
    reference = Reference.load(open_checkpoint(model))
    for budget in (1.0, 0.8, 0.5):
        plan(made, budget=budget, exits={2: 0.25}, whole=0.75)
        found = made(input_ids=ids, labels=ids)["loss"].item()
        final, at_exit = torch.zeros(()), torch.zeros(())
        for row in ids.split(1):  # a row is a text of its own
            output = reference(row, rule=KeepAll() if budget == 1 else Rank(budget))
            final += cross_entropy(output.logits, row) / 3
            at_exit += cross_entropy(reference.exit_logits(output, 2), row) / 3
        assert found == pytest.approx(float(0.75 * final + 0.25 * at_exit), rel=CLOSE)


def test_batches_and_padding_change_nothing(tmp_path: Path) -> None:
    """The gradient of two rows together, one of them padded, is the sum of those of each alone."""
    made = learner(
        tiny_checkpoint(tmp_path, tokenizer=True),
        gate={"kind": "scalar", "sparsity": 0.5, "std": 0.5, "bias": 0.0},
        exits={"depths": [1], "dropout": 0.5},
    )
    ids, labels = ids_of(2), ids_of(2)
    labels[0, :9] = IGNORED
    labels[1, 15:] = IGNORED
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    items = int((labels[:, 1:] != IGNORED).sum())
    numbers = torch.tensor([7, 8])
    shared: dict[str, Any] = {"budget": 0.6, "exits": {1: 0.5}, "whole": 0.5, "dropout": 0.5}

    def gradients(passes: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        made.zero_grad()
        for given in passes:
            plan(made, **shared)
            made(**given, num_items_in_batch=items)["loss"].backward()
        return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}

    together = gradients([{"input_ids": ids, "labels": labels, "attention_mask": mask, "row": numbers}])
    alone = gradients(
        [
            {"input_ids": ids[:1], "labels": labels[:1], "row": numbers[:1]},
            {"input_ids": ids[1:, :15], "labels": labels[1:, :15], "row": numbers[1:]},
        ]
    )
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], atol=1e-5, rtol=1e-4, msg=name)


def test_recomputed_layers_give_the_same_gradients(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, gate=GateConfig(), tokenizer=True)
    ids, found = ids_of(2), []
    for recomputed in (False, True):
        made = learner(model, exits={"depths": [1]}, gate={"sparsity": 0.5})
        if recomputed:
            made.activation_checkpointing_enable()
        made.train()
        plan(made, budget=0.6, exits={1: 0.5}, whole=0.5, dropout=0.5, straight_through=True)
        made(input_ids=ids, labels=ids)["loss"].backward()
        found.append({name: p.grad for name, p in made.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_a_dropped_layer_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = learner(tiny_checkpoint(tmp_path, gate=GateConfig(), tokenizer=True), exits={"depths": [1]})
    ids = ids_of(2)
    live = torch.ones(3, 2, dtype=torch.bool)
    live[1:] = False
    monkeypatch.setattr(Schedule, "live", lambda *_: live)
    losses = []
    for exits, whole in (({}, 1.0), ({1: 1.0}, 0.0)):
        plan(made, exits=exits, whole=whole)
        losses.append(float(made(input_ids=ids, labels=ids)["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_straight_through_also_learns_from_skipped_tokens(tmp_path: Path) -> None:
    """With everything skipped, only the straight-through estimator gives a gate a gradient; the loss is the same."""
    made = learner(tiny_checkpoint(tmp_path, gate=GateConfig(kind="scalar"), tokenizer=True))
    ids, losses = ids_of(2), []
    for through in (False, True):
        made.zero_grad()
        plan(made, budget=0.0, straight_through=through)
        loss = made(input_ids=ids, labels=ids)["loss"]
        losses.append(float(loss))
        gradient = torch.zeros(1)
        if loss.requires_grad:
            loss.backward()
            found = made.hf.model.layers[1].mlp_gate.weight.grad
            gradient = gradient if found is None else found
        assert bool(gradient.abs().sum() > 0) is through
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("mode", ["lora", "frozen", "full"])
def test_the_dense_model_is_the_teacher(tmp_path: Path, mode: str) -> None:
    """With open gates and adapters that do nothing yet, the model is its own teacher: their divergence is 0."""
    model = tiny_checkpoint(tmp_path, tokenizer=True)
    made = learner(model, mode=mode, gate={"bias": 40.0, "std": 1e-3, "sparsity": 0.0}, distill={"weight": 1.0})
    ids = ids_of(2)
    plan(made)
    assert float(made(input_ids=ids, labels=ids)["loss"]) == pytest.approx(0.0, abs=1e-6)
    plan(made, budget=0.5)
    assert float(made(input_ids=ids, labels=ids)["loss"]) > 1e-3
    assert any(p.requires_grad for p in made.parameters())


def test_exits_learn_from_the_model(tmp_path: Path) -> None:
    """At full depth, such an exit has the entropy of the model's own prediction as its loss."""
    made = learner(
        tiny_checkpoint(tmp_path, tokenizer=True), gate=None, exits={"depths": [2], "target": "model", "dropout": 0.0}
    )
    ids = ids_of(2)
    plan(made, exits={3: 1.0}, whole=0.0)
    with torch.no_grad():
        found = float(made(input_ids=ids, labels=ids)["loss"])
        entropy = torch.distributions.Categorical(logits=made.hf(ids).logits[:, :-1]).entropy().mean()
    assert found == pytest.approx(float(entropy), rel=1e-4)


def test_budgets_fall_and_are_drawn() -> None:
    gate = GateSettings(budget_end=0.5, budget_ramp=0.5)
    falling = Schedule(4, gate, None, steps=100, seed=1)
    assert [falling.budget(step) for step in (0, 25, 50, 99)] == [1.0, 0.75, 0.5, 0.5]
    uniform = Schedule(4, gate.model_copy(update={"budget_rule": "uniform"}), None, steps=100, seed=1)
    drawn = [uniform.budget(step) for step in range(50, 100)]
    assert 0.5 <= min(drawn) < 0.55
    assert 0.95 < max(drawn) <= 1.0
    assert Schedule(4, None, ExitSettings(depths=(1,)), steps=9, seed=1).budget(3) == 1.0


def test_exits_take_turns() -> None:
    def of(**values: Any) -> Schedule:
        return Schedule(9, None, ExitSettings(**{"depths": (2, 4, 6), **values}), steps=6, seed=1)

    assert [of().exits_of(step) for step in range(4)] == [(2,), (4,), (6,), (2,)]
    assert [of(turns="gradual").exits_of(step) for step in range(3)] == [(6,), (4, 6), (2, 4, 6)]
    sorted_ones = of(turns="all", weights="equal").plan(0)
    assert (sorted_ones.exits, sorted_ones.whole) == (dict.fromkeys((2, 4, 6), 0.25), 0.25)
    deep = of(turns="all").plan(0)
    assert sum(deep.exits.values()) + deep.whole == pytest.approx(1.0)
    assert deep.exits[2] < deep.exits[4] < deep.exits[6] < deep.whole
    assert ExitSettings(every=4).of(9) == (4, 8)


def test_dropped_layers_depend_on_the_row_alone() -> None:
    made = Schedule(5, None, ExitSettings(depths=(1,), dropout=0.9), steps=9, seed=1)
    together = made.live(made.plan(3), torch.tensor([4, 9, 11]))
    alone = made.live(made.plan(3), torch.tensor([9]))
    assert together is not None
    assert alone is not None
    assert torch.equal(together[:, 1:2], alone)
    assert bool(together[0].all())
    other = made.live(made.plan(4), torch.arange(64))
    assert other is not None
    assert 0.02 < float((~other[-1]).float().mean()) - 0.8 < 0.2
    assert schedule.dropout_chances(5, 0.2) == pytest.approx(
        [0.2 * (math.exp(i * math.log(2) / 4) - 1) for i in range(5)]
    )
    assert schedule.dropout_chances(1, 0.2) == [0.0]


def test_clipping_bounds_attention_and_touches_nothing_else(tmp_path: Path) -> None:
    """Layer 0's attention logits, from its weights by hand, after queries were blown up."""
    made = learner(tiny_checkpoint(tmp_path, tokenizer=True, heads=4, kv_heads=2))
    ids = ids_of(1, 32)
    layer = made.hf.model.layers[0]

    def largest_logit() -> float:
        with torch.no_grad():
            x = layer.input_layernorm(made.hf.model.embed_tokens(ids))
            cos, sin = made.hf.model.rotary_emb(x, torch.arange(32)[None])
            heads = (layer.self_attn.q_proj(x).view(1, 32, 4, 16), layer.self_attn.k_proj(x).view(1, 32, 2, 16))
            q, k = apply_rotary_pos_emb(*(one.transpose(1, 2) for one in heads), cos, sin)
            return float((q @ k.repeat_interleave(2, 1).transpose(2, 3)).abs().max() / 4)

    with torch.no_grad():
        layer.self_attn.q_proj.weight.mul_(10_000)
    before = {name: p.clone() for name, p in made.named_parameters()}
    limit = 300.0  # the other layers are far below it
    assert largest_logit() > limit
    clip_attention(made, limit, ids)
    assert largest_logit() <= limit * (1 + 1e-5)
    changed = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"hf.model.layers.0.self_attn.q_proj.weight"}


def test_open_layers_always_run_and_the_others_make_up_for_it(tmp_path: Path) -> None:
    made = learner(
        tiny_checkpoint(tmp_path, tokenizer=True), gate={"kind": "scalar", "std": 0.5, "bias": 0.0, "open_layers": [0]}
    )
    gates = {name: p for name, p in made.named_parameters() if "_gate." in name}
    assert {name.split(".")[3] for name, p in gates.items() if p.requires_grad} == {"1", "2"}
    ids = ids_of(1, 40)
    _, call = made.figures(ids, ids, budget=0.8)
    assert {layer for layer, _ in call.scores} == {1, 2}
    assert call.shares == pytest.approx({(n, b): 1 - 0.2 * 6 / 4 if n else 1.0 for n in range(3) for b in BRANCHES})
    constant = made.hf.model.layers[0].mlp_gate
    assert is_constant(constant)
    assert float(constant.bias) == 0.0


def test_gates_begin_as_predictions_of_what_a_branch_changes(tmp_path: Path) -> None:
    """Their ranks agree with the changes, measured by hand, far better than chance."""
    model = tiny_checkpoint(tmp_path, tokenizer=True)
    made = learner(model, gate={"kind": "scalar", "std": 1e-3, "bias": 3.0, "open_layers": [0]})
    ids = torch.randint(EOS_ID + 1, 259, (4, 64), generator=torch.Generator().manual_seed(2))
    predict_changes(made.hf, made.gsx_config, ids, bias=3.0)
    layer, seen = made.hf.model.layers[2], {}
    layer.post_attention_layernorm.register_forward_hook(lambda _m, args, out: seen.update(h=args[0], x=out))
    layer.mlp.register_forward_hook(lambda _m, _args, out: seen.update(f=out))
    with torch.no_grad():
        made.run(ids)
        logits = layer.mlp_gate(seen["x"]).flatten()
    change = (seen["f"].norm(dim=-1) / seen["h"].norm(dim=-1)).flatten()
    assert float(logits.mean()) == pytest.approx(3.0, abs=0.2)
    assert float(torch.corrcoef(torch.stack([logits, change.log()]))[0, 1]) > 0.5
    assert is_constant(made.hf.model.layers[0].attn_gate)


def test_gates_of_a_model_are_kept(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, gate=GateConfig(kind="scalar"), tokenizer=True)
    made = learner(model, mode="lora", gate={"kind": "vector"})
    checkpoint = open_checkpoint(model)
    assert made.gsx_config.gate == replace(GateConfig(), kind="scalar")
    for name in ("model.layers.2.mlp_gate.weight", "model.layers.0.attn_gate.bias"):
        assert torch.equal(made.hf.get_parameter(name), checkpoint.tensor(name))
