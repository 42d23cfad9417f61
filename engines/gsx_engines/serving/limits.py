"""What a request may ask for at most, whatever protocol it comes by: it is refused before it costs anything."""

from __future__ import annotations

from collections.abc import Sequence

from gsx_engines.tokens import BundleTokenizer
from gsx_plugins.errors import UsageError

# No token of any vocabulary is longer than this. A text longer than the context times this is refused before the
# tokenizer spends time on it.
MAX_TOKEN_BYTES = 256
# Limited, since the stop texts are compared with the text at every token.
MAX_STOPS, MAX_STOP_BYTES = 16, 256
# Enough to name every branch of a model with 400 layers; limited, since an error message repeats it.
MAX_LAYERS_BYTES = 4096


def check_stops(stop: Sequence[str]) -> None:
    """Refuse stop texts that are empty, too long, or too many."""
    longest = max((len(part.encode()) for part in stop), default=0)
    if "" in stop or len(stop) > MAX_STOPS or longest > MAX_STOP_BYTES:
        raise UsageError(
            "there are too many stop texts, or one has an invalid length",
            expected=f"at most {MAX_STOPS}, each of 1 to {MAX_STOP_BYTES} bytes",
            found="an empty one" if "" in stop else f"{len(stop)}, the longest with {longest} bytes",
        )


def check_layers(size: int) -> None:
    """Refuse a set of layers whose text is too long; size: in bytes."""
    if size > MAX_LAYERS_BYTES:
        raise UsageError("layers is too long", expected=f"at most {MAX_LAYERS_BYTES} bytes", found=f"{size} bytes")


def check_text_size(name: str, size: int, context: int) -> None:
    """Refuse a text that cannot fit into the context; size: in bytes."""
    most = MAX_TOKEN_BYTES * context
    if size > most:
        raise UsageError(f"{name} is too long", expected=f"at most {most} bytes", found=f"{size} bytes")


def check_ids_fit(count: int, context: int) -> None:
    """Refuse token ids that fill the whole context."""
    if count >= context:
        raise UsageError(
            "the prompt is longer than the context of this server",
            expected=f"fewer than {context} tokens",
            found=f"{count} tokens",
        )


def need_tokenizer(tokenizer: BundleTokenizer | None, expected: str, found: str) -> BundleTokenizer:
    """The bundle's tokenizer.

    Raises:
        UsageError: it has none.
    """
    if tokenizer is None:
        raise UsageError("this bundle has no tokenizer", expected=expected, found=found)
    return tokenizer
