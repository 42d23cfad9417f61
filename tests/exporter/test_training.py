"""Training: the recipe's schedule, the run and its snapshots, and what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.config import GateConfig, GateInput, GateKind
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.reference.model import Reference
from gsx_exporter.reference.rule import KeepAll
from gsx_exporter.rules.gateskip.reference import Rank
from gsx_exporter.training import ModelShape, StepReport, TrainConfig, corpus, export_snapshot, schedule, train
from gsx_exporter.training.loop import _build
from gsx_exporter.training.model import GatedModel
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.progress import Progress
from tests.tiny import EOS_ID, tiny_checkpoint

TINY = TrainConfig(
    model=ModelShape(
        vocab_size=270,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_positions=128,
    ),
    exits=(1, 2),
    seed=3,
    steps=12,
    batch_size=3,
    sequence_length=24,
    warmup_steps=2,
    decay_steps=3,
    learning_rate=5e-3,
    optimizer="muon",
    budget_end=0.5,
    budget_steps=6,
    save_dtype="float32",
)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    (directory / "test").mkdir(parents=True)
    for number in range(4):
        lines = [f"def f{i}(a, b):\n    return a * {i * number} + b\n" for i in range(60)]
        (directory / "test" / f"file{number}.py").write_text("".join(lines))
    return directory


def _run(config: TrainConfig, path: Path, text: Path, **options: Any) -> dict[str, torch.Tensor]:
    result = train(config, path / "out", work=path / "work", text=text, **options)
    return load_file(result.directory / "model.safetensors")


def test_result_is_a_checkpoint(tmp_path: Path, text: Path) -> None:
    reports: list[StepReport] = []
    phases: list[Progress] = []
    result = train(
        TINY,
        tmp_path / "out",
        work=tmp_path / "work",
        text=text,
        on_step=reports.append,
        on_progress=phases.append,
    )
    assert [phase.stage for phase in phases] == ["reading the text", "training the tokenizer", "encoding the text"]
    assert (result.steps, result.tokens, result.resumed_at) == (12, 12 * 3 * 24, 0)
    assert [r.step for r in reports] == list(range(1, 13))
    assert [r.exit_depth for r in reports[:3]] == [1, 2, 1]
    assert reports[-1].cross_entropy < reports[0].cross_entropy - 0.5
    assert reports[-1].gate_square < reports[0].gate_square
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.config.gate == GateConfig()
    assert checkpoint.config.exits == (1, 2)
    assert checkpoint.config.eos_ids == (0,)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.model.norm.weight, checkpoint.tensor("model.norm.weight"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("naïve = '→'\n").input_ids) == "naïve = '→'\n"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>",) * 2
    leftovers = sorted(path.name for path in tmp_path.iterdir())
    assert leftovers == ["out", "text", "work"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resume_is_bit_identical(tmp_path: Path, text: Path, optimizer: str) -> None:
    config = replace(TINY, optimizer=optimizer, budget_rule="uniform")
    whole = _run(config, tmp_path / "whole", text)

    def stop(report: StepReport) -> None:
        if report.step == 7:
            raise GsxError("stopped by the test")

    with pytest.raises(GsxError, match="stopped by the test"):
        _run(config, tmp_path / "parts", text, snapshot_every=5, on_step=stop)
    assert not (tmp_path / "parts" / "out").exists()
    shutil.rmtree(text)  # a run keeps its tokens
    parts = _run(config, tmp_path / "parts", text, resume=True)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_a_seed_repeats_and_another_does_not(tmp_path: Path, text: Path) -> None:
    first = _run(TINY, tmp_path / "a", text)
    again = _run(TINY, tmp_path / "b", text)
    other = _run(replace(TINY, seed=4), tmp_path / "c", text)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_interrupt_saves_the_step(tmp_path: Path, text: Path) -> None:
    whole = _run(TINY, tmp_path / "whole", text)
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it

    def interrupt(report: StepReport) -> None:
        if report.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _run(TINY, tmp_path / "parts", text, on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    names = [path.name for path in (tmp_path / "parts" / "work").iterdir()]
    assert "step-00000004" in names
    parts = _run(TINY, tmp_path / "parts", text, resume=True)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_run_may_be_made_longer_but_not_another(tmp_path: Path, text: Path) -> None:
    def stop(report: StepReport) -> None:
        if report.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        _run(TINY, tmp_path, text, on_step=stop)
    for change in ({"seed": 9}, {"learning_rate": 1e-3}, {"steps": 6}):
        with pytest.raises(UsageError, match="step-00000005: the run was started with another configuration"):
            _run(replace(TINY, **change), tmp_path, text, resume=True)
    reports: list[StepReport] = []
    _run(replace(TINY, steps=14), tmp_path, text, resume=True, on_step=reports.append)
    assert [r.step for r in reports] == list(range(6, 15))


def test_a_snapshot_is_a_checkpoint_too(tmp_path: Path, text: Path) -> None:
    final = _run(TINY, tmp_path, text, snapshot_every=4)
    snapshots = sorted(path.name for path in (tmp_path / "work").glob("step-*"))
    assert snapshots == ["step-00000008", "step-00000012"]
    assert export_snapshot(tmp_path / "work", tmp_path / "early") == 12
    early = load_file(tmp_path / "early" / "model.safetensors")
    assert all(torch.equal(final[name], early[name]) for name in final)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_gates_are_added_to_a_dense_model(tmp_path: Path, text: Path, family: str) -> None:
    # A rate so low that nothing changes: the result is the initial model, with open gates.
    config = replace(TINY, learning_rate=1e-12, weight_decay=0.0, optimizer="adamw", steps=5, exits=(2,))
    overrides = {"sliding_window": 7} if family == "mistral" else {}
    dense = tiny_checkpoint(tmp_path / "dense", family, tokenizer=True, **overrides)
    ends = () if family == "llama" else (EOS_ID,)
    if not ends:  # its files name no end token, and the trained model must not get the default of a family
        (dense / "generation_config.json").unlink()
        raw = json.loads((dense / "config.json").read_text())
        (dense / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "eos_token_id"}))
    result = train(config, tmp_path / "out", work=tmp_path / "work", model=dense, text=text)
    checkpoint = open_checkpoint(result.directory)
    assert checkpoint.config.family == family
    assert checkpoint.config.gate == config.gate
    assert checkpoint.config.eos_ids == ends
    assert (dense / "tokenizer.json").read_bytes() == (result.directory / "tokenizer.json").read_bytes()
    for name, tensor in load_file(dense / "model.safetensors").items():
        torch.testing.assert_close(checkpoint.tensor(name), tensor, atol=1e-6, rtol=0)
    assert bool((checkpoint.tensor("model.layers.0.attn_gate.bias") == 5.0).all())
    assert int((np.load(tmp_path / "work" / "tokens.npy") == EOS_ID).sum()) == (4 if ends else 0)


@pytest.mark.parametrize("kind", ["vector", "scalar"])
@pytest.mark.parametrize("gate_input", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("budget", [1.0, 0.8, 0.5])
def test_losses_are_those_of_the_reference(
    tmp_path: Path, text: Path, kind: GateKind, gate_input: GateInput, budget: float
) -> None:
    gate = GateConfig(kind=kind, input=gate_input)
    model = tiny_checkpoint(tmp_path / "model", "mistral", gate=gate, tokenizer=True, exits=(2,), sliding_window=9)
    shutil.copytree(model, tmp_path / "work" / "base")
    checkpoint = open_checkpoint(model)
    config = replace(TINY, gate=gate, exits=(2,), sparsity=0.0)
    gated = _build(config, tmp_path / "work", source=checkpoint)
    # All tokens differ: equal tokens have equal scores in layer 0, and training skips all of the equal ones.
    ids = EOS_ID + 1 + torch.randperm(256, generator=torch.Generator().manual_seed(1))[:75].view(3, 25)
    ids[1, 4] = EOS_ID
    live = torch.ones(3, 3, dtype=torch.bool)
    losses = gated.losses(ids, train=config, budget=budget, exit_depth=2, live=live)
    reference = Reference.load(checkpoint)
    output = reference(ids[:, :-1], rule=KeepAll() if budget == 1 else Rank(budget))

    def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    final, at_exit = cross_entropy(output.logits), cross_entropy(reference.exit_logits(output, 2))
    torch.testing.assert_close(losses.cross_entropy, final, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(losses.exit_cross_entropy, at_exit, atol=1e-5, rtol=1e-5)
    weights = torch.tensor([schedule.exit_weight(3), schedule.exit_weight(2)])
    expected = (weights / weights.sum() * torch.stack([final, at_exit])).sum()
    torch.testing.assert_close(losses.total.detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_dropped_layer_adds_nothing(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", gate=GateConfig(), tokenizer=True)
    shutil.copytree(model, tmp_path / "work" / "base")
    checkpoint = open_checkpoint(model)
    gated = _build(TINY, tmp_path / "work", source=checkpoint)
    ids = torch.randint(EOS_ID + 1, 259, (2, 25), generator=torch.Generator().manual_seed(1))
    live = torch.ones(3, 2, dtype=torch.bool)
    live[1:] = False
    losses = gated.losses(ids, train=TINY, budget=1.0, exit_depth=1, live=live)
    torch.testing.assert_close(losses.cross_entropy, losses.exit_cross_entropy, atol=0, rtol=0)


def test_schedule() -> None:
    config = replace(TINY, steps=100, warmup_steps=10, decay_steps=20, budget_steps=50, budget_end=0.5)
    rates = [schedule.learning_rate_factor(config, step) for step in range(100)]
    assert rates[0] == 0.1
    assert set(rates[9:80]) == {1.0}
    assert rates[-1] == pytest.approx(1 / 21)
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert [schedule.budget(config, step) for step in (0, 25, 50, 99)] == [1.0, 0.75, 0.5, 0.5]
    drawn = [schedule.budget(replace(config, budget_rule="uniform"), step) for step in range(50, 100)]
    assert 0.5 <= min(drawn) < 0.55
    assert 0.95 < max(drawn) <= 1.0
    chances = schedule.dropout_chances(5, 0.2)
    assert chances == pytest.approx([0.2 * (math.exp(i * math.log(2) / 4) - 1) for i in range(5)])
    assert chances[-1] == pytest.approx(0.2)
    assert schedule.dropout_chances(1, 0.2) == [0.0]


def test_one_pass_reads_every_block_once() -> None:
    config = replace(TINY, sequence_length=4, batch_size=1)
    tokens = np.arange(43, dtype=np.int32)
    blocks = schedule.blocks_per_pass(config, len(tokens))
    for turn in range(3):
        rows = [schedule.batch(config, tokens, turn * blocks + step)[0] for step in range(blocks)]
        assert all(torch.equal(row, torch.arange(5) + row[0]) for row in rows)
        starts = sorted(int(row[0]) for row in rows)
        assert starts == list(range(starts[0], starts[0] + 4 * blocks, 4))


def test_corpus_of_the_standard_library() -> None:
    parts = corpus.split(corpus.read_corpus())
    names = {part: [document.name for document in documents] for part, documents in parts.items()}
    assert not any("site-packages" in name or "encodings/" in name for part in names.values() for name in part)
    assert not any("test" in name.split("/")[:-1] for name in names["heldout"] + names["calibration"])
    assert min(len(names["heldout"]), len(names["calibration"])) >= 10
    assert len(names["train"]) > 20 * len(names["heldout"])
    assert corpus.part_of("ast.py") == "heldout"
    assert corpus.part_of("bisect.py") == "calibration"
    assert corpus.part_of("test/ast.py") == "train"


def test_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(TINY.to_dict()))
    assert TrainConfig.from_json(path) == TINY
    example = TrainConfig.from_json(Path(__file__).parents[2] / "examples" / "train_example.json")
    assert example.model.num_layers == 16


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"stepz": 3}, "unknown key"),
        ({"steps": "3"}, "steps has the wrong type"),
        ({"steps": True}, "steps has the wrong type"),
        ({"steps": 0}, "steps is too small"),
        ({"steps": 5, "warmup_steps": 4, "decay_steps": 2}, "warm-up and decay are longer than the run"),
        ({"budget_end": 1.5}, "budget_end is out of range"),
        ({"learning_rate": 0}, "learning_rate is not positive"),
        ({"optimizer": "sgd"}, "optimizer has an unknown value"),
        ({"budget_rule": "rising"}, "budget_rule has an unknown value"),
        ({"exits": [2, 2]}, "exits is not a list of distinct depths"),
        ({"exits": 2}, "exits has the wrong type"),
        ({"model": {"layers": 3}}, "unknown key"),
        ({"model": {"vocab_size": 100}}, "vocab_size is too small"),
        ({"model": {"num_heads": 3, "num_kv_heads": 2}}, "num_kv_heads does not divide"),
        ({"gate": {"kind": "matrix"}}, "gate cannot be used"),
        ([], "not an object"),
    ],
)
def test_configuration_refused(tmp_path: Path, raw: object, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UsageError, match=message):
        TrainConfig.from_json(path)


def test_refused_paths_and_text(tmp_path: Path, text: Path) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match=r"used: exists and is not empty\n  .*--overwrite"):
        train(TINY, used, work=tmp_path / "work", text=text)
    with pytest.raises(UsageError, match=r"used: exists and is not empty\n  .*--resume"):
        train(TINY, tmp_path / "out", work=used, text=text)
    with pytest.raises(UsageError, match="has no snapshot to resume from"):
        train(TINY, tmp_path / "out", work=tmp_path / "work", text=text, resume=True)
    with pytest.raises(UsageError, match="has no snapshot"):
        export_snapshot(tmp_path / "work", tmp_path / "out")
    with pytest.raises(TextError, match="no such directory"):
        train(TINY, tmp_path / "out", work=tmp_path / "w1", text=tmp_path / "nowhere")
    large = replace(TINY, model=replace(TINY.model, vocab_size=5000))
    with pytest.raises(TextError, match="too small for the vocabulary"):
        train(large, tmp_path / "out", work=tmp_path / "w2", text=text)
    with pytest.raises(TextError, match="the training text is too short"):
        train(replace(TINY, sequence_length=100_000), tmp_path / "out", work=tmp_path / "w3", text=text)
    with pytest.raises(UsageError, match="exits names a depth that is not below the last layer"):
        train(replace(TINY, exits=(3,)), tmp_path / "out", work=tmp_path / "w4", text=text)
    dense = tiny_checkpoint(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        train(TINY, tmp_path / "out", work=tmp_path / "w5", model=dense, text=text)
    assert (used / "mine.txt").read_text() == "keep me"
    assert not (tmp_path / "out").exists()
    # A run that never began leaves nothing that would disturb a second try.
    assert not any(path.name.startswith("w") for path in tmp_path.iterdir())


def test_overwrite_replaces_the_result(tmp_path: Path, text: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("old")
    _run(TINY, tmp_path, text, overwrite=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    open_checkpoint(tmp_path / "out")


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_snapshot(tmp_path: Path, text: Path, name: str) -> None:
    _run(TINY, tmp_path, text)
    damaged = tmp_path / "work" / "step-00000012" / name
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"step-00000012: is not a complete snapshot"):
        _run(TINY, tmp_path, text, resume=True, overwrite=True)


def test_changed_text_is_noticed(tmp_path: Path, text: Path) -> None:
    _run(TINY, tmp_path, text)
    tokens = np.load(tmp_path / "work" / "tokens.npy")
    tokens[0] += 1
    np.save(tmp_path / "work" / "tokens.npy", tokens)
    with pytest.raises(CheckpointError, match="is not the text that the run was started with"):
        _run(TINY, tmp_path, text, resume=True, overwrite=True)


def test_divergence_is_reported(tmp_path: Path, text: Path) -> None:
    with pytest.raises(GsxError, match="has a gradient that is not finite"):
        _run(replace(TINY, learning_rate=1e30, optimizer="adamw"), tmp_path, text)


def test_another_number_of_steps_keeps_the_shares() -> None:
    recipe = TrainConfig(steps=1000, warmup_steps=100, decay_steps=200, budget_steps=500)
    short = recipe.with_steps(30)
    assert (short.steps, short.warmup_steps, short.decay_steps, short.budget_steps) == (30, 3, 6, 15)
    longer = recipe.with_steps(2000, resumed=True)
    assert (longer.warmup_steps, longer.decay_steps, longer.budget_steps) == (100, 400, 500)


def test_exits_learn_from_the_model(tmp_path: Path, text: Path) -> None:
    """With exit_target "model" an exit at full depth has the entropy of the model's own prediction as its loss."""
    config = replace(TINY, exit_target="model", steps=3, warmup_steps=1, decay_steps=1)
    train(config, tmp_path / "out", work=tmp_path / "work", text=text)
    gated = _build(config, tmp_path / "work", source=None)
    ids = torch.randint(3, 200, (2, 17), generator=torch.Generator().manual_seed(0))
    live = torch.ones(3, 2, dtype=torch.bool)
    options: dict[str, Any] = {"budget": 1.0, "exit_depth": 3, "live": live}
    with torch.no_grad():
        own = gated.losses(ids, train=config, **options)
        other = gated.losses(ids, train=replace(config, exit_target="text"), **options)
        logits = _logits_at_full_budget(gated, ids[:, :-1])
    assert own.exit_cross_entropy is not None
    assert other.exit_cross_entropy is not None
    assert float(other.exit_cross_entropy) == pytest.approx(float(other.cross_entropy))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert float(own.exit_cross_entropy) == pytest.approx(float(entropy), rel=1e-4)


