"""Does every family compute what transformers computes, with every kind of rule and form? `gsx verify` of each.

    python -m benchmarks.family_parity --work DIR

The models are tiny and random (`tests/tiny.py`), with the family's own traits: what is compared is whole windows,
single steps with the cache, chunks, padded batches, and 256 greedy tokens, by the portable runner and the one that
generates. Quality in 8 and 4 bits cannot be judged on random weights; there a row shows that the form is made and runs,
and how far its numbers are from the model's. The last column is the size of an engine by TensorRT-RTX, which needs no
GPU to build it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import Table, parse, parser, print_header
from benchmarks.rule_parity import Line
from gsx.workflows.export import export
from gsx.workflows.quantize import Quantize
from gsx.workflows.verify import verify
from gsx_exporter.gate_config import GateConfig
from gsx_plugins.errors import GsxError
from tests.tiny import FAMILY_NAMES, tiny_checkpoint

LAYERS = 4


@dataclass(frozen=True)
class Form:
    """A form of a family's tiny model. Args: gate: of the checkpoint; options: of the export; builds: engines, too."""

    options: Mapping[str, Any] = field(default_factory=dict)
    gate: GateConfig | None = None
    builds: bool = False


def _rounded(scheme: Any) -> Form:
    return Form({"quantize": Quantize(scheme, ("none",))}, builds=True)


FORMS = {
    "dense": Form({"draft": "exit:2"}),
    "scalar gates": Form({"budget": 0.7}, GateConfig("scalar", "pre_norm")),
    "vector gates": Form({"budget": 0.7, "kv_policy": "copy"}, GateConfig("vector", "post_norm")),
    "layers": Form({"policy": "layers:0,2-3"}),
    "ffn-skip": Form({"policy": "ffn-skip", "budget": 0.8}),
    "calm": Form({"policy": "calm:softmax,threshold=0.3"}),
    "fp16": Form({"precision": "fp16"}, builds=True),
    "bf16": Form({"precision": "bf16"}, builds=True),
    "int8": _rounded("int8"),
    "int4": _rounded("int4"),
    "fp8": _rounded("fp8"),
}


def built(bundle: Path) -> str:
    """Whether TensorRT-RTX makes engines of a bundle."""
    from gsx_engines.building.build import build

    try:
        _, entry = build(bundle, backend="tensorrt-rtx", context=64, targets=["8.9"])
    except GsxError as error:
        return f"no: {error.what}"
    return f"{sum(graph.size_bytes for graph in entry.graphs.values()) / 1e6:.1f} MB"


def main(arguments: Sequence[str] | None = None) -> None:
    """Export and verify each form of each family, and print a table."""
    quick = {"families": ["phi3"], "forms": ["dense"], "tokens": 256}
    made = parser("family_parity", __doc__, work="models and exports", quick=quick)
    made.add_argument("--families", nargs="*", choices=FAMILY_NAMES, default=list(FAMILY_NAMES), help="(default: all)")
    made.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS), help="(default: all)")
    made.add_argument("--tokens", type=int, default=512, help="of the text (default: 512)")
    args = parse(made, arguments)
    print_header(made, args, arguments)
    heads = ("settings", "decisions", "differ", "error of a logit", "greedy tokens equal", "verify", "engine")
    lines = Table("family", "form", *heads)
    for family in args.families:
        for name in args.forms:
            lines.row(family, name, *_row(args.work / "now", family, FORMS[name], args.tokens))


def _row(work: Path, family: str, form: Form, tokens: int) -> list[str]:
    """Cells of a form."""
    shutil.rmtree(work, ignore_errors=True)
    model = tiny_checkpoint(work / "model", family, gate=form.gate, layers=LAYERS, tokenizer=True, exits=(1, 2))
    try:
        export(model, work / "bundle", calibration_tokens=4096, **form.options)
        report = verify(work / "bundle", tokens=tokens, full=True)
    except GsxError as error:
        return ["", "", "", "", "", f"refused: {error.what}", ""]
    settings, _, decisions, differ, off, greedy, verdict = Line(report).cells()
    return [settings, decisions, differ, off, greedy, verdict, built(work / "bundle") if form.builds else ""]


if __name__ == "__main__":
    main()
