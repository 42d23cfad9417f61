"""What a decode step consists of, by ONNX Runtime's own profiler: matrix products, attention, and all the small nodes.

    python -m benchmarks.profile --work DIR

Single tokens of the benchmark model at 512 past tokens. The profiler's own output costs more than a small node does, so
small nodes are counted and not timed: the rest of a step of an unprofiled session, after products and attention, is
theirs (and the caller's), and the last column is its share for each node.
"""

from __future__ import annotations

import bisect
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.bundles import BUDGET, Workshop, add_model_options
from benchmarks.measure import Table, parse, parser, print_header
from gsx.benchmarking.rounds import in_turn
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.session import open_session, session_config
from gsx_engines.runners.whole import WholeRunner

PROMPT_TOKENS, STEPS = 512, 24
# Bytes that each kind of product reads for a weight.
PRODUCTS = {"MatMul": 4, "MatMulIntegerToFloat": 1, "MatMulNBits": 1}
ATTENTION = "GroupQueryAttention"


def forms_of(layers: int) -> dict[str, tuple[str, KeepSettings]]:
    """Name -> the bundle and a request's keep settings, for a model with this many layers."""
    half = ",".join(map(str, range(0, layers, 2)))
    return {
        "float32, dense": ("dense", KeepSettings()),
        "float32, half kept": ("scalar", KeepSettings(budget=BUDGET)),
        "float32, every second layer": ("rule-layers", KeepSettings(layers=half)),
        "float32, half of the FFNs": ("rule-ffn-skip", KeepSettings(budget=BUDGET)),
        "INT8, dense": ("dense-int8", KeepSettings()),
        "only weights INT8, dense": ("dense-int8-weights", KeepSettings()),
        "INT8, half kept": ("scalar-int8", KeepSettings(budget=BUDGET)),
    }


class _Profiled(OnnxRuntimeStage):
    """A stage whose sessions write profiles."""

    def __init__(self, bundle: Bundle, threads: int, prefix: Path) -> None:
        super().__init__(bundle, threads=threads)
        self.sessions: list[ort.InferenceSession] = []
        self._prefix = prefix

    def _open(self, model: onnx.ModelProto, *, layers: bool = True) -> ort.InferenceSession:
        profile = self._prefix.with_name(f"{self._prefix.name}-{len(self.sessions)}")
        config = session_config(self.manifest, lowered=True, layers=layers)
        data = model.SerializeToString()
        session = open_session(data, self._bundle.directory, self._threads, config, profile=profile)
        self.sessions.append(session)
        return session


@dataclass
class Step:
    """What one step spent, in microseconds, which nodes it ran, and the bytes of weights that its products read."""

    product_us: float = 0.0
    attention_us: float = 0.0
    products: int = 0
    product_bytes: int = 0
    attention: int = 0
    branches: int = 0
    others: int = 0


def profiled_steps(sessions: list[ort.InferenceSession], steps: int) -> list[Step]:
    """Read the profiles of sessions. Args: steps: how many to read, the last ones; a step runs each session once."""
    found = [Step() for _ in range(steps)]
    for session in sessions:
        path = Path(session.end_profiling())
        events = json.loads(path.read_text())
        path.unlink()
        starts = sorted(event["ts"] for event in events if event["name"] == "model_run")[-steps:]
        for event in events:
            number = bisect.bisect_right(starts, event["ts"]) - 1
            if number < 0 or event["cat"] != "Node" or not event["name"].endswith("_kernel_time"):
                continue
            step, kind = found[number], event["args"]["op_name"]
            if kind in PRODUCTS:
                shapes = (event["args"][f"{side}_type_shape"][0] for side in ("input", "output"))
                width, out = (next(iter(shape.values()))[-1] for shape in shapes)
                step.products += 1
                step.product_us += event["dur"]
                step.product_bytes += PRODUCTS[kind] * width * out
            elif kind == ATTENTION:
                step.attention += 1
                step.attention_us += event["dur"]
            elif kind == "If":
                step.branches += 1
            else:
                step.others += 1
    return found


def row(bundle: Bundle, keep: KeepSettings, threads: int, rounds: int, prefix: Path) -> list[str]:
    """A form's cells of the table."""
    profiled = _Profiled(bundle, threads, prefix)
    runners = {"plain": WholeRunner(OnnxRuntimeStage(bundle, threads=threads)), "profiled": WholeRunner(profiled)}
    values = controls_for(bundle.manifest, keep)
    ids = np.random.default_rng(0).integers(0, bundle.manifest.decoder.vocab_size, (1, PROMPT_TOKENS))
    caches = {name: runner.new_cache(1, PROMPT_TOKENS + 1) for name, runner in runners.items()}
    for name, runner in runners.items():
        runner.step(caches[name], ids, values)

    def step_ms(name: str) -> list[float]:
        """Times of single tokens after the prompt, each at the same position."""
        found = []
        for number in range(STEPS):
            caches[name].roll_back([PROMPT_TOKENS])
            started = perf_counter()
            runners[name].step(caches[name], ids[:, number : number + 1], values)
            found.append(1e3 * (perf_counter() - started))
        return found

    times = in_turn(runners, step_ms, rounds)
    steps = profiled_steps(profiled.sessions, STEPS * rounds)
    whole = statistics.median(ms for one in times["plain"] for ms in one)
    products = statistics.median(step.product_us / 1e3 for step in steps)
    attention = statistics.median(step.attention_us / 1e3 for step in steps)
    rest = whole - products - attention
    count, read, attended, branches, others = (
        statistics.mean(getattr(step, field) for step in steps)
        for field in ("products", "product_bytes", "attention", "branches", "others")
    )
    return [
        f"{whole:.2f}",
        f"{count:.0f}",
        f"{products:.2f}",
        f"{read / products / 1e6:.0f}",
        f"{attended:.0f}",
        f"{attention:.2f}",
        f"{branches:.0f}",
        f"{others:.0f}",
        f"{rest:.2f}",
        f"{1e3 * rest / (branches + others):.1f}",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    quick = {"shape": "tiny", "forms": ["float32, dense", "float32, half kept"]}
    made = parser("profile", __doc__, work="models and exports (2 GB)", rounds=9, threads=2, quick=quick)
    add_model_options(made)
    made.add_argument("--forms", nargs="+", choices=list(forms_of(1)), default=list(forms_of(1)), help="(default: all)")
    args = parse(made, arguments)
    workshop = Workshop.of(args.work, args.shape)
    asked = {name: form for name, form in forms_of(workshop.layers).items() if name in args.forms}
    forms = {name: (workshop.bundle(bundle), keep) for name, (bundle, keep) in asked.items()}
    if args.prepare:
        return
    print_header(made, args, arguments)
    lines = Table(
        *("form", "step ms", "products", "ms", "GB/s", "attention", "ms", "If", "other nodes", "rest ms", "us a node")
    )
    with tempfile.TemporaryDirectory() as directory:
        for name, (opened, keep) in forms.items():
            lines.row(name, *row(opened, keep, args.threads, args.rounds, Path(directory) / "profile"))


if __name__ == "__main__":
    main()
