"""Bundles that an earlier version wrote open, verify and run: tests/data/README.md says where they come from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import gsx
from gsx_plugins.errors import UsageError

DATA = Path(__file__).parents[1] / "data" / "bundles-0.1.0"
EXPECTED: dict[str, list[dict[str, Any]]] = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
CHECKPOINTS = {"gateskip": "gated", "ffn-skip": "dense", "calm": "dense", "unified": "dense"}


@pytest.mark.parametrize("name", EXPECTED)
def test_they_generate_what_they_did(name: str) -> None:
    for row in EXPECTED[name]:
        found = gsx.generate(
            DATA / name, "token 12 keeps", max_new_tokens=24, temperature=1.0, seed=5, **row["options"]
        )
        assert list(found.ids) == row["ids"], row["options"]
        if not found.stats.drafted:  # how much is drafted depends on measured times
            assert found.stats.kept_share == row["kept_share"], row["options"]


@pytest.mark.parametrize("name", EXPECTED)
def test_their_manifests_have_the_same_keys(name: str) -> None:
    written = json.loads((DATA / name / "gsx.json").read_text(encoding="utf-8"))
    assert gsx.open_bundle(DATA / name).manifest.model_dump(mode="json") == written


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_they_are_verified(name: str, tmp_path: Path) -> None:
    bundle = shutil.copytree(DATA / name, tmp_path / name)  # a report is written into it
    report = gsx.verify(bundle, reference=str(DATA / CHECKPOINTS[name]), tokens=256, greedy_tokens=8)
    assert [check.name for check in report.checks if check.verdict == "fail"] == []


def test_a_bundle_from_before_policies_is_gateskip(tmp_path: Path) -> None:
    """The first bundles had a selection, and no section of a policy."""
    bundle = shutil.copytree(DATA / "gateskip", tmp_path / "bundle")
    manifest = json.loads((bundle / "gsx.json").read_text(encoding="utf-8"))
    policy = manifest.pop("policy")
    (bundle / "gsx.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = gsx.open_bundle(bundle).manifest.policy
    assert found is not None
    assert found.model_dump(mode="json") == policy


def test_their_budget_cannot_be_held() -> None:
    with pytest.raises(UsageError, match="the same for all sequences") as raised:
        gsx.generate(DATA / "gateskip", "token 12 keeps", hold=True)
    assert raised.value.todo == "export the model again"
