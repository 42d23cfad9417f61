"""Routers: each method's section on a small checkpoint through `gsx verify`, and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.tensor_names import past
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.reference.model import Reference
from gsx_exporter.router_config import NetConfig, RouterConfig
from gsx_exporter.rules.router.reference import RoutedByThreshold
from gsx_exporter.rules.router.traced import capacity
from gsx_plugins.errors import GsxError, UsageError
from tests.tiny import tiny_checkpoint

LAYERS = 3
# As docs/routers.md has them.
METHODS = {
    "mixture-of-depths": RouterConfig(layers=(1,), multiplies="layer", kv_policy="none"),
    "d-llm": RouterConfig(
        layers=(1, 2),
        net=NetConfig(hidden=24, activation="silu", norm=True),
        output="softmax",
        keep_logit=1,
        threshold=0.5,
        kv_policy="none",
        full_first=2,
    ),
    "skipgpt": RouterConfig(
        decides="branch", net=NetConfig(hidden=16), output="difference", keep_logit=0, threshold=0.0
    ),
    "flexidepth": RouterConfig(
        layers=(1, 2),
        input="post_norm",
        net=NetConfig(hidden=8, activation="tanh", norm=True, bias=False),
        output="sigmoid",
        threshold=0.5,
        multiplies="mlp",
        adapter=12,
    ),
    # Every other value of the entry at least once.
    "predictor, copy": RouterConfig(
        layers=(0, 2), predictor=NetConfig(hidden=8, activation="gelu"), multiplies="layer", kv_policy="copy"
    ),
    "mlp alone": RouterConfig(
        decides="branch", branches=("mlp",), reads="branch", input="post_norm", output="sigmoid", multiplies="branch"
    ),
}


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A checkpoint with the routers of a method, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp("routers") / "model"
            made[name] = tiny_checkpoint(path, layers=LAYERS, router=METHODS[name], tokenizer=True, seed=5)
        return made[name]

    return make


@pytest.fixture(scope="module")
def bundle_of(
    tmp_path_factory: pytest.TempPathFactory, model_of: Callable[[str], Path], tiny_text: Path
) -> Callable[[str], Path]:
    """Its export at the method's own threshold, or at budget 0.6; made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            budget = 0.6 if METHODS[name].threshold is None else None
            made[name] = tmp_path_factory.mktemp("bundle") / "out"
            export(model_of(name), made[name], budget=budget, calibration=tiny_text, calibration_tokens=512)
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_parity(name: str, bundle_of: Callable[[str], Path], tiny_text: Path) -> None:
    bundle = open_bundle(bundle_of(name))
    selection = bundle.manifest.selection
    assert selection is not None
    greedy = 256 if name in ("d-llm", "flexidepth") else 32
    report = verify(bundle.directory, text=tiny_text, tokens=256, greedy_tokens=greedy, budgets=[selection.budget])
    assert [check for check in report.checks if check.verdict == "fail"] == []
    assert report.passed
    kept = [result.kept_share for result in report.results]
    assert kept[0] is not None
    assert 0 < kept[0] < 1, "some tokens are skipped"


def test_the_call_ranks(tmp_path: Path, model_of: Callable[[str], Path], tiny_text: Path) -> None:
    """Mixture-of-Depths as it is trained: the best tokens of the call."""
    export(model_of("mixture-of-depths"), tmp_path / "out", select="rank", budget=0.25)
    report = verify(tmp_path / "out", text=tiny_text, tokens=256, greedy_tokens=8, budgets=[0.25])
    assert [check.name for check in report.checks if check.verdict == "fail"] == []


def test_layers_without_a_router_are_dense(bundle_of: Callable[[str], Path]) -> None:
    bundle = open_bundle(bundle_of("mixture-of-depths"))
    assert bundle.manifest.skippable_places == [(1, "attn"), (1, "mlp")]
    runner = open_runner(bundle)
    # A threshold that no score reaches: layer 1 is left out, and rows are counted only there.
    nothing = {"thresholds": np.full((1, LAYERS, 2), 1e9, np.float32)}
    output = runner.step(runner.new_cache(1, 8), np.array([[5, 60, 61, 7]]), nothing)
    assert output.kept is not None
    assert output.kept.sum() == 0
    assert output.gated_rows == 8


