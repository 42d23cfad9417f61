"""The C++ runtime, given ids, gives the ids of transformers; ONNX Runtime stands in for TensorRT (`piped.py`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import gsx
from gsx_engines.bundle.bundle import Bundle, open_bundle
from tests.checkpoints import BASES
from tests.doors import NEW_TOKENS, expected
from tests.engines.cpp.piped import generate_in_cpp


@pytest.mark.parametrize("base", BASES)
def test_ids(
    cpp_build: Path, base_models: dict[str, Path], base_bundles: dict[str, Bundle], tmp_path: Path, base: str
) -> None:
    wanted = [*expected(base_models[base]).values()]
    prompts = [one.prompt_ids for one in wanted]
    found = generate_in_cpp(cpp_build, base_bundles[base], tmp_path / "bundle", prompts, NEW_TOKENS)
    assert [answer["ids"] for answer in found] == [one.ids for one in wanted]
    in_python = [gsx.generate(base_bundles[base], ids=ids, max_new_tokens=NEW_TOKENS, threads=1) for ids in prompts]
    assert [answer["finish"] for answer in found] == [one.finish for one in in_python]
    assert {"end-of-text", "length"} <= {answer["finish"] for answer in found}


def test_other_families(cpp_build: Path, family_bundle: Bundle, tmp_path: Path) -> None:
    """The C++ runtime needs to know nothing of a family: it reads the bundle, and decodes what its engines say."""
    prompts = [[5, 60, 61], [7, 8]]
    found = generate_in_cpp(cpp_build, family_bundle, tmp_path / "bundle", prompts, 12)
    in_python = [gsx.generate(family_bundle, ids=ids, max_new_tokens=12, threads=1) for ids in prompts]
    assert [answer["ids"] for answer in found] == [one.ids for one in in_python]


@pytest.mark.parametrize("policy", ["layers:0,2", "unified:1.5"])
def test_sets_of_layers(cpp_build: Path, make_tiny_bundle: Callable[..., Path], tmp_path: Path, policy: str) -> None:
    """The host decides on their branches, so it must give the engine the same numbers of rows as Python does."""
    bundle = open_bundle(make_tiny_bundle(policy=policy, budget=None, calibration=None))
    prompts = [[5, 60, 61], [7, 8, 200, 30, 11]]
    found = generate_in_cpp(cpp_build, bundle, tmp_path / "bundle", prompts, 12)
    in_python = [gsx.generate(bundle, ids=ids, max_new_tokens=12, threads=1) for ids in prompts]
    assert [answer["ids"] for answer in found] == [one.ids for one in in_python]
