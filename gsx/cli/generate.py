"""`gsx generate`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gsx.cli.console import print_json, remark
from gsx.cli.options import (
    BackendOptions,
    BundleArgument,
    DraftOptions,
    JsonOption,
    KeepOptions,
    SamplingOptions,
    grouped,
)
from gsx.cli.signals import loading
from gsx.defaults import NEW_TOKENS

if TYPE_CHECKING:
    from gsx.workflows.generate import GenerateResult
    from gsx_engines.speculation.adapt import Adaptation


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command()(grouped(generate))


def generate(
    bundle: BundleArgument,
    keep: KeepOptions,
    sampling: SamplingOptions,
    drafting: DraftOptions,
    backend: BackendOptions,
    prompt: Annotated[
        str | None, typer.Argument(help='The text to continue; "-" reads it from stdin.', show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Largest number of new tokens.")] = NEW_TOKENS,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop before this text; may be given several times.", show_default=False),
    ] = None,
    ids: Annotated[
        str | None,
        typer.Option(help="Token ids instead of a text, e.g. 1,2,3; prints the new ids.", show_default=False),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(
            help="With --json: each token's log-probability, and those of the N most likely.", show_default="none"
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the runtime.", show_default="the runtime's choice")
    ] = None,
    stream: Annotated[bool, typer.Option(help="Print text as it is generated.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Continue a text. New text goes to stdout, a line of statistics to stderr.

    Example: gsx generate out/demo "def main(" --budget 0.7 --max-new-tokens 64
    """
    if prompt == "-":
        prompt = _stdin()
    with loading():
        from gsx import generate as generate_text

    live = stream and not as_json and ids is None
    result = generate_text(
        bundle,
        prompt,
        ids=_parse_ids(ids) if ids is not None else None,
        max_new_tokens=max_new_tokens,
        logprobs=logprobs,
        stop=stop or (),
        threads=threads,
        on_text=_write if live else lambda text: None,
        **vars(keep),
        **vars(sampling),
        **vars(drafting),
        **vars(backend),
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
    """One line of statistics: tokens, speed, share kept."""
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
        accepted = "" if stats.acceptance is None else f", {stats.acceptance:.0%} of drafted tokens accepted"
        if result.adaptation is not None:
            parts.append(searched(result.adaptation))
        parts.append(f"draft {result.draft}: {stats.tokens_per_verification:.2f} tokens a verification{accepted}")
    return ", ".join(parts)


def searched(found: Adaptation) -> str:
    """What the search for a better set did, in words."""
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
