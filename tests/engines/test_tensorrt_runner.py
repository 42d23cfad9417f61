"""The lowering for TensorRT and the runner over it, executed on a CPU (`cpu_engine.py`) against the portable runner."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from gsx.workflows.export import export
from gsx_engines.building.profiles import default_profiles, parse_profile
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, controls_for
from gsx_engines.errors import EngineError
from gsx_engines.generation.generate import generate
from gsx_engines.lowering.for_tensorrt.task import MAX_TOPK
from gsx_engines.lowering.tensorrt import lower
from gsx_engines.runners.base import Logits, Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.tensorrt import WINDOW_STEP, window_of
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.speculation.draft import EarlyExitDraft
from gsx_exporter.gate_config import GateConfig
from tests.engines.cpu_engine import CpuEngine, cpu_stages
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
PROMPT = [5, 60, 61, 7, 8, 9, 200, 11]
CAPACITY = 160
PLUGINS = ("ThresholdGather", "TopKGather", "GatedScatterAdd")


@dataclass(frozen=True)
class Case:
    """A bundle, and how its engine is made.

    Args:
        forms: the forms that the ops take.
        options: of the export of the gated tiny model.
        model: another tiny model instead.
        rows: largest number of tokens of a call; None for that of the profiles.
    """

    forms: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    plugins: Collection[str] = ()
    batch: int = 1
    rows: int | None = None


MASKS = {"ThresholdGather": "mask", "GatheredAttention": "all", "GatedScatterAdd": "mask"}
THRESHOLD_PLUGINS = {"ThresholdGather": "plugin", "GatheredAttention": "all", "GatedScatterAdd": "plugin"}
COPY, RANK = {"kv_policy": "copy", "budget": 0.5, "draft": "exit:1"}, {"select": "rank", "calibration": None}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
WINDOW = {"family": "mistral", "sliding_window": 6}
EXPERTS = {"RoutedExperts": "all"}
CASES = {
    "masks": Case(MASKS),
    "masks, batch": Case(MASKS, batch=3),
    "plugins": Case(THRESHOLD_PLUGINS, plugins=PLUGINS),
    "plugins, batch": Case(THRESHOLD_PLUGINS, plugins=PLUGINS, batch=3),
    "only one plugin": Case(THRESHOLD_PLUGINS | {"GatedScatterAdd": "body"}, plugins=["ThresholdGather"]),
    "copy, masks": Case(MASKS, COPY),
    "copy, plugins": Case(THRESHOLD_PLUGINS, COPY, plugins=PLUGINS),
    "rank, k from the host": Case({"TopKGather": "body", "GatheredAttention": "all", "GatedScatterAdd": "body"}, RANK),
    "rank, plugins": Case(
        {"TopKGather": "plugin", "GatheredAttention": "all", "GatedScatterAdd": "plugin"}, RANK, plugins=PLUGINS
    ),
    "rank, more rows than TopK takes": Case(
        {"TopKGather": "mask", "GatheredAttention": "all", "GatedScatterAdd": "mask"}, RANK, rows=MAX_TOPK + 1
    ),
    "dense, sliding window, batch": Case({"FullAttention": "all"}, model=WINDOW, batch=3),
    "soft caps, plugins": Case(
        THRESHOLD_PLUGINS, model={"family": "gemma2", "gate": GateConfig("scalar", "post_norm")}, plugins=PLUGINS
    ),
    "soft caps, dense, batch": Case({"FullAttention": "all"}, model={"family": "gemma2"}, batch=3),
    "two kinds of RoPE, masks": Case(MASKS, model={"family": "gemma3_text", "gate": GateConfig("scalar", "post_norm")}),
    "part of a head rotated": Case({"FullAttention": "all"}, model={"family": "phi3", "rope_parameters": PARTIAL}),
    "scale of attention, plugins": Case(
        THRESHOLD_PLUGINS, model={"family": "granite", "gate": GateConfig("scalar", "post_norm")}, plugins=PLUGINS
    ),
    "layers without RoPE, dense, batch": Case({"FullAttention": "all"}, model={"family": "smollm3"}, batch=3),
    "norms after the branch, plugins": Case(
        THRESHOLD_PLUGINS, model={"family": "olmo2", "gate": GateConfig("vector", "post_norm")}, plugins=PLUGINS
    ),
    "mlp alone, plugins": Case(
        {"ThresholdGather": "plugin", "FullAttention": "all", "GatedScatterAdd": "plugin"},
        model={"family": "qwen3", "gate": GateConfig("scalar", "pre_norm", ("mlp",))},
        plugins=PLUGINS,
    ),
    "experts, batch": Case({"FullAttention": "all", **EXPERTS}, model={"family": "qwen3_moe"}, batch=3),
    "experts, plugins": Case(
        THRESHOLD_PLUGINS | EXPERTS, model={"family": "qwen2_moe", "gate": GateConfig("scalar")}, plugins=PLUGINS
    ),
    "experts, masks": Case(MASKS | EXPERTS, model={"family": "mixtral", "gate": GateConfig("vector")}),
}


@dataclass(frozen=True)
class Pair:
    """Both runners of one case."""

    case: Case
    bundle: Bundle
    portable: Runner
    runner: Runner
    engine: CpuEngine

    @property
    def ranks(self) -> bool:
        selection = self.bundle.manifest.selection
        return selection is not None and selection.mode == "rank"


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, tiny_text: Path, make_tiny_bundle: Callable[..., Path]
) -> Callable[[Case], Bundle]:
    """Exports a case's model."""

    def make(case: Case) -> Bundle:
        if case.model is None:
            return open_bundle(make_tiny_bundle(**case.options))
        directory = tmp_path_factory.mktemp("tensorrt")
        checkpoint = tiny_checkpoint(directory / "model", tokenizer=True, **case.model)
        options: dict[str, Any] = {"budget": 0.6, "calibration": tiny_text} if "gate" in case.model else {}
        return export(checkpoint, directory / "out", **options)

    return make


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, exported: Callable[[Case], Bundle]) -> Pair:
    case = CASES[request.param]
    bundle = exported(case)
    stages = cpu_stages(
        bundle, default_profiles(CAPACITY, case.batch), capacity=CAPACITY, plugins=case.plugins, rows=case.rows
    )
    stage, engine = stages["model"]
    return Pair(case, bundle, WholeRunner(PortableStage(bundle)), WholeRunner(stage), engine)


