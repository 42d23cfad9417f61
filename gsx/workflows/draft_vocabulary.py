"""The tokens that the draft of an export chooses among."""

from __future__ import annotations

from gsx.workflows.draft_plan import DraftPlan
from gsx.workflows.export_text import ExportText
from gsx_engines.bundle.drafts import DraftVocabulary
from gsx_engines.bundle.selection import CalibrationText
from gsx_exporter.config import ModelConfig


def draft_vocabulary_of(
    drafting: DraftPlan, text: ExportText, config: ModelConfig
) -> tuple[tuple[int, ...] | None, DraftVocabulary | None]:
    """The ids in ascending order, and the manifest's entry; None, twice, where the draft chooses among all tokens."""
    if drafting.vocabulary is None:
        return None, None
    frequency = text.frequency
    assert frequency is not None
    tokens = frequency.most_frequent(drafting.vocabulary, config.eos_ids)
    counted = CalibrationText(name=frequency.name, sha256=frequency.sha256, tokens=frequency.tokens)
    return tokens, DraftVocabulary(tokens=len(tokens), covered=frequency.covered(tokens), text=counted)
