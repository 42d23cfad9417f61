"""The public API: its names, that commands are calls of it, that its examples run, and its reference page."""

from __future__ import annotations

import ast
import doctest
import importlib.util
import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import gsx
from gsx.cli.app import command
from gsx_exporter.rules.registry import RULES
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parent.parent.parent
# They calibrate, train, build an engine, or measure.
COSTLY = {
    "gsx.bench",
    "gsx.build",
    "gsx.compare",
    "gsx.export",
    "gsx.train",
    "gsx.train_exit_classifiers",
    "gsx.train_exit_gate",
    "gsx.train_linear_scores",
    "gsx.tune",
    "gsx.verify",
    "gsx.doctor",
}
# Examples that need what a test machine may not have, or do not end; they are marked as skipped, and the others run.
ELSEWHERE = {"gsx.check_server", "gsx.plugins.build", "gsx.push", "gsx.serve", "gsx.triton_plans"}


def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs" / "make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUNCTIONS: dict[str, Any] = {name: value for name, value in make_api().public() if inspect.isfunction(value)}


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its public name, including those of groups."""
    for name, found in command().commands.items():
        for sub, one in getattr(found, "commands", {"": found}).items():
            yield f"gsx.{name}" + (f".{sub}" if sub else ""), one


def test_every_command_is_a_public_function() -> None:
    assert {name for name, _ in commands()} <= set(FUNCTIONS)


def test_names_are_written_alike() -> None:
    """What static readers see, what is imported on first use, and what `from gsx import *` takes."""
    tree = ast.parse(Path(gsx.__file__).read_text(encoding="utf-8"))
    seen = {alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen - {None} == set(gsx._HOMES) | {"plugins"}
    assert set(gsx.__all__) == set(gsx._HOMES) | {"plugins", "__version__"}
    assert list(gsx.__all__) == sorted(gsx.__all__)


@pytest.mark.parametrize(("name", "found"), list(commands()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_has_its_functions_defaults(name: str, found: Any) -> None:
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    shared = [option for option in found.params if option.name in parameters]
    for option in shared:
        default = parameters[option.name].default
        if default is not inspect.Parameter.empty and option.default is not None:
            assert option.default == default or str(option.default) == default, f"{name}: {option.name}"


def test_defaults_in_words_are_those_of_the_code() -> None:
    from gsx_engines.defaults import BUILD_CONTEXT
    from gsx_plugins.build import ARCHITECTURES

    shown = {
        (name, option.name): str(getattr(option, "show_default", ""))
        for name, one in commands()
        for option in one.params
    }
    assert shown["gsx.plugins.build", "arch"] == ",".join(ARCHITECTURES)
    assert str(BUILD_CONTEXT) in shown["gsx.build", "context"]
    assert f"{BUILD_CONTEXT:,}" in (gsx.build.__doc__ or "")


@pytest.fixture
def place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_gated: Path, tiny_bundle: Path, tiny_text: Path
) -> Path:
    """A folder with what the examples name."""
    shutil.copytree(tiny_gated, tmp_path / "my-model")
    shutil.copytree(tiny_bundle, tmp_path / "out" / "demo")
    tiny_checkpoint(tmp_path / "my-dense-model", tokenizer=True)
    tiny_checkpoint(tmp_path / "my-ouro", "ouro", layers=2, tokenizer=True, total_ut_steps=4)
    gates: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(tiny_gated / "model.safetensors").items():
        parts = key.split(".")
        if parts[3:4] in (["attn_gate"], ["mlp_gate"]):
            gates.setdefault(f"{parts[3].removesuffix('_gate')}_{parts[2]}", {})["gate." + parts[-1]] = value
    torch.save(gates, tmp_path / "gates.pt")
    (tmp_path / "my-texts" / "test").mkdir(parents=True)
    for number in range(4):
        lines = [f"def f{i}(a, b):\n    return a * {i * number} + b\n" for i in range(60)]
        (tmp_path / "my-texts" / "test" / f"file{number}.py").write_text("".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples() -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in COSTLY else ()) for name in sorted(FUNCTIONS)]


@pytest.mark.parametrize("name", examples())
def test_example_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "gsx.export":
        shutil.rmtree(place / "out" / "demo")
    # One keep rule, and few rounds: `test_compare.py` and `test_tune.py` have more of them.
    monkeypatch.setattr("gsx.workflows.fitting.every_rule", lambda: ({"layers": RULES["layers"]}, {}))
    monkeypatch.setattr("gsx.workflows.compare.SECONDS", 0.0)
    monkeypatch.setattr("gsx.workflows.tune_search._SCHEMES", {None: 1})
    monkeypatch.setattr("gsx.tuning.bench.BENCH_ROUNDS", 1)
    found = doctest.DocTestFinder().find(FUNCTIONS[name], name, globs={"gsx": gsx})[0]
    assert found.examples, f"{name} has no example"
    skipped = [one for one in found.examples if doctest.SKIP in one.options]
    assert bool(skipped) == (name in ELSEWHERE)
    if name == "gsx.build":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: pip install tensorrt-rtx")
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found)
    assert results.failed == 0
    assert results.attempted == len(found.examples) - len(skipped)


def test_every_function_documents_its_arguments_and_results() -> None:
    for name, function in FUNCTIONS.items():
        text = inspect.getdoc(function) or ""
        assert "Returns:" in text, name
        for parameter in inspect.signature(function).parameters:
            assert parameter in text, f"{name}: {parameter}"


def test_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert page == make_api().page(), "run `python docs/make_api.py`"
