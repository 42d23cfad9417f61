"""What the benchmarks share: options and tables."""

from __future__ import annotations

import pytest

from benchmarks.measure import Table, parse, parser, print_header


def test_quick_changes_only_what_is_not_given(tmp_path: object) -> None:
    made = parser("thing", "Doc.", work="files", rounds=9, threads=2, quick={"shape": "tiny"})
    made.add_argument("--shape", default="small")
    given = ["--work", f"{tmp_path}/work"]
    assert vars(parse(made, [*given, "--quick", "--rounds", "3"])) | {"quick_values": None} == {
        "quick": True,
        "quick_values": None,
        "rounds": 3,
        "shape": "tiny",
        "threads": 2,
        "work": parse(made, given).work,
    }


def test_header_and_table(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    made = parser("thing", "Doc.", work="files", rounds=9)
    arguments = ["--work", str(tmp_path), "--rounds", "2"]
    print_header(made, parse(made, arguments), arguments)
    command, _, machine = capsys.readouterr().out.splitlines()[:3]
    assert command == "    python -m benchmarks.thing --work DIR --rounds 2", "no path of this machine"
    assert " cores of " in machine
    assert "onnxruntime " in machine
    table = Table("form", "ms")
    table.row("dense", None)
    assert capsys.readouterr().out.splitlines() == ["| form | ms |", "|---|---|", "| dense |  |"]
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table.row("dense")
