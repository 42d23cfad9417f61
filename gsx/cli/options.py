"""Options that commands share, each written once, and groups of options that belong together.

A group is a frozen dataclass whose fields are options. A command takes it as one parameter. `grouped` replaces it with
its fields on the command line, with the group's docstring as their heading; `vars(group)` gives the public function's
keyword arguments.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

if TYPE_CHECKING:
    from gsx_engines.bundle.controls import KeepSettings

BundleArgument = Annotated[Path, typer.Argument(help="A bundle's directory.", show_default=False)]
ModelArgument = Annotated[str, typer.Argument(help="A model directory or a hub id.", show_default=False)]
PageOption = Annotated[Path | None, typer.Option("-o", "--output", help="HTML page to write.", show_default="none")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def seconds_of(text: str) -> float:
    """The seconds of a duration: a number with s, m or h.

    Raises:
        typer.BadParameter: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    if found is None or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is not a duration such as 90s, 10m or 1h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def duration_of(seconds: float) -> str:
    """A duration as `seconds_of` reads it."""
    return f"{seconds / 60:g}m" if seconds % 60 == 0 else f"{seconds:g}s"


def time_option(what: str, usual: float | None = None) -> Any:
    """The option `--time`. Args: what: it limits; usual: the default in seconds, None for no limit."""
    return typer.Option(
        "--time",
        parser=seconds_of,
        metavar="DURATION",
        help=f"{what}, e.g. 90s, 10m or 1h.",
        show_default="no limit" if usual is None else duration_of(usual),
    )


TimeOption = Annotated[float | None, time_option("About how long it may take, for the best answer in it")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]

SHIPPED_TEXT = "a text that ships with gsx"
HalvesOption = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text: the first half is for calibration, the second half is measured.", show_default=SHIPPED_TEXT
    ),
]


@dataclass(frozen=True)
class BackendOptions:
    """What runs a bundle."""

    backend: Annotated[
        Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "torch"],
        typer.Option(help="The runtime; TensorRT runs engines from gsx build, on a GPU."),
    ] = "onnxruntime"
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Where --backend torch runs.", show_default="a GPU if there is one"),
    ] = None


@dataclass(frozen=True)
class KeepOptions:
    """Keep settings."""

    budget: Annotated[
        float | None, typer.Option(help="Share of skippable work to keep.", show_default="as exported")
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(help="The layers that run, e.g. 0-5,8.attn (policy layers).", show_default="as exported"),
    ] = None
    exit_layer: Annotated[
        int | None,
        typer.Option("--exit", help="Run only the first E layers (policy layers).", show_default="as exported"),
    ] = None
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Unified Layer Skipping for new tokens, at this speedup (policy layers).", show_default="as exported"
        ),
    ] = None
    exit_threshold: Annotated[
        float | None,
        typer.Option(help="Confidence at which a token exits (policy calm).", show_default="as exported"),
    ] = None
    loops: Annotated[
        int | None,
        typer.Option(help="How many loops of a looped model run (policy loops).", show_default="as exported"),
    ] = None
    hold: Annotated[
        bool, typer.Option("--hold", help="Move the thresholds of new tokens so that the budget holds on this text.")
    ] = False

    def settings(self) -> KeepSettings:
        """The options as an engine takes them."""
        from gsx_engines.bundle.controls import KeepSettings

        values = dict(vars(self))
        return KeepSettings(exit=values.pop("exit_layer"), **values)


def biases_of(text: str) -> dict[int, float]:
    """The biases of tokens, by id.

    Raises:
        typer.BadParameter: it is something else.
    """
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of biases such as 11:-100,2:1.5") from None


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = 0.0
    top_k: Annotated[int, typer.Option(help="Sample from the K most likely tokens; 0: from all.")] = 0
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens that together reach this probability.")
    ] = 1.0
    seed: Annotated[int | None, typer.Option(help="Seed of the random numbers.", show_default="a new one")] = None
    min_p: Annotated[float, typer.Option(help="Only tokens at least this share as likely as the most likely one.")] = (
        0.0
    )
    repetition_penalty: Annotated[
        float, typer.Option(help="Divides the logits of tokens that are in the text, prompt included; 1: none.")
    ] = 1.0
    frequency_penalty: Annotated[
        float, typer.Option(help="Taken off a token's logit for each time that it is in the new text.")
    ] = 0.0
    presence_penalty: Annotated[float, typer.Option(help="Taken off a token's logit if it is in the new text.")] = 0.0
    logit_bias: Annotated[
        dict[int, float] | None,
        typer.Option(
            parser=biases_of,
            metavar="ID:BIAS,...",
            help="Added to the logits of tokens, e.g. 11:-100,2:1.5.",
            show_default="none",
        ),
    ] = None


@dataclass(frozen=True)
class DraftOptions:
    """Whether and how to draft."""

    speculative: Annotated[
        bool | None,
        typer.Option(
            "--speculative/--no-speculative",
            help="Draft and verify: faster, the same text.",
            show_default="if the bundle has a draft",
        ),
    ] = None
    draft: Annotated[
        str | None,
        typer.Option(
            help="Another draft: exit:E, budget:B, loops:N, layers:SET, or layers:auto (searches for a set meanwhile).",
            show_default="the bundle's",
        ),
    ] = None
    draft_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens drafted before a verification; 0: no drafting.", show_default="found while generating"
        ),
    ] = None


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command as the command line sees it: each parameter that is a group is replaced by the group's options."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }

    @functools.wraps(command)
    def call(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    parameters = [part for parameter in signature.parameters.values() for part in _spread(parameter)]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _spread(parameter: inspect.Parameter) -> Iterator[inspect.Parameter]:
    """A parameter or, if it is a group, its fields; keyword-only, so that their order is free."""
    group = parameter.annotation
    if not is_dataclass(group):
        yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        return
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        for option in hints[field.name].__metadata__:
            option.rich_help_panel = (group.__doc__ or "").rstrip(".")
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
