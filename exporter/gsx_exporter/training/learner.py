"""The module that is trained: a Hugging Face model with gates and exits, whose forward pass gives the method's loss.

The loss of a batch is a sum over the batch's predicted tokens, divided by the number of such tokens in the whole step,
over all processes and accumulated batches. So neither changes what is learned.

    (1 - d) * (w_L CE_L + sum of w_e L_e) + d * T^2 KL(dense model || this model) + lambda * mean of g^2

L_e is an exit's cross-entropy against the text, or against what the last layer predicts. Weights: `Schedule`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gsx_engines.bundle.words import Branch
from gsx_exporter.config import ModelConfig
from gsx_exporter.errors import CheckpointError
from gsx_exporter.training.gated import Call, Hooks
from gsx_exporter.training.schedule import Plan, Schedule
from gsx_exporter.training.settings import DistillSettings

IGNORED = -100  # the label of a token that no loss reads, as transformers has it


@dataclass(frozen=True)
class Figures:
    """What a pass over some rows showed, [B] each unless said; sums over the predicted tokens of a row.

    Args:
        tokens: predicted tokens.
        nats: loss of the whole model.
        exit_nats, exit_agrees: depth -> loss of the exit; how often its first choice is the whole model's.
    """

    tokens: torch.Tensor
    nats: torch.Tensor
    exit_nats: dict[int, torch.Tensor]
    exit_agrees: dict[int, torch.Tensor]


class Learner(nn.Module):
    """A model and the loss of its method.

    Args:
        hf: transformers' model, with its gates and, in mode "lora", with adapters in its layers.
        config: the model's; its `gate` says which gates there are.
        schedule: the run's plans; None to evaluate only.
        sparsity: lambda.
        exit_target: see `ExitSettings.target`.
        distill: learning from the dense model.
        adapted: PEFT's model around hf, whose adapters can be switched off; None without adapters.
        teacher: the dense model, where hf itself cannot become it; it is not trained.
    """

    accepts_loss_kwargs = True  # the Trainer then gives the number of tokens of the whole step

    def __init__(
        self,
        hf: Any,
        config: ModelConfig,
        *,
        schedule: Schedule | None = None,
        sparsity: float = 0.0,
        exit_target: str = "text",
        distill: DistillSettings | None = None,
        adapted: Any = None,
        teacher: Any = None,
    ) -> None:
        super().__init__()
        self.hf = hf
        self.gsx_config = config
        self.schedule, self.sparsity = schedule, sparsity
        self.exit_target, self.distill = exit_target, distill
        # In tuples, so that they are no submodules: one is around hf, the other is not trained.
        self._adapted, self._teacher = (adapted,), (teacher,)
        self._hooks = Hooks(hf, config)
        self._plan: Plan | None = None
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}
        self._no_split_modules = getattr(hf, "_no_split_modules", None)  # how FSDP divides it
        self.register_state_dict_post_hook(_only_trained)  # type: ignore[no-untyped-call]

    def weigh(self, skip_weights: Sequence[Sequence[float]]) -> None:
        """Say how much of the skipping each gate takes (`GateConfig.skip_weights`)."""
        self._hooks.weigh(skip_weights)

    def begin(self, step: int) -> None:
        """Say which step the next training passes belong to."""
        assert self.schedule is not None
        self._plan = self.schedule.plan(step)

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        row: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> dict[str, torch.Tensor]:
        """The loss of a batch in a training step.

        Args:
            input_ids, labels: [B, S] int64; a label is the token of its own place, or -100 for one that is not
            predicted.
            attention_mask: [B, S], 0 for padding, on the right; None without padding.
            row: [B] int64, numbers of the rows in the text.
            num_items_in_batch: predicted tokens of the whole step; None for those of the batch.
        """
        assert self._plan is not None, "a training pass belongs to a step: begin(step)"
        assert self.schedule is not None
        plan = self._plan
        rows = torch.arange(len(input_ids), device=input_ids.device) if row is None else row
        call = self._call(input_ids, attention_mask, plan.budget)
        call.live, call.depths = self.schedule.live(plan, rows), frozenset(plan.exits)
        call.straight_through = plan.straight_through
        where, targets = _predicted(labels)
        counts = where.sum(1)
        items = counts.sum() if num_items_in_batch is None else num_items_in_batch
        wanted = self._dense(input_ids, attention_mask, where) if self.distill is not None else None
        normed = self._run(input_ids, attention_mask, call)
        logits = self.logits(normed[:, :-1][where])
        predicted = logits.log_softmax(-1)  # once: over a vocabulary it costs as much as a layer
        whole = nn.functional.nll_loss(predicted, targets, reduction="sum") / items
        loss = plan.whole * whole
        self._note("cross_entropy", whole.detach() * items, counts)
        for depth, weight in plan.exits.items():
            at_exit = self.logits(self.norm(call.states[depth][:, :-1][where]))
            if self.exit_target == "model":
                target: torch.Tensor = predicted.detach().exp()
                found = nn.functional.cross_entropy(at_exit, target, reduction="sum") / items
            else:
                found = nn.functional.cross_entropy(at_exit, targets, reduction="sum") / items
            loss = loss + weight * found
            self._note(f"exit_{depth}", found.detach() * items, counts)
        if wanted is not None and self.distill is not None:
            T, share = self.distill.temperature, self.distill.weight
            ours = predicted if T == 1.0 else (logits / T).log_softmax(-1)
            pair = ours, (wanted if T == 1.0 else wanted / T).log_softmax(-1)
            apart = nn.functional.kl_div(*pair, reduction="sum", log_target=True) / items
            loss = (1 - share) * loss + share * T * T * apart
            self._note("divergence", apart.detach() * items, counts)
        if call.squares:
            valid = (
                torch.ones_like(input_ids, dtype=torch.float32) if attention_mask is None else attention_mask.float()
            )
            each = torch.stack(list(call.squares.values())).mean(0)
            squares = (each * valid).sum(1) / valid.sum(1).clamp(min=1)  # of a row
            loss = loss + self.sparsity * (squares * counts).sum() / items
            self._note("gate_square", (squares.detach() * counts).sum(), counts)
        return {"loss": loss}

    @torch.no_grad()
    def figures(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        budget: float = 1.0,
        depths: frozenset[int] = frozenset(),
        shares: Mapping[tuple[int, Branch], float] | None = None,
    ) -> tuple[Figures, Call]:
        """How well the model predicts some rows, at a budget and at exits; and the call, with the gates' scores.

        Args: shares: what each gate keeps, in place of what the budget gives it.
        """
        call = self._call(input_ids, attention_mask, budget)
        call.shares = call.shares if shares is None else shares
        call.depths = depths
        where, targets = _predicted(labels)
        logits = self.logits(self._run(input_ids, attention_mask, call)[:, :-1][where])
        best = logits.argmax(-1)

        def by_row(values: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(where.shape, device=values.device)
            found[where] = values.float()
            return found.sum(1)

        def nats(found: torch.Tensor) -> torch.Tensor:
            return by_row(nn.functional.cross_entropy(found, targets, reduction="none"))

        exits = {depth: self.logits(self.norm(call.states[depth][:, :-1][where])) for depth in sorted(depths)}
        return Figures(
            where.sum(1),
            nats(logits),
            {depth: nats(found) for depth, found in exits.items()},
            {depth: by_row(found.argmax(-1) == best) for depth, found in exits.items()},
        ), call

    @torch.no_grad()
    def dense_nats(
        self, input_ids: torch.Tensor, labels: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> Any:
        """Sums [B] of the dense model's loss over the predicted tokens of rows; None if it is not here any more."""
        where, targets = _predicted(labels)
        logits = self._dense(input_ids, attention_mask, where)
        if logits is None:
            return None
        found = torch.zeros(where.shape, device=logits.device)
        found[where] = nn.functional.cross_entropy(logits, targets, reduction="none")
        return found.sum(1)

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        """Normed states [B, S, H] with every branch run."""
        return self._run(ids, None, self._call(ids, None, 1.0))

    def logits(self, normed: torch.Tensor, head: nn.Module | None = None) -> torch.Tensor:
        """[N, V] float32 from normed states [N, H]: the head, and what the family does after it."""
        scales = self.gsx_config.scales
        found: torch.Tensor = (head or self.hf.lm_head)(normed).float()
        if scales.logits != 1.0:
            found = found * scales.logits
        if scales.logits_cap is not None:
            found = scales.logits_cap * torch.tanh(found / scales.logits_cap)
        return found

    def norm(self, state: torch.Tensor) -> torch.Tensor:
        """The model's final norm."""
        found: torch.Tensor = self.hf.model.norm(state)
        return found

    def averages(self) -> dict[str, float]:
        """Means per predicted token since the last time, of this process."""
        found = {name: float(total) / max(1, count) for name, (total, count) in self._sums.items()}
        self._sums = {}
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What is trained; what is frozen is there already.

        Raises:
            CheckpointError: the state is of another model.
        """
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if missing := sorted(trained.intersection(found.missing_keys)):
            raise CheckpointError(
                "training: the checkpoint is of another run",
                expected=f"{len(trained)} trained tensors",
                found=f"no {missing[0]}",
                todo="remove it to go on from the one before it, or start a new run",
            )
        found.missing_keys.clear()
        return found

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """As transformers' models have it."""
        self.hf.gradient_checkpointing_enable(*args, **options)

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """As transformers' models have it, by its newer name."""
        self.hf.activation_checkpointing_enable(*args, **options)

    def _call(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, budget: float) -> Call:
        ends = torch.tensor(self.gsx_config.eos_ids, dtype=ids.dtype, device=ids.device)
        ended = torch.isin(ids, ends)
        if attention_mask is not None:
            ended = ended | (attention_mask == 0)
        return Call(self._hooks.shares(budget), ended)

    def _run(self, ids: torch.Tensor, attention_mask: torch.Tensor | None, call: Call) -> torch.Tensor:
        self._hooks.call = call
        output = self.hf.model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
        normed: torch.Tensor = output.last_hidden_state
        return normed

    def _dense(
        self, ids: torch.Tensor, attention_mask: torch.Tensor | None, where: torch.Tensor
    ) -> torch.Tensor | None:
        """What the dense model predicts, [N, V]; None if its weights are being trained, and no copy is there."""
        adapted, teacher = self._adapted[0], self._teacher[0]
        if teacher is None and any(p.requires_grad for p in self.hf.lm_head.parameters()):
            return None
        call = self._call(ids, attention_mask, 1.0)
        call.gated = False
        with torch.no_grad():
            if teacher is not None:
                run = teacher.to(ids.device).model
                normed = run(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
                return self.logits(normed[:, :-1][where], teacher.lm_head)
            with _switched_off(adapted):
                return self.logits(self._run(ids, attention_mask, call)[:, :-1][where])

    def _note(self, name: str, total: torch.Tensor, counts: torch.Tensor) -> None:
        before, count = self._sums.get(name, (torch.zeros_like(total), 0))
        self._sums[name] = before + total, count + int(counts.sum())


def gate_scores(call: Call) -> dict[tuple[int, Branch], float]:
    """The mean score of each gate over the tokens of a call that count."""
    counted = ~call.ended
    return {key: float(score[counted].mean()) for key, score in call.scores.items()}


def _predicted(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the next token is predicted, [B, S - 1] bool, and these tokens, [N]."""
    following = labels[:, 1:]
    where = following != IGNORED
    return where, following[where]


@contextmanager
def _switched_off(adapted: Any) -> Iterator[None]:
    if adapted is None:
        yield
        return
    with adapted.disable_adapter():
        yield


def _only_trained(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Keep a checkpoint of a run small: what is frozen is in the base."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    buffers = {name for name, _ in module.named_buffers()}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for key in list(state):
        name = key.removeprefix(prefix)
        if name in frozen or name in buffers or name not in trained:  # the last: a second name of a tied table
            del state[key]
