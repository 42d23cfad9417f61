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

from gsx_exporter.training.reading import read_settings
from gsx_exporter.training.run import train
from gsx_exporter.training.settings import TrainSettings
from tests.tiny import tiny_checkpoint

ROUNDING = 1e-5  # float32 sums in another order, over a few steps
SCRIPT = """
import os, signal, sys
from pathlib import Path
from gsx_exporter.training.run import train
from gsx_exporter.training.reading import read_settings

def on_progress(progress):
    if os.environ.get("KILL") and os.environ["RANK"] == "1" and (progress.stage, progress.done) == ("training", 3):
        os.kill(os.getpid(), signal.SIGKILL)

recipe, out, work, resume = sys.argv[1:]
train(read_settings(recipe), Path(out), work=Path(work), resume=resume == "yes", on_progress=on_progress)
"""

# Divided by FSDP2 as accelerate divides it on GPUs; accelerate itself does so on no CPU.
SHARDED = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from tests.exporter.test_training_losses import ids_of, learner, plan

dist.init_process_group("gloo")

def made():
    gate = {"kind": "scalar", "sparsity": 0.5}
    one = learner(Path(sys.argv[1]), mode="lora", gate=gate, exits={"depths": [1]}, distill={"weight": 0.5})
    plan(one, budget=0.6, exits={1: 0.5}, whole=0.5, straight_through=True)
    return one

whole, parted, ids = made(), made(), ids_of(2)
loss = whole(input_ids=ids, labels=ids)["loss"]
loss.backward()
mesh = init_device_mesh("cpu", (2,))
for layer in parted.hf.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(parted, mesh=mesh)
register_fsdp_forward_method(parted, "figures")
mine = ids[dist.get_rank(), None]
part = 2 * parted(input_ids=mine, labels=mine, num_items_in_batch=torch.tensor(48))["loss"]  # gradients are averaged
part.backward()
total = part.detach() / 2
dist.all_reduce(total)
torch.testing.assert_close(total, loss.detach(), atol=1e-5, rtol=0)
for (name, one), (_, other) in zip(whole.named_parameters(), parted.named_parameters(), strict=True):
    if one.grad is not None:
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, atol=1e-5, rtol=1e-4, msg=name)
torch.testing.assert_close(parted.figures(mine, mine)[0].nats, whole.figures(mine, mine)[0].nats)
options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
state = get_model_state_dict(parted, options=options)
assert dist.get_rank() or all("lora" in name or "_gate." in name for name in state)
set_model_state_dict(parted, state, options=options)
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


@pytest.mark.slow
def test_divided_weights_give_the_same_gradients(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run(
        [*command, str(model)], capture_output=True, text=True, check=False, env=environment, timeout=240
    )
    assert found.returncode == 0, found.stderr[-2000:]


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
