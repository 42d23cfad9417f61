"""The reference against Hugging Face, against formulas worked out by hand, and against itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gsx_engines.bundle.counting import kept_count
from gsx_engines.bundle.words import BRANCHES, Branch, KvPolicy
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import is_gate
from gsx_exporter.families import FAMILIES
from gsx_exporter.gate_config import GateConfig, GateInput, GateKind
from gsx_exporter.reference.model import Reference, ReferenceOutput
from gsx_exporter.reference.rule import BranchInput, KeepAll, MaskCall, ReferenceRule, T
from gsx_exporter.rules.gateskip.reference import Rank, Threshold
from gsx_plugins.errors import UsageError
from tests.tiny import EOS_ID, FAMILY_NAMES, PAD_ID, tiny_checkpoint

# Two orders of summation of the same fp32 terms; logits here are of order 1 to 10.
ATOL = 5e-5
LAYERS = 3


def _load(path: Path) -> Reference:
    return Reference.load(open_checkpoint(path))


def _ids(rows: int, length: int, seed: int = 0, vocab: int = 97) -> torch.Tensor:
    """Ordinary tokens: neither padding nor end-of-text."""
    return torch.randint(EOS_ID + 1, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def _thresholds(value: float) -> Threshold:
    return Threshold(np.full((LAYERS, 2), value, np.float32))


def _no_part(load: Callable[[Checkpoint], T]) -> T:
    raise AssertionError("GateSkip's rules read no part")


def _edit(path: Path, change: dict[str, torch.Tensor]) -> None:
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | change, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        *[(family, {}) for family in FAMILY_NAMES],
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 20}),
        ("mistral", {"sliding_window": 5}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
        ),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
    ],
)
def test_dense_is_hugging_face(tmp_path: Path, family: str, overrides: dict[str, object]) -> None:
    tiny_checkpoint(tmp_path, family, **overrides)
    ids = _ids(2, 21)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager", experts_implementation="eager"
        )(ids).logits
    output = _load(tmp_path)(ids)
    torch.testing.assert_close(output.logits, theirs, atol=0, rtol=0)
    assert output.scores == [[None, None]] * open_checkpoint(tmp_path).config.num_layers
    assert all(bool(kept.all()) for row in output.keep for kept in row)


# No method says what a gate means in a loop.
@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if FAMILIES[name].loops is None])
@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_open_gates_change_nothing(tmp_path: Path, family: str, kind: GateKind) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    gated = tiny_checkpoint(tmp_path / "gated", family, gate=GateConfig(kind=kind))
    tensors = load_file(gated / "model.safetensors")
    gates = {name: torch.zeros_like(t) for name, t in tensors.items() if is_gate(name)}
    # sigmoid(40) is 1 in float32
    gates |= {name: torch.full_like(t, 40.0) for name, t in gates.items() if name.endswith("bias")}
    _edit(gated, load_file(dense / "model.safetensors") | gates)
    ids = _ids(2, 15)
    # Weights lie elsewhere in the larger file, and products of other alignment add up in another order.
    torch.testing.assert_close(_load(gated)(ids).logits, _load(dense)(ids).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("gate_input", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("kind", ["vector", "scalar"])
@pytest.mark.parametrize("branches", [("attn", "mlp"), ("attn",), ("mlp",)])
def test_gate_is_the_formula(
    tmp_path: Path, kind: GateKind, gate_input: GateInput, branches: tuple[Branch, ...]
) -> None:
    gate = GateConfig(kind=kind, input=gate_input, branches=branches)
    tiny_checkpoint(tmp_path, gate=gate, num_key_value_heads=4)
    weights = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    output = _load(tmp_path)(_ids(2, 9), rule=_thresholds(0.5))
    h = output.states[0]
    with torch.no_grad():
        rope = model.model.rotary_emb(h, torch.arange(9)[None])
        causal = torch.full((9, 9), float("-inf")).triu(1)[None, None]
        for i, layer in enumerate(model.model.layers):
            for column, name in enumerate(BRANCHES):
                x = (layer.input_layernorm, layer.post_attention_layernorm)[column](h)
                if name == "attn":
                    branch = layer.self_attn(x, position_embeddings=rope, attention_mask=causal)[0]
                else:
                    branch = layer.mlp(x)
                if name not in branches:
                    h = h + branch
                    assert output.scores[i][column] is None
                    continue
                W, b = (weights[f"model.layers.{i}.{name}_gate.{part}"] for part in ("weight", "bias"))
                g = torch.sigmoid((h if gate_input == "pre_norm" else x) @ W.T + b)
                score = g.mean(-1)
                found = output.scores[i][column]
                assert found is not None
                torch.testing.assert_close(found, score, atol=1e-6, rtol=0)
                assert torch.equal(output.keep[i][column], score > 0.5)
                assert 0 < int((score > 0.5).sum()) < score.numel()
                h = torch.where((score > 0.5)[..., None], h + g * branch, h)
            torch.testing.assert_close(output.states[i + 1], h, atol=ATOL, rtol=0)


@pytest.mark.parametrize("kv_policy", ["compute", "copy"])
@pytest.mark.parametrize(
    ("family", "gate", "overrides"),
    [
        ("llama", GateConfig(), {}),
        ("llama", GateConfig(kind="scalar", input="pre_norm"), {}),
        ("mistral", GateConfig(branches=("attn",)), {"sliding_window": 5}),
        ("qwen2", GateConfig(branches=("mlp",)), {}),
        ("qwen3", GateConfig(kind="scalar"), {}),
    ],
)
@pytest.mark.parametrize("selection", [KeepAll(), _thresholds(0.5)], ids=["all", "threshold"])
def test_cache_changes_nothing(
    tmp_path: Path,
    family: str,
    gate: GateConfig,
    overrides: dict[str, object],
    selection: ReferenceRule,
    kv_policy: KvPolicy,
) -> None:
    tiny_checkpoint(tmp_path, family, gate=gate, **overrides)
    reference = _load(tmp_path)
    ids = _ids(2, 20)
    whole = reference(ids, rule=selection, kv_policy=kv_policy)
    cache, logits, keep = None, [], []
    for start, stop in ((0, 11), (11, 12), (12, 13), (13, 20)):
        part = reference(ids[:, start:stop], cache=cache, rule=selection, kv_policy=kv_policy)
        cache = part.cache
        logits.append(part.logits)
        keep.append(part.keep)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, atol=ATOL, rtol=0)
    for i in range(LAYERS):
        for column in range(2):
            assert torch.equal(torch.cat([k[i][column] for k in keep], 1), whole.keep[i][column])
        ours, theirs = cache.layers[i], whole.cache.layers[i]
        torch.testing.assert_close(ours.keys, theirs.keys, atol=ATOL, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=ATOL, rtol=0)
        assert ours.keys.shape[2] == 20  # a window masks the past, it does not drop it


@pytest.mark.parametrize("kv_policy", ["compute", "copy"])
@pytest.mark.parametrize(("family", "window"), [("llama", None), ("mistral", 5)])
@pytest.mark.parametrize("poison", [PAD_ID, 50])
def test_left_padding_changes_nothing(
    tmp_path: Path, family: str, window: int | None, poison: int, kv_policy: KvPolicy
) -> None:
    overrides = {"sliding_window": window} if window else {}
    tiny_checkpoint(tmp_path, family, gate=GateConfig(), **overrides)
    reference = _load(tmp_path)
    short, long = _ids(1, 9, seed=1), _ids(1, 14, seed=2)
    ids = torch.cat([torch.cat([torch.full((1, 5), poison), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    selection = _thresholds(0.5)
    both = reference(ids, mask, rule=selection, kv_policy=kv_policy)
    alone = reference(short, rule=selection, kv_policy=kv_policy)
    torch.testing.assert_close(both.logits[:1, 5:], alone.logits, atol=ATOL, rtol=0)
    for i in range(LAYERS):
        for column in range(2):
            assert torch.equal(both.keep[i][column][:1, 5:], alone.keep[i][column])
            assert not both.keep[i][column][0, :5].any()
            score = both.scores[i][column]
            assert score is not None
            assert bool((score[0, :5] == float("-inf")).all())
    token = _ids(2, 1, seed=3)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    next_both = reference(token, longer, cache=both.cache, rule=selection, kv_policy=kv_policy)
    next_alone = reference(token[:1], cache=alone.cache, rule=selection, kv_policy=kv_policy)
    torch.testing.assert_close(next_both.logits[:1], next_alone.logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("budget", [1.0, 0.85, 0.5, 0.01])
def test_rank_keeps_the_best_of_the_call(tmp_path: Path, budget: float) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    ids = _ids(3, 11)
    ids[0, 4] = EOS_ID
    mask = torch.ones_like(ids)
    mask[2, :6] = 0
    output = _load(tmp_path)(ids, mask, rule=Rank(budget))
    n = 33 - 6 - 1
    for i in range(LAYERS):
        for column in range(2):
            keep, score = output.keep[i][column], output.scores[i][column]
            assert score is not None
            assert keep[0, 4]
            assert int(keep.sum()) == kept_count(n, budget) + 1
            ranked = mask.bool() & (ids != EOS_ID)
            if 0 < kept_count(n, budget) < n:
                assert score[ranked & keep].min() >= score[ranked & ~keep].max()


def test_equal_scores_keep_the_earlier_token(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    tensors = load_file(tmp_path / "model.safetensors")
    _edit(tmp_path, {name: torch.zeros_like(t) for name, t in tensors.items() if is_gate(name)})
    output = _load(tmp_path)(_ids(2, 6), rule=Rank(0.5))
    expected = (torch.arange(12) < kept_count(12, 0.5)).view(2, 6)
    assert all(torch.equal(keep, expected) for row in output.keep for keep in row)


def test_score_equal_to_the_threshold_skips(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig(kind="scalar"))
    tensors = load_file(tmp_path / "model.safetensors")
    _edit(tmp_path, {name: torch.zeros_like(t) for name, t in tensors.items() if is_gate(name)})
    reference, ids = _load(tmp_path), _ids(1, 6)
    assert not any(bool(k.any()) for row in reference(ids, rule=_thresholds(0.5)).keep for k in row)
    below = float(np.nextafter(np.float32(0.5), np.float32(0)))
    assert all(bool(k.all()) for row in reference(ids, rule=_thresholds(below)).keep for k in row)


def test_nothing_kept_passes_the_states_on(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    ids = _ids(2, 8)
    ids[1, 3] = EOS_ID
    output = _load(tmp_path)(ids, rule=_thresholds(float("inf")))
    skipped = ids != EOS_ID
    for state in output.states:
        assert torch.equal(state[skipped], output.states[0][skipped])
    assert not torch.equal(output.states[-1][1, 3], output.states[0][1, 3])
    for row in output.keep:
        for keep in row:
            assert torch.equal(keep, ~skipped)


def test_nan_counts_as_the_lowest_score(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    embedding[50] = float("nan")
    _edit(tmp_path, {"model.embed_tokens.weight": embedding})
    reference = _load(tmp_path)
    ids = _ids(1, 8, vocab=50)
    ids[0, -1] = 50
    for selection in (Rank(0.9), _thresholds(-1.0)):
        keep = reference(ids, rule=selection).keep
        assert all(not bool(k[0, -1]) for row in keep for k in row)
    assert int(reference(ids, rule=Rank(0.9)).keep[0][0].sum()) == kept_count(8, 0.9)


def test_copy_takes_keys_and_values_of_the_layer_below(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    reference, ids = _load(tmp_path), _ids(2, 12)
    copied = reference(ids, rule=Rank(0.5), kv_policy="copy")
    computed = reference(ids, rule=Rank(0.5))
    _assert_copied(copied)
    assert torch.equal(copied.cache.layers[0].keys, computed.cache.layers[0].keys)
    assert not torch.equal(copied.cache.layers[1].keys, computed.cache.layers[1].keys)


def _assert_copied(output: ReferenceOutput) -> None:
    for i in range(1, LAYERS):
        skipped = ~output.keep[i][0]
        assert bool(skipped.any())
        for part in ("keys", "values"):
            here = getattr(output.cache.layers[i], part).transpose(1, 2)
            below = getattr(output.cache.layers[i - 1], part).transpose(1, 2)
            assert torch.equal(here[skipped], below[skipped])
            assert not torch.isclose(here[~skipped], below[~skipped]).all(-1).any()


def test_exits_are_states_through_norm_and_head(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig(), tied=True)
    reference = _load(tmp_path)
    output = reference(_ids(2, 7), rule=Rank(0.7))
    assert len(output.states) == LAYERS + 1
    torch.testing.assert_close(reference.exit_logits(output, LAYERS), output.logits, atol=0, rtol=0)
    assert not torch.allclose(reference.exit_logits(output, 1), output.logits)


@pytest.mark.parametrize("kv_policy", ["compute", "copy"])
def test_greedy_is_the_argmax_without_a_cache(tmp_path: Path, kv_policy: KvPolicy) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    reference, selection = _load(tmp_path), _thresholds(0.5)
    ids = prompt = _ids(1, 5)
    for _ in range(12):
        logits = reference(ids, rule=selection, kv_policy=kv_policy).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    made = reference.greedy(prompt, 12, rule=selection, kv_policy=kv_policy, stop_at_end=False)
    assert torch.equal(made, ids[:, 5:])


def test_greedy_of_a_padded_batch_is_that_of_its_rows(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    reference, selection = _load(tmp_path), _thresholds(0.5)
    short, long = _ids(1, 4, seed=4), _ids(1, 9, seed=5)
    ids = torch.cat([torch.cat([torch.full((1, 5), PAD_ID), short], 1), long])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    both = reference.greedy(ids, 10, rule=selection, attention_mask=mask, stop_at_end=False)
    for row, prompt in enumerate((short, long)):
        alone = reference.greedy(prompt, 10, rule=selection, stop_at_end=False)
        assert torch.equal(both[row : row + 1], alone)


def test_greedy_stops_at_end_of_text(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    reference, prompt = _load(tmp_path), _ids(1, 5)
    free = reference.greedy(prompt, 6, stop_at_end=False)
    tiny_checkpoint(tmp_path, eos_token_id=[int(free[0, 2]), EOS_ID])
    first = int((free[0] == free[0, 2]).nonzero()[0])
    stopped = _load(tmp_path).greedy(prompt, 6)
    assert torch.equal(stopped, free[:, : first + 1])
    assert reference.greedy(prompt, 0).shape == (1, 0)


def test_half_weights_keep_float32_scores(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    reference = Reference.load(open_checkpoint(tmp_path), dtype=torch.bfloat16)
    output = reference(_ids(1, 6), rule=Rank(0.5))
    assert output.logits.dtype == torch.bfloat16
    assert output.scores[0][0] is not None
    assert output.scores[0][0].dtype == torch.float32


def test_refused_input(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, gate=GateConfig())
    reference, ids = _load(tmp_path), _ids(1, 6)
    with pytest.raises(UsageError, match=r"attention_mask has the wrong shape\n  expected \[1, 0 past \+ 6\]"):
        reference(ids, torch.ones(1, 5))
    with pytest.raises(UsageError, match=r"thresholds do not fit the model\n  expected 3 rows, found 4"):
        reference(ids, rule=Threshold(np.zeros((4, 2), np.float32)))


@pytest.mark.parametrize(("score", "margin"), [(0.25, 0.25), (-0.25, 0.75), (200.0, 199.5 / 200), (-8.0, 8.5 / 8)])
@pytest.mark.parametrize("rank", [False, True])
def test_margins_of_large_scores_are_relative(score: float, margin: float, rank: bool) -> None:
    """Scores before the sigmoid have no bound, and their rounding error grows with them."""
    valid = torch.ones(1, 2, dtype=torch.bool)
    call = MaskCall(valid.long(), valid, ~valid, valid.long(), 1, None, lambda _: torch.empty(0), _no_part)
    other = torch.zeros(1, 2, 4)
    rule = Rank(0.5) if rank else Threshold(np.full((1, 2), 0.5, np.float32))
    decision = rule.start(call).decide(BranchInput(0, "mlp", other, other, torch.tensor([[score, 0.5]])))
    assert decision.margin[0, 0].item() == pytest.approx(margin)
