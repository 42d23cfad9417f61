"""Training a gated checkpoint, from scratch or from a dense model, with GateSkip's and LayerSkip's recipes.

`train` is the whole run: it reads text, trains, writes snapshots to continue from, and writes an ordinary Hugging Face
checkpoint at the end. The working directory of a run has

    base/                config.json and tokenizer of the result
    tokens.npy           the training text as one row of token ids
    step-00000500/ ...   snapshots
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.generation import read_text_ends
from gsx_exporter.checkpoint.json_file import read_json
from gsx_exporter.checkpoint.names import CONFIG, GENERATION_CONFIG, WEIGHTS
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tensors import is_gate
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.config import ModelConfig
from gsx_exporter.defaults import SNAPSHOT_STEPS
from gsx_exporter.errors import CheckpointError, TextError
from gsx_exporter.training.config import TrainConfig
from gsx_exporter.training.corpus import read_corpus, split
from gsx_exporter.training.model import GatedModel
from gsx_exporter.training.schedule import batch, budget, exit_of_step, learning_rate_factor, live_sequences
from gsx_exporter.training.snapshot import Snapshot, read_snapshot, snapshots, write_snapshot
from gsx_exporter.training.tokenizer import (
    END_OF_TEXT_ID,
    encode_documents,
    train_tokenizer,
    write_tokenizer,
)
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.files import writing_folder
from gsx_plugins.progress import OnProgress, Progress, silent

_BASE, _TOKENS = "base", "tokens.npy"
# Attention logits grow slowly: checking one sequence every few steps is enough to bound them.
_CLIP_EVERY = 10


@dataclass(frozen=True)
class StepReport:
    """One finished step.

    Args:
        step, steps: steps done since the beginning of the run, and steps in total.
        cross_entropy: at the last layer, in nats per token.
        exit_depth: depth of this step's early-exit loss; None without exits.
        exit_cross_entropy: at that exit, in nats per token; None without exits.
        gate_square: mean of g^2 over all gates.
        budget: that the step trained at.
        learning_rate: of the step.
        tokens: trained on in this step.
        seconds: time that the step took.
    """

    step: int
    steps: int
    cross_entropy: float
    exit_depth: int | None
    exit_cross_entropy: float | None
    gate_square: float
    budget: float
    learning_rate: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        directory: the checkpoint.
        steps: optimizer steps of the whole run.
        tokens: tokens that they trained on.
        resumed_at: the step at which this call resumed the run; 0 for a new run.
        seconds: wall time of this call.
    """

    directory: Path
    steps: int
    tokens: int
    resumed_at: int
    seconds: float


