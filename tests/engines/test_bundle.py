"""Opening and writing bundles: what is refused, what is kept, and how thresholds depend on the budget."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gsx_engines.bundle.bundle import MANIFEST, open_bundle, writing
from gsx_engines.bundle.selection import CalibrationText, GridPoint, Selection
from gsx_engines.errors import BundleError
from gsx_plugins.errors import GsxError, UsageError


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def edit(path: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_opens(bundle: Path) -> None:
    opened = open_bundle(bundle, check_weights=True)
    assert opened.manifest.decoder.num_layers == 3
    assert opened.graph_path("model").is_file()


DAMAGE = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "is not a bundle"),
    "not JSON": (lambda d: (d / MANIFEST).write_text("{"), "not readable JSON"),
    "another schema": (lambda d: edit(d / MANIFEST, lambda m: m.update(schema_version=99)), "schema_version 99"),
    "unknown key": (lambda d: edit(d / MANIFEST, lambda m: m.update(surprise=1)), "surprise"),
    "a path outside": (
        lambda d: edit(d / MANIFEST, lambda m: m["weights"].update(file="../weights.bin")),
        "weights.file",
    ),
    "thresholds of another depth": (
        lambda d: edit(d / MANIFEST, lambda m: m["selection"]["grid"][0]["thresholds"].pop()),
        "thresholds are for",
    ),
    "no graph": (lambda d: (d / "model.onnx").unlink(), "model.onnx is missing"),
    "changed graph": (lambda d: (d / "model.onnx").write_bytes(b"x"), "does not match gsx.json"),
    "truncated weights": (lambda d: (d / "weights.bin").write_bytes(b"x"), "found 1 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(bundle: Path, case: str) -> None:
    damage, expected = DAMAGE[case]
    damage(bundle)
    with pytest.raises(BundleError, match=expected.replace(".", r"\.")):
        open_bundle(bundle)


def test_changed_weights_are_found_when_asked(bundle: Path) -> None:
    data = bytearray((bundle / "weights.bin").read_bytes())
    data[100] ^= 1
    (bundle / "weights.bin").write_bytes(data)
    open_bundle(bundle)
    with pytest.raises(BundleError, match=r"weights\.bin does not match"):
        open_bundle(bundle, check_weights=True)


def test_writing_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), writing(target, overwrite=False) as work:  # noqa: PT012
        (work / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with writing(target, overwrite=False) as work:
        (work / MANIFEST).write_text("{}")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(UsageError, match="--overwrite replaces"), writing(target, overwrite=False):
        pass
    with pytest.raises(RuntimeError), writing(target, overwrite=True) as work:
        raise RuntimeError
    assert (target / MANIFEST).read_text() == "{}", "the old bundle survives a failed replacement"
    with writing(target, overwrite=True) as work:
        (work / MANIFEST).write_text("[]")
    assert (target / MANIFEST).read_text() == "[]"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_bundles_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("cat")
    with pytest.raises(UsageError, match="not a bundle"), writing(tmp_path / "photos", overwrite=True):
        pass
    with pytest.raises(UsageError, match="not a directory"), writing(tmp_path / "photos" / "cat.jpg", overwrite=True):
        pass


def test_a_full_disk_is_refused_beforehand(tmp_path: Path) -> None:
    target, exabyte = tmp_path / "out", 1 << 60
    with pytest.raises(GsxError, match="not enough room"), writing(target, overwrite=False, needed_bytes=exabyte):
        pass


def selection(*points: tuple[float, float]) -> Selection:
    """Selection of a one-layer model: (budget, threshold of both branches)."""
    grid = tuple(GridPoint(budget=b, thresholds=((t, t),), kept_share=b, kept=((b, b),)) for b, t in points)
    text = CalibrationText(name="t", sha256="0" * 64, tokens=1)
    return Selection(mode="threshold", budget=points[0][0], grid=grid, calibration=text)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1.0, -math.inf), (0.9, 0.2), (0.7, 0.4), (0.8, 0.3), (0.75, 0.35), (0.95, 0.2)],
)
def test_thresholds_between_budgets(budget: float, expected: float) -> None:
    found = selection((1.0, -math.inf), (0.9, 0.2), (0.7, 0.4)).thresholds_for(budget)
    np.testing.assert_allclose(found, np.full((1, 2), expected, np.float32), rtol=1e-6)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, math.nan, math.inf, 0.5])
def test_budgets_outside_are_refused(budget: float) -> None:
    with pytest.raises(UsageError):
        selection((1.0, -math.inf), (0.7, 0.4)).thresholds_for(budget)


def test_infinite_thresholds_survive_json() -> None:
    before = selection((1.0, -math.inf), (0.7, 0.4))
    assert Selection.model_validate(json.loads(json.dumps(before.model_dump(mode="json")))) == before
