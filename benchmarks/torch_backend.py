"""`--backend torch` from prompt to text: what a budget saves in prefill and decoding, against the same model dense.

    python -m benchmarks.torch_backend --work DIR                              1.1 B, bf16, on a GPU
    python -m benchmarks.torch_backend --work DIR --shape tiny --device cpu    the same code on a CPU

Everything runs as for users: two checkpoints (dense, and the same backbone with scalar gates), `gsx export`, the runner
and the decoding loop. PyTorch launches every kernel separately, and reads the number of kept rows at every branch, so
single steps measure how fast kernels launch; prefill shows the work that is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bundles import BUDGET, SHORT_TEXT, exported
from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.model import SHAPES, make_large, random_text
from gsx.backend_names import Device
from gsx.benchmarking.rounds import Spread, in_turn, ratios, spread
from gsx.torch_runtime import TorchRuntime
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings
from gsx_engines.bundle.words import Precision
from gsx_engines.errors import EngineError
from gsx_engines.generation.generate import generate
from gsx_engines.generation.stats import GenerationStats
from gsx_engines.runners.base import Runner
from gsx_engines.runners.select import open_runner

BUDGETS = (1.0, BUDGET)


@dataclass(frozen=True)
class Speed:
    """One form of the model.

    Args:
        prefill, step: median seconds of the prompt, and of a token after it.
        prefill_ratio, step_ratio: the same over the dense form's.
        kept: the share of (token, branch) pairs that ran; None for the dense form.
    """

    form: str
    prefill: float
    step: float
    prefill_ratio: Spread
    step_ratio: Spread
    kept: float | None


def bundles(work: Path, shape: str, precision: Precision) -> tuple[Path, Path]:
    """The dense and the gated bundle, made if they do not exist."""
    made = []
    for name, gate in (("dense", None), ("gated", "scalar")):
        model = work / f"{shape}-{name}"
        if not model.exists():
            make_large(model, shape, gate)
        options: dict[str, Any] = {}
        if gate is not None:
            text = random_text(work / f"{shape}.txt", SHAPES[shape]["vocab_size"])
            options = {"budget": BUDGET, "calibration": text, "calibration_tokens": SHORT_TEXT}
        made.append(exported(work / f"{shape}-{name}-{precision}", model, precision=precision, **options).directory)
    return made[0], made[1]


def measure(dense: Path, gated: Path, device: Device, tokens: int, new_tokens: int, rounds: int) -> list[Speed]:
    """Speeds of the dense form, and of the gated one at each budget. Args: tokens: tokens of the prompt."""
    runtime = TorchRuntime(device)
    plain, sparse = (open_runner(open_bundle(path), backend=runtime) for path in (dense, gated))
    forms: dict[str, tuple[Runner, float | None]] = {"dense": (plain, None)}
    forms |= {f"budget {budget:g}": (sparse, budget) for budget in BUDGETS}
    prompt = np.random.default_rng(0).integers(1, plain.manifest.decoder.vocab_size, tokens).tolist()

    def stats_of(form: str) -> GenerationStats:
        runner, budget = forms[form]
        return generate(
            runner, [prompt], max_new_tokens=new_tokens, keep=KeepSettings(budget=budget), stop_ids=[]
        ).stats

    found = in_turn(forms, stats_of, rounds)
    prefill = {form: [one.prefill_seconds for one in stats] for form, stats in found.items()}
    step = {form: [one.decode_seconds / (new_tokens - 1) for one in stats] for form, stats in found.items()}
    return [
        Speed(
            form,
            spread(prefill[form]).median,
            spread(step[form]).median,
            ratios(prefill[form], prefill["dense"]),
            ratios(step[form], step["dense"]),
            found[form][0].kept_share,
        )
        for form in forms
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the bundles, measure, and print the table; exit code 1 without a GPU."""
    quick = {"shape": "tiny", "device": "cpu", "tokens": 16, "new_tokens": 4}
    made = parser("torch_backend", __doc__, work="checkpoints and bundles", rounds=5, quick=quick)
    made.add_argument("--shape", choices=SHAPES, default="1b", help="of the model (default: 1b)")
    made.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="bf16", help="(default: bf16)")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: cuda)")
    made.add_argument("--tokens", type=int, default=1536, help="of the prompt (default: 1536)")
    made.add_argument("--new-tokens", type=int, default=64, help="(default: 64)")
    args = parse(made, arguments)
    try:
        TorchRuntime(args.device)
    except EngineError as error:
        print(f"benchmarks.torch_backend: {error}", file=sys.stderr)
        return 1
    dense, gated = bundles(args.work, args.shape, args.precision)
    print_header(made, args, arguments)
    speeds = measure(dense, gated, args.device, args.tokens, args.new_tokens, args.rounds)
    print(f"{args.shape}, {args.precision}, {args.device}, {args.tokens} + {args.new_tokens} tokens\n")
    lines = Table("form", "kept", "prefill ms", "/dense", "a token ms", "/dense")
    for one in speeds:
        kept = None if one.kept is None else f"{one.kept:.3f}"
        prefill = (f"{one.prefill * 1e3:.2f}", f"{one.prefill_ratio:.3f}")
        lines.row(one.form, kept, *prefill, f"{one.step * 1e3:.2f}", f"{one.step_ratio:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
