"""`gsx export`: checkpoint -> calibrated thresholds -> ONNX -> a bundle."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch

from engines.bundle import manifest as schema
from engines.bundle.bundle import Bundle, open_bundle, sha256_of, write_manifest, writing
from engines.errors import UsageError
from engines.speculation.spec import check_draft, check_exit, parse_draft, refuse_rank, refuse_ungated
from exporter.calibration import DEFAULT_GRID, DEFAULT_TOKENS, calibrate
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.config import KvPolicy, ModelConfig
from exporter.decoder.layer import DecoderOptions, Selection
from exporter.graph.assemble import GraphBuilder, Graphs
from exporter.graph.weights import WeightsFile, write_weights
from exporter.text import TokenText, tokenize

Precision = Literal["fp32", "fp16", "bf16"]
_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
WEIGHTS_FILE = "weights.bin"
# Room for graphs, tokenizer and manifest beside the weights.
_SLACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Progress:
    """A step of an export: what is going on, and how far it is (done of total; total 0: not known)."""

    stage: str
    done: int
    total: int


def export(
    model: str | Path,
    output: str | Path,
    *,
    budget: float | None = None,
    select: Selection = "threshold",
    kv_policy: KvPolicy = "compute",
    precision: Precision = "fp32",
    calibration: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    draft: str | None = None,
    overwrite: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Bundle:
    """Export a checkpoint to a bundle.

    Args:
        model: a local model directory or a hub id.
        output: the bundle's directory; appears whole or not at all.
        budget: share of (token, branch) pairs kept by default, in (0, 1]; 1 if not given. It can be changed at
            run time without a new export.
        select: how kept tokens are chosen (docs/design.md, section 3).
        kv_policy: K and V of skipped tokens: their own (`compute`) or the layer below's (`copy`).
        precision: type of weights and activations.
        calibration: UTF-8 text for the thresholds; None for the text that ships with gsx.
        calibration_tokens: how much of it to use.
        draft: how to draft for self-speculative decoding: `exit:E`, `budget:B` or `layers:SET` (see
            `engines.speculation.spec.parse_draft`); None for no draft.
        overwrite: replace a bundle that is already at `output`.
        on_progress: called as it goes.
    Raises:
        GsxError: whatever is wrong with the input or the disk, in words.
    """
    if budget is not None:
        schema.check_budget(budget)
    if calibration_tokens < 1:
        raise UsageError("calibration tokens", expected="a positive number", found=str(calibration_tokens))
    on_progress(Progress("checking the checkpoint", 0, 0))
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    options = DecoderOptions(select, kv_policy, _DTYPES[precision])
    _check_choices(config, budget, kv_policy, calibration)
    drafting = _draft(draft, config, select)
    bytes_each = 4 if precision == "fp32" else 2
    needed = checkpoint.weight_bytes() * bytes_each // 4 + _SLACK_BYTES
    with writing(Path(output), overwrite=overwrite, needed_bytes=needed) as work:
        selection = None
        if config.gate is not None:
            selection = _selection(checkpoint, options, budget or 1.0, calibration, calibration_tokens, on_progress)
        on_progress(Progress("tracing", 0, 0))
        builder = GraphBuilder(checkpoint, options, _default_select(selection))
        exit_layer = drafting.draft.layer if drafting and drafting.draft.kind == "exit" else None
        graphs = builder.graphs(exit_layer)
        weights = _write(work, checkpoint, graphs, on_progress)
        for path in checkpoint.companions():
            shutil.copyfile(path, work / path.name)
        on_progress(Progress("hashing the source weights", 0, 0))
        manifest = _manifest(checkpoint, options, precision, selection, graphs, weights, drafting, work)
        if drafting is not None:
            check_draft(drafting.draft, manifest)
        write_manifest(work, manifest)
    return open_bundle(output)


def _check_choices(
    config: ModelConfig, budget: float | None, kv_policy: KvPolicy, calibration: str | Path | None
) -> None:
    if config.gate is None:
        for name, given in (
            ("--budget", budget is not None and budget != 1),
            ("--kv-policy copy", kv_policy == "copy"),
            ("--calibration", calibration is not None),
        ):
            if given:
                raise UsageError(
                    f"{name} needs gates, and this checkpoint has none",
                    expected='a "gsx" section with "gate" in config.json, and gate tensors',
                    found="a dense model",
                    todo="train gates first (gsx train), or leave the option out for a dense export",
                )
    if kv_policy == "copy" and "attn" not in config.gated_branches:
        raise UsageError(
            "--kv-policy copy needs gates on the attention branch",
            found="gates on " + ", ".join(config.gated_branches),
        )


def _draft(draft: str | None, config: ModelConfig, select: Selection) -> schema.DraftEntry | None:
    """The draft that was asked for, as far as it can be checked before any work."""
    if draft is None:
        return None
    parsed = parse_draft(draft)
    if select == "rank" and config.gate is not None:
        refuse_rank()
    if parsed.kind == "exit":
        check_exit(parsed.layer, config.num_layers)
    elif config.gate is None:
        refuse_ungated(parsed)
    return schema.DraftEntry(draft=parsed)


def _selection(
    checkpoint: Checkpoint,
    options: DecoderOptions,
    budget: float,
    calibration: str | Path | None,
    calibration_tokens: int,
    on_progress: Callable[[Progress], None],
) -> schema.Selection:
    if options.selection == "rank":
        return schema.Selection(mode="rank", budget=budget)
    text = tokenize(checkpoint, Path(calibration) if calibration else None, max_tokens=calibration_tokens)
    grid = grid_with(budget)
    points = calibrate(
        checkpoint,
        text.ids,
        grid,
        options,
        on_layer=lambda done, total: on_progress(Progress("calibrating", done, total)),
    )
    return schema.Selection(
        mode="threshold",
        budget=budget,
        grid=tuple(
            schema.GridPoint(
                budget=point.budget,
                thresholds=tuple((float(a), float(b)) for a, b in point.thresholds),
                kept_share=point.kept_share,
                kept=tuple((float(a), float(b)) for a, b in point.kept),
            )
            for point in points
        ),
        calibration=_text_entry(text),
    )


def grid_with(budget: float) -> Sequence[float]:
    """The calibrated budgets: the default grid and the budget asked for, in falling order."""
    return sorted({*DEFAULT_GRID, budget}, reverse=True)


def _text_entry(text: TokenText) -> schema.CalibrationText:
    return schema.CalibrationText(name=text.name, sha256=text.sha256, tokens=text.tokens)


def _default_select(selection: schema.Selection | None) -> np.ndarray | None:
    if selection is None:
        return None
    if selection.mode == "rank":
        return np.array(selection.budget, np.float32)
    return selection.thresholds_for(selection.budget)


def _write(work: Path, checkpoint: Checkpoint, graphs: Graphs, on_progress: Callable[[Progress], None]) -> WeightsFile:
    """The graphs and the weights file, to which the graphs' initializers refer."""
    total = len(graphs.weights)
    done = 0

    def count(name: str) -> None:
        nonlocal done
        done += 1
        on_progress(Progress("writing weights", done, total))

    weights = write_weights(work / WEIGHTS_FILE, graphs.weights, checkpoint.tensor, count)
    for name, model in graphs.models.items():
        read = {value for node in model.graph.node for value in node.input}
        model.graph.initializer.extend(tensor for key, tensor in weights.initializers.items() if key in read)
        (work / graph_file(name)).write_bytes(model.SerializeToString())
    return weights


