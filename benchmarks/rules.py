"""Does the time follow the work? Every keep rule at half of its skippable work, against the dense export.

    python -m benchmarks.rules --work DIR

The benchmark model, exported dense and under each policy: prefill of 512 tokens, and single tokens at 512 past tokens,
by the runner without the decoding loop. Next to each ratio of times is the share of the work that remains: of
floating-point operations in prefill, of bytes in decoding. Both are counted from what the calls actually kept, and
include matrices, attention, K and V.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from benchmarks.bundles import BUDGET, Workshop, add_model_options
from benchmarks.measure import Table, milliseconds, parse, parser, print_header
from gsx.benchmarking.rounds import in_turn, ratios
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues, controls_for
from gsx_engines.bundle.words import BRANCHES
from gsx_engines.runners.base import Cache, Runner
from gsx_engines.runners.select import open_runner

PROMPT_TOKENS, STEPS = 512, 16
BYTES = 4  # of a float32
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """A policy and its settings.

    Args:
        bundle: its export, by name.
        keep: the keep settings of a request.
        head_at_exit: whether every token pays for norm and head at an exit too.
    """

    bundle: str
    keep: KeepSettings
    head_at_exit: bool = False


def rows_of(layers: int) -> dict[str, Row]:
    """Half of the work of a model with this many layers, for each policy.

    CALM runs at its lowest threshold, so that every token exits at the first possible exit: after half of the layers.
    With the measure of states, no token exits at the first exit.
    """
    return {
        DENSE: Row("dense", KeepSettings()),
        "layers, every second": Row("rule-layers", KeepSettings(layers=",".join(map(str, range(0, layers, 2))))),
        "exit at half": Row("rule-layers", KeepSettings(exit=layers // 2)),
        "unified 2": Row("rule-layers", KeepSettings(speedup=2.0)),
        "ffn-skip, half of the FFNs": Row("rule-ffn-skip", KeepSettings(budget=BUDGET)),
        "gateskip, half": Row("rule-scalar", KeepSettings(budget=BUDGET)),
        "calm, softmax at half": Row("rule-calm-softmax", KeepSettings(exit_threshold=0.0), head_at_exit=True),
        "calm, state at half": Row("rule-calm-state", KeepSettings(exit_threshold=-1.0)),
        "routers of layers, half": Row("rule-layer-routers", KeepSettings(budget=BUDGET)),
        "routers of branches, half": Row("rule-branch-routers", KeepSettings(budget=BUDGET)),
    }


@dataclass(frozen=True)
class Phase:
    """Prefill, or single tokens: mean seconds of a call, and the mean rows that each branch ran on, [L, 2] or None."""

    seconds: float
    kept: np.ndarray | None


@dataclass
class Form:
    """A row with its runner."""

    row: Row
    runner: Runner
    cache: Cache
    values: RuntimeValues

    def run(self, ids: np.ndarray) -> tuple[Phase, Phase]:
        """Run a prompt [1, S], and single tokens after it."""
        return self._phase([ids], 0), self._phase([ids[:, i : i + 1] for i in range(STEPS)], PROMPT_TOKENS)

    def _phase(self, calls: Sequence[np.ndarray], past: int) -> Phase:
        seconds, kept = [], []

        for tokens in calls:
            self.cache.roll_back([past])
            started = perf_counter()
            output = self.runner.step(self.cache, tokens, self.values)
            seconds.append(perf_counter() - started)
            if output.kept is not None:
                kept.append(output.kept)
        rows = None
        if self.columns:
            rows = np.full((self.runner.manifest.decoder.num_layers, 2), calls[0].shape[1], float)
            rows[:, self.columns] = np.mean(kept, axis=0)[:, self.columns]  # other branches always run
        return Phase(statistics.mean(seconds), rows)

    @property
    def columns(self) -> list[int]:
        """Columns of the branches that may be skipped."""
        return [BRANCHES.index(branch) for branch in self.runner.manifest.skippable]


def work_of(
    s: Mapping[str, int], kept: np.ndarray | None, tokens: int, keys: int, kv_rows: bool, head_at_exit: bool = False
) -> tuple[float, float]:
    """Floating-point operations of a call, and bytes that it reads.

    Args:
        s: the shape's sizes, as transformers names them.
        kept: [L, 2], mean rows of each branch; None for all.
        tokens: tokens of the call; keys: columns that its last token sees.
        kv_rows: whether K and V are computed only for kept rows.
        head_at_exit: whether all tokens pass the head once more.
    """
    width, layers = s["hidden_size"], s["num_hidden_layers"]
    kv = width * s["num_key_value_heads"] // s["num_attention_heads"]
    rows = np.full((layers, 2), tokens, float) if kept is None else kept
    ran = np.minimum(rows, 1)  # share of single steps that entered the branch
    query, keyvalue, mlp = 2 * width * width, 2 * width * kv, 3 * width * s["intermediate_size"]
    head = width * s["vocab_size"]
    seen = keys - (tokens - 1) / 2  # on average: attention is causal
    kv_done = rows[:, 0] if kv_rows else np.full(layers, tokens)
    heads = 1 + head_at_exit
    exit_flops = 2 * head * tokens * head_at_exit
    branches = rows[:, 0].sum() * (query + 2 * width * seen) + kv_done.sum() * keyvalue + rows[:, 1].sum() * mlp
    flops = exit_flops + 2 * head + 2 * branches
    kv_entered = ran[:, 0] if kv_rows else np.ones(layers)
    read = (
        heads * head + ran[:, 0].sum() * (query + 2 * kv * keys) + kv_entered.sum() * keyvalue + ran[:, 1].sum() * mlp
    )
    return float(flops), float(BYTES * read)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    names = list(rows_of(1))
    quick = {"shape": "tiny", "rows": ["layers, every second"]}
    made = parser("rules", __doc__, work="models and exports (1.5 GB)", rounds=9, threads=2, quick=quick)
    add_model_options(made)
    made.add_argument("--rows", nargs="*", choices=names, default=names, help="(default: all)")
    args = parse(made, arguments)
    workshop = Workshop.of(args.work, args.shape)
    rows = {name: row for name, row in rows_of(workshop.layers).items() if name in (DENSE, *args.rows)}
    bundles = {row.bundle: workshop.bundle(row.bundle) for row in rows.values()}
    if args.prepare:
        return
    print_header(made, args, arguments)
    runners = {name: open_runner(bundle, threads=args.threads) for name, bundle in bundles.items()}
    caches = {name: runner.new_cache(1, PROMPT_TOKENS + 1) for name, runner in runners.items()}
    forms = {
        name: Form(row, runners[row.bundle], caches[row.bundle], controls_for(runners[row.bundle].manifest, row.keep))
        for name, row in rows.items()
    }
    ids = np.random.default_rng(0).integers(0, workshop.sizes["vocab_size"], (1, PROMPT_TOKENS))
    found = in_turn(forms, lambda name: forms[name].run(ids), args.rounds)
    print(f"{PROMPT_TOKENS} tokens and single ones behind them, {args.threads} threads, {args.rounds} rounds\n")
    heads = ["policy", "kept"]
    for phase, unit in (("prefill", "FLOPs"), ("decode", "bytes")):
        heads += [f"{phase} ms", "/dense", f"{unit} left", "over"]
    lines = Table(*heads)
    calls = ((PROMPT_TOKENS, PROMPT_TOKENS), (1, PROMPT_TOKENS + 1))  # tokens, and columns that the last one sees
    for name, form in forms.items():
        kept = found[name][-1][0].kept
        cells = [name, "" if kept is None else f"{kept[:, form.columns].mean() / PROMPT_TOKENS:.3f}"]
        kv_rows = form.runner.manifest.kv_policy != "compute"
        for which, (tokens, keys) in enumerate(calls):
            seconds, dense = ([one[which].seconds for one in found[form_name]] for form_name in (name, DENSE))
            left = work_of(workshop.sizes, found[name][-1][which].kept, tokens, keys, kv_rows, form.row.head_at_exit)
            share = left[which] / work_of(workshop.sizes, None, tokens, keys, kv_rows=False)[which]
            ratio = ratios(seconds, dense)
            cells += [milliseconds(seconds), f"{ratio:.3f}", f"{share:.3f}", f"{ratio.median / share - 1:+.1%}"]
        lines.row(*cells)


if __name__ == "__main__":
    main()
