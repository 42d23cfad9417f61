"""Measure the example model and write the figures into its card.

Perplexity on held-out files at several budgets (thresholds from the calibration files) and at each exit depth, and how
often an exit's first choice is the whole model's: the share of draft tokens that greedy speculation accepts.

The figure of a parity report comes from an export of the same model, verified on a held-out file.

    python examples/make_card.py     # examples/model/README.md, docs/images/quality.png and parity.png
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gsx.parity.plots import combined
from gsx.workflows.export import export
from gsx.workflows.verify import verify
from gsx_engines.bundle.words import BRANCHES
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.evaluation import Quality, evaluate, losses, reference_logits
from gsx_exporter.reference.model import Reference
from gsx_exporter.rules.calibration import calibrate
from gsx_exporter.rules.gateskip.reference import Threshold
from gsx_exporter.rules.gateskip.traced import GateSkip
from gsx_exporter.text import WINDOW_TOKENS
from gsx_exporter.training.corpus import Document, read_corpus, split

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = (1.0, 0.85, 0.7, 0.5)
HELD_OUT_TOKENS = 32 * 1024
CALIBRATION_TOKENS = 8 * 1024
BEGIN, END = "<!-- figures: examples/make_card.py -->", "<!-- /figures -->"


@dataclass(frozen=True)
class Budget:
    """Quality at one budget, and the share actually kept on the held-out text."""

    budget: float
    kept_share: float
    quality: Quality


@dataclass(frozen=True)
class Exit:
    """Quality after some layers; accepted: share of positions where its first choice is the whole model's."""

    depth: int
    quality: Quality
    accepted: float


