"""Which products must be spared for a given quality: the fewest, the worst first.

What each product loses by itself is known from choosing its codes (`choose.py`), so that no product is tried on its
own: a few measurements of the whole model find how many of the worst must be spared. A spared product has INT8 weights
in blocks and its inputs in full precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gsx_exporter.quantization.plan import QuantizationPlan, group_names, groups_of
from gsx_exporter.quantization.simulate import Cost, Simulation

# Measurements besides those of nothing and everything spared: each narrows what is still open.
_STEPS = 4


@dataclass(frozen=True)
class Tried:
    """A plan that was measured. Args: spared: groups of linear layers, the worst first."""

    plan: QuantizationPlan
    spared: tuple[str, ...]
    cost: Cost


def ranking(plan: QuantizationPlan, losses: Mapping[str, float]) -> list[str]:
    """The groups of linear layers that can be spared ("layers.0.mlp.down"), those that lose most first.

    Args: losses: what each product loses; a group loses what the worst of its products does.
    """
    config = plan.checkpoint.config
    products = group_names(config)
    worst = {
        group: max(losses.get(name, 0.0) for name in linears)
        for group, linears in groups_of(config).items()
        if group.endswith(products) and any(map(plan.can_spare, linears))
    }
    return sorted(worst, key=lambda group: -worst[group])


def spare(
    simulation: Simulation, plan: QuantizationPlan, losses: Mapping[str, float], holds: Callable[[Cost], bool]
) -> list[Tried]:
    """Find a plan that holds and spares few groups.

    Args:
        plan: with everything quantized that may be.
        losses: what each product loses by itself.
        holds: whether a cost is within the limits.
    Returns: all that was measured; the last one is the answer: the cheapest that holds, or, where nothing does,
        everything spared.
    """
    groups, order = groups_of(plan.checkpoint.config), ranking(plan, losses)

    def measured(count: int) -> Tried:
        spared = plan.sparing({linear for group in order[:count] for linear in groups[group]})
        return Tried(spared, tuple(order[:count]), simulation.cost(spared))

    tried = [measured(0)]
    if holds(tried[0].cost) or not order:
        return tried
    best: Tried | None = None
    too_few, enough = 0, len(order)  # that all of them are enough is measured only if no fewer are
    for _ in range(_STEPS):
        if enough - too_few <= 1:
            break
        # Losses fall steeply: the first few matter most, so the middle is taken on a logarithmic scale.
        middle = min(max(round(((too_few + 1) * enough) ** 0.5), too_few + 1), enough - 1)
        tried.append(measured(middle))
        if holds(tried[-1].cost):
            best, enough = tried[-1], middle
        else:
            too_few = middle
    if best is None:
        return [*tried, measured(len(order))]
    return [*(one for one in tried if one is not best), best]
