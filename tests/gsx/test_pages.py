"""The pages of reports in a real browser: the answer comes first, nothing overflows, everything is labelled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

import gsx
from gsx.benchmarking.report import BenchReport
from gsx.benchmarking.rounds import Spread
from gsx.benchmarking.rows import BenchRow, Timing
from gsx.comparison.options import ExportOptions
from gsx.comparison.report import CompareReport, Point
from gsx.parity.estimate import Estimate
from gsx.tuning.limit import Limit
from gsx.tuning.report import Times, TunePoint, TuneReport
from gsx_engines.bundle.controls import AS_EXPORTED

Write = Callable[[Path], None]
WIDTHS = (1280, 390)
# Rules of axe-core at levels A and AA of WCAG 2.2, contrast among them.
AXE_OPTIONS = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
FIRST_SCREEN = 844
NO_SCRIPT = {"java_script_enabled": False}


def estimate(value: float) -> Estimate:
    return Estimate(value, 0.9 * value, 1.1 * value, 2048)


def compared(path: Path) -> None:
    curves = {"gateskip": 0.4, "even layers": 1.6, "exits": 0.9, "ffn-skip": 0.3}
    points = [Point("whole model", "dense", 1, 1, 20, estimate(0), estimate(0), 30, 1, 8, 1)]
    for policy, slope in curves.items():
        for left in (1.0, 0.9, 0.8, 0.7, 0.5):
            loss = slope * (1 - left) ** 2
            shares = (left, 0.2 + 0.8 * left)
            points.append(
                Point(
                    policy, f"budget {left}", 1, left, 20, estimate(loss), estimate(loss), 30, shares[0], 8, shares[1]
                )
            )
    CompareReport("my-model", "text.txt", 4096, 128, 256, tuple(points), {"router": "needs routers"}).write_page(path)


def tuned(path: Path) -> None:
    rows: list[tuple[Any, str, float, float | None]] = [
        (None, "", 0.0, 1.0),
        ("int8-weights", "", 0.005, 0.55),
        ("int8", "", 0.012, 0.7),
        ("int4", "", 0.08, 0.5),
        (None, "without 1 of 30 layers", 0.03, 0.97),
        (None, "exit 15 of 30", 2.3, None),
    ]
    points = tuple(
        TunePoint(
            ExportOptions("dense" if not setting else "layers", scheme=scheme),
            AS_EXPORTED,
            setting,
            1.0,
            1.0,
            estimate(loss),
            estimate(5 * loss),
            "lost early" if ratio is None else "over" if loss > 0.02 else "within",
            538.0,
            None if ratio is None else Times(900, 30, Spread(ratio, 0.9 * ratio, 1.1 * ratio), 5, 600),
        )
        for scheme, setting, loss, ratio in rows
    )
    TuneReport(
        model="my-model",
        limit=Limit(0.02, None),
        text="text.txt",
        tokens=2048,
        prompt_tokens=128,
        new_tokens=64,
        points=points,
        best=1,
        command="gsx export my-model --int8 --weights-only -o out/tuned",
        output="out/tuned",
        left_out={"ffn-skip": "no time was left: it takes about 5 min"},
        work="gsx-tune",
        taken_over=3,
        seconds=600,
        date="2026-11-30",
        machine="2 cores",
    ).write_page(path)


def benched(path: Path) -> None:
    forms = {"my-model, budget 1": 1.0, "my-model, budget 0.7": 0.78, "my-model, budget 0.5": 0.63, "int8": 0.41}

    def timing(base: float, ratio: float, left: float | None) -> Timing:
        return Timing(Spread(base * ratio, base, base), Spread(ratio, 0.9 * ratio, 1.1 * ratio), left)

    rows = [
        BenchRow(
            name,
            "out/my-model",
            "as exported",
            None,
            prompt,
            1,
            5,
            1.0,
            left,
            timing(prompt * 2, left + 0.1, left),
            timing(30, left, None if name == "int8" else left),
            33 / left,
            None,
            600 * left,
            left == 1.0,
        )
        for prompt in (128, 512)
        for name, left in forms.items()
    ]
    notes = ("1024 tokens of prompt are left out: the context ends before",)
    BenchReport(tuple(rows), 64, 1, "onnxruntime", "text.txt", "2026-11-30", "2 cores", notes).write_page(path)


@pytest.fixture(scope="session")
def pages(
    tmp_path_factory: pytest.TempPathFactory, tiny_gated: Path, tiny_bundle: Path, tiny_text: Path
) -> dict[str, Path]:
    """Every page by its name; parity and study are of real runs."""
    folder = tmp_path_factory.mktemp("pages")
    found = {name: folder / f"{name}.html" for name in ("compare", "tune", "study", "bench")}
    compared(found["compare"])
    tuned(found["tune"])
    benched(found["bench"])
    gsx.study(tiny_gated, text=tiny_text, tokens=256).write_page(found["study"])
    bundle = copytree(tiny_bundle, folder / "bundle")
    gsx.verify(bundle, text=tiny_text, tokens=256, greedy_tokens=4)
    return {**found, "parity": bundle / "parity.html"}


def opened(browser: Any, path: Path, width: int, **options: Any) -> tuple[Any, list[str]]:
    """A page, and what is wrong with it so far: errors, and requests for anything but the file."""
    page = browser.new_page(viewport={"width": width, "height": FIRST_SCREEN}, **options)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: problems.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    return page, problems


NAMES = ("compare", "tune", "study", "parity", "bench")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_screen_answers(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    page, problems = opened(browser, pages[name], width)
    answer, picture = page.locator("h1").bounding_box(), page.locator("figure svg:visible").first.bounding_box()
    assert answer["y"] < picture["y"] < FIRST_SCREEN / 2
    assert not problems
    page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_overflows(browser: Any, pages: dict[str, Path], name: str, width: int) -> None:
    """The page is as wide as the screen; tables and wide figures scroll inside themselves."""
    page, _ = opened(browser, pages[name], width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    inside = page.evaluate("[...document.querySelectorAll('table')].map(t => t.closest('.scroll') !== null)")
    assert inside
    assert all(inside)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_contrast_and_labels(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    page, _ = opened(browser, pages[name], WIDTHS[1], color_scheme=scheme)
    found = axe.Axe().run(page, options=AXE_OPTIONS)
    assert found.violations_count == 0, found.generate_report()
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_points_show_their_figures(browser: Any, pages: dict[str, Path], name: str) -> None:
    page, _ = opened(browser, pages[name], WIDTHS[0], **NO_SCRIPT)
    tips = page.locator("figure .wide svg .point title").all_text_contents()
    assert len(tips) >= 3
    assert all(any(sign.isdigit() for sign in tip) for tip in tips)
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique(browser: Any, pages: dict[str, Path], name: str) -> None:
    """Figures of a page would otherwise take each other's markers."""
    page, _ = opened(browser, pages[name], WIDTHS[0])
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert sorted(ids) == sorted(set(ids))
    page.close()


