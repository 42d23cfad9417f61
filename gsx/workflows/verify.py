"""`gsx verify`: prove that a bundle computes what the reference computes, and write the report into it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from tokenizers import Tokenizer

from gsx.backend_names import BackendName, Device
from gsx.backends import open_backend
from gsx.defaults import GREEDY_TOKENS, QUALITY_TOKENS, SAMPLE_TOKENS, VERIFY_TOKENS
from gsx.parity.page import page
from gsx.parity.quality import QualityLimits, default_limits
from gsx.parity.report import KeepMap, Report
from gsx.parity.run import PROMPT_TOKENS, Run
from gsx.parity.sample import SampleRun
from gsx.parity.scope import Scope, scopes
from gsx.parity.settings import exported_share, settings_of
from gsx_engines.bundle.bundle import Bundle, open_bundle
from gsx_engines.bundle.controls import default_controls
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.errors import BundleError
from gsx_exporter.checkpoint.checkpoint import Checkpoint
from gsx_exporter.checkpoint.opening import open_checkpoint
from gsx_exporter.checkpoint.tokenizer import load_tokenizer
from gsx_exporter.errors import CheckpointError
from gsx_exporter.rules.registry import rule_of
from gsx_exporter.rules.settings import LayerCurve, Setting
from gsx_exporter.text import MIN_TOKENS, TokenText, text_after, tokenize
from gsx_plugins.errors import UsageError
from gsx_plugins.files import disk_error, writing_file
from gsx_plugins.progress import OnProgress, Progress, silent

# As many tokens as there is room for labels.
_MAP_TOKENS = 60
# The fewest tokens that show a wrong mask or position.
LEAST_SAMPLE = 8
# The budget that a map shows if the exported one skips nothing.
_USUAL_SHARE = 0.7


def verify(
    bundle: str | Path,
    *,
    reference: str | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    budgets: Sequence[float] | None = None,
    greedy_tokens: int = GREEDY_TOKENS,
    backend: BackendName = "onnxruntime",
    device: Device | None = None,
    quality: QualityLimits | None = None,
    full: bool = False,
    sample: bool = False,
    on_progress: OnProgress = silent,
) -> Report:
    """Compare a bundle with the reference, and write `parity.json` and `parity.html` into it.

    Args:
        bundle: its directory.
        reference: the checkpoint that it was exported from; None for the one that the manifest names.
        text: UTF-8 text file to read; None for the text that ships with gsx. If the export calibrated on this text, the
            part after those tokens is read; if too little is left, the report says that both texts are the same.
        tokens: how many of its tokens to use; None for 1,024, and for 8,192 if anything is in 8 bits, since the limits
            of quality need more.
        budgets: to verify at, each on the whole text; None for 1, 0.85, 0.7, 0.5 and the exported one.
        greedy_tokens: length of the greedy continuation.
        backend: the runtime whose runner is compared too, besides the portable one of ONNX Runtime.
        device: where PyTorch runs as a backend; None for a GPU if PyTorch sees one, else the CPU.
        quality: limits against full precision. Limits that are not given are those of the bundle's kind
            (`gsx.parity.quality.default_limits`); a float32 bundle has none, and the values are only reported.
        full: whether every setting is checked on the whole text, states, K and V too, with more speculative text, and
            greedy text also by the portable runner. By default only the exported setting is checked on the whole text,
            and the others on a part of it. The report says how many tokens each check read.
        sample: whether only a few tokens are read, at the exported setting, and one layer at a time is in memory: for
            bundles that are larger than that. `tokens` then says how many; None for 64.
        on_progress: called with the progress.
    Returns: the report. `report.passed` is whether everything is known to hold; `report.verdict` tells what failed from
        what could not be decided, and `report.doubts` says why.
    Raises:
        GsxError: the bundle or the reference cannot be used, or the bundle was not exported from this reference.
    Example:
        >>> report = gsx.verify("out/demo", tokens=512, budgets=[0.7])
        >>> report.passed
        True
    """
    started = time.perf_counter()
    least = LEAST_SAMPLE if sample else MIN_TOKENS
    if tokens is not None and tokens < least:
        raise UsageError("tokens to verify on", expected=f"at least {least}", found=str(tokens))
    if sample and (full or budgets is not None or backend != "onnxruntime"):
        raise UsageError(
            "a sample is checked at the exported setting, on the portable graph",
            expected="--sample without --full and --backend",
            todo="leave one of them out",
        )
    if greedy_tokens < 1:
        raise UsageError("greedy tokens", expected="at least 1", found=str(greedy_tokens))
    on_progress(Progress("checking the bundle"))
    opened = open_bundle(bundle, check_weights=True)
    manifest = opened.manifest
    if manifest.precision == "bf16" and backend != "onnxruntime":
        raise UsageError(
            f"--backend {backend}: rounding to bfloat16 flips decisions and tokens, so a run in it cannot be judged",
            expected="a bundle in fp32 or fp16",
            found=manifest.precision,
            todo="without --backend the graph itself is verified, computed in float32",
        )
    tokens = tokens or (SAMPLE_TOKENS if sample else QUALITY_TOKENS if manifest.rounds else VERIFY_TOKENS)
    notes: list[str] = []
    if manifest.precision == "bf16":
        notes.append("The graph is bfloat16; it was computed in float32, so that the graph itself is compared.")
    chosen = settings_of(manifest, budgets, notes)
    checkpoint = _reference_checkpoint(opened, reference, on_progress)
    windows = _held_out(checkpoint, manifest, Path(text) if text else None, max(tokens, MIN_TOKENS), notes)
    on_progress(Progress("loading the reference and the engine"))
    run: Run | SampleRun
    if sample:
        ids = windows.ids[:1, :tokens]
        run = SampleRun(opened, checkpoint, _exported(manifest, chosen), ids, on_progress)
        notes.append(
            f"A sample: {ids.shape[1]} tokens through every layer of the portable graph, at the exported setting, "
            "without cache, padding, greedy text and draft. Without --sample, gsx verify checks them too."
        )
        if checkpoint.layout is not None or checkpoint.gguf is not None:
            notes.append(
                "The model's weights are read as gsx reads them, one layer at a time. Without --sample the library "
                "that defines their form reads them, where it can."
            )
    else:
        runtime = open_backend(backend, device)
        scope = _scopes(manifest, chosen, budgets is not None, len(windows.ids), greedy_tokens, full, notes)
        run = Run(opened, checkpoint, scope, windows.ids, runtime, notes, on_progress)
    results = run.results()
    report = Report(
        bundle=opened.directory.resolve().name,
        model=checkpoint.source,
        weights_sha256=manifest.source.weights_sha256,
        family=manifest.decoder.family,
        precision=manifest.precision,
        quantization=manifest.quantization.scheme if manifest.quantization else None,
        kv_cache=manifest.kv_cache.type if manifest.kv_cache else None,
        quality_limits=(quality or QualityLimits()).over(default_limits(manifest)),
        limits_given=quality or QualityLimits(),
        reference_precision=str(run.reference_type).removeprefix("torch."),
        limits_of=run.limits_of,
        policy=manifest.policy.name if manifest.policy else None,
        select=manifest.selection.mode if manifest.selection else None,
        exported_budget=exported_share(manifest),
        kv_policy=manifest.kv_policy,
        branches=manifest.skippable,
        text=windows.name,
        text_sha256=windows.sha256,
        tokens=tokens if sample else windows.tokens,
        results=tuple(results),
        default_is_exported=_default_is_exported(opened),
        notes=tuple(notes),
        keep_map=_keep_map(run.first_keep, manifest, windows.ids[0], load_tokenizer(checkpoint)),
        layer_curves=_layer_curves(manifest),
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("gsx", "torch", "transformers", "onnxruntime")},
        },
        seconds=time.perf_counter() - started,
    )
    on_progress(Progress("writing the report"))
    texts = {
        "parity.json": json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n",
        "parity.html": page(report),
    }
    for name, content in texts.items():
        _write(opened.directory / name, content)
    return report


def _held_out(
    checkpoint: Checkpoint, manifest: Manifest, path: Path | None, tokens: int, notes: list[str]
) -> TokenText:
    """Text that nothing was calibrated on: thresholds and scales must not be judged on the text they were fitted to."""
    sections = (manifest.selection, manifest.policy, manifest.quantization)
    entries = [section.calibration for section in (*sections, manifest.kv_cache) if section]
    text = tokenize(checkpoint, path, max_tokens=tokens)
    if text.note is not None:
        notes.append(text.note)
    seen = max((entry.tokens for entry in entries if entry and entry.sha256 == text.sha256), default=0)
    if not seen:
        return text
    rest = text_after(checkpoint, path, seen, tokens)
    if rest is None:
        notes.append(
            f"The export calibrated on the same text, which ends after those {seen:,} tokens: on other text, quality "
            "may be worse. Use --text to choose another."
        )
        return text
    notes.append(
        f"The export calibrated on the first {seen:,} tokens of this text; the compared tokens come after them."
    )
    return rest


def _reference_checkpoint(bundle: Bundle, reference: str | None, on_progress: OnProgress) -> Checkpoint:
    """Open the reference and make sure that the bundle was exported from it."""
    source = bundle.manifest.source
    name = reference or source.model
    try:
        checkpoint = open_checkpoint(name)
    except CheckpointError as error:
        if reference is not None:
            raise
        raise CheckpointError(
            f"bundle {bundle.directory}: its reference, {name}, cannot be opened",
            found=error.what + (f" (found {error.found})" if error.found else ""),
            todo="if the model is elsewhere now: gsx verify BUNDLE --reference MODEL",
        ) from error
    found = checkpoint.weights_sha256(on_progress)
    if found != source.weights_sha256:
        raise BundleError(
            f"bundle {bundle.directory} was not exported from these weights of {name}",
            expected=f"weights with sha256 {source.weights_sha256[:12]}..., exported from {source.model}",
            found=f"{found[:12]}... in {checkpoint.directory}",
            todo="give the checkpoint that it was exported from with --reference, or export again",
        )
    ends = bundle.manifest.decoder.eos_ids
    if set(ends) != set(checkpoint.config.eos_ids):
        raise BundleError(
            f"bundle {bundle.directory} ends a text at other tokens than {name}",
            expected=_listed(checkpoint.config.eos_ids),
            found=_listed(ends),
            todo="the model's files, or how they are read, changed after the export: export again",
        )
    positions = min(bundle.manifest.decoder.max_positions, checkpoint.config.most_positions)
    checkpoint.config = checkpoint.config.of_context(positions)
    if bundle.manifest.decoder.loops is not None:
        checkpoint.config = checkpoint.config.of_loops(bundle.manifest.decoder.loops)
    return checkpoint


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids)) or "none"


def _default_is_exported(bundle: Bundle) -> bool | None:
    """Whether a client that gives no run-time inputs gets the exported ones; None for a dense model."""
    manifest = bundle.manifest
    if manifest.policy is None:
        return None
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    found = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer if not value.external_data}
    wanted = default_controls(manifest.policy, manifest.selection)
    # By value: in a bundle of 0.1.0 thresholds lack the axis of sequences.
    return all(name in found and np.array_equal(found[name].ravel(), value.ravel()) for name, value in wanted.items())


def _scopes(
    manifest: Manifest,
    chosen: Sequence[Setting],
    asked: bool,
    windows: int,
    greedy_tokens: int,
    full: bool,
    notes: list[str],
) -> dict[Setting, Scope]:
    """How much each setting is checked. Args: asked: whether the user named the settings."""
    room = manifest.decoder.max_positions - PROMPT_TOKENS
    if room < greedy_tokens:
        notes.append(f"The model's context leaves room for {room} greedy tokens.")
    main = chosen if asked else [_exported(manifest, chosen)]
    if not full and len(main) < len(chosen):
        notes.append(
            f"Checked on the whole text: {main[0].name}, as exported. The other settings are checked on a part of it; "
            "--full checks all on all of it."
        )
    causal = not manifest.depends_on_call
    return scopes(chosen, main, windows=windows, greedy_tokens=min(greedy_tokens, room), causal=causal, full=full)


def _exported(manifest: Manifest, chosen: Sequence[Setting]) -> Setting:
    """The setting that the bundle was exported for."""
    return next((one for one in chosen if one.share == exported_share(manifest)), chosen[-1])


def _keep_map(
    first_keep: dict[Setting, np.ndarray], manifest: Manifest, ids: np.ndarray, tokenizer: Tokenizer
) -> KeepMap | None:
    """A map of the start of the first window, at the exported setting or, if that skips nothing, at one that does."""
    if manifest.policy is None:
        return None
    skipping = [setting for setting in first_keep if setting.share < 1] or list(first_keep)
    exported = exported_share(manifest)
    setting = min(skipping, key=lambda candidate: (candidate.share != exported, candidate.share != _USUAL_SHARE))
    keep = first_keep[setting][..., :_MAP_TOKENS]
    labels = [tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids[: keep.shape[-1]]]
    return KeepMap(
        setting=setting.name,
        tokens=tuple(labels),
        keep=tuple((tuple(map(bool, attn)), tuple(map(bool, mlp))) for attn, mlp in keep),
    )


def _layer_curves(manifest: Manifest) -> tuple[LayerCurve, ...]:
    return () if manifest.policy is None else tuple(rule_of(manifest.policy).layer_curves(manifest))


def _write(path: Path, text: str) -> None:
    try:
        with writing_file(path) as work:
            work.write_text(text, encoding="utf-8")
    except OSError as error:
        raise disk_error(path, error, todo="free some space, or make the bundle's directory writable") from error
