"""`gsx generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gsx.cli.console import print_json, remark
from gsx.cli.signals import loading

if TYPE_CHECKING:
    from gsx.workflows.generate import GenerateResult
    from gsx_engines.speculation.adapt import Adaptation


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(generate)


def generate(
    bundle: Annotated[Path, typer.Argument(help="A bundle's directory.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Argument(help='The text to continue; "-" reads it from stdin.', show_default=False)
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of skippable work to keep.", show_default="as exported")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="The layers that run, e.g. 0-5,8.attn (policy layers).", show_default="as exported"),
    ] = None,
    exit_layer: Annotated[
        int | None,
        typer.Option("--exit", help="Run the first so many layers (policy layers).", show_default="as exported"),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            help="Unified Layer Skipping for new tokens, at this target (policy layers).", show_default="as exported"
        ),
    ] = None,
    exit_threshold: Annotated[
        float | None,
        typer.Option(help="Confidence at which a token leaves (policy calm).", show_default="as exported"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Only the K likeliest tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that together reach this.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers.", show_default="a new one")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given several times.", show_default=False),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(help="Token ids in place of a text, e.g. 1,2,3; new ids are printed.", show_default=False),
    ] = None,
    speculative: Annotated[
        bool | None,
        typer.Option(
            "--speculative/--no-speculative",
            help="Draft and verify: faster, the same text.",
            show_default="if the bundle has a draft",
        ),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Draft in another way: exit:E, budget:B, layers:SET, or layers:auto (a set, searched meanwhile).",
            show_default="the bundle's",
        ),
    ] = None,
    draft_length: Annotated[
        int | None,
        typer.Option(help="Tokens drafted before a verification; 0: plain.", show_default="found while generating"),
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print text as it comes.")] = True,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime.", show_default="its own choice")] = None,
    backend: Annotated[
        Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "torch"],
        typer.Option(help="The runtime; TensorRT runs what gsx build made, on a GPU."),
    ] = "onnxruntime",
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Where --backend torch runs.", show_default="a GPU if there is one"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, ids and statistics as JSON.")] = False,
) -> None:
    """Continue a text. New text goes to stdout, a line of statistics to stderr.

    Example: gsx generate out/demo "def main(" --budget 0.7 --max-new-tokens 64
    """
    if prompt == "-":
        prompt = _stdin()
    with loading():
        from gsx.workflows.generate import generate as generate_text

    live = stream and not as_json and ids is None
    result = generate_text(
        bundle,
        prompt,
        ids=_parse_ids(ids) if ids is not None else None,
        budget=budget,
        layers=layers,
        exit_layer=exit_layer,
        speedup=speedup,
        exit_threshold=exit_threshold,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        speculative=speculative,
        draft=draft,
        draft_length=draft_length,
        threads=threads,
        backend=backend,
        device=device,
        on_text=_write if live else lambda text: None,
    )
    if as_json:
        print_json(result.to_dict())
        return
    if ids is not None:
        print(",".join(map(str, result.ids)))
    else:
        print("" if live else result.text, flush=True)
    remark(statistics(result))


def statistics(result: GenerateResult) -> str:
    """One line: how many, how fast, what was kept."""
    stats = result.stats
    parts = [f"{stats.new_tokens} tokens ({result.finish})"]
    if stats.decode_tokens_per_second is not None:
        parts.append(f"{stats.decode_tokens_per_second:.1f} tokens/s")
    parts.append(f"first token after {stats.prefill_seconds * 1000:.0f} ms")
    if stats.kept_share is not None:
        at = result.keep if result.budget is None else f"budget {result.budget:g}"
        parts.append(
            f"kept {stats.kept_share:.1%}, {at}" if result.budget is None else f"kept {stats.kept_share:.1%} at {at}"
        )
    if result.draft is not None and stats.tokens_per_verification is not None:
        accepted = "" if stats.acceptance is None else f", {stats.acceptance:.0%} of drafted tokens right"
        if result.adaptation is not None:
            parts.append(searched(result.adaptation))
        parts.append(f"draft {result.draft}: {stats.tokens_per_verification:.2f} tokens a verification{accepted}")
    return ", ".join(parts)


def searched(found: Adaptation) -> str:
    """What a search for a better set did."""
    state = "ended" if found.ended else "goes on"
    return f"{found.tried} sets tried in {found.looks} looks, {found.changes} taken, the search {state}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _stdin() -> str:
    from gsx_plugins.errors import UsageError

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            "the prompt on stdin is not UTF-8 text",
            found=f"byte 0x{error.object[error.start]:02x} at {error.start}",
        ) from error


def _parse_ids(text: str) -> list[int]:
    from gsx_plugins.errors import UsageError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError("--ids", expected="whole numbers between commas, e.g. 1,2,3", found=repr(text)) from error
