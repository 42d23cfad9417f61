"""The statistics of parity: what counts, what is left out, and what fails."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from gsx.parity.checks import Check
from gsx.parity.closeness import Compared, Comparer, Observation
from gsx.parity.difference import Accumulator, Place
from gsx.parity.report import _number
from gsx.parity.routes import Routes, routes_of
from gsx.parity.tolerances import TOLERANCES

L, S, H, V = 3, 6, 4, 5
NEAR_TIE = 1e-6


def observation(seed: int = 0) -> Observation:
    """A sequence in which every score is far from its threshold."""
    rng = np.random.default_rng(seed)
    rows = [rng.normal(size=(S, H)).astype(np.float32) for _ in range(3 * L)]
    scores = rng.uniform(0.2, 0.8, size=(L, 2, S)).astype(np.float32)
    return Observation(
        logits=rng.normal(size=(S, V)).astype(np.float32),
        states=rows[:L],
        keys=rows[L : 2 * L],
        values=rows[2 * L :],
        scores=scores,
        keep=scores > 0.5,
        margins=np.full(scores.shape, 0.1),
    )


def flipped(one: Observation, layer: int, column: int, position: int, margin: float) -> Observation:
    """The same, with one decision flipped; the reference's margin there is set in place."""
    assert one.margins is not None
    one.margins[layer, column, position] = margin
    keep = one.keep.copy()
    keep[layer, column, position] ^= True
    return dataclasses.replace(one, keep=keep, margins=None)


def comparer(*, causal: bool = True, copies: bool = False) -> Comparer:
    return Comparer(L, ("attn", "mlp"), causal=causal, near_tie=NEAR_TIE, copies=copies)


def compare(want: Observation, have: Observation, **options: bool) -> Compared:
    made = comparer(**options)
    made.add([want], [have])
    return made.result()


def test_equal_sides_have_no_error_and_compare_everything() -> None:
    one = observation()
    found = compare(one, one)
    assert found.logits.values == S * V
    assert found.logits.max_abs == 0
    assert [state.values for state in found.states] == [S * H] * L
    assert found.decisions is not None
    assert (found.decisions.total, found.decisions.compared) == (2 * L * S, 2 * L * S)
    assert found.decisions.flips == ()


def test_statistics_of_a_known_difference() -> None:
    want = np.ones((2, 2), np.float32)
    have = want + np.array([[0, 0], [0.5, 0]], np.float32)
    made = Accumulator(layer=7)
    made.add(want, have, np.array([True, True]), window=4)
    found = made.result()
    assert found.max_abs == 0.5
    assert found.mean_abs == 0.125
    assert found.rms == 0.25
    assert found.reference_rms == 1
    assert found.max_relative == 0.5
    assert found.worst == Place(window=4, position=1, layer=7)


def test_a_huge_token_does_not_hide_a_small_one() -> None:
    want = np.ones((101, 8), np.float32)
    want[0] = 10  # an attention sink: the whole tensor's root mean square is 1.4
    made = Accumulator()
    have = want.copy()
    have[50, 0] += 0.14
    made.add(want, have, np.ones(101, bool), 0)
    assert made.result().max_relative == pytest.approx(0.1, rel=0.02)
    have = want.copy()
    have[0, 0] += 0.14  # the same error where the values are ten times as large
    made = Accumulator()
    made.add(want, have, np.ones(101, bool), 0)
    assert made.result().max_relative == pytest.approx(0.014, rel=0.01)


