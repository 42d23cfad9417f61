"""The section `engines` of `gsx.json`, also stored as `engine.json` beside an engine: all that a loader must check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from gsx_engines.bundle.fields import FileName, Section, Sha256, TensorInfo
from gsx_engines.bundle.words import Precision


class Sizes(NamedTuple):
    """Sizes of a dynamic axis of an engine: the smallest, the one it is tuned for, and the largest."""

    least: int
    usual: int
    most: int


class EngineProfile(Section):
    """The calls that an engine accepts: sequences, tokens of each in the call, and cache columns that are read."""

    name: str
    batch: Sizes
    tokens: Sizes
    window: Sizes

    @model_validator(mode="after")
    def _in_order(self) -> EngineProfile:
        for axis in (self.batch, self.tokens, self.window):
            if not 1 <= axis.least <= axis.usual <= axis.most:
                raise ValueError(f"profile {self.name}: {tuple(axis)} is not least <= usual <= most")
        return self


KvLayout = Literal["in-place", "step", "growing"]


class PluginLibrary(Section):
    """The plugin library that an engine was built with, and must run with.

    Args:
        sha256: of the library.
        source_hash: of the sources that it was built from; `unknown` if no record of them is stored beside it.
    """

    sha256: Sha256
    source_hash: str


class EngineGraph(Section):
    """An engine of one graph.

    Args:
        file, sha256, size_bytes: of the engine.
        graph_sha256, weights_sha256: of the graph and the weights that it was built from.
        forms: op of domain gsx -> what the engine runs in its place: `plugin`, `predicated`, `body`, `rows`,
            `mask` or `all` (docs/engines.md).
        layers: type of TensorRT layer -> how many there were before TensorRT fused them.
        products: type -> how many matrix products of the graph the engine computes in it.
        widened: weights of the products that are quantized in the graph but computed in a wider type by the engine.
        inputs, outputs: of the engine; they differ from the graph's.
        build_seconds: time of the build.
        peak_bytes: peak memory of the build.
    """

    file: FileName
    sha256: Sha256
    size_bytes: int
    graph_sha256: Sha256
    weights_sha256: Sha256
    forms: Mapping[str, Literal["plugin", "predicated", "body", "rows", "mask", "all"]]
    layers: Mapping[str, int]
    products: Mapping[str, int] = Field(default_factory=dict)
    widened: tuple[str, ...] = ()
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    build_seconds: float
    peak_bytes: int


class EngineEntry(Section):
    """One set of engines, as in `gsx.json` and in `engines/<name>/engine.json`.

    Args:
        tensorrt_version: of the builder; the runtime must have the same version.
        targets: compute capabilities, e.g. "89".
        platform: operating system and processor.
        gpu: the GPU that it was built on, if the backend ties an engine to it.
        kv_layout: `in-place`: K and V are written into buffers of a fixed length; `step`: the same for calls of exactly
            one size, which read the buffers as they are; `growing`: K and V come in as `past` and go out as `present`,
            as in the graph. gsx runs the first, and the second for calls of that size; the third is for other programs.
        capacity: columns of the K/V buffers, or the most tokens that K and V may grow to.
        plugins: null if no plugin is used.
    """

    schema_version: Literal[1]
    backend: Literal["tensorrt", "tensorrt-rtx"]
    tensorrt_version: str
    targets: tuple[str, ...]
    platform: str
    gpu: str | None
    precision: Precision
    kv_layout: KvLayout = "in-place"
    capacity: int
    profiles: tuple[EngineProfile, ...]
    plugins: PluginLibrary | None
    graphs: Mapping[str, EngineGraph]
