"""The text that an export reads: a part to calibrate on, and the part after it, to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gsx.workflows.draft_plan import DraftPlan
from gsx.workflows.number_types import NumberTypes
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.frequency import Frequency, count_tokens
from gsx_exporter.rules.plan import RulePlan
from gsx_exporter.text import WINDOW_TOKENS, TokenText, text_after, tokenize
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress

# Tokens that the cost of quantization is measured on: on SmolLM2 they leave the KL divergence uncertain by a quarter.
MEASURED_TOKENS = 4096


@dataclass(frozen=True)
class ExportText:
    """The two parts of the text.

    Args:
        seen: to calibrate thresholds and ranges and to measure drafts on; None if the export reads no text.
        unseen: to measure on what quantization costs: what follows `seen`, or where nothing does, its end; None if
            nothing is quantized.
        frequency: how often the whole text has each token; None if nothing is chosen by that.
    """

    seen: TokenText | None = None
    unseen: TokenText | None = None
    frequency: Frequency | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is unusual about the text."""
        return (self.seen.note,) if self.seen is not None and self.seen.note is not None else ()


def read_export_text(
    checkpoint: Checkpoint,
    keep: RulePlan,
    types: NumberTypes,
    drafting: DraftPlan,
    path: str | Path | None,
    tokens: int,
    on_progress: OnProgress,
) -> ExportText:
    """Read as much text as this export needs.

    Args: path: UTF-8 text; None for the text that ships with gsx. tokens: how many of its tokens; frequencies are those
        of all.
    Raises:
        UsageError: a text is given but not needed.
        TextError: the text cannot be used.
    """
    if not (keep.calibrates or types.reads_text or drafting.search or drafting.vocabulary):
        if path is not None:
            raise UsageError(
                "--calibration: this export reads no text",
                found=f"policy {keep.name}",
                todo="leave it out",
            )
        return ExportText()
    source = Path(path) if path else None
    seen = tokenize(checkpoint, source, max_tokens=tokens, window=keep.window)
    frequency = count_tokens(checkpoint, source, on_progress) if drafting.vocabulary else None
    if types.quantize is None:
        return ExportText(seen, frequency=frequency)
    unseen = text_after(checkpoint, source, seen.tokens, MEASURED_TOKENS)
    end = TokenText(seen.ids[-MEASURED_TOKENS // WINDOW_TOKENS :], seen.sha256, seen.name)
    return ExportText(seen, unseen or end, frequency)