def test_ops_take_the_form_that_is_reported(pair: Pair) -> None:
    graph = onnx.load(str(pair.bundle.graph_path("model")), load_external_data=False)
    profiles = default_profiles(CAPACITY, pair.case.batch)
    lowered = lower(
        graph,
        pair.bundle.manifest,
        capacity=CAPACITY,
        rows=pair.case.rows or max(p.batch.most * p.tokens.most for p in profiles),
        plugins=pair.case.plugins,
    )
    assert lowered.forms == pair.case.forms
    left = {node.op_type for node in lowered.model.graph.node if node.domain == "gsx"}
    assert left == {op for op, form in lowered.forms.items() if form in ("plugin", "body")}
    assert {function.name for function in lowered.model.functions} == left
    inputs = {value.name for value in lowered.model.graph.input}
    assert not inputs & {tensor.name for tensor in lowered.model.graph.initializer}, "an input has a default"


def test_logits_and_choices_equal_portable_ones(pair: Pair) -> None:
    """Prefill, chunks and single tokens, another number for each sequence; and steps after a roll-back."""
    batch = pair.case.batch
    caches = [runner.new_cache(batch, CAPACITY) for runner in (pair.portable, pair.runner)]
    controls = controls_for(pair.bundle.manifest)
    rng = np.random.default_rng(0)
    for size, back in ((9, None), (1, None), (7, None), (1, 12), (3, None), (60, None), (1, None)):
        ids = rng.integers(3, 250, (batch, size))
        counts = [max(size - row, 0) for row in range(batch)]  # the last ones have less to do, or nothing
        outputs = []
        for runner, cache in zip((pair.portable, pair.runner), caches, strict=True):
            outputs.append(runner.step(cache, ids, controls, counts=counts, logits="all"))
            if back is not None:
                cache.roll_back([back] * batch)
        for row, count in enumerate(counts):
            np.testing.assert_allclose(outputs[1].logits[row, :count], outputs[0].logits[row, :count], atol=LOGITS_ATOL)
        assert outputs[1].logits.dtype == np.float32
        np.testing.assert_array_equal(outputs[1].kept, outputs[0].kept)
        assert outputs[1].gated_rows == outputs[0].gated_rows
        np.testing.assert_array_equal(caches[1].lengths, caches[0].lengths)


def test_greedy_text_equals_the_portable_runner(pair: Pair) -> None:
    """And a decoding step of as many sequences keeps its shapes while the cache grows, which CUDA graphs and compiled
    kernels need."""
    prompts = [PROMPT, PROMPT[2:4], [*PROMPT, 30, 31, 32]][: pair.case.batch]
    pair.engine.calls.clear()
    found = [generate(runner, prompts, max_new_tokens=WINDOW_STEP) for runner in (pair.portable, pair.runner)]
    assert found[0].sequences == found[1].sequences
    assert found[0].stats.kept_share == found[1].stats.kept_share
    decode = [shapes for profile, shapes in pair.engine.calls if profile == 1]
    windows = {shapes["attention_mask"] for shapes in decode}
    assert len({tuple(sorted(shapes.items())) for shapes in decode}) == len(windows)
    assert len({columns for _, columns in windows}) <= 2


