"""`CudaEngine`: addresses, shapes, copies, streams and recordings, on a stand-in for the GPU (`standin_gpu.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.errors import EngineError
from gsx_engines.generation.generate import generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.split import SplitRunner
from gsx_engines.runners.tensorrt import TensorRTStage
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.sampling import GREEDY, Sampling
from gsx_engines.speculation.draft import EarlyExitDraft
from gsx_engines.tensorrt import cuda, execution
from gsx_engines.tensorrt.backend import Backend
from gsx_engines.tensorrt.execution import CudaEngine
from gsx_plugins.library import STEP_OPS
from tests.engines.conftest import Make
from tests.engines.standin_gpu import CAPACITY, StandInCuda, StandInTensorRT
from tests.engines.test_steps import with_steps

PROMPT = [5, 60, 61, 7, 8, 9, 200, 11]
PROMPTS = [PROMPT, PROMPT[2:4], [*PROMPT, 30, 31, 32]]
PLUGINS = ("ThresholdGather", "TopKGather", "GatedScatterAdd")
# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
BACKENDS: tuple[Backend, ...] = ("tensorrt", "tensorrt-rtx")
RANK = {"select": "rank", "calibration": None}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, RANK], ids=["threshold", "rank"])
@pytest.mark.parametrize("plugins", [(), PLUGINS], ids=["masks", "plugins"])
@pytest.mark.parametrize("batch", [1, 3])
def test_text_equals_the_portable_runner(
    make_tiny_bundle: Callable[..., Path],
    make: Make,
    backend: Backend,
    options: dict[str, object],
    plugins: Collection[str],
    batch: int,
) -> None:
    """Past a change of the window, so that shapes, memory and recordings change on the way."""
    bundle = open_bundle(make_tiny_bundle(**options))
    made = make(bundle, backend, plugins=plugins, batch=batch)["model"]
    found = generate(WholeRunner(made.stage), PROMPTS[:batch], max_new_tokens=70)
    assert found.sequences == generate(WholeRunner(PortableStage(bundle)), PROMPTS[:batch], max_new_tokens=70).sequences
    k_on_host = bool(options) and not plugins
    if backend == "tensorrt":
        assert (made.gpu.launches > 40) == (not k_on_host), "single steps are replayed"
        assert made.trt.calls < 40 or k_on_host
    else:
        assert made.gpu.launches == 0, "TensorRT-RTX records by itself"
        assert made.strategy == ("disabled" if k_on_host else "whole")


@pytest.mark.parametrize(
    ("sampling", "precision", "plugins"),
    [(GREEDY, "fp32", ()), (Sampling(1.1, top_p=0.9, seed=2), "fp32", ()), (GREEDY, "bf16", STEP_OPS)],
    ids=["likeliest", "all logits", "plugins"],
)
def test_steps(
    make_tiny_bundle: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    sampling: Sampling,
    precision: str,
    plugins: Collection[str],
) -> None:
    """An engine for single tokens beside the one for all calls: one recording, whatever thresholds a token has."""
    bundle, gpu = open_bundle(make_tiny_bundle(precision=precision)), StandInCuda()
    monkeypatch.setattr(cuda, "runtime", lambda: gpu)
    stage, general, (step,) = with_steps(bundle, 1, (1, 1), plugins=plugins)
    made: list[CudaEngine] = []
    loaded = []
    for engine in (general, step):
        loaded.append(StandInTensorRT(gpu, engine))
        monkeypatch.setattr(execution, "load_module", lambda _: loaded[-1])
        beside = made[0] if made else None
        made.append(CudaEngine("tensorrt", bytes(100), library=None, cuda_graphs=True, kernels=None, beside=beside))
    (entry,) = (plan.entry for plan in stage._steps.values())
    on_gpu = TensorRTStage(bundle.manifest, stage._entry, "model", made[0], [(entry, made[1])])
    options = {"max_new_tokens": 60, "sampling": sampling, "stop_ids": [], "keep": KeepSettings(budget=0.7, hold=True)}
    found, want = (generate(WholeRunner(one), [PROMPT], **options) for one in (on_gpu, PortableStage(bundle)))
    assert found.sequences == want.sequences
    assert (loaded[0].calls, loaded[1].calls) == (1, 3), "a prompt; two calls, and what is recorded"
    assert gpu.launches == 57
    assert len({address for one in loaded for address in one.scratch}) == 1, "both compute in the same memory"


def test_logits_of_calls_of_every_size(make_tiny_bundle: Callable[..., Path], make: Make) -> None:
    bundle = open_bundle(make_tiny_bundle())
    made = make(bundle, "tensorrt", batch=2)["model"]
    portable, runner = WholeRunner(PortableStage(bundle)), WholeRunner(made.stage)
    caches = [one.new_cache(2, CAPACITY) for one in (portable, runner)]
    controls = controls_for(bundle.manifest)
    rng = np.random.default_rng(0)
    for size in (9, 1, 1, 1, 1, 7, 40, 1, 1, 1, 20, 1):
        ids = rng.integers(3, 250, (2, size))
        counts = [size, max(size - 1, 1)]
        want, found = (
            one.step(cache, ids, controls, counts=counts, logits="all")
            for one, cache in zip((portable, runner), caches, strict=True)
        )
        for row, count in enumerate(counts):
            np.testing.assert_allclose(found.logits[row, :count], want.logits[row, :count], atol=LOGITS_ATOL)
        np.testing.assert_array_equal(found.kept, want.kept)
    runner.copy(caches[1], 1, 0, caches[1].lengths[1])
    portable.copy(caches[0], 1, 0, caches[0].lengths[1])
    want, found = (
        one.step(cache, ids, controls, counts=[1, 0]) for one, cache in zip((portable, runner), caches, strict=True)
    )
    np.testing.assert_allclose(found.logits[0], want.logits[0], atol=LOGITS_ATOL)


def test_without_graphs_and_where_nothing_can_be_recorded(make_tiny_bundle: Callable[..., Path], make: Make) -> None:
    bundle = open_bundle(make_tiny_bundle())
    texts = []
    for graphs, refuses in ((False, False), (True, True)):
        made = make(bundle, "tensorrt", graphs=graphs)["model"]
        made.gpu.refuses_recording = refuses
        texts.append(generate(WholeRunner(made.stage), [PROMPT], max_new_tokens=30).sequences)
        assert made.gpu.launches == 0
    assert texts[0] == texts[1]
    made = make(bundle, "tensorrt-rtx", graphs=False)["model"]
    assert generate(WholeRunner(made.stage), [PROMPT], max_new_tokens=30).sequences == texts[0]
    assert made.strategy == "disabled"


@pytest.mark.parametrize("backend", BACKENDS)
def test_draft_and_verify(make_tiny_bundle: Callable[..., Path], make: Make, backend: Backend) -> None:
    bundle = open_bundle(make_tiny_bundle(kv_policy="copy", budget=0.5, draft="exit:1"))
    made = make(bundle, backend)
    draft = EarlyExitDraft(SplitRunner(made["draft"].stage, made["verify"].stage))
    found = generate(draft.runner, PROMPTS[:1], max_new_tokens=60, draft=draft, draft_length=3)
    plain = generate(WholeRunner(PortableStage(bundle)), PROMPTS[:1], max_new_tokens=60)
    assert found.sequences == plain.sequences
    assert len({address for one in made.values() for address in one.trt.scratch}) == 1, "all compute in one memory"


def test_each_set_of_layers_has_its_recording(make_tiny_bundle: Callable[..., Path], make: Make) -> None:
    """Sets that alternate, as those of a draft and of its verification do: each is recorded once, and then replayed."""
    bundle = open_bundle(make_tiny_bundle(policy="layers", budget=None, calibration=None))
    made = make(bundle, "tensorrt")["model"]
    portable, runner = WholeRunner(PortableStage(bundle)), WholeRunner(made.stage)
    sets = [controls_for(bundle.manifest, KeepSettings(layers=text)) for text in ("0,2", "0-2", "1,2")]
    caches = [one.new_cache(1, CAPACITY) for one in (portable, runner)]
    for step in range(18):
        ids = np.array([[7 + step]])
        want, found = (
            one.step(cache, ids, sets[step % 3]) for one, cache in zip((portable, runner), caches, strict=True)
        )
        np.testing.assert_allclose(found.logits, want.logits, atol=LOGITS_ATOL)
        np.testing.assert_array_equal(found.kept, want.kept)
    assert made.gpu.launches == 18 - 2 * 3, "all but the first two calls of each set are replayed"
    assert made.trt.calls == 3 * 3, "two calls and a recording for each set"


def test_everything_is_released(make_tiny_bundle: Callable[..., Path], make: Make) -> None:
    made = make(open_bundle(make_tiny_bundle()), "tensorrt")
    gpu = made["model"].gpu
    generate(WholeRunner(made["model"].stage), [PROMPT], max_new_tokens=20)
    assert gpu.held > 0
    assert gpu.launches > 0
    made.clear()  # without reference cycles, which Python would have to search for
    assert gpu.held == 0


@pytest.mark.parametrize("options", [{}, RANK], ids=["threshold", "rank"])
def test_it_goes_on_after_every_failure(
    make_tiny_bundle: Callable[..., Path], make: Make, options: dict[str, object]
) -> None:
    """Each call of CUDA and TensorRT fails once: gsx raises an error, and the next generation is right."""
    bundle = open_bundle(make_tiny_bundle(**options))
    gpu, entry = (made := make(bundle, "tensorrt")["model"]).gpu, made.stage._entry

    def fresh() -> TensorRTStage:
        engine = CudaEngine("tensorrt", bytes(100), library=None, cuda_graphs=True, kernels=None)
        return TensorRTStage(bundle.manifest, entry, "model", engine)

    def text(stage: TensorRTStage) -> tuple[object, ...]:
        return tuple(generate(WholeRunner(stage), PROMPTS[1:2], max_new_tokens=6).sequences)

    before = gpu.calls
    want = text(fresh())
    for number in range(1, gpu.calls - before + 1):
        gpu.fail_at = gpu.calls + number
        stage = None
        with contextlib.suppress(EngineError):
            stage = fresh()
            assert text(stage) == want  # calls that cannot be recorded run without a recording
        assert gpu.calls >= gpu.fail_at
        assert text(stage or fresh()) == want, number


@pytest.mark.parametrize(("backend", "reason"), [("tensorrt", "message above"), ("tensorrt-rtx", "unsupported cc")])
def test_an_engine_that_is_refused(
    make_tiny_bundle: Callable[..., Path],
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend,
    reason: str,
) -> None:
    monkeypatch.setattr(StandInTensorRT, "takes", False)
    with pytest.raises(EngineError, match=rf"cannot load the engine\n  found .*{reason}.*\n  gsx build"):
        make(open_bundle(make_tiny_bundle()), backend)
