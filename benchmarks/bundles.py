"""Models and bundles that benchmarks run, made when they are first needed and kept in the work directory.

A `Workshop` makes the benchmark model (`model.py`) dense, with gates and with routers, and exports it. Exports have
names, so that benchmarks that need the same bundle share it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.model import POSITIONS, ROUTERS, SHAPES, make_model, random_text
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle, open_bundle

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "model"
# The command line of this environment, even if no script `gsx` is installed.
GSX = (sys.executable, "-m", "gsx")
BUDGET = 0.5
# Options of exports that are only timed.
SHORT_TEXT = 1024


@dataclass(frozen=True)
class Recipe:
    """An export of the benchmark model.

    Args:
        gate: the model's gates or routers: as in `make_model`, a key of `ROUTERS`, or None.
        options: the export's options.
        calibrated: whether it reads calibration text.
    """

    gate: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    calibrated: bool = False


def _half(gate: str) -> Recipe:
    return Recipe(gate, {"budget": BUDGET, "calibration_tokens": SHORT_TEXT}, calibrated=True)


def _in_8_bits(gate: str | None, scheme: Any, *keep: str) -> Recipe:
    """INT8 with the layers that the scheme itself leaves (in a dense model there are none), or with `keep`."""
    options: dict[str, Any] = {"quantize": Quantize(scheme, keep)}
    if gate is not None:
        options["budget"] = BUDGET
    return Recipe(gate, options, calibrated=True)  # what rounding costs is measured on a text, too


RECIPES = {
    "dense": Recipe(),
    "dense-int8": _in_8_bits(None, "int8"),
    "dense-int8-weights": _in_8_bits(None, "int8-weights"),
    "scalar": Recipe("scalar", {"budget": BUDGET}, calibrated=True),
    "scalar-int8": _in_8_bits("scalar", "int8"),
    "scalar-int8-throughout": _in_8_bits("scalar", "int8", "none"),
    "scalar-int8-weights": _in_8_bits("scalar", "int8-weights"),
    "vector": Recipe("vector", {"budget": BUDGET}, calibrated=True),
    "linear": Recipe("linear", {"budget": BUDGET}, calibrated=True),
    "rule-layers": Recipe(options={"policy": "layers"}),
    "rule-ffn-skip": Recipe(
        options={"policy": "ffn-skip", "budget": BUDGET, "calibration_tokens": SHORT_TEXT}, calibrated=True
    ),
    "rule-scalar": _half("scalar"),
    # Exits after a quarter and half of the layers; `policy_of` puts the depths in.
    "rule-calm-softmax": Recipe(options={"policy": "calm:softmax,exits={half},threshold=0.5"}),
    "rule-calm-state": Recipe(options={"policy": "calm:state,exits={quarter}+{half},threshold=0.5"}),
    "rule-layer-routers": _half("layer-routers"),
    "rule-branch-routers": _half("branch-routers"),
}


@dataclass(frozen=True)
class Workshop:
    """Models and bundles of one shape, below `directory`.

    Args:
        directory: only for this shape.
        shape: a key of `SHAPES`.
    """

    directory: Path
    shape: str

    @classmethod
    def of(cls, work: Path, shape: str) -> Workshop:
        """The workshop of a shape in the work directory of `--work`."""
        directory = work / shape
        directory.mkdir(parents=True, exist_ok=True)
        return cls(directory, shape)

    @property
    def sizes(self) -> dict[str, int]:
        """The shape's sizes, as transformers names them."""
        return SHAPES[self.shape]

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return self.sizes["num_hidden_layers"]

    def text(self) -> Path:
        """Calibration text of random words."""
        path = self.directory / "text.txt"
        return path if path.exists() else random_text(path, self.sizes["vocab_size"])

    def model(self, gate: str | None = None, positions: int = POSITIONS) -> Path:
        """A checkpoint. Args: as `Recipe.gate`; positions: the longest context."""
        name = f"model-{gate or 'dense'}" + ("" if positions == POSITIONS else f"-{positions}")
        path, router = self.directory / name, ROUTERS.get(gate or "")
        if not path.exists():
            partial = path.with_name(f"{name}.partial")
            make_model(partial, self.shape, None if router else gate, positions=positions, router=router)
            partial.rename(path)
        return path

    def bundle(self, name: str) -> Bundle:
        """The export of that name in `RECIPES`."""
        recipe = RECIPES[name]
        options = dict(recipe.options)
        if "policy" in options:
            options["policy"] = options["policy"].format(half=self.layers // 2, quarter=max(1, self.layers // 4))
        if recipe.calibrated:
            options["calibration"] = self.text()
        if "quantize" in options:
            options["quantize"] = replace(options["quantize"], cache=self.directory / "statistics")
        return exported(self.directory / f"gsx-{name}", self.model(recipe.gate), **options)


def exported(path: Path, model: Path, **options: Any) -> Bundle:
    """The bundle at `path`, exported with these options if it does not exist yet."""
    return open_bundle(path) if (path / "gsx.json").exists() else export(model, path, **options)


def add_model_options(parser: ArgumentParser) -> None:
    """Add `--shape` and `--prepare`, for benchmarks that use a workshop."""
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the benchmark model (default: small)")
    parser.add_argument("--prepare", action="store_true", help="make models and exports, and time nothing")
