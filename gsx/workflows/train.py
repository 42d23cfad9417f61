"""`gsx train`: train gates and exits by a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gsx_exporter import training
from gsx_exporter.defaults import SNAPSHOT_STEPS
from gsx_exporter.training import StepReport, TrainConfig, TrainResult
from gsx_plugins.progress import OnProgress, silent


def train(
    output: str | Path,
    *,
    config: TrainConfig | str | Path | None = None,
    model: str | Path | None = None,
    text: str | Path | None = None,
    work: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    snapshot_every: int = SNAPSHOT_STEPS,
    on_step: Callable[[StepReport], None] | None = None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Train gates (GateSkip) and early exits (LayerSkip), and write the model as a checkpoint.

    Args:
        output: the checkpoint's directory; it appears at the end of the run, whole or not at all.
        config: the recipe, or a JSON file with it (docs/checkpoints.md); None for `gsx.TrainConfig()`.
        model: a checkpoint to start from, a directory or a hub id; None for a new model of the recipe's shape.
        text: a directory of text files; None for the standard library of the running Python.
        work: where snapshots are kept; it stays after the run. None for `output` with `-work` added to its name.
        resume: continue from the newest snapshot in `work`.
        overwrite: replace a checkpoint that is already at `output`.
        snapshot_every: optimizer steps between snapshots.
        on_step: called after every step.
        on_progress: called before each longer piece of work before the first step.
    Returns: the checkpoint's directory, steps, tokens and seconds.
    Raises:
        GsxError: the recipe, the model, the text or a snapshot cannot be used, or the run diverged.
    Example:
        >>> recipe = gsx.TrainConfig(steps=10, warmup_steps=1, decay_steps=2, budget_steps=5, sequence_length=64)
        >>> result = gsx.train("out/trained", config=recipe, model="my-dense-model", text="my-texts")
        >>> result.steps
        10
    """
    if not isinstance(config, TrainConfig):
        config = TrainConfig() if config is None else TrainConfig.from_json(Path(config))
    output = Path(output)
    return training.train(
        config,
        output,
        work=output.parent / f"{output.name}-work" if work is None else Path(work),
        model=model,
        text=None if text is None else Path(text),
        resume=resume,
        overwrite=overwrite,
        snapshot_every=snapshot_every,
        on_step=on_step,
        on_progress=on_progress,
    )
