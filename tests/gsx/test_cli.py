"""The command line: exit codes, where output goes, and every documented bad input.

Most cases run in this process (`gsx.cli.run`), so that torch is imported once; signals and pipes need a process
of their own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gsx.cli import run

COMMANDS = ("export", "verify", "generate", "inspect", "train", "convert", "doctor")
GSX = [sys.executable, "-c", "from gsx.cli import main; main()"]
EXPORT_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Gsx = Callable[..., Outcome]


@pytest.fixture
def gsx(capsys: pytest.CaptureFixture[str]) -> Gsx:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture
def model(tmp_path: Path, tiny_gated: Path) -> Path:
    """A copy of the tiny checkpoint, to spoil."""
    return Path(shutil.copytree(tiny_gated, tmp_path / "model"))


@pytest.fixture
def bundle(tmp_path: Path, tiny_bundle: Path) -> Path:
    """A copy of the tiny bundle, to spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def snapshot(directory: Path) -> dict[str, str]:
    """Every file below a directory, hidden ones too, with its hash."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        for path in sorted(directory.rglob("*"))
    }


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# Help, version, wrong use


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
        (["train", "-o", "out", "--snapshot-every", "0"], ["--snapshot-every"]),
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


# Export


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--int8", "--fp8"), "one of the two"),
        (("--fp8", "--weights-only"), "belongs to --int8"),
        (("--keep-precision", "auto"), "belongs to --int8 or --fp8"),
        (("--max-flipped", "0.1"), "belongs to --int8 or --fp8"),
    ],
)
def test_export_options_that_exclude_each_other(
    gsx: Gsx, model: Path, tmp_path: Path, options: tuple[str, ...], part: str
) -> None:
    found = gsx("export", model, "-o", tmp_path / "out", *options)
    assert found.code == 2
    assert part in " ".join(found.err.split())
    assert not (tmp_path / "out").exists()


def test_export(gsx: Gsx, model: Path, tmp_path: Path, tiny_text: Path) -> None:
    out = tmp_path / "new" / "bundle"
    arguments = ("export", model, "-o", out, "--budget", "0.7", "--calibration", tiny_text)
    arguments += ("--calibration-tokens", "512")
    found = gsx(*arguments, "--json")
    assert found.code == 0, found.err
    summary = json.loads(found.out)
    assert summary["bundle"] == str(out)
    assert summary["budget"] == 0.7
    assert abs(summary["kept_share"] - 0.7) <= 0.01
    assert "model.onnx" in summary["files"]
    assert "calibrating" in found.err
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]

    before = snapshot(out)
    again = gsx(*arguments)
    assert again.code == 2
    assert "exists and is not empty" in again.err
    assert "--overwrite" in again.err
    assert snapshot(out) == before

    rank = gsx("export", model, "-o", out, "--select", "rank", "--budget", "0.5", "--overwrite")
    assert rank.code == 0, rank.err
    assert "rank selection, budget 0.5" in rank.out
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_default_output() -> None:
    from gsx.cli.export import default_output

    assert default_output("org/name") == Path("name-gsx")
    assert default_output("some/where/model/") == Path("model-gsx")


Spoil = Callable[[Path], Any]


def _empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def _truncate(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def _pickle_only(model: Path) -> None:
    torch.save({"a": torch.ones(1)}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def _config(key: str, value: Any) -> Spoil:
    return lambda model: edit_json(model / "config.json", lambda values: values.__setitem__(key, value))


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    return lambda model: edit_weights(model, change)


GATE = "model.layers.1.mlp_gate.weight"
BAD_MODELS: dict[str, tuple[Spoil, list[str]]] = {
    "missing": (shutil.rmtree, ["no such directory"]),
    "a file": (
        lambda m: (shutil.rmtree(m), m.write_text("x")),
        ["is a file", "expected a model directory"],
    ),
    "empty": (_empty, ["has no config.json", "an empty directory"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["has no weights", "model.safetensors"]),
    "truncated": (_truncate, ["not a whole safetensors file", "5000 bytes"]),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ["config.json: is not readable JSON"]),
    "unknown architecture": (
        _config("model_type", "gpt2"),
        ["'gpt2' is not supported", "llama, mistral, qwen2, qwen3"],
    ),
    "pickles only": (_pickle_only, ["pickled weights only", "pytorch_model.bin", "gsx convert"]),
    "gate shape": (
        _weights(lambda t: t.__setitem__(GATE, torch.ones(2, 2))),
        [GATE, "wrong shape", "found [2, 2]"],
    ),
    "gate missing": (_weights(lambda t: t.pop(GATE)), ["gates are incomplete", GATE]),
    "gate NaN": (
        _weights(lambda t: t.__setitem__(GATE, t[GATE] * torch.nan)),
        [GATE, "NaN", "expected finite gates"],
    ),
    "weight missing": (
        _weights(lambda t: t.pop("model.norm.weight")),
        ["a tensor is missing", "model.norm.weight"],
    ),
    "gates unannounced": (_config("gsx", {}), ["gates that config.json does not speak of"]),
    "unknown key": (_config("gsx", {"gates": {}}), ["unknown key", "'gates'"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["has no tokenizer", "tokenizer.json"]),
}


@pytest.mark.parametrize("case", list(BAD_MODELS))
def test_bad_model(gsx: Gsx, model: Path, tmp_path: Path, tiny_text: Path, case: str) -> None:
    spoil, parts = BAD_MODELS[case]
    spoil(model)
    before = snapshot(tmp_path)
    found = gsx("export", model, "-o", tmp_path / "out", "--budget", "0.7", "--calibration", tiny_text)
    assert found.code == 1
    assert found.out == ""
    for part in parts:
        assert part in found.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("budget", ["0", "1.01", "-0.5", "nan", "inf"])
def test_budget_outside(gsx: Gsx, model: Path, tmp_path: Path, budget: str) -> None:
    found = gsx("export", model, "-o", tmp_path / "out", f"--budget={budget}")
    assert found.code == 2
    assert "budget is not a share" in found.err
    assert "above 0 and at most 1" in found.err
    assert not (tmp_path / "out").exists()


def test_dense_model_has_no_budget(gsx: Gsx, tmp_path: Path) -> None:
    from tests.tiny import tiny_checkpoint

    dense = tiny_checkpoint(tmp_path / "dense", tokenizer=True)
    found = gsx("export", dense, "-o", tmp_path / "out", "--budget", "0.5")
    assert found.code == 2
    assert "--budget needs gates" in found.err


def test_bad_text(gsx: Gsx, model: Path, tmp_path: Path) -> None:
    cases: dict[str, tuple[bytes | None, str]] = {
        "no.txt": (None, "no such text file"),
        "empty.txt": (b"", "too short to calibrate on"),
        "tiny.txt": (b"a few words", "at least 256 tokens"),
        "latin.txt": (b"\xe9t\xe9 " * 400, "is not UTF-8 text"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        before = snapshot(tmp_path)
        found = gsx("export", model, "-o", tmp_path / "out", "--calibration", tmp_path / name)
        assert found.code == 1
        assert message in found.err
        assert name in found.err
        assert snapshot(tmp_path) == before


def test_output_that_is_not_a_bundle(gsx: Gsx, model: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    before = snapshot(tmp_path)
    for more in ((), ("--overwrite",)):
        found = gsx("export", model, "-o", mine, *more)
        assert found.code == 2
        assert "exists and is not empty" in found.err
        assert "something that is not a bundle" in found.err
    found = gsx("export", model, "-o", mine / "thesis.txt", "--overwrite")
    assert found.code == 2
    assert "is not a directory" in found.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "part"), [(errno.EROFS, "read-only"), (errno.EACCES, "no permission"), (errno.ENOSPC, "full")]
)
def test_target_that_cannot_be_written(
    gsx: Gsx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, part: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("engines.bundle.bundle.tempfile.mkdtemp", refuse)
    found = gsx("export", model, "-o", tmp_path / "out")
    assert found.code == 1
    assert "could not be written" in found.err
    assert part in found.err
    assert not (tmp_path / "out").exists()


def test_read_only_directory(gsx: Gsx, model: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere: run as another user to see a real read-only directory")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    found = gsx("export", model, "-o", locked / "out")
    assert found.code == 1
    assert "no permission" in found.err


def test_too_little_room(gsx: Gsx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("engines.bundle.bundle.shutil.disk_usage", lambda path: usage)
    found = gsx("export", model, "-o", tmp_path / "out")
    assert found.code == 1
    assert "not enough room on the disk" in found.err


def test_disk_that_fills_up(
    gsx: Gsx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    """The older bundle stays when the new one cannot be finished."""

    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(import_module("gsx.export"), "write_weights", fill)
    before = snapshot(tmp_path)
    found = gsx("export", model, "-o", bundle, "--select", "rank", "--overwrite")
    assert found.code == 1
    assert "the disk is full" in found.err
    assert snapshot(tmp_path) == before


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
        out, err = process.communicate(timeout=EXPORT_SECONDS)
    assert process.returncode == 128 + number
    assert err.strip().splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in err
    assert out == ""
    assert snapshot(tmp_path) == before


def test_reader_that_leaves(tiny_bundle: Path) -> None:
    command = [*GSX, "generate", str(tiny_bundle), "token", "--max-new-tokens", "400"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read().decode()
        process.wait(timeout=EXPORT_SECONDS)
    assert err == ""
    assert process.returncode != 0


def test_bug_is_one_line(gsx: Gsx, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("the moon is full\nand more")

    monkeypatch.setattr(import_module("gsx.inspect"), "inspect", fail)
    found = gsx("inspect", "x")
    assert found.code == 70
    assert "RuntimeError: the moon is full" in found.err
    assert "GSX_DEBUG=1" in found.err


@pytest.mark.parametrize(
    ("error", "part"),
    [(MemoryError(), "out of memory"), (OSError(errno.EIO, "Input/output error", "/x"), "/x: Input/output error")],
)
def test_machine_errors(gsx: Gsx, monkeypatch: pytest.MonkeyPatch, error: Exception, part: str) -> None:
    def fail(path: str) -> None:
        raise error

    monkeypatch.setattr(import_module("gsx.inspect"), "inspect", fail)
    found = gsx("inspect", "x")
    assert found.code == 1
    assert part in found.err


# Bundles


BAD_BUNDLES: dict[str, tuple[Spoil, list[str]]] = {
    "missing": (shutil.rmtree, ["is not a bundle", "no such directory"]),
    "no manifest": (lambda b: (b / "gsx.json").unlink(), ["is not a bundle", "expected gsx.json"]),
    "manifest not JSON": (lambda b: (b / "gsx.json").write_text("no"), ["gsx.json: is not readable JSON"]),
    "manifest edited": (
        lambda b: edit_json(b / "gsx.json", lambda v: v["decoder"].__setitem__("num_layers", "three")),
        ["not a valid manifest", "decoder.num_layers", "run `gsx export` again"],
    ),
    "unknown key": (
        lambda b: edit_json(b / "gsx.json", lambda v: v.__setitem__("colour", "red")),
        ["not a valid manifest", "colour"],
    ),
    "later version": (
        lambda b: edit_json(b / "gsx.json", lambda v: v.__setitem__("schema_version", 99)),
        ["another format", "found schema_version 99"],
    ),
    "graph changed": (
        lambda b: (b / "model.onnx").write_bytes((b / "model.onnx").read_bytes() + b"\0"),
        ["model.onnx does not match gsx.json", "expected sha256", "the file changed after export"],
    ),
    "graph missing": (lambda b: (b / "model.onnx").unlink(), ["model.onnx is missing"]),
    "weights cut": (
        lambda b: (b / "weights.bin").write_bytes((b / "weights.bin").read_bytes()[:-1]),
        ["weights.bin does not match gsx.json", "bytes"],
    ),
    "no tokenizer": (lambda b: (b / "tokenizer.json").unlink(), ["has no tokenizer", "token ids"]),
}


@pytest.mark.parametrize("case", list(BAD_BUNDLES))
def test_bad_bundle(gsx: Gsx, bundle: Path, tmp_path: Path, case: str) -> None:
    spoil, parts = BAD_BUNDLES[case]
    spoil(bundle)
    before = snapshot(tmp_path)
    found = gsx("generate", bundle, "hello")
    assert found.code == 1
    assert found.out == ""
    for part in parts:
        assert part in found.err
    assert snapshot(tmp_path) == before


# Generate


def test_generate(gsx: Gsx, tiny_bundle: Path) -> None:
    found = gsx("generate", tiny_bundle, "token 1", "--max-new-tokens", "8", "--threads", "1", "--json")
    assert found.code == 0, found.err
    result = json.loads(found.out)
    assert result["stats"]["new_tokens"] == len(result["ids"])
    assert result["budget"] == 0.7
    assert 0 < result["stats"]["kept_share"] <= 1
    ids = ",".join(map(str, result["prompt_ids"]))
    by_ids = gsx("generate", tiny_bundle, "--ids", ids, "--max-new-tokens", "8")
    assert by_ids.out.strip() == ",".join(map(str, result["ids"]))
    assert "tokens/s" in by_ids.err
    streamed = gsx("generate", tiny_bundle, "token 1", "--max-new-tokens", "8")
    whole = gsx("generate", tiny_bundle, "token 1", "--max-new-tokens", "8", "--no-stream")
    assert streamed.out == whole.out == result["text"] + "\n"


def test_generate_is_seeded(gsx: Gsx, tiny_bundle: Path) -> None:
    def sample(seed: int) -> str:
        options = ("--temperature", "1", "--top-k", "50", "--top-p", "0.9", "--seed", seed)
        return gsx("generate", tiny_bundle, "--ids", "5,6", "--max-new-tokens", "12", *options).out

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["the prompt is not clear", "neither"]),
        (["hello", "--ids", "1"], ["the prompt is not clear", "both"]),
        (["--ids", "one"], ["--ids", "1,2,3"]),
        (["--ids", "999999"], ["outside the vocabulary"]),
        (["hello", "--budget", "0.01"], ["below the calibrated grid", "--budget 0.01"]),
        (["hello", "--budget", "2"], ["budget is not a share"]),
        (["hello", "--max-new-tokens", "0"], ["max new tokens"]),
        (["hello", "--temperature=-1"], ["temperature"]),
        (["hello", "--top-p", "0"], ["top-p"]),
        (["hello", "--threads", "0"], ["threads"]),
        (["hello", "--stop", ""], ["stop text is empty"]),
        (["bad \udcff byte"], ["not UTF-8"]),
        (["x" * 600], ["longer than the model's context"]),
    ],
)
def test_generate_wrong_use(gsx: Gsx, tiny_bundle: Path, arguments: list[str], parts: list[str]) -> None:
    found = gsx("generate", tiny_bundle, *arguments)
    assert found.code == 2
    assert found.out == ""
    for part in parts:
        assert part in found.err


def test_generate_from_stdin(tiny_bundle: Path) -> None:
    command = [*GSX, "generate", str(tiny_bundle), "-", "--max-new-tokens", "3"]
    good = subprocess.run(command, input="token ä".encode(), capture_output=True, check=False)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run(command, input=b"token \xff", capture_output=True, check=False)
    assert bad.returncode == 2
    assert b"not UTF-8" in bad.stderr
    assert b"0xff at 6" in bad.stderr
    assert b"Traceback" not in bad.stderr


def test_stop_texts() -> None:
    """A stop text that comes in pieces is never shown, and what only looked like one is."""
    from engines.tokens import TextWriter

    class Pieces:
        def __init__(self, pieces: list[str]) -> None:
            self.pieces = pieces

        def push(self, token: int) -> str:
            return self.pieces[token]

    def write(pieces: list[str], stops: list[str]) -> tuple[str, list[bool]]:
        shown: list[str] = []
        writer = TextWriter(Pieces(pieces), stops, shown.append)  # type: ignore[arg-type]
        stopped = [writer.push(token) for token in range(len(pieces))]
        assert writer.finish() == "".join(shown)
        return "".join(shown), stopped

    assert write(["ab", "c", "d"], []) == ("abcd", [False] * 3)
    assert write(["a", "EN", "D!"], ["END"]) == ("a", [False, False, True])
    assert write(["a", "EN", "C"], ["END"]) == ("aENC", [False] * 3)
    assert write(["a", "EN"], ["END"]) == ("aEN", [False] * 2)
    assert write(["x;y.z"], [".", ";"]) == ("x", [True])


# Verify, inspect, convert, train


def test_verify(gsx: Gsx, bundle: Path, tiny_gated: Path, tiny_text: Path) -> None:
    options = ("--reference", tiny_gated, "--text", tiny_text, "--tokens", "300", "--greedy-tokens", "16")
    found = gsx("verify", bundle, *options, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["passed"] is True
    assert (bundle / "parity.json").is_file()
    assert (bundle / "parity.html").is_file()
    assert json.loads(gsx("inspect", bundle, "--json").out)["bundle"]["parity"] is True
    table = gsx("verify", bundle, *options)
    assert table.code == 0
    assert "passed" in table.out


def test_verify_fails_where_weights_differ(gsx: Gsx, bundle: Path, model: Path, tiny_text: Path) -> None:
    edit_weights(model, lambda t: t["model.norm.weight"].mul_(1.5))
    found = gsx("verify", bundle, "--reference", model, "--text", tiny_text, "--tokens", "300")
    assert found.code == 1
    assert found.err


def test_convert(gsx: Gsx, tmp_path: Path) -> None:
    from tests.tiny import tiny_checkpoint

    base = tiny_checkpoint(tmp_path / "base", tokenizer=True, hidden=48, layers=2)
    gates = {
        f"{branch}_{layer}": {"gate.weight": torch.zeros(1, 48), "gate.bias": torch.zeros(1)}
        for branch in ("attn", "mlp")
        for layer in range(2)
    }
    torch.save(gates, tmp_path / "gates.pt")
    found = gsx("convert", tmp_path / "gates.pt", "-o", tmp_path / "out", "--base", base, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["gate"]["kind"] == "scalar"
    assert gsx("inspect", tmp_path / "out").code == 0
    again = gsx("convert", tmp_path / "gates.pt", "-o", tmp_path / "out", "--base", base)
    assert again.code == 2
    assert "exists and is not empty" in again.err


@pytest.mark.slow
def test_train(gsx: Gsx, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text("\n".join(f"line {n} of file {number}" for n in range(60)))
    config = tmp_path / "train.json"
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2}
    shape |= {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "max_positions": 64}
    values = {"model": shape, "batch_size": 2, "sequence_length": 32}
    config.write_text(json.dumps({**values, "warmup_steps": 1, "decay_steps": 0, "budget_steps": 2, "steps": 3}))
    out = tmp_path / "out"
    arguments = ("train", "--config", config, "--text", text, "-o", out)
    found = gsx(*arguments, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["steps"] == 3
    assert "loss" in found.err
    assert "left" in found.err
    assert gsx("inspect", out).code == 0
    again = gsx(*arguments)
    assert again.code == 2
    assert "not empty" in again.err
    more = gsx(*arguments, "--resume", "--overwrite", "--steps", "4", "--json")
    assert more.code == 0, more.err
    assert json.loads(more.out)["resumed_at"] == 3
    config.write_text(json.dumps({"stepz": 3}))
    wrong = gsx("train", "--config", config, "-o", tmp_path / "other")
    assert wrong.code == 2
    assert "unknown key" in wrong.err