def train(
    config: TrainConfig,
    out: Path,
    *,
    work: Path,
    model: str | Path | None = None,
    text: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    snapshot_every: int = SNAPSHOT_STEPS,
    on_step: Callable[[StepReport], None] | None = None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Train a gated model and write it as a checkpoint.

    Args:
        config: the recipe.
        out: the checkpoint's directory; written at the end of the run, completely or not at all.
        work: the directory for snapshots; it is not removed after the run.
        model: a checkpoint to start from (its tokenizer is kept); None for a new model with the shape config.model.
        text: a directory of text files; None for the standard library of the running Python.
        resume: continue from the newest snapshot in work. The configuration may differ from the original one in what
            has not happened yet, e.g. in steps.
        overwrite: replace the contents of out.
        snapshot_every: steps between snapshots.
        on_step: called after every step.
        on_progress: called before each stage of the preparation.
    Returns: what was done.
    Raises:
        UsageError: out or work is not empty, or the configuration does not fit the snapshot or the model.
        CheckpointError, TextError: model, snapshot or text cannot be used.
        GsxError: a gradient is not finite.
        KeyboardInterrupt: Ctrl-C, after the current step is finished and a snapshot is written.
    """
    started = time.monotonic()
    _check_free(out, overwrite=overwrite, option="overwrite=True (--overwrite)")
    snapshot = _newest(work, config) if resume else None
    if snapshot is None:
        _check_free(work, overwrite=False, option="resume=True (--resume)")
        _prepare(config, work, model=model, text=text, on_progress=on_progress)
    tokens = np.load(work / _TOKENS)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    if snapshot is not None and snapshot.text_sha256 != digest:
        raise CheckpointError(
            f"{work / _TOKENS}: is not the text that the run was started with",
            expected=f"sha256 {snapshot.text_sha256[:12]}…",
            found=f"{digest[:12]}…",
            todo="start a new run in an empty directory",
        )
    gated = _build(config, work, source=open_checkpoint(model) if model is not None and not snapshot else None)
    optimizers = _optimizers(gated, config)
    first = 0
    if snapshot is not None:
        first = snapshot.step
        _restore(gated, optimizers, snapshot)

    def save(step: int) -> None:
        write_snapshot(
            work, step=step, config=config, weights=gated.tensors(), optimizers=optimizers, text_sha256=digest
        )

    with _interrupt_after_step() as interrupted:
        for step in range(first, config.steps):
            report = _one_step(gated, optimizers, config, tokens, step)
            if on_step is not None:
                on_step(report)
            done = step + 1
            if done % snapshot_every == 0 or done == config.steps or interrupted.is_set():
                save(done)
            if interrupted.is_set() and done < config.steps:
                raise KeyboardInterrupt
    _write_checkpoint(work / _BASE, gated.tensors(), out, dtype=config.save_dtype)
    per_step = config.batch_size * config.sequence_length
    return TrainResult(out, config.steps, config.steps * per_step, first, time.monotonic() - started)


def export_snapshot(work: Path, out: Path, *, overwrite: bool = False) -> int:
    """Write the newest snapshot of a run, in progress or not, as a checkpoint. Returns: its step.

    Raises:
        UsageError: work has no snapshot, or out is not empty.
    """
    _check_free(out, overwrite=overwrite, option="overwrite=True")
    found = snapshots(work)
    if not found:
        raise UsageError(f"{work}: has no snapshot of a training run")
    snapshot = read_snapshot(found[-1])
    _write_checkpoint(work / _BASE, snapshot.weights, out, dtype=snapshot.config.save_dtype)
    return snapshot.step


def _one_step(
    gated: GatedModel,
    optimizers: list[torch.optim.Optimizer],
    config: TrainConfig,
    tokens: np.ndarray,
    step: int,
) -> StepReport:
    began = time.monotonic()
    share = budget(config, step)
    depth = exit_of_step(config, step)
    ids = batch(config, tokens, step)
    live = live_sequences(config, gated.config.num_layers, step)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.bf16):
        losses = gated.losses(ids, train=config, budget=share, exit_depth=depth, live=live)
    losses.total.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(gated.parameters(), config.clip_norm)
    if not bool(torch.isfinite(norm)):
        raise GsxError(
            f"training: step {step + 1} has a gradient that is not finite",
            found=f"cross-entropy {float(losses.cross_entropy):.3f}",
            todo="lower learning_rate, or resume from the last snapshot with a longer warm-up",
        )
    rate = config.learning_rate * learning_rate_factor(config, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    if config.qk_clip and (step + 1) % _CLIP_EVERY == 0:
        gated.clip_attention(ids[:1, :-1], config.qk_clip)
    return StepReport(
        step=step + 1,
        steps=config.steps,
        cross_entropy=float(losses.cross_entropy),
        exit_depth=depth,
        exit_cross_entropy=None if losses.exit_cross_entropy is None else float(losses.exit_cross_entropy),
        gate_square=float(losses.gate_square),
        budget=share,
        learning_rate=rate,
        tokens=config.batch_size * config.sequence_length,
        seconds=time.monotonic() - began,
    )


def _prepare(
    config: TrainConfig,
    work: Path,
    *,
    model: str | Path | None,
    text: Path | None,
    on_progress: OnProgress,
) -> None:
    """Create the working directory. After this, the run no longer needs the text."""
    work = work.absolute()
    work.parent.mkdir(parents=True, exist_ok=True)
    with writing_folder(work) as made:
        (made / _BASE).mkdir()
        tokens = _write_base(config, made / _BASE, model=model, text=text, on_progress=on_progress)
        np.save(made / _TOKENS, tokens)


def _write_base(
    config: TrainConfig,
    base: Path,
    *,
    model: str | Path | None,
    text: Path | None,
    on_progress: OnProgress,
) -> np.ndarray:
    """Write the result's configuration and tokenizer. Returns: the training text, token ids [N] int32."""
    on_progress(Progress("reading the text"))
    documents = split(read_corpus(text))["train"]
    if model is None:
        hf = _new_config(config)
        on_progress(Progress("training the tokenizer"))
        tokenizer = train_tokenizer(documents, vocab_size=config.model.vocab_size)
        write_tokenizer(tokenizer, base, max_positions=config.model.max_positions)
        generation = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_OF_TEXT_ID)
        (base / GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
        end_of_text: int | None = END_OF_TEXT_ID
        gate = config.gate
    else:
        checkpoint = open_checkpoint(model)
        if not checkpoint.config.is_plain:
            raise UsageError(
                "gsx train does not train models of this family",
                expected="a model built like Llama: norms only before the branches, one kind of RoPE in every layer, "
                "no factors, no experts",
                found=f"{checkpoint.config.family}, {checkpoint.source}",
                todo="train the gates with the method's own code; gsx convert takes them over",
            )
        hf = checkpoint.hf_config
        checkpoint.copy_companions(base)
        if not (base / GENERATION_CONFIG).is_file():
            # Then config.json decides; the family's defaults, which are not in the file, must not be written into it.
            hf.eos_token_id, hf.bos_token_id = list(checkpoint.config.eos_ids) or None, checkpoint.config.bos_id
        tokenizer = load_tokenizer(checkpoint)
        end_of_text = next(iter(checkpoint.config.eos_ids), None)
        gate = checkpoint.config.gate or config.gate
    depths = [depth for depth in config.exits if depth >= hf.num_hidden_layers]
    if depths:
        raise UsageError(
            "training configuration: exits names a depth that is not below the last layer",
            expected=f"1 to {hf.num_hidden_layers - 1}",
            found=str(depths[0]),
        )
    hf.gsx = {"method": "gateskip", "gate": gate.to_dict(), "exits": list(config.exits)}
    hf.dtype = config.save_dtype
    hf.save_pretrained(base)
    on_progress(Progress("encoding the text"))
    tokens = encode_documents(tokenizer, documents, end_of_text=end_of_text)
    if len(tokens) < 2 * config.sequence_length + 1:
        raise TextError(
            "the training text is too short",
            expected=f"more than {2 * config.sequence_length} tokens",
            found=f"{len(tokens)} tokens in {len(documents)} files",
            todo="give more text, or a smaller sequence_length",
        )
    return tokens


def _new_config(config: TrainConfig) -> Any:
    shape = config.model
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


def _build(config: TrainConfig, work: Path, *, source: Checkpoint | None) -> GatedModel:
    """The model before its first step; the weights of a snapshot are loaded later."""
    hf_config = AutoConfig.from_pretrained(work / _BASE)
    plain = ModelConfig.from_hf(hf_config)
    model_config = read_text_ends(work / _BASE, read_json(work / _BASE / CONFIG), plain).of(plain)
    torch.manual_seed(config.seed)
    hf = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="sdpa")
    # End-of-text may also be the padding token; its embedding must be trained like any other.
    hf.model.embed_tokens.padding_idx = None
    gated = GatedModel(hf, model_config, compile_layers=config.compile)
    gated.reset_gates(bias=config.gate_bias, std=config.gate_std, generator=torch.Generator().manual_seed(config.seed))
    if source is not None:
        has_gates = source.config.gate is not None
        _load(gated, {n: source.tensor(n) for n in gated.tensors() if has_gates or not is_gate(n)})
    gated.train()
    return gated