def windows_of(documents: Sequence[Document], tokenizer: Tokenizer, tokens: int) -> np.ndarray:
    """Whole windows [M, S] of all documents, evenly thinned out to about this many tokens."""
    prefix = tokenizer.encode("").ids
    body = WINDOW_TOKENS - len(prefix)
    rows = []
    for document in documents:
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        rows += [prefix + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    step = max(1, len(rows) * WINDOW_TOKENS // tokens)
    return np.asarray(rows[::step], dtype=np.int64)


def at_budgets(
    checkpoint: Checkpoint, reference: Reference, held_out: np.ndarray, calibration: np.ndarray
) -> list[Budget]:
    """Quality at each budget."""
    points = calibrate(checkpoint, calibration, BUDGETS, DecoderOptions(GateSkip.of(checkpoint.config)))
    columns = [BRANCHES.index(branch) for branch in checkpoint.config.gated_branches]
    found = []
    for point in points:
        rule = Threshold(point.thresholds)
        quality = evaluate(reference_logits(reference, rule), held_out)
        sample = reference(torch.from_numpy(held_out[:: max(1, len(held_out) // 16)]), rule=rule)
        kept = [float(row[column].float().mean()) for row in sample.keep for column in columns]
        found.append(Budget(point.budget, float(np.mean(kept)), quality))
    return found


def at_exits(checkpoint: Checkpoint, reference: Reference, held_out: np.ndarray) -> list[Exit]:
    """Quality at each exit depth, and at full depth."""
    depths = [*checkpoint.config.exits, checkpoint.config.num_layers]
    total, accepted, positions = dict.fromkeys(depths, 0.0), dict.fromkeys(depths, 0), 0
    predicted = 0
    for start in range(0, len(held_out), 4):
        ids = held_out[start : start + 4]
        output = reference(torch.from_numpy(ids))
        best = output.logits.argmax(-1)
        positions += best.numel()
        predicted += ids[:, 1:].size
        for depth in depths:
            logits = reference.exit_logits(output, depth)
            accepted[depth] += int((logits.argmax(-1) == best).sum())
            total[depth] += float(losses(logits.numpy(), ids).sum())
    return [Exit(d, Quality(total[d] / predicted, predicted), accepted[d] / positions) for d in depths]


def table(budgets: Sequence[Budget], exits: Sequence[Exit], windows: np.ndarray) -> str:
    """The section of the card."""
    lines = [
        f"Perplexity on held-out files of the corpus ({windows.size:,} tokens in windows of {windows.shape[1]}),",
        "with thresholds from its calibration files:",
        "",
        "| budget | kept on this text | perplexity | nats per token |",
        "|---:|---:|---:|---:|",
        *(
            f"| {one.budget:g} | {one.kept_share:.3f} | {one.quality.perplexity:.2f} | {one.quality.nats:.4f} |"
            for one in budgets
        ),
        "",
        "After only the first layers, nothing skipped; *accepted* is the share of positions where the exit's first",
        "choice is the whole model's, which is what greedy self-speculation accepts:",
        "",
        "| exit after | perplexity | nats per token | accepted |",
        "|---:|---:|---:|---:|",
        *(
            f"| {one.depth} of {exits[-1].depth} layers | {one.quality.perplexity:.2f} | {one.quality.nats:.4f} "
            f"| {one.accepted:.1%} |"
            for one in exits
        ),
    ]
    return "\n".join(lines)


def picture(budgets: Sequence[Budget], exits: Sequence[Exit], path: Path) -> None:
    """The same as a plot."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
    with matplotlib.rc_context({**style, "grid.color": "#e3e7ec", "axes.axisbelow": True}):
        figure = Figure(figsize=(11, 3.2), layout="constrained", facecolor="white")
        left, middle, right = figure.subplots(1, 3)
        series = (
            (left, [b.budget for b in budgets], [b.quality.perplexity for b in budgets], "budget", "perplexity"),
            (middle, [e.depth for e in exits], [e.quality.perplexity for e in exits], "exit after layer", "perplexity"),
            (right, [e.depth for e in exits], [100 * e.accepted for e in exits], "exit after layer", "accepted, %"),
        )
        for axis, x, y, across, up in series:
            axis.plot(x, y, marker="o", color="#3b82c4")
            for at, value in zip(x, y, strict=True):
                axis.annotate(
                    f"{value:.3g}", (at, value), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8
                )
            axis.set_xlabel(across)
            axis.set_ylabel(up)
            axis.set_xticks(x, [f"{one:g}" for one in x])
            axis.margins(x=0.1, y=0.2)
        left.invert_xaxis()
        left.set_title("What skipping costs")
        middle.set_title("What an early exit costs")
        right.set_title("Draft tokens accepted")
        figure.savefig(path, dpi=130)


def parity_picture(model: Path, text: str, path: Path) -> None:
    """Export at budget 0.7, verify on a text, and draw the report."""
    with tempfile.TemporaryDirectory() as place:
        held_out = Path(place) / "held-out.txt"
        held_out.write_text(text, encoding="utf-8")
        export(model, Path(place) / "bundle", budget=0.7)
        report = verify(Path(place) / "bundle", text=held_out, full=True)
    if not report.passed:
        raise SystemExit("parity fails: the picture was not drawn")
    combined(report, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "model")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images", help="where pictures go")
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    reference = Reference.load(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    parts = split(read_corpus())
    held_out = windows_of(parts["heldout"], tokenizer, HELD_OUT_TOKENS)
    calibration = windows_of(parts["calibration"], tokenizer, CALIBRATION_TOKENS)
    budgets = at_budgets(checkpoint, reference, held_out, calibration)
    exits = at_exits(checkpoint, reference, held_out)
    section = table(budgets, exits, held_out)
    print(section)
    card = options.model / "README.md"
    text = card.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{card}: has no place for the figures; put these two lines in it: {BEGIN} {END}")
    card.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}", encoding="utf-8")
    options.pictures.mkdir(parents=True, exist_ok=True)
    picture(budgets, exits, options.pictures / "quality.png")
    parity_picture(options.model, max((one.text for one in parts["heldout"]), key=len), options.pictures / "parity.png")


if __name__ == "__main__":
    main()
