"""Benchmarks run: each shows its help, and the cheap ones measure a tiny model. Their figures are not checked."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import adaptive, branches, hold, own_texts, profile, real, rules, speculation
from gsx_exporter.checkpoint.opening import open_checkpoint
from tests.tiny import tiny_checkpoint

SCRIPTS = (
    *(
        "adaptive",
        "branches",
        "catalogue",
        "cpp_on_cpu",
        "decode",
        "descriptions",
        "engines",
        "export",
        "family_parity",
        "family_speed",
        "gpu_prefill",
        "hold",
        "kv_cache",
        "llama",
        "looped_model",
    ),
    *(
        "model",
        "openai_serving",
        "openai_soak",
        "own_texts",
        "plans",
        "profile",
        "quantization",
        "real",
        "rule_parity",
        "rule_quality",
        "rules",
        "serving",
        "size",
        "smollm2",
        "speculation",
        "step_cost",
    ),
    "torch_backend",
)
# Modules that scripts use, or start.
PARTS = ("__init__", "bundles", "documentation", "measure", "peers", "prompts", "speculation_process", "worker")
FOLDER = Path(branches.__file__).parent


def test_every_script_is_known() -> None:
    assert sorted((*SCRIPTS, *PARTS)) == sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module(f"benchmarks.{name}").main()
    assert "usage:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work directory shared by the benchmarks of this module, with its exports."""
    return tmp_path_factory.mktemp("work")


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The cells of the tables that were printed, without their heads."""
    lines = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    return lines[1:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "names"),
    [
        (branches.main, ["dense", "half kept", "none kept", "all kept"]),
        (profile.main, ["float32, dense", "float32, half kept"]),
        (rules.main, ["dense", "layers, every second"]),
    ],
    ids=["branches", "profile", "rules"],
)
def test_on_the_tiny_model(
    main: Callable[[list[str]], None], names: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--work", str(work), "--quick", "--threads", "1"])
    assert [line[0] for line in lines_of(capsys)] == names


def test_a_search_while_generating(tiny_bundle: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adaptive.main(["--work", str(work), "--quick", "--threads", "1", "--bundle", str(tiny_bundle)])
    assert lines_of(capsys)[0][0] == "plain"


def test_holding_a_budget(tiny_bundle: Path, tiny_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold.main([str(tiny_bundle), "--text", f"tiny={tiny_text}", "--quick"])
    ((text, budget, *_),) = lines_of(capsys)
    assert (text, budget) == ("tiny, 2 x 104", "0.7")


def test_speculation_changes_no_token(
    make_tiny_bundle: Callable[..., Path], tiny_gated: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "exit_1").symlink_to(make_tiny_bundle(draft="exit:1"))  # which other tests export too
    arguments = ["--model", str(tiny_gated), "--exits", "1", "--prompts", "2"]
    speculation.main(["speed", "--work", str(work), "--quick", "--threads", "1", *arguments])
    assert [line[:3] for line in lines_of(capsys)] == [
        [kind, "exit:1", length] for kind in ("greedy", "sampled") for length in ("2", "adaptive")
    ]


def test_a_smaller_head_changes_no_token(
    make_tiny_bundle: Callable[..., Path], tiny_gated: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, options in (("all", {}), ("40", {"draft_vocabulary": 40})):
        (work / f"exit_1-{name}").symlink_to(
            make_tiny_bundle(draft="exit:1", **options)
        )  # which other tests export too
    arguments = ["--model", str(tiny_gated), "--exits", "1", "--prompts", "2", "--vocabularies", "40"]
    speculation.main(["vocabulary", "--work", str(work), "--quick", "--threads", "1", *arguments])
    assert [line[:3:2] for line in lines_of(capsys)] == [
        [size, length] for length in ("2", "adaptive") for size in ("259", "40")
    ]


def test_drafts_of_fewer_loops_change_no_token(tmp_path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint(tmp_path / "model", "dory", tokenizer=True)
    loops = open_checkpoint(model).config.loops
    assert loops is not None
    quick = ["--quick", "--threads", "1", "--prompts", "2"]
    speculation.main(["loops", "--work", str(work), "--model", str(model), *quick])
    drafts = [f"loops:{count}" for count in range(1, loops.most)]
    assert [line[:2] for line in lines_of(capsys)] == [[one, length] for one in drafts for length in ("2", "adaptive")]


def test_quality_of_the_model_as_it_is(
    base_models: dict[str, Path], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Float32 is PyTorch's model, by the measures that other forms are judged by."""
    model = base_models["chat llama"]
    options = ["--work", str(work), "--quick", "--threads", "1", "--model", str(model), "--forms", real.BASE]
    real.main(["quality", *options])
    ((name, _, divergence, differing, _),) = lines_of(capsys)
    assert name == real.BASE
    assert divergence.startswith("0.0000 (0.0000 to 0.0000)")
    assert differing.startswith("0.0%")


def test_texts_of_a_model(tiny_bundle: Path, tiny_gated: Path, tmp_path: Path) -> None:
    for name in ("train", "heldout"):
        rows = ({"text": f"line {number}\nof {name}: " + "some words " * 120} for number in range(3))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own" / "bundles").mkdir(parents=True)
    (tmp_path / "own" / "bundles" / "dense").symlink_to(tiny_bundle)
    sizes = ["--rows", "3", "--held-out", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--batch", "2"]
    own_texts.main([str(tmp_path), str(tmp_path / "own"), "--model", str(tiny_gated), "--threads", "1", *sizes])
    made = [json.loads(line)["text"] for line in (tmp_path / "own" / "heldout.jsonl").read_text().splitlines()]
    assert len(made) == 2
    assert all(text for text in made)
    assert len((tmp_path / "own" / "train.jsonl").read_text().splitlines()) >= 3
