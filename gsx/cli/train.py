"""`gsx train`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, table
from gsx.cli.options import JsonOption, OverwriteOption, grouped
from gsx.cli.signals import loading
from gsx_exporter.defaults import CLASSIFIER_TOKENS, SNAPSHOT_STEPS

if TYPE_CHECKING:
    from gsx import TrainConfig
    from gsx_exporter.training import StepReport

# Seconds between lines when stderr is not a terminal.
_PLAIN_SECONDS = 30.0


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(train))


@dataclass(frozen=True)
class RecipeOptions:
    """Changes to the recipe."""

    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps; schedules keep their proportions.", show_default="as configured"),
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.", show_default="as configured")] = None
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.", show_default="as configured")] = (
        None
    )
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.", show_default="as configured")] = (
        None
    )
    budget_end: Annotated[float | None, typer.Option(help="Budget at the end.", show_default="as configured")] = None
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.", show_default="as configured")] = None

    def over(self, config: Path | None, *, resumed: bool) -> TrainConfig:
        """The recipe from a file, or the default one, with these changes."""
        from gsx import TrainConfig

        recipe = TrainConfig() if config is None else TrainConfig.from_json(config)
        if self.steps is not None:
            if self.steps < 1:
                raise typer.BadParameter(f"{self.steps} is not a positive number", param_hint="--steps")
            recipe = recipe.with_steps(self.steps, resumed=resumed)
        return replace(recipe, **{name: value for name, value in vars(self).items() if value is not None})


def train(
    recipe: RecipeOptions,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The finished checkpoint's directory.", show_default=False)
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Training configuration (JSON, see docs/checkpoints.md).", show_default="the recipe's values"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A checkpoint to start from: a directory or a hub id.", show_default="a new model"),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="A directory of text files.", show_default="Python's standard library"),
    ] = None,
    work: Annotated[Path | None, typer.Option(help="Where snapshots are kept.", show_default="OUTPUT + -work")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest snapshot.")] = False,
    overwrite: OverwriteOption = False,
    snapshot_every: Annotated[int, typer.Option(help="Steps between snapshots.", min=1)] = SNAPSHOT_STEPS,
    exit_classifiers: Annotated[
        str | None,
        typer.Option(
            help="Train only CALM's classifiers, at these depths of a finished MODEL: e.g. 4,8, or auto for its exits.",
            show_default="no",
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="With --exit-classifiers: tokens of text to use.", min=1, show_default=str(CLASSIFIER_TOKENS)
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train gates (GateSkip) and early exits (LayerSkip), from a plain checkpoint or from scratch.

    Ctrl-C finishes the step and writes a snapshot; --resume continues from there.

    Example: gsx train --config examples/train_example.json -o my-model

    Example: gsx train --model my-model --exit-classifiers auto -o with-classifiers
    """
    quiet_libraries()
    if exit_classifiers is not None:
        others = {"config": config, "work": work, "resume": resume or None, "overwrite": overwrite or None}
        for name, value in {**others, **vars(recipe)}.items():
            if value is not None:
                raise typer.BadParameter(
                    "cannot be combined with --exit-classifiers", param_hint=f"--{name.replace('_', '-')}"
                )
        _exit_classifiers(output, model, exit_classifiers, text, tokens, as_json)
        return
    if tokens is not None:
        raise typer.BadParameter("belongs to --exit-classifiers", param_hint="--tokens")
    place = work if work is not None else output.parent / f"{output.name}-work"
    kept = f"snapshots are in {place}: --resume goes on from the newest"
    with ProgressLine(plain_every=_PLAIN_SECONDS, kept=kept) as line:
        line.update("starting")
        with loading():
            from gsx import train as run

        speed = _Speed()
        result = run(
            output,
            config=recipe.over(config, resumed=resume),
            model=model,
            text=text,
            work=work,
            resume=resume,
            overwrite=overwrite,
            snapshot_every=snapshot_every,
            on_progress=line.show,
            on_step=lambda report: line.update("training", report.step, report.steps, speed.note(report)),
        )
    if as_json:
        summary = {
            "directory": str(result.directory),
            "steps": result.steps,
            "tokens": result.tokens,
            "resumed_at": result.resumed_at,
            "seconds": round(result.seconds, 2),
        }
        print_json(summary)
        return
    console = out()
    console.print(
        f"{result.directory}: {result.steps} steps, {result.tokens:,} tokens, {result.seconds:.0f} s in this call"
    )
    console.print(f"next: gsx export {result.directory} --budget 0.7")


def _exit_classifiers(
    output: Path, model: str | None, depths: str, text: Path | None, tokens: int | None, as_json: bool
) -> None:
    """`--exit-classifiers`."""
    if model is None:
        raise typer.BadParameter("needs the model whose exits they are for: --model", param_hint="--exit-classifiers")
    try:
        named = None if depths == "auto" else [int(part) for part in depths.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"{depths!r}: give depths separated by commas, or auto", param_hint="--exit-classifiers"
        ) from None
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx import train_exit_classifiers

        wanted = CLASSIFIER_TOKENS if tokens is None else tokens
        result = train_exit_classifiers(model, output, depths=named, text=text, tokens=wanted, on_progress=line.show)
    exits = [{"exit": one.depth, "agreement": one.agreement, "ranking": one.ranking} for one in result.exits]
    if as_json:
        print_json({"directory": str(result.directory), "tokens": result.tokens, "exits": exits})
        return
    console = out()
    rows = [(str(one.depth), f"{one.agreement:.1%}", f"{one.ranking:.3f}") for one in result.exits]
    heads = ("exit", "agrees with the model", "ranking (0.5: a guess)")
    console.print(table(f"exit classifiers, on held-out tokens of {result.tokens:,}", heads, rows, right=1))
    console.print(f"next: gsx export {result.directory} --policy calm:classifier,tolerance=0.1")


class _Speed:
    """Smooths the time of a step, for tokens/s and the time left."""

    def __init__(self) -> None:
        self._seconds: float | None = None

    def note(self, report: StepReport) -> str:
        """A step's figures in one line."""
        old = self._seconds
        self._seconds = report.seconds if old is None else 0.9 * old + 0.1 * report.seconds
        left = (report.steps - report.step) * self._seconds
        parts = [f"loss {report.cross_entropy:.3f}"]
        if report.exit_cross_entropy is not None:
            parts.append(f"exit {report.exit_depth} {report.exit_cross_entropy:.3f}")
        parts += [
            f"budget {report.budget:.2f}",
            f"gate^2 {report.gate_square:.3f}",
            f"{report.tokens / self._seconds:.0f} tokens/s",
            f"{_clock(left)} left",
        ]
        return ", ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