def test_a_skipped_token_leaves_no_k_and_v(bundle_of: Callable[[str], Path]) -> None:
    """D-LLM with a threshold that no score reaches: the first two tokens run as always, the others leave no K and V."""
    bundle = open_bundle(bundle_of("d-llm"))
    nothing = {"thresholds": np.full((1, LAYERS, 2), 1e9, np.float32)}
    runner = WholeRunner(PortableStage(bundle))
    cache = runner.new_cache(1, 8)
    output = runner.step(cache, np.array([[5, 60, 61, 7]]), nothing)
    assert output.kept is not None
    assert output.kept[1:].tolist() == [[2, 2], [2, 2]]
    there = cache.memory[past(1, "key")][0].any(axis=(0, 2))
    assert there.tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["d-llm", "flexidepth"])
def test_batches_choose_as_single_sequences(name: str, bundle_of: Callable[[str], Path]) -> None:
    bundle = open_bundle(bundle_of(name))
    runner = open_runner(bundle)
    controls = controls_for(bundle.manifest, KeepSettings())
    prompts = np.array([[5, 60, 61, 7], [9, 8, 7, 6]])
    together = runner.step(runner.new_cache(2, 8), prompts, controls).logits
    for row, prompt in enumerate(prompts):
        alone = runner.step(runner.new_cache(1, 8), prompt[None], controls).logits
        # Two sequences are summed in another order than one.
        np.testing.assert_allclose(together[row], alone[0], atol=2e-4)


def test_another_budget_at_run_time(tmp_path: Path, model_of: Callable[[str], Path], tiny_text: Path) -> None:
    export(model_of("skipgpt"), tmp_path / "out", budget=0.7, calibration=tiny_text, calibration_tokens=512)
    manifest = open_bundle(tmp_path / "out").manifest
    assert manifest.selection is not None
    shares = {point.budget: point.kept_share for point in manifest.selection.grid}
    assert all(abs(share - budget) < 0.02 for budget, share in shares.items())
    half, most = (controls_for(manifest, KeepSettings(budget=budget))["thresholds"] for budget in (0.5, 0.9))
    assert (half > most).mean() > 0.8


def test_one_router_for_a_layer_has_one_threshold(tmp_path: Path, model_of: Callable[[str], Path]) -> None:
    export(model_of("d-llm"), tmp_path / "out", budget=0.6, calibration_tokens=256)
    manifest = open_bundle(tmp_path / "out").manifest
    (thresholds,) = controls_for(manifest, KeepSettings(budget=0.6))["thresholds"]
    assert (thresholds[1:, 0] == thresholds[1:, 1]).all()
    assert np.isneginf(thresholds[0]).all()


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 100))
def test_capacity_counts(valid: list[bool], percent: int) -> None:
    """At least one token, at most all, and in whole numbers: 0.29 of 100 is 29."""
    n = sum(valid)
    first = torch.zeros(len(valid), dtype=torch.bool)
    budget = torch.tensor(percent / 100, dtype=torch.float32)
    assert int(capacity(torch.tensor(valid), first, budget)) == min(n, max(1, percent * n // 100))


def test_multiplying_what_the_layer_adds(model_of: Callable[[str], Path]) -> None:
    """Mixture-of-Depths' x + w (attention + MLP), against the layer's own modules."""
    checkpoint = open_checkpoint(model_of("mixture-of-depths"))
    reference = Reference.load(checkpoint)
    ids = torch.tensor([[5, 60, 61, 7, 9]])
    keep_all = RoutedByThreshold(np.full((LAYERS, 2), -np.inf, np.float32))
    states = reference(ids, rule=keep_all).states
    plain = Reference.load(replace(checkpoint, config=replace(checkpoint.config, router=None)))
    # A layer of the plain model on the same input adds attention and MLP unweighted.
    layer = plain.model.model.layers[1]
    added: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, out: added.append(out - args[0]))
    plain(ids)
    hook.remove()
    weight = states[1] @ checkpoint.tensor("model.layers.1.router.weight").T
    weight = weight + checkpoint.tensor("model.layers.1.router.bias")
    torch.testing.assert_close(states[2], states[1] + weight * added[0], atol=1e-5, rtol=1e-5)


REFUSED_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"treshold": 0.5}, "unknown key"),
    "word": ({"output": "argmax"}, "gsx.router.output has an unknown value"),
    "layer": ({"layers": [1, 3]}, "distinct ascending numbers from 0 to 2"),
    "order": ({"layers": [2, 1]}, "distinct ascending"),
    "no layer": ({"layers": []}, "distinct ascending"),
    "range": ({"output": "sigmoid", "threshold": 1.5}, "outside the score's range"),
    "text": ({"threshold": "half"}, "finite number"),
    "branches": ({"branches": ["mlp"]}, "one router for the layer decides both"),
    "reads": ({"decides": "branch", "branches": ["mlp"]}, "known only at the attention branch"),
    "difference": ({"output": "difference", "multiplies": "branch"}, "cannot multiply an output"),
    "adapter": ({"adapter": 8, "multiplies": "layer"}, "cannot be combined with a score"),
    "kv": ({"decides": "branch", "branches": ["mlp"], "reads": "branch", "kv_policy": "none"}, "attention always runs"),
    "norm": ({"net": {"norm": True}}, "needs two layers"),
    "net": ({"net": None}, "is not a section"),
    "width": ({"net": {"hidden": 0}}, "whole number from 1"),
    "first": ({"full_first": -1}, "whole number from 0"),
    "list": ([], "is not a section"),
}


