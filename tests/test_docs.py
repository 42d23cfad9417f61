"""The documentation is true: links and paths resolve, commands and options exist, tables say what the code says.

Numbers are in `test_docs_numbers.py`.
"""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import get_args

import pytest

from gsx.cli.app import command
from gsx.workflows.doctor import _OP_CALLS
from gsx_engines.bundle.policy import RuntimeInput
from gsx_exporter.config import FAMILIES
from gsx_plugins.domain import DOMAIN, ONNX_OPSET, OPSET_VERSION
from gsx_plugins.library import PLUGIN_NAMESPACE, PLUGIN_OPS, PLUGIN_VERSION, STEP_FOLDERS
from gsx_plugins.registry import OPS
from tests import families_page
from tests.plugins.emulation import KERNELS

ROOT = Path(__file__).parent.parent
PLUGINS = ROOT / "plugins" / "gsx_plugins"
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("plugins/gsx_plugins/*/README.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("benchmarks/README.md"),
    ]
)
DESIGN = ROOT / "docs" / "design.md"
LINK = re.compile(r"\[[^\]]+\]\(([^)#\s]+)")
COMMAND = re.compile(r"^ {4,}(gsx [a-z].*)$|`(gsx [a-z][^`]*)`", re.MULTILINE)
# A file of the repository, as a page names it: in code, below a folder of the first level. `gsx/*.h` are C++ headers,
# as programs include them, and the methods' page names files of others.
PATH = re.compile(r"`((?:gsx|exporter|engines|plugins|tests|benchmarks|examples|docs|docker)/[^\s`]*)`")
gsx = cache(command)
MODULE = re.compile(r"python -m ((?:benchmarks|tests|gsx_engines)(?:\.[a-z_][a-z_0-9]*)+)")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def folder_of(op: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", op.replace("TopK", "Topk")).lower()


def section(page: Path, number: int) -> str:
    """One numbered section of a page."""
    _, *parts = re.split(r"^## (\d+)\. ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))[str(number)]


def cells(line: str) -> list[str]:
    """The cells of a table's line; a `|` inside code divides a cell too, unless it is escaped."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def table(text: str, *header: str) -> list[list[str]]:
    """The rows of the table whose first columns have these names."""
    lines = iter(text.splitlines())
    assert any(line.startswith("|") and cells(line)[: len(header)] == list(header) for line in lines), header
    next(lines)
    return [cells(line) for line in takewhile(lambda line: line.startswith("|"), lines)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{name_of(page)}: {target}"


def commands(text: str) -> Iterator[list[str]]:
    """Every `gsx ...` of a page, in words, without comments."""
    for block, inline in COMMAND.findall(text):
        yield shlex.split(block or inline, comments=True)


@cache
def options_of(*names: str) -> set[str]:
    """Options of a command; a group's are those of the command that follows it."""
    found = gsx()
    for name in names:
        found = found.commands[name] if hasattr(found, "commands") else found
    return {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    for words in commands(page.read_text(encoding="utf-8")):
        assert words[1] in gsx().commands, " ".join(words)
        for word in words[2:]:
            if word.startswith("-") and word != "-":
                assert word.split("=")[0].rstrip("]") in options_of(*words[1:3]) | {"--help"}, " ".join(words)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_of_the_readme_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All blocks from top to bottom, on a tiny model in place of the reader's."""
    from gsx.cli import run

    shutil.copytree(tiny_gated, tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    # `test_tune.py` has these: another scheme of quantization, the search for drafts, all rounds.
    monkeypatch.setattr("gsx.workflows.tune_search._SCHEMES", {None: 1, "int8-weights": 3})
    monkeypatch.setattr("gsx.workflows.tune_search.Search._drafts", lambda self, best: iter(()))
    monkeypatch.setattr("gsx.tuning.bench.BENCH_ROUNDS", 1)
    lines = re.findall(r"^ {4}(gsx [a-z].*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(lines) > 8
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "tune":  # random weights lose more by every form than trained ones do
            words[words.index("--max-loss") + 1] = "50"
        if "--build" in words and find_spec("tensorrt_rtx") is None:
            continue
        assert run(words) == 0, f"{line}: {capsys.readouterr().err}"


# Numbers before a unit of time: they differ from run to run.
TIMING = re.compile(r"\d[\d,.]*(?= (?:m?s|min|tokens/s)\b)")


def transcripts(text: str) -> Iterator[tuple[str, list[str]]]:
    """Every `$ command` of the console blocks of a page, with the lines below it."""
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, *printed = part.splitlines()
            yield line, printed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_of_the_readme_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The lines that are shown are among those that are printed, in order, but for times."""
    from gsx.cli import run

    shutil.copytree(ROOT / "examples" / "model", tmp_path / "examples" / "model")
    monkeypatch.chdir(tmp_path)
    shown = list(transcripts((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(shown) >= 3
    for line, wanted in shown:
        assert wanted, f"{line}: nothing is shown"
        assert run(shlex.split(line)[1:]) == 0
        streams = capfd.readouterr()
        printed = iter([TIMING.sub("#", one.rstrip()) for one in (streams.out + streams.err).splitlines()])
        for one in wanted:
            assert TIMING.sub("#", one) in printed, f"{line}: {one!r} is not among\n{streams.out}\n{streams.err}"


def test_readme_shows_every_command() -> None:
    shown = {words[1] for words in commands((ROOT / "README.md").read_text(encoding="utf-8"))}
    assert set(gsx().commands) <= shown


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
    defaults = {option: one.default for one in gsx().commands[name].params for option in one.opts}
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[a-z-]+)` \|.*\bdefault:? ([\d,.]+) \|$", text, re.MULTILINE)
    assert rows, f"{page} names no default"
    for option, shown in rows:
        assert float(shown.replace(",", "")) == defaults[option], f"{page}: {option}"


def test_every_op_has_its_page() -> None:
    for op in OPS:
        text = (PLUGINS / folder_of(op) / "README.md").read_text(encoding="utf-8")
        assert text.startswith(f"# {op}\n")
        for name, _ in (*OPS[op].inputs, *OPS[op].outputs):
            assert f"| `{name}` (" in text, f"{op}: {name}"
        for attribute in OPS[op].attributes:
            assert f"| `{attribute}` |" in text, f"{op}: {attribute}"


def test_plain_onnx_runtime_example(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page's own code, on a tiny bundle: as many tokens as `gsx generate` gives, and the same."""
    import gsx as api

    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code.replace("OUT/", f"{tiny_bundle}/"), "docs/export.md", "exec"), {})
    shown = capsys.readouterr().out.strip()
    result = api.generate(tiny_bundle, ids=[5, 6, 7], max_new_tokens=8)
    assert shown.startswith(str(result.ids)[:-1])


def test_makefile_and_ci_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "lint", "clean", "help"):
        assert re.search(rf"^{target}:.* ## ", makefile, re.MULTILINE), target
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for path in PATH.findall(text) if page.name != "methods.md" else ():
        if not re.search(r"[<{]|\.\.\.|NAME|^gsx/.*\.h$", path):
            assert list(ROOT.glob(path.rstrip("/"))), f"{name_of(page)}: {path}"
    for module in MODULE.findall(text):
        place = module.replace(".", "/")
        found = [*ROOT.glob(f"{place}.py"), *ROOT.glob(f"{place}/__main__.py"), *ROOT.glob(f"engines/{place}.py")]
        assert found, f"{name_of(page)}: {module}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_rows_of_tables_have_all_cells(page: Path) -> None:
    wanted = 0
    for line in page.read_text(encoding="utf-8").splitlines():
        found = len(cells(line)) if line.startswith("|") else 0
        assert not wanted or found in (0, wanted), f"{name_of(page)}: {line}"
        wanted = found


def test_the_page_of_families_has_them_all() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    first_table = text[text.index("|") :].split("\n\n")[0]
    rows = [cells(line) for line in first_table.splitlines()]
    named = [re.findall(r"`(\w+)`", row[1])[0] for row in rows[2:]]
    assert sorted(named) == sorted(FAMILIES)


def test_the_page_of_families_says_what_is_tested() -> None:
    page = families_page.PAGE.read_text(encoding="utf-8")
    assert families_page.shown(page) == families_page.table(), "python -m tests.families_page"


def test_design_shows_every_op() -> None:
    text = section(DESIGN, 4)
    assert text.startswith(f"Custom ops: domain `{DOMAIN}`, version {OPSET_VERSION}\n")
    assert f'`plugin_namespace="{PLUGIN_NAMESPACE}"` and `plugin_version="{PLUGIN_VERSION}"`' in text
    rows = {name.strip("`"): signature for name, signature, _ in table(text, "op", "inputs -> outputs")}
    assert set(rows) == set(OPS)
    for name, signature in rows.items():
        op = OPS[name]
        shown = [re.findall(r"`(\w+) \[[^\]]*\]`(?: or `[^`]*`)?(?: (\w+))?", side) for side in signature.split("->")]
        for found, wanted in zip(shown, (op.inputs, op.outputs), strict=True):
            kinds = [(tensor, kind if kind in ("int64", "bool") else "") for tensor, kind in wanted]
            assert found == kinds, name


def test_design_shows_every_run_time_input() -> None:
    rows = table(section(DESIGN, 3), "input", "shape", "type")
    names = get_args(RuntimeInput.model_fields["name"].annotation)
    assert [row[0].strip("`") for row in rows] == list(names)


def test_design_names_the_opset() -> None:
    assert f"Graphs use opset {ONNX_OPSET}," in section(DESIGN, 6)


def test_design_shows_every_command() -> None:
    lines = [line.split("   ")[0:] for line in section(DESIGN, 9).splitlines() if line.startswith("    gsx ")]
    shown = [" ".join(line).split("|")[0].split()[1] for line in lines]
    assert sorted(shown) == sorted(gsx().commands)
    for name, line in zip(shown, lines, strict=True):
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", " ".join(line)):
            assert option in options_of(name), f"{name} {option}"


def test_design_shows_the_layout() -> None:
    """Packages as the wheel has them, and their folders; the ops have a page of their own each."""
    text = section(DESIGN, 8)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert sorted(row[1].strip("`/") for row in table(text, "floor", "package")) == sorted(packages)
    ops = {PLUGINS / folder for folder in (*STEP_FOLDERS, *map(folder_of, OPS))}
    folders = {
        name_of(path)
        for package in packages
        for path in (ROOT / package).iterdir()
        if path.is_dir() and path not in ops and any(not part.name.startswith("__") for part in path.iterdir())
    }
    assert {row[0].strip("`/") for row in table(text, "folder")} == folders


@cache
def defined_names() -> frozenset[str]:
    """Names that the packages define: classes, and what a module assigns."""
    found = set()
    for path in sources():
        if path.suffix == ".py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
                found |= {getattr(target, "name", getattr(target, "id", "")) for target in targets}
    return frozenset(found)


def sources() -> Iterator[Path]:
    for package in ("gsx", "exporter", "engines/gsx_engines", "plugins"):
        yield from (ROOT / package).rglob("*.py")
        yield from (ROOT / package).rglob("*.cpp")


def test_names_of_the_glossary_exist() -> None:
    rows = table(section(DESIGN, 2), "word", "meaning", "name in the code")
    names = [name for _, _, cell in rows for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 10
    assert not set(names) - defined_names()


def test_lists_of_ops_agree() -> None:
    """Every list that docs/add-an-op.md sends an author to."""
    assert set(_OP_CALLS) == set(OPS)
    trace = (ROOT / "exporter" / "gsx_exporter" / "graph" / "translation.py").read_text(encoding="utf-8")
    assert set(re.findall(r"_GSX\.(\w+)\(", trace)) == set(OPS)
    header, adapter = (PLUGINS / "native" / name for name in ("plugin.h", "plugin.cpp"))
    declared = re.findall(r"^extern Op const k(\w+);", header.read_text(encoding="utf-8"), re.MULTILINE)
    text = adapter.read_text(encoding="utf-8")
    assert set(declared) == set(PLUGIN_OPS)
    assert set(re.findall(r"\bCreator\(k(\w+)\)", text)) == set(PLUGIN_OPS)
    for (folder, ops), listed in zip(STEP_FOLDERS.items(), ("kProductOps", "kAttentionOps"), strict=True):
        steps = (PLUGINS / folder / "plugin.cpp").read_text(encoding="utf-8")
        assert set(re.findall(r'"((?:Skip|Gate|Step)[A-Z]\w+)"', steps)) == set(ops)
        assert f"{listed}[{len(ops)}];" in header.read_text(encoding="utf-8")
    folders = {folder_of(op) for op in PLUGIN_OPS}
    cmake = (PLUGINS / "CMakeLists.txt").read_text(encoding="utf-8")
    for name in ("kernel.cu", "plugin.cpp"):
        assert set(re.findall(rf"^ +(\w+)/{re.escape(name)}$", cmake, re.MULTILINE)) - {"native"} == {
            *folders,
            *STEP_FOLDERS,
        }
    assert {kernel.parent.name for kernel in KERNELS} - {"native"} == {*folders, *STEP_FOLDERS}
    bound = (PLUGINS / "cuda.py").read_text(encoding="utf-8")
    assert folders <= set(re.findall(r"(\w+)\.register_kernel\(", bound))


@cache
def messages() -> tuple[Sequence[str], ...]:
    """Texts of the source, in words; what a message puts in is `...`."""
    found = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".cpp":
            found += [re.sub(r"%\w+", "...", literal) for literal in re.findall(r'"((?:[^"\\\n]|\\.)*)"', text)]
            continue
        nodes = list(ast.walk(ast.parse(text)))
        inner = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                found.append(node.value)
    return tuple(tuple(_words(text)) for text in found)


def test_troubleshooting_quotes_messages() -> None:
    """Each message of the page is one of the source; words that the source puts in may stand for themselves."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    headers = re.findall(r"^## (.*)\n\n\| message \|", text, re.MULTILINE)
    quoted = [
        message
        for header in headers
        for row in table(text[text.index(f"## {header}") :], "message")
        for message in re.findall(r"`([^`]+)`", row[0])
    ]
    assert len(quoted) == len(set(quoted)) > 40
    assert not [message for message in quoted if not _is_said(_words(message))]


def _is_said(words: Sequence[str]) -> bool:
    first = {words[0], "..."}
    starts = ((text, n) for text in messages() for n, word in enumerate(text) if word in first)
    return any(_begins(words, text[n:]) for text, n in starts)


def _words(text: str) -> list[str]:
    return [word.strip(".,:;'\"()") if "..." not in word else "..." for word in text.split()]


def _begins(words: Sequence[str], text: Sequence[str], literal: int = 0, total: int = 0) -> bool:
    """Whether the text begins with these words. `...` stands for some words, of which most must be literally there."""
    if not words:
        return 2 * literal >= total
    if not text:
        return False
    if words[0] == "...":
        return any(_begins(words[1:], text[n:], literal, total) for n in range(1, 5))
    if text[0] == "...":
        return any(_begins(words[n:], text[1:], literal, total + n) for n in range(1, min(5, len(words) + 1)))
    return words[0] == text[0] and _begins(words[1:], text[1:], literal + 1, total + 1)
