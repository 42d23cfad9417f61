"""The native library, built once for all tests that need it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gsx_plugins.build import build
from gsx_plugins.errors import PluginLibraryError


@pytest.fixture(scope="session")
def plugin_library() -> Path:
    """The plugin library of these sources, from the cache or built now (every architecture, warnings are errors)."""
    try:
        return build().path
    except PluginLibraryError as error:
        if "failed" in error.what:
            raise
        pytest.skip(f"the plugins cannot be built here: {error}")
