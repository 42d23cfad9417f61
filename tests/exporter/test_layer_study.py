"""Sets of layers against the reference's masks, the greedy search, and the oracle's definition."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gsx.cli import run
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.evaluation import losses
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.layer_study import FAMILIES, LayerSet, SetResult, curves, oracle, study
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.layers.reference import LayerMask
from tests.tiny import tiny_checkpoint

# Two orders of summation of float32 products, in nats.
NATS_ATOL = 1e-5
LAYERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("study") / "model"
    return open_checkpoint(tiny_checkpoint(path, layers=LAYERS, gate=GateConfig("scalar"), tokenizer=True))


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, (5, 20))


@pytest.fixture(scope="module")
def found(checkpoint: Checkpoint, ids: np.ndarray) -> list[SetResult]:
    return study(checkpoint, ids)


def test_every_set_has_the_loss_of_the_reference(
    checkpoint: Checkpoint, ids: np.ndarray, found: list[SetResult]
) -> None:
    reference = Reference.load(checkpoint)
    for one in found:
        mask = np.zeros((1, LAYERS, 2), np.float32)
        mask[:, list(one.kept)] = 1
        rule = LayerMask(mask, np.zeros(1, np.int64))
        logits = reference(torch.from_numpy(ids), rule=rule, kv_policy="none").logits.numpy()
        np.testing.assert_allclose(one.nats, losses(logits, ids).mean(axis=-1), atol=NATS_ATOL)


def test_the_sets_are_those_of_the_families(found: list[SetResult]) -> None:
    sets = {family: [kept for _, _, kept in points] for family, points in curves(found).items()}
    assert sets["exit"] == [(0, 1, 2, 3), (0, 1, 2), (0, 1), (0,)]
    assert sets["even"] == [(0, 1, 2, 3), (0, 2, 3), (0, 3)]
    sizes = [len(kept) for kept in sets["greedy"]]
    assert sizes == [4, 3, 2, 1]
    for larger, smaller in zip(sets["greedy"], sets["greedy"][1:], strict=False):
        assert set(smaller) < set(larger)


def test_greedy_takes_out_the_least_harmful_layer(
    checkpoint: Checkpoint, ids: np.ndarray, found: list[SetResult]
) -> None:
    reference = Reference.load(checkpoint)

    def nats(kept: LayerSet) -> float:
        mask = np.zeros((1, LAYERS, 2), np.float32)
        mask[:, list(kept)] = 1
        rule = LayerMask(mask, np.zeros(1, np.int64))
        logits = reference(torch.from_numpy(ids), rule=rule, kv_policy="none").logits.numpy()
        return float(losses(logits, ids).mean())

    whole = tuple(range(LAYERS))
    best = min((tuple(i for i in whole if i != out) for out in whole), key=nats)
    assert curves(found)["greedy"][1][2] == best


def test_the_oracle_takes_the_smallest_set_within_the_tolerance() -> None:
    results = [
        SetResult("greedy", (0, 1, 2, 3), np.array([2.0, 2.0, 2.0])),
        SetResult("exit", (0, 1), np.array([2.0, 2.1, 3.0])),
        SetResult("greedy", (0,), np.array([2.3, 9.0, 9.0])),
    ]
    assert oracle(results, 0.0).layers.tolist() == [2, 4, 4]
    assert oracle(results, 0.15).layers.tolist() == [2, 2, 4]
    assert oracle(results, 0.35).layers.tolist() == [1, 2, 4]
    assert oracle(results, 0.35).share == pytest.approx(7 / 12)
    assert oracle(results, 0.35, ["exit"]).layers.tolist() == [2, 2, 4]
    assert oracle(results, math.inf).layers.tolist() == [1, 1, 1]


def test_the_command_writes_table_json_and_page(
    checkpoint: Checkpoint, tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "study.html"
    options = ["--text", str(tiny_text), "--tokens", "256", "-o", str(page)]
    assert run(["study", str(checkpoint.directory), *options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["curves"]) == set(FAMILIES)
    assert [row["tolerance_nats"] for row in report["oracle"]] == [0.0, 0.02, 0.05, 0.1, 0.2]
    assert page.read_text().count("<svg") == 3  # the first one for wide and for narrow screens
    assert run(["study", str(checkpoint.directory), "--tokens", "8"]) == 2
    assert "tokens to measure on" in capsys.readouterr().err


def test_with_no_time_the_fewest_sequences_are_read_and_greedy_stops(checkpoint: Checkpoint, ids: np.ndarray) -> None:
    found = study(checkpoint, ids, seconds=0.0)
    assert {len(one.nats) for one in found} == {min(4, len(ids))}
    assert {len(one.kept) for one in found if one.family == "greedy"} == {LAYERS}
    assert {len(one.kept) for one in found if one.family == "exit"} == set(range(1, LAYERS))
