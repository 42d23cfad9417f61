"""`gsx export` on the command line: what it writes, and every documented bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from gsx_engines.bundle.bundle import open_bundle
from tests.checkpoints import EXAMPLE
from tests.gsx.command_line import Gsx, Spoil, edit_json, edit_weights, snapshot


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--int8", "--fp8"), "give only one of them"),
        (("--fp8", "--weights-only"), "belongs to --int8"),
        (("--keep-precision", "none"), "belongs to --int8, --int4 or --fp8"),
        (("--max-flipped", "0.1"), "belongs to --int8, --int4 or --fp8"),
        (("--policy", "layers", "--policy", "gateskip"), "layers and gateskip exclude each other"),
        (("--policy", "layers:"), "some after the colon"),
        (("--policy", "layers:0-99"), "found 3, 4, 5, 6 and 93 more"),
        (("--kv-cache", "int8", "--build", "tensorrt-rtx"), "only in 16- and 32-bit floats"),
    ],
)
def test_export_options_that_exclude_each_other(
    gsx: Gsx, model: Path, tmp_path: Path, options: tuple[str, ...], part: str
) -> None:
    found = gsx("export", model, "-o", tmp_path / "out", *options)
    assert found.code == 2
    assert part in " ".join(found.err.split())
    assert not (tmp_path / "out").exists()


def test_export_builds_engines(gsx: Gsx, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    found = gsx("export", model, "-o", out, "--select", "rank", "--build", "tensorrt-rtx", "--json")
    assert found.code == 0, found.err
    [(name, entry)] = json.loads(found.out)["engines"].items()
    assert (out / "engines" / name / entry["graphs"]["model"]["file"]).is_file()
    assert json.loads((out / "gsx.json").read_text())["engines"] == {name: entry}
    assert "building model" in found.err


def test_a_backend_that_cannot_build_stops_an_export_at_once(
    gsx: Gsx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsx_engines.tensorrt.backend.find_spec", lambda name: None)
    found = gsx("export", model, "-o", tmp_path / "bundle", "--build", "tensorrt-rtx")
    assert found.code == 1
    assert "backend tensorrt-rtx: is not installed" in found.err
    assert not (tmp_path / "bundle").exists()


def test_engines_that_fail_leave_the_bundle(
    gsx: Gsx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsx_engines.building.memory.available_memory", lambda: 1)
    out = tmp_path / "bundle"
    found = gsx("export", model, "-o", out, "--select", "rank", "--build", "tensorrt-rtx")
    assert found.code == 1
    assert f"the bundle {out} is complete, without engines" in found.err
    assert "not enough memory" in found.err
    assert gsx("inspect", out).code == 0
    assert not (out / "engines").exists()


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
    "truncated": (_truncate, ["not a complete safetensors file", "5000 bytes"]),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ["config.json: is not readable JSON"]),
    "unknown architecture": (
        _config("model_type", "gpt2"),
        ["'gpt2' is not supported", "llama, mistral, qwen2, qwen3"],
    ),
    "pickles only": (_pickle_only, ["only pickled weights", "pytorch_model.bin", "gsx convert"]),
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
    "gates unannounced": (_config("gsx", {}), ["gates that config.json does not mention"]),
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
    assert "the budget is out of range" in found.err
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


@pytest.mark.parametrize(
    ("text", "share"), [("人工智能是计算机科学的一个分支", "9"), ("Return the list of names in the file", None)]
)
def test_a_text_of_another_language_is_said(gsx: Gsx, tmp_path: Path, text: str, share: str | None) -> None:
    """The example model's tokenizer was made for English and Python. Calibrating goes on: it may be what is wanted."""
    (tmp_path / "text.txt").write_text(f"{text}, " * 400, encoding="utf-8")
    options = ("--budget", "0.7", "--calibration", tmp_path / "text.txt", "--calibration-tokens", "512")
    found = gsx("export", EXAMPLE, "-o", tmp_path / "out", *options)
    assert found.code == 0
    said = [line for line in (found.out + found.err).splitlines() if "pieces of words" in line]
    assert bool(said) == (share is not None)
    if share is not None:
        assert re.search(r"text\.txt: \d\d% of this text's tokens are pieces of words", said[0])
        assert open_bundle(tmp_path / "out").manifest.source.notes


def test_quantizing_without_memory_is_refused_before_work(
    gsx: Gsx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gsx.workflows.memory.available_memory", lambda: 1000)
    found = gsx("export", model, "-o", tmp_path / "out", "--int8", "--json")
    assert found.code == 1
    assert "not enough memory to quantize this model" in found.err
    assert "calibrating" not in found.err
    assert not (tmp_path / "out").exists()


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

    monkeypatch.setattr("gsx_plugins.files.partial", refuse)
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
    monkeypatch.setattr("gsx_plugins.files.shutil.disk_usage", lambda path: usage)
    found = gsx("export", model, "-o", tmp_path / "out")
    assert found.code == 1
    assert "not enough room on the disk" in found.err


def test_disk_that_fills_up(
    gsx: Gsx, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bundle: Path
) -> None:
    """The older bundle stays when the new one cannot be finished."""

    def fill(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(import_module("gsx.workflows.export"), "write_weights", fill)
    before = snapshot(tmp_path)
    found = gsx("export", model, "-o", bundle, "--select", "rank", "--overwrite")
    assert found.code == 1
    assert "the disk is full" in found.err
    assert snapshot(tmp_path) == before
