"""Plans on curves of loss against cost: greedy start, filling, exchanging, and how good any plan can be.

A problem is a list of curves, one per matrix: the costs of its levels, strictly rising, and the loss at each. A plan is
a list of positions on them. No function here lets a plan exceed the budget or its loss rise.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec, longest_prefix
from lowrank_lit.allocation.hull import lower_hull


@dataclass(frozen=True, eq=False)
class Problem:
    """Curves and a budget.

    Attributes:
        levels: Ranks of each matrix, ``(L_j,)``.
        costs: Parameters at them, strictly rising, ``(L_j,)``.
        losses: Loss at them, ``(L_j,)``.
        budget: Parameters in all; the first level of every matrix fits.
    """

    levels: list[NDArray[np.int64]]
    costs: list[NDArray[np.int64]]
    losses: list[NDArray[np.float64]]
    budget: int

    @classmethod
    def of(cls, specs: Sequence[MatrixSpec], curves: Sequence[NDArray[np.float64]], budget: int) -> Problem:
        """The problem of the matrices' levels with losses by rank, ``(p + 1,)`` each."""
        levels = [spec.levels() for spec in specs]
        costs = [spec.costs(ranks) for spec, ranks in zip(specs, levels, strict=True)]
        losses = [np.asarray(curve, np.float64)[ranks] for curve, ranks in zip(curves, levels, strict=True)]
        return cls(levels, costs, losses, budget)

    @cached_property
    def lowest(self) -> list[NDArray[np.float64]]:
        """Least loss at each level or a cheaper one, ``(L_j,)``."""
        return [np.minimum.accumulate(values) for values in self.losses]

    def loss(self, plan: Sequence[int]) -> float:
        """Sum of the losses of a plan."""
        return float(sum(values[at] for values, at in zip(self.losses, plan, strict=True)))

    def left(self, plan: Sequence[int]) -> int:
        """Parameters that a plan leaves of the budget."""
        return self.budget - sum(int(values[at]) for values, at in zip(self.costs, plan, strict=True))

    def ranks(self, plan: Sequence[int]) -> list[int]:
        """Ranks of a plan."""
        return [int(values[at]) for values, at in zip(self.levels, plan, strict=True)]

    def plan(self, ranks: Sequence[int]) -> list[int]:
        """Positions of given ranks, which must be levels."""
        return [int(np.searchsorted(values, rank)) for values, rank in zip(self.levels, ranks, strict=True)]


def lagrangian(problem: Problem) -> tuple[list[int], float]:
    """The plan of the best multiplier within the budget, and a lower bound on the loss of any plan.

    For a multiplier λ each matrix takes its level of least ``loss + λ cost``. As λ falls, a matrix walks along the
    vertices of its lower convex hull and passes the next one where λ equals the slope to it. All slopes sorted are all
    values of λ at which anything changes, so the λ of the budget is found exactly by bisection on the running cost. The
    bound adds the share of the next segment that the rest of the budget would pay for: the optimum of the linear
    relaxation.
    """
    vertices = [lower_hull(cost, loss) for cost, loss in zip(problem.costs, problem.losses, strict=True)]
    slopes, prices = [], []
    for index, corner in enumerate(vertices):
        price = np.diff(problem.costs[index][corner])
        slope = -np.diff(problem.losses[index][corner]) / price
        slopes.append(slope[slope > 0])  # slopes fall along a hull: the first ones
        prices.append(price[slope > 0])
    left = problem.left([0] * len(vertices))
    # Rounding may let equal slopes rise by a bit; the order within a matrix has to hold.
    slopes = [np.minimum.accumulate(values) for values in slopes]
    taken, paid = longest_prefix(slopes, prices, left)
    plan = [int(corner[count]) for corner, count in zip(vertices, taken, strict=True)]
    rest = left - paid
    ahead = [float(slope[count]) for slope, count in zip(slopes, taken, strict=True) if count < len(slope)]
    bound = problem.loss(plan) - max(ahead, default=0.0) * rest
    return plan, bound


