"""`gsx verify`: prove that a bundle computes what the reference computes, and write the report into it."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from tokenizers import Tokenizer
from transformers import DynamicCache

from engines.bundle.bundle import Bundle, open_bundle
from engines.bundle.manifest import Manifest, check_budget
from engines.errors import BundleError, CheckpointError, GsxError, UsageError
from engines.generation import select_for
from engines.runners.base import Runner
from engines.runners.portable import gated_places, host_type
from engines.runners.select import Backend, open_runner
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.config import BRANCHES
from exporter.evaluation import losses
from exporter.reference import Reference
from exporter.selection import Rank, Selection, Threshold
from exporter.text import MIN_TOKENS, load_tokenizer, tokenize
from gsx.backends import BackendName, Device, open_backend
from gsx.parity.compare import Accumulator, Compared, Comparer, Observation
from gsx.parity.measure import (
    EngineSide,
    ReferenceSide,
    follow,
    reference_continuation,
    runner_logits,
)
from gsx.parity.page import page
from gsx.parity.quality import QUANTIZED, QualityCounter, QualityLimits
from gsx.parity.report import BudgetResult, KeepMap, Report
from gsx.parity.speculation import SpeculationSide
from gsx.parity.tolerances import TOLERANCES, Tolerances
from gsx.progress import Progress

DEFAULT_BUDGETS = (1.0, 0.85, 0.7, 0.5)
DEFAULT_TOKENS = 1024
DEFAULT_GREEDY_TOKENS = 256
# A stretch with a cache: half in one call, the rest in single steps or in one chunk.
_STRETCH_TOKENS = 64
# Two sequences of one batch, of different lengths, so that one is padded.
_PADDED_TOKENS = (48, 29)
_ATTEMPTS = 4
_PROMPT_TOKENS = 32
# Up to this width a layer's matrix fits in a core's cache.
_SMALL_HIDDEN = 512
# As many tokens as have room for a label.
_MAP_TOKENS = 60


def verify(
    bundle: str | Path,
    *,
    reference: str | None = None,
    text: str | Path | None = None,
    tokens: int = DEFAULT_TOKENS,
    budgets: Sequence[float] | None = None,
    greedy_tokens: int = DEFAULT_GREEDY_TOKENS,
    backend: BackendName = "onnxruntime",
    device: Device | None = None,
    quality: QualityLimits | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Compare a bundle with the reference, and write `parity.json` and `parity.html` into it.

    Args:
        bundle: its directory.
        reference: the checkpoint that it was exported from; None for the one that the manifest names.
        text: UTF-8 text file to read; None for the text that ships with gsx.
        tokens: how much of it.
        budgets: to verify at; None for 1, 0.85, 0.7, 0.5 and the exported one.
        greedy_tokens: length of the greedy continuation.
        backend: the runtime whose runner is compared beside the portable one of ONNX Runtime.
        device: where PyTorch runs, as a backend; None for its GPU if it has one.
        quality: limits against full precision; what it leaves open is 0.01 for perplexity and decisions of a quantized
            bundle, and only reported otherwise.
        on_progress: called as it goes.
    Returns: the report; `report.passed` is the verdict.
    Raises:
        GsxError: the bundle or the reference cannot be used, or is not the one that the bundle was made of.
    """
    started = time.perf_counter()
    if tokens < MIN_TOKENS:
        raise UsageError("tokens to verify on", expected=f"at least {MIN_TOKENS}", found=str(tokens))
    if greedy_tokens < 1:
        raise UsageError("greedy tokens", expected="at least 1", found=str(greedy_tokens))
    on_progress(Progress("checking the bundle", 0, 0))
    opened = open_bundle(bundle, check_weights=True)
    manifest = opened.manifest
    host_type(manifest.precision)
    notes: list[str] = []
    chosen = _budgets(manifest, budgets, notes)
    checkpoint = _reference_checkpoint(opened, reference)
    windows = tokenize(checkpoint, Path(text) if text else None, max_tokens=tokens)
    on_progress(Progress("loading the reference and the engine", 0, 0))
    runtime = open_backend(backend, device)
    run = _Run(opened, checkpoint, windows.ids, greedy_tokens, runtime, notes, on_progress)
    results = []
    for number, budget in enumerate(chosen):
        run.stage = f"budget {budget:g} ({number + 1} of {len(chosen)})"
        results.append(run.at(budget))
    report = Report(
        bundle=opened.directory.resolve().name,
        model=checkpoint.source,
        weights_sha256=manifest.source.weights_sha256,
        family=manifest.decoder.family,
        precision=manifest.precision,
        quantization=manifest.quantization.scheme if manifest.quantization else None,
        quality_limits=(quality or QualityLimits()).over(QUANTIZED if manifest.quantization else QualityLimits()),
        reference_precision=str(run.reference_type).removeprefix("torch."),
        select=manifest.selection.mode if manifest.selection else None,
        exported_budget=manifest.selection.budget if manifest.selection else 1.0,
        kv_policy=manifest.kv_policy,
        branches=manifest.gates.branches if manifest.gates else (),
        text=windows.name,
        text_sha256=windows.sha256,
        tokens=windows.tokens,
        results=tuple(results),
        default_is_exported=_default_is_exported(opened),
        notes=tuple(notes),
        keep_map=_keep_map(run.first_window, manifest, windows.ids[0], load_tokenizer(checkpoint)),
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("gsx", "torch", "transformers", "onnxruntime")},
        },
        seconds=time.perf_counter() - started,
    )
    on_progress(Progress("writing the report", 0, 0))
    texts = {
        "parity.json": json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n",
        "parity.html": page(report),
    }
    for name, content in texts.items():
        _write(opened.directory / name, content)
    return report


