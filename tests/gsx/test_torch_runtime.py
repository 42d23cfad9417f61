"""`--backend torch`: the traced decoder in PyTorch, on a bundle's weights, against ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gsx.backends import open_backend
from gsx.torch_runtime import TorchRuntime
from gsx.workflows.export import export
from gsx.workflows.generate import generate as generate_text
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import controls_for
from gsx_engines.bundle.manifest import Quantization
from gsx_engines.errors import BundleError, EngineError
from gsx_engines.generation.generate import generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.speculation.draft import open_draft
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10; halves round every product to 11 bits.
LOGITS_ATOL = {"fp32": 5e-5, "fp16": 5e-2}
# Products rounded to 8 bits in 3 layers, at logits of order 10.
BF16_ATOL = 0.3
PROMPTS = ([5, 60, 61, 7, 8, 9, 200, 11], [61, 7], [5, 60, 61, 7, 8, 9, 200, 11, 30, 31, 32])
CAPACITY = 160


@dataclass(frozen=True)
class Case:
    """A bundle of the gated tiny model, or of another one.

    Args:
        options: of the export.
        model: a tiny model instead of the gated one.
    """

    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None


CASES = {
    "threshold": Case(),
    "threshold, fp16": Case({"precision": "fp16"}),
    "copy, split": Case({"kv_policy": "copy", "budget": 0.5, "draft": "exit:1"}),
    "rank": Case({"select": "rank", "calibration": None}),
    "dense, sliding window": Case(model={"family": "mistral", "sliding_window": 6}),
    "looped, copy": Case(
        {"policy": "loops:3,default=2", "kv_policy": "copy"}, {"family": "dory", "layers": 4, "n_output_layers": 1}
    ),
    "looped, rejoining": Case({"policy": "loops:2"}, {"family": "ouro"}),
    "a set of layers": Case({"policy": "layers:0,2.mlp"}, {"family": "llama"}),
    "mlp alone, tied head": Case(
        {"budget": 0.6}, {"family": "qwen3", "tied": True, "gate": GateConfig("scalar", "pre_norm", ("mlp",))}
    ),
    "norms around branches, soft caps": Case({"budget": 0.6}, {"family": "gemma2", "gate": GateConfig("scalar")}),
    "norms behind branches": Case({"budget": 0.6}, {"family": "olmo3", "gate": GateConfig("vector")}),
    "routed experts": Case({"budget": 0.6}, {"family": "qwen3_moe", "gate": GateConfig("scalar")}),
    "fused tensors": Case(model={"family": "phi3"}),
}


@pytest.fixture(scope="module", params=CASES)
def bundle(
    request: pytest.FixtureRequest,
    make_tiny_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_text: Path,
) -> Bundle:
    case = CASES[request.param]
    if case.model is None:
        return open_bundle(make_tiny_bundle(**case.options))
    directory = tmp_path_factory.mktemp("torch")
    checkpoint = tiny_checkpoint(directory / "model", tokenizer=True, **case.model)
    text = {"calibration": tiny_text} if "budget" in case.options else {}
    return export(checkpoint, directory / "out", **text, **case.options)


def both(bundle: Bundle) -> tuple[Runner, Runner]:
    """The portable graph on ONNX Runtime, and PyTorch."""
    return WholeRunner(PortableStage(bundle)), open_runner(bundle, backend=TorchRuntime("cpu"))


@pytest.mark.parametrize("batch", [1, 3])
def test_logits_and_choices_equal_portable_ones(bundle: Bundle, batch: int) -> None:
    """Prefill, chunks and single tokens, another number for each sequence; and steps after a roll-back."""
    runners = both(bundle)
    caches = [runner.new_cache(batch, CAPACITY) for runner in runners]
    controls = controls_for(bundle.manifest)
    rng = np.random.default_rng(0)
    for size, back in ((9, None), (1, None), (7, None), (1, 12), (3, None), (60, None), (1, None)):
        ids = rng.integers(3, 90, (batch, size))
        counts = [max(size - row, 0) for row in range(batch)]  # the last ones have less to do, or nothing
        outputs = []
        for runner, cache in zip(runners, caches, strict=True):
            outputs.append(runner.step(cache, ids, controls, counts=counts, logits="all" if size > 1 else "last"))
            if back is not None:
                cache.roll_back([back] * batch)
        assert outputs[1].logits.dtype == np.float32
        for row, count in enumerate(counts):
            np.testing.assert_allclose(
                outputs[1].logits[row, :count],
                outputs[0].logits[row, :count],
                atol=LOGITS_ATOL[bundle.manifest.precision],
            )
        if bundle.manifest.precision == "fp32":  # in halves a score beside the threshold may fall on its other side
            np.testing.assert_array_equal(outputs[1].kept, outputs[0].kept)
        assert outputs[1].gated_rows == outputs[0].gated_rows


def test_greedy_text_is_onnx_runtimes(bundle: Bundle) -> None:
    if bundle.manifest.precision != "fp32":
        pytest.skip("in halves a near tie may fall to the other token")
    found = [generate(runner, PROMPTS, max_new_tokens=40) for runner in both(bundle)]
    assert found[0].sequences == found[1].sequences
    assert found[0].stats.kept_share == found[1].stats.kept_share


@pytest.mark.parametrize("batch", [1, 3])
def test_draft_and_verify_write_the_same_text(make_tiny_bundle: Callable[..., Path], batch: int) -> None:
    """Both halves, with K and V of the exit's layer passing over; their weights are in memory once."""
    bundle = open_bundle(make_tiny_bundle(**CASES["copy, split"].options))
    runtime = TorchRuntime("cpu")
    assert bundle.manifest.draft is not None
    draft = open_draft(bundle, bundle.manifest.draft.draft, backend=runtime)
    plain = generate(both(bundle)[0], PROMPTS[:batch], max_new_tokens=40)
    found = generate(draft.runner, PROMPTS[:batch], max_new_tokens=40, draft=draft, draft_length=3)
    assert found.sequences == plain.sequences
    assert found.stats.tokens_per_verification is not None


