"""The weights file of a bundle: every tensor is stored once, streamed from the checkpoint.

One tensor is in memory at a time, of experts one expert's. Linear weights are stored [in, out], as MatMul reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from torch import Tensor

from gsx_plugins.progress import OnProgress, Progress, silent

# ONNX Runtime maps external data into memory if it starts at a page boundary; small tensors need not.
PAGE_BYTES = 4096
SMALL_BYTES = 1 << 20
SMALL_ALIGNMENT_BYTES = 64

# Only a name here: PyTorch computes nothing in it, and its stubs lack it.
FOUR_BITS: torch.dtype = torch.int4  # type: ignore[attr-defined]

ONNX_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.int8: onnx.TensorProto.INT8,
    FOUR_BITS: onnx.TensorProto.INT4,
    torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN,
}


@dataclass(frozen=True)
class Weight:
    """A tensor of the graphs and where it comes from.

    Args:
        name: initializer name.
        source: the parameter that it is read from, with the prefix of a whole model's (`Checkpoint.parameter`).
        transpose: whether it is a linear weight, [out, in] in the checkpoint and [in, out] in the graph.
        dtype: type to store it in.
        encode: applied to the tensor (in the graph's layout) before it is stored; None to store it as it is.
        stack: the tensors of the checkpoint that it consists of, along a first axis, each encoded by itself; empty if
            it is one tensor.
        rows: which rows of the checkpoint's tensor it consists of, in order; empty if of all.
    """

    name: str
    source: str
    transpose: bool
    dtype: torch.dtype
    encode: Callable[[Tensor], Tensor] | None = None
    stack: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()


@dataclass
class WeightsFile:
    """A weights file: initializers that refer to it, by name; its hash and its size."""

    initializers: dict[str, onnx.TensorProto]
    sha256: str
    size_bytes: int


def write_weights(
    path: Path,
    weights: Sequence[Weight],
    read: Callable[[str], Tensor],
    size: Callable[[str], int],
    on_progress: OnProgress = silent,
) -> WeightsFile:
    """Write all weights to one file.

    Args:
        path: file to create; the graphs refer to it by its name.
        weights: without repetition.
        read: name of a parameter, as `Weight.source` has it -> tensor.
        size: the same -> bytes that are read for it.
        on_progress: called after each tensor, with the bytes read.
    """
    initializers: dict[str, onnx.TensorProto] = {}
    digest = hashlib.sha256()
    done, total = 0, sum(size(part) for weight in weights for part in _parts(weight))
    with path.open("wb") as stream:
        for weight in weights:
            start, length = stream.tell(), 0
            for part in _parts(weight):
                tensor = _in_layout(weight, read(part))
                stored = _pairs(tensor) if weight.dtype == FOUR_BITS else tensor.to(weight.dtype)
                data = stored.contiguous().flatten().view(torch.uint8).numpy().data
                if not length:
                    start = _pad(stream, digest, data.nbytes * max(len(weight.stack), 1))
                stream.write(data)
                digest.update(data)
                length += data.nbytes
                done += size(part)
                on_progress(Progress("writing weights", done, total, unit="bytes"))
            shape = (*((len(weight.stack),) if weight.stack else ()), *tensor.shape)
            initializers[weight.name] = _external(
                weight.name, ONNX_TYPES[weight.dtype], shape, path.name, start, length
            )
        written = stream.tell()
    return WeightsFile(initializers, digest.hexdigest(), written)


def _parts(weight: Weight) -> tuple[str, ...]:
    """What a weight is read from, in order."""
    return weight.stack or (weight.source,)


def _in_layout(weight: Weight, tensor: Tensor) -> Tensor:
    """A tensor of the checkpoint as the graph has it."""
    if weight.rows:
        tensor = tensor[list(weight.rows)]
    if weight.transpose:
        tensor = tensor.t()
    return tensor if weight.encode is None else weight.encode(tensor)


def _pairs(codes: Tensor) -> Tensor:
    """4-bit codes (int8) as ONNX stores them: two in a byte, in order, the first one in the low bits."""
    flat = codes.contiguous().flatten().to(torch.int8).view(torch.uint8) & 0xF
    even = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).view(-1, 2)
    return even[:, 0] | (even[:, 1] << 4)


def _pad(stream: BinaryIO, digest: hashlib._Hash, size: int) -> int:
    """Write padding up to an offset where a tensor of this size may start. Returns: the offset."""
    alignment = PAGE_BYTES if size >= SMALL_BYTES else SMALL_ALIGNMENT_BYTES
    padding = bytes(-stream.tell() % alignment)
    stream.write(padding)
    digest.update(padding)
    return stream.tell()


def _external(
    name: str, onnx_type: int, shape: tuple[int, ...], location: str, offset: int, length: int
) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=name, data_type=onnx_type, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor
