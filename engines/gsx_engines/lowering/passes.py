"""The parts of a lowering: named passes over one graph, in order, each with a count.

A pass is a function of the graph and of the lowering's task (the runtime's `Task`). Its docstring shows the pattern,
the replacement, and the reason; it returns how often it applied. Its name is the function's.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from gsx_engines.bundle.manifest import Manifest
from gsx_engines.errors import BundleError
from gsx_plugins.graph import Graph, LayoutError

T = TypeVar("T")
Pass = Callable[[Graph, T], int]

_log = logging.getLogger(__name__)


def of_any(rewrite: Callable[[Graph], int]) -> Pass[Any]:
    """Make a pass of a rewrite that works on any graph and does not need the task."""

    @functools.wraps(rewrite)
    def apply(graph: Graph, task: object) -> int:
        return rewrite(graph)

    return apply


def run_passes(graph: Graph, passes: Sequence[Pass[T]], task: T) -> Mapping[str, int]:
    """Run passes in order and store the graph.

    Returns: how often each applied, by its name, in the order of their first runs.
    Raises:
        LayoutError: the graph does not have the layout that a pass expects; the error names the pass.
    """
    counts: dict[str, int] = {}
    for rewrite in passes:
        graph.in_pass = name = rewrite.__name__
        counts[name] = counts.get(name, 0) + rewrite(graph, task)
    graph.in_pass = ""
    graph.store()
    _log.debug("graph %s: %s", graph.proto.name, ", ".join(f"{name} {count}" for name, count in counts.items()))
    return counts


def not_as_expected(path: Path, manifest: Manifest, error: LayoutError) -> BundleError:
    """The error for a bundle's graph that cannot be lowered: another version wrote it, or another program."""
    return BundleError(
        f"{path}: is not laid out as this version of gsx lays graphs out",
        expected=f"a graph of gsx {version('gsx')}",
        found=f"one of gsx {manifest.gsx_version} ({error})",
        todo="run `gsx export` again",
    )
