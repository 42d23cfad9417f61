"""`gsx train`."""

from __future__ import annotations

import math
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gsx.cli.console import ProgressLine, out, print_json, quiet_libraries, remark, size, table
from gsx.cli.options import JsonOption, OverwriteOption, grouped
from gsx.cli.signals import loading
from gsx_exporter.defaults import CLASSIFIER_TOKENS
from gsx_plugins.progress import OnProgress, in_words, silent

if TYPE_CHECKING:
    from gsx_exporter.training.run import TrainFacts

# Seconds between lines when stderr is not a terminal.
_PLAIN_SECONDS = 30.0
# Not the option's own default: what trains no recipe must tell whether one was asked for.
_RECIPE = "gateskip"


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(train))


@dataclass(frozen=True)
class RecipeOptions:
    """What is trained, and how. Everything else: --set."""

    recipe: Annotated[
        str | None,
        typer.Option(
            help="gateskip, layerskip, gateskip+layerskip, sorted, or a YAML file; --print-recipe shows it.",
            show_default=_RECIPE,
        ),
    ] = None
    model: Annotated[
        str | None, typer.Option(help="The model: a directory or a hub id.", show_default="the recipe's")
    ] = None
    lora: Annotated[
        int | None,
        typer.Option(metavar="RANK", help="Train with adapters of this rank, on a frozen model.", show_default="8"),
    ] = None
    full: Annotated[bool, typer.Option("--full", help="Train all weights.")] = False
    freeze_base: Annotated[bool, typer.Option("--freeze-base", help="Train gates alone.")] = False
    data: Annotated[
        str | None,
        typer.Option(
            help="Text: a JSONL, Parquet or text file, a directory, or a data set of the hub.",
            show_default="Python's standard library",
        ),
    ] = None
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.", show_default="one pass")] = None
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, e.g. trainer.learning_rate=1e-4."),
    ] = None

    def to_changes(self) -> list[str]:
        """The options as changes of the recipe's settings."""
        modes = {"lora": self.lora is not None, "full": self.full, "frozen": self.freeze_base}
        if sum(modes.values()) > 1:
            raise typer.BadParameter("one of --lora, --full and --freeze-base", param_hint="--lora")
        values: dict[str, Any] = {
            "model": self.model,
            "mode": next((name for name, given in modes.items() if given), None),
            "lora.rank": self.lora,
            "data.source": self.data,
            "trainer.max_steps": self.max_steps,
        }
        given = [f"{name}={_quoted(value)}" for name, value in values.items() if value is not None]
        return [*given, *(self.changes or [])]


