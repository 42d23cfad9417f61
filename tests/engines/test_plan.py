"""What calls of engines launch, wait for and copy, counted on plans that TensorRT-RTX builds without a GPU.

The models are those of `benchmarks/plans.py`: 2 layers, heads of 128 and the proportions of an 8B model at a quarter of
its width; random weights. `python -m benchmarks.plans` counts the same forms at the full width.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plans import CAPACITY, plan_of, wide_bundle
from gsx.workflows.export import export
from gsx.workflows.inspect import inspect
from gsx_engines.building.build import build
from gsx_engines.building.plan import PlanCounts, count, plan_file, steps_of
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.loading import ENGINES
from gsx_exporter import families as gsx_families
from gsx_plugins.errors import UsageError
from tests.conftest import MakeOnce
from tests.engines.built import needs_plugins
from tests.tiny import tiny_checkpoint

# Kernels before the first layer's own and after the last one's: thresholds and masks, RoPE's tables; final norm, head,
# and counts; the likeliest tokens, and the sum over all.
OUTSIDE = 7
# Kernels of a layer with gates: norm and gate, Q, K with V, attention, its output, norm and gate, gate with up, down;
# and of one with vector gates, and with linear scores for these.
GATES, VECTOR_GATES, LINEAR_SCORES = 8, 12, 12
# Kernels of a step of a tiny Llama.
LLAMA = 22


@pytest.fixture(scope="module")
def wide(make_once: MakeOnce) -> Callable[[str], Bundle]:
    """One of the models of `benchmarks.plans`, at a quarter of an 8B model's width."""
    return lambda model: open_bundle(make_once(f"wide-{model}", lambda path: wide_bundle(path, model)))


def test_a_step_of_a_dense_model(wide: Callable[[str], Bundle]) -> None:
    plan = plan_of(wide("dense"), step=1, plugins="none")
    assert plan.total == PlanCounts(kernels=23)
    assert plan.capturable
    needs_plugins()
    plan = plan_of(wide("dense"), step=1)
    assert plan.total == PlanCounts(kernels=plan.total.kernels)
    assert plan.capturable
    assert plan.total.kernels <= 24, "RoPE's tables are a kernel of their own"


def test_a_step_that_skips(wide: Callable[[str], Bundle]) -> None:
    """No wait, nothing computed on the host, no copy; and fewer kernels a layer than a dense step."""
    needs_plugins()
    for tokens in (1, 3):
        plan = plan_of(wide("gates"), step=tokens)
        assert plan.total == PlanCounts(kernels=plan.total.kernels)
        assert plan.capturable
        assert plan.total.kernels <= 2 * GATES + OUTSIDE


@pytest.mark.slow
def test_a_step_of_several_tokens_at_an_8b_model_s_width(make_once: MakeOnce) -> None:
    """There TensorRT would make a matrix product of each scalar gate, with a kernel before it and one behind."""
    bundle = open_bundle(make_once("thin-gates", lambda path: wide_bundle(path, "gates", "thin")))
    plan = plan_of(bundle, step=3, plugins="none")
    assert plan.total == PlanCounts(kernels=plan.total.kernels)
    assert plan.total.kernels <= 25


@pytest.mark.parametrize(("scheme", "layer"), [("int8-weights", 9), ("fp8", 11)])
def test_a_step_with_weights_of_8_bits(wide: Callable[[str], Bundle], scheme: str, layer: int) -> None:
    """As one of 16 bits, with a kernel more in a layer for the weights of K and V, or three where inputs are rounded;
    two more for embedding and head."""
    needs_plugins()
    plan = plan_of(wide(f"gates, {scheme}"), step=1)
    assert plan.total == PlanCounts(kernels=plan.total.kernels)
    assert plan.capturable
    assert plan.total.kernels <= 2 * layer + OUTSIDE + 2


def test_a_step_with_vector_gates(wide: Callable[[str], Bundle]) -> None:
    """A gate is its product and what makes a score of it."""
    needs_plugins()
    plan = plan_of(wide("vector gates"), step=1)
    assert plan.total == PlanCounts(kernels=plan.total.kernels)
    assert plan.capturable
    assert plan.total.kernels <= 2 * VECTOR_GATES + OUTSIDE


def test_a_step_with_linear_scores(wide: Callable[[str], Bundle]) -> None:
    """The gate's product skips, too."""
    needs_plugins()
    plan = plan_of(wide("linear scores"), step=1)
    assert plan.total == PlanCounts(kernels=plan.total.kernels)
    assert plan.capturable
    assert plan.total.kernels <= 2 * LINEAR_SCORES + OUTSIDE


def test_what_it_takes_the_place_of(wide: Callable[[str], Bundle]) -> None:
    """Rows that the GPU counts: two waits a layer, and every call copies the window of K and of V."""
    needs_plugins()
    plan = plan_of(wide("gates"))
    assert not plan.capturable
    assert (plan.total.host_syncs, plan.total.to_host, plan.total.window_copies) == (4, 4, 4)
    assert plan.total.kernels > 50
    assert [layer for layer in plan.layers if layer != "-"] == ["0", "1"]
    assert all(plan.layers[layer].host_syncs == 2 for layer in ("0", "1"))


@pytest.mark.parametrize(("step", "plugins"), [(None, "none"), (1, "none"), (1, "auto")])
def test_sets_of_layers_ask_the_gpu_for_nothing(wide: Callable[[str], Bundle], step: int | None, plugins: str) -> None:
    """With the attention of a step as a plugin, RoPE's tables are a kernel of their own."""
    if plugins == "auto":
        needs_plugins()
    plan = plan_of(wide("set of layers"), **({} if step is None else {"step": step}), plugins=plugins)
    assert plan.capturable
    assert (plan.total.host_syncs, plan.total.to_host, plan.total.to_device) == (0, 0, 0)
    assert plan.total.shape_calls == 1, "which sizes are empty, once for a call"
    assert plan.total.window_copies == (4 if step is None else 0)
    assert plan.total.kernels <= (30 if step is None else 28 if plugins == "none" else 29)


