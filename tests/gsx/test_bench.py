"""`gsx bench`: rounds and ratios, forms, what is counted, the report, processes of their own, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gsx as api
from gsx.benchmarking import worker
from gsx.benchmarking.forms import forms_of, parse_setting, prompts_of
from gsx.benchmarking.process import Worker
from gsx.benchmarking.report import BenchReport
from gsx.benchmarking.rounds import in_turn, ratios, repeated, spread
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import AS_EXPORTED, KeepSettings
from gsx_engines.bundle.cost import step_bytes, work_of
from gsx_plugins.errors import GsxError
from tests.conftest import MakeOnce
from tests.gsx.command_line import Gsx
from tests.tiny import tiny_checkpoint

SHORT = ("--prompt-lengths", "12", "--new-tokens", "4", "--rounds", "2", "--threads", "1")


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


def test_one_round_counts_where_no_time_is_left() -> None:
    assert in_turn(["a"], lambda name: 1, rounds=9, goes_on=lambda: False) == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("budget:0.7", KeepSettings(budget=0.7)),
        ("layers:0-5,8.attn", KeepSettings(layers="0-5,8.attn")),
        ("exit:4", KeepSettings(exit=4)),
        ("speedup:2", KeepSettings(speedup=2.0)),
        ("exit-threshold:0.5", KeepSettings(exit_threshold=0.5)),
    ],
)
def test_settings_as_text(text: str, keep: KeepSettings) -> None:
    assert parse_setting(text) == keep


@pytest.mark.parametrize("text", ["budget", "budget:", "budget:much", "exit:1.5", "given:1", "0.7"])
def test_what_is_no_setting(text: str) -> None:
    with pytest.raises(GsxError, match="is not a setting") as caught:
        parse_setting(text)
    assert "budget:B, layers:SET, exit:E, speedup:R, exit-threshold:T or loops:N" in str(caught.value.expected)


@pytest.fixture
def gated(tiny_bundle: Path) -> Bundle:
    return open_bundle(tiny_bundle)


@pytest.fixture(scope="session")
def dense(make_once: MakeOnce) -> Bundle:
    model = make_once("model-dense", lambda path: tiny_checkpoint(path, tokenizer=True))
    return open_bundle(make_once("bundle-dense", lambda path: api.export(model, path)))


def test_forms(gated: Bundle, dense: Bundle, make_tiny_bundle: Callable[..., Path]) -> None:
    """All settings of verify, or those asked for where they can be read; a draft is one more form."""
    assert [form.name for form in forms_of([gated], ["a"], [])] == [f"budget {b}" for b in (1.0, 0.85, 0.7, 0.5)]
    budget = KeepSettings(budget=0.5)
    found = forms_of([gated, dense], ["a", "b"], [budget])
    assert [(form.name, form.keep) for form in found] == [("a, budget 0.5", budget), ("b, dense", AS_EXPORTED)]
    drafting = open_bundle(make_tiny_bundle(draft="exit:1"))
    *plain, draft = forms_of([drafting], ["a"], [budget])
    assert (draft.name, draft.draft, draft.keep) == ("draft exit:1", "exit:1", AS_EXPORTED)
    assert all(form.process != draft.process for form in plain)


def test_prompts_are_of_the_text_and_of_one_length(gated: Bundle, tmp_path: Path) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    rows = prompts_of(gated, text, 3, 8)
    assert {len(row) for row in rows} == {8}
    assert len({tuple(row) for row in rows}) == 3
    assert len(prompts_of(gated, text, 1, 100)[0]) == 100, "a short text is repeated"
    (bare := tmp_path / "bare").mkdir()
    for path in gated.directory.iterdir():
        if path.name != "tokenizer.json":
            shutil.copy(path, bare)
    assert np.shape(prompts_of(open_bundle(bare), text, 2, 8)) == (2, 8)


def test_work_is_that_of_the_rows_that_ran(gated: Bundle) -> None:
    """By hand: a step reads the weights of branches with a row, and their K and V; a prompt multiplies with each."""
    work, shape = work_of(gated), gated.manifest.decoder
    weights = step_bytes(gated)
    rows = np.zeros((shape.num_layers, 2))
    assert work.step_bytes(rows, keys=9) == weights.rest
    rows[1] = [2, 3]
    kv = 2 * 4 * shape.num_kv_heads * shape.head_dim
    assert work.step_bytes(rows, keys=9) == weights.rest + weights.branches[1].sum() + 2 * 9 * kv
    none = work.prompt_flops(np.zeros_like(rows), batch=1, tokens=5)
    products = weights.branches[1] / 4  # all of them float32 matrices without a bias
    attention = 2 * shape.num_heads * shape.head_dim * (5 + 1) / 2
    wanted = 2 * (2 * products[0] + 3 * products[1] + 2 * attention)
    assert work.prompt_flops(rows, batch=1, tokens=5) - none == pytest.approx(wanted)


def test_an_answer_counts_what_the_calls_kept(gated: Bundle) -> None:
    answer = worker.load({"bundle": str(gated.directory), "threads": 1})
    prompts = prompts_of(gated, "some text that is long enough for two prompts", 2, 10)
    found = {budget: answer({"prompts": prompts, "new_tokens": 4, "keep": {"budget": budget}}) for budget in (1.0, 0.5)}
    assert found[1.0]["kept"] == found[1.0]["prompt_kept"] == 1
    assert found[0.5]["prompt_kept"] < 1
    assert found[0.5]["flops"] < found[1.0]["flops"]
    assert found[0.5]["bytes"] <= found[1.0]["bytes"]
    wanted = [api.generate(gated, ids=row, budget=0.5, max_new_tokens=4).ids for row in prompts]
    assert [row[: len(one)] for row, one in zip(found[0.5]["tokens"], wanted, strict=True)] == wanted


def test_two_bundles(gsx: Gsx, tmp_path: Path, tiny_bundle: Path, dense: Bundle) -> None:
    """A table on stdout, and a page with a plot."""
    page = tmp_path / "bench.html"
    outcome = gsx("bench", tiny_bundle, dense.directory, "--setting", "budget:1", *SHORT, "-o", page)
    assert outcome.code == 0, outcome.err
    assert "12 tokens of prompt, 4 new ones, batch 1" in outcome.out
    assert f"{tiny_bundle.name}, budget 1.0" in outcome.out
    text = page.read_text(encoding="utf-8")
    assert "<svg" in text
    assert f"{dense.directory.name}, dense" in text


def test_json_over_shapes_with_a_draft(gsx: Gsx, make_tiny_bundle: Callable[..., Path]) -> None:
    bundle = make_tiny_bundle(draft="exit:1")
    outcome = gsx("bench", bundle, "--setting", "budget:0.7", "--batches", "2,1", *SHORT, "--json")
    assert outcome.code == 0, outcome.err
    rows = json.loads(outcome.out)["rows"]
    assert [(row["form"], row["batch"], row["rounds"]) for row in rows] == [
        (form, batch, 2) for batch in (1, 2) for form in ("budget 0.7", "draft exit:1")
    ]
    plain, draft = rows[:2]
    assert draft["same_text"], "the exported budget is 0.7: a draft changes no token"
    assert draft["accepted"] >= 1
    assert draft["token"]["left"] is None
    assert plain["token"]["ratio"] == {"median": 1, "least": 1, "most": 1}
    assert plain["token"]["left"] == 1
    assert plain["kept"] < 1
    assert plain["peak_mb"] > 10


def test_no_time_is_left(gated: Bundle) -> None:
    report = api.bench(gated, settings=["budget:1"], prompt_lengths=[8, 16], new_tokens=1, rounds=3, seconds=1e-6)
    assert {row.prompt_tokens for row in report.rows} == {8}
    assert report.rows[0].rounds == 1
    assert report.rows[0].token is None, "one new token is the first one"
    assert report.notes == (
        "No time was left for prompts of 16 tokens.",
        "The time was up after 1 of 3 rounds of some prompts.",
    )
    assert isinstance(report, BenchReport)


REFUSED = {
    "no bundle": (["nowhere"], 1, "nowhere: is not a bundle"),
    "a setting of another rule": (["BUNDLE", "--setting", "exit:1"], 2, "needs a bundle whose keep rule reads"),
    "no setting": (["BUNDLE", "--setting", "half"], 2, "'half' is not a setting"),
    "a long prompt": (["BUNDLE", "--prompt-lengths", "100000"], 2, "longer than the context of bundle"),
    "words for numbers": (["BUNDLE", "--batches", "two"], 2, "expected whole numbers between commas, e.g. 1,4"),
    "no prompt": (["BUNDLE", "--batches", "0"], 2, "batch\n  expected at least 1, found 0"),
    "no round": (["BUNDLE", "--rounds", "0"], 2, "rounds\n  expected at least 1, found 0"),
    "no time": (["BUNDLE", "--time", "0s"], 2, "is not a duration such as 90s, 10m or 1h"),
    "no memory": (["BUNDLE", "--batches", "1000000000"], 1, "not enough memory to load all bundles next to each other"),
    "the same bundle twice": (["BUNDLE", "BUNDLE"], 2, "a bundle is given twice"),
    "no text": (["BUNDLE", "--text", "nowhere.txt"], 1, "nowhere.txt: no such text file"),
    "no engines": (["BUNDLE", "--backend", "tensorrt-rtx"], 1, "has no engines for tensorrt-rtx"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, gsx: Gsx, tiny_bundle: Path) -> None:
    words, code, message = REFUSED[case]
    outcome = gsx("bench", *(str(tiny_bundle) if word == "BUNDLE" else word for word in words))
    assert outcome.code == code
    assert message in outcome.err
    assert not outcome.out


def test_a_machine_that_only_runs_bundles(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without what exporting needs: settings must be given, and no page can be drawn."""
    absent = ("torch", "transformers", "safetensors", "matplotlib")
    start = f"import sys; sys.modules.update(dict.fromkeys({absent})); from gsx.cli import main; main()"
    page = tmp_path / "page.html"
    code, words = [sys.executable, "-c", start, "bench", str(tiny_bundle)], ["--setting", "budget:1", *SHORT]
    done = subprocess.run([*code, *words, "-o", page], capture_output=True, text=True, check=False)
    assert "budget 1.0" in done.stdout
    assert f"{page}: a page needs packages that are not installed\n  found no matplotlib" in done.stderr
    done = subprocess.run([*code, *SHORT], capture_output=True, text=True, check=False)
    assert "or give the settings: gsx bench BUNDLE --setting budget:0.7" in done.stderr


def test_a_process_that_ends_is_told_from_one_that_answers() -> None:
    """Killed, as a system without memory does it, and ended by an error of its own."""
    ready = "import sys, os; print('\"ready\"', flush=True); input(); "
    for code, found in (("os.kill(os.getpid(), 9)", "by SIGKILL"), ("sys.exit('no luck')", "with code 1: no luck")):
        with Worker("bundle X", [sys.executable, "-c", ready + code]) as asked:
            with pytest.raises(GsxError, match="bundle X: the process that measures it has ended") as caught:
                asked.ask({})
            assert f"it ended {found}" in str(caught.value.found)


def test_a_waiting_process_stands_still_and_ends_with_its_owner() -> None:
    ready = "print('\"ready\"', flush=True)\nwhile True: pass"
    with Worker("busy", [sys.executable, "-c", ready]) as asked:
        place = Path(f"/proc/{asked._process.pid}/stat")
        if not place.exists():
            pytest.skip("this system has no /proc to see the state of a process in")
        for _ in range(50):
            if place.read_text().split()[2] == "T":
                break
            time.sleep(0.02)
        assert place.read_text().split()[2] == "T"
    with pytest.raises(ProcessLookupError):
        os.kill(asked._process.pid, 0)
