"""K and V in 8 bits: codes in the fast form, the same values in the portable one, and refused elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gsx.torch_runtime import TorchRuntime
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.building.build import build
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.errors import EngineError
from gsx_engines.lowering.for_onnxruntime.probe import is_supported
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.errors import CheckpointError
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.quantization.kv_cache import int8_kv_cache
from gsx_exporter.text import TokenText
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10. A code changed by rounding would be off by 1e-3.
LOGITS_ATOL = 5e-5


@pytest.fixture(scope="module", params=["gated", "dense", "layers"])
def path(
    request: pytest.FixtureRequest,
    make_tiny_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_text: Path,
) -> Path:
    """K and V written under gates, appended by attention itself, and not written if a layer is left out."""
    if request.param == "gated":
        return make_tiny_bundle(kv_cache="int8")
    directory = tmp_path_factory.mktemp("kv")
    sort = {"family": "mistral", "sliding_window": 6} if request.param == "dense" else {}
    model = tiny_checkpoint(directory / "model", tokenizer=True, **sort)
    options = {} if request.param == "dense" else {"policy": "layers:0"}
    values = {"calibration": tiny_text, "calibration_tokens": 512, **options}
    export(model, directory / "out", kv_cache="int8", **values)
    return directory / "out"


def test_codes_give_what_rounded_values_give(path: Path) -> None:
    """A prefill, chunks and steps on the cache, and a step after it was shortened."""
    bundle = open_bundle(path)
    runners = [WholeRunner(PortableStage(bundle)), WholeRunner(OnnxRuntimeStage(bundle))]
    caches = [runner.new_cache(1, 40) for runner in runners]
    ids = np.random.default_rng(0).integers(3, 250, (1, 32))
    for start, stop in ((0, 9), (9, 10), (10, 17), (12, 15), (15, 32)):
        outputs = []
        for runner, cache in zip(runners, caches, strict=True):
            cache.roll_back([start])
            controls = controls_for(bundle.manifest)
            outputs.append(runner.step(cache, ids[:, start:stop], controls, logits="all"))
        np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=LOGITS_ATOL)
        np.testing.assert_array_equal(outputs[0].kept, outputs[1].kept)


def test_a_step_of_a_batch_is_a_step_of_each(make_tiny_bundle: Callable[..., Path]) -> None:
    runner = open_runner(open_bundle(make_tiny_bundle(kv_cache="int8")))
    controls = controls_for(runner.manifest)
    ids = np.random.default_rng(1).integers(3, 250, (2, 8))
    together = runner.new_cache(2, 8)
    alone = [runner.new_cache(1, 8) for _ in range(2)]
    for part in (slice(0, 6), slice(6, 7), slice(7, 8)):
        found = runner.step(together, ids[:, part], controls, logits="last").logits
        for row, cache in enumerate(alone):
            one = runner.step(cache, ids[row : row + 1, part], controls, logits="last").logits
            np.testing.assert_allclose(found[row], one[0], atol=LOGITS_ATOL)


def test_a_quarter_of_the_memory_and_rounded_a_little(make_tiny_bundle: Callable[..., Path], tiny_bundle: Path) -> None:
    ids = np.random.default_rng(0).integers(3, 250, (1, 24))
    logits, sizes = [], []
    for path in (tiny_bundle, make_tiny_bundle(kv_cache="int8")):
        stage = OnnxRuntimeStage(open_bundle(path))
        runner = WholeRunner(stage)
        everything = controls_for(runner.manifest, KeepSettings(budget=1.0))  # nothing can flip
        logits.append(runner.step(runner.new_cache(1, 24), ids, everything, logits="all").logits)
        sizes.append(sum(cache.nbytes for cache in stage.new_memory(1, 24).caches.values()))
    assert sizes[0] == 4 * sizes[1]
    error = np.abs(logits[0] - logits[1]).max() / np.abs(logits[0]).max()
    assert 1e-4 < error < 0.1, "8 bits round, and do not ruin"


def test_the_largest_value_seen_has_the_largest_code(tiny_gated: Path) -> None:
    """In the first layer, whose values are the projection of normed embeddings whatever is skipped."""
    checkpoint = open_checkpoint(tiny_gated)
    text = TokenText(np.random.default_rng(0).integers(3, 97, (2, 16)), "0" * 64, "random ids")
    found = int8_kv_cache(checkpoint, text, {}, DecoderOptions())
    state = checkpoint.tensor("model.embed_tokens.weight").float()[torch.from_numpy(text.ids)]
    normed = state / (state.square().mean(-1, keepdim=True) + checkpoint.config.rms_norm_eps).sqrt()
    normed = normed * checkpoint.tensor("model.layers.0.input_layernorm.weight").float()
    values = normed @ checkpoint.tensor("model.layers.0.self_attn.v_proj.weight").float().T
    heads = values.view(-1, checkpoint.config.num_kv_heads, checkpoint.config.head_dim).abs().amax(dim=(0, 2))
    np.testing.assert_allclose(found.scales[0][1], heads / 127, rtol=1e-5)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_checkpoint(tmp_path / "model", gate=GateConfig())
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    text = TokenText(np.full((1, 8), 5), "0" * 64, "one id")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn: a value is not finite"):
        int8_kv_cache(open_checkpoint(model), text, {}, DecoderOptions())


def test_this_onnxruntime_has_attention_over_codes() -> None:
    assert is_supported(16, eight_bits=True)
    assert not is_supported(12, eight_bits=True)


@pytest.mark.parametrize(
    ("options", "found"),
    [({"precision": "fp16"}, "fp16"), ({"quantize": Quantize("fp8")}, "fp8")],
    ids=["half precision", "fp8"],
)
def test_export_refuses(options: dict[str, Any], found: str, tiny_gated: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"--kv-cache int8: ONNX Runtime combines codes.*\n.*, found {found}\n"):
        export(tiny_gated, tmp_path / "out", kv_cache="int8", **options)
    assert not (tmp_path / "out").exists()


def test_other_runtimes_refuse(make_tiny_bundle: Callable[..., Path]) -> None:
    bundle = open_bundle(make_tiny_bundle(kv_cache="int8"))
    with pytest.raises(EngineError, match=r"keeps K and V in the type of the activations\n.*--kv-cache int8"):
        open_runner(bundle, backend=TorchRuntime("cpu"))
    with pytest.raises(UsageError, match=r"only supports 16- and 32-bit floats\n.*--kv-cache int8"):
        build(bundle, backend="tensorrt-rtx")


def test_a_manifest_without_a_scale_for_each_head(make_tiny_bundle: Callable[..., Path]) -> None:
    bundle: Bundle = open_bundle(make_tiny_bundle(kv_cache="int8"))
    values = bundle.manifest.model_dump(mode="json")
    values["kv_cache"]["scales"] = values["kv_cache"]["scales"][:-1]
    with pytest.raises(ValidationError, match="does not have one scale for each K/V head"):
        Manifest.model_validate(values)
