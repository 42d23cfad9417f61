"""What an engine launches, and what it asks of the host: its plan, as the builder describes it.

A call of an engine is a list of steps. Counted here is what a decode step costs besides the bytes that it reads:
kernels, waits of the host for the GPU, computations of shapes on the host, copies to and from the host, and copies of
all columns of K and V. A plan can be recorded as a CUDA graph if nothing in it waits for the GPU.

The builder lists its steps at the end of its log, one a line, if the build keeps the details (seen with TensorRT-RTX
1.7.1, which needs no GPU for it; `layer_information.py` shows a line). `gsx build` keeps them beside the engine as
`<graph>.plan.json`, and `gsx inspect BUNDLE --plan` shows what they come to. Steps that the builder calls by names that
are not known here count as kernels: a count may be too high, but never hides something.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gsx_engines.bundle.tensor_names import PAST, PRESENT
from gsx_engines.errors import EngineError

_STEP = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$", re.MULTILINE)
_IN, _OUT = (
    re.compile(r"Inputs: \[(.*?)\](?:, Constants|, Outputs)"),
    re.compile(r"Outputs: \[(.*?)\], (?:Tactic|Param)"),
)
_TENSOR = re.compile(r"Name: ([^,]+?)(?: \[profile \d+\])?, ")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_PART = re.compile(r"_myl(\d+)_\d+$")  # steps of one compiled part of the network, all of one profile
_LAYER = re.compile(rf"(?:layers|{PAST.rstrip('.')}|{PRESENT.rstrip('.')})\.(\d+)\.")
# The builder's names of steps. Those of the first group only order others, on the host or between streams. (A jump on a
# number from the GPU, `cjmp`, follows the copy of that number, which is counted.)
_ORDER = {"signal", "wait", "TrainStation", "jmp", "cjmp", "reshape", "Constant"}
_SHAPES = {"shape_call"}
_TO_HOST, _TO_DEVICE = {"DeviceToShapeHost"}, {"ShapeHostToDevice"}
_PLUGINS = {"PluginV3", "PluginV2", "custom_layer"}
# Parts of the names of kernels that read a cache to compute with it: attention, and products with their sums.
_USES_CACHE = ("_mha", "MulSum")
# Kernels that one call of a plugin launches for up to 512 tokens (`plugins/gsx_plugins/<op>/kernel.cu`).
_LAUNCHES = {"threshold_gather": 2, "topk_gather": 2, "gated_scatter_add": 2}  # those of a step launch one


@dataclass(frozen=True)
class Step:
    """One step of a call.

    Args:
        name: the builder's.
        kind: the builder's type of it.
        profile: the optimization profile whose calls run it.
        layer: the decoder layer that it works for, or None before the first one.
        nodes: the nodes of the graph that it computes.
        copies_window: it copies K or V of all columns.
    """

    name: str
    kind: str
    profile: int
    layer: int | None
    nodes: tuple[str, ...]
    copies_window: bool


@dataclass(frozen=True)
class PlanCounts:
    """What some steps come to.

    Args:
        kernels: launches, with those of plugins.
        host_syncs: times that the host waits for a number from the GPU.
        shape_calls: computations of shapes on the host.
        to_host, to_device: copies between GPU and host inside the plan.
        window_copies: kernels that copy K or V of all columns.
    """

    kernels: int = 0
    host_syncs: int = 0
    shape_calls: int = 0
    to_host: int = 0
    to_device: int = 0
    window_copies: int = 0

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold these steps."""
        return self.host_syncs == 0