@pytest.mark.parametrize("pair", [name for name, case in CASES.items() if case.batch > 1], indirect=True)
def test_a_sequence_is_copied_to_another_row(pair: Pair) -> None:
    controls = controls_for(pair.bundle.manifest, KeepSettings(budget=1.0) if pair.ranks else AS_EXPORTED)
    ids = np.random.default_rng(2).integers(3, 250, (pair.case.batch, 6))
    first, *_, last = range(pair.case.batch)
    after = []
    for runner in (pair.portable, pair.runner):
        cache = runner.new_cache(pair.case.batch, CAPACITY)
        runner.step(cache, ids, controls)
        runner.copy(cache, last, first, 6)
        counts = [int(row == first) for row in range(pair.case.batch)]
        after.append(runner.step(cache, ids[:, :1], controls, counts=counts).logits[first])
    np.testing.assert_allclose(*after, atol=LOGITS_ATOL)


def test_a_long_prompt_goes_through_in_pieces(pair: Pair) -> None:
    """With rank selection, which compares the tokens of a whole call, it is refused."""
    profiles = [parse_profile(text, capacity=CAPACITY, batch=pair.case.batch) for text in ("prefill:2-5-7", "decode:1")]
    stage, engine = cpu_stages(
        pair.bundle, profiles, capacity=CAPACITY, plugins=pair.case.plugins, rows=pair.case.rows
    )["model"]
    runner = WholeRunner(stage)
    batch, length = pair.case.batch, 22
    ids = np.random.default_rng(1).integers(3, 250, (batch, length))
    counts = [22, 15, 3][:batch]
    controls = controls_for(pair.bundle.manifest)
    if pair.ranks:
        with pytest.raises(EngineError, match=r"expected at most 7 tokens, found 22\n.*prefill:2-22"):
            runner.step(runner.new_cache(batch, CAPACITY), ids, controls)
        return
    kinds: tuple[Logits, ...] = ("all", "last")
    for logits in kinds:
        engine.calls.clear()
        want, found = (
            one.step(one.new_cache(batch, CAPACITY), ids, controls, counts=counts, logits=logits)
            for one in (pair.portable, runner)
        )
        assert [shapes["input_ids"][1] for _, shapes in engine.calls] == [7, 7, 7, 1]
        assert found.logits.shape == want.logits.shape
        for row, count in enumerate(counts if logits == "all" else [1] * batch):
            np.testing.assert_allclose(found.logits[row, :count], want.logits[row, :count], atol=LOGITS_ATOL)
        np.testing.assert_array_equal(found.kept, want.kept)


def test_nothing_kept_leaves_the_state_alone(pair: Pair) -> None:
    """A threshold above every score: no row goes through a branch, in prefill and in decode."""
    manifest = pair.bundle.manifest
    if manifest.selection is None or pair.ranks:
        pytest.skip("needs threshold selection")
    above = np.full((pair.case.batch, manifest.decoder.num_layers, 2), 2.0, np.float32)
    batch = pair.case.batch
    caches = [runner.new_cache(batch, CAPACITY) for runner in (pair.portable, pair.runner)]
    for size in (4, 1):
        ids = np.full((batch, size), 7)
        outputs = [
            runner.step(cache, ids, {"thresholds": above}, logits="all")
            for runner, cache in zip((pair.portable, pair.runner), caches, strict=True)
        ]
        for output in outputs:
            assert output.kept is not None
            assert output.kept.sum() == 0
        np.testing.assert_allclose(outputs[1].logits, outputs[0].logits, atol=LOGITS_ATOL)


def test_more_than_the_engine_holds_is_refused(pair: Pair) -> None:
    with pytest.raises(EngineError, match=rf"at most {CAPACITY} tokens, found 200.*\n.*--context 200"):
        pair.runner.new_cache(1, 200)
    with pytest.raises(EngineError, match=r"expected batch .* found 9\n.*--batch 9"):
        pair.runner.new_cache(9, 8)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plugins", [(), PLUGINS], ids=["masks", "plugins"])
def test_draft_and_verify_write_the_same_text(
    make_tiny_bundle: Callable[..., Path], plugins: Collection[str], batch: int
) -> None:
    """Both halves of a split decoder as engines, with K and V of the exit's layer passing over (policy `copy`)."""
    bundle = open_bundle(make_tiny_bundle(**COPY))
    stages = cpu_stages(bundle, default_profiles(CAPACITY, batch), capacity=CAPACITY, plugins=plugins)
    draft = EarlyExitDraft(SplitRunner(stages["draft"][0], stages["verify"][0]))
    prompts = [PROMPT, PROMPT[2:4], [*PROMPT, 30, 31, 32]][:batch]
    plain = generate(WholeRunner(PortableStage(bundle)), prompts, max_new_tokens=40)
    found = generate(draft.runner, prompts, max_new_tokens=40, draft=draft, draft_length=3)
    assert found.sequences == plain.sequences
    assert found.stats.tokens_per_verification is not None


@pytest.mark.parametrize(
    ("filled", "window"), [(1, 64), (64, 64), (65, 128), (129, 160), (160, 160)], ids=lambda value: str(value)
)
def test_window(filled: int, window: int) -> None:
    assert window_of(filled, CAPACITY) == window
