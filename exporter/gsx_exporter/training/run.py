"""A training run from settings to result, on transformers' Trainer.

The working directory of a run has `settings.yaml`, and the Trainer's checkpoints, `checkpoint-500/`: of the weights
only those that are trained. A run that was stopped, by Ctrl-C, a full disk, a gradient that is not finite or a killed
worker, goes on from the newest complete one. Started by `torchrun` or `accelerate launch`, the same call runs in each
process.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback

from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.json_file import one_line
from gsx_exporter.checkpoint.names import CONFIG
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.quiet import quiet_transformers
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.errors import CheckpointError
from gsx_exporter.training.arguments import SETTINGS_FILE, arguments_of, check_free, newest_checkpoint, step_of
from gsx_exporter.training.branch_costs import keep_weights, kept_weights, measured_weights
from gsx_exporter.training.card import SAMPLE_TOKENS, CardFacts, Sample, write_card
from gsx_exporter.training.data import Rows, collate, read_rows
from gsx_exporter.training.fresh import write_base
from gsx_exporter.training.model import Subject, check_trainable, load_subject, new_subject
from gsx_exporter.training.result import HISTORY, SETTINGS, base_name, history_json, write_adapter, write_checkpoint
from gsx_exporter.training.settings import TrainSettings
from gsx_exporter.training.trainer import DivergedError, GateTrainer, Steps, stopping
from gsx_exporter.training.warm_start import TOKENS, predict_changes
from gsx_plugins.errors import GsxError, UsageError
from gsx_plugins.files import check_room, disk_error, writing_folder
from gsx_plugins.progress import OnProgress, Progress, silent

_BASE, _DATA = "base", "data.sha256"
_COST_TOKENS = 512  # that the costs of branches are measured on


@dataclass(frozen=True)
class TrainFacts:
    """What is known of a run before its first step.

    Args:
        parameters, trained: of the model, and those that are trained.
        rows, tokens, predicted: of the training text; None where it is streamed. Predicted tokens are those learnt.
        held_out: rows that are held out.
        steps: optimizer steps.
        step_tokens: tokens of one step, over all processes.
        memory_bytes: weights, gradients and optimizer of one process, without activations.
        seconds: about how long the run takes here, from one trial step; None if none was tried.
    """

    parameters: int
    trained: int
    rows: int | None
    tokens: int | None
    predicted: int | None
    held_out: int
    steps: int
    step_tokens: int
    memory_bytes: int
    seconds: float | None


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Args:
        directory: the result: an adapter's directory or a checkpoint.
        facts: of the run.
        steps: of the whole run.
        resumed_at: the step at which this call resumed it; 0 for a new run.
        seconds: wall time of this call.
        metrics: of the evaluation after the last step.
    """

    directory: Path
    facts: TrainFacts
    steps: int
    resumed_at: int
    seconds: float
    metrics: dict[str, float]