def steps_of(information: str) -> tuple[Step, ...]:
    """The steps of an engine, in order, from the builder's messages about layers."""
    found = list(_STEP.finditer(information))
    profiles: dict[str, int] = {}  # compiled part -> profile
    for one in found:
        if (part := _PART.search(one["name"])) and (said := _PROFILE.search(one[0])):
            profiles[part[1]] = int(said[1])
    steps: list[Step] = []
    for one in found:
        name, kind, rest = one["name"], one["kind"], one["rest"]
        part, said = _PART.search(name), _PROFILE.search(one[0])
        profile = profiles.get(part[1], 0) if part else int(said[1]) if said else 0
        nodes = tuple(_NODE.findall(rest))
        read, written = (_TENSOR.findall(match[1]) if (match := side.search(rest)) else [] for side in (_IN, _OUT))
        last = steps[-1].layer if steps and steps[-1].profile == profile else None
        layers = [int(number) for text in (name, *nodes, *read, *written) for number in _LAYER.findall(text + ".")]
        steps.append(
            Step(
                name=name,
                kind=kind,
                profile=profile,
                layer=_layer_of(layers, last),
                nodes=nodes,
                copies_window=_copies_window(name, kind, read, written),
            )
        )
    return tuple(steps)


def _layer_of(found: Sequence[int], last: int | None) -> int | None:
    """The layer of most of a step's names; not one that comes much later, of which something is prepared early."""
    counts = Counter(layer for layer in found if last is None or layer <= last + 1)
    return max(counts, key=lambda layer: (counts[layer], -layer), default=last)


def _copies_window(name: str, kind: str, read: Sequence[str], written: Sequence[str]) -> bool:
    """Whether a step reads a cache and neither attends to it, sums it up nor writes new columns into it."""
    caches = {value for value in read if value.startswith((PAST, PRESENT))}
    used = any(part in name for part in _USES_CACHE)
    return kind == "kgen" and bool(caches) and not used and not caches & set(written)


def count(steps: Iterable[Step]) -> PlanCounts:
    """What steps come to."""
    found: Counter[str] = Counter()
    for step in steps:
        if step.kind in _ORDER:
            continue
        from_host, to_host = step.name.startswith("copy_h2d"), step.name.startswith("copy_d2h")
        if step.kind in _SHAPES:
            found["shape_calls"] += 1
        elif step.kind in _TO_HOST or to_host:
            found["to_host"] += 1
            found["host_syncs"] += 1
        elif step.kind in _TO_DEVICE or from_host:
            found["to_device"] += 1
        else:
            found["kernels"] += _launches(step)
            found["window_copies"] += step.copies_window
    return PlanCounts(**found)


def _launches(step: Step) -> int:
    if step.kind not in _PLUGINS:
        return 1
    return next((launches for op, launches in _LAUNCHES.items() if f"node_{op}" in step.name), 1)


def by_layer(steps: Collection[Step]) -> dict[str, PlanCounts]:
    """The counts of each decoder layer by its number, and of what comes before the first one (`-`)."""
    layers = sorted({-1 if step.layer is None else step.layer for step in steps})
    return {
        "-" if layer < 0 else str(layer): count(
            step for step in steps if (-1 if step.layer is None else step.layer) == layer
        )
        for layer in layers
    }


def step_from(values: Mapping[str, Any]) -> Step:
    """A step from JSON. Raises: KeyError or TypeError if a field is missing or of another kind."""
    return Step(**{**{field.name: values[field.name] for field in fields(Step)}, "nodes": tuple(values["nodes"])})


def plan_file(engine: Path) -> Path:
    """Where the plan of an engine is."""
    return engine.with_suffix(".plan.json")


def write_plan(engine: Path, steps: Sequence[Step]) -> None:
    """Write the plan beside its engine."""
    lines = ",\n".join(json.dumps(asdict(step), separators=(",", ":")) for step in steps)
    plan_file(engine).write_text(f'{{"steps": [\n{lines}\n]}}\n', encoding="utf-8")


def read_plan(engine: Path, rebuild: str) -> tuple[Step, ...]:
    """Read the plan beside an engine.

    Args:
        rebuild: the command that builds the engine.
    Raises:
        EngineError: there is none, or it is damaged.
    """
    path = plan_file(engine)
    try:
        found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return tuple(step_from(one) for one in found["steps"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EngineError(
            f"{engine}: has no plan that can be read",
            expected=f"{path.name} beside it, as gsx build writes it",
            found="no such file"
            if isinstance(error, FileNotFoundError)
            else f"a damaged file ({type(error).__name__})",
            todo=rebuild,
        ) from error
