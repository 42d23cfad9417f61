"""The counters of one call of `generate`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationStats:
    """Counters of one `generate` call.

    Args:
        prompt_tokens, new_tokens: over all sequences.
        sequences: how many there are.
        prefill_seconds: time of the first call, until the first tokens are chosen.
        decode_seconds: time of all later rounds.
        decode_steps: number of later rounds; each has one verification or one plain step.
        draft_seconds, verify_seconds, search_seconds: parts of decode_seconds: in draft steps, in verifications and
            plain steps, and in the search for a better draft. The rest is spent in the loop itself.
        drafted, accepted: by position in the draft, from its first token on: how often a token was drafted there after
            only correct ones, and how often it was correct itself.
        draft_rounds: of each verification of a sequence's draft, the number of drafted tokens and of those accepted.
        kept_rows, gated_rows: rows that skippable branches ran on, and rows that the keep rule decided on, in all
            layers that the model itself ran; 0 for a dense model.
        held_kept_rows, held_gated_rows: the same of the new tokens alone whose budget was held; drafted tokens that
            were wrong do not count.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    sequences: int = 1
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    search_seconds: float = 0.0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    draft_rounds: tuple[tuple[int, int], ...] = ()
    kept_rows: int = 0
    gated_rows: int = 0
    held_kept_rows: int = 0
    held_gated_rows: int = 0

    @property
    def kept_share(self) -> float | None:
        """Share of (token, branch) pairs kept; None for a dense model."""
        return self.kept_rows / self.gated_rows if self.gated_rows else None

    @property
    def held_share(self) -> float | None:
        """Share of (token, branch) pairs that new tokens kept; None where no budget was held."""
        return self.held_kept_rows / self.held_gated_rows if self.held_gated_rows else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens after the first of each sequence, divided by the time that they took."""
        return (self.new_tokens - self.sequences) / self.decode_seconds if self.decode_seconds else None

    @property
    def tokens_per_verification(self) -> float | None:
        """New tokens of a sequence per round; above 1 if drafts were accepted."""
        return (self.new_tokens - self.sequences) / self.sequences / self.decode_steps if self.decode_steps else None

    @property
    def acceptance(self) -> float | None:
        """Probability that a drafted token is correct, given that those before it are; None if nothing was drafted."""
        return sum(self.accepted) / sum(self.drafted) if sum(self.drafted) else None
