"""GPTQ: codes of a weight that make up for what rounding changes.

GPTQ (Frantar et al., arXiv 2210.17323) rounds one input channel after the other, and moves the error of the outputs,
as the inputs on a text show it, into the channels that are still to come.
"""

from __future__ import annotations

import torch
from scipy.linalg import lapack
from torch import Tensor

from gsx_exporter.quantization.codes import Encoded, encoded, ranges, round_values
from gsx_exporter.quantization.scheme import WeightFormat

# Share of the mean diagonal that is added to the Hessian, as in the paper; and the inputs that are rounded before their
# errors are passed on to the rest.
DAMPING, _CHUNK = 0.01, 128
# Numbers that are put in reverse order at a time.
_REVERSED = 1 << 20


def gptq(weight: Tensor, hessian: Tensor, form: WeightFormat, dtype: torch.dtype) -> Encoded:
    """Codes of a weight [in, out] float32 whose outputs change as little as possible on a text.

    Args: hessian: [in, in] float32, a multiple of the inputs' second moments; it is overwritten. dtype: of the scales.
    """
    compensation = Compensation(weight, hessian)
    left = weight.clone(memory_format=torch.contiguous_format)
    size = form.block_size or len(weight)
    blocks: list[tuple[Tensor, Tensor | None]] = []  # scales and zero-points
    for start in range(0, len(weight), _CHUNK):
        stop = min(start + _CHUNK, len(weight))
        errors, factor = torch.empty_like(left[start:stop]), compensation.rows(start, stop)
        for k in range(start, stop):
            if k % size == 0:  # the block as it is now, with the errors of the earlier ones
                blocks.append(ranges(left[None, k : k + size], form, dtype))
            scales, zeros = blocks[-1]
            codes = round_values(left[k], scales[0], None if zeros is None else zeros[0], form)
            rounded = (codes if zeros is None else codes - zeros[0]) * scales[0].float()
            errors[k - start] = (left[k] - rounded) / factor[k - start, k]
            left[k] = codes  # in place of the weights, which are done: no second tensor of their size
            left[k + 1 : stop].addr_(factor[k - start, k + 1 : stop], errors[k - start], alpha=-1)
        left[stop:].addmm_(factor[:, stop:].t(), errors, alpha=-1)
    all_zeros = [zeros for _, zeros in blocks if zeros is not None]
    return encoded(left, torch.cat([scales for scales, _ in blocks]), torch.cat(all_zeros) if all_zeros else None, form)


class Compensation:
    """How the inputs after each input make up for its error: the upper triangular U with U^T U = H^-1.

    The Hessian of a wide input is the largest tensor of the work, so it is not copied: it is reversed in place, and
    LAPACK turns it into the factor in place. With the inputs in reverse order it is H = L L^T, and U is L^-1 in reverse
    order again.
    """

    def __init__(self, weight: Tensor, hessian: Tensor) -> None:
        work = _reverse(hessian)
        unread = (weight == 0).all(dim=1).flip(0)  # inputs that nothing reads: they make up for nothing
        work[unread] = 0
        work[:, unread] = 0
        diagonal = work.diagonal()
        diagonal[unread] = 1
        diagonal += DAMPING * diagonal.mean()
        factor, indefinite = lapack.spotrf(work.numpy().T, lower=1, clean=1, overwrite_a=1)
        if indefinite:  # rounding made it so: then no input makes up for another
            self._reversed = torch.eye(len(weight))
            return
        inverse, _ = lapack.strtri(factor, lower=1, overwrite_c=1)
        self._reversed = torch.from_numpy(inverse)

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows of U, [stop - start, in]."""
        last = len(self._reversed)
        return self._reversed[last - stop : last - start].flip(0, 1)


def _reverse(matrix: Tensor) -> Tensor:
    """Put rows and columns of a matrix in reverse order, in place."""
    flat = matrix.view(-1)
    for first in range(0, len(flat) // 2, _REVERSED):
        last = min(first + _REVERSED, len(flat) // 2)
        low, high = flat[first:last], flat[len(flat) - last : len(flat) - first]
        turned = low.flip(0)
        low.copy_(high.flip(0))
        high.copy_(turned)
    return matrix
