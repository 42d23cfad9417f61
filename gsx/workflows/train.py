"""`gsx train`: train gates and exits by a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, silent

if TYPE_CHECKING:
    from gsx_exporter.training.run import TrainFacts, TrainResult
    from gsx_exporter.training.settings import TrainSettings

# What `gsx[train]` adds: import name -> package.
_NEEDED = {"accelerate": "accelerate", "datasets": "datasets", "peft": "peft", "yaml": "pyyaml"}


def train(
    output: str | Path,
    *,
    recipe: TrainSettings | str | Path = "gateskip",
    changes: Mapping[str, Any] | Sequence[str] = (),
    work: str | Path | None = None,
    resume: bool = False,
    finish: bool = False,
    overwrite: bool = False,
    command: str = "",
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Train gates (GateSkip) and early exits (LayerSkip, Sorted LLaMA) on a model, and write the result.

    Started by `torchrun` or `accelerate launch`, it runs on several processes.

    Args:
        output: the result's directory: an adapter with gates, or a checkpoint in mode "full". It appears at the end of
            the run, whole or not at all.
        recipe: settings; or the name of a recipe that ships with gsx; or a YAML file (docs/training.md).
        changes: settings that differ from the recipe's: dotted name -> value, or texts such as "gate.kind=scalar".
        work: where checkpoints are kept; it stays after the run. None for `output` with `-work` added to its name.
        resume: continue from the newest checkpoint in `work`.
        finish: write what was learnt until that checkpoint, without further steps.
        overwrite: replace what is at `output`.
        command: what the card of the result names as its command.
        on_progress: called before each longer piece of work, and after every step.
    Returns: the result's directory, steps, and what the last evaluation found.
    Raises:
        GsxError: settings, model, data or a checkpoint cannot be used, or the run diverged.
    Example:
        >>> changes = {"model": "my-model", "data.source": "my-texts", "trainer.max_steps": 10, "data.length": 64}
        >>> result = gsx.train("out/trained", recipe="gateskip", changes=changes)
        >>> result.steps
        10
    """
    check_packages()
    from gsx_exporter.training.run import train as run

    output = Path(output)
    return run(
        settings(recipe, changes),
        output,
        work=output.parent / f"{output.name}-work" if work is None else Path(work),
        resume=resume,
        finish=finish,
        overwrite=overwrite,
        command=command,
        on_progress=on_progress,
    )


def plan_training(
    *,
    recipe: TrainSettings | str | Path = "gateskip",
    changes: Mapping[str, Any] | Sequence[str] = (),
    on_progress: OnProgress = silent,
) -> TrainFacts:
    """What `train` would do: parameters, tokens, memory, steps and, from one trial step, time. Nothing is written.

    Args: see `train`.
    Raises: see `train`.
    """
    check_packages()
    from gsx_exporter.training.run import plan_training as plan

    return plan(settings(recipe, changes), on_progress=on_progress)


def settings(recipe: TrainSettings | str | Path, changes: Mapping[str, Any] | Sequence[str] = ()) -> TrainSettings:
    """A recipe with changes.

    Raises:
        UsageError: no such recipe, an unknown setting, or a value that does not fit.
    """
    from gsx_exporter.training.reading import read_settings
    from gsx_exporter.training.settings import TrainSettings

    if not isinstance(recipe, TrainSettings):
        return read_settings(recipe, changes)
    if changes:
        raise UsageError("changes belong to a recipe's name or file", expected="settings without changes")
    return recipe


def recipe_file(recipe: str | Path) -> str:
    """The YAML text of a recipe, with its comments.

    Raises:
        UsageError: no such recipe or file.
    """
    from gsx_exporter.training.reading import recipe_source

    return recipe_source(recipe)[1]


def check_packages() -> None:
    """Refuse to train without the packages that training needs.

    Raises:
        UsageError: one is missing.
    """
    for module, package in _NEEDED.items():
        try:
            import_module(module)
        except ImportError as error:
            raise UsageError(f"training needs {package}", found=str(error), todo='pip install "gsx[train]"') from error