def _load(gated: GatedModel, weights: dict[str, torch.Tensor]) -> None:
    parameters = gated.tensors()
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def _optimizers(gated: GatedModel, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers. Weight decay applies only to the branches' matrices, not to embeddings, norms, biases, gates."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in gated.tensors().items():
        is_matrix = parameter.ndim == 2 and ".layers." in name and not is_gate(name)
        (matrices if is_matrix else others).append(parameter)
    rate = config.learning_rate
    rest = {"params": others, "weight_decay": 0.0}
    if config.optimizer == "muon":
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW([rest], lr=rate, betas=config.betas)]
    decayed = {"params": matrices, "weight_decay": config.weight_decay}
    return [torch.optim.AdamW([decayed, rest], lr=rate, betas=config.betas)]


def _restore(gated: GatedModel, optimizers: list[torch.optim.Optimizer], snapshot: Snapshot) -> None:
    if set(snapshot.weights) != set(gated.tensors()) or len(snapshot.optimizers) != len(optimizers):
        raise CheckpointError("training: the snapshot does not fit the model", todo="start a new run")
    _load(gated, snapshot.weights)
    for optimizer, state in zip(optimizers, snapshot.optimizers, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _newest(work: Path, config: TrainConfig) -> Snapshot:
    """The snapshot to continue from, after checking that its steps so far are the same under config."""
    found = snapshots(work)
    if not found:
        raise UsageError(
            f"{work}: has no snapshot to resume from",
            todo="start the run without resume, in an empty directory",
        )
    snapshot = read_snapshot(found[-1])
    before, now = snapshot.config, config
    same = replace(before, steps=now.steps, decay_steps=now.decay_steps, save_dtype=now.save_dtype) == now
    if not same or any(
        learning_rate_factor(before, step) != learning_rate_factor(now, step) for step in range(snapshot.step)
    ):
        raise UsageError(
            f"{found[-1].name}: the run was started with another configuration",
            expected="the same configuration; only steps, decay_steps and save_dtype may change",
            todo="give the original configuration, or start a new run in an empty directory",
        )
    return snapshot


def _check_free(directory: Path, *, overwrite: bool, option: str) -> None:
    if directory.is_file():
        raise UsageError(f"{directory}: is a file", expected="a directory")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UsageError(
            f"{directory}: exists and is not empty",
            todo=f"give another directory, or {option} to use this one",
        )


def _write_checkpoint(base: Path, weights: dict[str, torch.Tensor], out: Path, *, dtype: str) -> None:
    """Write the checkpoint, completely or not at all."""
    target = getattr(torch, dtype)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with writing_folder(out) as made:
        shutil.copytree(base, made, dirs_exist_ok=True)
        tensors = {name: p.detach().to(target).contiguous() for name, p in weights.items()}
        save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})


@contextlib.contextmanager
def _interrupt_after_step() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the current step is finished and saved; a second Ctrl-C stops immediately."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def on_signal(_signal: int, _frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
