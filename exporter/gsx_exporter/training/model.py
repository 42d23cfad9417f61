"""The model of a run: loaded or new, with its gates, and with what is trained set apart from what is frozen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gsx_exporter.checkpoint.adapter import matched
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.tensors import is_gate
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError
from gsx_exporter.training.gated import add_gates, gate_name, is_constant
from gsx_exporter.training.learner import Learner
from gsx_exporter.training.schedule import Schedule
from gsx_exporter.training.settings import LoraSettings, ModelShape, TrainSettings
from gsx_exporter.training.tokenizer import END_OF_TEXT_ID
from gsx_plugins.errors import UsageError

_FROZEN_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """What a run trains.

    Args:
        hf: transformers' model, with gates and, in mode "lora", with adapters in its layers.
        config: the result's: with the run's gates and exits.
        adapted: PEFT's model around hf; None without adapters.
        teacher: the dense model to learn from, where hf cannot become it again.
    """

    hf: Any
    config: ModelConfig
    adapted: Any = None
    teacher: Any = None

    def learner(self, settings: TrainSettings, *, steps: int, seed: int) -> Learner:
        """The module that a Trainer trains."""
        return Learner(
            self.hf,
            self.config,
            schedule=Schedule(self.config.num_layers, settings.gate, settings.exits, steps=steps, seed=seed),
            sparsity=settings.gate.sparsity if settings.gate else 0.0,
            exit_target=settings.exits.target if settings.exits else "text",
            distill=settings.distill,
            adapted=self.adapted,
            teacher=self.teacher,
        )


def check_trainable(checkpoint: Checkpoint, settings: TrainSettings) -> None:
    """Refuse a model that cannot be trained in this way.

    Raises:
        UsageError: of which kind it is.
    """
    config = checkpoint.config
    reasons = {
        "its layers run several times (a looped model), and no method says what gates or exits do there": config.loops,
        "it has routers, which decide what runs": config.router,
        "it is the text part of a multimodal model": checkpoint.whole,
        "its weights are quantized, and gradients do not pass them": checkpoint.layout or checkpoint.gguf,
        "it is a model with an adapter": checkpoint.adapter,
        "its gates have linear scores, which were fitted to gates that training would change": config.gate is not None
        and config.gate.score == "linear",
    }
    for reason, found in reasons.items():
        if found:
            raise UsageError(
                f"{checkpoint.source}: cannot be trained: {reason}",
                expected="float weights of a supported family, in safetensors",
                todo=_instead(checkpoint),
            )
    if settings.mode == "lora":
        targets = settings.lora.targets
        if targets != "all-linear" and (missing := [one for one in targets if not _linear_named(checkpoint, one)]):
            raise UsageError(
                f"{checkpoint.source}: lora.targets names no layer of the model",
                expected="names of linear layers, e.g. q_proj",
                found=missing[0],
            )
        _check_ranks(checkpoint, settings.lora)


def _check_ranks(checkpoint: Checkpoint, lora: LoraSettings) -> None:
    """Refuse a rank that a matrix cannot have, and a pattern that names no layer."""
    ranks = {pattern: (pattern, rank) for pattern, rank in lora.rank_pattern.items()}
    unused = set(ranks)
    for name in sorted(_linear_named(checkpoint, *_names(lora.targets)), key=lambda one: min(checkpoint.shape(one))):
        pattern, rank = matched(ranks, name.removesuffix(".weight"), ("", lora.rank))
        unused.discard(pattern)
        if rank > min(checkpoint.shape(name)):
            raise UsageError(
                f"{checkpoint.source}: the rank is larger than a matrix",
                expected=f"at most {min(checkpoint.shape(name))}, for {name} {list(checkpoint.shape(name))}",
                found=f"rank {rank}",
            )
    if unused:
        raise UsageError(
            f"{checkpoint.source}: lora.rank_pattern names no layer that gets an adapter",
            expected=r"regular expressions such as layers\.[0-5]\..*",
            found=min(unused),
        )


def _instead(checkpoint: Checkpoint) -> str | None:
    """What to do about a model that cannot be trained."""
    if checkpoint.adapter:
        return "train its base, or merge the adapter by PEFT (merge_and_unload) first"
    if checkpoint.config.gate is not None and checkpoint.config.gate.score == "linear":
        return "train the model that they were fitted to, then fit them again: gsx train --linear-scores"
    if checkpoint.config.loop_gate:
        return "gsx train --exit-gate trains the gate between its loops; docs/training.md says what else there is"
    return "docs/training.md says how looped models are trained" if checkpoint.config.loops else None


def _names(targets: Any) -> tuple[str, ...]:
    return () if targets == "all-linear" else tuple(targets)


def _linear_named(checkpoint: Checkpoint, *targets: str) -> list[str]:
    """The matrices of the layers with these names, of all branches without any."""
    found = [
        name
        for name in checkpoint.names
        if ".layers." in name and name.endswith("_proj.weight") and ".experts." not in name
    ]
    return [name for name in found if not targets or name.split(".")[-2] in targets]


def load_subject(checkpoint: Checkpoint, settings: TrainSettings, *, seed: int) -> Subject:
    """The model of a checkpoint, ready to train.

    Raises:
        UsageError, CheckpointError: it cannot be trained in this way, or transformers cannot load it.
    """
    check_trainable(checkpoint, settings)
    config = checkpoint.config
    if settings.gate is not None and config.gate is None:
        config = replace(config, gate=settings.gate.config)
    exits = settings.exits.of(config.num_layers) if settings.exits is not None else ()
    config = replace(config, exits=exits or config.exits)
    hf = _load(checkpoint, _weights_type(checkpoint, settings))
    teacher = None
    if settings.distill is not None and settings.mode == "full":
        teacher = copy.deepcopy(hf).requires_grad_(False).eval()
    adapted = _divided(hf, settings, seed)
    if config.gate is not None:
        _gated(hf, config, settings, seed)
        if checkpoint.config.gate is not None:
            parameters = dict(hf.named_parameters())
            with torch.no_grad():
                for name in filter(is_gate, checkpoint.names):
                    parameters[name].copy_(checkpoint.tensor(name))
        _freeze_constant(hf, config)
    return Subject(hf, config, adapted, teacher)


def new_subject(shape: ModelShape, settings: TrainSettings, *, seed: int) -> Subject:
    """A new Llama model with random weights."""
    torch.manual_seed(seed)
    hf_config = new_config(shape)
    with quiet_transformers():
        hf = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="sdpa")
    hf.model.embed_tokens.padding_idx = None  # end-of-text pads too, and is trained like any other token
    config = ModelConfig.from_hf(hf_config)
    if settings.gate is not None:
        config = replace(config, gate=settings.gate.config)
        _gated(hf, config, settings, seed)
        _freeze_constant(hf, config)
    if settings.exits is not None:
        config = replace(config, exits=settings.exits.of(config.num_layers))
    return Subject(hf, config)


def new_config(shape: ModelShape) -> LlamaConfig:
    """transformers' configuration of a new model."""
    hf = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tied_head,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    hf.architectures = ["LlamaForCausalLM"]
    return hf


