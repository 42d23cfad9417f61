"""The page of `gsx serve` in a real browser: its sliders are settings of a request, its picture is what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gsx
from gsx_engines.bundle.bundle import Bundle, open_bundle
from tests.serving.openai_server import HttpServer, serving

# The colours of a column of the picture, from the first layer on: whether each branch is painted as one that ran.
KEPT = """() => {
  const canvas = document.getElementById("kept"), paint = canvas.getContext("2d"), found = [];
  for (let x = 2; x < canvas.width; x += 6) {
    const column = [];
    for (let y = canvas.height - 4; y > 0; y -= 6) column.push(paint.getImageData(x, y, 1, 1).data[2] > 200 ? 1 : 0);
    found.push(column);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def gated(make_tiny_bundle: Callable[..., Path]) -> Bundle:
    return open_bundle(make_tiny_bundle(draft="exit:2"))


@pytest.fixture(scope="module")
def server(gated: Bundle) -> Iterator[HttpServer]:
    with serving(gated.directory) as found:
        yield found


def set_range(page: Any, name: str, value: float) -> None:
    page.evaluate(
        """([id, value]) => {
          document.getElementById(id).value = value;
          document.getElementById(id).dispatchEvent(new Event("input"));
        }""",
        [name, str(value)],
    )


def generate(page: Any) -> str:
    """Press the button, and wait for the figures. Returns: the text."""
    page.click("#go")
    page.wait_for_function("document.getElementById('figures').textContent !== ''", timeout=60_000)
    return str(page.text_content("#text"))


def test_a_budget_and_what_it_keeps(browser: Any, server: HttpServer, gated: Bundle) -> None:
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#budget-row:not([hidden])")
    assert "policy gateskip" in page.text_content("h1")
    assert page.is_hidden("#exit-row")
    assert page.is_hidden("#chat-row")
    page.fill("#prompt", "token 7")
    set_range(page, "tokens", 12)
    shares = []
    for budget in (1.0, 0.5):
        set_range(page, "budget", budget)
        alone = gsx.generate(gated, "token 7", max_new_tokens=12, budget=budget, speculative=False, threads=1)
        assert generate(page) == alone.text
        columns = page.evaluate(KEPT)
        assert len(columns) == len(alone.ids) - 1
        shares.append(sum(map(sum, columns)) / sum(map(len, columns)))
    assert shares[0] == 1
    assert 0 < shares[1] < 1
    page.check("#speculative")
    assert generate(page) == alone.text
    assert "drafts accepted" in page.text_content("#figures")
    assert not problems
    assert all(address.startswith(server.url) for address in addresses), "nothing comes from elsewhere"


def test_layers_of_a_chat_behind_a_key(browser: Any, chat_bundle: Path) -> None:
    with serving(chat_bundle, key="secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.wait_for_function("document.getElementById('error').textContent.includes('API key')")
        page.fill("#key", "secret")
        page.dispatch_event("#key", "change")
        page.wait_for_selector("#exit-row:not([hidden])")
        set_range(page, "exit", 1)
        set_range(page, "tokens", 5)
        generate(page)
        columns = page.evaluate(KEPT)
        assert columns
        assert all(column == [1, 1, 0, 0] for column in columns)
        page.fill("#prompt", "the class " * 400)
        page.click("#go")
        page.wait_for_function("document.getElementById('error').textContent.includes('context')")
