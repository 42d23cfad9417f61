"""Looped models in 8 and 4 bits: one set of codes for a layer, measured and chosen over all its visits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from gsx.parity.tolerances import TOLERANCES
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.session import session_config
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.quantization.choose import choose_codes
from gsx_exporter.quantization.chosen import ChosenCodes
from gsx_exporter.quantization.linear import quantize_layer
from gsx_exporter.quantization.plan import make_plan, matrices_of
from gsx_exporter.quantization.scheme import SCHEMES, SchemeName
from gsx_exporter.quantization.watch import statistics
from gsx_exporter.rules.loops.traced import LoopCount
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10.
ATOL = 1e-3


@pytest.fixture(scope="module", params=["dory", "ouro"])
def looped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys: dict[str, Any] = {"layers": 2} if request.param == "ouro" else {"layers": 4, "n_output_layers": 1}
    return tiny_checkpoint(tmp_path_factory.mktemp("looped") / "model", request.param, tokenizer=True, **keys)


def test_a_layer_is_measured_in_every_loop(looped: Path) -> None:
    checkpoint, ids = open_checkpoint(looped), np.random.default_rng(0).integers(3, 250, (2, 16))
    assert checkpoint.config.loops is not None
    options = DecoderOptions(LoopCount(checkpoint.config.loops), "none")
    points = [{"loops": np.array([count])} for count in (1, 2, 3)]
    found = [one.inputs for one in statistics(checkpoint, ids, points, options, text_sha256="")]
    assert set(found[0]) < set(matrices_of(checkpoint.config))
    assert {name.split(".")[1] for name in found[0]} == {str(n) for n in range(checkpoint.config.stored_layers)}
    for fewer, more in itertools.pairwise(found):
        larger = [name for name in more if (more[name] > fewer[name]).any()]
        assert larger, "later loops have larger inputs somewhere"
        if checkpoint.config.loops.after == 0:  # else the layers after the loop read other states
            assert all((more[name] >= fewer[name]).all() for name in more)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_codes_are_chosen_once_for_all_visits(looped: Path, tmp_path: Path, scheme: SchemeName) -> None:
    """And for what all of them read: with as many tokens, later loops count in the loss."""
    checkpoint, ids = open_checkpoint(looped), np.random.default_rng(0).integers(3, 250, (2, 16))
    loops = checkpoint.config.loops
    assert loops is not None
    options, every = DecoderOptions(LoopCount(loops), "none"), {"loops": np.array([loops.most])}
    found = statistics(checkpoint, ids, [every], options, text_sha256="")[0]
    losses, codes = [], []
    for count in (1, loops.most):
        folder = tmp_path / str(count)
        folder.mkdir()
        plan = make_plan(checkpoint, SCHEMES[scheme], found, ChosenCodes(folder))
        losses.append(choose_codes(plan, ids, {"loops": np.array([count])}, options))
        assert not list(folder.glob("*.npy")), "what waited is gone"
        name = f"layers.{loops.before}.mlp.down_proj"
        chosen = plan.chosen.find(name, plan.matrices[name].format)
        assert chosen is not None
        codes.append(chosen.codes)
    assert set(losses[0]) == set(losses[1]) == set(found.inputs)
    assert not torch.equal(*codes)
    with torch.inference_mode():  # and every visit of a layer computes with them
        walk = Walk(plan.checkpoint, ids, options)
        first, again = (walk.layer(number) for number in (loops.before, loops.before + loops.looped))
        for number, layer in ((loops.before, first), (loops.before + loops.looped, again)):
            quantize_layer(layer, number, plan)
        assert torch.equal(first.mlp.down_proj.weight, again.mlp.down_proj.weight)


def step(bundle: Bundle, stage: Any) -> np.ndarray:
    """Logits of two prompts with numbers of loops of their own, and of a token after each."""
    runner = WholeRunner(stage(bundle))
    ids, cache = np.random.default_rng(0).integers(3, 250, (2, 12)), runner.new_cache(2, 16)
    controls = controls_for(bundle.manifest, [KeepSettings(loops=count) for count in (3, 2)])
    outputs = [runner.step(cache, part, controls, logits="all").logits for part in (ids, ids[:, :1])]
    return np.concatenate(outputs, axis=1)


@pytest.mark.parametrize(
    ("looped", "scheme"), [("dory", "int4"), ("dory", "fp8"), ("ouro", "int8")], indirect=["looped"]
)
def test_a_bundle(looped: Path, tmp_path: Path, scheme: SchemeName) -> None:
    """Weights are stored once; the fast form computes what the portable graph says."""
    made = export(
        looped, tmp_path / scheme, quantize=Quantize(scheme, keep_precision=("none",)), calibration_tokens=256
    )
    assert made.manifest.quantization is not None
    assert made.manifest.quantization.products == len(matrices_of(open_checkpoint(looped).config)) - 1
    graph = onnx.load(str(made.graph_path("model")), load_external_data=False).graph
    codes = {one.name for one in graph.initializer if one.name.endswith("proj.weight")}
    layers = open_checkpoint(looped).config.stored_layers
    assert {name.split(".")[1] for name in codes} == {str(n) for n in range(layers)}
    # Without packing, products of codes dequantize their weights in every step.
    assert "session.disable_prepacking" not in session_config(made.manifest, lowered=True)
    portable, fast = step(made, PortableStage), step(made, OnnxRuntimeStage)
    if scheme in ("int8", "int4"):  # the fast form rounds rows to 8 bits, with scales of their own
        agree = (portable.argmax(-1) == fast.argmax(-1)).mean()
        assert agree > 0.5
        if scheme == "int4":  # the limit between the two runners (gsx/parity/tolerances.py)
            limit = TOLERANCES["quantized"].runners
            assert limit is not None
            assert np.square(fast - portable).mean() <= limit**2 * np.square(portable).mean()
    else:
        np.testing.assert_allclose(fast, portable, atol=ATOL)
