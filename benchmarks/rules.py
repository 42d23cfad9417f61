"""Does the time follow the work? Every keep rule at half of its skippable work, against its own dense export.

    python -m benchmarks.rules --work DIR

Makes the benchmark model (`model.py`) and exports it dense and under each policy. Then, all in one process and in
turn, 512-token prefill and single tokens at 512 past tokens, by the runner alone; ratios are medians of ratios within a
round. Beside each ratio stands the share of the work that remains: of floating-point operations in prefill, of bytes in
decoding, both counted from what the calls really kept, matrices, attention and K/V included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.model import ROUTERS, SHAPES, make_model, random_text
from gsx.workflows.export import export
from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import Controls, Keep, controls_for
from gsx_engines.bundle.fields import BRANCHES
from gsx_engines.runners.base import Runner
from gsx_engines.runners.select import open_runner

PROMPT_TOKENS, STEPS = 512, 16
CALIBRATION_TOKENS = 1024
BYTES = 4  # float32


@dataclass(frozen=True)
class Row:
    """A policy at work.

    Args:
        bundle: its export; keep: what a request asks for; gate: gates or routers of the model; options: of the export.
        head_at_exit: whether every token pays for norm and head at an exit too.
    """

    bundle: str
    keep: Keep
    gate: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    head_at_exit: bool = False


# CALM at its lowest threshold: every token leaves after half of the layers, by the measure there.
_LOWEST = {"softmax": 0.0, "state": -1.0}
# Half of the layers, in blocks and alternating; half of the FFNs; half of the branches of each token.
ROWS = {
    "dense": Row("dense", Keep()),
    "layers, every second": Row("layers", Keep(layers="0,2,4,6,8,10"), options={"policy": "layers"}),
    "exit 6": Row("layers", Keep(exit=6), options={"policy": "layers"}),
    "unified 2": Row("layers", Keep(speedup=2.0), options={"policy": "layers"}),
    "ffn-skip, half of the FFNs": Row("ffn-skip", Keep(budget=0.5), options={"policy": "ffn-skip", "budget": 0.5}),
    "gateskip, half": Row("scalar", Keep(budget=0.5), "scalar", {"budget": 0.5}),
    "calm, softmax at 6": Row(
        "calm-softmax",
        Keep(exit_threshold=_LOWEST["softmax"]),
        options={"policy": "calm:softmax,exits=6,threshold=0.5"},
        head_at_exit=True,
    ),
    "calm, state at 6": Row(  # the first exit is never left at
        "calm-state", Keep(exit_threshold=_LOWEST["state"]), options={"policy": "calm:state,exits=3+6,threshold=0.5"}
    ),
    "routers of layers, half": Row("layer-routers", Keep(budget=0.5), "layer-routers", {"budget": 0.5}),
    "routers of branches, half": Row("branch-routers", Keep(budget=0.5), "branch-routers", {"budget": 0.5}),
}


def prepare(work: Path, rows: Mapping[str, Row]) -> None:
    """Models and exports, as far as they are not there yet."""
    work.mkdir(parents=True, exist_ok=True)
    text = random_text(work / "text.txt", SHAPES["small"]["vocab_size"])
    for row in rows.values():
        model = work / f"model-{row.gate or 'dense'}"
        if not model.exists():
            router = ROUTERS.get(row.gate or "")
            make_model(model, "small", None if router else row.gate, router=router)
        if not (work / f"rule-{row.bundle}").exists():
            reads: dict[str, Any] = {}
            if "budget" in row.options:
                reads = {"calibration": text, "calibration_tokens": CALIBRATION_TOKENS}
            export(model, work / f"rule-{row.bundle}", **row.options, **reads)


@dataclass
class Form:
    """A row that is timed."""

    runner: Runner
    controls: Controls
    head_at_exit: bool = False
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"prefill": [], "decode": []})
    kept: dict[str, np.ndarray] = field(default_factory=dict)


def run(form: Form, cache: Any, ids: np.ndarray, keep: bool) -> None:
    """One round of a form: a prompt, and single tokens behind it."""
    for phase in ("prefill", "decode"):
        calls = [ids] if phase == "prefill" else [ids[:, i : i + 1] for i in range(STEPS)]
        seconds, kept = [], []
        for call in calls:
            cache.roll_back([0 if phase == "prefill" else PROMPT_TOKENS])
            started = time.perf_counter()
            output = form.runner.step(cache, call, form.controls)
            seconds.append(time.perf_counter() - started)
            if output.kept is not None:
                kept.append(output.kept)
        if keep:
            form.seconds[phase].append(statistics.mean(seconds))
        policy = form.runner.manifest.policy
        if policy is not None:
            rows = np.full((form.runner.manifest.decoder.num_layers, 2), call.shape[1], float)
            columns = [BRANCHES.index(branch) for branch in policy.branches]
            rows[:, columns] = np.mean(kept, axis=0)[:, columns]  # a branch that may not be skipped always runs
            form.kept[phase] = rows


def work_of(
    kept: np.ndarray | None, tokens: int, keys: int, kv_rows: bool, head_at_exit: bool = False
) -> tuple[float, float]:
    """Floating-point operations of a call, and bytes that it reads.

    Args:
        kept: [L, 2], mean rows of each branch; None for all.
        tokens: of the call; keys: columns that its last token sees.
        kv_rows: whether K and V are computed for kept rows alone.
        head_at_exit: whether all tokens pass the head once more.
    """
    s = SHAPES["small"]
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
    flops = (
        exit_flops
        + 2 * head
        + 2 * (rows[:, 0].sum() * (query + 2 * width * seen) + kv_done.sum() * keyvalue + rows[:, 1].sum() * mlp)
    )
    kv_entered = ran[:, 0] if kv_rows else np.ones(layers)
    read = (
        heads * head + ran[:, 0].sum() * (query + 2 * kv * keys) + kv_entered.sum() * keyvalue + ran[:, 1].sum() * mlp
    )
    return float(flops), float(BYTES * read)


def main() -> None:
    """Run and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="directory for models and exports (1.5 GB)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--prepare", action="store_true", help="make models and exports, and end")
    args = parser.parse_args()
    rows = {name: ROWS[name] for name in dict.fromkeys(("dense", *args.rows))}
    prepare(args.work, rows)
    if args.prepare:
        return
    runners: dict[str, Runner] = {}
    forms: dict[str, Form] = {}
    for name, row in rows.items():
        if row.bundle not in runners:
            runners[row.bundle] = open_runner(open_bundle(args.work / f"rule-{row.bundle}"), threads=args.threads)
        runner = runners[row.bundle]
        forms[name] = Form(runner, controls_for(runner.manifest, row.keep), row.head_at_exit)
    caches = {id(runner): runner.new_cache(1, PROMPT_TOKENS + 1) for runner in runners.values()}
    ids = np.random.default_rng(0).integers(0, SHAPES["small"]["vocab_size"], (1, PROMPT_TOKENS))
    for number in range(args.rounds + 1):
        for form in forms.values():
            run(form, caches[id(form.runner)], ids, keep=number > 0)  # the first round warms up
    print(f"{PROMPT_TOKENS} tokens and single ones behind them, {args.threads} threads, {args.rounds} rounds in turn\n")
    heads = ["policy", "kept"]
    for phase, unit in (("prefill", "FLOPs"), ("decode", "bytes")):
        heads += [f"{phase} ms", "/dense", f"{unit} left", "over"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    dense = forms["dense"]
    for name, form in forms.items():
        policy = form.runner.manifest.policy
        kept = form.kept.get("prefill")
        columns = [] if policy is None else [BRANCHES.index(branch) for branch in policy.branches]
        cells = [name, "" if kept is None else f"{kept[:, columns].mean() / PROMPT_TOKENS:.3f}"]
        for phase, tokens, keys in (("prefill", PROMPT_TOKENS, PROMPT_TOKENS), ("decode", 1, PROMPT_TOKENS + 1)):
            kv_rows = form.runner.manifest.kv_policy != "compute"
            which = 0 if phase == "prefill" else 1
            share = (
                work_of(form.kept.get(phase), tokens, keys, kv_rows, form.head_at_exit)[which]
                / work_of(None, tokens, keys, False)[which]
            )
            ratio = statistics.median(a / b for a, b in zip(form.seconds[phase], dense.seconds[phase], strict=True))
            milliseconds = 1e3 * statistics.median(form.seconds[phase])
            cells += [f"{milliseconds:.1f}", f"{ratio:.3f}", f"{share:.3f}", f"{ratio / share - 1:+.1%}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
