"""Draft and verify: the two halves of a split decoder against the reference, and speculative text against plain text.

Speculation must not change the text. It is compared with the text of plain decoding token by token, greedy and sampled
with the same seeds, one prompt at a time and in a batch. Sampled tokens are compared with the distribution that follows
from the reference's logits, computed here by PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats

from gsx.parity.closeness import Accumulator, Comparison
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues, controls_for
from gsx_engines.generation import Generated, generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import Backend, open_runner, open_split_runner
from gsx_engines.runners.split import SplitRunner
from gsx_engines.sampling import GREEDY, Picker, Sampling, candidates
from gsx_engines.speculation.draft import Draft, open_draft

SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=7)
# Draft lengths to try; None finds a length while generating.
_LENGTHS = (None, 3)
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS, _BATCH = 8, 24, 48, 3
_PLACES, _DRAWS = 6, 2000
# Cells of a chi-square test with fewer expected draws are merged.
_LEAST_EXPECTED = 8
# Positions where the cut of top-p might as well fall one token earlier or later are not tested.
_TOP_P_MARGIN = 1e-3


@dataclass(frozen=True)
class TextMismatch:
    """Where speculative text first differs from plain text.

    Args:
        prompt: number of the prompt; position: of the new token, from 0.
        plain_token, speculative_token: ids.
        lead: difference of their scores, in units of logits; within the tolerance of logits either token is right.
    """

    prompt: int
    position: int
    plain_token: int
    speculative_token: int
    lead: float


@dataclass(frozen=True)
class TextsCompared:
    """Speculative against plain text: continuations and tokens compared, and where the first token differs."""

    continuations: int
    tokens: int
    mismatches: tuple[TextMismatch, ...]


@dataclass(frozen=True)
class SamplingFit:
    """Draws at several positions against the reference's probabilities.

    Args:
        places, draws: number of positions, and of draws at each.
        least_p: the smallest p-value of a chi-square test, times the number of positions (Bonferroni).
        outside: draws of tokens that the reference excludes.
    """

    places: int
    draws: int
    least_p: float
    outside: int


@dataclass(frozen=True)
class SpeculationResult:
    """All measurements of a draft at one budget.

    Args:
        draft: e.g. "exit:2".
        acceptance: share of drafted tokens that were accepted, in greedy text.
        logits: by name, e.g. "draft, fast runner": the halves' logits against the reference's; empty if the draft is
            not an exit.
        greedy, sampled: texts.
        sampling: None if no position was suitable for the test.
    """

    draft: str
    acceptance: float | None
    logits: dict[str, Comparison]
    greedy: TextsCompared
    sampled: TextsCompared
    sampling: SamplingFit | None


class SpeculationSide:
    """A bundle's draft, opened once."""

    def __init__(self, bundle: Bundle, backend: Backend = "onnxruntime") -> None:
        assert bundle.manifest.draft is not None
        self.kind = bundle.manifest.draft.draft
        self._bundle, self._backend = bundle, backend
        self._splits: dict[str, SplitRunner] = {}
        if self.kind.kind == "exit":
            portable = SplitRunner(PortableStage(bundle, "draft"), PortableStage(bundle, "verify"))
            self._splits = {"fast": open_split_runner(bundle, backend=backend), "portable": portable}
        self._found = {f"{half}, {name} runner": Accumulator() for name in self._splits for half in ("draft", "verify")}

    @property
    def exit_layer(self) -> int | None:
        """Number of layers that the draft runs; None if it is not an exit."""
        return self.kind.layer if self.kind.kind == "exit" else None

    def start(self) -> None:
        """Forget the comparisons at another budget."""
        self._found = {name: Accumulator() for name in self._found}

    def compare(
        self,
        ids: np.ndarray,
        controls: RuntimeValues,
        exit_logits: np.ndarray,
        logits: np.ndarray,
        clean: np.ndarray,
        window: int,
    ) -> None:
        """Compare both halves' logits over a window.

        Args: ids [1, S]; exit_logits, logits [S, V] of the reference; clean [S] bool: tokens that no near tie affected.
        """
        for name, runner in self._splits.items():
            cache = runner.new_cache(*ids.shape)
            draft = runner.draft(cache, ids, controls, logits="all").logits[0]
            self._found[f"draft, {name} runner"].add(exit_logits, draft, clean, window)
            self._found[f"verify, {name} runner"].add(logits, runner.verify(cache).logits[0], clean, window)

    def result(self, windows: np.ndarray, keep: KeepSettings, reference_logits: np.ndarray | None) -> SpeculationResult:
        """Compare texts at one setting of the keep rule.

        Args: windows [M, S]: prompts are taken from them; reference_logits [S, V] of the first one, None if the
            engine's are too far from them for its draws to follow them.
        """
        manifest = self._bundle.manifest
        plain = open_runner(self._bundle, backend=self._backend)
        draft = open_draft(self._bundle, self.kind, backend=self._backend)
        prompts = _prompts(windows)
        greedy, acceptance = _texts(plain, draft, prompts, GREEDY, keep)
        sampled, _ = _texts(plain, draft, prompts, SAMPLED, keep)
        first = windows[:1]
        controls = controls_for(manifest, keep)
        engine = plain.step(plain.new_cache(*first.shape), first, controls, logits="all").logits[0]
        return SpeculationResult(
            draft=str(self.kind),
            acceptance=acceptance,
            logits={name: found.result() for name, found in self._found.items()},
            greedy=greedy,
            sampled=sampled,
            sampling=None if reference_logits is None else sampling_fit(reference_logits, engine),
        )