@pytest.mark.parametrize("case", REFUSED_ENTRIES)
def test_refused_entries(case: str) -> None:
    section, message = REFUSED_ENTRIES[case]
    with pytest.raises(CheckpointError, match=message):
        RouterConfig.from_dict(section, LAYERS)


@pytest.mark.parametrize("name", METHODS)
def test_entries_are_read_as_they_are_written(name: str) -> None:
    router = METHODS[name]
    assert RouterConfig.from_dict(json.loads(json.dumps(router.to_dict())), LAYERS) == router
    assert set(router.to_dict()) == set(asdict(router))


def test_missing_and_stray_tensors(tmp_path: Path, model_of: Callable[[str], Path]) -> None:
    path = tmp_path / "model"
    tiny_checkpoint(path, layers=LAYERS, router=METHODS["skipgpt"], tokenizer=True)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.2.mlp_router.out.bias"
    save_file({n: t for n, t in tensors.items() if n != name}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"(?s)routers are incomplete.*{name}"):
        open_checkpoint(path)
    save_file({**tensors, name: torch.tensor([0.0, float("nan")])}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} contains NaN"):
        open_checkpoint(path)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    section = config.pop("gsx")
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has routers that"):
        open_checkpoint(path)
    section["gate"] = GateConfig().to_dict()
    (path / "config.json").write_text(json.dumps({**config, "gsx": section}))
    with pytest.raises(CheckpointError, match="has gates and routers"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (None, {"policy": "router"}, r"(?s)needs routers.*model.layers.\{i\}.router.weight"),
        ("skipgpt", {"policy": "layers"}, "the checkpoint has routers"),
        ("skipgpt", {"policy": "dense"}, "the checkpoint has routers"),
        ("skipgpt", {"policy": "router:0.5"}, "its parameters"),
        ("skipgpt", {"kv_policy": "none"}, "were trained with another"),
        ("flexidepth", {"select": "rank"}, "exclude each other"),
        ("predictor, copy", {"select": "rank"}, "exclude each other"),
    ],
)
def test_refused_exports(
    tmp_path: Path, model_of: Callable[[str], Path], name: str | None, options: dict[str, Any], message: str
) -> None:
    model = model_of(name) if name else tiny_checkpoint(tmp_path / "dense", tokenizer=True)
    with pytest.raises(UsageError, match=message):
        export(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_routers_that_keep_nothing(tmp_path: Path, model_of: Callable[[str], Path], tiny_text: Path) -> None:
    path = tmp_path / "model"
    tiny_checkpoint(path, layers=LAYERS, router=replace(METHODS["skipgpt"], threshold=1e6), tokenizer=True)
    with pytest.raises(GsxError, match="keep nothing of the calibration text"):
        export(path, tmp_path / "out", calibration=tiny_text, calibration_tokens=256)
    assert not (tmp_path / "out").exists()


def test_the_shapes_of_an_entry() -> None:
    shapes = METHODS["flexidepth"].shapes(64)
    assert shapes["router.hidden.weight"] == (8, 64)
    assert shapes["mlp_adapter.down_proj.weight"] == (64, 12)
    assert "router.out.bias" not in shapes
