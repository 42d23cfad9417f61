"""CALM: which tokens exit and when, the traced decoder against the reference's masks, the guarantee, and refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_engines.bundle.confidence import RANGES, Guarantee, Measure
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.decoder.rule import Tokens
from gsx_exporter.decoder.walk import Walk
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.calm.calibrate import GRIDS, calibrate_exits
from gsx_exporter.rules.calm.policy import CalmPlan
from gsx_exporter.rules.calm.reference import Confident
from gsx_exporter.rules.calm.risk_control import RiskTarget
from gsx_exporter.rules.calm.traced import Calm
from gsx_exporter.rules.plan import PolicyOptions
from gsx_exporter.rules.registry import plan_policy
from gsx_plugins.errors import UsageError
from tests.tiny import tiny_checkpoint

EXITS = (1, 3)
TRAINED: dict[str, Any] = {"exit_classifiers": EXITS, "gate": GateConfig("scalar")}
# Two orders of summation of float32 products at logits of order 10.
LOGITS_ATOL = 5e-5
NONE, FROM_THE_START = np.full(1, 10_000, np.int64), np.zeros(1, np.int64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("calm") / "model"
    return open_checkpoint(tiny_checkpoint(path, layers=4, exits=EXITS, tokenizer=True, **TRAINED))


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 250, (6, 24))


def kept(checkpoint: Checkpoint, ids: np.ndarray, rule: Confident) -> tuple[np.ndarray, np.ndarray]:
    """The reference: which tokens run each layer's attention, [L, M, S], and the logits."""
    output = Reference.load(checkpoint)(torch.from_numpy(ids), rule=rule)
    return np.stack([row[0].numpy() for row in output.keep]), output.logits.numpy()


@pytest.mark.parametrize(
    ("measure", "threshold", "decay"),
    [
        *[("softmax", 0.1, 0.0), ("softmax", 0.3, 6.0), ("softmax", math.inf, 0.0)],
        *[("state", 0.9, 0.0), ("state", 0.99, 6.0)],
        *[("classifier", 0.5, 0.0), ("classifier", 0.7, 6.0)],
    ],
)
def test_the_traced_decoder_keeps_what_the_masks_keep(
    checkpoint: Checkpoint, ids: np.ndarray, measure: Measure, threshold: float, decay: float
) -> None:
    want_keep, want = kept(checkpoint, ids, Confident(EXITS, measure, threshold, FROM_THE_START, decay, 16))
    walk = Walk(checkpoint, ids, DecoderOptions(Calm(EXITS, measure, decay, 16)))
    with torch.inference_mode():
        stream = walk.stream({"exit_threshold": np.array([threshold], np.float32), "full_until": FROM_THE_START})
        ran = [walk.through(number, layer, stream) for number, layer in walk.layers()]
        logits = np.concatenate([found.numpy() for _, found in walk.logits(stream)])
    for layer, found in enumerate(ran):
        assert found["attn"].view(ids.shape).numpy().tolist() == want_keep[layer].tolist()
        assert found["mlp"].tolist() == found["attn"].tolist()
    np.testing.assert_allclose(logits, want, atol=LOGITS_ATOL)
    if threshold == math.inf:
        assert want_keep.all()
    else:
        assert 0 < want_keep.mean() < 1


def test_tokens_leave_only_at_exits_and_never_come_back(checkpoint: Checkpoint, ids: np.ndarray) -> None:
    keep, _ = kept(checkpoint, ids, Confident(EXITS, "softmax", 0.1, FROM_THE_START, 0.0, 1))
    assert keep[0].all()
    assert (keep[1] == keep[2]).all(), "there is no exit after layer 2"
    assert (keep[1] >= keep[3]).all()
    assert 0 < keep[3].mean() < keep[1].mean() < 1


def test_saturation_never_leaves_at_the_first_exit(checkpoint: Checkpoint, ids: np.ndarray) -> None:
    keep, _ = kept(checkpoint, ids, Confident(EXITS, "state", -1.0, FROM_THE_START, 0.0, 1))
    assert keep[:3].all()
    assert not keep[3].any()


