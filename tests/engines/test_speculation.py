"""Speculative decoding on real exported bundles: the same text as plain decoding with any draft, and less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from scipy import stats

from gsx.workflows.export import export
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.drafts import BudgetDraft, ExitDraft, LayersDraft
from gsx_engines.generation.generate import generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import open_runner, open_split_runner
from gsx_engines.runners.split import SplitRunner
from gsx_engines.sampling import GREEDY, Sampling
from gsx_engines.speculation.draft import open_draft
from gsx_engines.speculation.length import LONGEST, PROBE_EVERY, AdaptiveLength, Round
from gsx_engines.speculation.spec import check_draft, parse_draft
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.reference.model import Reference
from gsx_plugins.errors import UsageError
from tests.tiny import EOS_ID, tiny_checkpoint

# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
PROMPTS = [[5, 60, 61, 7, 8, 9, 200, 11], [61, 7], [1, 30, 31, 32, 33]]
SAMPLED = Sampling(temperature=0.9, top_k=50, top_p=0.97, seed=3)

# name -> (checkpoint, export options)
MODELS = {
    "gated": ({"gate": GateConfig(), "layers": 4}, {"budget": 0.6, "draft": "exit:2"}),
    "dense": ({"layers": 3, "tied": True}, {"draft": "exit:1"}),
    "window, copy": (
        {"family": "mistral", "gate": GateConfig("scalar", "pre_norm"), "sliding_window": 6},
        {"budget": 0.5, "kv_policy": "copy", "draft": "exit:2"},
    ),
    "half": ({"gate": GateConfig()}, {"budget": 0.7, "draft": "exit:1", "precision": "fp16"}),
    "odd heads": ({"family": "qwen3", "hidden": 48, "heads": 4, "layers": 3}, {"draft": "exit:1"}),
}


@pytest.fixture(scope="module", params=MODELS)
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Bundle:
    model, options = MODELS[request.param]
    directory = tmp_path_factory.mktemp("split")
    checkpoint = tiny_checkpoint(directory / "model", tokenizer=True, **model)
    if "gate" in model:
        options = options | {"calibration": tiny_text}
    return export(checkpoint, directory / "out", **options)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, tiny_text: Path) -> Bundle:
    directory = tmp_path_factory.mktemp("gated")
    checkpoint = tiny_checkpoint(directory / "model", gate=GateConfig(), layers=4, tokenizer=True)
    return export(checkpoint, directory / "out", budget=0.8, calibration=tiny_text, draft="exit:2")


def test_the_halves_are_the_whole(split: Bundle) -> None:
    """Prefill, single steps, chunks, and a cache that was rolled back: both halves together give the whole's logits."""
    atol = LOGITS_ATOL if split.manifest.precision == "fp32" else 2e-2
    controls = controls_for(split.manifest)
    whole, halves = open_runner(split), open_split_runner(split)
    portable = SplitRunner(PortableStage(split, "draft"), PortableStage(split, "verify"))
    caches = [runner.new_cache(1, 40) for runner in (whole, halves, portable)]
    ids = np.random.default_rng(0).integers(3, 250, (1, 32))
    for start, stop in ((0, 9), (9, 10), (10, 17), (12, 15), (15, 32)):
        outputs = []
        for runner, cache in zip((whole, halves, portable), caches, strict=True):
            cache.roll_back([start])
            outputs.append(runner.step(cache, ids[:, start:stop], controls, logits="all"))
        for other in outputs[1:]:
            np.testing.assert_allclose(other.logits, outputs[0].logits, atol=atol)
            if other.kept is not None and split.manifest.precision == "fp32":
                np.testing.assert_array_equal(other.kept, outputs[0].kept)
            assert other.gated_rows == outputs[0].gated_rows


