"""Greedy text: a runner writes it in single steps, the reference reads it, and the two are compared token by token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gsx.parity.store import Rows, Store
from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_engines.runners.base import Runner


@dataclass(frozen=True)
class GreedyText:
    """A text that a runner wrote greedily, or, after a prompt, the tokens that it would have written of another's text.

    Args:
        prompt: ids; tokens: those of the text after it; best: those that the runner found most likely there.
        kept: of each step, rows kept [L, 2]; None for a dense model.
        logits: [n, V] of each step.
    """

    prompt: list[int]
    tokens: list[int]
    best: list[int]
    kept: list[np.ndarray | None]
    logits: Rows


@dataclass(frozen=True)
class ReferenceStep:
    """What the reference says of one step.

    Args:
        all_logits: [n, V]; row: the step's.
        keep, margins: [L, 2, S], decisions on the step's tokens.
        nearest_route: the smallest margin of a choice of experts (`Routes`).
    """

    all_logits: Rows
    row: int
    keep: np.ndarray
    margins: np.ndarray
    nearest_route: float = math.inf

    @property
    def logits(self) -> np.ndarray:
        """[V]."""
        found: np.ndarray = self.all_logits[self.row : self.row + 1][0]
        return found


@dataclass(frozen=True)
class Mismatch:
    """A token of the greedy continuation that differs.

    Args:
        position: number of the new token, from 0.
        reference_token, engine_token: ids.
        margin: difference of the reference's two best logits.
        excused: why it is not an error, or None.
    """

    position: int
    reference_token: int
    engine_token: int
    margin: float
    excused: str | None


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation, token by token: the fast runner's tokens are fed to all sides.

    As long as all tokens agree, this is what all would have generated on their own. After a difference the comparison
    continues with the next token.

    Args:
        tokens: new tokens compared.
        mismatches: tokens that differ.
        flips: branches of a step that kept another number of rows, near ties or not; wrong_flips: steps in which the
            first of them was not a near tie and did not follow from one.
        max_abs_logits: largest difference of the logits, before any flip.
    """

    tokens: int
    mismatches: tuple[Mismatch, ...]
    flips: int
    wrong_flips: int
    max_abs_logits: float

    @property
    def wrong(self) -> tuple[Mismatch, ...]:
        """Mismatches that nothing excuses."""
        return tuple(mismatch for mismatch in self.mismatches if mismatch.excused is None)


def write(
    runner: Runner,
    prompt: Sequence[int],
    new_tokens: int,
    controls: RuntimeValues,
    store: Store,
    tokens: Sequence[int] = (),
) -> GreedyText:
    """Let a runner continue a prompt in single steps, past any end-of-text.

    Args: tokens: those to feed, of a text that another runner wrote; empty to feed the runner's own.
    """
    cache = runner.new_cache(1, len(prompt) + new_tokens)
    best: list[int] = []
    fed: list[int] = list(tokens)
    kept = []
    logits = np.zeros((new_tokens, runner.manifest.decoder.vocab_size), np.float32)
    ids = np.array([prompt], np.int64)
    for number in range(new_tokens):
        output = runner.step(cache, ids, controls)
        logits[number] = output.logits[0, -1]
        kept.append(output.kept)
        best.append(int(logits[number].argmax()))
        if len(fed) == number:
            fed.append(best[-1])
        ids = np.array([[fed[number]]], np.int64)
    return GreedyText(list(prompt), fed, best, kept, store.put(logits))


def follow(
    text: GreedyText,
    steps: Sequence[ReferenceStep],
    places: Sequence[tuple[int, Branch]],
    *,
    logit_tolerance: Callable[[np.ndarray], float],
    near_tie: float,
    near_route: float = 0.0,
) -> Greedy:
    """Compare the tokens that a runner found most likely with the reference's.

    Args:
        places: layers and branches that the keep rule may skip.
        logit_tolerance: from the reference's logits [V], the lead of the best token up to which another may win.
        near_tie: margin up to which a decision may flip; near_route: the same of a choice of experts.
    """
    mismatches: list[Mismatch] = []
    flips = wrong_flips = 0
    max_abs = 0.0
    near_tie_flip: int | None = None
    near_choice: int | None = None  # runners do not report experts: from here on another one may have been chosen
    for number, (step, kept, token) in enumerate(zip(steps, text.kept, text.best, strict=True)):
        logits, wanted_logits = text.logits[number : number + 1][0], step.logits
        if kept is not None:
            columns = [(layer, BRANCHES.index(branch)) for layer, branch in places]
            differ = [place for place in columns if kept[place] != step.keep[place].sum()]
            flips += len(differ)
            if differ and near_tie_flip is None:
                if step.margins[differ[0]].min() <= near_tie:
                    near_tie_flip = number
                else:
                    wrong_flips += 1
        if near_choice is None and step.nearest_route <= near_route:
            near_choice = number
        if near_tie_flip is None and near_choice is None:
            error = float(np.abs(logits.astype(np.float64) - wanted_logits).max())
            max_abs = max(max_abs, error if np.isfinite(error) else np.inf)
        wanted = int(wanted_logits.argmax())
        if token != wanted:
            best = np.partition(wanted_logits, -2)[-2:]
            margin = float(best[1] - best[0])
            excused = None
            if near_tie_flip is not None:
                excused = f"a near-tie decision flipped at token {near_tie_flip}"
            elif near_choice is not None:
                excused = f"two experts were nearly equal at token {near_choice}"
            elif margin <= logit_tolerance(wanted_logits):
                excused = "the reference's two best logits are nearer than the logit tolerance"
            mismatches.append(Mismatch(number, wanted, token, margin, excused))
    return Greedy(len(steps), tuple(mismatches), flips, wrong_flips, max_abs)
