"""GPTQ: codes of a weight that make up for what rounding changes.

GPTQ (Frantar et al., arXiv 2210.17323) rounds one input channel after the other, and moves the error of the outputs,
as the inputs on a text show it, into the channels that are still to come.
"""

from __future__ import annotations

import torch
from modelopt.torch.quantization.utils.calib_utils import compute_hessian_inverse
from torch import Tensor

from gsx_exporter.quantization.codes import Encoded, encoded, ranges, round_values
from gsx_exporter.quantization.scheme import WeightFormat

# Share of the mean diagonal that is added to the Hessian, as in the paper; and the inputs that are rounded before their
# errors are passed on to the rest.
_DAMPING, _CHUNK = 0.01, 128


def gptq(weight: Tensor, hessian: Tensor, form: WeightFormat, dtype: torch.dtype) -> Encoded:
    """Codes of a weight [in, out] float32 whose outputs change as little as possible on a text.

    Args: hessian: [in, in] float32, a multiple of the inputs' second moments. dtype: of the scales.
    """
    # [in, in], upper triangular: row k says how the error of input k is made up for by the inputs after it.
    factor = compute_hessian_inverse(hessian, weight.t(), _DAMPING)
    left = weight.clone()
    codes = torch.empty_like(weight)
    size = form.block_size or len(weight)
    blocks: list[tuple[Tensor, Tensor | None]] = []  # scales and zero-points
    for start in range(0, len(weight), _CHUNK):
        stop = min(start + _CHUNK, len(weight))
        errors = torch.empty_like(weight[start:stop])
        for k in range(start, stop):
            if k % size == 0:  # the block as it is now, with the errors of the earlier ones
                blocks.append(ranges(left[None, k : k + size], form, dtype))
            scales, zeros = blocks[-1]
            codes[k] = round_values(left[k], scales[0], None if zeros is None else zeros[0], form)
            rounded = (codes[k] if zeros is None else codes[k] - zeros[0]) * scales[0].float()
            errors[k - start] = (left[k] - rounded) / factor[k, k]
            left[k + 1 : stop].addr_(factor[k, k + 1 : stop], errors[k - start], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    all_zeros = [zeros for _, zeros in blocks if zeros is not None]
    return encoded(
        codes, torch.cat([scales for scales, _ in blocks]), torch.cat(all_zeros) if all_zeros else None, form
    )
