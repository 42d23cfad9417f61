"""`gsx generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
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
from gsx.cli.signals import forget_ctrl_c, loading
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
    chat: Annotated[
        bool, typer.Option("--chat", help="Chat with the model, by its own chat template; Ctrl-D ends it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a text. New text goes to stdout, a line of statistics to stderr.

    Example: gsx generate out/demo "def main(" --budget 0.7 --max-new-tokens 64

    With --chat, each line is a message, and the prompt is the first one. Ctrl-C ends an answer.
    """
    if chat:
        _check_chat(ids, as_json, logprobs)
        _chat(bundle, prompt, keep, sampling, drafting, backend, max_new_tokens, tuple(stop or ()), threads)
        return
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


def _check_chat(ids: str | None, as_json: bool, logprobs: int | None) -> None:
    from gsx_plugins.errors import UsageError

    given = [name for name, value in (("--ids", ids), ("--json", as_json), ("--logprobs", logprobs)) if value]
    if given:
        raise UsageError("--chat is for people", expected="messages, line by line", found=", ".join(given))


def _chat(
    bundle: Path,
    prompt: str | None,
    keep: KeepOptions,
    sampling: SamplingOptions,
    drafting: DraftOptions,
    backend: BackendOptions,
    max_new_tokens: int,
    stop: tuple[str, ...],
    threads: int | None,
) -> None:
    with loading():
        from gsx.workflows.chat import Chat
        from gsx.workflows.generate import Generator
        from gsx_engines.sampling import Sampling
        from gsx_plugins.errors import UsageError

    values = vars(sampling) | {"logit_bias": sampling.logit_bias or {}}
    source = Generator(bundle, keep.settings(), Sampling(**values), threads=threads, **vars(drafting), **vars(backend))
    chat = Chat(source, max_new_tokens, stop)
    for message in _messages(prompt):
        try:
            result = chat.answer(message, _write)
        except KeyboardInterrupt:
            print(flush=True)
            if not forget_ctrl_c():
                raise
            remark("(interrupted)")
        except UsageError as error:  # of this message: the chat goes on
            remark(error.message)
        else:
            print(flush=True)
            remark(statistics(result))


def _messages(first: str | None) -> Iterator[str]:
    """The messages of a user, until the input ends; Ctrl-C drops the line that is being written."""
    if first is not None:
        yield first
    while True:
        try:
            if sys.stdin.isatty():
                sys.stderr.write("> ")
                sys.stderr.flush()
            line = sys.stdin.buffer.readline()
        except KeyboardInterrupt:
            if not forget_ctrl_c():
                raise
            remark("(Ctrl-D ends the chat)")
            continue
        if not line:
            return
        message = line.decode("utf-8", errors="surrogateescape").strip()
        if message:
            yield message


def statistics(result: GenerateResult) -> str:
    """One line of statistics: tokens, speed, share kept."""
    stats = result.stats
    parts = [f"{stats.new_tokens} tokens ({result.finish})"]
    if stats.decode_tokens_per_second is not None:
        parts.append(f"{stats.decode_tokens_per_second:.1f} tokens/s")
    parts.append(f"first token after {stats.prefill_seconds * 1000:.0f} ms")
    if stats.held_share is not None:
        parts.append(f"new tokens kept {stats.held_share:.1%} at budget {result.budget:g}, held")
    elif stats.kept_share is not None:
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
