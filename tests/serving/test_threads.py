"""The default number of threads, which leaves one processor to the server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gsx_engines.serving.threads import threads_beside_server

NO_SIBLINGS = {number: str(number) for number in range(4)}
SIBLINGS = {number: f"{number % 2},{number % 2 + 2}" for number in range(4)}


@pytest.mark.parametrize(
    ("siblings", "usable", "threads"),
    [
        (NO_SIBLINGS, {0, 1, 2, 3}, 3),
        (NO_SIBLINGS, {1, 2}, 1),
        (NO_SIBLINGS, {3}, 1),
        (SIBLINGS, {0, 1, 2, 3}, 2),  # each core has a second processor for the server
        (SIBLINGS, {0, 1}, 1),
        (SIBLINGS, {0, 2}, 1),
        ({}, {0, 1, 2, 3}, 3),  # a container that hides them
    ],
)
def test_one_processor_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, siblings: dict[int, str], usable: set[int], threads: int
) -> None:
    for number, text in siblings.items():
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable)
    assert threads_beside_server(tmp_path) == threads
