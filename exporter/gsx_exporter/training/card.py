"""The card of a result: a Markdown page with plots, as a hub page shows it, from what the run itself measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.config import ModelConfig
from gsx_exporter.training.settings import LoraSettings, TrainSettings

PLOTS = "plots"
_BLUE, _ORANGE = "#3b82c4", "#d9822b"
# Tokens of the sample whose gates are shown.
SAMPLE_TOKENS = 48


@dataclass(frozen=True)
class Sample:
    """The gates over a piece of held-out text.

    Args:
        tokens: the text, token by token.
        scores: branch -> [L, S] float32.
    """

    tokens: Sequence[str]
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class CardFacts:
    """What a card says of its run.

    Args:
        base: the model's name, as people may load it; revision: of the hub's.
        data: what it was trained on; command: how.
        trained, parameters: how many are trained, of how many.
        steps, tokens: optimizer steps, and tokens that they read.
        log: the Trainer's log; metrics: of the last evaluation; held_out: rows of it, of `length` tokens.
        sample: None without gates.
    """

    base: str
    revision: str | None
    data: str
    command: str
    trained: int
    parameters: int
    steps: int
    tokens: int
    log: Sequence[dict[str, Any]]
    metrics: dict[str, float]
    held_out: int
    length: int
    sample: Sample | None


def write_card(folder: Path, settings: TrainSettings, config: ModelConfig, facts: CardFacts) -> None:
    """Write `README.md` and its plots into the result's folder."""
    plots = folder / PLOTS
    plots.mkdir()
    budgets, exits = budgets_of(facts.metrics), exits_of(facts.metrics)
    dense = facts.metrics.get("eval_dense_perplexity")
    by_depth = exits if len(exits) > 1 else []  # one exit is no curve; `_curves` shows how it learnt
    pictures = [_quality(budgets, by_depth, dense, plots / "quality.png")] if budgets or by_depth else []
    pictures.append(_curves(facts.log, plots / "training.png"))
    if config.gate is not None:
        pictures.append(_layers(facts.metrics, config, plots / "gates.png"))
    if facts.sample is not None:
        pictures.append(_tokens(facts.sample, plots / "tokens.png"))
    (folder / "README.md").write_text(_text(settings, config, facts, budgets, exits, pictures), encoding="utf-8")


def budgets_of(metrics: dict[str, float]) -> list[tuple[float, float]]:
    """Budget and perplexity, falling; empty without gates."""
    prefix = "eval_perplexity_at_"
    found = [(float(name.removeprefix(prefix)), value) for name, value in metrics.items() if name.startswith(prefix)]
    return [(1.0, metrics["eval_perplexity"]), *sorted(found, reverse=True)] if found else []


def exits_of(metrics: dict[str, float]) -> list[tuple[int, float, float]]:
    """Depth, perplexity and agreement of each exit."""
    depths = [
        int(name.split("_")[2]) for name in metrics if name.startswith("eval_exit_") and name.endswith("agreement")
    ]
    return [
        (depth, metrics[f"eval_exit_{depth}_perplexity"], metrics[f"eval_exit_{depth}_agreement"])
        for depth in sorted(depths)
    ]


