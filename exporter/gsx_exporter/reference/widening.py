"""Weights that are held as narrow as they are, and widened, on the computing device, while a part of the model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gsx_exporter.reference.loading import Unread


class Widening:
    """How weights are widened.

    Args:
        dtype, device: of the computation.
        unread: weights that are still in their files.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, unread: Unread) -> None:
        self.dtype, self.device, self._unread = dtype, device, unread

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Another type for a while."""
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    @contextmanager
    def widened(self, part: nn.Module) -> Iterator[None]:
        """Within it, the part's weights have the type, and are on the device, of the computation."""
        narrow = [(weight, weight.data) for weight in part.parameters()]
        for weight, _ in narrow:
            weight.data = self._values(weight).to(self.device, self.dtype)
        try:
            yield
        finally:
            for weight, data in narrow:
                weight.data = data

    def _values(self, weight: torch.Tensor) -> torch.Tensor:
        read = self._unread.get(weight) if isinstance(weight, nn.Parameter) else None
        return weight.data if read is None else read()

    def to_run(self, part: nn.Module) -> None:
        """Widen the part's weights whenever it runs."""
        run = part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.widened(part):
                return run(*args, **kwargs)

        part.forward = forward

    def rows_to_run(self, table: nn.Embedding) -> None:
        """The same for the embedding, of which a text reads few rows."""
        run = table.forward

        def forward(input: torch.Tensor) -> torch.Tensor:
            used, numbers = torch.unique(input, return_inverse=True)
            stored, whole = table.weight.data, self._values(table.weight)
            table.weight.data = whole[used.to(whole.device)].to(self.device, self.dtype)
            try:
                return run(numbers)
            finally:
                table.weight.data = stored

        table.forward = forward  # type: ignore[method-assign]


def hold_narrow(model: nn.Module) -> None:
    """Keep weights in 16 bits that lose nothing by it, as those of a checkpoint in 16 bits do.

    Buffers stay as they are: transformers computed them in float32.
    """
    for weight in model.parameters():
        for dtype in (torch.bfloat16, torch.float16):
            narrow = weight.data.to(dtype)
            if torch.equal(narrow.float(), weight.data):
                weight.data = narrow
                break
