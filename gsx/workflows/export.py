"""`gsx export`: checkpoint -> calibrated thresholds -> ONNX -> a bundle."""

from __future__ import annotations

import dataclasses
import functools
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from gsx.policies.base import Choice, Plan
from gsx.policies.registry import plan_policy
from gsx.policies.thresholds import grid_with
from gsx.workflows.draft_search import DraftSearch
from gsx.workflows.graph_files import write_graphs
from gsx.workflows.quantize import MEASURED_WINDOWS, Quantize, plan_for
from gsx_engines.bundle.bundle import Bundle, open_bundle, write_manifest, writing
from gsx_engines.bundle.controls import default_controls
from gsx_engines.bundle.drafts import DraftEntry
from gsx_engines.bundle.manifest import (
    SCHEMA_VERSION,
    DecoderShape,
    Gates,
    GraphEntry,
    KvCache,
    Manifest,
    Quantization,
    SourceModel,
    WeightsEntry,
)
from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import Selection as SelectionSection
from gsx_engines.bundle.selection import check_budget
from gsx_engines.draft_trials.measure import SHORTEST_CONTEXT, candidate_exits
from gsx_engines.lowering.probe import is_supported
from gsx_engines.speculation.spec import check_draft, check_exit, check_layers, parse_draft, refuse_other, refuse_rank
from gsx_exporter.calibration import DEFAULT_TOKENS
from gsx_exporter.checkpoint import Checkpoint, open_checkpoint
from gsx_exporter.config import KvPolicy, ModelConfig
from gsx_exporter.decoder.layer import DecoderOptions
from gsx_exporter.graph.assemble import GraphBuilder
from gsx_exporter.graph.weights import WeightsFile, write_weights
from gsx_exporter.quantization.kv_cache import int8_kv_cache
from gsx_exporter.quantization.qdq import quantize_graphs
from gsx_exporter.rules.gateskip import Selection
from gsx_exporter.rules.registry import rule_of
from gsx_exporter.text import WINDOW_TOKENS, behind, tokenize
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

Precision = Literal["fp32", "fp16", "bf16"]
KvCacheType = Literal["int8"]
_DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
WEIGHTS_FILE = "weights.bin"
# Drafts that an export looks for: the exit, or the set of branches left out, that gains most on this machine.
SEARCHED_DRAFTS = ("auto", "layers:auto")
# Room for graphs, tokenizer and manifest beside the weights.
_SLACK_BYTES = 64 << 20


