"""Training on two processes: what one learns, both learn; a killed one ends all; and the run goes on afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gsx_exporter.training.run import train
from gsx_exporter.training.settings import TrainSettings, read_settings
from tests.tiny import tiny_checkpoint

ROUNDING = 1e-5  # float32 sums in another order, over a few steps
SCRIPT = """
import os, signal, sys
from pathlib import Path
from gsx_exporter.training.run import train
from gsx_exporter.training.settings import read_settings

def on_progress(progress):
    if os.environ.get("KILL") and os.environ["RANK"] == "1" and (progress.stage, progress.done) == ("training", 3):
        os.kill(os.getpid(), signal.SIGKILL)

recipe, out, work, resume = sys.argv[1:]
train(read_settings(recipe), Path(out), work=Path(work), resume=resume == "yes", on_progress=on_progress)
"""


def settings(tmp_path: Path, batch: int) -> TrainSettings:
    text = tmp_path / "text.jsonl"
    rows = [{"text": "".join(f"def f{i}(a):\n    return {i * n} + a\n" for i in range(9))} for n in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "model": str(tiny_checkpoint(tmp_path / "model", tokenizer=True)), "data.source": str(text), "data.length": 24,
        "gate.kind": "scalar", "exits.every": 1, "evaluation.rows": 3, "trainer.max_steps": 6,
        "trainer.per_device_train_batch_size": batch, "trainer.gradient_accumulation_steps": 1,
        "trainer.learning_rate": 5e-3, "trainer.logging_steps": 1, "trainer.save_steps": 2, "trainer.use_cpu": True,
    }  # fmt: skip
    return read_settings("gateskip+layerskip", changes)


def two_processes(tmp_path: Path, *, resume: bool, kill: bool) -> subprocess.CompletedProcess[str]:
    script, recipe = tmp_path / "run.py", tmp_path / "recipe.yaml"
    script.write_text(SCRIPT)
    recipe.write_text(settings(tmp_path, batch=2).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    command += [str(recipe), str(tmp_path / "two"), str(tmp_path / "work"), "yes" if resume else "no"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "KILL": "1" if kill else ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


def losses(directory: Path) -> list[float]:
    return [one["loss"] for one in json.loads((directory / "training.json").read_text()) if "loss" in one]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    killed = two_processes(tmp_path, resume=False, kill=True)
    assert killed.returncode != 0
    assert not (tmp_path / "two").exists()
    assert (tmp_path / "work" / "checkpoint-2" / "trainer_state.json").is_file()
    resumed = two_processes(tmp_path, resume=True, kill=False)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    train(settings(tmp_path, batch=4), tmp_path / "one", work=tmp_path / "work-one")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=ROUNDING)
    for name in ("adapter_model", "gates"):
        one, two = (load_file(tmp_path / which / f"{name}.safetensors") for which in ("one", "two"))
        assert one.keys() == two.keys()
        for tensor, found in two.items():
            torch.testing.assert_close(found, one[tensor], atol=ROUNDING, rtol=0)
