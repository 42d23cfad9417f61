"""The documentation is true: links resolve, commands and options exist, examples run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from gsx.cli.app import command
from gsx_plugins.registry import OPS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("plugins/gsx_plugins/*/README.md"),
        *ROOT.glob("examples/**/*.md"),
    ]
)
# Made by people, after the tests have passed.
PICTURES = {"docs/images/parity.png"}
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)")
COMMAND = re.compile(r"^(?:    |```.*\n)?\s*(gsx [a-z].*)$|`(gsx [a-z][^`]*)`", re.MULTILINE)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith("http") and target not in PICTURES:
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


def commands(text: str) -> Iterator[list[str]]:
    """Every `gsx ...` of a page, in words, without comments."""
    for block, inline in COMMAND.findall(text):
        yield shlex.split(block or inline, comments=True)


def options_of(*names: str) -> set[str]:
    """Options of a command; a group's are those of the command that follows it."""
    found = command()
    for name in names:
        found = found.commands[name] if hasattr(found, "commands") else found
    return {option for parameter in found.params for option in parameter.opts}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "design.md"], ids=name_of)  # a plan, too
def test_commands_exist(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        assert words[1] in command().commands, " ".join(words)
        for word in words[2:]:
            if word.startswith("-") and word != "-":
                assert word.split("=")[0] in options_of(*words[1:3]) | {"--help"}, " ".join(words)


def test_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert set(command().commands) <= shown


def test_export_page_shows_every_option() -> None:
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    for option in options_of("export") - {"-o", "--output", "--help", "-h", "model"}:
        assert f"`{option}`" in text, option


def test_engines_page_shows_every_option() -> None:
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    for option in options_of("build") - {"--help", "-h", "bundle"}:
        assert f"`{option}`" in text, option


@pytest.mark.parametrize(("page", "name"), [("export.md", "export"), ("engines.md", "build")])
def test_defaults_of_a_page_are_those_of_the_command(page: str, name: str) -> None:
    defaults = {option: one.default for one in command().commands[name].params for option in one.opts}
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[a-z-]+)` \|.*\bdefault:? ([\d,.]+) \|$", text, re.MULTILINE)
    assert rows, f"{page} names no default"
    for option, shown in rows:
        assert float(shown.replace(",", "")) == defaults[option], f"{page}: {option}"


def test_numbers_of_the_pages_are_those_of_the_code() -> None:
    from gsx.workflows.compare import WINDOW_TOKENS
    from gsx.workflows.study import SEQUENCE_TOKENS
    from gsx_exporter.defaults import BUDGET_GRID, CALIBRATION_TOKENS
    from gsx_exporter.text import MIN_TOKENS

    said = {
        "export.md": [
            f"| `--calibration-tokens` | {MIN_TOKENS} and more |",
            f"default {CALIBRATION_TOKENS} |",
            f"budgets from {max(BUDGET_GRID):g} to {min(BUDGET_GRID):g}",
        ],
        "compare.md": [f"windows of {WINDOW_TOKENS} tokens"],
        "layer-study.md": [f"{SEQUENCE_TOKENS} tokens"],
    }
    for page, phrases in said.items():
        text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
        for phrase in phrases:
            assert phrase in text, f"{page}: {phrase}"


def test_every_op_has_its_page() -> None:
    for op in OPS:
        folder = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", op.replace("TopK", "Topk")).lower()
        text = (ROOT / "plugins" / "gsx_plugins" / folder / "README.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {op}\n")
        for name, _ in (*OPS[op].inputs, *OPS[op].outputs):
            assert f"| `{name}` (" in text, f"{op}: {name}"
        for attribute in OPS[op].attributes:
            assert f"| `{attribute}` |" in text, f"{op}: {attribute}"


def test_plain_onnx_runtime_example(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's own code, on a tiny bundle: as many tokens as `gsx generate` gives, and the same."""
    import gsx

    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code.replace("OUT/", f"{tiny_bundle}/"), "docs/export.md", "exec"), {})
    shown = capsys.readouterr().out.strip()
    result = gsx.generate(tiny_bundle, ids=[5, 6, 7], max_new_tokens=8)
    assert shown.startswith(str(result.ids)[:-1])


def test_makefile_and_ci_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "clean", "help"):
        assert re.search(rf"^{target}:.* ## ", makefile, re.MULTILINE), target
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