def test_the_draft_is_the_references_exit(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", layers=4, tokenizer=True)
    bundle = export(checkpoint, tmp_path / "out", draft="exit:3")
    ids = np.array([PROMPTS[0]])
    runner = open_split_runner(bundle)
    found = runner.draft(runner.new_cache(1, 16), ids, {}, logits="all").logits
    reference = Reference.load(open_checkpoint(checkpoint))
    wanted = reference.exit_logits(reference(torch.from_numpy(ids)), 3)
    np.testing.assert_allclose(found, wanted.numpy(), atol=LOGITS_ATOL)


@pytest.mark.parametrize("length", [None, 1, 5])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_text_is_that_of_plain_decoding(split: Bundle, sampling: Sampling, length: int | None) -> None:
    """Each prompt alone, and all in one ragged batch."""
    draft = open_draft(split, ExitDraft(layer=split.manifest.draft.draft.layer))  # type: ignore[union-attr]
    plain = open_runner(split)
    for batch in ([PROMPTS[0]], PROMPTS):
        options: dict[str, Any] = {"max_new_tokens": 24, "sampling": sampling, "stop_ids": []}
        want = generate(plain, batch, **options)
        have = generate(draft.runner, batch, draft=draft, draft_length=length, **options)
        assert have.sequences == want.sequences


ADJUSTED = {
    "min-p": {"min_p": 0.02},
    "repetition": {"repetition_penalty": 1.4},
    "frequency": {"frequency_penalty": 1.1},
    "presence": {"presence_penalty": 1.6},
    "bias": {"logit_bias": {5: 3.0, 60: -100.0}},
}


@pytest.mark.parametrize("name", ADJUSTED)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_text_is_that_of_plain_decoding_however_logits_are_changed(
    gated: Bundle, name: str, temperature: float
) -> None:
    draft = open_draft(gated, ExitDraft(layer=2))
    sampling = Sampling(temperature, seed=3, **ADJUSTED[name])
    options: dict[str, Any] = {"max_new_tokens": 30, "sampling": sampling, "stop_ids": []}
    want = generate(open_runner(gated), PROMPTS, **options)
    have = generate(draft.runner, PROMPTS, draft=draft, draft_length=4, **options)
    assert have.sequences == want.sequences
    assert sum(have.stats.accepted), "the draft guesses under the same change"
    if temperature or name != "min-p":  # which never changes the likeliest token
        plain = generate(open_runner(gated), PROMPTS, **options | {"sampling": Sampling(temperature, seed=3)})
        assert want.sequences != plain.sequences, "the change matters"


@pytest.mark.parametrize("spec", ["budget:0.55", "layers:1,3.mlp", "exit:2"])
@pytest.mark.parametrize("budget", [1.0, 0.8, 0.6])
def test_every_kind_of_draft(gated: Bundle, spec: str, budget: float) -> None:
    draft = open_draft(gated, parse_draft(spec))
    for sampling in (GREEDY, SAMPLED):
        options: dict[str, Any] = {
            "max_new_tokens": 30,
            "keep": KeepSettings(budget=budget),
            "sampling": sampling,
            "stop_ids": [],
        }
        want = generate(open_runner(gated), PROMPTS, **options)
        have = generate(draft.runner, PROMPTS, draft=draft, draft_length=4, **options)
        assert have.sequences == want.sequences
        assert have.stats.drafted
        assert have.stats.decode_steps <= want.stats.decode_steps


def test_sequences_end_on_their_own(gated: Bundle) -> None:
    """Stop ids, a callback and the limit end sequences of a batch at different positions, with and without drafts."""
    draft = open_draft(gated, ExitDraft(layer=2))
    free = generate(open_runner(gated), PROMPTS, max_new_tokens=30, stop_ids=[]).sequences
    stop = free[0].tokens[7]

    def enough(sequence: int, token: int) -> bool:
        counts[sequence] += 1
        return sequence == 1 and counts[1] == 4

    found = []
    for options in ({}, {"draft": draft, "draft_length": 6}):
        counts = [0, 0, 0]
        runner = draft.runner if options else open_runner(gated)
        found.append(
            generate(runner, PROMPTS, max_new_tokens=30, stop_ids=[stop], on_token=enough, **options).sequences
        )
    assert found[0] == found[1]
    first = free[0].tokens
    assert found[1][0].tokens == first[: first.index(stop) + 1]
    assert [one.finish for one in found[1]][:2] == ["end-of-text", "stopped"]
    assert len(found[1][1].tokens) == 4


def test_the_context_ends_each_sequence_at_its_own_length(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model", tokenizer=True, max_position_embeddings=40)
    bundle = export(checkpoint, tmp_path / "out", draft="exit:1")
    draft = open_draft(bundle, ExitDraft(layer=1))
    options: dict[str, Any] = {"max_new_tokens": 35, "stop_ids": []}
    want = generate(open_runner(bundle), PROMPTS, **options)
    have = generate(draft.runner, PROMPTS, draft=draft, draft_length=7, **options)
    assert have.sequences == want.sequences
    assert [len(one.tokens) for one in have.sequences] == [32, 35, 35]
    assert [one.finish for one in have.sequences] == ["context", "length", "length"]


def test_end_of_text_inside_a_draft_is_kept_by_the_gates(gated: Bundle) -> None:
    """End-of-text passes every gate, in the later half too, which reads ids only for that."""
    nothing = {"thresholds": np.full((1, 4, 2), 2.0, np.float32)}
    whole, halves = open_runner(gated), open_split_runner(gated)
    outputs = [r.step(r.new_cache(1, 8), np.array([[5, EOS_ID, 7]]), nothing) for r in (whole, halves)]
    for output in outputs:
        np.testing.assert_array_equal(output.kept, np.ones((4, 2), np.int64))


def test_sampled_tokens_follow_the_models_distribution(gated: Bundle) -> None:
    """Pairs of tokens over 1,500 seeds, through draft and verification, against the exact joint distribution."""
    runner, draft = open_runner(gated), open_draft(gated, ExitDraft(layer=2))
    sampling = Sampling(temperature=0.7, top_k=3)
    prompt = PROMPTS[2]
    controls = controls_for(gated.manifest)

    def probabilities(ids: list[int]) -> dict[int, float]:
        logits = runner.step(runner.new_cache(1, 16), np.array([ids]), controls).logits[0, 0].astype(np.float64)
        top = np.argsort(-logits)[:3]
        weights = np.exp((logits[top] - logits[top].max()) / 0.7)
        return dict(zip(top.tolist(), weights / weights.sum(), strict=True))

    first = probabilities(prompt)
    joint = {(a, b): p * q for a, p in first.items() for b, q in probabilities([*prompt, a]).items()}
    counts = dict.fromkeys(joint, 0)
    for seed in range(1500):
        seeded = Sampling(sampling.temperature, sampling.top_k, seed=seed)
        found = generate(
            draft.runner, [prompt], max_new_tokens=3, sampling=seeded, stop_ids=[], draft=draft, draft_length=1
        )
        counts[tuple(found.sequences[0].tokens[:2])] += 1  # type: ignore[index]
    expected = np.array(list(joint.values())) * 1500
    common = expected >= 5
    found_counts = np.append(np.array(list(counts.values()))[common], np.array(list(counts.values()))[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    # The seeds are fixed: this is the same number in each run. A correct sampler is below it once in a million.
    assert stats.chisquare(found_counts[wanted > 0], wanted[wanted > 0]).pvalue > 1e-6


def test_statistics_add_up(gated: Bundle) -> None:
    draft = open_draft(gated, BudgetDraft(budget=0.55))
    found = generate(draft.runner, [PROMPTS[0]], max_new_tokens=40, stop_ids=[], draft=draft, draft_length=3).stats
    assert found.new_tokens == 40
    assert found.decode_steps + sum(found.accepted) == 39, "each round gives its right tokens and one more"
    assert len(found.drafted) == len(found.accepted) <= 3
    assert all(right <= tried for right, tried in zip(found.accepted, found.drafted, strict=True))
    assert found.draft_seconds + found.verify_seconds < found.decode_seconds
    assert found.tokens_per_verification == pytest.approx(39 / found.decode_steps)
    assert 0 < found.kept_share < 1  # type: ignore[operator]


def test_no_weight_of_the_layers_is_in_both_halves(gated: Bundle) -> None:
    """And both read the one weights file."""
    names = {}
    for graph in ("model", "draft", "verify"):
        model = onnx.load(str(gated.graph_path(graph)), load_external_data=False)
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places == {"weights.bin"}
        names[graph] = {t.name for t in model.graph.initializer if t.external_data}
    assert names["draft"] | names["verify"] == names["model"]
    assert {name.split(".")[0] for name in names["draft"] & names["verify"]} <= {"norm", "lm_head"}


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ("exit:3", ExitDraft(layer=3)),
        ("budget:0.5", BudgetDraft(budget=0.5)),
        ("layers:2.mlp", LayersDraft(skip=((2, "mlp"),))),
        ("layers:1,3-4.attn", LayersDraft(skip=((1, "attn"), (1, "mlp"), (3, "attn"), (4, "attn")))),
    ],
)
def test_drafts_are_read(text: str, draft: object) -> None:
    assert parse_draft(text) == draft
    assert parse_draft(str(draft)) == draft


@pytest.mark.parametrize(
    "text",
    [
        "",
        "exit",
        "exit:",
        "exit:two",
        "half",
        "budget:0",
        "budget:1.5",
        "layers:4-2",
        "layers:x",
        "layers:0-9999999999",
    ],
)
def test_what_is_not_a_draft_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_draft(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exit:0", "the exit is not between"),
        ("exit:-1", "the exit is not between"),
        ("exit:4", "the exit is not between"),
        ("exit:1", "cannot draft with exit:1"),
        ("budget:0.1", "below the calibrated grid"),
        ("layers:4", "leaves out branches that it cannot"),
        ("layers:0-3", "leaves out branches that it cannot"),
    ],
)
def test_a_bundle_refuses_what_it_does_not_have(gated: Bundle, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_draft(parse_draft(text), gated.manifest)


def test_drafts_that_a_model_cannot_have_are_refused(tmp_path: Path, tiny_gated: Path, tiny_bundle: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", tokenizer=True)
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (dense, {"draft": "budget:0.5"}, "needs thresholds"),
        (dense, {"draft": "exit:3"}, "the exit is not between"),
        (tiny_gated, {"draft": "exit:1", "select": "rank"}, "selection by threshold"),
        (tiny_gated, {"draft": "budget:0.01", "budget": 0.7}, "below the calibrated grid"),
        (tiny_gated, {"draft": "layers:3"}, "leaves out branches that it cannot"),
        (tiny_checkpoint(tmp_path / "one", layers=1, tokenizer=True), {"draft": "auto"}, "2 layers or more"),
        (tiny_checkpoint(tmp_path / "short", tokenizer=True, max_position_embeddings=32), {"draft": "auto"}, "room"),
    ]
    for model, options, message in cases:
        with pytest.raises(UsageError, match=message):
            export(model, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="graphs that are split"):
        open_draft(open_bundle(tiny_bundle), ExitDraft(layer=1))


def test_bad_draft_lengths_are_refused(gated: Bundle) -> None:
    draft = open_draft(gated, ExitDraft(layer=2))
    for length in (-1, 10**6):
        with pytest.raises(UsageError, match="the draft length is out of range"):
            generate(draft.runner, [PROMPTS[0]], max_new_tokens=4, draft=draft, draft_length=length)


def rounds(
    length: AdaptiveLength, easy: float, draft: float, verify: float, count: int = 400
) -> tuple[float, list[int]]:
    """Tokens a second against a machine with these costs (seconds), and the draft lengths.

    A share `easy` of tokens is right nine times in ten and the rest one time in ten, and the draft knows which.
    """
    rng = np.random.default_rng(0)
    chosen, tokens, seconds = [], 0.0, 0.0
    for number in range(count):
        confidences: list[float] = []
        most = length.next()
        while len(confidences) < most:
            confidences.append(0.9 if rng.random() < easy else 0.1)
            if not length.goes_on(len(confidences), float(np.prod(confidences))):
                break
        size = len(confidences)
        wrong = np.flatnonzero(rng.random(size) >= np.array(confidences))
        right = int(wrong[0]) if len(wrong) else size
        judged = min(size, right + 1)
        times = draft * size, verify * (1 + 0.05 * size)
        length.learn(Round(size, right + 1, right, int(right < size), sum(confidences[:judged]), *times))
        chosen.append(size)
        if number >= count // 2:
            tokens, seconds = tokens + right + 1, seconds + sum(times)
    return tokens / seconds, chosen


@pytest.mark.parametrize(("easy", "draft"), [(0.95, 0.1), (0.7, 0.15), (0.5, 0.1), (0.8, 0.3)])
def test_the_length_beats_or_equals_every_fixed_one(easy: float, draft: float) -> None:
    """If the draft knows which tokens are easy, stopping in time is at least as good as the best fixed length."""
    acceptance = 0.9 * easy + 0.1 * (1 - easy)

    def speed(size: int) -> float:
        return (1 - acceptance ** (size + 1)) / (1 - acceptance) / (size * draft + 1 + 0.05 * size)

    found, _ = rounds(AdaptiveLength(), easy, draft, 1.0)
    # Costs and acceptance are known from some twenty rounds, and 200 rounds are counted: a few percent of noise.
    assert found > 0.95 * max(map(speed, range(LONGEST + 1)))


def test_a_slow_draft_is_turned_off_and_tried_again() -> None:
    length = AdaptiveLength()
    _, chosen = rounds(length, easy=0.0, draft=0.8, verify=1.0)
    assert np.mean(np.array(chosen[50:]) == 0) > 1 - 2 / PROBE_EVERY
    assert any(chosen[100:]), "a probe now and then"
    _, chosen = rounds(length, easy=1.0, draft=0.05, verify=1.0, count=1200)
    assert np.mean(chosen[1000:]) > 3
