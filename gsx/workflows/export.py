"""`gsx export`: checkpoint -> calibrated thresholds -> ONNX -> a bundle."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from gsx.workflows.bundle_manifest import manifest_of
from gsx.workflows.calibrated import calibrate_all
from gsx.workflows.draft_plan import plan_draft
from gsx.workflows.draft_search import DraftSearch
from gsx.workflows.draft_vocabulary import draft_vocabulary_of
from gsx.workflows.export_text import read_export_text
from gsx.workflows.graph_files import write_graphs
from gsx.workflows.memory import check_quantizing_memory
from gsx.workflows.number_types import KvCacheType, NumberTypes
from gsx.workflows.quantize import Quantize
from gsx_engines.bundle.bundle import Bundle, open_bundle, write_manifest, writing
from gsx_engines.bundle.manifest import WeightsEntry
from gsx_engines.bundle.selection import check_budget
from gsx_engines.bundle.words import KvPolicy, Precision, SelectionMode
from gsx_engines.chat import template_in
from gsx_exporter.checkpoint.names import BUNDLE_COMPANIONS, TOKENIZER
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import has_tokenizer, write_tokenizer
from gsx_exporter.defaults import CALIBRATION_TOKENS
from gsx_exporter.graph.weights import write_weights
from gsx_exporter.quantization.scheme import SCHEMES
from gsx_exporter.rules.plan import PolicyOptions
from gsx_exporter.rules.registry import plan_policy
from gsx_plugins.errors import UsageError
from gsx_plugins.progress import OnProgress, Progress, silent

WEIGHTS_FILE = "weights.bin"
# Room for graphs, tokenizer and manifest beside the weights.
_SLACK_BYTES = 64 << 20


def export(
    model: str | Path,
    output: str | Path,
    *,
    policy: str | None = None,
    budget: float | None = None,
    select: SelectionMode = "threshold",
    kv_policy: KvPolicy | None = None,
    precision: Precision = "fp32",
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    context: int | None = None,
    draft: str | None = None,
    draft_vocabulary: int | None = None,
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
        select: how GateSkip selects tokens (docs/design.md, section 3).
        kv_policy: K and V of skipped tokens: computed (`compute`), copied from the layer below (`copy`), or not
            computed, where the set of layers stays the same for a request (`none`). None: `none` for sets of layers,
            else `compute`.
        precision: type of weights and activations.
        calibration: UTF-8 text for the thresholds; None for the text that ships with gsx.
        calibration_tokens: how many of its tokens to use.
        context: the longest text, in tokens; None for what the model was made for. With LongRoPE it decides which
            factors are used: the short ones up to the original context (the default), the long ones above.
        draft: how to draft for self-speculative decoding: `exit:E`, `budget:B` or `layers:SET` (see
            `gsx_engines.speculation.spec.parse_draft`). `auto` searches for the exit, `layers:auto` for the set of
            layers to leave out, with the largest speedup over plain decoding on this machine, on the calibration text.
            None for no draft.
        draft_vocabulary: how many tokens an exit's draft chooses among: those that the whole calibration text has most
            often, and those that end a text. Its head has so many rows; the verification has the whole head, so the
            text stays the same. None for all tokens.
        quantize: what to run in 8 bits; None to quantize nothing.
        kv_cache: type in which ONNX Runtime stores K and V; None for that of the activations.
        overwrite: replace a bundle that is already at `output`.
        on_progress: called with the progress.
    Returns: the bundle, opened.
    Raises:
        GsxError: something is wrong with the input or the disk.
    Example:
        >>> bundle = gsx.export("my-model", "out/demo", budget=0.7, calibration_tokens=1024)
        >>> bundle.manifest.selection.budget
        0.7
    """
    if budget is not None:
        check_budget(budget)
    if calibration_tokens < 1:
        raise UsageError("calibration tokens", expected="a positive number", found=str(calibration_tokens))
    on_progress(Progress("checking the checkpoint"))
    checkpoint = open_checkpoint(model, context)
    keep = plan_policy(PolicyOptions(policy, select, budget, kv_policy), checkpoint.config)
    checkpoint.config = keep.of_model(checkpoint.config)
    types = NumberTypes(precision, quantize, kv_cache)
    types.check(checkpoint.config, keep)
    drafting = plan_draft(draft, draft_vocabulary, checkpoint.config, keep, precision)
    text = read_export_text(checkpoint, keep, types, drafting, calibration, calibration_tokens, on_progress)
    chosen, vocabulary = draft_vocabulary_of(drafting, text, checkpoint.config)
    if types.quantize is not None and text.seen is not None:
        chooses = SCHEMES[types.quantize.scheme].chosen_on_text
        check_quantizing_memory(checkpoint.config, text.seen.tokens, chooses_codes=chooses)
    numbers = checkpoint.weight_bytes() // 4 + len(chosen or ()) * checkpoint.config.hidden_size
    needed = numbers * types.dtype.itemsize + _SLACK_BYTES
    with writing(Path(output), overwrite=overwrite, needed_bytes=needed) as work:
        with TemporaryDirectory(dir=work) as scratch:
            calibrated = calibrate_all(checkpoint, keep, types, text, Path(scratch), on_progress)
            on_progress(Progress("tracing"))
            builder = calibrated.graph_builder(chosen)
            graphs = builder.graphs(drafting.split)
            found = calibrated.weights
            read, size = found.parameter, found.parameter_size
            weights = write_weights(work / WEIGHTS_FILE, graphs.weights, read, size, on_progress)
        entries = write_graphs(work, graphs, weights)
        checkpoint.copy_companions(work, BUNDLE_COMPANIONS)
        if has_tokenizer(checkpoint):
            write_tokenizer(checkpoint, work / TOKENIZER)
        weights_entry = WeightsEntry(file=WEIGHTS_FILE, sha256=weights.sha256, size_bytes=weights.size_bytes)
        manifest = manifest_of(
            calibrated, precision, entries, weights_entry, text.notes, template_in(work), on_progress
        )

        def begin_search() -> DraftSearch:
            assert text.seen is not None
            return DraftSearch(work, manifest, builder, weights, text.seen.ids, vocabulary, on_progress)

        write_manifest(work, drafting.settle(manifest, vocabulary, begin_search))
    return open_bundle(output)
