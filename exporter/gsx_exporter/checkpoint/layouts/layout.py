"""Quantized weights as the float tensors that they stand for, one at a time.

A layout says in which stored tensors a weight is, and computes it from them, in the type of its scales unless said
otherwise: as the library that wrote it dequantizes. Only scales and codes are read: where activations were quantized as
well, they are computed in full precision, as transformers does it with `dequantize=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from gsx_exporter.checkpoint.stored import Tensors
from gsx_exporter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_WEIGHT = "weight"
Part = TypeVar("Part")
Found = TypeVar("Found")


class Layout(Protocol):
    """A way to store quantized weights.

    Parts are the last words of the names of stored tensors: `model.layers.0.mlp.up_proj.qweight` is the part `qweight`.
    """

    @property
    def method(self) -> str:
        """What it is called, for people."""
        ...

    @property
    def codes(self) -> str:
        """The part with the codes: a module that has it is quantized."""
        ...

    @property
    def scales(self) -> str:
        """The part with the scales."""
        ...

    @property
    def others(self) -> Sequence[str]:
        """Further parts that a quantized module may have."""
        ...

    @property
    def by_transformers(self) -> bool:
        """Whether transformers itself dequantizes the layout on a CPU, so that the reference does not need ours."""
        ...

    def shape(self, parts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the weight [out, in]. Args: parts: shapes of the stored parts.

        Raises:
            ValueError: the parts do not fit each other, in words.
        """
        ...

    def weight(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weight [out, in]. Args: parts: the stored parts.

        Raises:
            ValueError: the parts do not fit each other, in words.
        """
        ...


@dataclass
class DequantizedTensors:
    """Stored tensors of which some are quantized, as floats.

    Args:
        stored: the tensors of the files.
        layout: how they are stored.
        source: what the user called the model.
    """

    stored: Tensors
    layout: Layout
    source: str
    # Name of a weight -> part -> stored name.
    _parts: dict[str, dict[str, str]] = field(init=False, repr=False)
    _names: set[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        layout, self._parts = self.layout, {}
        known = (layout.codes, layout.scales, *layout.others)
        by_module: dict[str, dict[str, str]] = {}
        for name in self.stored.names:
            module, _, part = name.rpartition(".")
            if part in known:
                by_module.setdefault(module, {})[part] = name
        for module, parts in by_module.items():
            if layout.scales in parts or (layout.codes != _WEIGHT and layout.codes in parts):
                self._parts[f"{module}.{_WEIGHT}"] = parts
        self._names = {
            *self._parts,
            *(name for name in self.stored.names if name.rpartition(".")[2] not in {*known} - {_WEIGHT}),
        }

    @property
    def names(self) -> Collection[str]:
        """See `Tensors`."""
        return self._names

    @property
    def files(self) -> Sequence[Path]:
        """See `Tensors`."""
        return self.stored.files

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        if name not in self._parts:
            return self.stored.shape(name)
        return self._of_parts(name, self.stored.shape, self.layout.shape)

    def stored_type(self, name: str) -> str:
        """See `Tensors`."""
        return self.stored.stored_type(self._whole(name)[self.layout.scales] if name in self._parts else name)

    def tensor(self, name: str) -> torch.Tensor:
        """See `Tensors`."""
        if name not in self._parts:
            return self.stored.tensor(name)
        return self._of_parts(name, self.stored.tensor, self.layout.weight)

    def _of_parts(self, name: str, read: Callable[[str], Part], combine: Callable[[dict[str, Part]], Found]) -> Found:
        try:
            return combine({part: read(stored) for part, stored in self._whole(name).items()})
        except ValueError as error:
            raise CheckpointError(
                f"{self.source}: {name} cannot be dequantized",
                expected=f"a weight as {self.layout.method} stores it",
                found=str(error),
                todo="export the original checkpoint: gsx quantizes it itself",
            ) from error

    def check(self) -> None:
        """Refuse weights that lack a part or are stored in another way, without reading them.

        Raises:
            CheckpointError: a part is missing, or has an impossible shape.
        """
        for name in self._parts:
            self.shape(name)

    def _whole(self, name: str) -> dict[str, str]:
        """The parts of a weight, by name."""
        parts = self._parts[name]
        for part in (self.layout.codes, self.layout.scales):
            if part not in parts:
                raise CheckpointError(
                    f"{self.source}: a quantized weight is incomplete",
                    expected=f"{part} of {name.removesuffix('.' + _WEIGHT)}",
                    found=", ".join(parts.values()),
                    todo="copy or download the model again",
                )
        return parts
