"""What the benchmarks share: options, rounds in turn, ratios and tables."""

from __future__ import annotations

import pytest

from benchmarks.measure import Table, in_turn, parse, parser, print_header, ratios, repeated, spread


def test_ratios_are_taken_within_a_round() -> None:
    """The machine slowed down by ten in the second round: the ratio of medians would be 5.5."""
    found = ratios([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert (found.median, found.least, found.most) == pytest.approx((2.0, 2.0, 2.2))
    assert f"{found:.2f}" == "2.00 (2.00 to 2.20)"
    assert f"{spread([3.0, 3.0]):.1f}" == "3.0"
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_the_first_round_does_not_count_and_the_order_is_reversed() -> None:
    ran: list[str] = []

    def run(name: str) -> int:
        ran.append(name)
        return len(ran)

    assert in_turn(["a", "b"], run, rounds=2) == {"a": [3, 6], "b": [4, 5]}
    assert ran == ["b", "a", "a", "b", "b", "a"]
    numbers = iter(range(4))
    assert repeated(lambda: next(numbers), rounds=3) == [1, 2, 3]


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
