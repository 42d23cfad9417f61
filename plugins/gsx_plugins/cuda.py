"""The CUDA kernels for PyTorch: their C interface through ctypes, and as the CUDA implementation of the torch ops.

`bind()` makes `gsx::topk_gather`, `gsx::threshold_gather` and `gsx::gated_scatter_add` run the kernels for CUDA
tensors. The results are the same to the bit, and autograd is that of the ops. Kernels run on torch's current stream and
never synchronize. An op whose number of rows depends on the data has to wait for that number, unless it is known (K of
`topk_gather` as a CPU tensor). Attention has no kernel of its own: `bind()` makes it call PyTorch's fused attention,
which with a mask needs as many K/V heads as query heads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from gsx_plugins.attention import attend
from gsx_plugins.errors import PluginLibraryError
from gsx_plugins.gated_scatter_add.op import gated_scatter_add
from gsx_plugins.gathered_attention.op import gathered_attention
from gsx_plugins.library import find_kernels
from gsx_plugins.threshold_gather.op import threshold_gather
from gsx_plugins.topk_gather.op import topk_gather

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_POINTER, _SIZE, _INT64, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
_SCRATCH_AND_STREAM = (_POINTER, _SIZE, _POINTER)
_SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    "gsx_error_string": (ctypes.c_char_p, (_INT,)),
    "gsx_topk_select_workspace": (_SIZE, (_INT64,)),
    "gsx_topk_select": (_INT, (_POINTER, _POINTER, _INT64, _POINTER, _POINTER, *_SCRATCH_AND_STREAM)),
    "gsx_threshold_select_workspace": (_SIZE, (_INT64,)),
    "gsx_threshold_select": (_INT, (_POINTER, _POINTER, _INT64, _INT64, _POINTER, _POINTER, *_SCRATCH_AND_STREAM)),
    "gsx_gather_rows": (
        _INT,
        (_POINTER, _INT64, _INT64, _INT, _POINTER, _POINTER, _INT64, _POINTER, _POINTER),
    ),
    "gsx_gated_scatter_add_workspace": (_SIZE, (_INT64,)),
    "gsx_gated_scatter_add": (
        _INT,
        (*(_POINTER,) * 5, *(_INT64,) * 4, _INT, _POINTER, *_SCRATCH_AND_STREAM),
    ),
    "gsx_skip_linear": (_INT, (*(_POINTER,) * 4, *(_INT64,) * 4, _INT, _POINTER, _POINTER)),
    "gsx_skip_gate_up": (_INT, (*(_POINTER,) * 5, *(_INT64,) * 4, _INT, _POINTER, _POINTER)),
    "gsx_skip_linear_add": (_INT, (*(_POINTER,) * 6, *(_INT64,) * 5, _INT, _POINTER, _POINTER)),
    "gsx_gate_linear": (_INT, (*(_POINTER,) * 2, *(_INT64,) * 3, _INT, _POINTER, _POINTER)),
    "gsx_step_attention_workspace": (_SIZE, (_INT64,) * 6),
    "gsx_step_attention": (_INT, (_POINTER, _POINTER)),
}
_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}


class _Matrix(ctypes.Structure):
    """`gsx_matrix`."""

    _fields_ = (("values", _POINTER), ("scales", _POINTER), ("blocks", _INT64), ("type", _INT))


_TENSORS = ("query", "key", "value", "cos", "sin", "score", "threshold", "mask", "write_at", "past_key", "past_value")
_MEMORY = ("present_key", "present_value", "out", "workspace", "counters")
_SIZES = (
    "sequences",
    "tokens",
    "heads",
    "kv_heads",
    "columns",
    "width",
    "rotated",
    "thresholds",
    "queries",
    "window",
    "new_stride",
)


class _Attention(ctypes.Structure):
    """`gsx_attention`."""

    _fields_ = (
        *((name, _POINTER) for name in (*_TENSORS, *_MEMORY)),
        *((name, _INT64) for name in (*_SIZES, "workspace_bytes")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("rotate_query", _INT),
        ("rotate_key", _INT),
        ("type", _INT),
    )


@dataclass(frozen=True)
class StepAttention:
    """What the attention of a step reads, as `step_attention/kernel.h` says; N rows are B sequences of S tokens.

    Args:
        query: [N, heads x D], or [0, heads x D] to write keys and values alone.
        key, value: [N, K/V heads x D], with rows equally far apart.
        mask: [B, 1, S, T] bool.
        write_at: [B] int64.
        tables: cosines and sines [N, rotated / 2] by which queries and keys are turned; None: neither.
        score, threshold: [N] and [N] or [], float32; None: all rows are kept.
        window: columns that a token sees at most, itself included; 0: all.
        scale, softcap: of scores; 0: 1 / sqrt(D), and no cap.
        rotates: whether queries are turned, and whether keys are.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    write_at: Tensor
    tables: tuple[Tensor, Tensor] | None = None
    score: Tensor | None = None
    threshold: Tensor | None = None
    window: int = 0
    scale: float = 0.0
    softcap: float = 0.0
    rotates: tuple[bool, bool] = (True, True)