def test_tokens_below_full_until_run_in_full(checkpoint: Checkpoint, ids: np.ndarray) -> None:
    until = np.array([10], np.int64)
    keep, _ = kept(checkpoint, ids, Confident(EXITS, "softmax", 0.0, until, 0.0, 1))
    assert keep[:, :, :10].all()
    assert not keep[1:, :, 10:].any()
    everywhere, _ = kept(checkpoint, ids, Confident(EXITS, "softmax", 0.0, NONE, 0.0, 1))
    assert everywhere.all()


def test_a_decaying_threshold_lets_more_leave_later(checkpoint: Checkpoint, ids: np.ndarray) -> None:
    tokens = Calm(EXITS, "softmax", decay=4.0, decay_tokens=8)
    positions = torch.arange(20)[None]
    call = Tokens(torch.zeros(20, dtype=torch.int64), torch.ones(20, dtype=torch.bool), positions)
    inputs = {"exit_threshold": torch.tensor([0.8]), "full_until": torch.tensor([4])}
    found = tokens.enter(call, inputs)["leaves_at"].numpy()
    assert np.isinf(found[:4]).all()
    # 0.9 lambda + 0.1 lambda exp(-tau t / N), t from 0 (docs/methods.md section 9).
    want = 0.8 * (0.9 + 0.1 * np.exp(-4.0 * np.arange(16) / 8))
    np.testing.assert_allclose(found[4:], want, rtol=1e-6)


@pytest.mark.parametrize("risk", ["agreement", "loss"])
def test_the_calibrated_threshold_is_the_last_of_the_walk_that_holds(
    checkpoint: Checkpoint, ids: np.ndarray, risk: str
) -> None:
    options = DecoderOptions(Calm(EXITS, "softmax"))
    prompts = np.repeat(ids, 10, axis=0)
    found = calibrate_exits(
        checkpoint, prompts, options, RiskTarget(0.5, 0.9), "loss" if risk == "loss" else "agreement", GRIDS["softmax"]
    )
    tested = found.outcome.tested
    assert [one.threshold for one in tested] == list(GRIDS["softmax"][: len(tested)])
    assert all(one.accepted for one in tested[:-1])
    assert list(found.kept) == sorted(found.kept, reverse=True)
    if risk == "agreement":
        _, full = kept(checkpoint, ids, Confident(EXITS, "softmax", math.inf, FROM_THE_START, 0.0, 1))
        last = tested[-1]
        _, some = kept(checkpoint, ids, Confident(EXITS, "softmax", last.threshold, FROM_THE_START, 0.0, 1))
        assert last.mean_risk == pytest.approx((some.argmax(-1) != full.argmax(-1)).mean(), abs=1 / ids.size)


