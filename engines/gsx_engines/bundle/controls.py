"""Turns a request's keep settings into run-time values for the graph.

A bundle's manifest names the inputs that its rule reads (`policy.inputs`). They stay the same for a whole request:
under the K/V policy `none`, K and V of a skipped layer are never computed, so a set of layers cannot grow later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from gsx_engines.bundle.confidence import check_threshold
from gsx_engines.bundle.layer_sets import check_mask, exit_places, mask_of, parse_places, unified_places
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import Selection, check_budget
from gsx_plugins.errors import UsageError

# Run-time inputs with a value for each sequence, on their first axis, and how many axes they have with it. Thresholds
# of a bundle of 0.1.0 lack the axis, and apply to all sequences.
BY_SEQUENCE = {"thresholds": 3, "exit_threshold": 1, "layer_mask": 3, "full_until": 1, "loops": 1}

# Run-time values: name of a run-time input (`policy.inputs` of the manifest) -> its value; empty for a dense model.
RuntimeValues = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class KeepSettings:
    """The keep settings of one request; if it gives none, the exported ones apply. At most one may be given, but for
    `hold`.

    Args:
        budget: share of skippable work to keep, for keep rules with thresholds.
        layers: the branches that run, in the form that `parse_places` reads, for rules that read a layer mask.
        exit: how many layers run; for the same rules.
        speedup: target of Unified Layer Skipping: the prompt runs in full, new tokens run the kept layers; for the same
            rules.
        exit_threshold: confidence at which a token exits, for rules that measure it.
        loops: how many loops of a looped model run.
        hold: whether the thresholds of new tokens move so that the budget holds (`bundle/hold.py`).
    Raises:
        UsageError: more than one is given.
    """

    budget: float | None = None
    layers: str | None = None
    exit: int | None = None
    speedup: float | None = None
    exit_threshold: float | None = None
    loops: int | None = None
    hold: bool = False

    def __post_init__(self) -> None:
        if len(self.given) > 1:
            raise UsageError(
                "only one setting may decide what is kept", expected="one of them", found=" and ".join(self.given)
            )

    @property
    def given(self) -> tuple[str, ...]:
        """Names of the settings that are given, but for `hold`."""
        names = (field.name for field in fields(self) if field.name != "hold")
        return tuple(name for name in names if getattr(self, name) is not None)

    def __str__(self) -> str:
        """For example `budget 0.7`; `as exported` if nothing is given."""
        asked = " ".join(f"{name.replace('_', ' ')} {getattr(self, name)}" for name in self.given) or "as exported"
        return f"{asked}, held" if self.hold else asked


AS_EXPORTED = KeepSettings()


def controls_for(
    manifest: Manifest,
    keep: KeepSettings | Sequence[KeepSettings] = AS_EXPORTED,
    prompt_tokens: Sequence[int] | None = None,
) -> RuntimeValues:
    """The run-time values of a call.

    Args:
        keep: one for all sequences, or one for each.
        prompt_tokens: lengths of the prompts, for rules that run a prompt in full; None applies the rule to every token
            (scoring, parity), for as many sequences as `keep` has entries.
    Raises:
        UsageError: a setting that the bundle's rule does not read, a value that it does not accept, or settings for a
            different number of sequences.
    """
    settings = [keep] if isinstance(keep, KeepSettings) else list(keep)
    sequences = len(prompt_tokens) if prompt_tokens is not None else len(settings)
    if isinstance(keep, KeepSettings):
        settings = settings * sequences
    if len(settings) != sequences:
        raise UsageError(
            "what to keep was given for a different number of prompts",
            expected=f"one choice for all, or {sequences}",
            found=str(len(settings)),
        )
    for setting in dict.fromkeys(settings):
        _check_read(manifest, setting)
    policy = manifest.policy
    if policy is None:
        return {}
    controls: dict[str, np.ndarray] = {}
    if manifest.selection is not None:
        controls |= _selected(manifest, manifest.selection, [setting.budget for setting in settings])
    if policy.input("layer_mask"):
        controls["layer_mask"] = np.stack([layer_mask(manifest, setting) for setting in settings])
    if policy.input("loops"):
        controls["loops"] = np.array([_loops(manifest, setting) for setting in settings], np.int64)
    if policy.input("exit_threshold"):
        wanted = [setting.exit_threshold for setting in settings]
        if not manifest.by_sequence("exit_threshold"):
            _check_shared("exit threshold", wanted)
        found = np.array([_exit_threshold(policy, threshold) for threshold in wanted], np.float32)
        controls["exit_threshold"] = found if manifest.by_sequence("exit_threshold") else found[:1].reshape(())
    if policy.input("full_until"):
        prompts = [None] * sequences if prompt_tokens is None else prompt_tokens
        until = [_full_until(manifest, setting, tokens) for setting, tokens in zip(settings, prompts, strict=True)]
        controls["full_until"] = np.array(until, np.int64)
    return controls


def _selected(manifest: Manifest, selection: Selection, budgets: Sequence[float | None]) -> RuntimeValues:
    """The run-time value for the budget of each sequence; None for the exported one."""
    wanted = [selection.budget if budget is None else budget for budget in budgets]
    apart = manifest.by_sequence("thresholds")
    if not apart:
        _check_shared("budget", budgets)
    if selection.mode == "rank":
        return {"budget": np.array(wanted[0], np.float32)}
    tables = {budget: selection.thresholds_for(budget) for budget in dict.fromkeys(wanted)}
    return {"thresholds": np.stack([tables[budget] for budget in wanted]) if apart else tables[wanted[0]]}


def _check_shared(name: str, values: Sequence[float | None]) -> None:
    """Refuse different values for the sequences of a batch, where the input has no batch axis."""
    found = dict.fromkeys("as exported" if value is None else str(float(value)) for value in values)
    if len(found) > 1:
        raise UsageError(f"the sequences of a batch must share one {name}", found=", ".join(found))


def layer_mask(manifest: Manifest, keep: KeepSettings) -> np.ndarray:
    """The layer mask [L, 2] float32 of a request.

    Raises:
        UsageError: a set that the model does not have, or that its K/V policy does not allow.
    """
    policy, layers = manifest.policy, manifest.decoder.num_layers
    assert policy is not None
    read = policy.input("layer_mask")
    assert read is not None
    if keep.layers is not None:
        try:
            places = parse_places(keep.layers)
        except ValueError:
            raise UsageError(
                f"{keep.layers!r} is not a set of layers", expected="e.g. 0-3,6,8.attn", found=repr(keep.layers)
            ) from None
        return mask_of(places, layers, manifest.kv_policy)
    if keep.exit is not None:
        return mask_of(exit_places(keep.exit, layers, policy.exits), layers, manifest.kv_policy)
    if keep.speedup is not None:
        return mask_of(unified_places(layers, keep.speedup), layers, manifest.kv_policy)
    mask = np.asarray(read.default, np.float32)
    check_mask(mask, manifest.kv_policy)
    return mask


def _check_read(manifest: Manifest, keep: KeepSettings) -> None:
    """Refuse settings that the bundle's rule does not read."""
    policy = manifest.policy
    if keep.hold:
        _check_hold(manifest, keep)
    if keep.budget is not None:
        if policy is None and keep.budget == 1:
            return
        if manifest.selection is None:
            raise UsageError(
                "this bundle has no budget to choose",
                expected="a bundle whose keep rule has thresholds" if policy else "budget 1, or no budget",
                found=f"a dense model, budget {keep.budget:g}" if policy is None else f"policy {policy.name}",
            )
        check_budget(keep.budget)
    elif keep.exit_threshold is not None:
        read = policy.input("exit_threshold") if policy else None
        if read is None:
            raise UsageError(
                "an exit threshold needs a bundle with confidence-based exits",
                found="a dense model" if policy is None else f"policy {policy.name}",
                todo="export the model with the policy calm",
            )
        assert read.least is not None
        assert read.most is not None
        check_threshold(keep.exit_threshold, read.least, read.most)
    elif keep.loops is not None:
        loops = manifest.decoder.loops
        if policy is None or policy.input("loops") is None or loops is None:
            raise UsageError(
                "a number of loops needs a bundle whose keep rule reads it",
                found="a dense model" if policy is None else f"policy {policy.name}",
                todo="export a looped model with the policy loops",
            )
        loops.check(keep.loops, "the number of loops")
    elif keep.given and (policy is None or policy.input("layer_mask") is None):
        raise UsageError(
            f"the setting {keep.given[0]!r} needs a bundle whose keep rule reads a set of layers",
            found="a dense model" if policy is None else f"policy {policy.name}",
            todo="export the model with the policy layers",
        )


