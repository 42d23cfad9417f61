"""`gsx tune`: the fastest form within a limit, what is taken over by a second run, and limits that nothing meets."""

from __future__ import annotations

import json
import math
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gsx
from gsx.cli import run
from gsx.comparison.front import front
from gsx.comparison.measure import LEAST_TOKENS
from gsx.comparison.options import ExportOptions
from gsx.parity.estimate import Estimate
from gsx.tuning.ledger import FILE, Ledger
from gsx.tuning.limit import Limit
from gsx.tuning.report import TuneReport
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings, controls_for
from gsx_exporter.rules.registry import RULES
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

# Half a minute of processor time, of which a busy machine may make ten.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Short answers: here times need not be exact.
ANSWERS = {"prompt_tokens": 32, "new_tokens": 24}
# Of random weights, every form is far from the whole model in tokens; any loss is within this.
ANY_LOSS = 50.0


@pytest.fixture(autouse=True, scope="module")
def little_work() -> Iterator[None]:
    """One rule, one scheme of quantization that chooses no codes, no search for drafts, and few rounds of timing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gsx.workflows.fitting.every_rule", lambda: ({"layers": RULES["layers"]}, {}))
        patch.setattr("gsx.workflows.tune_search._FINALISTS", 1)
        patch.setattr("gsx.workflows.tune_search._SCHEMES", {None: 1, "int8-weights": 3})
        patch.setattr("gsx.workflows.tune_search.Search._drafts", lambda self, best: iter(()))
        patch.setattr("gsx.workflows.tune_search._MOST_SETS", 1)
        patch.setattr("gsx.tuning.bench.BENCH_ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that half of its layers take clearly less time than all."""
    place = tmp_path_factory.mktemp("tune") / "model"
    return tiny_checkpoint(place, layers=4, hidden_size=128, intermediate_size=1536, tokenizer=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tune")


@pytest.fixture(scope="module")
def report(folder: Path, model: Path, tiny_text: Path) -> TuneReport:
    return tuned(folder, model, tiny_text, "first", max_loss=ANY_LOSS)


def tuned(folder: Path, model: Path, text: Path, name: str, **options: float) -> TuneReport:
    work, place = folder / "work", folder / name
    return gsx.tune(model, place, work=work, text=text, tokens=LEAST_TOKENS, **{"seconds": 600.0, **ANSWERS, **options})


def test_the_best_is_the_fastest_within_the_limit(report: TuneReport) -> None:
    whole, *others = report.points
    assert (whole.divergence.value, whole.differing.value, whole.speed) == (0, 0, 1)
    assert {one.options.scheme for one in others} == {None, "int8-weights"}
    assert any(one.setting.startswith("without 1 of 4") for one in others)
    faster = [one for one in others if one.times is not None and one.speed > 1]
    assert faster, "leaving half of the layers out is faster on any machine"
    assert report.best is not None
    assert report.points[report.best].speed == max(one.speed for one in faster)


def test_the_front_is_beaten_by_nothing(report: TuneReport) -> None:
    for one in report.front:
        assert not [
            other
            for other in report.points
            if other.times is not None and report.loss(other) < report.loss(one) and other.speed > one.speed
        ]


def test_the_bundle_does_by_default_what_was_measured(report: TuneReport) -> None:
    assert report.best is not None
    assert report.output is not None
    best, bundle = report.points[report.best], open_bundle(report.output, check_weights=True)
    assert best.keep == AS_EXPORTED
    assert best.options == best.options.by_default(best.keep)
    assert (bundle.manifest.quantization is not None) == (best.options.scheme is not None)


def test_its_line_exports_it_again(report: TuneReport, tmp_path: Path) -> None:
    words = shlex.split(report.command)
    assert words[:2] == ["gsx", "export"]
    assert run([*words[1:-1], str(tmp_path / "again"), "--json"]) == 0
    assert report.output is not None
    again, first = open_bundle(tmp_path / "again").manifest, open_bundle(report.output).manifest
    assert again.weights.sha256 == first.weights.sha256
    assert again.policy == first.policy


def test_a_second_run_measures_nothing_again(
    report: TuneReport, folder: Path, model: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*/gsx.json")}
    for name in ("MeasuredBundle", "time_forms"):
        monkeypatch.delattr(f"gsx.tuning.bench.{name}")
    again = tuned(folder, model, tiny_text, "second", max_loss=ANY_LOSS)
    assert {path: path.stat().st_mtime_ns for path in (folder / "work").glob("*/gsx.json")} == made
    assert again.taken_over >= len(again.points) - 1
    assert (again.sentence, again.front) == (report.sentence, report.front)


def test_what_an_export_of_a_kind_takes_is_kept(report: TuneReport, folder: Path) -> None:
    assert report.points
    ledger = Ledger(folder / "work")
    for kind in ("int8-weights", "plain"):
        assert ledger.get("export of a kind", kind) > 0, kind


def test_a_limit_that_nothing_meets(
    report: TuneReport, folder: Path, model: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder / "none"
    options = ["--work", str(folder / "work"), "--text", str(tiny_text), "--tokens", str(LEAST_TOKENS)]
    answers = ["--prompt-tokens", "32", "--new-tokens", "24", "--time", "10m"]
    assert run(["tune", str(model), "-o", str(place), "--max-loss", "1e-12", *options, *answers]) == 1
    said = capsys.readouterr().out
    assert "Nothing faster than the whole model has at most 1e-12 nats. The nearest is" in said
    assert "times the limit" in said
    assert "nothing was written" in said
    assert not place.exists()
    assert "1e-12 nats" in (folder / "work" / "tune.html").read_text(encoding="utf-8")


def test_a_time_that_is_too_short(tmp_path: Path, model: Path, tiny_text: Path) -> None:
    with pytest.raises(UsageError, match="--time is too short for one measurement"):
        tuned(tmp_path, model, tiny_text, "out", seconds=1e-3)
    assert list((tmp_path / "work").glob("dense-*/gsx.json")), "the whole model is kept for the next run"


def test_an_interruption_says_what_is_kept(tmp_path: Path, model: Path, tiny_text: Path) -> None:
    work = tmp_path / "work"
    options = ["--work", str(work), "--text", str(tiny_text), "--tokens", str(LEAST_TOKENS)]
    command = [sys.executable, "-m", "gsx", "tune", str(model), "-o", str(tmp_path / "out"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "scoring" in line:
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGINT
    assert f"bundles and measurements stay in {work}" in err.strip().splitlines()[-1]
    assert "Traceback" not in err
    assert (work / FILE).is_file()
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_too_large_is_refused_before_work(
    tmp_path: Path, model: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsx.workflows.memory.available_memory", lambda: 1000)
    with pytest.raises(gsx.GsxError, match="not enough memory to tune this model"):
        tuned(tmp_path, model, tiny_text, "out")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--max-loss", "0", "--max-loss"),
        ("--max-loss", "nan", "--max-loss"),
        ("--min-same", "1", "--min-same"),
        ("--tokens", "8", "tokens to tune on"),
        ("--new-tokens", "1", "new tokens"),
        ("--prompt-tokens", "100000", "too short to tune on"),
    ],
)
def test_bad_options(
    option: str, value: str, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["tune", str(model), "-o", str(tmp_path / "out"), "--work", str(tmp_path / "work"), option, value]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_report_as_json(report: TuneReport) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert found["answer"] == report.sentence
    assert sum(one["on_front"] for one in found["points"]) == len(report.front)


def test_limits_are_decided_by_intervals() -> None:
    limit = Limit(0.02, None)
    none = Estimate(0.5, 0.4, 0.6, 100)
    assert limit.verdict(Estimate(0.01, 0.008, 0.012, 2000), none) == "within"
    assert limit.verdict(Estimate(0.03, 0.02, 0.04, 2000), none) == "over"
    assert limit.verdict(Estimate(0.01, 0.0, 0.06, 60), none) == "too few tokens"
    assert limit.verdict(Estimate(math.nan, -math.inf, math.inf, 60), none) == "over"
    both = Limit(0.02, 0.6)
    assert both.verdict(Estimate(0.01, 0.008, 0.012, 2000), Estimate(0.3, 0.29, 0.31, 2000)) == "within"
    assert both.verdict(Estimate(0.01, 0.008, 0.012, 2000), none) == "over"


@pytest.mark.parametrize(
    ("keep", "policy"),
    [
        (KeepSettings(layers="0-2"), "layers:0-2"),
        (KeepSettings(exit=3), "layers:0-2"),
        (KeepSettings(speedup=4 / 3), f"unified:{4 / 3!r}"),
        (AS_EXPORTED, "layers"),
    ],
)
def test_a_setting_as_the_default(keep: KeepSettings, policy: str, model: Path, tmp_path: Path) -> None:
    """The default of the bundle that is exported so is what a request gets that asks for the setting."""
    options = ExportOptions("layers").by_default(keep)
    assert options.policy == policy
    asked = controls_for(gsx.export(model, tmp_path / "any", policy="layers").manifest, keep, [4])
    given = controls_for(gsx.export(model, tmp_path / "own", policy=options.policy).manifest, AS_EXPORTED, [4])
    assert {name: value.tolist() for name, value in asked.items()} == {n: v.tolist() for n, v in given.items()}


@settings(suppress_health_check=[HealthCheck.too_slow])  # where the machine is busy
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=30))
def test_front_by_its_definition(points: list[tuple[int, int]]) -> None:
    found = front(points, lambda one: one[0], lambda one: one[1])
    wanted = {one for one in points if not [o for o in points if o != one and o[0] <= one[0] and o[1] <= one[1]]}
    assert set(found) == wanted
    assert [one[1] for one in found] == sorted((one[1] for one in found), reverse=True)
