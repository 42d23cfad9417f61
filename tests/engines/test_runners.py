"""The lowered runner against the portable one, and the decoding loop over both, on real exported bundles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gsx.workflows.export import export
from gsx_engines.bundle.bundle import MANIFEST, open_bundle, sha256_of
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, controls_for
from gsx_engines.errors import BundleError
from gsx_engines.generation.generate import Generation, generate
from gsx_engines.lowering.for_onnxruntime.probe import is_supported
from gsx_engines.lowering.for_onnxruntime.regions import find_regions
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import Sampling
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import UsageError
from gsx_plugins.graph import Graph
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
PROMPT = [5, 60, 61, 7, 8, 9, 200, 11]

BUNDLES = {
    "vector, both branches": ({"gate": GateConfig()}, {"budget": 0.6}),
    "dense": ({}, {}),
    "dense, sliding window": ({"family": "mistral", "sliding_window": 6}, {}),
    "sliding window, copy": (
        {"family": "mistral", "gate": GateConfig("scalar", "pre_norm"), "sliding_window": 6},
        {"budget": 0.5, "kv_policy": "copy"},
    ),
    "attention alone": ({"family": "qwen3", "gate": GateConfig(branches=("attn",))}, {"budget": 0.5}),
    "rank": ({"gate": GateConfig()}, {"budget": 0.5, "select": "rank"}),
}


@pytest.fixture(scope="module", params=BUNDLES)
def bundle_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Path:
    model, options = BUNDLES[request.param]
    directory = tmp_path_factory.mktemp("runners")
    checkpoint = tiny_checkpoint(directory / "model", tokenizer=True, **model)
    if "gate" in model and "select" not in options:
        options = options | {"calibration": tiny_text}
    export(checkpoint, directory / "out", **options)
    return directory / "out"


def both(path: Path) -> tuple[WholeRunner, WholeRunner]:
    bundle = open_bundle(path)
    return WholeRunner(PortableStage(bundle)), WholeRunner(OnnxRuntimeStage(bundle))


def test_this_onnxruntime_is_lowered_for() -> None:
    assert is_supported(16)
    assert not is_supported(12), "ONNX Runtime wants head sizes that are multiples of 8"


def test_lowered_logits_and_choices_equal_portable_ones(bundle_path: Path) -> None:
    """One prefill, then chunks of several sizes on the cache, then a step after the cache was shortened."""
    runners = both(bundle_path)
    caches = [runner.new_cache(1, 40) for runner in runners]
    controls = controls_for(runners[0].manifest)
    ids = np.random.default_rng(0).integers(3, 250, (1, 32))
    for start, stop in ((0, 9), (9, 10), (10, 17), (17, 18), (12, 15), (15, 32)):
        outputs = []
        for runner, cache in zip(runners, caches, strict=True):
            cache.roll_back([start])
            outputs.append(runner.step(cache, ids[:, start:stop], controls, logits="all"))
        np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=LOGITS_ATOL)
        if outputs[0].kept is not None:
            np.testing.assert_array_equal(outputs[0].kept, outputs[1].kept)


def test_last_logits_are_the_last_of_all(bundle_path: Path) -> None:
    _, runner = both(bundle_path)
    controls = controls_for(runner.manifest)
    ids = np.array([PROMPT])
    every = runner.step(runner.new_cache(1, 16), ids, controls, logits="all").logits
    last = runner.step(runner.new_cache(1, 16), ids, controls).logits
    assert last.shape[1] == 1
    np.testing.assert_allclose(last[:, 0], every[:, -1], atol=LOGITS_ATOL)


def test_greedy_tokens_are_equal(bundle_path: Path) -> None:
    portable, lowered = both(bundle_path)
    found = [generate(r, [PROMPT], max_new_tokens=80) for r in (portable, lowered)]
    assert found[0].sequences == found[1].sequences
    assert found[0].stats.kept_rows == found[1].stats.kept_rows


def test_a_batch_equals_its_members(bundle_path: Path) -> None:
    """Padding and other sequences change nothing; with rank selection, which depends on the whole call, at budget 1."""
    _, runner = both(bundle_path)
    budget = 1.0 if ranks(runner) else None
    prompts = [PROMPT, PROMPT[2:4], [*PROMPT, 30, 31, 32]]
    alone = [
        generate(runner, [prompt], max_new_tokens=30, keep=KeepSettings(budget=budget)).sequences[0]
        for prompt in prompts
    ]
    assert generate(runner, prompts, max_new_tokens=30, keep=KeepSettings(budget=budget)).sequences == alone


def test_steps_of_a_batch_equal_portable_ones(bundle_path: Path) -> None:
    """Prompts enter one by one into their own rows, then rows step together: all, only neighbours, distant rows.

    Kept rows are reported by sequence. In between, a sequence without its last token replaces another, and continues.
    """
    portable, lowered = both(bundle_path)
    controls = controls_for(lowered.manifest, KeepSettings(budget=1.0) if ranks(lowered) else AS_EXPORTED)
    rng = np.random.default_rng(3)
    caches = [runner.new_cache(4, 40) for runner in (portable, lowered)]
    calls = [[5, 0, 0, 0], [0, 0, 9, 0], [0, 2, 0, 0], [0, 0, 0, 7], [1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]]
    for counts in [*calls, None, [1, 1, 1, 0], [1, 0, 3, 0]]:
        if counts is None:
            for runner, cache in zip((portable, lowered), caches, strict=True):
                runner.copy(cache, 3, 1, cache.lengths[3] - 1)
            assert caches[0].lengths == caches[1].lengths
            assert caches[1].lengths[1] == caches[1].lengths[3] - 1
            continue
        ids = rng.integers(3, 97, (4, max(counts)))
        outputs = [
            runner.step(cache, ids, controls, counts=counts)
            for runner, cache in zip((portable, lowered), caches, strict=True)
        ]
        rows = np.flatnonzero(counts)
        np.testing.assert_allclose(outputs[0].logits[rows], outputs[1].logits[rows], atol=LOGITS_ATOL)
        assert outputs[0].gated_rows == outputs[1].gated_rows
        if outputs[0].kept is not None:
            np.testing.assert_array_equal(outputs[0].kept, outputs[1].kept)
            if not ranks(lowered):
                assert outputs[1].kept_by_sequence is not None
                assert outputs[1].kept_by_sequence.sum() == outputs[1].kept.sum()
                assert not outputs[1].kept_by_sequence[np.equal(counts, 0)].any()


def ranks(runner: WholeRunner) -> bool:
    return runner.manifest.selection is not None and runner.manifest.selection.mode == "rank"


def test_every_branch_is_left_out_when_nothing_is_kept(tiny_bundle: Path) -> None:
    """At a threshold above every score no branch runs, and the logits are those of the embeddings by themselves."""
    bundle = open_bundle(tiny_bundle)
    above = np.full((1, 3, 2), 2.0, np.float32)
    outputs = []
    for stage in (PortableStage(bundle), OnnxRuntimeStage(bundle)):
        runner = WholeRunner(stage)
        outputs.append(runner.step(runner.new_cache(1, 8), np.array([[5]]), {"thresholds": above}))
        assert outputs[-1].kept is not None
        assert outputs[-1].kept.sum() == 0
    np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=LOGITS_ATOL)


def test_thresholds_without_bounds_and_tokens_that_must_run(tiny_bundle: Path) -> None:
    """End-of-text runs whatever its score, unless a threshold is infinite; both runners decide alike."""
    bundle = open_bundle(tiny_bundle)
    end = bundle.manifest.decoder.eos_ids[0]
    thresholds = np.array([[[np.inf, -np.inf], [2.0, 0.5], [0.5, np.inf]]], np.float32)
    kept = []
    for stage in (PortableStage(bundle), OnnxRuntimeStage(bundle)):
        runner = WholeRunner(stage)
        output = runner.step(runner.new_cache(1, 8), np.array([[5, end, 9, end]]), {"thresholds": thresholds})
        assert output.kept is not None
        kept.append(output.kept)
    np.testing.assert_array_equal(kept[0], kept[1])
    assert kept[1][:2].tolist()[0] == [0, 4]
    assert kept[1][1, 0] == 2, "the two that end a text"


def test_regions_hold_the_projections(tiny_bundle: Path) -> None:
    graph = onnx.load(str(tiny_bundle / "model.onnx"), load_external_data=False).graph
    regions = find_regions(Graph(graph))
    assert len(regions) == 6
    for attention, mlp in zip(regions[::2], regions[1::2], strict=True):
        assert sum(node.op_type == "MatMul" for node in attention.nodes) == 2  # q and o; K and V are for all tokens
        assert sum(node.op_type == "MatMul" for node in mlp.nodes) == 3


def test_copy_policy_computes_k_and_v_only_of_kept_rows(tmp_path: Path, tiny_gated: Path, tiny_text: Path) -> None:
    export(tiny_gated, tmp_path / "out", budget=0.5, kv_policy="copy", calibration=tiny_text)
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    rows = {name for node in graph.node if node.op_type == "ThresholdGather" for name in node.output[:1]}
    for layer in (1, 2):
        reads = {n.input[0]: n for n in graph.node if n.op_type == "MatMul" and f"layers.{layer}." in n.input[1]}
        values = next(n for n in graph.node if n.op_type == "MatMul" and f"layers.{layer}.self_attn.v" in n.input[1])
        assert values.input[0] in rows, "V of skipped rows is copied from below, not computed"
        assert reads


def run(path: Path, **options: object) -> Generation:
    return generate(open_runner(open_bundle(path)), [PROMPT], **{"max_new_tokens": 12, **options})


def test_generation_ends(tiny_bundle: Path) -> None:
    free = run(tiny_bundle)
    tokens = free.sequences[0].tokens
    assert len(tokens) == 12
    assert free.sequences[0].finish == "length"
    stopped = run(tiny_bundle, stop_ids=[tokens[4]]).sequences[0]
    assert stopped.tokens == tokens[: tokens.index(tokens[4]) + 1]
    assert stopped.finish == "end-of-text"
    seen: list[int] = []
    called = run(tiny_bundle, on_token=lambda row, token: bool(seen.append(token)) or len(seen) == 3).sequences[0]
    assert (called.tokens, called.finish) == (tokens[:3], "stopped")


def test_budget_changes_at_run_time(tiny_bundle: Path) -> None:
    shares = [
        run(tiny_bundle, max_new_tokens=60, keep=KeepSettings(budget=b)).stats.kept_share for b in (1.0, 0.85, 0.5)
    ]
    assert shares[0] == 1.0
    assert shares[0] > shares[1] > shares[2]


def test_sampling_repeats_with_its_seed(tiny_bundle: Path) -> None:
    draws = [run(tiny_bundle, sampling=Sampling(1.5, seed=seed)).sequences[0].tokens for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "the number of new tokens is out of range"),
        ({"keep": KeepSettings(budget=0)}, "budget"),
        ({"keep": KeepSettings(budget=1.5)}, "budget"),
        ({"keep": KeepSettings(budget=0.01)}, "below the calibrated grid"),
    ],
)
def test_bad_options_are_refused(tiny_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tiny_bundle, **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([-1], "outside the vocabulary"), ([10**6], "outside the vocabulary"), ([5] * 10**5, "context")],
)
def test_bad_prompts_are_refused(tiny_bundle: Path, prompt: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(open_runner(open_bundle(tiny_bundle)), [prompt], max_new_tokens=1)


def test_a_graph_of_another_layout_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    """A graph with another layout (here without its head) gives a message, not a traceback."""
    directory = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    model = onnx.load(str(directory / "model.onnx"), load_external_data=False)
    for node in model.graph.node:
        node.op_type = node.op_type.replace("Reshape", "Identity")
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["graphs"]["model"]["sha256"] = sha256_of(directory / "model.onnx")
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="run `gsx export` again"):
        open_runner(open_bundle(directory)).new_cache(1, 8)