def test_what_is_left_of_a_huge_state_has_its_rounding_error() -> None:
    """Attention sinks: the last layers take a huge state away again, and the rounding error of what was there stays."""
    want, have = observation(), observation()
    states = [np.ones((S, H), np.float32) for _ in range(L)]
    states[1][2] = 1e4
    found = [state.copy() for state in states]
    for layer in (1, 2):
        found[layer][2, 0] += 1.0
    result = compare(dataclasses.replace(want, states=states), dataclasses.replace(have, states=found))
    assert [state.max_relative for state in result.states] == pytest.approx([0, 1e-4, 1e-4], rel=1e-3)
    found[2][3, 0] += 1.0  # another token has no such excuse
    result = compare(dataclasses.replace(want, states=states), dataclasses.replace(have, states=found))
    assert result.states[2].max_relative == pytest.approx(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_counted_and_unusable(value: float) -> None:
    for side in (0, 1):  # of the engine, or of the reference
        both = observation(), observation()
        both[side].logits[2, 1] = value
        found = compare(*both)
        assert found.logits.not_finite == 1
        assert found.logits.max_abs == math.inf
        assert not found.logits.usable
        assert found.states[0].usable


def test_comparing_nothing_is_unusable() -> None:
    made = Accumulator()
    made.add(np.ones((2, 2)), np.ones((2, 2)), np.zeros(2, bool), 0)
    assert made.result().values == 0
    assert not made.result().usable


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        Accumulator().add(np.ones((2, 2)), np.ones((2, 3)), np.ones(2, bool), 0)


@pytest.mark.parametrize(
    ("margin", "near_tie"), [(0.0, True), (NEAR_TIE, True), (1.1 * NEAR_TIE, False), (math.inf, False)]
)
def test_a_flip_is_excused_up_to_the_near_tie_limit(margin: float, near_tie: bool) -> None:
    want = observation()
    found = compare(want, flipped(want, 1, 0, 3, margin)).decisions
    assert found is not None
    (flip,) = found.flips
    assert flip.near_tie is near_tie
    assert flip.place == Place(0, 3, 1, "attn")
    assert len(found.wrong) == (not near_tie)
    assert found.near_ties == near_tie


def test_only_what_depends_on_a_flip_is_left_out() -> None:
    want = observation()
    found = compare(want, flipped(want, 1, 0, 3, 0.0))
    assert found.decisions is not None
    assert found.decisions.tokens_left_out == S - 3
    assert [state.values // H for state in found.states] == [S, 3, 3]
    # K and V of layer 1 are computed from the state that comes in: they do not see the flip.
    assert [key.values // H for key in found.keys] == [S, S, 3]
    assert found.logits.values == 3 * V
    # Layer 0 whole, attention of layer 1 whole, and then the first three tokens.
    assert found.decisions.compared == 3 * S + 3 * 3


def test_with_copied_keys_a_flip_is_seen_by_its_own_layer() -> None:
    want = observation()
    found = compare(want, flipped(want, 1, 0, 3, 0.0), copies=True)
    assert [key.values // H for key in found.keys] == [S, 3, 3]


def test_with_rank_selection_a_flip_affects_the_whole_call() -> None:
    want, other = observation(), observation(1)
    made = comparer(causal=False)
    made.add([want, other], [flipped(want, 1, 1, 3, 0.0), other])
    found = made.result()
    assert [state.values // H for state in found.states] == [2 * S, 0, 0]
    assert not found.logits.usable


def test_flips_of_one_branch_are_all_listed_but_not_what_follows() -> None:
    want = observation()
    have = flipped(want, 1, 0, 2, 1.0)
    have = flipped(dataclasses.replace(have, margins=want.margins), 1, 0, 4, 1.0)
    have = flipped(dataclasses.replace(have, margins=want.margins), 2, 1, 5, 1.0)
    found = compare(want, have).decisions
    assert found is not None
    assert [flip.place.position for flip in found.flips] == [2, 4]
    assert found.differ == 3


def test_calls_add_up_and_windows_are_numbered() -> None:
    made = comparer()
    for seed in range(3):
        want, have = observation(seed), observation(seed)
        have.logits[0, 0] += seed
        made.add([want], [have])
    found = made.result().logits
    assert found.values == 3 * S * V
    assert found.max_abs == pytest.approx(2)
    assert found.worst is not None
    assert found.worst.window == 2


def test_logit_limit_grows_with_the_logits() -> None:
    limits = TOLERANCES["fp32"]
    assert limits.logit_limit(5.0) == 1e-4
    assert limits.logit_limit(10.0) == 1e-4
    assert limits.logit_limit(25.0) == pytest.approx(2.5e-4)


def test_limits_grow_with_the_references_own_error_but_not_far() -> None:
    limits = TOLERANCES["fp32"]

    def rounding(error: float) -> Compared:
        want, have = observation(), observation()
        have.logits[0, 0] += error
        have.states[0][0, 0] += error
        return compare(want, have)

    assert limits.logit_limit(5.0, rounding(1e-5)) == 1e-4
    assert limits.logit_limit(5.0, rounding(1e-4)) == pytest.approx(4e-4, rel=0.01)
    assert limits.logit_limit(5.0, rounding(1.0)) == pytest.approx(1e-3)
    assert limits.relative_limit(rounding(1e-6)) == limits.relative
    assert limits.relative_limit(rounding(1.0)) == 10 * limits.relative


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (12.0, "12"), (1.234e-5, "1.23e-05"), (0.5, "0.5"), (math.inf, "inf")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert _number(value) == text


def test_checks_are_plain_values() -> None:
    check = Check("x", 1.0, 0.0, None, "reported", "", "")
    assert dataclasses.asdict(check)["limit"] is None


ROUTER = np.array([[0.0, 3.0, 1.0], [2.0, 2.0, 0.0], [1.0, 0.0, 0.999], [5.0, 1.0, 1.0]])


def test_routes_and_how_near_they_were() -> None:
    kept = np.array([[True, True, True, False]])
    found = routes_of({0: ROUTER}, kept, 1)
    assert found.chosen[0].tolist() == [[False, True, False], [True, False, False], [True, False, False], [False] * 3]
    size = np.sqrt(np.square(ROUTER).mean(axis=1))
    wanted = np.array([2.0 / size[0], 0.0, 0.001 / size[2], np.inf])  # a token that skipped the layer chose nothing
    np.testing.assert_allclose(found.margins[0], wanted)
    np.testing.assert_allclose(found.nearest(4), wanted)
    assert np.isinf(routes_of({0: ROUTER}, kept, 3).margins[0]).all(), "all experts: nothing to choose"
    assert np.isinf(Routes().nearest(2)).all()


@pytest.mark.parametrize(("margin", "wrong"), [(1e-4, 0), (1e-2, 1)])
def test_a_token_that_went_to_another_expert_is_left_out_with_those_after_it(margin: float, wrong: int) -> None:
    one = observation()
    here, there = np.zeros((S, 3), bool), np.zeros((S, 3), bool)
    here[:, 0] = there[:, 0] = True
    there[3] = [False, True, False]
    margins = np.full(S, 1.0)
    margins[3] = margin
    want = dataclasses.replace(one, routes=Routes({1: here}, {1: margins}))
    have = dataclasses.replace(one, routes=Routes({1: there}))
    made = Comparer(L, ("attn", "mlp"), causal=True, near_tie=NEAR_TIE, copies=False, near_route=3e-4)
    made.add([want], [have])
    found = made.result()
    assert [state.values for state in found.states] == [S * H, 3 * H, 3 * H], "from the routed layer on"
    assert found.routing is not None
    assert (found.routing.total, found.routing.differ, len(found.routing.wrong)) == (S, 1, wrong)
    assert found.routing.flips[0].place == Place(0, 3, 1, "router")
    assert found.routing.tokens_left_out == S - 3
    made = Comparer(L, ("attn", "mlp"), causal=True, near_tie=NEAR_TIE, copies=False, near_route=None)
    made.add([want], [have])
    found = made.result()
    assert found.routing is not None
    assert (found.logits.values, found.routing.differ, found.routing.wrong) == (S * V, 1, ()), "without limits"