def train(
    settings: TrainSettings,
    out: Path,
    *,
    work: Path,
    resume: bool = False,
    finish: bool = False,
    overwrite: bool = False,
    command: str = "",
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Train gates and exits, and write the result.

    Args:
        settings: of the run.
        out: the result's directory; written at the end of the run, completely or not at all.
        work: the directory for checkpoints; it is not removed after the run.
        resume: continue from the newest checkpoint in `work`.
        finish: write what was learnt until the newest checkpoint, without further steps; the run may go on afterwards.
        overwrite: replace the contents of out.
        command: what the card names as the command.
        on_progress: called before each stage, and after every step.
    Raises:
        UsageError: the settings do not fit the model, the text or the run in `work`; out or work is not empty.
        CheckpointError, TextError: model, checkpoint or text cannot be used.
        GsxError: a gradient is not finite, or the disk is full; what was learnt until then is in `work`.
        KeyboardInterrupt: Ctrl-C, after the step is finished and a checkpoint is written.
    """
    began = time.monotonic()
    run = _Run(settings, work, on_progress)
    check_free(out, overwrite=overwrite, todo="or overwrite=True (--overwrite) to replace it")
    newest = newest_checkpoint(work, settings) if resume or finish else None
    if newest is None:
        check_free(work, overwrite=False, todo="or resume=True (--resume) to continue the run in it")
    run.prepare()
    stop = threading.Event()
    steps = Steps(run.learner, on_progress, stop)
    trainer = run.trainer(steps)
    with run.first_process_alone():
        if trainer.args.should_save:
            run.keep_settings(resumed=newest is not None)
    resumed_at = step_of(newest)
    if finish and newest is not None:
        trainer.take(newest)
    else:
        with stopping(stop), _saving_what_was_learnt(trainer, work):
            trainer.train(resume_from_checkpoint=str(newest) if newest is not None else None)
    if steps.stopped:
        raise KeyboardInterrupt
    on_progress(Progress("evaluating"))
    metrics = trainer.evaluate()
    on_progress(Progress("writing the result"))
    weights, sample = trainer.weights(), run.sample(trainer)  # every process has a part of them
    if trainer.args.should_save:
        run.write(out, trainer, weights, sample, command)
    trainer.accelerator.wait_for_everyone()
    return TrainResult(
        out, run.facts(trainer), trainer.state.global_step, resumed_at, time.monotonic() - began, metrics
    )


def plan_training(settings: TrainSettings, *, on_progress: OnProgress = silent) -> TrainFacts:
    """What a run would do: everything is read and built, and one step is tried; nothing is written.

    Raises: see `train`.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        run = _Run(settings, Path(place) / "work", on_progress)
        run.prepare()
        trainer = run.trainer(Steps(run.learner, silent, threading.Event()))
        on_progress(Progress("trying a step"))
        return run.facts(trainer, tried=_trial_seconds(trainer))


class _Run:
    """What a run is made of. Args: see `train`."""

    def __init__(self, settings: TrainSettings, work: Path, on_progress: OnProgress) -> None:
        self.settings, self.work, self.on_progress = settings, work, on_progress
        self.arguments = arguments_of(settings, work)
        self.checkpoint: Checkpoint | None = None
        self.subject: Subject
        self.rows: Rows
        self.learner: Any
        self._pad = 0
        self._tokenizer: Any = None

    def prepare(self) -> None:
        """Read model and text, and check that they fit each other."""
        seed = self.arguments.seed
        self.on_progress(Progress("reading the model"))
        if self.settings.model is not None:
            self.checkpoint = open_checkpoint(self.settings.model)
            check_trainable(self.checkpoint, self.settings)
            if self.settings.exits is not None:
                self.settings.exits.of(self.checkpoint.config.num_layers)
            load_tokenizer(self.checkpoint)  # with its checks
            tokenizer = _tokenizer(self.checkpoint.tokenizer_directory)
            positions = self.checkpoint.config.max_positions
            vocabulary = self.checkpoint.config.vocab_size
            end: int | None = next(iter(self.checkpoint.config.eos_ids), None)
        else:
            assert self.settings.new is not None
            with self.first_process_alone():
                if not (self.work / _BASE / CONFIG).is_file():
                    self.work.mkdir(parents=True, exist_ok=True)
                    write_base(self.settings, self.work / _BASE, self.on_progress)
            tokenizer = _tokenizer(self.work / _BASE)
            positions, vocabulary = self.settings.new.max_positions, self.settings.new.vocab_size
            end = tokenizer.eos_token_id
        data = self.settings.data
        if data.length > positions:
            raise UsageError(
                "training: rows are longer than the model's texts",
                expected=f"data.length of at most {positions}",
                found=str(data.length),
            )
        self.on_progress(Progress("reading the text"))
        with self.first_process_alone():  # the others find its work in the cache of `datasets`
            self.rows = read_rows(
                data, tokenizer, end_of_text=end, seed=seed, held_out_rows=self.settings.evaluation.rows
            )
        self._pad, self._tokenizer = end or 0, tokenizer
        if len(tokenizer) > vocabulary and self._highest() >= vocabulary:
            raise CheckpointError(
                f"{self.settings.model}: the tokenizer does not fit the model",
                expected=f"token ids below {vocabulary}",
                found=str(self._highest()),
            )
        self.on_progress(Progress("loading the model"))
        if self.checkpoint is not None:
            self.subject = load_subject(self.checkpoint, self.settings, seed=seed)
        else:
            assert self.settings.new is not None
            self.subject = new_subject(self.settings.new, self.settings, seed=seed)
        self._warm_start()
        self.learner = self.subject.learner(self.settings, steps=self._steps(), seed=seed)
        self._weigh()

    def _warm_start(self) -> None:
        """Let new gates begin with a guess, if they are to."""
        gate, config = self.settings.gate, self.subject.config
        known = self.checkpoint is not None and self.checkpoint.config.gate is not None
        if gate is None or gate.start != "change" or known:
            return
        self.on_progress(Progress("fitting the gates"))
        predict_changes(self.subject.hf, config, self._first_rows(TOKENS), bias=gate.bias)

    def _weigh(self) -> None:
        """Measure how much of the skipping each gate should take, if it is to be."""
        gate, config = self.settings.gate, self.subject.config
        if gate is None or gate.weights != "measured" or config.gate is None or config.gate.skip_weights is not None:
            return
        with self.first_process_alone():  # the others read what it found
            weights = kept_weights(self.work)
            if weights is None:
                self.learner.to(self.arguments.device)
                narrow = torch.bfloat16 if self.arguments.bf16 else None
                autocast = partial(torch.autocast, self.arguments.device.type, dtype=narrow, enabled=narrow is not None)
                ids = self._first_rows(_COST_TOKENS).to(self.arguments.device)
                weights = measured_weights(self.learner, ids, autocast, self.on_progress)
                keep_weights(self.work, weights)
        self.learner.weigh(weights)
        weighted = replace(config, gate=replace(config.gate, skip_weights=weights))
        self.subject = replace(self.subject, config=weighted)

    def _first_rows(self, tokens: int) -> torch.Tensor:
        """[B, S] int64, whole rows of the text with about so many tokens."""
        length = self.settings.data.length
        rows = [row["input_ids"] for row in self.rows.train.take(8 * tokens // length + 8)]
        return torch.tensor(
            [row for row in rows if len(row) == length][: max(1, tokens // length)] or [max(rows, key=len)]
        )

    def trainer(self, steps: Steps) -> GateTrainer:
        """The Trainer of the run."""
        held_out = self.rows.held_out
        held_out = held_out.select(range(min(len(held_out), self.settings.evaluation.rows)))
        with quiet_transformers():
            trainer = GateTrainer(
                self.learner,
                evaluation=self.settings.evaluation,
                gate_rate=self.settings.gate.rate if self.settings.gate else 1.0,
                muon=self.settings.muon,
                args=self.arguments,
                data_collator=partial(collate, pad=self._pad),
                train_dataset=self.rows.train,
                eval_dataset=held_out,
                callbacks=[steps],
            )
        trainer.remove_callback(PrinterCallback)
        steps.trainer = trainer
        return trainer

    def facts(self, trainer: GateTrainer, tried: float | None = None) -> TrainFacts:
        """See `TrainFacts`. Args: tried: seconds of one step."""
        parameters = {p.data_ptr(): p for p in self.learner.parameters()}.values()
        trained = [p for p in parameters if p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in parameters)
        args = trainer.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        steps = self._steps()
        return TrainFacts(
            parameters=sum(p.numel() for p in parameters),
            trained=sum(p.numel() for p in trained),
            rows=self.rows.count,
            tokens=self.rows.tokens,
            predicted=self.rows.predicted,
            held_out=len(self.rows.held_out),
            steps=steps,
            step_tokens=batch * self.settings.data.length,
            # A gradient and two moments for each trained parameter, in float32.
            memory_bytes=weights + 3 * 4 * sum(p.numel() for p in trained),
            seconds=None if tried is None else tried * steps,
        )

    def keep_settings(self, *, resumed: bool) -> None:
        """Write the settings into the working directory, or compare the text with that of the run."""
        path, digest = self.work / _DATA, self._data_digest()
        if resumed:
            known = path.read_text(encoding="utf-8").strip() if path.is_file() else digest
            if known != digest:
                raise UsageError(
                    f"{self.work}: the run was started with another text",
                    expected=f"rows with sha256 {known[:12]}...",
                    found=f"{digest[:12]}...",
                    todo="give the same data, or start a new run in an empty directory",
                )
            return
        self.work.mkdir(parents=True, exist_ok=True)
        trained = sum(p.numel() for p in self.learner.parameters() if p.requires_grad)
        kept = (self.arguments.save_total_limit or 1) + 1
        check_room(self.work, 3 * 4 * trained * kept, todo="free some space, or give another place with --work")
        (self.work / SETTINGS_FILE).write_text(self.settings.to_yaml(), encoding="utf-8")
        path.write_text(digest + "\n", encoding="utf-8")

    def write(
        self, out: Path, trainer: GateTrainer, weights: Mapping[str, Tensor], sample: Sample | None, command: str
    ) -> None:
        """Write the result with its card."""
        out = out.absolute()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with writing_folder(out) as folder:
                if self.settings.mode == "full":
                    base = self.work / _BASE
                    if self.checkpoint is not None:
                        shutil.rmtree(base, ignore_errors=True)
                        base.mkdir()
                        self.checkpoint.copy_companions(base)
                    write_checkpoint(self.subject, weights, base, self.settings, folder)
                else:
                    assert self.checkpoint is not None
                    dtype = getattr(torch, self.settings.save_dtype)
                    base_sha256 = self.checkpoint.weights_sha256()
                    write_adapter(self.subject, weights, self.checkpoint, base_sha256, dtype, folder)
                (folder / SETTINGS).write_text(self.settings.to_yaml(), encoding="utf-8")
                (folder / HISTORY).write_text(history_json(trainer.state.log_history), encoding="utf-8")
                write_card(folder, self.settings, self.subject.config, self._card(trainer, sample, command))
        except OSError as error:
            raise disk_error(out, error) from error

    def _card(self, trainer: GateTrainer, sample: Sample | None, command: str) -> CardFacts:
        facts, log = self.facts(trainer), trainer.state.log_history
        base, revision = base_name(self.checkpoint) if self.checkpoint is not None else ("a new model", None)
        return CardFacts(
            base=Path(base).name if Path(base).is_dir() else base,
            revision=revision,
            data=f"{Path(self.rows.source).name}, {self.rows.column}"
            if self.settings.data.source
            else self.rows.source,
            command=command,
            trained=facts.trained,
            parameters=facts.parameters,
            steps=trainer.state.global_step,
            tokens=trainer.state.global_step * facts.step_tokens,
            log=log,
            metrics=next(one for one in reversed(log) if "eval_loss" in one),
            held_out=len(trainer.eval_dataset),
            length=self.settings.data.length,
            sample=sample,
        )

    def sample(self, trainer: GateTrainer) -> Sample | None:
        """The gates over the beginning of the first held-out row; None without gates."""
        if self.subject.config.gate is None:
            return None
        ids = torch.tensor(trainer.eval_dataset[0]["input_ids"][:SAMPLE_TOKENS], device=trainer.args.device)[None]
        _, call = self.learner.eval().figures(ids, ids)
        scores: dict[str, Any] = {}
        for branch in BRANCHES:
            of_branch = [score[0].cpu().numpy() for (_, name), score in sorted(call.scores.items()) if name == branch]
            if of_branch:
                scores[branch] = np.stack(of_branch)
        return Sample([self._tokenizer.decode([token]) for token in ids[0].tolist()], scores)

    @contextmanager
    def first_process_alone(self) -> Iterator[None]:
        """The first process runs the block before the others do."""
        with self.arguments.main_process_first(local=False):
            yield

    def _steps(self) -> int:
        args = self.arguments
        if args.max_steps > 0:
            return args.max_steps
        if self.rows.count is None:
            raise UsageError(
                "training: how long is a run on a stream?", expected="trainer.max_steps", todo="give --max-steps N"
            )
        batches = -(-self.rows.count // (args.per_device_train_batch_size * args.world_size))
        return max(1, -(-batches // args.gradient_accumulation_steps)) * max(1, int(args.num_train_epochs))

    def _highest(self) -> int:
        return max(max(row["input_ids"]) for row in self.rows.train.take(1000))

    def _data_digest(self) -> str:
        """Of the first rows, and how many there are."""
        digest = hashlib.sha256(str(self.rows.count).encode())
        for row in self.rows.train.take(64):
            digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
        return digest.hexdigest()


def _tokenizer(directory: Path) -> Any:
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (ValueError, OSError):  # a directory with nothing but tokenizer.json
            return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)


@contextmanager
def _saving_what_was_learnt(trainer: GateTrainer, work: Path) -> Iterator[None]:
    try:
        yield
    except DivergedError as error:
        trainer.save_now()
        raise DivergedError(error.what, expected=error.expected, found=error.found, todo=error.todo) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise disk_error(work, error, todo="free some space and --resume, or give another place with --work") from error
    except torch.OutOfMemoryError as error:
        raise GsxError(
            "training: out of memory",
            found=one_line(error),
            todo="set trainer.gradient_checkpointing=true, or a smaller trainer.per_device_train_batch_size",
        ) from error


def _trial_seconds(trainer: GateTrainer) -> float:
    """Seconds of one step's passes, after one to warm up; the optimizer's own time is small beside it."""
    learner = trainer.learner
    learner.begin(0)
    batch = next(iter(trainer.get_train_dataloader()))
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with trainer.accelerator.autocast():
            loss = learner(**batch)["loss"]
        loss.backward()
        seconds = time.perf_counter() - began
    return seconds * trainer.args.gradient_accumulation_steps