def _check_hold(manifest: Manifest, keep: KeepSettings) -> None:
    """Refuse to hold what is not a budget of thresholds, or has none for each sequence."""
    if manifest.selection is None:
        raise UsageError(
            "there is no budget to hold",
            expected="a bundle whose keep rule has thresholds",
            found="a dense model" if manifest.policy is None else f"policy {manifest.policy.name}",
        )
    if manifest.selection.mode == "rank":
        raise UsageError(
            "holding a budget needs selection by threshold",
            found="rank, which keeps the budget's share of every call",
            todo="export with --select threshold",
        )
    if not manifest.by_sequence("thresholds"):
        raise UsageError(
            "the thresholds of this bundle are the same for all sequences, so none can hold a budget of its own",
            expected="thresholds with a batch axis",
            found="a bundle of gsx 0.1.0",
            todo="export the model again",
        )


def _loops(manifest: Manifest, keep: KeepSettings) -> int:
    """How many loops a request runs."""
    assert manifest.decoder.loops is not None
    return manifest.decoder.loops.default if keep.loops is None else keep.loops


def default_controls(policy: Policy | None, selection: Selection | None) -> RuntimeValues:
    """The exported run-time values, as they are stored in graphs; those by sequence have a first axis of 1."""
    controls: dict[str, np.ndarray] = {}
    for read in policy.inputs if policy else ():
        if read.name == "layer_mask":
            controls[read.name] = np.asarray([read.default], np.float32)
        elif read.name in ("full_until", "loops"):
            controls[read.name] = np.asarray([read.default], np.int64)
        elif read.name == "exit_threshold":
            assert policy is not None
            controls[read.name] = np.array([_exit_threshold(policy, None)], np.float32)
        else:
            assert selection is not None
            controls[read.name] = (
                np.array(selection.budget, np.float32)
                if read.name == "budget"
                else selection.thresholds_for(selection.budget)[None]
            )
    return controls