def export(
    model: str | Path,
    output: str | Path,
    *,
    policy: str | None = None,
    budget: float | None = None,
    select: Selection = "threshold",
    kv_policy: KvPolicy | None = None,
    precision: Precision = "fp32",
    calibration: str | Path | None = None,
    calibration_tokens: int = DEFAULT_TOKENS,
    draft: str | None = None,
    quantize: Quantize | None = None,
    kv_cache: KvCacheType | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Bundle:
    """Export a checkpoint to a bundle.

    Args:
        model: a local model directory or a hub id.
        output: the bundle's directory; appears whole or not at all.
        policy: the keep rule, `NAME` or `NAME:parameters` (docs/policies.md); None for GateSkip on a gated checkpoint,
            for no skipping on a dense one.
        budget: share of (token, branch) pairs kept by default, in (0, 1]; 1 if not given. It can be changed at
            run time without a new export.
        select: how GateSkip chooses kept tokens (docs/design.md, section 3).
        kv_policy: K and V of skipped tokens: their own (`compute`), the layer below's (`copy`), or none where the set
            of layers stays the same for a request (`none`). None: `none` for sets of layers, else `compute`.
        precision: type of weights and activations.
        calibration: UTF-8 text for the thresholds; None for the text that ships with gsx.
        calibration_tokens: how much of it to use.
        draft: how to draft for self-speculative decoding: `exit:E`, `budget:B` or `layers:SET` (see
            `gsx_engines.speculation.spec.parse_draft`), or `auto` for the exit, `layers:auto` for the set of layers
            left out, that gains most over plain decoding on this machine, on the calibration text; None for no draft.
        quantize: what to run in 8 bits; None for nothing.
        kv_cache: type in which K and V are kept on ONNX Runtime; None for that of the activations.
        overwrite: replace a bundle that is already at `output`.
        on_progress: called as it goes.
    Raises:
        GsxError: whatever is wrong with the input or the disk, in words.
    """
    if budget is not None:
        check_budget(budget)
    if calibration_tokens < 1:
        raise UsageError("calibration tokens", expected="a positive number", found=str(calibration_tokens))
    on_progress(Progress("checking the checkpoint"))
    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    keep = plan_policy(Choice(policy, select, budget, kv_policy), config)
    if quantize is not None and config.router is not None:
        raise UsageError(
            "8 bits are not offered for checkpoints with routers",
            expected="fp32, fp16 or bf16",
            found="routers, whose inputs smoothing would change",
            todo="export without --int8 and --fp8",
        )
    options = DecoderOptions(keep.rule, keep.kv_policy, _DTYPES[precision])
    if kv_cache is not None:
        _check_kv_cache(config, keep, precision, quantize)
    exits = _exits(draft, config, keep, precision)
    parsed = parse_draft(draft) if draft is not None and draft not in SEARCHED_DRAFTS else None
    reads_text = keep.calibrates or draft in SEARCHED_DRAFTS or (quantize is not None and quantize.reads_text)
    reads_text = reads_text or kv_cache is not None
    if calibration is not None and not reads_text:
        raise UsageError(
            "--calibration: this export reads no text",
            found=f"policy {keep.name}",
            todo="leave it out",
        )
    text = unseen = None
    if reads_text:
        source = Path(calibration) if calibration else None
        text = tokenize(checkpoint, source, max_tokens=calibration_tokens, window=keep.window)
        if quantize is not None and quantize.measured:
            unseen = behind(checkpoint, source, text.tokens, MEASURED_WINDOWS * WINDOW_TOKENS)
    bytes_each = 4 if precision == "fp32" else 2
    needed = checkpoint.weight_bytes() * bytes_each // 4 + _SLACK_BYTES
    with writing(Path(output), overwrite=overwrite, needed_bytes=needed) as work:
        section, selection = keep.settle(checkpoint, options, text, on_progress)
        options = dataclasses.replace(options, rule=rule_of(section, selection, config))  # with what was calibrated
        defaults = default_controls(section, selection)
        plan = quantization = None
        if quantize is not None:
            plan, quantization = plan_for(
                checkpoint,
                options,
                quantize,
                selection,
                defaults,
                text,
                on_progress,
                unseen=unseen,
            )
        eight_bits = None
        if kv_cache is not None:
            assert text is not None
            eight_bits = int8_kv_cache(
                checkpoint,
                text,
                defaults,
                options,
                on_progress,
            )
        on_progress(Progress("tracing"))
        rewrite = None if plan is None else functools.partial(quantize_graphs, plan=plan, dtype=options.dtype)
        builder = GraphBuilder(checkpoint, options, defaults, rewrite)
        graphs = builder.graphs(exits[0] if exits else None)
        read = plan.checkpoint.tensor if plan is not None else checkpoint.tensor
        weights = write_weights(work / WEIGHTS_FILE, graphs.weights, read, on_progress)
        entries = write_graphs(work, graphs, weights)
        for path in checkpoint.companions():
            shutil.copyfile(path, work / path.name)
        on_progress(Progress("hashing the source weights"))
        manifest = _manifest(
            checkpoint, options, precision, section, selection, quantization, eight_bits, entries, weights
        )
        if draft in SEARCHED_DRAFTS:
            assert text is not None
            search = DraftSearch(work, manifest, builder, weights, text.ids, on_progress)
            manifest = search.best_exit(exits) if draft == "auto" else search.best_layers()
        elif parsed is not None:
            manifest = manifest.model_copy(update={"draft": DraftEntry(draft=parsed)})
            check_draft(parsed, manifest)
        write_manifest(work, manifest)
    return open_bundle(output)


def _exits(draft: str | None, config: ModelConfig, keep: Plan, precision: Precision) -> Sequence[int]:
    """The exits to split at: several are candidates; none for other drafts. What cannot be is refused at once."""
    if draft is None:
        return ()
    parsed = None if draft in SEARCHED_DRAFTS else parse_draft(draft)
    if keep.rule is not None and keep.rule.by_rank:
        refuse_rank()
    if parsed is None:
        if precision == "bf16":
            raise UsageError(
                f"--draft {draft} measures on ONNX Runtime, which computes bf16 in float32 on a CPU",
                expected="fp32 or fp16",
                found=precision,
                todo="name the draft: --draft exit:E or layers:SET",
            )
        if config.max_positions < SHORTEST_CONTEXT:
            raise UsageError(
                f"--draft {draft} needs room to generate",
                expected=f"a model with {SHORTEST_CONTEXT} positions or more",
                found=str(config.max_positions),
                todo="name the draft: --draft exit:E or layers:SET",
            )
        if draft == "auto":
            return candidate_exits(config.exits, config.num_layers)
        if keep.rule is None or not keep.drafts_layers:
            refuse_other(draft)
        if config.num_layers * len(keep.rule.branches) < 2:
            raise UsageError(f"--draft {draft} needs two branches that may be skipped, or more", found="one")
        return ()
    if parsed.kind == "exit":
        check_exit(parsed.layer, config.num_layers)
        return (parsed.layer,)
    if parsed.kind == "layers":
        if keep.rule is None or not keep.drafts_layers:
            refuse_other(parsed)
        check_layers(parsed, config.num_layers, keep.rule.branches)
    elif keep.budget is None:
        refuse_other(parsed)
    elif parsed.budget < min(grid_with(keep.budget)):
        raise UsageError(
            f"the draft's budget lies below the calibrated grid: {parsed}",
            expected=f"{min(grid_with(keep.budget)):g} to 1",
            found=f"{parsed.budget:g}",
        )
    return ()


def _check_kv_cache(config: ModelConfig, keep: Plan, precision: Precision, quantize: Quantize | None) -> None:
    """Refuse 8-bit K and V where no runtime keeps them."""
    reason: str | None = None
    found = ""
    if precision != "fp32" or (quantize is not None and quantize.scheme == "fp8"):
        reason = "ONNX Runtime keeps codes beside float32 on a CPU, and TensorRT's K/V update takes floats alone"
        found = precision if precision != "fp32" else "fp8"
    elif keep.kv_policy == "none" and config.router is not None:
        reason = "a token that was skipped is known by its zeros in the cache, and codes round to zeros"
        found = "routers"
    elif not is_supported(config.head_dim, eight_bits=True):
        reason = "this ONNX Runtime has no attention over 8-bit codes for this head size"
        found = f"head size {config.head_dim}"
    if reason is not None:
        raise UsageError(
            f"--kv-cache int8: {reason}",
            expected="fp32, with or without --int8; no routers; a head size that is a multiple of 8",
            found=found,
            todo="export without --kv-cache",
        )


def _manifest(
    checkpoint: Checkpoint,
    options: DecoderOptions,
    precision: Precision,
    policy: Policy | None,
    selection: SelectionSection | None,
    quantization: Quantization | None,
    kv_cache: KvCache | None,
    graphs: Mapping[str, GraphEntry],
    weights: WeightsFile,
) -> Manifest:
    config = checkpoint.config
    gate = config.gate
    return Manifest(
        schema_version=SCHEMA_VERSION,
        gsx_version=version("gsx"),
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        },
        source=SourceModel(model=checkpoint.source, weights_sha256=checkpoint.weights_sha256()),
        decoder=DecoderShape(
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
        gates=Gates(kind=gate.kind, input=gate.input, branches=gate.branches) if gate else None,
        selection=selection,
        policy=policy,
        kv_policy=options.kv_policy,
        precision=precision,
        quantization=quantization,
        kv_cache=kv_cache,
        graphs=graphs,
        weights=WeightsEntry(file=WEIGHTS_FILE, sha256=weights.sha256, size_bytes=weights.size_bytes),
    )