class _Run:
    """Both sides, opened once, and what is measured at one budget."""

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Checkpoint,
        windows: np.ndarray,
        greedy_tokens: int,
        backend: Backend,
        notes: list[str],
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.manifest = bundle.manifest
        self.limits: Tolerances = TOLERANCES["quantized" if self.manifest.quantization else self.manifest.precision]
        self.windows = windows
        self.reference_type = _reference_type(checkpoint, self.manifest.precision)
        self.reference = Reference.load(checkpoint, dtype=self.reference_type)
        self.single = Reference.load(checkpoint) if self.reference_type == torch.float64 else None
        self.engine = EngineSide(bundle)
        self.runners: dict[str, Runner] = {"fast": open_runner(bundle, backend=backend), "portable": self.engine.runner}
        self.speculation = SpeculationSide(bundle, backend) if self.manifest.draft else None
        self.stage = ""
        self.on_progress = on_progress
        # By budget, what the reference did with the first window.
        self.first_window: dict[float, Observation] = {}
        room = self.manifest.decoder.max_positions - _PROMPT_TOKENS
        self.greedy_tokens = min(greedy_tokens, room)
        if self.greedy_tokens < greedy_tokens:
            notes.append(f"The model's context leaves room for {self.greedy_tokens} greedy tokens.")
        selection = self.manifest.selection
        self.causal = selection is None or selection.mode == "threshold"
        if not self.causal:
            notes.append(
                "With rank selection the choice sees the whole call, so a run over the cache is another "
                "computation: whole calls are compared, and greedy steps, which keep their one token."
            )

    def at(self, budget: float) -> BudgetResult:
        """Measure everything at one budget."""
        select = select_for(self.manifest, budget)
        side = ReferenceSide(self.reference, self._selection(budget), self.manifest.kv_policy)
        single = None
        if self.single is not None:
            single = ReferenceSide(self.single, self._selection(budget), self.manifest.kv_policy)
        if self.speculation is not None:
            self.speculation.start()
        full, rounding = self._comparer(), self._comparer()
        fast, wrong_counts = Accumulator(), 0
        kept: list[np.ndarray] = []
        branches = [BRANCHES.index(branch) for branch in self._branches]
        quality = QualityCounter(branches)
        reference_loss: list[np.ndarray] = []
        engine_loss: list[np.ndarray] = []
        first: Observation | None = None
        for number, window in enumerate(self.windows):
            self._tell("whole windows", number, len(self.windows))
            ids, mask = window[None], np.ones((1, len(window)), np.int64)
            want, have = side.observe(ids, mask), self.engine.observe(ids, mask, select)
            full.add(want, have)
            if single is not None:
                rounding.add(want, single.observe(ids, mask))
            first = first or want[0]
            kept.append(want[0].keep)
            reference_loss.append(losses(want[0].logits, window))
            engine_loss.append(losses(have[0].logits, window))
            quality.add(want[0], have[0])
            clean, wrong = self._fast(want[0], have[0], ids, select, fast, number)
            wrong_counts += wrong
            if self.speculation is not None:
                self._halves(self.speculation, side, ids, select, clean, number)
        assert first is not None, "a text has at least one window"
        own = rounding.result() if single is not None else None
        self.first_window[budget] = first
        single_steps = one_chunk = None
        if self.causal:
            self._tell("with the cache", 0, 0)
            single_steps, one_chunk = self._cached(first, select)
        self._tell("with padding", 0, 0)
        padded = self._padded(side, single or side, select)
        self._tell("greedy continuation", 0, 0)
        with _torch_threads_for(self.manifest):
            steps = reference_continuation(side, self.windows[:1, :_PROMPT_TOKENS], self.greedy_tokens)

        def tolerance(logits: np.ndarray) -> float:
            return self.limits.logit_limit(float(np.abs(logits).max()), own) or 0.0

        greedy = {
            name: follow(runner, steps, select, logit_tolerance=tolerance, near_tie=self.limits.near_tie)
            for name, runner in self.runners.items()
        }
        speculation = None
        if self.speculation is not None:
            self._tell("draft and verify", 0, 0)
            speculation = self.speculation.result(self.windows, budget, first.logits)
        shares = np.concatenate(kept, axis=-1).mean(axis=-1)
        return BudgetResult(
            budget=budget,
            kept=tuple((float(attn), float(mlp)) for attn, mlp in shares),
            kept_share=float(shares[:, branches].mean()) if branches else None,
            windows=full.result(),
            rounding=own,
            single_steps=single_steps,
            one_chunk=one_chunk,
            padded=padded,
            fast_logits=fast.result(),
            fast_wrong_counts=wrong_counts,
            greedy=greedy,
            speculation=speculation,
            reference_nats=float(np.concatenate(reference_loss).mean()),
            engine_nats=float(np.concatenate(engine_loss).mean()),
            scored_tokens=sum(loss.size for loss in reference_loss),
            quality=quality.result(),
        )

    def _cached(self, want: Observation, select: np.ndarray | None) -> tuple[Compared, Compared]:
        """Half of a stretch, then the rest over the cache: it must be what one call gives."""
        count = min(_STRETCH_TOKENS, want.tokens)
        half = count // 2
        ids = self.windows[:1, :count]
        found = []
        for chunks in ([half, *[1] * (count - half)], [half, count - half]):
            comparer = self._comparer()
            comparer.add([want.head(count)], self.engine.observe(ids, np.ones_like(ids), select, chunks))
            found.append(comparer.result())
        return found[0], found[1]

    def _padded(self, side: ReferenceSide, single: ReferenceSide, select: np.ndarray | None) -> Compared:
        """Two sequences of different lengths, padded on the left, in one call.

        Both carry an end-of-text token, which running text has not, and which is always kept.
        With threshold selection each must come out as it does alone; rank selection counts the whole call, so
        there the reference sees the same batch (in float32: transformers masks padding in float64 by a number
        that its softmax, always in float32, takes for infinite, and gives NaN). There, too, one near tie that
        turns concerns all tokens: then another stretch of text is tried.
        """
        for attempt in range(_ATTEMPTS):
            ids, mask = self._padded_batch(attempt)
            have = self.engine.observe(ids, mask, select)
            comparer = self._comparer()
            if self.causal:
                for row, one in enumerate(have):
                    alone = ids[row : row + 1, mask[row] == 1]
                    comparer.add(side.observe(alone, np.ones_like(alone)), [one])
            else:
                comparer.add(single.observe(ids, mask), have)
            result = comparer.result()
            if result.decisions is None or result.decisions.wrong or result.logits.values:
                break
        return result

    def _padded_batch(self, attempt: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask of two stretches; they begin differently, since equal beginnings have equal scores."""
        first, last = self.windows[0], self.windows[-1]
        # Room to begin at another place.
        long, short = (min(count, len(first) - 1) for count in _PADDED_TOKENS)
        ids, mask = np.zeros((2, long), np.int64), np.zeros((2, long), np.int64)
        start = long * attempt % (len(first) - long)
        ids[0], mask[0] = first[start : start + long], 1
        differing = np.flatnonzero(last[: len(last) - short] != ids[0, 0])
        start = int(differing[-1 - attempt]) if len(differing) > attempt else len(last) - short
        ids[1, long - short :], mask[1, long - short :] = last[start : start + short], 1
        if self.manifest.decoder.eos_ids:
            ids[:, long - short // 2] = self.manifest.decoder.eos_ids[0]
        return ids, mask

    def _fast(
        self,
        want: Observation,
        portable: Observation,
        ids: np.ndarray,
        select: np.ndarray | None,
        found: Accumulator,
        window: int,
    ) -> tuple[np.ndarray, int]:
        """Compare the fast runner's logits over a window, of a quantized bundle with the portable runner's.

        It does not say which rows it kept, only how many. Where decisions may turn, what follows the first one
        that did (in half precision: for the portable runner) or could have (in single) is left out.

        Returns: the tokens [S] bool that were compared, and the branches that kept a wrong count.
        """
        assert want.margins is not None
        logits, counts = runner_logits(self.runners["fast"], ids, select)
        clean = np.ones(want.tokens, bool)
        base = want if self.limits.runners is None else portable
        places = [(layer, BRANCHES.index(branch)) for layer, branch in gated_places(self.manifest)]
        differ = [] if counts is None else [p for p in places if counts[p] != base.keep[p].sum()]
        if self.limits.differing_share is None:
            turned = (want.margins <= self.limits.near_tie) if differ else np.zeros_like(want.keep)
        else:
            turned = portable.keep != base.keep
        turned_at = np.flatnonzero(turned.any(axis=(0, 1)))
        if len(turned_at):
            clean[turned_at[0] if self.causal else 0 :] = False
        found.add(base.logits, logits[0], clean, window)
        return clean, 0 if len(turned_at) else len(differ)

    def _halves(
        self,
        speculation: SpeculationSide,
        side: ReferenceSide,
        ids: np.ndarray,
        select: np.ndarray | None,
        clean: np.ndarray,
        window: int,
    ) -> None:
        """Compare draft and verify with the reference's exit and full logits over a window."""
        if speculation.exit_layer is None:
            return
        output = side.step(ids, np.ones_like(ids), DynamicCache())
        at_exit = self.reference.exit_logits(output, speculation.exit_layer)
        speculation.compare(ids, select, at_exit[0].float().numpy(), output.logits[0].float().numpy(), clean, window)

    def _comparer(self) -> Comparer:
        return Comparer(
            self.manifest.decoder.num_layers,
            self._branches,
            causal=self.causal,
            near_tie=self.limits.near_tie,
            copies=self.manifest.kv_policy == "copy",
        )

    @property
    def _branches(self) -> tuple[str, ...]:
        return self.manifest.gates.branches if self.manifest.gates else ()

    def _selection(self, budget: float) -> Selection | None:
        selection = self.manifest.selection
        if selection is None:
            return None
        if selection.mode == "rank":
            return Rank(budget)
        return Threshold(selection.thresholds_for(budget))

    def _tell(self, what: str, done: int, total: int) -> None:
        self.on_progress(Progress(f"{self.stage}: {what}", done, total))


def _reference_type(checkpoint: Checkpoint, precision: str) -> torch.dtype:
    """Type of the reference's weights and activations.

    Double precision beside a float32 engine, where there is memory for it: what is measured is then the engine's
    rounding alone. In float32 the reference's own is as large, and the two add up.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if precision == "fp32" and 2 * checkpoint.weight_bytes() <= memory / 3:
        return torch.float64
    return torch.float32


@contextmanager
def _torch_threads_for(manifest: Manifest) -> Iterator[None]:
    """One thread for single tokens of a small model: waiting for others would take longer than the work."""
    before = torch.get_num_threads()
    small = manifest.decoder.hidden_size <= _SMALL_HIDDEN
    torch.set_num_threads(1 if small else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _budgets(manifest: Manifest, asked: Sequence[float] | None, notes: list[str]) -> list[float]:
    """The budgets to verify at, falling; what cannot be is noted."""
    for budget in asked or ():
        check_budget(budget)
    selection = manifest.selection
    if selection is None:
        if asked and set(asked) != {1.0}:
            notes.append("The bundle has no gates: everything is kept, and there is one budget, 1.")
        return [1.0]
    wanted = sorted({float(b) for b in (asked or (*DEFAULT_BUDGETS, selection.budget))}, reverse=True)
    if selection.mode == "rank":
        return wanted
    lowest = selection.grid[-1].budget
    chosen = [budget for budget in wanted if budget >= lowest]
    for budget in wanted:
        if budget < lowest:
            notes.append(f"Budget {budget:g} lies below the calibrated grid ({lowest:g} to 1): left out.")
    if not chosen:
        raise UsageError(
            "no budget to verify at",
            expected=f"one from {lowest:g} to 1",
            found=", ".join(f"{b:g}" for b in wanted),
        )
    return chosen


def _reference_checkpoint(bundle: Bundle, reference: str | None) -> Checkpoint:
    """Open the reference and make sure that the bundle was made of it."""
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
            todo="if the model lies elsewhere now: gsx verify BUNDLE --reference MODEL",
        ) from error
    found = checkpoint.weights_sha256()
    if found != source.weights_sha256:
        raise BundleError(
            f"bundle {bundle.directory} was not exported from these weights of {name}",
            expected=f"weights with sha256 {source.weights_sha256[:12]}..., exported from {source.model}",
            found=f"{found[:12]}... in {checkpoint.directory}",
            todo="give the checkpoint that it was exported from with --reference, or export again",
        )
    return checkpoint


def _default_is_exported(bundle: Bundle) -> bool | None:
    """Whether a client that gives no thresholds or budget gets the exported ones; None without gates."""
    if bundle.manifest.selection is None:
        return None
    model = onnx.load(str(bundle.graph_path("model")), load_external_data=False)
    name = "thresholds" if bundle.manifest.selection.mode == "threshold" else "budget"
    found = [numpy_helper.to_array(one) for one in model.graph.initializer if one.name == name]
    return len(found) == 1 and np.array_equal(found[0], np.asarray(select_for(bundle.manifest, None)))


def _keep_map(
    first_window: dict[float, Observation], manifest: Manifest, ids: np.ndarray, tokenizer: Tokenizer
) -> KeepMap | None:
    """The beginning of the first window, at the exported budget, or at one that skips something."""
    if manifest.selection is None:
        return None
    skipping = [budget for budget in first_window if budget < 1] or list(first_window)
    exported = manifest.selection.budget
    budget = exported if exported in skipping else 0.7 if 0.7 in skipping else skipping[0]
    keep = first_window[budget].keep[..., :_MAP_TOKENS]
    labels = [tokenizer.decode([int(i)], skip_special_tokens=False) for i in ids[: keep.shape[-1]]]
    return KeepMap(
        budget=budget,
        tokens=tuple(labels),
        keep=tuple((tuple(map(bool, attn)), tuple(map(bool, mlp))) for attn, mlp in keep),
    )


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise GsxError(
            f"{path}: could not be written",
            found=error.strerror or str(error),
            todo="free some space, or make the bundle's directory writable",
        ) from error
