"""Looped models: every number of loops against transformers' own model, prefill and steps, alone and in a batch."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from gsx.torch_runtime import TorchRuntime, TorchStage
from gsx.workflows.export import export
from gsx.workflows.inspect import inspect
from gsx.workflows.study import SEQUENCE_TOKENS, study
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.confidence import Measure
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.cost import step_bytes
from gsx_engines.bundle.drafts import LoopsDraft
from gsx_engines.bundle.loops import Loops
from gsx_engines.generation.generate import generate
from gsx_engines.lowering.onnxruntime import lower
from gsx_engines.runners.base import Runner
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.session import session_config
from gsx_engines.runners.whole import WholeRunner
from gsx_engines.speculation.draft import open_draft
from gsx_engines.speculation.spec import check_draft
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.errors import CheckpointError
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.calm.policy import CalmPlan
from gsx_exporter.rules.calm.reference import Confident
from gsx_exporter.rules.loops.reference import CountedLoops
from gsx_exporter.rules.loops.traced import LoopCount
from gsx_exporter.rules.plan import PolicyOptions
from gsx_exporter.rules.registry import plan_policy
from gsx_exporter.text import tokenize
from gsx_plugins.errors import UsageError
from gsx_plugins.graph import Graph
from tests.tiny import tiny_checkpoint

# One layer before the loop, two in it, one after, in windows of 8 tokens and without in turn.
KEYS: dict[str, Any] = {"layers": 4, "n_output_layers": 1, "tokenizer": True}
MOST, PROMPTS, STEPS = 3, (21, 4, 13), 6
# Two orders of summation of float32 products at logits of order 10.
ATOL = 1e-4


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("looped") / "model", "dory", **KEYS)


@pytest.fixture(scope="module")
def bundle(looped: Path) -> Bundle:
    return export(looped, looped.parent / "bundle", draft="loops:1")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose loops share a cache."""
    keys = KEYS | {"recurrent_kv_cache_mode": "last_loop"}
    return tiny_checkpoint(tmp_path_factory.mktemp("shared") / "model", "dory", **keys)


@pytest.fixture(scope="module")
def shared_bundle(shared: Path) -> Bundle:
    return export(shared, shared.parent / "bundle")


@pytest.fixture(scope="module")
def texts() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, 250, (1, length + STEPS)) for length in PROMPTS]


def truth(model: Path, ids: np.ndarray, prompt: int, loops: int) -> np.ndarray:
    """transformers' logits [S, V] of a prompt, and of each token after it in a step of its own."""
    with quiet_transformers(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(
            model, n_recurrent_loops=loops, dtype=torch.float64, attn_implementation="eager"
        )
        cache, found = DynamicCache(config=loaded.config), []
        for part in np.split(ids, range(prompt, ids.shape[1]), axis=1):
            found.append(loaded(torch.from_numpy(part), cache=cache, use_cache=True).logits[0])
    return torch.cat(found).numpy()


def torch_stage(bundle: Bundle) -> TorchStage:
    return TorchRuntime("cpu").stage(bundle, "model")


@pytest.mark.parametrize("stage", [PortableStage, OnnxRuntimeStage, torch_stage])
@pytest.mark.parametrize("loops", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("caches", ["per_loop", "last_loop"])
def test_a_batch_gives_what_transformers_gives_each_sequence(
    request: pytest.FixtureRequest, texts: list[np.ndarray], stage: Any, loops: tuple[int, ...], caches: str
) -> None:
    names = ("bundle", "looped") if caches == "per_loop" else ("shared_bundle", "shared")
    bundle, looped = map(request.getfixturevalue, names)
    runner: Runner = WholeRunner(stage(bundle))
    cache = runner.new_cache(len(texts), max(PROMPTS) + STEPS)
    controls = controls_for(bundle.manifest, [KeepSettings(loops=count) for count in loops], PROMPTS)
    prompts = np.zeros((len(texts), max(PROMPTS)), np.int64)
    for row, (text, length) in enumerate(zip(texts, PROMPTS, strict=True)):
        prompts[row, :length] = text[0, :length]
    first = runner.step(cache, prompts, controls, counts=list(PROMPTS), logits="all").logits
    found = [[first[row, :length]] for row, length in enumerate(PROMPTS)]
    for step in range(STEPS):
        ids = np.stack(
            [text[0, length + step : length + step + 1] for text, length in zip(texts, PROMPTS, strict=True)]
        )
        logits = runner.step(cache, ids, controls).logits
        for row, rows in enumerate(found):
            rows.append(logits[row])
    for text, length, count, rows in zip(texts, PROMPTS, loops, found, strict=True):
        np.testing.assert_allclose(np.concatenate(rows), truth(looped, text, length, count), atol=ATOL)


@pytest.mark.parametrize("side", [PortableStage, OnnxRuntimeStage, torch_stage, "reference"])
def test_with_one_cache_the_number_of_loops_may_change_from_call_to_call(
    shared: Path, shared_bundle: Bundle, texts: list[np.ndarray], side: Any
) -> None:
    """A token sees what the last loop gave those before it, however many it was."""
    ids, counts = texts[0][:, :16], [3, 1, 2, 3, 1, 3]
    calls = np.split(ids, [10, 11, 12, 13, 14], axis=1)
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float64, attn_implementation="eager")
        cache, want = DynamicCache(config=model.config), []
        for call, count in zip(calls, counts, strict=True):
            model.model.config.n_recurrent_loops = count
            want.append(model(torch.from_numpy(call), cache=cache, use_cache=True).logits[0])
    found = []
    if side == "reference":
        reference, kept = Reference.load(open_checkpoint(shared), dtype=torch.float64), DynamicCache()
        for call, count in zip(calls, counts, strict=True):
            rule = CountedLoops(np.array([count]))
            output = reference(torch.from_numpy(call), cache=kept, rule=rule, kv_policy="copy")
            found.append(output.logits[0].numpy())
    else:
        runner = WholeRunner(side(shared_bundle))
        rows = runner.new_cache(1, 16)
        for call, count in zip(calls, counts, strict=True):
            controls = controls_for(shared_bundle.manifest, KeepSettings(loops=count))
            found.append(runner.step(rows, call, controls, logits="all").logits[0])
    # Rounding of one call enters the next by the cache.
    np.testing.assert_allclose(np.concatenate(found), torch.cat(want).numpy(), atol=3 * ATOL)


@pytest.fixture(scope="module")
def ouro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("ouro") / "model", "ouro", layers=2, tokenizer=True)


