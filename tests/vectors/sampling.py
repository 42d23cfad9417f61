"""Vectors of `sampling.json`: which token is picked, for every kind of logits and way of sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gsx_engines.sampling import Picker, Sampling, TokenLogprobs, adjusted, candidates, logprobs_of
from gsx_plugins.errors import GsxError
from tests.vectors.toy import float_text, mix

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_k": 1},
    {"temperature": 0.9, "top_p": 0.5},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.95},
    {"temperature": 1e-6},
    {"temperature": 1e-300, "top_p": 0.9},
    {"temperature": 2.5, "top_k": 10_000, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.4, "min_p": 1.0},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.3},
]
# What changes logits, for a prompt and new tokens.
PROMPT, NEW = [0, 3, 19, 3, 7], [7, 0, 7, 7, 11]
ADJUSTING: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"frequency_penalty": 0.37},
    {"presence_penalty": -1.1},
    {"logit_bias": {0: -100.0, 5: 100.0, 7: 0.3}},
    {
        "repetition_penalty": 1.1,
        "frequency_penalty": 1.7,
        "presence_penalty": 0.9,
        "logit_bias": {1: 3.3, 3: -0.7, 19: 1e-9},
    },
]
# name -> (number of logits, the logit of a hash's 24 bits)
KINDS: dict[str, tuple[int, Callable[[int], float]]] = {
    "one": (1, lambda bits: bits * 2.0**-20),
    "ties": (64, lambda bits: float(bits % 4)),
    "all equal": (300, lambda bits: -3.5),
    "wide": (1000, lambda bits: (bits - 2**23) * 2.0**-17),
    "close": (1000, lambda bits: (bits - 2**23) * 2.0**-23),
    "one ruled out": (20, lambda bits: -math.inf if bits % 3 == 0 else float(bits % 4)),
}
# With these no token can be chosen.
REFUSED_KINDS: dict[str, tuple[int, Callable[[int], float]]] = {
    "some are no numbers": (20, lambda bits: math.nan if bits % 3 == 0 else float(bits % 4)),
    "some are infinite": (20, lambda bits: math.inf if bits % 3 == 0 else float(bits % 4)),
    "all ruled out": (20, lambda bits: -math.inf),
}


def kind_logits(kind: str, seed: int) -> np.ndarray:
    """Logits [V] float32 of a kind: exact in every language."""
    size, logit = (KINDS | REFUSED_KINDS)[kind]
    return np.array([logit(mix(seed, v) >> 8) for v in range(size)], np.float32)


def vectors() -> list[dict[str, Any]]:
    """Picks at several places, and what is refused."""
    cases = []
    for kind in KINDS:
        for number, options in enumerate(SAMPLINGS):
            sampling = Sampling(**options, seed=(number * 0x9E3779B97F4A7C15) % 2**64)
            logits = kind_logits(kind, number)
            places = [(sequence, place) for sequence in (0, 3) for place in (0, 1, 17, 4095)]
            cases.append(
                {
                    "kind": kind,
                    "logits_seed": number,
                    "sampling": {**options, "seed": sampling.seed},
                    "candidates": None if sampling.greedy else len(candidates(logits, sampling)[0]),
                    "logprobs": _logprobs(logprobs_of(logits, 0, min(number, len(logits)))),
                    "picks": [[*at, Picker(sampling).pick(logits, *at)] for at in places],
                }
            )
    for number, options in enumerate(ADJUSTING):
        for kind in ("wide", "one ruled out"):
            changed = adjusted(kind_logits(kind, number), Sampling(**options), PROMPT, NEW)
            cases.append(
                {
                    "kind": kind,
                    "logits_seed": number,
                    "sampling": {"temperature": 0.0, **options},
                    "text": [PROMPT, NEW],
                    "adjusted": changed.view(np.uint32).tolist(),
                }
            )
    for kind in REFUSED_KINDS:
        for options in SAMPLINGS[:3]:
            sampling = Sampling(**options, seed=1)
            try:
                Picker(sampling).pick(kind_logits(kind, 0), 0, 0)
            except GsxError as error:
                asked = {**options, "seed": sampling.seed}
                cases.append({"kind": kind, "logits_seed": 0, "sampling": asked, "error": str(error)})
            else:
                raise AssertionError(f"{kind}, {options}: nobody refused")
    return cases


def _logprobs(found: TokenLogprobs) -> dict[str, Any]:
    return {"logprob": float_text(found.logprob), "top": [[token, float_text(one)] for token, one in found.top]}