def graph_file(name: str) -> str:
    """File of a graph of the bundle."""
    return f"{name}.onnx"


def _manifest(
    checkpoint: Checkpoint,
    options: DecoderOptions,
    precision: Precision,
    selection: schema.Selection | None,
    graphs: Graphs,
    weights: WeightsFile,
    draft: schema.DraftEntry | None,
    work: Path,
) -> schema.Manifest:
    config = checkpoint.config
    gate = config.gate
    return schema.Manifest(
        schema_version=schema.SCHEMA_VERSION,
        gsx_version=version("gsx"),
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        },
        source=schema.SourceModel(model=checkpoint.source, weights_sha256=checkpoint.weights_sha256()),
        decoder=schema.DecoderShape(
            family=config.family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_positions=config.max_positions,
            windows=config.windows,
            bos_id=config.bos_id,
            eos_ids=config.eos_ids,
            pad_id=config.pad_id,
        ),
        gates=schema.Gates(kind=gate.kind, input=gate.input, branches=gate.branches) if gate else None,
        selection=selection,
        kv_policy=options.kv_policy,
        precision=precision,
        graphs={name: _graph_entry(model, work / graph_file(name)) for name, model in graphs.models.items()},
        weights=schema.WeightsEntry(file=WEIGHTS_FILE, sha256=weights.sha256, size_bytes=weights.size_bytes),
        draft=draft,
    )


def _graph_entry(model: onnx.ModelProto, path: Path) -> schema.GraphEntry:
    def info(value: onnx.ValueInfoProto) -> schema.TensorInfo:
        tensor = value.type.tensor_type
        return schema.TensorInfo(
            name=value.name,
            type=onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
            shape=tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim),
        )

    ops = {f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node}
    return schema.GraphEntry(
        file=path.name,
        sha256=sha256_of(path),
        inputs=tuple(info(value) for value in model.graph.input),
        outputs=tuple(info(value) for value in model.graph.output),
        ops=tuple(sorted(ops)),
    )