def test_a_bundle_holds_parity_and_its_guarantee(checkpoint: Checkpoint, tiny_text: Path, tmp_path: Path) -> None:
    bundle = export(
        checkpoint.directory,
        tmp_path / "out",
        policy="calm:softmax,tolerance=0.6,confidence=0.8",
        calibration=tiny_text,
        calibration_tokens=2048,
    )
    policy = bundle.manifest.policy
    assert policy is not None
    assert policy.confidence is not None
    guarantee = policy.confidence.guarantee
    assert isinstance(guarantee, Guarantee)
    assert guarantee.prompts == 2048 // 64
    held = [one.threshold for one in guarantee.tested if one.accepted]
    assert policy.confidence.threshold == held[-1]
    report = verify(tmp_path / "out", text=tiny_text, tokens=256, greedy_tokens=16)
    assert report.passed
    for keep in (
        KeepSettings(exit_threshold=1.5),
        KeepSettings(exit_threshold=-0.1),
        KeepSettings(exit_threshold=math.nan),
        KeepSettings(exit=1),
    ):
        with pytest.raises(UsageError):
            controls_for(bundle.manifest, keep)


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        ("calm", "a threshold or a guarantee"),
        ("calm:softmax,threshold=0.5,tolerance=0.1", "a threshold or a guarantee"),
        ("calm:threshold=1.2", "outside the range of the confidence measure"),
        ("calm:softmax,threshold=-0.5", "outside the range of the confidence measure"),
        ("calm:threshold=nan", "outside the range of the confidence measure"),
        ("calm:tolerance=0", "of a guarantee"),
        ("calm:tolerance=0.1,confidence=1", "of a guarantee"),
        ("calm:tolerance=0.1,risk=none", "risk=agreement or risk=loss"),
        ("calm:threshold=0.5,confidence=0.9", "with a threshold"),
        ("calm:threshold=0.5,exits=4", "outside the model"),
        ("calm:threshold=0.5,exits=0+1", "outside the model"),
        ("calm:threshold=0.5,exits=x", "its parameters"),
        ("calm:entropy,threshold=0.5", "its parameters"),
        ("calm:threshold=0.5,decay=-1", "decay=NUMBER of at least 0"),
        ("calm:threshold=half", "threshold=NUMBER"),
    ],
)
def test_bad_parameters_are_refused(checkpoint: Checkpoint, policy: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        plan_policy(PolicyOptions(policy), checkpoint.config)


def test_other_options_that_do_not_fit_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for choice in (
        PolicyOptions("calm:threshold=0.5", budget=0.7),
        PolicyOptions("calm:threshold=0.5", select="rank"),
        PolicyOptions("calm:threshold=0.5", kv_policy="none"),
    ):
        with pytest.raises(UsageError):
            plan_policy(choice, checkpoint.config)
    dense = open_checkpoint(tiny_checkpoint(tmp_path / "dense"))
    with pytest.raises(UsageError, match='"exits"'):
        plan_policy(PolicyOptions("calm:threshold=0.5"), dense.config)
    named = plan_policy(PolicyOptions("calm:threshold=0.5,exits=1+2"), dense.config)
    assert isinstance(named, CalmPlan)
    assert named.rule.exits == (1, 2)


@pytest.mark.parametrize(
    ("classifiers", "policy", "parts"),
    [
        ((), "calm:classifier,threshold=0.5", ["model.layers.0.exit_classifier", "model.layers.2.exit_classifier"]),
        ((1,), "calm:classifier,threshold=0.5,exits=1+3", ["model.layers.2.exit_classifier", "after 1 layers"]),
    ],
)
def test_a_checkpoint_without_classifiers_is_refused_by_their_names(
    tmp_path: Path, classifiers: tuple[int, ...], policy: str, parts: list[str]
) -> None:
    model = open_checkpoint(tiny_checkpoint(tmp_path / "model", layers=4, exits=EXITS, exit_classifiers=classifiers))
    with pytest.raises(UsageError) as caught:
        plan_policy(PolicyOptions(policy), model.config)
    message = str(caught.value)
    assert all(part in message for part in [*parts, "--exit-classifiers"]), message
    assert "model.layers.1." not in message


@pytest.mark.parametrize(("given", "exits"), [("", EXITS), (",exits=3", (3,))])
def test_classifiers_are_read_at_their_own_exits(checkpoint: Checkpoint, given: str, exits: tuple[int, ...]) -> None:
    plan = plan_policy(PolicyOptions(f"calm:classifier,threshold=0.5{given}"), checkpoint.config)
    assert isinstance(plan, CalmPlan)
    assert plan.rule.exit_depths() == exits


def test_too_few_prompts_for_a_guarantee_are_refused_in_numbers(
    checkpoint: Checkpoint, tiny_text: Path, tmp_path: Path
) -> None:
    policy = "calm:softmax,tolerance=0.01"
    with pytest.raises(UsageError, match="299 or more"):
        export(checkpoint.directory, tmp_path / "out", policy=policy, calibration=tiny_text, calibration_tokens=1024)
    assert not (tmp_path / "out").exists()


def test_a_guarantee_under_which_nothing_can_be_skipped_is_refused(tiny_text: Path, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", exits=(1,), tokenizer=True)
    # With a head a thousand times larger the model is always confident, and an untrained exit is nearly always wrong.
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= 1000
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="nothing can be skipped under this guarantee") as caught:
        export(model, tmp_path / "out", policy="calm:tolerance=0.2", calibration=tiny_text, calibration_tokens=1024)
    assert "16 prompts" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_ranges_hold_the_grids() -> None:
    for measure, grid in GRIDS.items():
        assert list(grid) == sorted(set(grid), reverse=True)
        assert RANGES[measure].least == grid[-1]
        assert grid[0] <= RANGES[measure].most
