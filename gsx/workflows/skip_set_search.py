"""`gsx export --draft layers:auto`: which branches a draft leaves out, searched with Optuna.

Draft & Verify (2309.08168) and SWIFT (2410.06916) search for the set by the time per accepted token. Measured time says
little on a machine that does other work too (the same set, measured four times in turn with plain decoding, ran at 0.35
to 0.74 of its speed), so a candidate is judged by what can be counted: accepted tokens of text that the model
generated, and bytes read. The best candidates are then measured against plain decoding, on other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gsx_engines.bundle.cost import StepBytes
from gsx_engines.bundle.drafts import LayersDraft
from gsx_engines.bundle.words import BRANCHES, Branch
from gsx_engines.draft_trials.replay import Replay
from gsx_engines.speculation.adapt import evenly
from gsx_engines.speculation.length import counted_speed
from gsx_plugins.progress import OnProgress, Progress, silent

# The search ends after so many candidates or seconds, whichever comes first.
TRIALS, SECONDS = 200, 90.0
# The first candidates are sets at even steps through the depth; these are the shares of the branches they leave out.
_FIRST_SHARES = (0.25, 0.375, 0.5)
_SEED = 0


@dataclass(frozen=True)
class Candidate:
    """A set that was tried.

    Args:
        draft: the set.
        speed: relative to plain decoding, computed from counts (`counted_speed`).
        length: the draft length that this speed is for.
    """

    draft: LayersDraft
    speed: float
    length: int


def search_skip_sets(
    replay: Replay,
    layers: int,
    branches: Sequence[Branch],
    cost: StepBytes,
    on_progress: OnProgress = silent,
    trials: int = TRIALS,
    seconds: float = SECONDS,
) -> list[Candidate]:
    """Search for the branches that a draft leaves out, by a tree-structured Parzen estimator with a fixed seed.

    Args:
        replay: the text that candidates are tried on.
        layers: L.
        branches: those that may be skipped.
        cost: bytes of each branch.
        on_progress: called after each candidate; the total is the largest number to try.
    Returns: distinct sets that leave something out, best first.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    places = [(layer, branch) for layer in range(layers) for branch in branches]
    trials = min(trials, 2 ** len(places))  # there are no more sets
    names = [f"{layer}.{branch}" for layer, branch in places]
    found: dict[tuple[bool, ...], Candidate] = {}

    def judge(skip: tuple[bool, ...]) -> Candidate:
        if skip not in found:
            draft = LayersDraft(skip=tuple(place for place, left_out in zip(places, skip, strict=True) if left_out))
            run = np.ones((layers, len(BRANCHES)), bool)
            for layer, branch in draft.skip:
                run[layer, BRANCHES.index(branch)] = False
            found[skip] = Candidate(draft, *counted_speed(replay.accepted(draft), cost.share(run)))
        return found[skip]

    def objective(trial: optuna.Trial) -> float:
        skip = tuple(trial.suggest_categorical(name, [False, True]) for name in names)
        return judge(skip).speed

    def report(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        on_progress(Progress("searching skip sets", trial.number + 1, trials))

    sampler = optuna.samplers.TPESampler(seed=_SEED, multivariate=True, n_startup_trials=max(10, trials // 10))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for share in _FIRST_SHARES:
        left_out = set(evenly(places, share))
        study.enqueue_trial({name: place in left_out for name, place in zip(names, places, strict=True)})
    study.optimize(objective, n_trials=trials, timeout=seconds, callbacks=[report])
    ranked = sorted(found.values(), key=lambda candidate: candidate.speed, reverse=True)
    return [candidate for candidate in ranked if 0 < len(candidate.draft.skip) < len(places)]
