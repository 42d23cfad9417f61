"""`model.onnx`, unchanged, in a client that this project did not write: ONNX Runtime GenAI."""

from __future__ import annotations

from pathlib import Path

import pytest

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.generation.generate import generate
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.whole import WholeRunner

pytest.importorskip("onnxruntime_genai", reason="ONNX Runtime GenAI is not installed: pip install onnxruntime-genai")


def test_genai_writes_the_same_tokens(tiny_bundle: Path) -> None:
    """At the exported budget: GenAI feeds no thresholds, so the default in the file applies."""
    from examples.genai_client import greedy

    bundle = open_bundle(tiny_bundle)
    prompt = [5, 60, 61, 7, 8]
    ours = generate(WholeRunner(PortableStage(bundle)), [prompt], max_new_tokens=40).sequences[0].tokens
    theirs = greedy(bundle, prompt, 40)
    assert theirs[: len(ours)] == ours
    assert len(set(ours)) > 3, "a constant output would prove nothing"
