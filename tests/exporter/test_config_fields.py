"""Every field of a configuration means to gsx what it means to transformers, or is refused."""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoConfig

from gsx_exporter.checkpoint import ouro
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.errors import CheckpointError
from gsx_exporter.families import FAMILIES
from gsx_exporter.rope_config import ROPE_KINDS
from tests.exporter.test_checkpoint import LLAMA3, YARN, config, expected, legacy_rope, logits, same
from tests.tiny import tiny_checkpoint

ouro.register()

# Every field of the families' configuration classes, by what gsx does with it. A field that is new in transformers
# fails test_every_field_is_known: find out whether it changes the computation, then read it, refuse it or add it here.
READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types",
    "pad_token_id", "bos_token_id", "eos_token_id",
    "hidden_activation", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
    "use_bidirectional_attention",
    "original_max_position_embeddings",
    "embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling",
    "no_rope_layers", "no_rope_layer_interval",
    "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "qkv_bias",
    "shared_expert_intermediate_size", "decoder_sparse_step", "mlp_only_layers",
    "n_input_layers", "n_recurrent_layers", "n_output_layers", "n_recurrent_loops", "ngpt_alpha_init",
    "recurrent_kv_cache_mode", "total_ut_steps", "early_exit_threshold",
}  # fmt: skip
READ_IN_TRAINING = {
    "attention_dropout", "initializer_range", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits",
    "resid_pdrop", "embd_pdrop",
}  # fmt: skip
WITHOUT_EFFECT = {
    "transformers_version", "architectures", "dtype", "use_cache",
    "output_hidden_states", "return_dict",  # what a call returns
    "chunk_size_feed_forward", "is_encoder_decoder", "pretraining_tp",  # not read by these families
    "id2label", "label2id", "problem_type",  # classification
    *READ_IN_TRAINING,
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_field_is_known(family: str) -> None:
    fields = {field.name for field in dataclasses.fields(type(AutoConfig.for_model(family)))}
    assert fields - READ - WITHOUT_EFFECT == set()


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.described])
def test_every_field_that_the_modelling_code_reads_is_read(family: str) -> None:
    """Attributes of `config` in the family's own code, also those that `getattr` looks for."""
    root = Path(transformers.__file__).parent
    folder = type(AutoConfig.for_model(family)).__module__.split(".")[-2]
    tree = ast.parse((root / "models" / folder / f"modeling_{folder}.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not _is_of_another_model(node, family)]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", "")) == "config":
            found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            of, name = node.args[:2]
            if getattr(of, "id", getattr(of, "attr", "")) == "config" and isinstance(name, ast.Constant):
                found.add(str(name.value))
    assert found - {"_attn_implementation"} <= READ | READ_IN_TRAINING


def _is_of_another_model(node: ast.stmt, family: str) -> bool:
    """Whether a class is not part of the family's language model: the multimodal ones beside Gemma 3's text model."""
    return family == "gemma3_text" and (
        isinstance(node, ast.FunctionDef)
        or (isinstance(node, ast.ClassDef) and ("Image" in node.name or node.name in _MULTIMODAL))
    )


_MULTIMODAL = (
    "Gemma3ForConditionalGeneration", "Gemma3ForSequenceClassification", "Gemma3Model", "Gemma3MultiModalProjector",
    "Gemma3PreTrainedModel",
)  # fmt: skip