def test_clipping_bounds_attention_and_touches_nothing_else(tmp_path: Path, text: Path) -> None:
    """Layer 0's attention logits, from its weights by hand, after queries were blown up."""
    train(replace(TINY, steps=5), tmp_path / "out", work=tmp_path / "work", text=text)
    gated = _build(TINY, tmp_path / "work", source=None)
    ids = torch.randint(3, 200, (1, 32), generator=torch.Generator().manual_seed(0))
    layer = gated.hf.model.layers[0]

    def largest_logit() -> float:
        with torch.no_grad():
            x = layer.input_layernorm(gated.hf.model.embed_tokens(ids))
            cos, sin = gated.hf.model.rotary_emb(x, torch.arange(32)[None])
            heads = (layer.self_attn.q_proj(x).view(1, 32, 2, 16), layer.self_attn.k_proj(x).view(1, 32, 1, 16))
            q, k = apply_rotary_pos_emb(*(one.transpose(1, 2) for one in heads), cos, sin)
            return float((q @ k.transpose(2, 3)).abs().max() / 4)

    with torch.no_grad():
        layer.self_attn.q_proj.weight.mul_(10_000)
    before = {name: tensor.clone() for name, tensor in gated.tensors().items()}
    assert largest_logit() > 5
    gated.clip_attention(ids, 5.0)
    assert largest_logit() <= 5.0 * (1 + 1e-5)
    changed = {name for name, tensor in gated.tensors().items() if not torch.equal(tensor, before[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}


def _logits_at_full_budget(gated: GatedModel, ids: torch.Tensor) -> torch.Tensor:
    """By Hugging Face's model, its branches multiplied by their gates through hooks. [B, S, V]."""
    handles = []
    for number, layer in enumerate(gated.hf.model.layers):
        for name, module in (("attn", layer.self_attn), ("mlp", layer.mlp)):
            gate = gated.gates[f"{name}_{number}"]

            def times_gate(_m: Any, args: Any, kwargs: Any, out: Any, gate: Any = gate) -> Any:
                factor = torch.sigmoid(gate(kwargs["hidden_states"] if kwargs else args[0]))
                return (factor * out[0], *out[1:]) if isinstance(out, tuple) else factor * out

            handles.append(module.register_forward_hook(times_gate, with_kwargs=True))
    logits: torch.Tensor = gated.hf(ids).logits
    for handle in handles:
        handle.remove()
    return logits
