"""The family matrix: every family, gate and option goes through export, and `verify` must pass.

A row is a checkpoint and an export. Every family has a dense row, one with vector gates on both branches, and
one with scalar gates on a single branch; the options that families share are spread over these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_exporter.families import FAMILIES
from gsx_exporter.gate_config import GateConfig
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow

# The exported one, and one at which every branch runs: others differ in their thresholds only.
BUDGETS = (1.0, 0.7)
GREEDY_TOKENS = 256
TOKENS = 512

BOTH_VECTOR = GateConfig("vector", "post_norm")
BOTH_SCALAR = GateConfig("scalar", "pre_norm")
ATTN_SCALAR = GateConfig("scalar", "pre_norm", ("attn",))
MLP_SCALAR = GateConfig("scalar", "pre_norm", ("mlp",))
ATTN_VECTOR = GateConfig("vector", "post_norm", ("attn",))
MLP_VECTOR = GateConfig("vector", "pre_norm", ("mlp",))
LINEAR_SCORES = GateConfig("vector", "post_norm", score="linear")
MLP_LINEAR = GateConfig("vector", "pre_norm", ("mlp",), "linear")

THETA = {"rope_theta": 10000.0}
LINEAR = {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}}
DYNAMIC = {"rope_parameters": {**THETA, "rope_type": "dynamic", "factor": 4.0}}
YARN = {
    "rope_parameters": {
        **THETA,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}
LLAMA3 = {
    "rope_parameters": {
        **THETA,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}


@dataclass(frozen=True)
class Row:
    """A checkpoint (family, gates, configuration keys) and how it is exported."""

    family: str
    gate: GateConfig | None
    select: Literal["threshold", "rank"] = "threshold"
    kv_policy: Literal["compute", "copy"] = "compute"
    tied: bool = False
    hidden: int = 64
    sharded: bool = False
    keys: dict[str, Any] = field(default_factory=dict)
    context: int | None = None

    def __str__(self) -> str:
        gate = self.gate
        parts = [self.family]
        parts += ["dense"] if gate is None else [gate.kind, gate.input, "+".join(gate.branches), self.select]
        parts += ["linear"] if gate is not None and gate.score == "linear" else []
        parts += [self.kv_policy] if self.kv_policy == "copy" else []
        parts += [self.keys["rope_parameters"].get("rope_type", "two ropes")] if "rope_parameters" in self.keys else []
        parts += [key for key in self.keys if key != "rope_parameters"]
        parts += ["tied"] if self.tied else []
        return "-".join(parts)


# Different bases for the two kinds of attention, and one of them scaled, as in Gemma 3 of 4 B and above.
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
OLMO3_SCALING = {
    "rope_type": "yarn",
    "factor": 8.0,
    "attention_factor": 1.2,
    "original_max_position_embeddings": 64,
}
PARTIAL = {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.75}}
# Its original context is shorter than the model's, and longer than the generated texts.
LONGROPE = {
    "rope_parameters": {
        **THETA,
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 5.0],
        "original_max_position_embeddings": 400,
        "partial_rotary_factor": 0.75,
    },
    "original_max_position_embeddings": 400,
}
BIASES = {"attention_bias": True, "mlp_bias": True}
# A window shorter than any text here, so that it matters; Qwen2 slides from one layer on.
SLIDING = {"sliding_window": 8}
# The text repeats within 8 tokens: behind such a window many tokens have the same score, but for rounding.
WIDER = {"sliding_window": 64}
QWEN_SLIDING = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}

ROWS = [
    Row("llama", None, tied=True, hidden=48, keys=LINEAR),
    Row("llama", BOTH_VECTOR, kv_policy="copy", keys={**LLAMA3, **BIASES}),
    Row("llama", ATTN_SCALAR, "rank", tied=True, sharded=True),
    Row("mistral", None, keys=YARN),
    Row("mistral", BOTH_VECTOR, kv_policy="copy", tied=True, keys=SLIDING),
    Row("mistral", MLP_SCALAR, "rank", keys={"head_dim": 32}),
    Row("qwen2", None, tied=True),
    Row("qwen2", BOTH_VECTOR, kv_policy="copy", keys={**QWEN_SLIDING, **DYNAMIC}),
    Row("qwen2", ATTN_SCALAR, "rank", tied=True, hidden=48),
    Row("qwen3", None, keys={"attention_bias": True}),
    Row("qwen3", BOTH_VECTOR, kv_policy="copy", keys={**YARN, "head_dim": 32}),
    Row("qwen3", MLP_SCALAR, tied=True),
    Row("llama", MLP_VECTOR, keys={"head_dim": 24}),
    Row("mixtral", None, keys={"num_experts_per_tok": 1}),
    Row("mixtral", BOTH_VECTOR, kv_policy="copy", keys=SLIDING),
    Row("mixtral", ATTN_SCALAR, "rank", sharded=True),
    Row("qwen2_moe", None, tied=True, keys={"decoder_sparse_step": 2}),
    Row("qwen2_moe", BOTH_VECTOR, keys=QWEN_SLIDING),
    Row("qwen2_moe", MLP_SCALAR, "rank", keys={"norm_topk_prob": True}),
    Row("qwen3_moe", None, keys={"norm_topk_prob": False, "attention_bias": True}),
    Row("qwen3_moe", BOTH_VECTOR, kv_policy="copy", keys={"head_dim": 32, "mlp_only_layers": [1]}),
    Row("qwen3_moe", MLP_SCALAR, tied=True),
    Row("gemma2", None, tied=True),
    Row("gemma2", BOTH_VECTOR, kv_policy="copy", tied=True, keys={"attention_bias": True}),
    # Gates on the scaled embeddings of a random model would be near 0, and a norm behind such a gate grows rounding.
    Row("gemma2", GateConfig("scalar", "post_norm", ("attn",)), "rank", keys=WIDER),
    Row("gemma3_text", None, tied=True, keys={"rope_parameters": GEMMA3_ROPE}),
    Row("gemma3_text", BOTH_VECTOR, kv_policy="copy", keys={"head_dim": 32, "final_logit_softcapping": 10.0}),
    Row("gemma3_text", MLP_SCALAR, "rank", tied=True, keys=WIDER),
    Row("phi3", None),
    Row("phi3", BOTH_VECTOR, kv_policy="copy", tied=True, keys={**LONGROPE, **SLIDING}),
    Row("phi3", MLP_SCALAR, keys=LONGROPE, context=512),
    Row("phi3", MLP_SCALAR, "rank", keys=PARTIAL),
    Row("granite", None, tied=True),
    Row("granite", BOTH_VECTOR, kv_policy="copy", keys=BIASES),
    Row("granite", ATTN_SCALAR, "rank", tied=True),
    Row("smollm3", None, tied=True),
    Row("smollm3", BOTH_VECTOR, kv_policy="copy", keys={**YARN, **BIASES}),
    Row("smollm3", MLP_SCALAR, "rank", tied=True),
    Row("olmo2", None),
    Row("olmo2", BOTH_VECTOR, kv_policy="copy", keys={"attention_bias": True}),
    Row("olmo2", MLP_SCALAR, "rank"),
    Row("olmo3", None),
    # With the weights of seed 0 two ways to sum differ by 5.5e-5 of the logits' scale on a processor with AMX.
    Row("olmo3", BOTH_VECTOR, kv_policy="copy", keys={"rope_scaling": OLMO3_SCALING, "seed": 2}),
    Row("olmo3", ATTN_SCALAR, "rank", keys=WIDER),
    Row("dory", None),
    Row("dory", None, keys={"n_input_layers": 0, "n_output_layers": 1, "attention_bias": True, "mlp_bias": True}),
    Row("ouro", None, tied=True),
]
# Loops that the looped models' rows are verified at: the share of the optional ones.
LOOPS = (1.0, 0.5, 0.0)
# Families whose reports are drawn as pages: one with every kind of gate, and one with loops. Drawing takes as long as
# comparing these models does, and those of other families differ in their numbers only.
DRAWN = ("llama", "dory")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These models are too small to be worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shard(directory: Path) -> None:
    """Split the weights file of a checkpoint in two, with an index."""
    single = directory / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_family_is_exported_with_parity(
    row: Row, tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if row.family not in DRAWN:  # by the module: `gsx.verify` is the function
        monkeypatch.setattr(import_module("gsx.workflows.verify"), "page", lambda report: "")
    model = tiny_checkpoint(
        tmp_path / "model",
        row.family,
        gate=row.gate,
        layers=3 if row.kv_policy == "copy" else 2,
        hidden=row.hidden,
        tied=row.tied,
        tokenizer=True,
        **row.keys,
    )
    if row.sharded:
        shard(model)
    gated: dict[str, Any] = {"context": row.context}
    if row.gate is not None:
        gated |= {"budget": 0.7, "select": row.select, "kv_policy": row.kv_policy}
        if row.select == "threshold":
            gated |= {"calibration": tiny_text, "calibration_tokens": 2048}
    export(model, tmp_path / "bundle", **gated)
    scope = {"tokens": TOKENS, "budgets": BUDGETS, "greedy_tokens": GREEDY_TOKENS, "full": True}
    report = verify(tmp_path / "bundle", text=tiny_text, **scope)
    for line in report.rows():
        print(f"{line.verdict:8} {line.name:55} {line.value:>9} {line.limit:>9} {line.detail}")
    assert report.passed, [check for check in report.checks if check.verdict == "fail"]
    looped = FAMILIES[row.family].loops is not None
    assert [result.budget for result in report.results] == list(BUDGETS if row.gate else LOOPS if looped else (1.0,))
    for result in report.results:
        assert result.windows.logits.values > 0
        for greedy in result.greedy.values():
            assert greedy.tokens == GREEDY_TOKENS
            assert greedy.mismatches == ()
        if result.kept_share is not None:
            # Text that the thresholds were not found on; only its bytes matter here.
            assert abs(result.kept_share - result.budget) < 0.1
        # The logits must be of the order that the limit is meant for.
        assert 1 < result.windows.logits.reference_max < 30


def test_dynamic_rope_beyond_the_trained_length(tmp_path: Path) -> None:
    """Within the trained length dynamic RoPE is the plain one: what it adds shows only beyond it."""
    from gsx.parity.closeness import Comparer
    from gsx.parity.measure import EngineSide, ReferenceSide
    from gsx_engines.bundle.bundle import open_bundle
    from gsx_exporter.checkpoint.opening import open_checkpoint
    from gsx_exporter.reference.model import Reference

    model = tiny_checkpoint(tmp_path / "model", "qwen2", max_position_embeddings=32, **DYNAMIC)
    export(model, tmp_path / "bundle")
    ids = np.random.default_rng(0).integers(3, 97, (1, 80))
    side = ReferenceSide(Reference.load(open_checkpoint(model)), None, "compute")
    comparer = Comparer(3, (), causal=True, near_tie=0, copies=False)
    engine = EngineSide(open_bundle(tmp_path / "bundle"))
    comparer.add(side.observe(ids, np.ones_like(ids)), engine.observe(ids, np.ones_like(ids), {}))
    found = comparer.result()
    assert found.logits.max_abs < 1e-4
    assert max(one.max_relative for one in found.keys) < 1e-4
