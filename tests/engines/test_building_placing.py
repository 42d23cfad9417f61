"""A build changes a bundle completely or not at all, whatever else happens to the bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gsx_engines.building import build as building
from gsx_engines.building import placing
from gsx_engines.building.placing import writing_engines
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.engine_entry import EngineEntry
from gsx_engines.errors import BundleError, EngineError
from gsx_engines.tensorrt.loading import ENGINES
from gsx_plugins.errors import GsxError
from tests.engines.built import build_small, state


@pytest.mark.parametrize("error", [KeyboardInterrupt(), EngineError("refused"), OSError(28, "no space")])
def test_a_build_that_fails_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = state(bundle)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(building, "run_job", fail)
    with pytest.raises((KeyboardInterrupt, GsxError)):
        build_small(bundle, plugins="none")
    assert state(bundle) == before
    assert not (bundle / ENGINES).exists()


def test_a_manifest_that_cannot_be_written_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines have been moved into the bundle by then, and have replaced older ones."""
    build_small(bundle, plugins="none")
    before = state(bundle)

    def fail(*args: object) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(placing, "write_manifest", fail)
    with pytest.raises(GsxError, match=r"the disk is full\n  free some space, or build on a copy"):
        build_small(bundle, plugins="none")
    assert state(bundle) == before


def test_two_builds_of_one_bundle_and_what_a_killed_one_left(bundle: Path) -> None:
    """Each adds its engines to those of the other. A folder is removed when nobody works in it any more."""
    opened = open_bundle(bundle)
    _, entry = build_small(bundle, plugins="none")
    killed = bundle / ENGINES / ".other.abc.partial"
    killed.mkdir()
    with writing_engines(opened, "first", 0) as (one, finish_one):
        assert not killed.exists()
        with writing_engines(opened, "second", 0) as (_, finish_two):
            assert one.is_dir()
            finish_two(entry)
        finish_one(entry)
    assert {"first", "second"} < set(open_bundle(bundle).manifest.engines)
    assert sorted(path.name for path in (bundle / ENGINES).iterdir()) == sorted(open_bundle(bundle).manifest.engines)


def test_a_bundle_that_is_exported_again_while_it_is_built(bundle: Path) -> None:
    """The export replaces the folder that the build works in, or has other graphs."""
    opened = open_bundle(bundle)
    _, entry = build_small(bundle, plugins="none")
    before = state(bundle)
    other = opened.manifest.model_copy(update={"graphs": {}})
    for elsewhere, edit in ((Bundle(bundle, other), lambda work: None), (opened, shutil.rmtree)):
        with pytest.raises(BundleError, match="was replaced while its engines were built"):
            finish_after(elsewhere, entry, edit)
        assert state(bundle) == before


def finish_after(bundle: Bundle, entry: EngineEntry, edit: Callable[[Path], None]) -> None:
    with writing_engines(bundle, "new", 0) as (work, finish):
        edit(work)
        finish(entry)
