"""What the suite tests on each family, as a table of docs/families.md: `python -m tests.families_page` writes it.

It is made from the rows of the parity tests, and from the names of families in tests of the runtimes and of training.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from gsx_exporter.families import FAMILIES
from gsx_exporter.gate_config import GateConfig
from tests.exporter.test_parity_families import ROWS, Row

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "families.md"
HEADER = "| `model_type` | dense | vector gates | scalar gates | also in tests of |"
# What tests are about that name a family -> their files.
AREAS = {
    "TensorRT steps": ("tests/engines/test_steps.py",),
    "TensorRT runner": ("tests/engines/test_tensorrt_runner.py",),
    "PyTorch runner": ("tests/gsx/test_torch_runtime.py",),
    "C++ and serving": ("tests/conftest.py",),
    "training": ("tests/exporter/test_training.py", "tests/exporter/test_training_losses.py"),
    "checkpoints": (
        "tests/exporter/test_layouts.py",
        "tests/exporter/test_adapters.py",
        "tests/exporter/test_gguf.py",
        "tests/exporter/test_text_part.py",
    ),
}
BRANCHES = {("attn",): "attention only", ("mlp",): "MLP only"}


def table() -> str:
    """The table, with a line for each family."""
    named = {area: frozenset(name for file in files for name in _strings(ROOT / file)) for area, files in AREAS.items()}
    lines = [HEADER, "|" + "---|" * HEADER.count(" | ") + "---|"]
    for family in FAMILIES:
        rows = [row for row in ROWS if row.family == family]
        kinds = [[row for row in rows if _kind(row.gate) == kind] for kind in ("dense", "vector", "scalar")]
        elsewhere = [area for area, names in named.items() if family in names]
        cells = [f"`{family}`", *("; ".join(map(_words, some)) for some in kinds), ", ".join(elsewhere)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(page: str) -> str:
    """The table in the text of the page."""
    return page[page.index(HEADER) :].split("\n\n")[0].rstrip("\n") + "\n"


def _strings(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _kind(gate: GateConfig | None) -> str:
    return "dense" if gate is None else gate.kind


def _words(row: Row) -> str:
    """What is special in a row of the parity tests."""
    found = []
    if row.gate is not None:
        found += [BRANCHES[row.gate.branches]] if row.gate.branches in BRANCHES else ["both branches"]
        found += ["by rank"] if row.select == "rank" else []
        found += ["K/V copied"] if row.kv_policy == "copy" else []
    for key, value in row.keys.items():
        if key in ("rope_parameters", "rope_scaling"):
            found.append(f"RoPE {value.get('rope_type', 'of two kinds')}")
            found += ["part of each head rotated"] if "partial_rotary_factor" in value else []
        elif key != "seed":
            found.append(f"`{key}`")
    found += ["tied"] if row.tied else []
    found += ["shards"] if row.sharded else []
    found += [f"context {row.context}"] if row.context else []
    return ", ".join(found) or "plain"


def main() -> None:
    """Put the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(shown(page), table()), encoding="utf-8")


if __name__ == "__main__":
    main()
