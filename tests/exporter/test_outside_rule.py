"""A keep rule of another package: installed beside gsx, it is exported, verified and run; nothing of gsx changes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

import gsx
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.policy import OutsidePolicy
from gsx_engines.errors import BundleError
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.rules.registry import GROUP, rule_named, rule_names, traced_rule
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "examples" / "keep_rule"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example package, installed by pip as a user would, into a folder that this process imports from."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(PACKAGE)], check=True)
    sys.path.insert(0, str(target))
    yield target
    sys.path.remove(str(target))
    for name in [name for name in sys.modules if name.split(".")[0] == "norm_skip"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model."""
    return tiny_checkpoint(tmp_path_factory.mktemp("outside") / "model", tokenizer=True)


@pytest.fixture(scope="module")
def bundle(installed: Path, model: Path, tiny_text: Path) -> Path:
    """Its export with the rule."""
    out = model.parent / "bundle"
    gsx.export(model, out, policy="norm-skip", budget=0.8, calibration=tiny_text, calibration_tokens=1024)
    return out


def test_it_is_among_the_rules(installed: Path) -> None:
    assert [entry.name for entry in entry_points(group=GROUP)] == ["norm-skip"]
    assert "norm-skip" in rule_names()
    assert rule_named("norm-skip").name == "norm-skip"


def test_the_bundle_records_it(bundle: Path, model: Path) -> None:
    manifest = open_bundle(bundle).manifest
    assert isinstance(manifest.policy, OutsidePolicy)
    assert manifest.policy.parameters == {"skipped": ["attn", "mlp"]}
    assert traced_rule(manifest.policy, manifest.selection, open_checkpoint(model).config) is not None


@pytest.mark.slow
def test_it_is_verified(bundle: Path, tiny_text: Path) -> None:
    report = gsx.verify(bundle, text=tiny_text, tokens=256, greedy_tokens=16, budgets=(1.0, 0.8))
    assert [check.name for check in report.checks if check.verdict == "fail"] == []
    shares = [result.kept_share for result in report.results if result.kept_share is not None]
    assert shares[0] == 1
    assert 0.6 < shares[-1] < 0.95  # another text than the calibrated one


def test_running_it_needs_no_package(bundle: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_package = gsx.generate(bundle, "token 3", max_new_tokens=12, budget=0.8)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(installed)])
    without = gsx.generate(bundle, "token 3", max_new_tokens=12, budget=0.8)
    assert without.ids == with_package.ids
    assert without.stats.kept_share is not None
    assert without.stats.kept_share < 1
    with pytest.raises(BundleError, match=r"(?s)gsx\.json: policy 'norm-skip' is not known.*the package of the rule"):
        gsx.verify(bundle)


def test_parameters_are_read_as_those_of_other_rules(installed: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)norm-skip: its parameters.*branch=attn or branch=mlp.*branch=k"):
        gsx.export(model, tmp_path / "out", policy="norm-skip:branch=k")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [("norm_skip.nowhere:RULE", "cannot be imported"), ("norm_skip:__doc__", "is not a keep rule with that name")],
)
def test_a_package_that_gives_no_rule_is_refused(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    information = tmp_path / "broken-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (information / "entry_points.txt").write_text(f"[{GROUP}]\nbroken = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=message):
        rule_named("broken")
    assert rule_named("gateskip").name == "gateskip", "other rules work"


def test_the_page_shows_the_package() -> None:
    """Each listing of docs/keep-rules.md that names a file is that file."""
    page = (ROOT / "docs" / "keep-rules.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"`(examples/keep_rule/[\w./]+)`:\n\n```\w+\n(.*?)```", page, flags=re.DOTALL))
    parts = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.suffix in (".py", ".toml")}
    assert set(shown) == parts - {"examples/keep_rule/norm_skip/__init__.py"}
    for name, text in shown.items():
        assert text == (ROOT / name).read_text(encoding="utf-8"), name


def test_it_reaches_the_rows(bundle: Path) -> None:
    """Thresholds differ by branch, so that something is skipped, and not everything."""
    selection = open_bundle(bundle).manifest.selection
    assert selection is not None
    table = selection.thresholds_for(0.8)
    assert np.isfinite(table).all()
