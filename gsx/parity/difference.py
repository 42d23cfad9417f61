"""The difference of two sides' numbers, with all its statistics; whether it is small enough is decided in `checks.py`.

NaN and infinity count as failures, and so does comparing nothing at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gsx.parity.store import Rows

# Values that are compared at a time, in float64: a window's logits are the largest, and several arrays of them at once
# would be the largest thing in memory.
_BLOCK_VALUES = 250_000


@dataclass(frozen=True)
class Place:
    """Where something was found: number of the window (or sequence), token; layer and branch if any."""

    window: int
    position: int
    layer: int | None = None
    branch: str | None = None

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f"layer {self.layer}"]
        parts += [] if self.branch is None else [self.branch]
        return ", ".join([*parts, f"token {self.position} of window {self.window}"])


@dataclass(frozen=True)
class Comparison:
    """Statistics of the difference between two sides.

    Args:
        values: numbers compared; 0 is a failure.
        not_finite: pairs in which a value is NaN or infinite; any such pair is a failure.
        max_abs, mean_abs, rms: of the difference.
        reference_rms, reference_max: of the reference.
        max_relative: largest difference over its own scale, which is the larger of two root mean squares of the
            reference: of the token's vector, and of the whole tensor. So neither a token with huge states (as
            attention sinks have) nor one whose values nearly cancel is judged by a wrong scale. A state is a running
            sum over the layers, so that of its token is the largest of the layers so far (`Accumulator.add`).
        worst: where max_relative was.
    """

    values: int
    not_finite: int
    max_abs: float
    mean_abs: float
    rms: float
    reference_rms: float
    reference_max: float
    max_relative: float
    worst: Place | None

    @property
    def usable(self) -> bool:
        """Whether something was compared and all values were finite."""
        return self.values > 0 and self.not_finite == 0


@dataclass
class Accumulator:
    """Accumulates differences, call by call."""

    layer: int | None = None
    values: int = 0
    not_finite: int = 0
    max_abs: float = 0.0
    max_relative: float = 0.0
    reference_max: float = 0.0
    sum_abs: float = 0.0
    sum_squares: float = 0.0
    reference_squares: float = 0.0
    worst: Place | None = None

    def add(
        self, reference: Rows, found: Rows, clean: np.ndarray, window: int, largest_before: np.ndarray | None = None
    ) -> None:
        """Compare the tokens that are clean.

        Args:
            reference, found: [S, W]; clean: [S] bool.
            largest_before: [S] float64, of a running sum: each token's largest mean square in earlier layers; this one
                is taken into it. The last layers take the huge states of attention sinks away again; what is left has
                the rounding error of what was there.
        Raises: ValueError if the two have different shapes: that is not a numerical difference.
        """
        if reference.shape != found.shape:
            raise ValueError(f"shapes differ: the reference has {reference.shape}, the engine {found.shape}")
        if not clean.any():
            return
        length, width = reference.shape
        step = max(1, _BLOCK_VALUES // width)
        # Of each token: the mean square of the reference, and the largest error.
        squares, errors = (
            np.concatenate(parts)
            for parts in zip(
                *(
                    self._add_block(
                        reference[start : start + step], found[start : start + step], clean[start : start + step]
                    )
                    for start in range(0, length, step)
                ),
                strict=True,
            )
        )
        mean = squares.mean()
        if largest_before is not None:
            squares = largest_before[clean] = np.maximum(squares, largest_before[clean])
        scale = np.sqrt(np.maximum(squares, mean))
        relative = errors / np.maximum(scale, np.finfo(np.float32).tiny)
        place = int(relative.argmax())
        if self.worst is None or relative[place] > self.max_relative:
            self.max_relative = float(relative[place])
            self.worst = Place(window, int(np.flatnonzero(clean)[place]), self.layer)

    def _add_block(self, reference: np.ndarray, found: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add some rows. Returns: of each clean one, the mean square of the reference, and the largest error."""
        want, have = (rows[clean].astype(np.float64) for rows in (reference, found))
        if not len(want):
            return np.zeros(0), np.zeros(0)
        error = np.subtract(have, want, out=have)
        np.abs(error, out=error)
        # What is not finite on either side is not finite in the difference: equal infinities give NaN.
        bad = ~np.isfinite(error)
        self.values += want.size
        if bad.any():
            self.not_finite += int(bad.sum())
            error[bad] = np.inf
            want[~np.isfinite(want)] = 0.0
        squares = np.einsum("sw,sw->s", want, want)
        largest = error.max(axis=1)
        self.max_abs = max(self.max_abs, float(largest.max()))
        self.reference_max = max(self.reference_max, float(want.max()), -float(want.min()))
        self.sum_abs += float(error.sum())
        self.sum_squares += float(np.einsum("sw,sw->", error, error))
        self.reference_squares += float(squares.sum())
        return squares / want.shape[1], largest

    def result(self) -> Comparison:
        """The result over everything that was added."""
        count = max(self.values, 1)
        return Comparison(
            values=self.values,
            not_finite=self.not_finite,
            max_abs=self.max_abs,
            mean_abs=self.sum_abs / count,
            rms=math.sqrt(self.sum_squares / count),
            reference_rms=math.sqrt(self.reference_squares / count),
            reference_max=self.reference_max,
            max_relative=self.max_relative,
            worst=self.worst,
        )