@pytest.mark.parametrize(
    ("family", "kv_policy"),
    [*itertools.product(["looped", "ouro"], ["compute", "copy", "none"]), ("shared", "copy")],
)
def test_the_traced_decoder_keeps_what_the_masks_keep(
    request: pytest.FixtureRequest, family: str, kv_policy: Any
) -> None:
    """Also K and V of the loops that a token leaves out, by each policy."""
    checkpoint = open_checkpoint(request.getfixturevalue(family))
    ids = np.random.default_rng(0).integers(3, 250, (3, 20))
    counts = np.array([2, 1, 3])
    reference = Reference.load(checkpoint)
    cache = DynamicCache()
    output = reference(torch.from_numpy(ids), cache=cache, rule=CountedLoops(counts), kv_policy=kv_policy)
    assert checkpoint.config.loops is not None
    walk = Walk(checkpoint, ids, DecoderOptions(LoopCount(checkpoint.config.loops), kv_policy))
    with torch.inference_mode():
        stream = walk.stream({"loops": counts})
        for number, layer in walk.layers():
            ran = walk.through(number, layer, stream)
            for branch, column in (("attn", 0), ("mlp", 1)):
                if branch in ran:
                    assert ran[branch].view(ids.shape).tolist() == output.keep[number][column].tolist()
            cache = checkpoint.config.cache_of(number)
            if not checkpoint.config.loops.leaves_cache(number):
                continue
            cached = reference.cached(output)[cache]
            torch.testing.assert_close(stream.below[number].key, cached.keys, atol=ATOL, rtol=0)
            torch.testing.assert_close(stream.below[number].value, cached.values, atol=ATOL, rtol=0)
        logits = torch.cat([found for _, found in walk.logits(stream)])
    torch.testing.assert_close(logits, output.logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kv_policy", ["compute", "copy"])
@pytest.mark.parametrize(("measure", "threshold"), [("softmax", 0.2), ("state", 0.9), ("gate", 0.75)])
def test_a_token_exits_between_loops(ouro: Path, measure: Measure, threshold: float, kv_policy: Any) -> None:
    checkpoint = open_checkpoint(ouro)
    plan = plan_policy(PolicyOptions(f"calm:{measure},threshold={threshold}", kv_policy=kv_policy), checkpoint.config)
    assert isinstance(plan, CalmPlan)
    assert plan.rule.exits == (2, 4)
    ids, from_the_start = np.random.default_rng(0).integers(3, 250, (3, 20)), np.zeros(1, np.int64)
    rule = Confident(plan.rule.exits, measure, threshold, from_the_start, 0.0, 1)
    output = Reference.load(checkpoint)(torch.from_numpy(ids), rule=rule, kv_policy=kv_policy)
    walk = Walk(checkpoint, ids, DecoderOptions(plan.rule, kv_policy))
    with torch.inference_mode():
        stream = walk.stream({"exit_threshold": np.array([threshold], np.float32), "full_until": from_the_start})
        for number, layer in walk.layers():
            ran = walk.through(number, layer, stream)
            assert ran["attn"].view(ids.shape).tolist() == output.keep[number][0].tolist()
        logits = torch.cat([found for _, found in walk.logits(stream)])
    torch.testing.assert_close(logits, output.logits, atol=ATOL, rtol=0)
    in_the_last_loop = int(output.keep[5][0].sum())
    assert in_the_last_loop < ids.size
    assert in_the_last_loop > 0 or measure == "state"  # the layers of a random model change a state too little


def test_the_exit_gate_decides_in_a_bundle(ouro: Path) -> None:
    """Its weights are read after each loop, and laid out anew once."""
    made = export(ouro, ouro.parent / "by-gate", policy="calm:gate,threshold=0.7")
    ids = np.random.default_rng(2).integers(3, 250, (2, 12))
    controls = controls_for(made.manifest, [KeepSettings(exit_threshold=0.55), KeepSettings()])
    outputs = []
    for stage in (PortableStage(made), OnnxRuntimeStage(made)):
        runner = WholeRunner(stage)
        outputs.append(runner.step(runner.new_cache(2, 16), ids, controls, logits="all"))
    np.testing.assert_allclose(outputs[0].logits, outputs[1].logits, atol=ATOL)
    assert outputs[0].kept is not None
    assert (outputs[0].kept == outputs[1].kept).all()
    assert len({int(rows) for rows in outputs[0].kept[:, 0]}) == 3, "tokens leave after the first and the second loop"


def test_another_family_has_no_exit_gate(tiny_gated: Path) -> None:
    with pytest.raises(UsageError, match="needs a looped model with an exit gate"):
        plan_policy(PolicyOptions("calm:gate,threshold=0.7"), open_checkpoint(tiny_gated).config)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_drafting_with_fewer_loops_gives_the_same_text(bundle: Bundle, count: int) -> None:
    keep, prompts = KeepSettings(loops=count), [[5, 60, 61, 7, 8, 9]]
    runner = WholeRunner(OnnxRuntimeStage(bundle))
    plain = generate(runner, prompts, max_new_tokens=24, keep=keep, stop_ids=[])
    assert bundle.manifest.draft is not None
    draft = open_draft(bundle, bundle.manifest.draft.draft)
    drafted = generate(draft.runner, prompts, max_new_tokens=24, keep=keep, stop_ids=[], draft=draft, draft_length=3)
    assert drafted.sequences[0].tokens == plain.sequences[0].tokens
    if count == 1:
        assert drafted.stats.acceptance == 1


def test_weights_of_looped_layers_are_stored_and_read_once(bundle: Bundle) -> None:
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    stored = {one.name for one in model.graph.initializer if one.external_data}
    assert {name.split(".")[1] for name in stored if name.startswith("layers.")} == {"0", "1", "2", "3"}
    body = lower(model, bundle.manifest, range(8)).body.graph
    packed = [list(node.input) for part in Graph(body).parts() for node in part.nodes if node.op_type == "Concat"]
    weights = [names for names in packed if all(name in stored for name in names)]
    assert sorted(names[0].split(".")[1] for names in weights) == ["0", "1", "2", "3"]
    # ONNX Runtime packs a weight for each node that reads it.
    assert session_config(bundle.manifest, lowered=True)["session.disable_prepacking"] == "1"
    assert not session_config(bundle.manifest, lowered=True, layers=False), "the head is read once"
    # A step reads the weights of a layer in each loop.
    branches = step_bytes(bundle).branches
    assert (branches[1:3] == branches[3:5]).all()
    assert (branches[1:3] == branches[5:7]).all()
    assert branches.min() > 0


def test_visits() -> None:
    loops = Loops(before=1, looped=2, after=1, most=3, default=2)
    assert loops.visits == (0, 1, 2, 1, 2, 1, 2, 3)
    assert [loops.loop_of(visit) for visit in range(8)] == [None, 0, 0, 1, 1, 2, 2, None]
    assert loops.optional == (3, 4, 5, 6)
    assert loops.run_by(2) == (0, 1, 2, 3, 4, 7)
    with pytest.raises(ValueError, match="4 loops by default"):
        Loops(before=1, looped=2, after=1, most=3, default=4)


def test_published_checkpoints_store_attention_and_mlp_apart(looped: Path, tmp_path: Path) -> None:
    """Their configuration counts both, too: transformers itself writes it so."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "generation_config.json"):
        (model / name).write_bytes((looped / name).read_bytes())
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 8
    parts = {
        "self_attn.": (0, "mixer."),
        "mlp.": (1, "mixer."),
        "lambda_1": (0, "attn_alpha"),
        "lambda_2": (1, "mlp_alpha"),
    }

    def stored(name: str) -> str:
        name = name.replace("model.embed_tokens", "backbone.embeddings").replace("model.", "backbone.")
        words = name.split(".")
        if words[1] != "layers":
            return name
        part = next(part for part in parts if ".".join(words[3:]).startswith(part))
        block, called = parts[part]
        rest = ".".join(words[3:]).replace("self_attn.gate_proj", "self_attn.g_proj").replace(part, called, 1)
        return f"backbone.layers.{2 * int(words[2]) + block}.{rest}"

    tensors = load_file(looped / "model.safetensors")
    save_file({stored(name): tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    found = open_checkpoint(model)
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in tensors.items())
    ids = np.random.default_rng(0).integers(3, 250, (1, 12))
    np.testing.assert_allclose(truth(model, ids, 12, 2), truth(looped, ids, 12, 2))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ouro_with_fewer_loops_is_the_model_with_fewer_loops(ouro: Path, count: int) -> None:
    checkpoint, ids = open_checkpoint(ouro), np.random.default_rng(0).integers(3, 250, (2, 16))
    assert any("published description" in note for note in checkpoint.notes)
    found = Reference.load(checkpoint)(torch.from_numpy(ids), rule=CountedLoops(np.array([count])), kv_policy="none")
    with quiet_transformers(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(ouro, total_ut_steps=count, dtype=torch.float32)
        want = loaded(torch.from_numpy(ids)).logits
    torch.testing.assert_close(found.logits, want, atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"early_exit_threshold": 0.7}, "early_exit_threshold must be 1"),
        ({"use_sliding_window": True}, "use_sliding_window must be false"),
        ({"total_ut_steps": 0}, "total_ut_steps is not a count"),
    ],
    ids=str,
)
def test_another_ouro_is_refused(ouro: Path, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(change(ouro, tmp_path / "changed", **keys))
    assert said in str(caught.value)


def test_an_exit_gate_of_another_shape_is_refused(ouro: Path, tmp_path: Path) -> None:
    model = change(ouro, tmp_path / "changed")
    tensors = load_file(ouro / "model.safetensors")
    tensors["model.early_exit_gate.weight"] = torch.zeros(2, 64)
    (model / "model.safetensors").unlink()
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.early_exit_gate\.weight has the wrong shape"):
        open_checkpoint(model)


def change(model: Path, folder: Path, **keys: Any) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(model / "model.safetensors")
    raw = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | keys))
    return folder


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"n_input_layers": 4}, "must equal num_hidden_layers"),
        ({"n_output_layers": 4}, "must equal num_hidden_layers"),
        ({"n_recurrent_layers": 0, "n_input_layers": 6}, "n_recurrent_layers is not a count"),
        ({"n_recurrent_loops": 0}, "at least 1"),
        ({"tie_word_embeddings": True}, "one table for embedding and head"),
        ({"initializer_range": 0.0}, "initializer_range is not positive"),
        ({"gsx": {"gate": {"kind": "scalar"}}}, "a looped model has a section gsx"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_add_up_is_refused(
    looped: Path, tmp_path: Path, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(change(looped, tmp_path / "changed", **keys))
    assert said in f"{caught.value.what} {caught.value.found}"


def test_the_policy(looped: Path) -> None:
    config = open_checkpoint(looped).config
    found = {
        text: plan_policy(PolicyOptions(text), config).of_model(config).loops for text in (None, "loops:5", "dense")
    }
    assert [(one.most, one.default) for one in found.values() if one] == [(3, 3), (5, 3), (3, 3)]
    few = plan_policy(PolicyOptions("loops:2,default=1"), config).of_model(config)
    assert few.loops is not None
    assert (few.num_layers, few.loops.most, few.loops.default) == (6, 2, 1)
    assert few.windows == (8, None, 8, None, 8, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "loops:0"}, "numbers of loops from 1 to 64"),
        ({"policy": "loops:2,default=3"}, "a default of at most 2"),
        ({"policy": "loops:two"}, "numbers of loops from 1 to 64"),
        ({"policy": "layers:0-2"}, "loops or dense"),
        ({"policy": "calm:threshold=0.5"}, "where no layer comes after the loops"),
        ({"budget": 0.5}, "one of them"),
        ({"draft": "exit:2"}, "loops:N"),
        ({"draft": "auto"}, "loops:N"),
        ({"draft": "loops:3"}, "1 to 2"),
        ({"kv_cache": "int8"}, "K and V in fp32"),
    ],
    ids=str,
)
def test_an_export_that_makes_no_sense_is_refused(
    looped: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        export(looped, tmp_path / "bundle", **options)
    assert said in str(caught.value.expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_policy": "none"}, "copy, which is the default here"),
        ({"kv_policy": "compute"}, "copy, which is the default here"),
        ({"draft": "loops:1"}, "recurrent_kv_cache_mode per_loop"),
    ],
    ids=str,
)
def test_what_one_cache_excludes_is_refused(shared: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        export(shared, tmp_path / "bundle", **options)
    assert said in str(caught.value.expected)


def test_drafts_of_a_request_need_a_cache_for_each_loop(shared_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="needs a model whose loops have caches of their own"):
        check_draft(LoopsDraft(loops=1), shared_bundle.manifest)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_request_for_loops_that_the_bundle_has_not_is_refused(bundle: Bundle, count: int) -> None:
    with pytest.raises(UsageError, match="the number of loops is out of range"):
        controls_for(bundle.manifest, KeepSettings(loops=count))


def test_loops_are_for_looped_models(looped: Path, tmp_path: Path) -> None:
    plain = tiny_checkpoint(tmp_path / "model", layers=2)
    with pytest.raises(UsageError, match="the model is not looped"):
        plan_policy(PolicyOptions("loops"), open_checkpoint(plain).config)


@pytest.mark.parametrize("caches", ["looped", "shared"])
def test_a_study_goes_through_the_numbers_of_loops(caches: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(caches)
    report = study(model, tokens=512)
    assert [point.layers for point in report.curves["loops"]] == [8, 6, 4]
    assert set(report.oracle[0].shares) == {"loops"}
    assert report.sentence.startswith("Of 8 visits, this text can do without")
    checkpoint = open_checkpoint(model)
    ids = torch.from_numpy(tokenize(checkpoint, None, max_tokens=512, window=SEQUENCE_TOKENS).ids)
    for point, count in zip(report.curves["loops"], (3, 2, 1), strict=True):
        logits = torch.from_numpy(np.stack([truth(model, row[None].numpy(), len(row), count) for row in ids]))
        nats = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert point.perplexity == pytest.approx(float(nats.exp()), rel=1e-4)


def test_a_study_needs_several_loops(tmp_path: Path) -> None:
    once = tiny_checkpoint(tmp_path / "model", "dory", **(KEYS | {"n_recurrent_loops": 1}))
    with pytest.raises(UsageError, match="several loops"):
        study(once, tokens=512)


def test_exits_are_between_loops(ouro: Path) -> None:
    with pytest.raises(UsageError, match="exits between its loops only"):
        plan_policy(PolicyOptions("calm:threshold=0.5,exits=1+2"), open_checkpoint(ouro).config)


def test_inspect_shows_loops_and_caches(bundle: Bundle, looped: Path) -> None:
    for found in (inspect(looped), inspect(bundle.directory)):
        assert found.shape["layers"] == 4
        sizes = {"before": 1, "looped": 2, "after": 1, "most": 3, "default": 3, "caches": "per_loop"}
        assert found.loops == sizes | {"visits": 8, "kv_values": 2 * 8 * 2 * 16}


def test_one_cache_holds_what_one_pass_does(shared: Path, shared_bundle: Bundle) -> None:
    for found in (inspect(shared), inspect(shared_bundle.directory)):
        assert found.loops is not None
        assert (found.loops["caches"], found.loops["kv_values"]) == ("last_loop", 2 * 4 * 2 * 16)


def test_a_bundle_whose_loops_do_not_fit_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    raw = json.loads((bundle.directory / "gsx.json").read_text())
    raw["decoder"]["loops"]["most"] = 2
    (tmp_path / "gsx.json").write_text(json.dumps(raw))
    with pytest.raises(Exception, match=r"not a valid manifest"):
        open_bundle(tmp_path)
