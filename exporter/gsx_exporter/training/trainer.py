"""transformers' Trainer for a `Learner`, and what it lacks: perplexity at several budgets, and clean ends of a run."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.checkpoint.tensors import is_gate
from gsx_exporter.errors import CheckpointError
from gsx_exporter.training.gated import Call
from gsx_exporter.training.learner import Learner, gate_scores
from gsx_exporter.training.muon import MuonWithAdamW, clip_attention
from gsx_exporter.training.settings import EvaluationSettings, MuonSettings
from gsx_plugins.errors import GsxError
from gsx_plugins.progress import OnProgress, Progress

# Attention logits grow slowly: checking one row every few steps is enough to bound them.
_CLIP_EVERY = 10


class DivergedError(GsxError):
    """A gradient is not finite; the weights are still those of the last step."""


class GateTrainer(Trainer):
    """A Trainer whose evaluation measures budgets and exits.

    Args:
        learner: what it trains.
        evaluation: what is measured.
        gate_rate: factor on the learning rate of the gates.
        muon: the optimizer of the branches' matrices; None for `args.optim`.
        options: of transformers' Trainer.
    """

    optimizer: Any
    control: Any

    def __init__(
        self,
        learner: Learner,
        *,
        evaluation: EvaluationSettings,
        gate_rate: float = 1.0,
        muon: MuonSettings | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model=learner, **options)
        self.learner, self.evaluation, self.gate_rate, self.muon = learner, evaluation, gate_rate, muon
        self._dense: float | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """See `Trainer`."""
        if self.optimizer is not None:
            made: torch.optim.Optimizer = self.optimizer
        elif self.muon is not None:
            made = self.optimizer = MuonWithAdamW.of(self.learner, self.args)
        else:
            made = super().create_optimizer(model)
            gates = [p for name, p in self.learner.named_parameters() if is_gate(name)]
            _apart(made, gates, self.gate_rate)
        return made

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer`: with the parts of the loss."""
        if "loss" in logs:
            logs = {**logs, **self.learner.averages()}
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Perplexity on the held-out text at every budget and exit, and the mean score of every gate.

        Returns: `eval_loss` in nats per token, `eval_perplexity`, the base's `eval_dense_perplexity` and, with gates,
            `eval_perplexity_at_{budget}`, `eval_score_{branch}_{layer}`; with exits `eval_exit_{depth}_perplexity`,
            `_agreement`. Budget 1 counts for exits and scores.
        """
        config = self.learner.gsx_config
        budgets = sorted({1.0, *(self.evaluation.budgets if config.gate is not None else ())}, reverse=True)
        depths = frozenset(depth for depth in config.exits if depth < config.num_layers)
        training = self.learner.training
        self.learner.eval()
        totals: dict[str, float] = {}
        first = self._dense is None  # the base does not change
        scores: dict[str, list[float]] = {}
        for batch in self.get_eval_dataloader(eval_dataset):
            rows = {name: value for name, value in self._prepare_inputs(batch).items() if name != "row"}
            if first and (dense := self.learner.dense_nats(**rows)) is not None:
                totals["dense"] = totals.get("dense", 0.0) + self._sum(dense)
            for budget in budgets:
                with self.compute_loss_context_manager(), self._autocast():
                    found, call = self.learner.figures(
                        **rows, budget=budget, depths=depths if budget == 1.0 else frozenset()
                    )
                sums = {"tokens": found.tokens, "nats": found.nats} if budget == 1.0 else {f"{budget:g}": found.nats}
                if budget == 1.0:
                    sums |= {f"exit_{depth}": nats for depth, nats in found.exit_nats.items()}
                    sums |= {f"agrees_{depth}": count for depth, count in found.exit_agrees.items()}
                    self._keep_scores(call, scores)
                for name, total in sums.items():
                    totals[name] = totals.get(name, 0.0) + self._sum(total)
        self.learner.train(training)
        tokens = max(1.0, totals["tokens"])
        metrics = {f"{metric_key_prefix}_loss": totals["nats"] / tokens}
        metrics[f"{metric_key_prefix}_perplexity"] = _perplexity(totals["nats"] / tokens)
        if first and "dense" in totals:
            self._dense = _perplexity(totals["dense"] / tokens)
        if self._dense is not None:
            metrics[f"{metric_key_prefix}_dense_perplexity"] = self._dense
        for budget in budgets[1:]:
            metrics[f"{metric_key_prefix}_perplexity_at_{budget:g}"] = _perplexity(totals[f"{budget:g}"] / tokens)
        for depth in sorted(depths):
            at = f"{metric_key_prefix}_exit_{depth}"
            metrics[f"{at}_perplexity"] = _perplexity(totals[f"exit_{depth}"] / tokens)
            metrics[f"{at}_agreement"] = totals[f"agrees_{depth}"] / tokens
        for name, values in scores.items():
            metrics[f"{metric_key_prefix}_score_{name}"] = sum(values) / len(values)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sum(self, values: torch.Tensor) -> float:
        """Over all processes, without the rows that are there twice to fill the last batch."""
        return float(self.accelerator.gather_for_metrics(values).double().sum())

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights by their names in transformers' model; where they are divided (FSDP), every process must ask."""
        named = self.learner.hf.named_parameters()
        return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in named}

    def take(self, checkpoint: Path) -> None:
        """Take weights and log from a checkpoint, without training on.

        Raises:
            CheckpointError: it was written by FSDP or DeepSpeed, or is damaged.
        """
        try:
            weights = load_file(checkpoint / "model.safetensors")
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{checkpoint}: cannot be read as weights",
                expected="model.safetensors, as a run without FSDP and DeepSpeed writes it",
                found=one_line(error),
                todo="finish the run with --resume",
            ) from error
        self.learner.load_state_dict(weights)

    def save_now(self) -> None:
        """Write a checkpoint of the last finished step."""
        self._save_checkpoint(self.model, trial=None)

    @staticmethod
    def _keep_scores(call: Call, scores: dict[str, list[float]]) -> None:
        for (layer, branch), score in gate_scores(call).items():
            scores.setdefault(f"{branch}_{layer}", []).append(score)

    def _autocast(self) -> Any:
        return self.accelerator.autocast()