def section_of(config: ModelConfig) -> dict[str, Any]:
    """The section `gsx` of a result (docs/design.md, section 5)."""
    found: dict[str, Any] = {}
    if config.gate is not None:
        found |= {"method": "gateskip", "gate": config.gate.to_dict()}
    if config.exits:
        found["exits"] = list(config.exits)
    return found


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    # Only eager attention knows a cap on scores.
    attention = "eager" if checkpoint.config.scales.attention_cap is not None else "sdpa"
    with quiet_transformers():
        try:
            return AutoModelForCausalLM.from_pretrained(
                checkpoint.directory,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except Exception as error:  # many types, all about this directory
            raise CheckpointError(f"{checkpoint.source}: transformers cannot load it", found=one_line(error)) from error


def _weights_type(checkpoint: Checkpoint, settings: TrainSettings) -> torch.dtype:
    """What is trained is float32; what is frozen stays as narrow as it is stored, where products are in bfloat16."""
    if settings.mode == "full" or not settings.trainer.get("bf16"):
        return torch.float32
    types = {checkpoint.stored_type(name) for name in checkpoint.names if not is_gate(name)}
    return _FROZEN_TYPES.get(types.pop(), torch.float32) if len(types) == 1 else torch.float32


def _divided(hf: Any, settings: TrainSettings, seed: int) -> Any:
    """Freeze what the mode does not train. Returns: PEFT's model around hf; None without adapters."""
    if settings.mode == "full":
        return None
    hf.requires_grad_(False)
    return _with_adapters(hf, settings.lora, seed) if settings.mode == "lora" else None


def _all_linear(hf: Any) -> list[str]:
    """The names of the branches' linear layers, without those of experts, which PEFT would adapt as parameters."""
    found = [
        name.split(".")
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name and name.endswith("_proj")
    ]
    # Where a name means different things, with that of the module around it.
    routed = any("expert" in part for name, _ in hf.named_modules() for part in name.split("."))
    return sorted({".".join(name[-2:]) if routed else name[-1] for name in found})


def _gated(hf: Any, config: ModelConfig, settings: TrainSettings, seed: int) -> None:
    """Add the gates: after the adapters, which would take them for layers of the model."""
    gate = settings.gate
    assert config.gate is not None
    if gate is None:  # the model's own take their place
        add_gates(hf, config.gate, bias=0.0, std=0.0, seed=seed)
        return
    outside = [layer for layer in gate.open_layers if layer >= config.num_layers]
    if outside or len(gate.open_layers) >= config.num_layers:
        raise UsageError(
            "training: gate.open_layers are not layers of the model, or all of them",
            expected=f"some of 0 to {config.num_layers - 1}",
            found=", ".join(map(str, gate.open_layers)),
        )
    add_gates(hf, config.gate, bias=gate.bias, std=gate.std, seed=seed, open_layers=gate.open_layers)


def _freeze_constant(hf: Any, config: ModelConfig) -> None:
    assert config.gate is not None
    for layer in hf.model.layers:
        for branch in config.gate.branches:
            gate = getattr(layer, gate_name(branch))
            if is_constant(gate):
                gate.requires_grad_(False)


def _with_adapters(hf: Any, lora: LoraSettings, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        rank_pattern=lora.rank_pattern,
        alpha_pattern={} if lora.alpha else {one: 2 * rank for one, rank in lora.rank_pattern.items()},
        target_modules=_all_linear(hf) if lora.targets == "all-linear" else list(lora.targets),
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
    with quiet_transformers():
        return get_peft_model(hf, config)