def test_bfloat16_runs_on_a_cpu(make_tiny_bundle: Callable[..., Path]) -> None:
    """ONNX Runtime has no such products; nothing is skipped here, so that no choice can fall to its other side."""
    ids = np.array([PROMPTS[0]])
    keep_all = {"thresholds": np.full((1, 3, 2), -np.inf, np.float32)}
    outputs = []
    for options in ({}, {"precision": "bf16"}):
        runner = open_runner(open_bundle(make_tiny_bundle(**options)), backend=TorchRuntime("cpu"))
        outputs.append(runner.step(runner.new_cache(1, 16), ids, keep_all, logits="all").logits)
    np.testing.assert_allclose(outputs[1], outputs[0], atol=BF16_ATOL)
    assert not np.allclose(outputs[1], outputs[0], atol=LOGITS_ATOL["fp32"])


def test_the_public_function(tiny_bundle: Path) -> None:
    plain, found = (
        generate_text(tiny_bundle, ids=PROMPTS[0], max_new_tokens=12, budget=0.5, backend=backend, threads=1)
        for backend in ("onnxruntime", "torch")
    )
    assert found.ids == plain.ids
    assert found.stats.kept_share == plain.stats.kept_share


def test_refusals(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"--device is only for --backend torch\n  found --backend onnxruntime"):
        open_backend("onnxruntime", "cpu")
    bundle = open_bundle(tiny_bundle)
    eight = Quantization(scheme="int8", smoothing=0.0, products=1, kept_high=(), budget=None, calibration=None)
    quantized = Bundle(tiny_bundle, bundle.manifest.model_copy(update={"quantization": eight}))
    with pytest.raises(EngineError, match=r"no 8-bit products\n.*found int8\n.*without --backend torch"):
        open_runner(quantized, backend=TorchRuntime("cpu"))
    with pytest.raises(BundleError, match="has no graph 'draft'"):
        TorchRuntime("cpu").stage(bundle, "draft")
    monkeypatch.setattr("gsx.backends.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"is not installed\n.*found no torch and no transformers\n.*gsx\[export\]"):
        open_backend("torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"PyTorch sees no GPU here\n  expected an NVIDIA GPU.*\n  use --device cpu"):
        open_backend("torch", "cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"max_position_embeddings": 256},
            r"config.json does not match gsx.json\n  expected max_positions 512, found 256\n.*restore",
        ),
        ({"gsx": {"gate": {"input": "pre_norm"}}}, r"does not match gsx.json\n  expected gates .*post_norm.*pre_norm"),
        (
            {"intermediate_size": 64},
            r"weight layers.0.mlp.gate_proj.weight does not fit.*\n  expected \[64, 64\] float32",
        ),
        (
            {"attention_bias": True},
            r"weight layers.0.self_attn.q_proj.bias does not fit config.json\n.*found no such tensor",
        ),
    ],
)
def test_a_configuration_that_was_edited(
    tiny_bundle: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    directory = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BundleError, match=message):
        open_runner(open_bundle(directory), backend=TorchRuntime("cpu"))


@pytest.mark.gpu
def test_on_a_gpu(bundle: Bundle) -> None:
    """The same text with the kernels; in halves, as many tokens."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU: run this on a machine with an NVIDIA GPU, nvcc and PyTorch with CUDA")
    plain = generate(both(bundle)[0], PROMPTS, max_new_tokens=40)
    found = generate(open_runner(bundle, backend=TorchRuntime("cuda")), PROMPTS, max_new_tokens=40)
    if bundle.manifest.precision == "fp32":
        assert found.sequences == plain.sequences
    assert [len(one.tokens) for one in found.sequences] == [len(one.tokens) for one in plain.sequences]
