"""Draft and verify: the two halves of a split decoder against the reference, and speculative text against plain text.

Speculation must not change the text. It is compared with the text of plain decoding token by token, greedy and sampled
with the same seeds, one prompt at a time and in a batch. Sampled tokens are compared with the distribution that follows
from the reference's logits, computed here by PyTorch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from scipy import special

from gsx.parity.closeness import Observation
from gsx.parity.difference import Accumulator, Comparison
from gsx.parity.store import Rows
from gsx_engines.bundle.bundle import Bundle
from gsx_engines.bundle.controls import KeepSettings, RuntimeValues, controls_for
from gsx_engines.generation.generate import Generated, generate
from gsx_engines.runners.base import Runner
from gsx_engines.runners.portable import PortableStage
from gsx_engines.runners.select import Backend, open_runner, open_split_runner
from gsx_engines.runners.split import SplitRunner
from gsx_engines.sampling import GREEDY, Picker, Sampling, candidates
from gsx_engines.speculation.draft import Draft, open_draft
from gsx_plugins.progress import OnProgress, Progress

SAMPLED = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=7)
_PROMPT_TOKENS, _BATCH = 24, 3
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


@dataclass(frozen=True)
class Texts:
    """Which texts are compared, each prompt by itself and some in a batch.

    Args:
        prompts: how many; new_tokens: of each.
        lengths, sampled_lengths: draft lengths to try, greedily and with sampling; None: found while generating.
    """

    prompts: int
    new_tokens: int
    lengths: tuple[int | None, ...]
    sampled_lengths: tuple[int | None, ...]

    @property
    def generations(self) -> int:
        """How many texts are generated, plain ones and drafted ones; a batch counts as one."""
        return (self.prompts + 1) * (2 + len(self.lengths) + len(self.sampled_lengths))


TEXTS = Texts(prompts=3, new_tokens=32, lengths=(None, 3), sampled_lengths=(None,))
FULL_TEXTS = Texts(prompts=8, new_tokens=48, lengths=(None, 3), sampled_lengths=(None, 3))

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class HalvesInput:
    """A window on which the two halves of a split model are compared.

    Args:
        ids: [1, S]; controls: the run-time values.
        want: the reference's observation, with logits after the exit; clean [S] bool: tokens that no near tie affected.
    """

    ids: np.ndarray
    controls: RuntimeValues
    want: Observation
    clean: np.ndarray


@dataclass(frozen=True)
class TextsInput:
    """Texts to compare at one setting.

    Args:
        keep: what a request asks of the keep rule.
        texts: which.
        want: the reference's observation of the first window, whose distribution the draws must follow; None if the
            engine's logits are too far from it.
    """

    keep: KeepSettings
    texts: Texts
    want: Observation | None


@dataclass(frozen=True)
class _Plain:
    """Plain texts at one setting: by sampling and group of prompts. And the logits [places, V] that were drawn from."""

    sequences: Mapping[tuple[str, int], Sequence[Generated]]
    logits: np.ndarray


class SpeculationSide:
    """A bundle's draft. One runner is open at a time."""

    def __init__(self, bundle: Bundle, backend: Backend = "onnxruntime") -> None:
        assert bundle.manifest.draft is not None
        self.kind = bundle.manifest.draft.draft
        self._bundle, self._backend = bundle, backend

    @property
    def exit_layer(self) -> int | None:
        """Number of layers that the draft runs; None if it is not an exit."""
        return self.kind.layer if self.kind.kind == "exit" else None

    def halves(self, inputs: Mapping[K, Sequence[HalvesInput]]) -> dict[K, dict[str, Comparison]]:
        """Compare both halves' logits over windows, by setting, with both runners."""
        found: dict[K, dict[str, Comparison]] = {setting: {} for setting in inputs}
        for name, opened in (("fast", self._fast), ("portable", self._portable)):
            runner = opened()
            for setting, windows in inputs.items():
                draft, verify = Accumulator(), Accumulator()
                for number, one in enumerate(windows):
                    cache = runner.new_cache(*one.ids.shape)
                    assert one.want.exit_logits is not None
                    early = runner.draft(cache, one.ids, one.controls, logits="all").logits[0]
                    draft.add(*self._chosen_among(one.want.exit_logits, early), one.clean, number)
                    del early
                    verify.add(one.want.logits, runner.verify(cache).logits[0], one.clean, number)
                found[setting][f"draft, {name} runner"] = draft.result()
                found[setting][f"verify, {name} runner"] = verify.result()
            del runner
        return found

    def _chosen_among(self, want: Rows, have: np.ndarray) -> tuple[Rows, np.ndarray]:
        """Logits [S, V] of the reference and of the draft, [S, N] of the tokens that the draft chooses among.

        The others must be minus infinity, as many as the manifest says; else all are compared, and those fail.
        """
        vocabulary = self._bundle.manifest.draft.vocabulary if self._bundle.manifest.draft else None
        if vocabulary is None:
            return want, have
        chosen = ~np.isneginf(have).all(axis=0)
        if chosen.sum() != vocabulary.tokens:
            return want, have
        return np.asarray(want)[:, chosen], have[:, chosen]

    def results(
        self,
        windows: np.ndarray,
        inputs: Mapping[K, TextsInput],
        halves: Mapping[K, Mapping[str, Comparison]],
        on_progress: OnProgress,
    ) -> dict[K, SpeculationResult]:
        """Compare texts at each setting of the keep rule.

        Args: windows [M, S]: prompts are taken from them; halves: what `halves` found.
        """
        plain = open_runner(self._bundle, backend=self._backend)
        texts = {}
        for setting, one in inputs.items():
            on_progress(Progress("plain text"))
            texts[setting] = _plain(plain, windows, one)
        del plain
        draft = open_draft(self._bundle, self.kind, backend=self._backend)
        found = {}
        for setting, one in inputs.items():
            on_progress(Progress("drafted text"))
            greedy, acceptance = self._compared(draft, windows, one, texts[setting], GREEDY)
            sampled, _ = self._compared(draft, windows, one, texts[setting], SAMPLED)
            places = _places(windows.shape[1])
            wanted = None if one.want is None else np.concatenate([one.want.logits[at : at + 1] for at in places])
            found[setting] = SpeculationResult(
                draft=str(self.kind),
                acceptance=acceptance,
                logits=dict(halves.get(setting, {})),
                greedy=greedy,
                sampled=sampled,
                sampling=None if wanted is None else sampling_fit(wanted, texts[setting].logits),
            )
        return found

    def _compared(
        self, draft: Draft, windows: np.ndarray, one: TextsInput, plain: _Plain, sampling: Sampling
    ) -> tuple[TextsCompared, float | None]:
        """Compare plain and speculative text of each prompt, and of some in a batch; and the acceptance."""
        prompts = _prompts(windows, one.texts.prompts)
        limit = _limit(draft.runner, prompts, one.texts)
        lengths = one.texts.lengths if sampling is GREEDY else one.texts.sampled_lengths
        continuations = tokens = drafted = accepted = 0
        mismatches: list[TextMismatch] = []
        again: Runner | None = None
        for at, group in enumerate(_groups(prompts)):
            batch = [prompts[number] for number in group]
            want = plain.sequences[str(sampling), at]
            for length in lengths:
                have = generate(
                    draft.runner,
                    batch,
                    max_new_tokens=limit,
                    keep=one.keep,
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
                        again = again or open_runner(self._bundle, backend=self._backend)
                        mismatch = _mismatch(again, Picker(sampling), row, prompts[number], expected, found, one.keep)
                        mismatches.append(replace(mismatch, prompt=number))
        return TextsCompared(continuations, tokens, tuple(mismatches)), accepted / drafted if drafted else None

    def _fast(self) -> SplitRunner:
        return open_split_runner(self._bundle, backend=self._backend)

    def _portable(self) -> SplitRunner:
        return SplitRunner(PortableStage(self._bundle, "draft"), PortableStage(self._bundle, "verify"))


def _plain(runner: Runner, windows: np.ndarray, one: TextsInput) -> _Plain:
    """The texts without a draft."""
    prompts = _prompts(windows, one.texts.prompts)
    limit = _limit(runner, prompts, one.texts)
    sequences = {}
    for sampling in (GREEDY, SAMPLED):
        for at, group in enumerate(_groups(prompts)):
            batch = [prompts[number] for number in group]
            sequences[str(sampling), at] = generate(
                runner, batch, max_new_tokens=limit, keep=one.keep, sampling=sampling, stop_ids=[]
            ).sequences
    first = windows[:1]
    controls = controls_for(runner.manifest, one.keep)
    logits = runner.step(runner.new_cache(*first.shape), first, controls, logits="all").logits[0]
    return _Plain(sequences, logits[_places(windows.shape[1])])


def _places(length: int) -> np.ndarray:
    """Positions of a window at which draws are compared."""
    return np.linspace(0, length - 1, _PLACES).astype(int)


def _groups(prompts: Sequence[list[int]]) -> list[list[int]]:
    """Each prompt by itself, and the first ones in a batch."""
    return [[number] for number in range(len(prompts))] + [list(range(min(_BATCH, len(prompts))))]


def _limit(runner: Runner, prompts: Sequence[list[int]], texts: Texts) -> int:
    room = runner.manifest.decoder.max_positions - max(len(prompt) for prompt in prompts)
    return min(texts.new_tokens, room)


def _prompts(windows: np.ndarray, count: int) -> list[list[int]]:
    flat = windows.ravel()
    size = min(_PROMPT_TOKENS, max(1, windows.shape[1] // 2))
    starts = np.linspace(0, len(flat) - size, count).astype(int)
    # Different lengths, so that a batch is ragged.
    stops = [start + max(1, size - number % 4) for number, start in enumerate(starts)]
    return [[int(token) for token in flat[start:stop]] for start, stop in zip(starts, stops, strict=True)]


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
    for place in _places(len(reference)):
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
    found, wanted = found[cells], wanted[cells] * found.sum() / wanted.sum()
    return float(special.chdtrc(len(found) - 1, ((found - wanted) ** 2 / wanted).sum()))
