"""What gsx promises, on a model that people trained: the same numbers, the same text, and answers that are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gsx
from gsx.parity.quality import closeness
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.runners.select import open_runner
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.evaluation import next_tokens
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.registry import reference_rule
from tests.real.conftest import MakeBundle

pytestmark = [pytest.mark.real, pytest.mark.slow]

# Logits reach 30 here. Two orders of summation in float32 over 30 layers, with activations of thousands in a few
# channels; measured: 7e-5.
LOGITS_ATOL = 5e-4
HALF = "0-7,23-29"


def logits_of(bundle: Bundle, windows: Sequence[np.ndarray], keep: KeepSettings | None = None) -> list[np.ndarray]:
    """Logits [S, V] of windows of text, by the runner that generates."""
    keep = keep or KeepSettings()
    runner, controls = open_runner(bundle), controls_for(bundle.manifest, keep)
    cache = runner.new_cache(1, len(windows[0]))
    found = []
    for window in windows:
        cache.roll_back([0])
        found.append(runner.step(cache, window[None], controls, logits="all").logits[0])
    return found


def test_dense_logits_are_those_of_pytorch(exported: MakeBundle, text: np.ndarray, wanted: list[np.ndarray]) -> None:
    (found,) = logits_of(exported(), text[:1])
    np.testing.assert_allclose(found, wanted[0], atol=LOGITS_ATOL, rtol=0)


def test_greedy_text_is_that_of_transformers(exported: MakeBundle, pytorch: Any, tokenizer: Any) -> None:
    prompt = "The most important thing about a lighthouse is"
    given = tokenizer(prompt, return_tensors="pt")
    theirs = pytorch.generate(**given, max_new_tokens=48, do_sample=False)[0, given.input_ids.shape[1] :].tolist()
    result = gsx.generate(exported(), prompt, max_new_tokens=48)
    assert result.ids == theirs
    assert len(set(theirs)) > 20, "a text that repeats itself would prove little"


def test_a_chat_names_the_capital_and_ends(exported: MakeBundle, tokenizer: Any) -> None:
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    result = gsx.generate(exported(), ids=ids, max_new_tokens=40)
    assert result.text is not None
    assert "Paris" in result.text
    assert result.finish == "end-of-text"


def test_half_of_the_layers(exported: MakeBundle, smollm2: Path, text: np.ndarray) -> None:
    """A set of layers computes what the masked reference computes, and runs half of the branches."""
    bundle, keep = exported(policy="layers"), KeepSettings(layers=HALF)
    window = text[0, :64]
    rule = reference_rule(bundle.manifest, controls_for(bundle.manifest, keep))
    reference = Reference.load(open_checkpoint(smollm2))
    wanted = reference(torch.from_numpy(window[None]), rule=rule, kv_policy=bundle.manifest.kv_policy)
    (found,) = logits_of(bundle, [window], keep)
    np.testing.assert_allclose(found, wanted.logits[0].numpy(), atol=LOGITS_ATOL, rtol=0)
    result = gsx.generate(bundle, "The capital of France is", layers=HALF, max_new_tokens=8)
    assert result.stats.kept_share == 0.5


# A scheme of quantization is a row here: its export options, and the largest divergence and least share of equal next
# tokens on 2,048 tokens. The limits leave room for the interval of so few tokens.
SCHEMES = {
    "INT8 weights": ({"quantize": gsx.Quantize("int8-weights")}, 0.009, 0.93),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quality_of_a_scheme(scheme: str, exported: MakeBundle, text: np.ndarray, wanted: list[np.ndarray]) -> None:
    options, most, least = SCHEMES[scheme]
    windows = text[: len(wanted)]
    sides = zip(windows, wanted, logits_of(exported(**options), windows), strict=True)
    found = closeness([next_tokens(*one) for one in sides])
    assert found.divergence.value <= most, found.divergence
    assert found.differing.value <= 1 - least, found.differing
