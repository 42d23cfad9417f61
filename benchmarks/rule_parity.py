"""Does every keep rule decide and generate what PyTorch does? `gsx verify` of each on the example model, in one table.

    python -m benchmarks.rule_parity --work DIR

Rules of trained methods get what they need added to the model's weights: classifiers are fitted, routers are random,
their thresholds calibrated, so that they skip. A row is one verification over all of its usual settings: whole windows,
single steps with the cache, padded batches, and greedy text by the runner that generates and by the portable one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.bundles import EXAMPLE, exported
from benchmarks.measure import Table, parse, parser, print_header
from gsx.parity.report import Report
from gsx.workflows.verify import verify
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.names import CONFIG, WEIGHTS
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.gate_config import GateConfig
from gsx_exporter.router_config import NetConfig, RouterConfig
from gsx_exporter.training.exit_classifiers import train_exit_classifiers

CLASSIFIER_TOKENS = 8192


@dataclass(frozen=True)
class Row:
    """A rule. Args: model: which form of the example model; options: of its export."""

    options: Mapping[str, Any]
    model: str = "gated"


@dataclass(frozen=True)
class Routed:
    """Routers of a method, for a model of 16 layers and hidden size 96.

    Args:
        budget: the calibrated budget; None for the method's own threshold.
        scale: scale of the random weights. Scores that multiply a layer's output must not be much above 1, or rounding
            grows from layer to layer until PyTorch's own float32 is meaningless.
    """

    router: RouterConfig
    budget: float | None = 0.7
    scale: float = 1.0


ROUTED = {
    "mixture-of-depths": Routed(
        RouterConfig(layers=tuple(range(1, 16, 2)), multiplies="layer", kv_policy="none"), 0.5, scale=0.05
    ),
    "d-llm": Routed(
        RouterConfig(
            layers=tuple(range(2, 16)),
            net=NetConfig(hidden=24, activation="silu", norm=True),
            output="softmax",
            keep_logit=1,
            threshold=0.5,
            kv_policy="none",
            full_first=2,
        )
    ),
    "skipgpt": Routed(
        RouterConfig(decides="branch", net=NetConfig(hidden=24), output="difference", keep_logit=0, threshold=0.0)
    ),
    "flexidepth": Routed(
        RouterConfig(
            layers=tuple(range(8, 16)),
            input="post_norm",
            net=NetConfig(hidden=6, activation="tanh", norm=True, bias=False),
            output="sigmoid",
            threshold=0.5,
            multiplies="mlp",
            adapter=16,
        )
    ),
}

ROWS = {
    "gateskip": Row({"budget": 0.7}),
    "gateskip, rank": Row({"budget": 0.7, "select": "rank"}),
    "layers and exits": Row({"policy": "layers:0-7,9-15"}),
    "layers, dense model": Row({"policy": "layers:0-7,9-15"}, "dense"),
    "unified 1.33": Row({"policy": "unified:1.33"}),
    "ffn-skip": Row({"policy": "ffn-skip"}),
    "ffn-skip, dense model": Row({"policy": "ffn-skip"}, "dense"),
    "calm, softmax": Row({"policy": "calm:softmax,threshold=0.3"}),
    "calm, state": Row({"policy": "calm:state,threshold=0.9"}),
    "calm, classifier": Row({"policy": "calm:classifier,threshold=0.7"}, "classifiers"),
    **{name: Row({"budget": one.budget}, name) for name, one in ROUTED.items()},
}


def make_form(name: str, work: Path) -> Path:
    """The example model as it is, or a form of it; made once."""
    if name == "gated":
        return EXAMPLE
    path = work / f"model-{name}"
    if path.exists():
        return path
    if name == "classifiers":
        train_exit_classifiers(EXAMPLE, path, tokens=CLASSIFIER_TOKENS)
        return path
    write_ungated(open_checkpoint(EXAMPLE), path, ROUTED.get(name))
    return path


def write_ungated(model: Checkpoint, path: Path, routed: Routed | None) -> None:
    """The model with random routers instead of its gates."""
    gate = model.config.gate or GateConfig()
    left_out = tuple(f"{branch}_gate" for branch in gate.branches)
    tensors = {n: model.tensor(n) for n in model.names if not any(f".{gate_name}." in n for gate_name in left_out)}
    section: dict[str, Any] = {"exits": list(model.config.exits)}
    if routed is not None:
        router = routed.router
        section["router"] = router.to_dict()
        rng = torch.Generator().manual_seed(0)
        for layer in router.routed(model.config.num_layers):
            for name, shape in router.shapes(model.config.hidden_size).items():
                # Scores of order 1, whatever a state's size: weights of a linear map from one, ones in a norm.
                noise = torch.randn(shape, generator=rng) * routed.scale / shape[-1] ** 0.5
                tensors[f"model.layers.{layer}.{name}"] = torch.ones(shape) if "norm" in name else noise
    path.mkdir(parents=True)
    for file in model.companions():
        shutil.copyfile(file, path / file.name)
    raw = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    (path / CONFIG).write_text(json.dumps({**raw, "gsx": section}, indent=2), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)


HEADS = ("settings", "least kept", "decisions", "differ", "largest error of a logit", "greedy tokens equal", "")


@dataclass
class Line:
    """A row of the table, from a report."""

    report: Report
    failed: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.failed = [check.name for check in self.report.checks if check.verdict == "fail"]

    def cells(self) -> list[str]:
        """Cells of `HEADS` after the rule's name."""
        results = self.report.results
        passes = [(one.windows, one.single_steps, one.one_chunk, one.padded) for one in results]
        decisions = [one.decisions for row in passes for one in row if one is not None and one.decisions is not None]
        kept = min((result.kept_share for result in results if result.kept_share is not None), default=1.0)
        greedy = [one for result in results for one in result.greedy.values()]
        tokens = sum(one.tokens for one in greedy)
        error = max(one.fast_logits.max_abs for one in results if one.fast_logits is not None)
        return [
            str(len(results)),
            f"{kept:.1%}",
            f"{sum(one.compared for one in decisions):,}",
            f"{sum(one.differ for one in decisions)} ({sum(one.near_ties for one in decisions)} near ties)",
            f"{error:.1e}",
            f"{tokens - sum(len(one.mismatches) for one in greedy):,} of {tokens:,}",
            "passes" if not self.failed else "fails: " + "; ".join(self.failed),
        ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Verify each rule, and print a table."""
    quick = {"rows": ["gateskip"], "tokens": 256}
    made = parser("rule_parity", __doc__, work="models and exports", quick=quick)
    made.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="(default: all)")
    made.add_argument("--tokens", type=int, default=512, help="of the text (default: 512)")
    made.add_argument("--backend", choices=["onnxruntime", "torch"], default="onnxruntime")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    lines = Table("rule", *HEADS)
    for name in args.rows:
        row = ROWS[name]
        path = args.work / f"parity-{name.replace(', ', '-').replace(' ', '-')}"
        bundle = exported(path, make_form(row.model, args.work), **row.options)
        lines.row(name, *Line(verify(bundle.directory, tokens=args.tokens, backend=args.backend, full=True)).cells())


if __name__ == "__main__":
    main()