def test_a_table_sorts_by_its_headings(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["tune"], WIDTHS[0])

    def column(number: int) -> list[str]:
        found: list[str] = page.locator(f"tbody tr > :nth-child({number})").all_text_contents()
        return [" ".join(cell.split()) for cell in found]

    page.get_by_role("button", name="KL, nats").click()
    losses = [float(cell.split()[0]) for cell in column(4)]
    assert losses == sorted(losses)
    page.get_by_role("button", name="times as fast").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    speeds = column(3)
    assert speeds[-1] == "not timed"
    numbers = [float(cell.split()[0]) for cell in speeds[:-1]]
    assert numbers == sorted(numbers, reverse=True)
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.close()


def test_bench_sorts_and_tells_figures_outside_the_answer_too(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["bench"], WIDTHS[0])
    assert (
        "With prompts of 128 tokens, the fastest is int8: later tokens 2.44 times" in page.locator("h1").text_content()
    )
    table = page.locator("table").first
    table.get_by_role("button", name="tokens/s").click()
    speeds = [float(text) for text in table.locator("tbody tr > :nth-child(8)").all_text_contents()]
    assert len(speeds) == 4
    assert speeds == sorted(speeds)
    evidence = page.locator("section", has_text="Time by work left").locator(".point title").all_text_contents()
    assert any("512 tokens, my-model, budget 0.5, later tokens: 18.90 ms, 0.630" in tip for tip in evidence)
    page.close()


def test_without_a_script_everything_is_there(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["tune"], WIDTHS[1], **NO_SCRIPT)
    assert page.locator("figure svg:visible").count() == 1
    assert page.locator("tbody tr").count() == 6
    assert not page.get_by_text("A click on a heading sorts").is_visible()
    page.close()
