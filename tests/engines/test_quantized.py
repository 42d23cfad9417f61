"""Running quantized bundles: the fast form computes what the portable one does, and actually in 8 bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from gsx.parity.measure import EngineSide, runner_logits
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.lowering.for_onnxruntime import quantized
from gsx_engines.lowering.for_onnxruntime.probe import products_saturate
from gsx_engines.lowering.for_onnxruntime.quantized import fuse_products
from gsx_engines.lowering.onnxruntime import lower
from gsx_engines.runners import session
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.session import session_config
from gsx_plugins.graph import Graph
from tests.tiny import tiny_checkpoint

# Only weights are rounded, to the same codes; ONNX Runtime rounds inputs of its products in blocks.
WEIGHTS_TOLERANCE = 0.05


@pytest.fixture(
    scope="module",
    params=["int8", "int8-weights", "int4", "fp8"],
)
def bundle(request: pytest.FixtureRequest, make_tiny_bundle: Callable[..., Path]) -> Path:
    return make_tiny_bundle(quantize=Quantize(request.param, ("none",)))


def test_both_runners_agree_and_differ_from_full_precision(bundle: Path, tiny_bundle: Path) -> None:
    eight, full = open_bundle(bundle), open_bundle(tiny_bundle)
    ids = np.random.default_rng(0).integers(3, 259, (1, 24))
    assert full.manifest.selection is not None
    controls = controls_for(full.manifest, KeepSettings(budget=1.0))  # all kept: nothing can flip
    portable = EngineSide(eight).observe(ids, np.ones_like(ids), controls)[0].logits
    fast, kept = runner_logits(open_runner(eight), ids, controls)
    exact, _ = runner_logits(open_runner(full), ids, controls)
    assert kept is not None
    assert (kept == ids.size).all()
    scale = np.abs(exact).max()
    assert eight.manifest.quantization is not None
    scheme = eight.manifest.quantization.scheme
    if scheme == "int8":  # the fast runner has a scale for each row, the graph one for all
        assert np.square(fast - exact).mean() < np.square(portable - exact[0]).mean()
    else:
        assert np.abs(fast[0] - portable).max() < WEIGHTS_TOLERANCE * scale
    for logits in (fast[0], portable):
        error = np.abs(logits - exact[0]).max() / scale
        # Random weights have no redundancy: a sixteenth of the codes leaves more than half of them off.
        assert 1e-3 < error < (1.0 if scheme == "int4" else 0.5), "few bits round, and do not ruin"


def test_int8_with_half_precision_activations(make_tiny_bundle: Callable[..., Path]) -> None:
    """Scales and activations are rounded to 11 bits: as far from full precision as with float32 and the same codes."""
    ids = np.random.default_rng(0).integers(3, 259, (1, 24))
    eight = Quantize("int8", ("none",))
    bundles = [make_tiny_bundle(**o) for o in ({}, {"quantize": eight}, {"quantize": eight, "precision": "fp16"})]
    selection = open_bundle(bundles[0]).manifest.selection
    assert selection is not None
    controls = {"thresholds": selection.thresholds_for(1.0)[None]}
    exact, single, half = (
        EngineSide(open_bundle(one)).observe(ids, np.ones_like(ids), controls)[0].logits.astype(np.float32)
        for one in bundles
    )
    assert np.square(half - exact).mean() < 1.5 * np.square(single - exact).mean()  # 4,000 places, each off by chance
    assert not np.array_equal(half, single)


def test_int8_products_are_inside_the_branches(make_tiny_bundle: Callable[..., Path]) -> None:
    """Lowered: one uint8 by int8 product each, those of kept rows inside the `If`, with their quantization."""
    bundle = open_bundle(make_tiny_bundle(quantize=Quantize("int8", ("none",))))
    portable = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    layers = bundle.manifest.decoder.num_layers
    body = lower(portable, bundle.manifest, range(layers)).body.graph
    inside: Counter[str] = Counter()
    for node in body.node:
        for attribute in node.attribute:
            if attribute.name == "then_branch":
                inside.update(one.op_type for one in attribute.g.node)
    outside = Counter(node.op_type for node in body.node)
    assert inside["MatMulIntegerToFloat"] == 5 * layers, "Q, output and the three of the MLP"
    assert inside["QuantizeLinear"] == inside["ReduceMax"] == 4 * layers, "gate and up share one"
    assert outside["MatMulIntegerToFloat"] == layers, "K and V are one product, computed for all"
    assert outside["QuantizeLinear"] == layers
    assert (inside["DequantizeLinear"], outside["DequantizeLinear"]) == (0, 1), "rows of the embedding alone"


def test_other_products_are_left_alone(tiny_bundle: Path, make_tiny_bundle: Callable[..., Path]) -> None:
    for path in (tiny_bundle, make_tiny_bundle(quantize=Quantize("int8-weights", ("none",)))):
        graph = onnx.load(str(path / "model.onnx"), load_external_data=False).graph
        before = graph.SerializeToString()
        kit = Graph(graph)
        assert fuse_products(kit) == 0
        kit.store()
        assert graph.SerializeToString() == before


def test_the_manifest_says_what_is_quantized(bundle: Path) -> None:
    manifest = open_bundle(bundle).manifest
    entry = manifest.quantization
    assert entry is not None
    assert not entry.kept_high
    assert entry.products == 7 * manifest.decoder.num_layers + 1, "all but the gates, and the head"
    odd = [f"layers.{n}.mlp.down_proj" for n in range(manifest.decoder.num_layers)]  # its input is no 32s of channels
    assert list(entry.weights_only) == (odd if entry.scheme == "int4" else [])
    assert (entry.calibration is None) == (entry.scheme == "int8-weights")
    assert entry.budget == (0.7 if entry.scheme in ("int8", "fp8") else None)
    assert ("session.disable_quant_qdq" in session_config(manifest, lowered=True)) == (entry.scheme == "fp8")


@pytest.mark.parametrize("saturates", [False, True])
def test_products_that_saturate_have_unsigned_weights(
    make_tiny_bundle: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, saturates: bool
) -> None:
    """Both forms are made on any CPU; the unsigned one computes the same numbers, the other one where it is right."""
    bundle = open_bundle(make_tiny_bundle(quantize=Quantize("int8", ("none",))))
    ids = np.random.default_rng(0).integers(3, 259, (1, 24))
    controls = controls_for(bundle.manifest, KeepSettings(budget=1.0))
    wanted, _ = runner_logits(open_runner(bundle), ids, controls)  # in the form that is right on this machine
    usable = saturates or not products_saturate()
    for module in (quantized, session):
        monkeypatch.setattr(module, "products_saturate", lambda: saturates)
    layers = bundle.manifest.decoder.num_layers
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    assert lower(model, bundle.manifest, range(layers)).counts["unsigned_codes"] == (7 * layers if saturates else 0)
    assert ("session.disable_quant_qdq" in session_config(bundle.manifest)) == saturates
    if usable:
        fast, _ = runner_logits(open_runner(bundle), ids, controls)
        np.testing.assert_allclose(fast, wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_token_has_the_same_numbers_whatever_is_beside_it(make_tiny_bundle: Callable[..., Path]) -> None:
    """The scale of a row depends on nothing but the row: a call of many tokens, and one by one, give the same."""
    bundle = open_bundle(make_tiny_bundle(quantize=Quantize("int8", ("none",))))
    controls = controls_for(bundle.manifest, KeepSettings(budget=1.0))
    ids = np.random.default_rng(0).integers(3, 259, (1, 12))
    runner = open_runner(bundle)
    whole = runner.step(runner.new_cache(1, 16), ids, controls, logits="all").logits[0]
    cache = runner.new_cache(1, 16)
    single = [runner.step(cache, ids[:, n : n + 1], controls, logits="all").logits[0, 0] for n in range(ids.shape[1])]
    # Attention sums in another order; an input halfway between two codes may go either way by it.
    assert np.square(whole - np.array(single)).mean() < 1e-4 * np.square(whole).mean()


def test_a_shared_table_is_one_product_in_8_bits(tmp_path: Path, tiny_text: Path) -> None:
    """The head reads the embedding's codes as they are stored; a width that is no whole number of blocks is padded."""
    width = 40
    model = tiny_checkpoint(tmp_path / "m", layers=1, hidden=width, tied=True, tokenizer=True)
    bundle = export(model, tmp_path / "out", quantize=Quantize("int8-weights", ("none",)), calibration=tiny_text)
    portable = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    head = lower(portable, bundle.manifest, range(1)).head
    (product,) = [node for node in head.graph.node if node.op_type == "MatMulNBits"]
    form = {attribute.name: attribute.i for attribute in product.attribute}
    assert (form["K"], form["N"], form["bits"], form["block_size"]) == (
        width,
        bundle.manifest.decoder.vocab_size,
        8,
        32,
    )
    assert "DequantizeLinear" not in {node.op_type for node in head.graph.node}
    ids = np.random.default_rng(0).integers(3, 259, (1, 24))
    exact = EngineSide(bundle).observe(ids, np.ones_like(ids), {})[0].logits
    fast, _ = runner_logits(open_runner(bundle), ids, {})
    assert np.abs(fast[0] - exact).max() < WEIGHTS_TOLERANCE * np.abs(exact).max()
