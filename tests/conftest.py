"""Fixtures that are dear to make (an export traces the model for seconds) and so are made once a session.

What a test changes, it copies first.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gsx_engines.tensorrt.preload import preload_tensorrt_rtx
from gsx_exporter.config import GateConfig

# Before any test imports it: plugins then work in whatever test comes first.
preload_tensorrt_rtx()

# Enough for a calibration window of the tiny model, whose tokenizer makes a token of every byte.
TEXT_BYTES = 6000


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UTF-8 text of a few thousand bytes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = [f"token {n} keeps layer {n * 7 % 13} and skips {n * 5 % 11};" for n in range(400)]
    path.write_text("\n".join(words)[:TEXT_BYTES], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with vector gates on both branches, and a tokenizer."""
    from tests.tiny import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "gated", gate=GateConfig(), tokenizer=True, exits=(1, 2))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_gated: Path, tiny_text: Path) -> Path:
    """`tiny_gated`, exported at budget 0.7."""
    from gsx.workflows.export import export

    out = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_gated, out, budget=0.7, calibration=tiny_text, calibration_tokens=1024)
    return out


@pytest.fixture(scope="session")
def make_tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory, tiny_gated: Path, tiny_text: Path
) -> Callable[..., Path]:
    """Exports `tiny_gated` with options of one's own; each set of options once."""
    from gsx.workflows.export import export

    made: dict[tuple[tuple[str, object], ...], Path] = {}

    def make(**options: Any) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("bundle") / "tiny"
            text = None if options.get("select") == "rank" else tiny_text  # ranks need no text
            export(tiny_gated, out, **{"budget": 0.7, "calibration_tokens": 1024, "calibration": text, **options})
            made[key] = out
        return made[key]

    return make