def train(
    options: RecipeOptions,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The result's directory.", show_default=False)
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Where checkpoints are kept.", show_default="OUTPUT + -work")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    finish: Annotated[
        bool, typer.Option("--finish", help="Write the result of the newest checkpoint, without further steps.")
    ] = False,
    overwrite: OverwriteOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be trained, and how long it takes.")
    ] = False,
    print_recipe: Annotated[
        bool, typer.Option("--print-recipe", help="Print the recipe's file, to read and edit, and stop.")
    ] = False,
    exit_classifiers: Annotated[
        str | None,
        typer.Option(
            help="Train only CALM's classifiers, at these depths of a finished MODEL: e.g. 4,8, or auto for its exits.",
            show_default="no",
        ),
    ] = None,
    exit_gate: Annotated[
        bool, typer.Option("--exit-gate", help="Train only the exit gate between the loops of a finished MODEL (Ouro).")
    ] = False,
    linear_scores: Annotated[
        bool,
        typer.Option(
            "--linear-scores",
            help="Fit only linear scores for the vector gates of a finished MODEL: skipped tokens then need no gate.",
        ),
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="With --exit-classifiers, --exit-gate or --linear-scores: tokens of text to use.",
            min=1,
            show_default=str(CLASSIFIER_TOKENS),
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train gates (GateSkip) and early exits (LayerSkip, Sorted LLaMA) on a model.

    Ctrl-C finishes the step and writes a checkpoint; --resume continues from there. Several GPUs: put torchrun or
    accelerate launch in front of `-m gsx train`.

    Example: gsx train --model HuggingFaceTB/SmolLM2-135M --recipe gateskip --lora 8 --data my-text.jsonl -o my-gates

    Example: gsx train --model my-model --exit-classifiers auto -o with-classifiers

    Example: gsx train --model my-ouro --exit-gate -o with-gate

    Example: gsx train --model my-gates --linear-scores -o with-scores
    """
    quiet_libraries()
    if print_recipe:
        from gsx.workflows.train import recipe_file

        print(recipe_file(options.recipe or _RECIPE), end="")
        return
    if output is None and not dry_run:
        raise typer.BadParameter("where the result goes", param_hint="--output")
    fits = {
        "--exit-classifiers": exit_classifiers is not None,
        "--exit-gate": exit_gate,
        "--linear-scores": linear_scores,
    }
    asked = [name for name, wanted in fits.items() if wanted]
    if asked:
        option = asked[0]
        others = {
            "recipe": options.recipe,
            "work": work,
            "resume": resume,
            "finish": finish,
            "overwrite": overwrite,
            "dry-run": dry_run,
            "lora": options.lora,
            "full": options.full,
            "freeze-base": options.freeze_base,
            "max-steps": options.max_steps,
            "set": options.changes,
            **{name.removeprefix("--"): True for name in asked[1:]},
        }
        for name, value in others.items():
            if value:
                raise typer.BadParameter(f"cannot be combined with {option}", param_hint=f"--{name}")
        if options.model is None:
            raise typer.BadParameter("needs the model that is trained: --model", param_hint=option)
        assert output is not None
        if exit_classifiers is not None:
            _exit_classifiers(output, options, exit_classifiers, tokens, as_json)
        elif exit_gate:
            _exit_gate(output, options, tokens, as_json)
        else:
            _linear_scores(output, options, tokens, as_json)
        return
    if tokens is not None:
        raise typer.BadParameter(f"belongs to {', '.join(fits)}", param_hint="--tokens")
    first = os.environ.get("RANK", "0") == "0"
    kept = None
    if output is not None and not dry_run:
        place = work if work is not None else output.parent / f"{output.name}-work"
        kept = f"checkpoints are in {place}: --resume goes on from the newest"
    with ProgressLine(plain_every=_PLAIN_SECONDS, kept=kept) as line:
        show: OnProgress = line.show if first else silent
        if first:
            line.update("starting")
        with loading():
            from gsx.workflows.train import check_packages, plan_training, settings
            from gsx.workflows.train import train as run

            check_packages()
        chosen = settings(options.recipe or _RECIPE, options.to_changes())
        if first:
            remark(chosen.to_yaml().rstrip())
        if dry_run:
            facts = plan_training(recipe=chosen, on_progress=show)
        else:
            assert output is not None
            result = run(
                output,
                recipe=chosen,
                work=work,
                resume=resume,
                finish=finish,
                overwrite=overwrite,
                command=shlex.join(["gsx", *sys.argv[1:]]),
                on_progress=show,
            )
            facts = result.facts
    if not first:
        return
    if dry_run:
        print_json(vars(facts)) if as_json else _show(facts)
        return
    if as_json:
        figures = {name: value for name, value in result.metrics.items() if "_score_" not in name}
        summary = {"directory": str(result.directory), "steps": result.steps, "resumed_at": result.resumed_at}
        print_json({**summary, "seconds": round(result.seconds, 2), "metrics": figures})
        return
    console = out()
    rows = [
        (name.removeprefix("eval_").replace("_", " "), f"{value:.4g}")
        for name, value in result.metrics.items()
        if "_score_" not in name and name != "epoch"
    ]
    console.print(table("on held-out text", ("", ""), rows, right=1))
    console.print(f"{result.directory}: {result.steps} steps, {result.seconds:.0f} s in this call")
    console.print(f"next: gsx export {result.directory}" + (" --budget 0.8" if chosen.gate is not None else ""))


def _quoted(value: Any) -> str:
    """A value as YAML reads it: names of files and models are texts."""
    return f'"{value}"' if isinstance(value, str) else str(value)


def _show(facts: TrainFacts) -> None:
    rows = [
        ("parameters", f"{facts.parameters:,}, {facts.trained:,} of them trained"),
        ("memory", f"{size(facts.memory_bytes)} of weights, gradients and optimizer, and the activations"),
        ("steps", f"{facts.steps:,} of {facts.step_tokens:,} tokens"),
        ("held out", f"{facts.held_out:,} rows"),
    ]
    if facts.tokens is not None and facts.predicted is not None:
        learnt = f"{facts.predicted / max(1, facts.tokens):.0%} of them are learnt"
        rows.insert(2, ("text", f"{facts.rows:,} rows, {facts.tokens:,} tokens, {learnt}"))
    if facts.seconds is not None:
        rows.append(("time", f"about {in_words(facts.seconds)} here, without evaluations"))
    out().print(table(None, ("", ""), rows))


def _exit_classifiers(output: Path, options: RecipeOptions, depths: str, tokens: int | None, as_json: bool) -> None:
    """`--exit-classifiers`."""
    assert options.model is not None
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
        result = train_exit_classifiers(
            options.model, output, depths=named, text=options.data, tokens=wanted, on_progress=line.show
        )
    exits = [{"exit": one.depth, "agreement": one.agreement, "ranking": _number(one.ranking)} for one in result.exits]
    if as_json:
        print_json({"directory": str(result.directory), "tokens": result.tokens, "exits": exits})
        return
    console = out()
    rows = [(str(one.depth), f"{one.agreement:.1%}", f"{one.ranking:.3f}") for one in result.exits]
    heads = ("exit", "agrees with the model", "ranking (0.5: a guess)")
    console.print(table(f"exit classifiers, on held-out tokens of {result.tokens:,}", heads, rows, right=1))
    console.print(f"next: gsx export {result.directory} --policy calm:classifier,tolerance=0.1")


def _exit_gate(output: Path, options: RecipeOptions, tokens: int | None, as_json: bool) -> None:
    """`--exit-gate`."""
    assert options.model is not None
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx import train_exit_gate

        wanted = CLASSIFIER_TOKENS if tokens is None else tokens
        result = train_exit_gate(options.model, output, text=options.data, tokens=wanted, on_progress=line.show)
    if as_json:
        gains = [{name: _number(value) for name, value in vars(one).items()} for one in result.gains]
        print_json({"directory": str(result.directory), "tokens": result.tokens, "loops": gains})
        return
    console = out()
    rows = [
        (str(one.loops), f"{one.loss:.3f}", f"{one.helped:.1%}", f"{one.leaving:.1%}", f"{one.ranking:.3f}")
        for one in result.gains[:-1]
    ]
    rows.append((str(result.gains[-1].loops), f"{result.gains[-1].loss:.3f}", "", "", ""))
    heads = ("loops", "nats a token", "another helps", "leaves, on average", "ranking (0.5: a guess)")
    console.print(table(f"exit gate, on held-out tokens of {result.tokens:,}", heads, rows, right=1))
    console.print(f"next: gsx export {result.directory} --policy calm:gate,tolerance=0.1")


def _linear_scores(output: Path, options: RecipeOptions, tokens: int | None, as_json: bool) -> None:
    """`--linear-scores`."""
    assert options.model is not None
    with ProgressLine() as line:
        line.update("starting")
        with loading():
            from gsx import train_linear_scores

        wanted = CLASSIFIER_TOKENS if tokens is None else tokens
        result = train_linear_scores(options.model, output, text=options.data, tokens=wanted, on_progress=line.show)
    if as_json:
        scores = [{"layer": one.layer, "branch": one.branch, "agreement": one.agreement} for one in result.scores]
        print_json({"directory": str(result.directory), "tokens": result.tokens, "scores": scores})
        return
    console = out()
    by_branch: dict[str, list[float]] = {}
    for one in result.scores:
        by_branch.setdefault(one.branch, []).append(one.agreement)
    rows = [(branch, f"{sum(all_) / len(all_):.1%}", f"{min(all_):.1%}") for branch, all_ in by_branch.items()]
    heads = ("gates", "decide alike, mean", "least")
    console.print(table(f"linear scores, on held-out tokens of {result.tokens:,}", heads, rows, right=1))
    console.print(f"next: gsx export {result.directory} --budget 0.8")


def _number(value: float) -> float | None:
    """A number for JSON, which has no NaN."""
    return None if math.isnan(value) else value
