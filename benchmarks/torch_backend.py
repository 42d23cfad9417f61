"""`--backend torch` from prompt to text: what a budget saves in prefill and in decoding, next to the same model dense.

    python -m benchmarks.torch_backend --work DIR                              1.1 B, bf16, on a GPU
    python -m benchmarks.torch_backend --work DIR --shape tiny --device cpu    the same code on a CPU

Everything as users have it: two checkpoints (dense, and the same backbone with scalar gates), `gsx export`, the runner
and the decoding loop. The forms take turns; figures are medians over the rounds. PyTorch starts every kernel by itself,
and asks for the number of kept rows at every branch, so that single steps measure the starting of kernels; prefill is
what shows the work left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model import SHAPES, make_large, random_text
from gsx.backend_names import Device
from gsx.torch_runtime import TorchRuntime
from gsx.workflows.export import Precision, export
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import Keep
from gsx_engines.errors import EngineError
from gsx_engines.generation import generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.select import open_runner

BUDGETS = (1.0, 0.5)
_CALIBRATION_TOKENS = 1024


@dataclass(frozen=True)
class Speed:
    """One form of the model: medians, in seconds, and the share of pairs that ran."""

    form: str
    prefill: float
    step: float
    kept: float | None


def bundles(work: Path, shape: str, precision: Precision) -> tuple[Path, Path]:
    """The dense and the gated bundle, made where they are not there yet."""
    made = []
    for name, gate in (("dense", None), ("gated", "scalar")):
        model, bundle = work / f"{shape}-{name}", work / f"{shape}-{name}-{precision}"
        if not bundle.exists():
            if not model.exists():
                make_large(model, shape, gate)
            options: dict[str, Any] = {}
            if gate is not None:
                text = random_text(work / f"{shape}.txt", SHAPES[shape]["vocab_size"])
                options = {"budget": 0.5, "calibration": text, "calibration_tokens": _CALIBRATION_TOKENS}
            export(model, bundle, precision=precision, **options)
        made.append(bundle)
    return made[0], made[1]


def measure(dense: Path, gated: Path, device: Device, tokens: int, new_tokens: int, rounds: int) -> list[Speed]:
    """Speeds of the dense form, and of the gated one at each budget."""
    runtime = TorchRuntime(device)
    plain, sparse = (open_runner(open_bundle(path), backend=runtime) for path in (dense, gated))
    forms: dict[str, tuple[Runner, float | None]] = {"dense": (plain, None)}
    forms |= {f"budget {budget:g}": (sparse, budget) for budget in BUDGETS}
    vocabulary = plain.manifest.decoder.vocab_size
    prompt = np.random.default_rng(0).integers(1, vocabulary, tokens).tolist()
    found: dict[str, list[tuple[float, float, float | None]]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, (runner, budget) in forms.items():
            stats = generate(runner, [prompt], max_new_tokens=new_tokens, keep=Keep(budget=budget), stop_ids=[]).stats
            if number:  # the first round loads kernels and asks for memory
                found[name].append((stats.prefill_seconds, stats.decode_seconds / (new_tokens - 1), stats.kept_share))
    return [
        Speed(name, statistics.median(t[0] for t in times), statistics.median(t[1] for t in times), times[0][2])
        for name, times in found.items()
    ]


def table(speeds: Sequence[Speed]) -> str:
    """The figures in Markdown, next to the dense form's."""
    dense = speeds[0]
    lines = ["| form | kept | prefill ms | /dense | a token ms | /dense |", "|---|---|---|---|---|---|"]
    for one in speeds:
        kept = "" if one.kept is None else f"{one.kept:.3f}"
        prefill = f"{one.prefill * 1e3:.2f} | {one.prefill / dense.prefill:.3f}"
        lines.append(f"| {one.form} | {kept} | {prefill} | {one.step * 1e3:.2f} | {one.step / dense.step:.3f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Make the bundles, measure, and print the table; exit code 1 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.torch_backend", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--work", type=Path, required=True, help="for checkpoints and bundles; kept")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    try:
        TorchRuntime(options.device)
    except EngineError as error:
        print(f"benchmarks.torch_backend: {error}", file=sys.stderr)
        return 1
    options.work.mkdir(parents=True, exist_ok=True)
    dense, gated = bundles(options.work, options.shape, options.precision)
    speeds = measure(dense, gated, options.device, options.tokens, options.new_tokens, options.rounds)
    print(f"{options.shape}, {options.precision}, {options.device}, {options.tokens} + {options.new_tokens} tokens")
    print(table(speeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
