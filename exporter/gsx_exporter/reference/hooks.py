"""Hooks that keep what transformers' modules read and give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def note_first(states: list[torch.Tensor]) -> Callable[[nn.Module, Any], None]:
    """A hook that keeps what the first layer reads, when it runs for the first time."""

    def note(_layer: nn.Module, args: Any) -> None:
        if not states:
            states.append(args[0])

    return note


def note_output(states: list[torch.Tensor]) -> Callable[[nn.Module, Any, torch.Tensor], None]:
    """A hook that keeps what each layer gives."""

    def note(_layer: nn.Module, _args: Any, output: torch.Tensor) -> None:
        states.append(output)

    return note


def note_logits(
    routers: dict[int, torch.Tensor], layer: int, shape: tuple[int, int]
) -> Callable[[nn.Module, Any, Any], None]:
    """A hook that keeps what transformers' router returns first: its logits, [tokens, E]."""

    def note(_router: nn.Module, _args: Any, output: Any) -> None:
        routers[layer] = output[0].reshape(*shape, -1).cpu()

    return note
