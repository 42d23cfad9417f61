"""What it costs to hold a budget: quality at the share kept, beside fixed thresholds that keep the same share.

Each window of a text is read as generation would read it: the first tokens as a prompt, the others one by one, with the
thresholds that the rule of `gsx_engines/bundle/hold.py` gives. The text is given, so the loss of its tokens compares.

    python -m benchmarks.hold out/demo --text code=main.py --text prose=README.md
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gsx_engines.bundle.bundle import open_bundle
from gsx_engines.bundle.controls import KeepSettings, controls_for
from gsx_engines.bundle.hold import hold_of, with_thresholds
from gsx_engines.runners.base import Runner
from gsx_engines.runners.select import open_runner
from gsx_engines.tokens import BundleTokenizer

PROMPT = 64
# Settings of the curve of fixed thresholds, on which an equal share is looked up.
FIXED = (1.0, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


@dataclass(frozen=True)
class Reading:
    """What reading some windows kept and cost.

    Args:
        share: of (token, branch) pairs kept by the tokens behind the prompts.
        worst: the largest distance of a window's share from the budget.
        nats: mean loss of these tokens.
    """

    share: float
    worst: float
    nats: float


def read(runner: Runner, windows: np.ndarray, keep: KeepSettings) -> Reading:
    """Read windows [n, S] int64, all together."""
    manifest, (batch, size) = runner.manifest, windows.shape
    controls = controls_for(manifest, keep, [PROMPT] * batch)
    cache = runner.new_cache(batch, size)
    runner.step(cache, windows[:, :PROMPT], controls, logits="none")
    holds = [hold_of(manifest, keep) for _ in range(batch)]
    kept = np.zeros(batch)
    nats = []
    for place in range(PROMPT, size):
        output = runner.step(cache, windows[:, place : place + 1], controls)
        assert output.kept_by_token is not None
        kept += output.kept_by_token[:, 0]
        changed = False
        for hold, count in zip(holds, output.kept_by_token[:, 0], strict=True):
            changed |= hold is not None and hold.read(int(count))
        if changed:
            controls = with_thresholds(controls, holds)
        if place + 1 < size:
            scores = output.logits[:, 0].astype(np.float64)
            scores -= scores.max(axis=1, keepdims=True)
            right = np.take_along_axis(scores, windows[:, place + 1 : place + 2], axis=1)[:, 0]
            nats.append(np.log(np.exp(scores).sum(axis=1)) - right)
    shares = kept / ((size - PROMPT) * len(manifest.skippable_places))
    budget = keep.budget or 1.0
    return Reading(float(shares.mean()), float(np.abs(shares - budget).max()), float(np.mean(nats)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table of all texts and budgets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--budgets", default="0.9,0.8,0.7,0.6")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--quick", action="store_true", help="two short windows: only whether it works")
    asked = parser.parse_args(arguments)
    if asked.quick:
        asked.windows, asked.size, asked.budgets = 2, PROMPT + 40, "0.7"
    bundle = open_bundle(asked.bundle)
    runner, tokenizer = open_runner(bundle), BundleTokenizer(bundle)
    least = bundle.manifest.selection.grid[-1].budget if bundle.manifest.selection else 1.0
    print("| text | budget | fixed thresholds keep | held keeps | furthest window | loss held | fixed at that share |")
    print("|---|---|---|---|---|---|---|")
    for name, path in (one.split("=", 1) for one in asked.text):
        ids = np.array(tokenizer.encode_prompt(Path(path).read_text(encoding="utf-8")), np.int64)
        windows = ids[: len(ids) // asked.size * asked.size].reshape(-1, asked.size)[: asked.windows]
        curve = {budget: read(runner, windows, KeepSettings(budget=budget)) for budget in FIXED if budget >= least}
        shares, losses = zip(*sorted((one.share, one.nats) for one in curve.values()), strict=True)
        for budget in map(float, asked.budgets.split(",")):
            found = read(runner, windows, KeepSettings(budget=budget, hold=True))
            equal = np.interp(found.share, shares, losses)
            kept = f"{curve[budget].share:.3f} | {found.share:.3f} | {found.worst:.3f}"
            text = f"{name}, {len(windows)} x {asked.size}"
            print(f"| {text} | {budget:g} | {kept} | {found.nats:.4f} | {equal:.4f} |", flush=True)


if __name__ == "__main__":
    main()