def _apart(optimizer: torch.optim.Optimizer, gates: list[torch.nn.Parameter], rate: float) -> None:
    """Give the gates a group of their own, with their own rate and without weight decay, which would open them."""
    known = {id(gate) for gate in gates}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in known]
    first = optimizer.param_groups[0]
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    if gates:
        settings = {name: value for name, value in first.items() if name != "params"}
        optimizer.add_param_group({**settings, "params": gates, "weight_decay": 0.0, "lr": first["lr"] * rate})


def _perplexity(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # beyond, a float overflows


class Steps(TrainerCallback):
    """Tells the learner which step it is in, reports progress, and ends the run where it must end.

    Args:
        trainer: gives its state; learner: is told.
        on_progress: called after each step.
        stop: set when the run is to end after the step, in any of its processes.
    """

    def __init__(self, learner: Learner, on_progress: OnProgress, stop: threading.Event) -> None:
        self.learner, self.on_progress, self.stop = learner, on_progress, stop
        self.trainer: GateTrainer | None = None
        self.stopped = False
        self._note = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Where the weights are divided (FSDP), they are put together in these methods as in a forward pass."""
        assert self.trainer is not None
        if self.trainer.is_fsdp_enabled:
            for name in ("figures", "dense_nats", "run"):
                register_fsdp_forward_method(self.learner, name)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The step's plan."""
        self.learner.begin(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop before a gradient that is not finite reaches the weights."""
        assert self.trainer is not None
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        good = torch.stack([torch.isfinite(g).all() for g in map(_local, gradients)]).all().float()
        if self.trainer.accelerator.reduce(good, reduction="sum") < self.trainer.accelerator.num_processes:
            found = self.learner.averages().get("cross_entropy", float("nan"))
            raise DivergedError(
                f"training: step {state.global_step + 1} has a gradient that is not finite",
                found=f"cross-entropy {found:.3f} nats per token",
                todo="the weights before it are saved: lower trainer.learning_rate, or lengthen trainer.warmup_steps",
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Bound the attention's logits, report, and end if somebody asked for it."""
        assert self.trainer is not None
        muon = self.trainer.muon
        if muon is not None and muon.qk_clip and state.global_step % _CLIP_EVERY == 0:
            clip_attention(self.learner, muon.qk_clip, self._sample())
        self.on_progress(Progress("training", state.global_step, state.max_steps, self._note))
        wanted = torch.tensor(float(self.stop.is_set()), device=args.device)
        if self.trainer.accelerator.num_processes > 1:
            wanted = self.trainer.accelerator.reduce(wanted, reduction="sum")
        if wanted > 0 and state.global_step < state.max_steps:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep what the line of progress shows."""
        if not logs or "loss" not in logs:
            return
        shown = [f"loss {logs['loss']:.3f}"]
        shown += [f"{name} {logs[name]:.3f}" for name in ("cross_entropy", "gate_square") if name in logs]
        if self.learner.gsx_config.gate is not None and self.learner.schedule is not None:
            shown.append(f"budget {self.learner.schedule.lowest_budget(state.global_step):.2f}")
        self._note = ", ".join(shown)

    def _sample(self) -> torch.Tensor:
        """One row of the text, the same in every process."""
        assert self.trainer is not None
        row = next(iter(self.trainer.train_dataset))["input_ids"]
        return torch.tensor(row, device=self.trainer.args.device)[None]


def _local(gradient: torch.Tensor) -> torch.Tensor:
    """The part of a gradient that is here (FSDP)."""
    found: torch.Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return found


@contextlib.contextmanager
def stopping(event: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set the event, so that the step is finished and saved; a second one ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {}

    def on_signal(number: int, _frame: Any) -> None:
        event.set()
        for each in numbers:
            signal.signal(each, before[each])

    for number in numbers:
        before[number] = signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