def _text(
    settings: TrainSettings,
    config: ModelConfig,
    facts: CardFacts,
    budgets: Sequence[tuple[float, float]],
    exits: Sequence[tuple[int, float, float]],
    pictures: Sequence[str],
) -> str:
    what = " and ".join(["gates"] * (config.gate is not None) + ["exits"] * bool(config.exits))
    front = ["---", f"base_model: {facts.base}", "pipeline_tag: text-generation"]
    front += ["library_name: peft"] * (settings.mode != "full") + [f"tags: [gsx, {', '.join(_tags(config))}]", "---"]
    dense = facts.metrics.get("eval_dense_perplexity")
    lines = [*front, "", f"# {Path(facts.base).name} with {what}", "", *_what(settings, config, facts), ""]
    ranked = (
        ", with gates that rank the tokens of each row; `gsx verify` and `gsx compare` measure an export"
        if budgets
        else ""
    )
    lines += [
        f"Measured on held-out text ({facts.held_out} rows of {facts.length} tokens) by the run itself{ranked}.",
        "",
    ]
    if dense is not None:
        own = "" if budgets else f", this model's with all layers {facts.metrics['eval_perplexity']:.2f}"
        lines += [f"The base model's perplexity there is {dense:.2f}{own}.", ""]
    if budgets:
        lines += [
            "| budget | perplexity |" + (" against the base |" if dense else ""),
            "|---:|---:|" + "---:|" * bool(dense),
        ]
        lines += [
            f"| {budget:g} | {value:.2f} |" + (f" {value / dense - 1:+.1%} |" if dense else "")
            for budget, value in budgets
        ]
        lines += [""]
    if exits:
        lines += ["| exit after | perplexity | its first choice is the model's |", "|---:|---:|---:|"]
        lines += [
            f"| {depth} of {config.num_layers} layers | {nats:.2f} | {share:.1%} |" for depth, nats, share in exits
        ]
        lines += [""]
    lines += [f"![{name}]({PLOTS}/{name}.png)" for name in pictures]
    options = " --budget 0.8" * bool(budgets) + " --draft auto" * bool(exits)
    lines += ["", "## Use", "", f"    gsx export DIR{options} -o bundle"]
    lines += ["    gsx verify bundle", "", "## Training", ""]
    lines += [f"Text: {facts.data}. {facts.steps:,} steps, {facts.tokens:,} tokens; {facts.trained:,} of"]
    lines += [
        f"{facts.parameters:,} parameters were trained. All settings: [training.yaml](training.yaml). The command:",
        "",
    ]
    lines += [f"    {facts.command or 'gsx train --recipe training.yaml -o DIR'}", ""]
    return "\n".join(lines)


def _tags(config: ModelConfig) -> list[str]:
    return ["gateskip"] * (config.gate is not None) + ["layerskip"] * bool(config.exits)


def _what(settings: TrainSettings, config: ModelConfig, facts: CardFacts) -> list[str]:
    found = []
    if config.gate is not None:
        branches = " and ".join("attention" if one == "attn" else "MLP" for one in config.gate.branches)
        found.append(f"A {config.gate.kind} gate before each {branches} branch decides which tokens run it (GateSkip).")
    if config.exits:
        depths = ", ".join(map(str, config.exits))
        found.append(f"It was trained to exit after {depths} layers, through its own norm and head.")
    how = {
        "lora": f"A LoRA adapter of rank {_ranks(settings.lora)} on the frozen base.",
        "frozen": "The base is unchanged: only the gates were trained.",
        "full": "All weights were trained.",
    }
    return [*found, how[settings.mode]]


def _ranks(lora: LoraSettings) -> str:
    others = [f"{rank} for `{pattern}`" for pattern, rank in lora.rank_pattern.items()]
    return ", ".join([str(lora.rank), *others])


def _figure(columns: int, height: float = 3.2) -> tuple[Any, list[Any]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4.2 * columns, height), layout="constrained", facecolor="white")
        return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _line(axis: Any, x: Sequence[float], y: Sequence[float], across: str, up: str, color: str = _BLUE) -> None:
    axis.plot(x, y, marker="o", markersize=3, color=color)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(color="#e3e7ec")
    axis.spines[["top", "right"]].set_visible(False)


def _perplexity_axis(axis: Any) -> None:
    """A logarithmic axis with plain numbers, not powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _quality(
    budgets: Sequence[tuple[float, float]],
    exits: Sequence[tuple[int, float, float]],
    dense: float | None,
    path: Path,
) -> str:
    """Perplexity by budget and exit. Args: dense: the base's."""
    figure, axes = _figure(bool(budgets) + 2 * bool(exits))
    if budgets:
        axis = axes.pop(0)
        _line(axis, [one[0] for one in budgets], [one[1] for one in budgets], "budget", "perplexity")
        axis.invert_xaxis()
        _perplexity_axis(axis)
        if dense is not None:
            axis.axhline(dense, color="grey", linestyle="--", linewidth=1)
            axis.annotate(
                "the base",
                (1, dense),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                color="grey",
                fontsize=8,
                xycoords=("axes fraction", "data"),
            )
        axis.set_title("What skipping costs")
    if exits:
        depths = [one[0] for one in exits]
        _line(axes[0], depths, [one[1] for one in exits], "exit after layer", "perplexity")
        axes[0].set_title("What an early exit costs")
        _line(axes[1], depths, [100 * one[2] for one in exits], "exit after layer", "agrees with the model, %")
        axes[1].set_title("Its first choice is the model's")
    figure.savefig(path, dpi=110)
    return path.stem