def stacked(rows: Sequence[RuntimeValues | None]) -> RuntimeValues:
    """The run-time values of a batch, from those of its sequences, which must share the values without a batch axis.

    Args:
        rows: the values of each row's sequence; None for a row that is not in use (it gets those of another row).
    """
    used = next(row for row in rows if row is not None)
    given = [used if row is None else row for row in rows]
    return {
        name: np.concatenate([row[name] for row in given]) if is_by_sequence(name, value) else value
        for name, value in used.items()
    }


def rows_of(controls: RuntimeValues, rows: slice) -> RuntimeValues:
    """The run-time values of some neighbouring sequences of a batch; one row applies to all."""
    return {
        name: value[rows] if is_by_sequence(name, value) and len(value) > 1 else value
        for name, value in controls.items()
    }


def shared_by_batch(controls: RuntimeValues) -> bytes:
    """The run-time values that the sequences of a batch must share, in a form that can be compared."""
    return b"".join(value.tobytes() for name, value in sorted(controls.items()) if not is_by_sequence(name, value))


def is_by_sequence(name: str, value: np.ndarray) -> bool:
    """Whether a run-time value has a row for each sequence."""
    return value.ndim == BY_SEQUENCE.get(name)


def at_budget(controls: RuntimeValues, selection: Selection, budget: float) -> RuntimeValues:
    """Run-time values with the thresholds of another budget, for all sequences."""
    thresholds = np.broadcast_to(selection.thresholds_for(budget), controls["thresholds"].shape)
    return {**controls, "thresholds": np.ascontiguousarray(thresholds)}


def _exit_threshold(policy: Policy, threshold: float | None) -> float:
    """An exit threshold; None: the exported one."""
    assert policy.confidence is not None
    return policy.confidence.threshold if threshold is None else threshold


def _full_until(manifest: Manifest, keep: KeepSettings, prompt_tokens: int | None) -> int:
    """Position from which the rule applies to a sequence: after its prompt and the warm-up, or 0."""
    policy = manifest.policy
    assert policy is not None
    gives_set = keep.layers is not None or keep.exit is not None
    warm_up = 0 if keep.speedup is not None else None if gives_set else policy.warm_up
    return 0 if warm_up is None or prompt_tokens is None else prompt_tokens + warm_up