# Values that a field may be found with: ordinary ones, borders, other spellings, wrong types.
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 98, 0, None],
    "hidden_size": [32, 0, 65],
    "intermediate_size": [16, -1],
    "num_hidden_layers": [1, 0, 3, 2.0],
    "num_attention_heads": [2, 8, 3, 0],
    "num_key_value_heads": [1, 4, None, 0],
    "head_dim": [8, 15, None, 0, "16"],
    "hidden_act": ["swish", "gelu", None, 1],
    "max_position_embeddings": [4, 0, None, 10**12],
    "rms_norm_eps": [1e-2, 0.0, 0, "1e-6", None],
    "tie_word_embeddings": [True, False, None, "false"],
    "attention_bias": [True, None],
    "mlp_bias": [True, None],
    "attention_chunk_size": [4],
    "sliding_window": [4, 1, 0, -1, None, 4.0],
    "use_sliding_window": [True, None],
    "max_window_layers": [0, 1, 99, None],
    "layer_types": [["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention"], None,
                    ["chunked_attention"] * 2],
    "pad_token_id": [None, -1, 96, 97, -98, "0"],
    "bos_token_id": [None, 97, "1"],
    "eos_token_id": [None, [2, 5], [], 97, -1, "2"],
    "rope_theta": [1e6, 1, 0, -5.0, None, "1e4"],
    "rope_scaling": [None, {}, {"type": "default"}, {"type": "linear", "factor": 2}, {"factor": 2.0}, "linear", [1]],
    "rope_parameters": [None, {}, {"rope_theta": 50.0}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "yarn"},
                        {"rope_type": "llama3", "factor": 2.0}, {"full_attention": {"rope_theta": 5.0}}],
    "partial_rotary_factor": [0.5, None],
    "is_causal": [False, True],
    "is_decoder": [False],
    "original_max_position_embeddings": [8],
    "hidden_activation": ["gelu", "silu", None, 1],
    "query_pre_attn_scalar": [8, 0, -4, None, "24"],
    "attn_logit_softcapping": [30.0, 2.0, None, 0.0, -1.0],
    "final_logit_softcapping": [5.0, None, 0.0],
    "use_bidirectional_attention": [True, False, None],
    "sliding_window_pattern": [2, 1, 0],
    "embedding_multiplier": [12.0, 0, None],
    "num_local_experts": [3, 5, 0, None],
    "num_experts": [3, 7, 0, None],
    "num_experts_per_tok": [1, 9, 0, None, 2.0],
    "moe_intermediate_size": [16, 0, None],
    "shared_expert_intermediate_size": [16, 0, None],
    "norm_topk_prob": [True, False, None],
    "decoder_sparse_step": [1, 2, 0, -1, None],
    "mlp_only_layers": [[0], [7], [], None, 1],
    "qkv_bias": [False, None],
    "output_router_logits": [True],
    "router_jitter_noise": [0.5],
    "attention_multiplier": [0.5, 0.0, None],
    "residual_multiplier": [0.5, 0, "1"],
    "logits_scaling": [4.0, 0.0, None],
    "no_rope_layers": [[1, 1], [0, 0], [0], None, [True, False], "10", [2, 0]],
    "no_rope_layer_interval": [2, 1, 0],
    "rope_local_base_freq": [50.0, 0, None],
    "n_input_layers": [2, 0, -2, None],
    "n_recurrent_layers": [2, 0, 1],
    "n_output_layers": [0, 4],
    "n_recurrent_loops": [1, 2, 0, -1, None],
    "recurrent_kv_cache_mode": ["last_loop", "first_loop"],
    "total_ut_steps": [1, 2, 0, None],
    "early_exit_threshold": [1.0, 0.5, None],
    "ngpt_alpha_init": [0.2, 0.0, -0.1, None],
    "initializer_range": [0.04, 0.0, -1.0, None],
}  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("field", list(VALUES))
def test_a_field_means_what_it_means_to_transformers(tmp_path: Path, family: str, field: str) -> None:
    """The same logits, or a refusal; where transformers fails, gsx refuses."""
    keys = {"sliding_window": 6} if family == "mistral" else {}
    model = tiny_checkpoint(tmp_path / "model", family, layers=2, **keys)
    path = model / "config.json"
    before = path.read_text()
    for value in VALUES[field]:
        path.write_text(before)
        if field in ("rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"):
            legacy_rope({"type": "linear", "factor": 2.0} if field == "original_max_position_embeddings" else None)(
                model
            )
        config(**{field: value})(model)
        try:
            found = logits(model)
        except CheckpointError:
            continue
        assert same(found, expected(model)), f"{family}: {field} {value!r}"


ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
    "llama3": LLAMA3,
}
# As configurations of transformers 4 and 5 have been written: keys of config.json, given kind, base and the rest.
SPELLINGS: dict[str, Callable[[str, float, dict[str, Any]], dict[str, Any]]] = {
    "4, type": lambda kind, base, rest: {"rope_theta": base, "rope_scaling": {"type": kind, **rest}},
    "4, rope_type": lambda kind, base, rest: {"rope_theta": base, "rope_scaling": {"rope_type": kind, **rest}},
    "4, both": lambda kind, base, rest: {
        "rope_theta": base,
        "rope_scaling": {"type": kind, "rope_type": kind, **rest},
    },
    "5": lambda kind, base, rest: {"rope_parameters": {"rope_type": kind, "rope_theta": base, **rest}},
    "5, base outside": lambda kind, base, rest: {
        "rope_theta": base,
        "rope_parameters": {"rope_type": kind, **rest},
    },
    "5, beside the old one": lambda kind, base, rest: {
        "rope_theta": base,
        "rope_scaling": {"type": kind, **rest},
        "rope_parameters": {"rope_type": kind, "rope_theta": base, **rest},
    },
}


@pytest.mark.parametrize("kind", list(ROPE))
def test_every_spelling_of_rope_is_the_same_model(tmp_path: Path, kind: str) -> None:
    assert set(ROPE) <= set(ROPE_KINDS)
    model = tiny_checkpoint(tmp_path / "model", layers=2, max_position_embeddings=16)
    path, found = model / "config.json", {}
    plain = {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("rope_")}
    for name, spelled in SPELLINGS.items():
        path.write_text(json.dumps(plain | spelled(kind, 5000.0, ROPE[kind])))
        found[name] = logits(model)
        assert same(found[name], expected(model)), name
        assert open_checkpoint(model).config.max_positions == (
            16 if kind == "default" else 16 * int(ROPE[kind]["factor"])
        )
    first = found["4, type"]
    assert all(same(one, first) for one in found.values())
    path.write_text(json.dumps(plain | SPELLINGS["5"]("default", 10.0, {})))
    assert not same(logits(model), first)