@dataclass(frozen=True)
class Codes:
    """A matrix in 8 bits, code x scale.

    Args:
        values: [I, O], int8 or float8_e4m3fn.
        scales: [B, O], each of I / B inputs of a column, in the rows' type; B is 1 for float8. Of gates [1, O] float32.
    """

    values: Tensor
    scales: Tensor


def matrix_of(weight: Tensor | Codes) -> _Matrix:
    """A matrix as `skip_branch/kernel.h` takes it; it must outlive the call."""
    if isinstance(weight, Codes):
        return _Matrix(
            weight.values.data_ptr(), weight.scales.data_ptr(), len(weight.scales), _CODES[weight.values.dtype]
        )
    return _Matrix(weight.data_ptr(), None, 0, 0)


def _shape(weight: Tensor | Codes) -> torch.Size:
    return weight.values.shape if isinstance(weight, Codes) else weight.shape


class Kernels:
    """The kernels of one library. Tensors must be contiguous and on one CUDA device; letters as in the ops.

    Args:
        path: a library with the kernels' C interface.
    Raises:
        PluginLibraryError: the library does not load; later, a kernel refuses its arguments or fails to start.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, list(arguments)
        except (OSError, AttributeError) as error:
            raise PluginLibraryError(
                f"the kernel library {path} does not load", found=str(error), todo="gsx plugins build --force"
            ) from error

    def topk_select(self, score: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the K best scores: score [N] float32, k [1] int64 -> index [N] int64, count [] int64.

        Only the first `count` elements of index are set, in ascending order.
        """
        return self._select("gsx_topk_select", score, k.data_ptr())

    def threshold_select(self, score: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of the scores above a threshold, [] or [N] float32; the results are like those of `topk_select`."""
        return self._select("gsx_threshold_select", score, threshold.data_ptr(), threshold.numel())

    def gather_rows(self, x: Tensor, index: Tensor, count: Tensor | None = None) -> Tensor:
        """x [N, H], index [capacity] int64 -> rows [capacity, H], of which the first `count` are set (None: all)."""
        rows = self.empty(x, (index.shape[0], x.shape[1]), x.dtype)
        pointers = (index.data_ptr(), None if count is None else count.data_ptr())
        self._call(
            "gsx_gather_rows", x, x.data_ptr(), *x.shape, TYPES[x.dtype], *pointers, index.shape[0], rows.data_ptr()
        )
        return rows

    def gated_scatter_add(
        self, residual: Tensor, rows: Tensor, gate: Tensor, index: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """The op `GatedScatterAdd`; `out` may be `residual`, then only the rows that index names are changed."""
        out = self.empty(residual, residual.shape, residual.dtype) if out is None else out
        scratch = self._scratch("gsx_gated_scatter_add", residual, residual.shape[0])
        pointers = (tensor.data_ptr() for tensor in (residual, rows, gate, index))
        sizes = (residual.shape[0], rows.shape[0], residual.shape[1], gate.shape[1])
        self._call(
            "gsx_gated_scatter_add",
            residual,
            *pointers,
            None,
            *sizes,
            TYPES[residual.dtype],
            out.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
        )
        return out

    def skip_linear(self, x: Tensor, score: Tensor, threshold: Tensor, weight: Tensor | Codes) -> Tensor:
        """x [N, I], score [N], threshold [] or [N], weight [I, O] -> x W [N, O], 0 in rows that are not kept."""
        return self._skip("gsx_skip_linear", [x, score, threshold], [weight])

    def skip_gate_up(
        self, x: Tensor, score: Tensor, threshold: Tensor, gate: Tensor | Codes, up: Tensor | Codes
    ) -> Tensor:
        """silu(x G) * (x U) [N, O]; rows that are not kept are not written."""
        return self._skip("gsx_skip_gate_up", [x, score, threshold], [gate, up])

    def skip_linear_add(
        self, residual: Tensor, x: Tensor, gate: Tensor, score: Tensor, threshold: Tensor, weight: Tensor | Codes
    ) -> Tensor:
        """residual [N, O] + gate [N, O or 1] * (x W); rows that are not kept stay as they are."""
        return self._skip("gsx_skip_linear_add", [residual, x, gate, score, threshold], [weight], gate.shape[1])

    def gate_linear(self, x: Tensor, weight: Tensor | Codes) -> Tensor:
        """x [N, I], weight [I, O] -> x W [N, O] float32."""
        inner, width = _shape(weight)
        out = self.empty(x, (len(x), width), torch.float32)
        matrix = matrix_of(weight)
        self._call(
            "gsx_gate_linear",
            x,
            x.data_ptr(),
            ctypes.addressof(matrix),
            len(x),
            inner,
            width,
            TYPES[x.dtype],
            out.data_ptr(),
        )
        return out

    def step_attention(
        self,
        of: StepAttention,
        past: tuple[Tensor, Tensor],
        present: tuple[Tensor, Tensor] | None = None,
        counters: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step, which writes its keys and values into the cache.

        Args:
            past: K and V, [B, K/V heads, T, D] each.
            present: where they are afterwards; None: in the same memory.
            counters: 4,096 zeros of 32 bits; None: the call clears its own.
        Returns: rows [N, heads x D]; those that are not kept are not written.
        """
        (cache, _), (batch, _, tokens, columns) = past, of.mask.shape
        _, kv_heads, _, width = cache.shape
        sizes = (batch, tokens, of.query.shape[1] // width, kv_heads, columns, width)
        needed = int(self._library.gsx_step_attention_workspace(*sizes))
        scratch = self.empty(of.query, (needed,), torch.uint8)
        out = self.empty(of.query, of.query.shape, of.query.dtype)
        tables = of.tables or (None, None)
        tensors = (of.query, of.key, of.value, *tables, of.score, of.threshold, of.mask, of.write_at, *past)
        memory = (*(present or past), out, scratch, counters)
        call = _Attention(
            *(None if one is None else one.data_ptr() for one in (*tensors, *memory)),
            *sizes,
            0 if of.tables is None else 2 * of.tables[0].shape[1],
            0 if of.threshold is None else of.threshold.numel(),
            len(of.query),
            of.window,
            of.key.stride(0),
            needed,
            of.scale,
            of.softcap,
            *(of.tables is not None and rotates for rotates in of.rotates),
            TYPES[of.query.dtype],
        )
        self._call("gsx_step_attention", of.query, ctypes.addressof(call))
        return out

    def _skip(
        self, name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor | Codes], *gate_width: int
    ) -> Tensor:
        """A product of `skip_branch/kernel.h`. Args: tensors: the first of the rows' type, the last the threshold."""
        rows, threshold, shape = tensors[0], tensors[-1], _shape(weights[0])
        out = self.empty(rows, (len(rows), shape[1]), rows.dtype)
        matrices = [matrix_of(weight) for weight in weights]
        pointers = [tensor.data_ptr() for tensor in tensors] + [ctypes.addressof(matrix) for matrix in matrices]
        sizes = (threshold.numel(), len(rows), *shape, *gate_width)
        self._call(name, rows, *pointers, *sizes, TYPES[rows.dtype], out.data_ptr())
        return out

    def _select(self, name: str, score: Tensor, *limit: int) -> tuple[Tensor, Tensor]:
        index = self.empty(score, score.shape, torch.int64)
        count = self.empty(score, (), torch.int64)
        scratch = self._scratch(name, score, score.shape[0])
        pointers = (score.data_ptr(), *limit, score.shape[0], index.data_ptr(), count.data_ptr())
        self._call(name, score, *pointers, scratch.data_ptr(), scratch.numel())
        return index, count

    def _scratch(self, name: str, like: Tensor, tokens: int) -> Tensor:
        size = int(getattr(self._library, f"{name}_workspace")(tokens))
        return self.empty(like, (size,), torch.uint8)

    def empty(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result or for scratch on the device of a tensor. (Tests override it with guarded memory.)"""
        return like.new_empty(shape, dtype=dtype)

    def _call(self, name: str, like: Tensor, *arguments: int | None) -> None:
        """Call a kernel on the device of a tensor, and on its current stream."""
        if like.is_cuda:
            with torch.cuda.device(like.device):
                status = getattr(self._library, name)(*arguments, torch.cuda.current_stream().cuda_stream)
        else:
            status = getattr(self._library, name)(*arguments, None)
        if status:
            text = self._library.gsx_error_string(status).decode()
            raise PluginLibraryError(
                f"{name}: {text} (status {status})", todo="check shapes, types and devices of the tensors"
            )


@cache
def load_kernels() -> Kernels:
    """Load the kernels of the library that was built.

    Raises:
        PluginLibraryError: there is none.
    """
    path = find_kernels()
    if path is None:
        raise PluginLibraryError("the CUDA kernels are not built", todo="gsx plugins build --kernels-only")
    return Kernels(path)


def bind() -> Kernels:
    """Make the torch ops run the kernels for CUDA tensors. Calling it again changes nothing.

    Raises:
        PluginLibraryError: no library was built, or it does not load.
    """
    kernels = load_kernels()
    if not _bound:
        _bound.append(kernels)
        topk_gather.register_kernel("cuda")(lambda *tensors: run_topk_gather(kernels, *tensors))
        threshold_gather.register_kernel("cuda")(lambda *tensors: run_threshold_gather(kernels, *tensors))
        gated_scatter_add.register_kernel("cuda")(lambda *tensors: run_gated_scatter_add(kernels, *tensors))
        gathered_attention.register_kernel("cuda")(run_gathered_attention)
    return kernels


_bound: list[Kernels] = []


def run_topk_gather(kernels: Kernels, x: Tensor, score: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The op `topk_gather` on the kernels. With k on the CPU, nothing waits for the GPU."""
    index, count = kernels.topk_select(score.contiguous(), _beside(k, x))
    return _gathered(kernels, x, index, count, known=None if k.is_cuda else min(max(int(k), 0), len(score)))


def run_threshold_gather(
    kernels: Kernels, x: Tensor, score: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `threshold_gather` on the kernels."""
    index, count = kernels.threshold_select(score.contiguous(), _beside(threshold.contiguous(), x))
    return _gathered(kernels, x, index, count)


def run_gated_scatter_add(kernels: Kernels, residual: Tensor, rows: Tensor, gate: Tensor, index: Tensor) -> Tensor:
    """The op `gated_scatter_add` on the kernels."""
    return kernels.gated_scatter_add(*(tensor.contiguous() for tensor in (residual, rows, gate, index)))


def run_gathered_attention(
    query: Tensor,
    index: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    num_heads: int,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """The op `gathered_attention` as one call of fused attention per sequence; a single sequence needs no waiting."""
    batch, _, length, _ = mask.shape
    ends = [len(index)]
    if batch > 1:
        limits = torch.arange(1, batch + 1, device=index.device) * length
        ends = torch.searchsorted(index.contiguous(), limits).tolist()
    parts, first = [], 0
    for b, end in enumerate(ends):
        if end > first:
            split = query[first:end].view(end - first, num_heads, -1).transpose(0, 1).unsqueeze(0)
            seen = mask[b, 0].index_select(0, index[first:end] - b * length)[None, None]
            rows = attend(split, key[b : b + 1], value[b : b + 1], seen, scale, softcap)
            parts.append(rows[0].transpose(0, 1).reshape(end - first, -1))
        first = end
    return torch.cat(parts) if parts else torch.zeros_like(query)


def _beside(limit: Tensor, x: Tensor) -> Tensor:
    """A tensor of one element, on the device of x. The value of a CPU tensor is filled in, since a copy would wait."""
    if limit.device == x.device:
        return limit
    return torch.full(limit.shape, limit.item(), dtype=limit.dtype, device=x.device)


def _gathered(
    kernels: Kernels, x: Tensor, index: Tensor, count: Tensor, known: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    kept = index[: int(count) if known is None else known]
    return kernels.gather_rows(x.contiguous(), kept), kept, count
