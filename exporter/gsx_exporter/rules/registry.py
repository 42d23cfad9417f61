"""All keep rules: those of gsx, and those of other packages.

A package registers a rule by an entry point in the group `gsx.keep_rules`, whose name is the rule's name and which
refers to a `Rule`. The package is imported only when its rule is used.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from gsx_engines.bundle.controls import RuntimeValues
from gsx_engines.bundle.manifest import Manifest
from gsx_engines.bundle.policy import Policy
from gsx_engines.bundle.selection import Selection
from gsx_engines.errors import BundleError
from gsx_exporter.config import ModelConfig
from gsx_exporter.decoder.rule import TracedRule
from gsx_exporter.reference.rule import KeepAll, ReferenceRule
from gsx_exporter.rules.calm.policy import CALM
from gsx_exporter.rules.dense.policy import plan_dense
from gsx_exporter.rules.ffn_skip.policy import FFN_SKIP
from gsx_exporter.rules.gateskip.policy import GATESKIP
from gsx_exporter.rules.layers.policy import LAYERS, UNIFIED
from gsx_exporter.rules.loops.policy import LOOPS
from gsx_exporter.rules.parameters import bad_parameters
from gsx_exporter.rules.plan import PolicyOptions, RulePlan
from gsx_exporter.rules.router.policy import ROUTER
from gsx_exporter.rules.rule import Recorded, Rule
from gsx_plugins.errors import UsageError

GROUP = "gsx.keep_rules"
RULES = {rule.name: rule for rule in (GATESKIP, ROUTER, LAYERS, UNIFIED, FFN_SKIP, CALM, LOOPS)}
# A policy without a rule: every token runs every branch.
DENSE = "dense"


def rule_names() -> tuple[str, ...]:
    """The names that `--policy` accepts: gsx's own rules, `dense`, and rules of installed packages."""
    return (*RULES, DENSE, *_outside_names())


def rule_named(name: str) -> Rule:
    """A rule by its name.

    Raises:
        UsageError: there is no such rule, its package cannot be imported, or the entry point is something else.
    """
    if name in RULES:
        return RULES[name]
    entry = _outside().get(name)
    if entry is None:
        raise UsageError(
            f"policy {name!r} is not known",
            expected="one of " + ", ".join(rule_names()),
            found=repr(name),
            todo=f"install the package that has the rule (as an entry point of the group {GROUP})",
        )
    try:
        found = entry.load()
    except Exception as error:  # another package's import may raise anything
        raise UsageError(
            f"policy {name!r}: its package cannot be imported",
            expected=f"a Rule at {entry.value}",
            found=f"{type(error).__name__}: {error}",
            todo="repair or uninstall that package",
        ) from error
    if not isinstance(found, Rule) or found.name != name:
        raise UsageError(
            f"policy {name!r}: its entry point is not a keep rule with that name",
            expected=f"a gsx_exporter.rules.rule.Rule named {name!r} at {entry.value}",
            found=f"a Rule named {found.name!r}" if isinstance(found, Rule) else repr(found),
        )
    return found


def every_rule() -> tuple[dict[str, Rule], dict[str, str]]:
    """All rules by name; and rules of other packages that cannot be used, by name, with the reason."""
    found, broken = dict(RULES), {}
    for name in _outside_names():
        try:
            found[name] = rule_named(name)
        except UsageError as error:
            broken[name] = error.what
    return found, broken


def rule_of(policy: Policy) -> Rule:
    """The rule that a bundle was exported with.

    Raises:
        BundleError: this version does not know the rule, or its package is not installed.
    """
    try:
        return rule_named(policy.name)
    except UsageError as error:
        raise BundleError(
            f"gsx.json: {error.what}",
            expected=error.expected,
            found=error.found,
            todo="install the version of gsx or the package of the rule that the bundle was made with, or export again",
        ) from error


def plan_policy(options: PolicyOptions, config: ModelConfig) -> RulePlan:
    """The plan of the rule that is asked for.

    Raises:
        UsageError: an unknown policy, options that exclude each other, or a checkpoint that lacks what the rule needs.
    """
    name, colon, parameters = (options.policy or _default(config)).partition(":")
    plan = plan_dense if name == DENSE else rule_named(name).plan
    if colon and not parameters:
        bad_parameters(name, "some after the colon, or no colon", f"{name}:")
    if config.router is not None and name != ROUTER.name:
        raise UsageError(
            f"--policy {name}: the checkpoint has routers, which decide what runs",
            expected="a checkpoint without routers",
            todo="export with router, the default; --budget 1 keeps everything",
        )
    # With layers behind the loop, an exit would leave them out too.
    exits = config.loops is not None and name == CALM.name and not config.loops.after
    if config.loops is not None and name not in (LOOPS.name, DENSE) and not exits:
        raise UsageError(
            f"--policy {name}: the model is looped, and the rule does not say what it means in a loop",
            expected=f"{LOOPS.name} or {DENSE}; {CALM.name} where no layer comes after the loops",
            found=name,
            todo=f"export with {LOOPS.name}, the default; --loops chooses how many run",
        )
    return plan(options, config, parameters)


def traced_rule(policy: Policy | None, selection: Selection | None, config: ModelConfig) -> TracedRule | None:
    """The traced rule of a manifest; None for a dense bundle."""
    return None if policy is None else rule_of(policy).traced(Recorded(policy, selection, config))


def reference_rule(manifest: Manifest, controls: RuntimeValues) -> ReferenceRule:
    """The reference rule of a manifest, with the run-time inputs of a request."""
    policy = manifest.policy
    if policy is None:
        return KeepAll()
    return rule_of(policy).reference(policy, manifest.selection, controls)


def _outside_names() -> list[str]:
    return sorted(name for name in _outside() if name not in RULES)


def _outside() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _default(config: ModelConfig) -> str:
    trained = {GATESKIP.name: config.gate, ROUTER.name: config.router, LOOPS.name: config.loops}
    return next((name for name, found in trained.items() if found), DENSE)
