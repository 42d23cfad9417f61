"""The command line: help, wrong use, interruption, and unexpected errors."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from tests.gsx.command_line import GSX, SECONDS, Gsx, snapshot

COMMANDS = (
    *("export", "build", "verify", "generate", "inspect", "study", "compare", "train", "convert", "triton"),
    *("plugins", "doctor"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(gsx: Gsx, command: str) -> None:
    found = gsx(command, "--help")
    assert found.code == 0
    assert f"Example: gsx {command}" in found.out
    assert found.err == ""


def test_help_and_version(gsx: Gsx) -> None:
    help_text = gsx("--help")
    assert help_text.code == 0
    assert all(command in help_text.out for command in COMMANDS)
    assert gsx().out == help_text.out
    version = gsx("--version")
    assert version.code == 0
    assert version.out.startswith("gsx 0.")


def test_help_is_light() -> None:
    """Help needs no library that takes a second to import."""
    code = (
        "import sys; from gsx.cli import run; run(['export', '--help']); run(['--version']);"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_running_a_bundle_needs_no_torch(tiny_bundle: Path) -> None:
    code = (
        "import sys; from gsx.cli import run;"
        f"code = run(['generate', {str(tiny_bundle)!r}, 'token', '--max-new-tokens', '3']);"
        f"code = code or run(['inspect', {str(tiny_bundle)!r}]);"
        "heavy = {'torch', 'transformers'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["exprot"], ["No such command", "export"]),
        (["export"], ["Missing argument", "gsx export --help"]),
        (["export", "x", "--budget", "many"], ["--budget", "number"]),
        (["export", "x", "--select", "best"], ["--select", "threshold", "rank"]),
        (["export", "x", "--precision", "fp8"], ["--precision", "fp32"]),
        (["export", "x", "--fp4"], ["--fp4"]),
        (["export", "x", "--calibration-tokens", "0"], ["calibration"]),
        (["generate", "x", "--max-new-tokens", "few"], ["--max-new-tokens"]),
        (["convert", "x.pt", "-o", "out"], ["--base"]),
        (["train"], ["--output"]),
        (["train", "-o", "out", "--lora", "8", "--full"], ["--lora", "--freeze-base"]),
        (["train", "-o", "out"], ["recipe gateskip", "one of model and new"]),
        (["train", "-o", "out", "--model", "x", "--recipe", "gatesnip"], ["no such recipe", "layerskip"]),
        (["train", "-o", "out", "--model", "x", "--set", "gate.knd=scalar"], ["gate.knd is not a setting", "kind"]),
        (["train", "-o", "out", "--model", "x", "--set", "gate.std=-1"], ["gate.std cannot be used", "-1"]),
        (["train", "-o", "out", "--exit-classifiers", "auto"], ["--exit-classifiers", "--model"]),
        (["train", "-o", "out", "--model", "x", "--exit-classifiers", "soon"], ["'soon'", "or auto"]),
        (["train", "-o", "out", "--model", "x", "--exit-classifiers", "1", "--max-steps", "5"], ["--max-steps"]),
        (
            ["train", "-o", "out", "--model", "x", "--exit-classifiers", "1", "--recipe", "layerskip"],
            ["--recipe", "cannot be combined with --exit-classifiers"],
        ),
        (
            ["train", "-o", "out", "--model", "x", "--exit-gate", "--recipe", "gateskip"],
            ["--recipe", "cannot be combined with --exit-gate"],
        ),
        (
            ["train", "-o", "out", "--model", "x", "--linear-scores", "--full"],
            ["--full", "cannot be combined with --linear-scores"],
        ),
        (
            ["train", "-o", "out", "--model", "x", "--exit-gate", "--linear-scores"],
            ["--linear-scores", "cannot be combined with --exit-gate"],
        ),
        (["train", "-o", "out", "--tokens", "5"], ["--tokens", "belongs to --exit-classifiers"]),
    ],
)
def test_wrong_use(
    gsx: Gsx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], parts: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = gsx(*arguments)
    assert found.code == 2
    assert found.out == ""
    for part in parts:
        assert part in found.err
    assert snapshot(tmp_path) == {}


# Interruption


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "starting"), (signal.SIGINT, "tracing"), (signal.SIGTERM, "calibrating")],
)
def test_interrupted_export(
    model: Path, bundle: Path, tmp_path: Path, tiny_text: Path, number: signal.Signals, moment: str
) -> None:
    before = snapshot(tmp_path)
    command = [*GSX, "export", str(model), "-o", str(bundle), "--overwrite", "--calibration", str(tiny_text)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        while not lines or moment not in lines[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 128 + number
    assert err.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err
    assert out == ""
    assert snapshot(tmp_path) == before


def test_a_reader_that_closes_the_pipe(tiny_bundle: Path) -> None:
    command = [*GSX, "generate", str(tiny_bundle), "token", "--max-new-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        process.wait(timeout=SECONDS)
    assert err == ""
    assert process.returncode != 0


def test_bug_is_one_line(gsx: Gsx, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str, **_: object) -> None:
        raise RuntimeError("the moon is full\nand more")

    monkeypatch.setattr(import_module("gsx"), "inspect", fail)
    found = gsx("inspect", "x")
    assert found.code == 70
    assert "RuntimeError: the moon is full" in found.err
    assert "GSX_DEBUG=1" in found.err


@pytest.mark.parametrize(
    ("error", "part"),
    [(MemoryError(), "out of memory"), (OSError(errno.EIO, "Input/output error", "/x"), "/x: Input/output error")],
)
def test_machine_errors(gsx: Gsx, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str) -> None:
    def fail(path: str, **_: object) -> None:
        raise error

    monkeypatch.setattr(import_module("gsx"), "inspect", fail)
    found = gsx("inspect", "x")
    assert found.code == 1
    assert part in found.err
