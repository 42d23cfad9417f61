"""What a decode step consists of, by ONNX Runtime's own profiler: matrix products, attention, and all the small nodes.

    python -m benchmarks.profile --work DIR    (which benchmarks.decode, quantization and rules have filled)

Single tokens at 512 past tokens. The profiler's own writing costs more than a small node does, so small nodes are
counted, not timed: what is left of a step of an unprofiled session after products and attention is theirs (and the
caller's), and its part for each node is the last column.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import Controls, Keep, controls_for
from gsx_engines.runners.base import Runner
from gsx_engines.runners.onnxruntime import OnnxRuntimeStage
from gsx_engines.runners.session import open_session, session_config
from gsx_engines.runners.whole import WholeRunner

PROMPT_TOKENS, STEPS = 512, 24
# What each kind of product reads for a weight, in bytes.
PRODUCTS = {"MatMul": 4, "MatMulIntegerToFloat": 1, "MatMulNBits": 1}
ATTENTION = "GroupQueryAttention"

FORMS = {
    "float32, dense": ("gsx-dense", Keep()),
    "float32, half kept": ("gsx-scalar", Keep(budget=0.5)),
    "float32, 6 of 12 layers": ("rule-layers", Keep(layers="0,2,4,6,8,10")),
    "float32, half of the FFNs": ("rule-ffn-skip", Keep(budget=0.5)),
    "INT8, dense": ("gsx-dense-int8", Keep()),
    "INT8 weights alone, dense": ("gsx-dense-int8-weights", Keep()),
    "INT8, half kept": ("gsx-scalar-int8", Keep(budget=0.5)),
}


class _Profiled(OnnxRuntimeStage):
    """A stage whose sessions write profiles."""

    def __init__(self, bundle: Any, threads: int, prefix: Path) -> None:
        super().__init__(bundle, threads=threads)
        self.sessions: list[ort.InferenceSession] = []
        self._prefix = prefix

    def _open(self, model: onnx.ModelProto) -> ort.InferenceSession:
        profile = self._prefix.with_name(f"{self._prefix.name}-{len(self.sessions)}")
        config = session_config(self.manifest)
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
    """Read the profiles of sessions that have run so many steps last, one run of each a step."""
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


def step_ms(runner: Runner, cache: Any, ids: np.ndarray, controls: Controls) -> list[float]:
    """Times of single tokens behind the prompt, each at the same place."""
    found = []
    for number in range(STEPS):
        cache.roll_back([PROMPT_TOKENS])
        started = time.perf_counter()
        runner.step(cache, ids[:, number : number + 1], controls)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def row(name: str, path: Path, keep: Keep, threads: int, rounds: int, prefix: Path) -> str:
    """A form's line of the table."""
    bundle = open_bundle(path)
    profiled = _Profiled(bundle, threads, prefix)
    runners = {"plain": WholeRunner(OnnxRuntimeStage(bundle, threads=threads)), "profiled": WholeRunner(profiled)}
    controls = controls_for(bundle.manifest, keep)
    ids = np.random.default_rng(0).integers(0, bundle.manifest.decoder.vocab_size, (1, PROMPT_TOKENS))
    caches: Mapping[str, Any] = {name: runner.new_cache(1, PROMPT_TOKENS + 1) for name, runner in runners.items()}
    for key, runner in runners.items():
        runner.step(caches[key], ids, controls)
    times: dict[str, list[float]] = {"plain": [], "profiled": []}
    for _ in range(rounds):
        for key, runner in runners.items():
            times[key] += step_ms(runner, caches[key], ids, controls)
    steps = profiled_steps(profiled.sessions, len(times["profiled"]))
    whole, products, attention = (
        statistics.median(values)
        for values in (times["plain"], [s.product_us / 1e3 for s in steps], [s.attention_us / 1e3 for s in steps])
    )
    rest = whole - products - attention
    count, read, attended, branches, others = (
        statistics.mean(getattr(step, field) for step in steps)
        for field in ("products", "product_bytes", "attention", "branches", "others")
    )
    cells = [
        name,
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
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    heads = [
        "form",
        "step ms",
        "products",
        "ms",
        "GB/s",
        "attention",
        "ms",
        "If",
        "other nodes",
        "rest ms",
        "us a node",
    ]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    with tempfile.TemporaryDirectory() as directory:
        for name, (folder, keep) in FORMS.items():
            path = args.work / folder
            if path.exists():
                print(row(name, path, keep, args.threads, args.rounds, Path(directory) / "profile"), flush=True)


if __name__ == "__main__":
    main()