def _prompts(windows: np.ndarray) -> list[list[int]]:
    flat = windows.ravel()
    size = min(_PROMPT_TOKENS, max(1, windows.shape[1] // 2))
    starts = np.linspace(0, len(flat) - size, _PROMPTS).astype(int)
    # Different lengths, so that a batch is ragged.
    stops = [start + max(1, size - number % 4) for number, start in enumerate(starts)]
    return [[int(token) for token in flat[start:stop]] for start, stop in zip(starts, stops, strict=True)]


def _texts(
    plain: Runner, draft: Draft, prompts: Sequence[list[int]], sampling: Sampling, keep: KeepSettings
) -> tuple[TextsCompared, float | None]:
    """Compare plain and speculative text of each prompt, and of some in a batch. Returns: comparison, acceptance."""
    room = plain.manifest.decoder.max_positions - max(len(prompt) for prompt in prompts)
    limit = min(_NEW_TOKENS, room)
    continuations = tokens = drafted = accepted = 0
    mismatches: list[TextMismatch] = []
    groups = [[number] for number in range(len(prompts))] + [list(range(min(_BATCH, len(prompts))))]
    for group in groups:
        batch = [prompts[number] for number in group]
        want = generate(plain, batch, max_new_tokens=limit, keep=keep, sampling=sampling, stop_ids=[]).sequences
        for length in _LENGTHS:
            have = generate(
                draft.runner,
                batch,
                max_new_tokens=limit,
                keep=keep,
                sampling=sampling,
                stop_ids=[],
                draft=draft,
                draft_length=length,
            )
            drafted, accepted = drafted + sum(have.stats.drafted), accepted + sum(have.stats.accepted)
            for row, (number, expected, found) in enumerate(zip(group, want, have.sequences, strict=True)):
                continuations += 1
                tokens += len(expected.tokens)
                if expected.tokens != found.tokens:
                    mismatch = _mismatch(plain, Picker(sampling), row, prompts[number], expected, found, keep)
                    mismatches.append(replace(mismatch, prompt=number))
    return TextsCompared(continuations, tokens, tuple(mismatches)), accepted / drafted if drafted else None


def _mismatch(
    plain: Runner,
    picker: Picker,
    row: int,
    prompt: list[int],
    want: Generated,
    have: Generated,
    keep: KeepSettings,
) -> TextMismatch:
    """The first token that differs, and how far apart the two were. Args: row: the prompt's row in its batch."""
    position = next(i for i, (a, b) in enumerate(zip(want.tokens, have.tokens, strict=True)) if a != b)
    ids = np.array([[*prompt, *want.tokens[:position]]])
    controls = controls_for(plain.manifest, keep, [len(prompt)])
    logits = plain.step(plain.new_cache(*ids.shape), ids, controls).logits[0, 0]
    scores = picker.scores(logits, row, ids.shape[1])
    expected, found = want.tokens[position], have.tokens[position]
    return TextMismatch(row, position, expected, found, float(abs(scores[expected] - scores[found])))


def sampling_fit(reference: np.ndarray, engine: np.ndarray) -> SamplingFit | None:
    """Draw from the engine's logits with fixed seeds, and test against the reference's probabilities.

    Args: reference, engine [S, V]: logits at the same positions.
    Returns: None if the reference's cut of top-p is too close to call at every position.
    """
    least, outside, places = 1.0, 0, 0
    for place in np.linspace(0, len(reference) - 1, _PLACES).astype(int):
        wanted = reference_probabilities(reference[place])
        if wanted is None:
            continue
        ids, weights = candidates(engine[place], SAMPLED)
        if set(ids) != set(np.flatnonzero(wanted)):
            outside += round(_DRAWS * float(weights[wanted[ids] == 0].sum()))
        pickers = (Picker(Sampling(SAMPLED.temperature, SAMPLED.top_k, SAMPLED.top_p, seed)) for seed in range(_DRAWS))
        counts = np.bincount([picker.pick(engine[place], 0, int(place)) for picker in pickers], minlength=len(wanted))
        places += 1
        least = min(least, _p_value(counts, _DRAWS * wanted))
    return SamplingFit(places, _DRAWS, min(1.0, least * places), outside) if places else None


def reference_probabilities(logits: np.ndarray) -> np.ndarray | None:
    """Next-token probabilities [V] float64 as PyTorch gives them; None if the cut of top-p is too close to call.

    Written without the engine's sampler, as transformers defines its warpers: temperature, top-k, top-p.
    """
    scores = torch.from_numpy(logits).double() / SAMPLED.temperature
    top = torch.topk(scores, min(SAMPLED.top_k, len(scores)))
    probabilities = torch.softmax(top.values, dim=0)
    before = probabilities.cumsum(0) - probabilities
    if bool(((before - SAMPLED.top_p).abs() < _TOP_P_MARGIN).any()):
        return None
    kept = before < SAMPLED.top_p
    full = torch.zeros_like(scores)
    full[top.indices[kept]] = probabilities[kept] / probabilities[kept].sum()
    return full.numpy()


def _p_value(counts: np.ndarray, expected: np.ndarray) -> float:
    """P-value of a chi-square test of counts against expected counts; rare tokens are merged into one cell."""
    common = expected >= _LEAST_EXPECTED
    rest = [counts[~common].sum()], [expected[~common].sum()]
    found, wanted = np.append(counts[common], rest[0]), np.append(expected[common], rest[1])
    cells = wanted > 0
    if found[~cells].any():
        return 0.0
    if cells.sum() < 2:
        return 1.0
    return float(stats.chisquare(found[cells], wanted[cells] * found.sum() / wanted.sum()).pvalue)
