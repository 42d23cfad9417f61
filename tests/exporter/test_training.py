"""Training runs: their results, going on after a stop, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.training import trainer
from gsx_exporter.training.reading import read_settings
from gsx_exporter.training.run import TrainResult, plan_training, train
from gsx_exporter.training.settings import TrainSettings
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.progress import Progress
from tests.tiny import tiny_checkpoint

NEW = {
    "mode": "full",
    "new": {
        "vocab_size": 270, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 2,
        "num_kv_heads": 1, "head_dim": 16, "max_positions": 128,
    },
    "muon": {"qk_clip": 50.0},
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    rows = [{"text": "".join(f"def f{i}(a):\n    return {i * n} + a\n" for i in range(9))} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model", tokenizer=True)


def settings(recipe: str = "gateskip+layerskip", **changes: Any) -> TrainSettings:
    """A recipe, so small that it takes a second. Names with two underscores are dotted."""
    small = {
        "gate.kind": "scalar", "data.length": 24, "evaluation.rows": 4, "evaluation.budgets": [0.5],
        "trainer.max_steps": 6, "trainer.per_device_train_batch_size": 2, "trainer.gradient_accumulation_steps": 1,
        "trainer.learning_rate": 5e-3, "trainer.logging_steps": 1, "trainer.save_steps": 2, "trainer.eval_steps": 4,
        "trainer.warmup_steps": 1, "exits.every": 1,
    }  # fmt: skip
    given = {name.replace("__", "."): value for name, value in changes.items()}
    if recipe in ("layerskip", "sorted"):
        small = {name: value for name, value in small.items() if not name.startswith("gate.")}
    if recipe == "gateskip":
        small = {name: value for name, value in small.items() if not name.startswith("exits.")}
    return read_settings(recipe, {**small, **{name: str(v) if isinstance(v, Path) else v for name, v in given.items()}})


def run(chosen: TrainSettings, path: Path, **options: Any) -> TrainResult:
    return train(chosen, path / "out", work=path / "work", **options)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def stop_after(step: int, how: Callable[[], None]) -> Callable[[Progress], None]:
    def on_progress(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("training", step):
            how()

    return on_progress


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("mode", ["lora", "frozen", "full"])
def test_a_result_is_exported_and_proved(tmp_path: Path, model: Path, text: Path, tiny_text: Path, mode: str) -> None:
    phases: list[Progress] = []
    recipe = "gateskip" if mode == "frozen" else "gateskip+layerskip"
    # The branches of layer 0 always run, in the engine too: their gates give every token the same score.
    start = {"gate__start": "change", "gate__open_layers": [0], "gate__weights": "measured"} if mode == "lora" else {}
    ranks = {"lora__rank": 2, "lora__rank_pattern": {r"layers\.0\..*": 5}} if mode == "lora" else {}
    chosen = settings(recipe, model=model, data__source=text, mode=mode, **start, **ranks)
    result = run(chosen, tmp_path, on_progress=phases.append)
    assert [p.done for p in phases if p.stage == "training"] == list(range(1, 7))
    assert (result.steps, result.resumed_at) == (6, 0)
    assert result.metrics["eval_perplexity_at_0.5"] > 1
    checkpoint = open_checkpoint(result.directory)
    gate = checkpoint.config.gate
    assert gate is not None
    assert replace(gate, skip_weights=None) == GateConfig(kind="scalar", score="logit")
    if gate.skip_weights is not None:
        assert gate.skip_weights[0] == (0.0, 0.0)
        assert all(0 < weight <= 1 for row in gate.skip_weights[1:] for weight in row)
    assert (gate.skip_weights is None) is (mode != "lora")
    assert checkpoint.config.exits == (() if mode == "frozen" else (1, 2))
    assert (checkpoint.adapter is None) is (mode == "full")
    before = open_checkpoint(model)
    changed = {n for n in before.names if not torch.equal(before.tensor(n).float(), checkpoint.tensor(n).float())}
    assert bool(changed) is (mode != "frozen")
    assert read_settings(result.directory / "training.yaml").mode == mode
    bundle = export(result.directory, tmp_path / "bundle", budget=0.6, calibration=tiny_text, calibration_tokens=512)
    assert verify(bundle.directory, tokens=256, greedy_tokens=8, budgets=[0.6]).passed


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("gemma3_text", "layerskip"), ("qwen3_moe", "gateskip"), ("olmo2", "sorted"), ("phi3", "gateskip+layerskip")],
)
def test_other_families_and_recipes(tmp_path: Path, text: Path, family: str, recipe: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", family, tokenizer=True)
    result = run(settings(recipe, model=model, data__source=text, trainer__max_steps=2), tmp_path)
    checkpoint = open_checkpoint(result.directory)
    assert (checkpoint.config.gate is None) is (recipe in ("layerskip", "sorted"))
    assert checkpoint.config.exits == (() if recipe == "gateskip" else (1, 2))
    if recipe != "gateskip":
        assert 0 <= result.metrics["eval_exit_1_agreement"] <= 1


def test_an_adapter_is_as_peft_writes_it(tmp_path: Path, model: Path, text: Path) -> None:
    from peft import PeftModel

    result = run(settings(model=model, data__source=text), tmp_path)
    raw = json.loads((result.directory / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == str(model)
    assert raw["gsx"]["base_sha256"] == open_checkpoint(model).weights_sha256()
    names = load_file(result.directory / "gates.safetensors").keys()
    assert "model.layers.2.mlp_gate.weight" in names
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), result.directory).merge_and_unload()
    ours = open_checkpoint(result.directory)
    weight = merged.model.layers[1].mlp.down_proj.weight
    torch.testing.assert_close(ours.tensor("model.layers.1.mlp.down_proj.weight"), weight.detach())


def test_a_new_model(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / "test").mkdir(parents=True)
    for n in range(4):
        (folder / "test" / f"{n}.py").write_text("".join(f"def f{i}(a):\n    return {i * n}\n" for i in range(60)))
    chosen = settings(data__source=folder, data__held_out=0.3, **NEW)
    result = run(chosen, tmp_path)
    assert open_checkpoint(result.directory).config.eos_ids == (0,)
    tokenizer = AutoTokenizer.from_pretrained(result.directory)
    assert tokenizer.decode(tokenizer("naïve = '→'\n").input_ids) == "naïve = '→'\n"
    again = settings(data__source=folder, data__held_out=0.3, model=result.directory, mode="full", muon={})
    second = run(again, tmp_path / "second")
    assert second.metrics["eval_loss"] < result.metrics["eval_loss"]


def test_half_precision_and_recomputed_layers(tmp_path: Path, model: Path, text: Path) -> None:
    plain = run(settings(model=model, data__source=text, trainer__seed=5), tmp_path / "plain")
    options = {
        "trainer__bf16": True,
        "trainer__gradient_checkpointing": True,
        "trainer__gradient_accumulation_steps": 2,
    }
    options["trainer__per_device_train_batch_size"] = 1
    other = run(settings(model=model, data__source=text, trainer__seed=5, **options), tmp_path / "other")
    # bfloat16 has 8 significant bits.
    assert other.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=2**-5)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, model: Path, text: Path, mode: str) -> None:
    chosen = settings(model=model, data__source=text, mode=mode, **({"muon": {}} if mode == "full" else {}))
    whole = tensors(run(chosen, tmp_path / "whole").directory)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, tmp_path / "parts", on_progress=stop_after(3, interrupt))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "parts" / "out").exists()
    broken = tmp_path / "parts" / "work" / "checkpoint-5"  # written when the process was killed
    shutil.copytree(tmp_path / "parts" / "work" / "checkpoint-3", broken)
    (broken / "trainer_state.json").unlink()
    early = run(chosen, tmp_path / "parts", finish=True)
    assert (early.steps, early.resumed_at) == (3, 3)
    shutil.rmtree(early.directory)
    result = run(chosen, tmp_path / "parts", resume=True)
    assert result.resumed_at == 3
    parts = tensors(result.directory)
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_a_stream_is_trained_on_and_needs_a_length(tmp_path: Path, model: Path, text: Path) -> None:
    chosen = {"model": model, "data__source": text, "data__streaming": True, "data__held_out": 0.005}
    result = run(settings(**chosen, gate__start="change", trainer__max_steps=2), tmp_path)
    assert result.facts.tokens is None
    with pytest.raises(UsageError, match=r"how long is a run on a stream\?\n.*trainer\.max_steps"):
        plan_training(settings(**chosen, trainer__max_steps=-1))


def test_divergence_keeps_the_last_good_state(tmp_path: Path, model: Path, text: Path) -> None:
    chosen = settings(model=model, data__source=text, trainer__learning_rate=1e30, trainer__max_grad_norm=0.0)
    with pytest.raises(GsxError, match=r"step \d+ has a gradient that is not finite[\s\S]*learning_rate"):
        run(chosen, tmp_path)
    (kept,) = sorted((tmp_path / "work").glob("checkpoint-*"))[-1:]
    assert (kept / "trainer_state.json").is_file()


def test_a_full_disk_is_said(tmp_path: Path, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer.GateTrainer, "_save_checkpoint", full)
    with pytest.raises(GsxError, match=r"work: could not be written\n.*the disk is full\n.*--resume"):
        run(settings(model=model, data__source=text), tmp_path)


def test_a_dry_run_writes_nothing(tmp_path: Path, model: Path, text: Path) -> None:
    facts = plan_training(settings(model=model, data__source=text))
    assert facts.steps == 6
    assert facts.step_tokens == 48
    assert 0 < facts.trained < facts.parameters
    assert facts.tokens is not None
    assert facts.tokens == (facts.rows or 0) * 24
    assert facts.seconds is not None
    assert facts.seconds > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.jsonl"]


def test_refused(tmp_path: Path, model: Path, text: Path) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lora__rank": 65}, UsageError, r"rank is larger than a matrix\n.*at most 32.*k_proj.*found rank 65"),
        ({"lora__rank_pattern": {r"layers\.0\..*": 33}}, UsageError, r"larger than a matrix\n.*found rank 33"),
        ({"lora__rank_pattern": {r"layers\.9\..*": 2}}, UsageError, r"rank_pattern names no layer.*\n.*layers\\.9"),
        ({"lora__targets": ["q_prj"]}, UsageError, "targets names no layer"),
        ({"exits__every": 3}, UsageError, "exits are outside the model"),
        ({"data__length": 1000}, UsageError, "rows are longer than the model's texts"),
        ({"trainer__learning_rat": 1.0}, UsageError, r"trainer\.learning_rat is not a setting"),
        ({"trainer__lr_scheduler_type": "bumpy"}, UsageError, "the section trainer cannot be used"),
        ({"trainer__report_to": "paper"}, UsageError, "paper is not supported"),
        ({"data__text": "body"}, TextError, "no column 'body'"),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            run(settings(model=model, data__source=text, **changes), tmp_path)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="has no checkpoint to resume from"):
        run(settings(model=model, data__source=text), tmp_path, resume=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match=r"out: exists and is not empty\n.*--overwrite"):
        run(settings(model=model, data__source=text), tmp_path)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


@pytest.mark.parametrize(
    ("family", "keys", "message"),
    [
        ("ouro", {}, "looped model"),
        ("llama", {"vocab": 300, "tokenizer": False}, "has no tokenizer"),
    ],
)
def test_models_that_are_refused(tmp_path: Path, text: Path, family: str, keys: dict[str, Any], message: str) -> None:
    model = tiny_checkpoint(tmp_path / "model", family, **{"tokenizer": True, **keys})
    with pytest.raises((UsageError, CheckpointError), match=message):
        run(settings(model=model, data__source=text), tmp_path)
    assert not (tmp_path / "work").exists()


def test_a_run_with_other_settings_or_text_is_not_resumed(tmp_path: Path, model: Path, text: Path) -> None:
    chosen = settings(model=model, data__source=text)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, tmp_path, on_progress=stop_after(2, interrupt))
    with pytest.raises(UsageError, match=r"other settings\n.*trainer\.learning_rate 0\.005, found 0\.1"):
        run(settings(model=model, data__source=text, trainer__learning_rate=0.1), tmp_path, resume=True)
    text.write_text(text.read_text().replace("def", "fed"))
    with pytest.raises(UsageError, match="another text"):
        run(chosen, tmp_path, resume=True)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, model: Path, text: Path) -> None:
    result = run(settings("gateskip", model=model, data__source=text, trainer__max_steps=1), tmp_path)
    shutil.rmtree(model)
    tiny_checkpoint(model, tokenizer=True, seed=9)
    with pytest.raises(CheckpointError, match="trained on another base than"):
        open_checkpoint(result.directory)
