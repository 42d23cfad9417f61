"""Codes that were chosen on a text, in files until the weights are written: they may not fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gsx_exporter.quantization.codes import Encoded
from gsx_exporter.quantization.scheme import WeightFormat


@dataclass
class ChosenCodes:
    """Chosen codes by matrix ("layers.0.mlp.up_proj").

    Args:
        folder: where the files are; None as long as there are none.
    """

    folder: Path | None = None
    _formats: dict[str, WeightFormat] = field(default_factory=dict)
    _files: dict[str, Path] = field(default_factory=dict)

    def store(self, file: str, codes: Mapping[str, Encoded]) -> None:
        """Write some matrices' codes to a file. Args: file: its name."""
        assert self.folder is not None
        path = self.folder / f"{file}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name, one in codes.items():
            tensors |= {f"{name}.codes": one.codes.contiguous(), f"{name}.scales": one.scales}
            if one.zero_points is not None:
                tensors[f"{name}.zero_points"] = one.zero_points
        save_file(tensors, path)
        self._formats |= {name: one.format for name, one in codes.items()}
        self._files |= dict.fromkeys(codes, path)

    def find(self, matrix: str, form: WeightFormat) -> Encoded | None:
        """The codes of a matrix in a format; None if none were chosen."""
        if self._formats.get(matrix) != form:
            return None
        with safe_open(str(self._files[matrix]), "pt") as stored:
            zeros = f"{matrix}.zero_points"
            return Encoded(
                form,
                stored.get_tensor(f"{matrix}.codes"),
                stored.get_tensor(f"{matrix}.scales"),
                stored.get_tensor(zeros) if zeros in stored.keys() else None,  # noqa: SIM118 (not a mapping)
            )
