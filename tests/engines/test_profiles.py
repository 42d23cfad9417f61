"""Optimization profiles: defaults, the command line's form, and which profile is used for a call."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gsx_engines.building.profiles import (
    DEFAULT_PREFILL_TOKENS,
    default_profiles,
    one_profile,
    parse_profile,
)
from gsx_engines.errors import EngineError
from gsx_engines.tensorrt.profile_choice import choose_profile, most_rows, most_tokens
from gsx_plugins.errors import UsageError


@given(capacity=st.integers(2, 200_000), batch=st.integers(1, 64))
def test_defaults_take_every_call_that_fits_the_cache(capacity: int, batch: int) -> None:
    profiles = default_profiles(capacity, batch)
    most = min(capacity, DEFAULT_PREFILL_TOKENS)
    assert most_tokens(profiles, batch) == most
    assert most_rows(profiles) == batch * most
    for tokens in {1, 2, most}:
        for window in {tokens, capacity}:
            chosen = profiles[choose_profile(profiles, batch, tokens, window)]
            assert chosen.name == ("decode" if tokens == 1 else "prefill")
    assert most_tokens(profiles, batch + 1) == 0
    (single,) = one_profile(capacity, batch)
    assert single.tokens.most == most
    assert [choose_profile([single], batch, tokens, capacity) for tokens in (1, 2, most)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("text", "tokens", "batch"),
    [
        ("decode:1", (1, 1, 1), (1, 1, 4)),
        ("chunk:2-8", (2, 8, 8), (1, 1, 4)),
        ("prefill:2-128-512", (2, 128, 512), (1, 1, 4)),
        ("prefill:2-128-512:1-2-8", (2, 128, 512), (1, 2, 8)),
        ("decode:1:8", (1, 1, 1), (8, 8, 8)),
    ],
)
def test_a_profile_as_it_is_given(text: str, tokens: tuple[int, ...], batch: tuple[int, ...]) -> None:
    profile = parse_profile(text, capacity=1024, batch=4)
    assert (profile.tokens, profile.batch) == (tokens, batch)
    assert profile.window.most == 1024
    assert profile.name == text.split(":")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected NAME:TOKENS"),
        ("decode", "found 'decode'"),
        ("decode:", "expected NAME:TOKENS"),
        ("decode:1:2:3", "expected NAME:TOKENS"),
        ("decode:-1", "expected NAME:TOKENS"),
        ("prefill:8-2", r"tokens are out of order\n.*found 8-2-2"),
        ("prefill:0-2", r"tokens are out of order\n.*found 0-2-2"),
        ("prefill:1:3-2-4", r"batch are out of order\n.*found 3-2-4"),
        ("prefill:2-2000", r"more tokens than the cache has columns\n.*at most 1024, found 2000\n.*--context"),
    ],
)
def test_a_profile_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_profile(text, capacity=1024, batch=1)


def test_of_those_that_fit_the_tightest_is_taken() -> None:
    profiles = [parse_profile(text, capacity=256, batch=1) for text in ("wide:1-64-256", "chunk:2-4-8", "decode:1")]
    assert [profiles[choose_profile(profiles, 1, tokens, 64)].name for tokens in (1, 2, 8, 9)] == [
        "decode",
        "chunk",
        "chunk",
        "wide",
    ]


def test_a_call_beyond_every_profile_names_the_axis_and_the_ranges() -> None:
    profiles = default_profiles(128, 2)
    with pytest.raises(EngineError) as error:
        choose_profile(profiles, 3, 1, 64)
    assert "prefill: batch 1 to 2, tokens 2 to 128, window 2 to 128; decode: batch 1 to 2, tokens 1" in str(error.value)
    assert "found batch 3, tokens 1, window 64" in str(error.value)
    assert "this call: batch out of range in each" in str(error.value)
    assert "gsx build" in str(error.value)
    with pytest.raises(EngineError, match="this call: batch and window out of range in each"):
        choose_profile(profiles, 3, 1, 192)
    apart = [parse_profile(text, capacity=128, batch=1) for text in ("wide:64-128", "many:1:2-4")]
    with pytest.raises(EngineError, match="this call: each has some axis out of range"):
        choose_profile(apart, 2, 64, 64)