def _curves(log: Sequence[dict[str, Any]], path: Path) -> str:
    """Loss, perplexity and, with exits, how often their first choice is the model's, by step."""
    agreements = sorted({name for one in log for name in one if name.endswith("_agreement")})
    figure, axes = _figure(2 + bool(agreements))
    steps = [one["step"] for one in log if "loss" in one]
    _line(axes[0], steps, [one["loss"] for one in log if "loss" in one], "step", "training loss")
    evaluations = [one for one in log if "eval_loss" in one]
    perplexities = {}
    for name in sorted({name for one in evaluations for name in one if "perplexity" in name}):
        short = name.removeprefix("eval_").replace("perplexity_at_", "budget ").replace("_perplexity", "")
        perplexities[name] = {"dense": "the base", "perplexity": "whole model"}.get(short, short.replace("_", " "))
    _by_step(axes[1], evaluations, perplexities, "perplexity, held out")
    _perplexity_axis(axes[1])
    if agreements:
        exits = {name: name.removeprefix("eval_").removesuffix("_agreement").replace("_", " ") for name in agreements}
        _by_step(axes[2], evaluations, exits, "first choice is the model's, share")
    figure.savefig(path, dpi=110)
    return path.stem


def _by_step(axis: Any, evaluations: Sequence[dict[str, Any]], names: dict[str, str], up: str) -> None:
    """A line for each figure of the evaluations. Args: names: of the figures -> as they are shown."""
    for name, shown in names.items():
        points = [(one["step"], one[name]) for one in evaluations if name in one]
        axis.plot([step for step, _ in points], [value for _, value in points], marker="o", markersize=3, label=shown)
    axis.set_xlabel("step")
    axis.set_ylabel(up)
    axis.grid(color="#e3e7ec")
    axis.legend(fontsize=7, frameon=False)


def _layers(metrics: dict[str, float], config: ModelConfig, path: Path) -> str:
    figure, axes = _figure(1)
    for branch, color in zip(BRANCHES, (_BLUE, _ORANGE), strict=True):
        values = [(n, metrics.get(f"eval_score_{branch}_{n}")) for n in range(config.num_layers)]
        known = [(n, value) for n, value in values if value is not None]
        _line(axes[0], [n for n, _ in known], [value for _, value in known], "layer", "mean score", color)
    axes[0].legend(BRANCHES, fontsize=7, frameon=False)
    axes[0].set_title("Gates by layer")
    figure.savefig(path, dpi=110)
    return path.stem


def _tokens(sample: Sample, path: Path) -> str:
    from matplotlib.figure import Figure

    count = len(sample.scores)
    figure = Figure(figsize=(11, 4.2 * count), layout="constrained", facecolor="white")
    for axis, (branch, scores) in zip(np.atleast_1d(figure.subplots(count, 1)), sample.scores.items(), strict=True):
        # Each layer by itself: which of its tokens it would skip first.
        ranks = scores.argsort(axis=1).argsort(axis=1) / max(1, scores.shape[1] - 1)
        axis.imshow(ranks, aspect="auto", cmap="viridis")
        axis.set_xticks(range(len(sample.tokens)), [_shown(one) for one in sample.tokens], rotation=90, fontsize=6)
        axis.set_ylabel(f"{branch}, layer")
        axis.set_title(f"{branch}: rank of the tokens by score within each layer (dark: skipped first)")
    figure.savefig(path, dpi=110)
    return path.stem


def _shown(token: str) -> str:
    # A dollar sign begins a formula in a plot.
    return token.replace("\n", "\\n").replace("$", "\\$").strip() or "_"
