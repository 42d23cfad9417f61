"""Which linear layers cost most in 8 bits, and the fewest that must stay in full precision for a given quality.

Each group of linear layers that read the same values is quantized on its own and measured. Then groups are left in full
precision, the most costly first, until the whole model is within the limits.
"""

from __future__ import annotations

from dataclasses import dataclass

from gsx_exporter.quantization.plan import QuantizationPlan, groups_of
from gsx_exporter.quantization.simulate import Cost, Simulation
from gsx_plugins.progress import OnProgress, Progress, silent


@dataclass(frozen=True)
class Limits:
    """A quality target, against float32 at the same budget.

    Args:
        perplexity_increase: largest allowed relative increase; 0.01 is one percent.
        flipped: largest allowed share of keep/skip decisions that flip.
    """

    perplexity_increase: float = 0.01
    flipped: float = 0.01

    def hold(self, cost: Cost) -> bool:
        """Whether a cost is within the limits."""
        return cost.perplexity_increase <= self.perplexity_increase and cost.flipped <= self.flipped


@dataclass(frozen=True)
class Chosen:
    """What the search found.

    Args:
        plan: a plan within the limits.
        cost: of that plan.
        everything: cost of the whole model in 8 bits.
        ranking: (group, its cost on its own), the most costly first; empty if the whole model is within the limits.
        kept: groups left in full precision.
    """

    plan: QuantizationPlan
    cost: Cost
    everything: Cost
    ranking: tuple[tuple[str, Cost], ...]
    kept: tuple[str, ...]


def choose(
    simulation: Simulation,
    plan: QuantizationPlan,
    limits: Limits,
    on_progress: OnProgress = silent,
) -> Chosen:
    """Find a plan within the limits that leaves as few groups as possible in full precision.

    Args:
        simulation: measures the plans.
        plan: the whole model in 8 bits.
        limits: the quality target.
        on_progress: called after each group.
    """
    everything = simulation.cost(plan)
    if limits.hold(everything):
        return Chosen(plan, everything, everything, (), ())
    groups = {
        name: linears
        for name, linears in groups_of(plan.checkpoint.config).items()
        if any(linear in plan.input_scales for linear in linears)
    }
    costs: dict[str, Cost] = {}
    for name, linears in groups.items():
        costs[name] = simulation.cost(plan, [linear for linear in linears if linear in plan.input_scales])
        on_progress(Progress("measuring each group in 8 bits", len(costs), len(groups)))

    def price(cost: Cost) -> float:
        """One number to rank by. It uses the divergence, since the loss may fall by chance."""
        return cost.divergence / limits.perplexity_increase + cost.flipped / limits.flipped

    ranking = sorted(costs.items(), key=lambda item: -price(item[1]))

    def keeping(count: int) -> QuantizationPlan:
        return plan.without({linear for name, _ in ranking[:count] for linear in groups[name]})

    # The fewest groups, by bisection: with all groups in full precision the cost is 0, which is within the limits.
    too_few, enough, cost = 0, len(ranking), Cost(0.0, 0.0, 0.0)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        found = simulation.cost(keeping(middle))
        if limits.hold(found):
            enough, cost = middle, found
        else:
            too_few = middle
    kept = tuple(name for name, _ in ranking[:enough])
    return Chosen(keeping(enough), cost, everything, tuple(ranking), kept)