# Kernels of a step of one token that a family has more than Llama, by layer and once for a call, and why.
FAMILIES: dict[str, tuple[int, int, str]] = {
    "llama": (0, 0, ""),
    "mistral": (0, 2, "the window's mask"),
    "qwen2": (0, 0, "biases, within the product"),
    "qwen3": (2, 0, "a norm of Q and one of K"),
    "mixtral": (3, 0, "the router's product, its softmax and its choice"),
    "qwen2_moe": (6, 0, "the same, and the expert of all tokens"),
    "qwen3_moe": (6, 0, "as Mixtral, the sum of the shares, and the norms of Q and K"),
    "gemma2": (4, 0, "two norms more, and attention in three kernels for its cap"),
    "gemma3_text": (4, 1, "two norms more, norms of Q and K; the window's mask"),
    "phi3": (0, 0, ""),
    "granite": (0, 0, "factors, within other kernels"),
    "smollm3": (0, 0, "one less where a layer has no RoPE"),
    "olmo2": (3, 0, "norms over Q and K, which take two kernels each"),
    "olmo3": (3, 2, "the same; the window's mask"),
}


def test_every_family_has_a_row() -> None:
    looped = {name for name, family in gsx_families.FAMILIES.items() if family.loops}
    assert set(FAMILIES) == {"gemma3_text" if name == "gemma3" else name for name in gsx_families.FAMILIES} - looped


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_step_of_a_family(tmp_path: Path, family: str) -> None:
    """No wait, nothing on the host, no copy of K and V; and no more kernels than its traits ask for."""
    layers, (in_layer, once, why) = 2, FAMILIES[family]
    sizes: dict[str, Any] = {"layers": layers, "hidden": 256, "heads": 4, "kv_heads": 2}
    bundle = export(
        tiny_checkpoint(tmp_path / "model", family, tokenizer=True, max_position_embeddings=CAPACITY, **sizes),
        tmp_path / "out",
        precision="fp16",
    )
    plan = plan_of(bundle, step=1, plugins="none")
    assert plan.total == PlanCounts(kernels=plan.total.kernels)
    assert plan.total.kernels <= LLAMA + layers * in_layer + once, f"{family}: {why}"


def test_steps_that_do_not_fit(wide: Callable[[str], Bundle]) -> None:
    bundle = wide("dense")
    with pytest.raises(UsageError, match=r"--step is for few tokens\n  expected 1 to 8 .*, found 2 x 5"):
        build(bundle, targets=["8.9"], context=CAPACITY, step=5, batch=2)
    with pytest.raises(UsageError, match=r"--step has a profile .* of its own"):
        build(bundle, targets=["8.9"], context=CAPACITY, step=1, profiles=["decode:1"])
    build(bundle, targets=["8.9"], context=CAPACITY, step=1)
    with pytest.raises(
        UsageError, match=rf"another capacity\n  expected {CAPACITY}, found 512\n  --context {CAPACITY}"
    ):
        build(bundle, targets=["8.9"], context=512, step=2)


def test_plans_that_cannot_be_read(wide: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = open_bundle(Path(shutil.copytree(wide("dense").directory, tmp_path / "bundle")))
    name, entry = build(bundle, targets=["8.9"], context=CAPACITY, step=1)
    file = plan_file(bundle.directory / ENGINES / name / entry.graphs["model"].file)
    steps = json.loads(file.read_text())["steps"]
    damaged = json.dumps({"steps": [{**steps[0], "kind": None}, {"name": "?"}]})
    for content, reason in ((damaged, "damaged"), ("{", "damaged"), (None, "no such file")):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(EngineError, match=rf"(?s)has no plan that can be read.*found .*{reason}.*gsx build"):
            inspect(bundle.directory, plan=True)
    with pytest.raises(UsageError, match="--plan: only engines have plans"):
        inspect("examples/model", plan=True)


def line(name: str, kind: str, read: str = "", written: str = "") -> str:
    sides = [f"[ {{ Name: {value}, Dimensions: [1], Datatype: Half }}]" if value else "[]" for value in (read, written)]
    return f"Name: {name}, LayerType: {kind}, Inputs: {sides[0]}, Outputs: {sides[1]}, TacticName: , Metadata: "


def test_kinds_of_steps() -> None:
    """Also those that no engine of ours has: jumps, two profiles, and a kind that is not known."""
    cache = "present.0.key"
    found = steps_of(
        "\n".join(
            [
                line("[trainStation1]", "TrainStation"),
                line("__mye1_myl0_0", "shape_call"),
                line("copy_d2h_myl0_1", "copy"),
                line("cbr_myl0_2", "cjmp"),
                line("__myl_Slic_myl0_3", "kgen", cache, "window"),
                line("_gemv_mha_v1_myl0_4", "kgen", cache, "out"),
                line("__myl_Scat_myl0_5", "kgen", cache, cache),
                line("new_myl0_6", "something_new"),
                line("__mye2_myl1_0", "shape_call"),
                line("__myl_Add_myl1_1", "kgen", "thresholds [profile 1]", "x"),
                line("[h2d] [profile 1]", "ShapeHostToDevice"),
            ]
        )
    )
    first, second = ([step for step in found if step.profile == profile] for profile in (0, 1))
    counted = count(first)
    assert counted == PlanCounts(kernels=4, host_syncs=1, shape_calls=1, to_host=1, window_copies=1)
    assert not counted.capturable
    assert count(second) == PlanCounts(kernels=1, shape_calls=1, to_device=1)
