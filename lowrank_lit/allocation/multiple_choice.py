"""Exact multiple-choice knapsack by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def multiple_choice(
    costs: Sequence[NDArray[np.int64]],
    losses: Sequence[NDArray[np.float64]],
    budget: int,
    *,
    units: int = 10_000,
) -> list[int]:
    """One choice per matrix, of least summed loss within the budget, by dynamic programming over the budget.

    ``best_j(s) = min_o best_{j-1}(s - u_jo) + loss_jo`` over ``s`` units of parameters. Exact where the budget has at
    most ``units`` units of the costs' greatest common divisor; else a unit is larger and costs beyond a matrix's first
    choice are rounded up to whole units, so that the budget holds. Time ``O(units * choices)``,
    memory ``O(units * matrices)``.

    Args:
        costs: Of each matrix's choices, strictly rising, ``(choices_j,)``; the first ones fit the budget.
        losses: Of the same, ``(choices_j,)``.
        budget: Parameters in all.
        units: Most units of the budget.

    Returns:
        The index of the choice of each matrix.
    """
    extra = [cost - cost[0] for cost in costs]
    left = budget - sum(int(cost[0]) for cost in costs)
    divisor = max(math.gcd(*(int(value) for cost in extra for value in cost)), 1)
    unit = divisor * max(-(-left // (divisor * units)), 1)
    capacity = left // unit
    best = [np.zeros(capacity + 1)]
    choices = [_undominated(-(-cost // unit), loss, capacity) for cost, loss in zip(extra, losses, strict=True)]
    for loss, (tried, sizes) in zip(losses, choices, strict=True):
        before, total = best[-1], np.full(capacity + 1, np.inf)
        for value, size in zip(loss[tried].tolist(), sizes.tolist(), strict=True):
            np.minimum(total[size:], before[: capacity + 1 - size] + value, out=total[size:])
        best.append(total)
    # Which choice was the least is found again on the way back, for the states passed alone.
    plan, state = [], capacity
    for before, loss, (tried, sizes) in zip(best[-2::-1], losses[::-1], choices[::-1], strict=True):
        within = sizes <= state
        at = int(np.argmin(before[state - sizes[within]] + loss[tried[within]]))
        plan.append(int(tried[at]))
        state -= int(sizes[at])
    return plan[::-1]


def _undominated(
    sizes: NDArray[np.int64], loss: NDArray[np.float64], capacity: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choices that fit and for which no other one of the same size or less loses as little, and their sizes."""
    order = np.lexsort((loss, sizes))
    order = order[sizes[order] <= capacity]
    before = np.append(np.inf, np.minimum.accumulate(loss[order])[:-1])
    kept = order[loss[order] < before]
    return kept, sizes[kept]