def improve(problem: Problem, plan: Sequence[int], bound: float = -np.inf, *, rounds: int = 100) -> list[int]:
    """Fill, then exchange between pairs of matrices while that lowers the loss.

    Args:
        problem: Curves and budget.
        plan: Within the budget.
        bound: A lower bound on the loss; within 1e-6 of it (relative) nothing is exchanged any more.
        rounds: Most exchanges.
    """
    plan = fill(problem, plan)
    for _ in range(rounds):
        loss = problem.loss(plan)
        if loss - bound <= 1e-6 * abs(bound):
            break
        exchanged = _exchange(problem, plan)
        if exchanged is None:
            break
        plan = fill(problem, exchanged)
    return plan


def fill(problem: Problem, plan: Sequence[int]) -> list[int]:
    """Spend the rest of the budget, always on the move of largest gain per parameter that it pays for.

    A move may pass several levels at once, as needed where a curve falls only after a flat part or at the dense form.
    Moves without a gain are not made.
    """
    plan, left = list(plan), problem.left(plan)
    heap = [(-np.inf, index) for index in range(len(plan))]
    while heap:
        known, index = heapq.heappop(heap)
        gain, to = _best_move(problem.costs[index], problem.losses[index], plan[index], left)
        if to is None:
            continue  # less is left later on: it stays out
        # What was known may have become too dear since; then the matrix queues again with what it can do now.
        if heap and gain < -heap[0][0] and -known != gain:
            heapq.heappush(heap, (-gain, index))
            continue
        left -= int(problem.costs[index][to] - problem.costs[index][plan[index]])
        plan[index] = to
        heapq.heappush(heap, (-np.inf, index))
    return plan


def _best_move(cost: NDArray[np.int64], loss: NDArray[np.float64], at: int, left: int) -> tuple[float, int | None]:
    """Largest gain per parameter of one matrix with ``left`` to spend, and the level that it leads to, if any."""
    end = int(np.searchsorted(cost, cost[at] + left, side="right"))
    if end <= at + 1:
        return 0.0, None
    gain = (loss[at] - loss[at + 1 : end]) / (cost[at + 1 : end] - cost[at])
    best = int(np.argmax(gain))
    return (float(gain[best]), at + 1 + best) if gain[best] > 0 else (0.0, None)


def _lower_levels(at: int) -> NDArray[np.int64]:
    """``at - 1, at - 2, at - 4, ...`` and 0, none where ``at`` is 0."""
    return (
        np.unique(np.append(at - 2 ** np.arange(at.bit_length(), dtype=np.int64), 0)) if at else np.zeros(0, np.int64)
    )


def _exchange(problem: Problem, plan: Sequence[int]) -> list[int] | None:
    """The pair of moves, one matrix down and another one up, that lowers the loss most; None where none does.

    Down by 1, 2, 4, ... levels or to the first; up as far as what is freed pays for.
    """
    left, loss = problem.left(plan), problem.loss(plan)
    downs = [_lower_levels(at) for at in plan]
    giver = np.repeat(np.arange(len(plan)), [len(to) for to in downs])
    if not len(giver):
        return None
    at_of = list(zip(problem.costs, problem.losses, plan, downs, strict=True))
    freed = np.concatenate([cost[at] - cost[to] for cost, _, at, to in at_of])
    risen = np.concatenate([values[to] - values[at] for _, values, at, to in at_of])
    sizes, which = np.unique(freed, return_inverse=True)
    best, found = 1e-12 * abs(loss), None
    for index, at in enumerate(plan):
        cost, values = problem.costs[index], problem.losses[index]
        reach = np.searchsorted(cost, cost[at] + left + sizes, side="right") - 1
        net = (values[at] - problem.lowest[index][reach])[which] - risen
        net[giver == index] = -np.inf
        move = int(np.argmax(net))
        if net[move] > best:
            best, found = float(net[move]), (move, index, int(np.argmin(values[: reach[which[move]] + 1])))
    if found is None:
        return None
    move, taker, up = found
    exchanged = list(plan)
    exchanged[giver[move]], exchanged[taker] = int(np.concatenate(downs)[move]), up
    return exchanged
