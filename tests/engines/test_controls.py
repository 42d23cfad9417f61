"""A request's keep settings, and the run-time values that they give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, controls_for, rows_of, shared_by_batch, stacked
from gsx_engines.bundle.drafts import places_text
from gsx_engines.bundle.layer_sets import exit_places, mask_of, parse_places, unified_places
from gsx_engines.bundle.manifest import DecoderShape, Manifest
from gsx_engines.bundle.policy import Policy, RuntimeInput
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_plugins.errors import UsageError

LAYERS = 6


def manifest_of(policy: Policy | None, kv_policy: str = "none") -> Manifest:
    """A manifest in which only shape and policy matter."""
    shape = DecoderShape.model_construct(num_layers=LAYERS)
    return Manifest.model_construct(decoder=shape, selection=None, gates=None, policy=policy, kv_policy=kv_policy)


def sets_policy(name: str = "layers", exits: tuple[int, ...] = (), warm_up: int | None = None) -> Policy:
    full = [[1.0, 1.0]] * LAYERS
    reads = (
        RuntimeInput(name="layer_mask", least=0, most=1, default=full),
        RuntimeInput(name="full_until", least=0, most=None, default=0),
    )
    section = {"name": name, "branches": BRANCHES, "inputs": reads, "exits": exits, "warm_up": warm_up}
    parameters = {"layers": "0-5", **({"speedup": 2.0} if name == "unified" else {})}
    found: Policy = TypeAdapter(Policy).validate_python({**section, "parameters": parameters})
    return found


# From docs/methods.md section 7, which has them from the authors' code.
UNIFIED = [
    (30, 2, [*range(0, 27, 2), 29]),
    (30, 3, [*range(0, 25, 3), 29]),
    (30, 5, [0, 6, 12, 18, 24, 29]),
    (30, 10, [0, 15, 29]),
    (32, 4, [*range(0, 25, 4), 31]),
    (16, 1, list(range(16))),
    (2, 1, [0, 1]),
]


@pytest.mark.parametrize(("layers", "speedup", "kept"), UNIFIED)
def test_unified_keeps_the_published_sets(layers: int, speedup: float, kept: list[int]) -> None:
    assert unified_places(layers, speedup) == tuple((layer, branch) for layer in kept for branch in BRANCHES)


@given(st.integers(2, 80), st.floats(1, 40))
def test_unified_keeps_as_many_as_the_target_says(layers: int, speedup: float) -> None:
    wanted = int(np.floor(layers / speedup + 1e-9))
    if wanted < 2:
        with pytest.raises(UsageError, match="fewer than two"):
            unified_places(layers, speedup)
        return
    kept = sorted({layer for layer, _ in unified_places(layers, speedup)})
    assert len(kept) == wanted
    assert (kept[0], kept[-1]) == (0, layers - 1)


@pytest.mark.parametrize("speedup", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_a_speedup_that_is_refused(speedup: float) -> None:
    with pytest.raises(UsageError, match="the speed-up is out of range"):
        unified_places(30, speedup)


BAD_SETS = [
    (
        KeepSettings(layers="0-7"),
        "none",
        r"layers that the model does not have\n  expected layers from 0 to 5, found 6, 7",
    ),
    (KeepSettings(layers="x"), "none", "'x' is not a set of layers"),
    (KeepSettings(layers=""), "none", "is not a set of layers"),
    (KeepSettings(layers="1-5"), "copy", "drops the first layer's attention"),
    (KeepSettings(layers="0.mlp,1-5"), "copy", "drops the first layer's attention"),
    (KeepSettings(exit=0), "none", r"no exit after 0 layers\n  expected 1 to 6"),
    (KeepSettings(exit=7), "none", "no exit after 7 layers"),
    (KeepSettings(speedup=5.0), "none", "fewer than two of 6 layers"),
    (KeepSettings(budget=0.5), "none", "no budget to choose"),
]


@pytest.mark.parametrize(("keep", "kv_policy", "message"), BAD_SETS)
def test_sets_that_are_refused(keep: KeepSettings, kv_policy: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        controls_for(manifest_of(sets_policy(), kv_policy), keep)


def test_a_set_that_keeps_nothing() -> None:
    with pytest.raises(UsageError, match="keeps nothing"):
        mask_of((), LAYERS, "none")


def test_exits_are_the_ones_of_the_checkpoint() -> None:
    manifest = manifest_of(sets_policy(exits=(2, 4)))
    assert controls_for(manifest, KeepSettings(exit=2))["layer_mask"][0, :, 0].tolist() == [1, 1, 0, 0, 0, 0]
    with pytest.raises(UsageError, match=r"expected one of 2, 4, 6, found 3\n  to run these layers anyway, .* set 0-2"):
        controls_for(manifest, KeepSettings(exit=3))
    assert len(exit_places(3, LAYERS)) == 3 * len(BRANCHES)


def test_two_choices_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="only one setting may decide what is kept"):
        KeepSettings(budget=0.5, exit=2)


@pytest.mark.parametrize("keep", [KeepSettings(layers="0-2"), KeepSettings(exit=1), KeepSettings(speedup=2.0)])
def test_a_dense_bundle_has_no_sets(keep: KeepSettings) -> None:
    with pytest.raises(UsageError, match="the policy layers"):
        controls_for(manifest_of(None), keep)


PROMPTS = [
    (None, AS_EXPORTED, 0),
    (0, AS_EXPORTED, 7),
    (3, AS_EXPORTED, 10),
    (0, KeepSettings(layers="0-3"), 0),
    (0, KeepSettings(exit=2), 0),
    (None, KeepSettings(speedup=2.0), 7),
]


@pytest.mark.parametrize(("warm_up", "keep", "until"), PROMPTS)
def test_where_the_rule_begins(warm_up: int | None, keep: KeepSettings, until: int) -> None:
    manifest = manifest_of(sets_policy(warm_up=warm_up))
    assert controls_for(manifest, keep, [7])["full_until"].tolist() == [until]
    assert controls_for(manifest, keep)["full_until"].tolist() == [0], "scoring applies the rule to every token"


def test_every_sequence_has_its_own_set() -> None:
    manifest = manifest_of(sets_policy())
    both = controls_for(manifest, [KeepSettings(layers="0"), KeepSettings(exit=3)], [4, 5])
    assert both["layer_mask"].sum(axis=(1, 2)).tolist() == [2, 6]
    alone = [
        controls_for(manifest, keep, [n]) for keep, n in ((KeepSettings(layers="0"), 4), (KeepSettings(exit=3), 5))
    ]
    joined = stacked([*alone, None])
    for name, value in both.items():
        assert np.array_equal(joined[name][:2], value)
        assert np.array_equal(rows_of(joined, slice(1, 2))[name], alone[1][name])
    assert shared_by_batch(alone[0]) == shared_by_batch(alone[1])


places = st.tuples(st.integers(0, 12), st.sampled_from(BRANCHES))


@given(st.sets(places, min_size=1))
def test_a_set_reads_as_it_is_written(kept: set[tuple[int, Branch]]) -> None:
    assert set(parse_places(places_text(kept))) == kept


def test_an_endless_text_is_not_a_set() -> None:
    with pytest.raises(ValueError, match="0-999"):
        parse_places(",".join(["0-999"] * 100_000))
