"""The call of the reference in progress."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gsx_exporter.reference.rule import BranchInput, Decision, Masker


@dataclass
class Call:
    """Its masker, and what the branches record. Masks are [B, S].

    Args:
        has_kv: with the K/V policy `none`, layer -> [B, past] bool: which tokens have K and V there; else None.
        running: the branch whose result the rule has not seen yet.
        visit, left: in a looped model, the number of the visit that runs next, and the state that left the last one.
    """

    masker: Masker
    valid: torch.Tensor
    decisions: list[list[Decision]]
    has_kv: dict[int, torch.Tensor] | None
    running: tuple[BranchInput, Decision] | None = None
    visit: int = 0
    left: torch.Tensor | None = None
