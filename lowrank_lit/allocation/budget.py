"""What a rank costs, and the one way in which all allocators spend a budget.

A matrix of ``rows x columns`` kept at rank ``k`` as two factors stores ``k (rows + columns)`` numbers. From the
break-even rank on, where that is no less than ``rows * columns``, the matrix is kept dense and charged exactly that, so
a component's price depends on its place in its matrix alone: ``rows + columns`` up to the break-even, the remainder at
it, nothing beyond.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.errors import BudgetError


@dataclass(frozen=True)
class MatrixSpec:
    """Shape of one target matrix and the least rank that it may get.

    Attributes:
        name: Of the layer.
        rows: Outputs.
        columns: Inputs.
        floor: Least rank, at least 1; a floor at or above the break-even keeps the matrix dense.
    """

    name: str
    rows: int
    columns: int
    floor: int = 1

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense matrix."""
        return self.rows * self.columns

    @property
    def break_even(self) -> int:
        """Least rank at which two factors store no less than the dense matrix."""
        return -(-self.dense_cost // (self.rows + self.columns))

    def cost(self, rank: int) -> int:
        """Parameters stored at ``rank``, with the dense form from the break-even on."""
        return min(rank * (self.rows + self.columns), self.dense_cost)

    def step_costs(self) -> NDArray[np.int64]:
        """Price of each further component, ``(min(rows, columns),)``: the differences of :meth:`cost`."""
        ranks = np.arange(min(self.rows, self.columns) + 1, dtype=np.int64)
        return np.diff(np.minimum(ranks * (self.rows + self.columns), self.dense_cost))


def check_keep_ratio(keep_ratio: float) -> None:
    """Check that ``keep_ratio`` is in (0, 1].

    Raises:
        BudgetError: If it is not.
    """
    if not (math.isfinite(keep_ratio) and 0 < keep_ratio <= 1):
        raise BudgetError(
            f"keep_ratio={keep_ratio} is outside (0, 1]; it is the share of the target matrices' parameters to keep, "
            "such as 0.6"
        )


def spend(specs: Sequence[MatrixSpec], scores: Sequence[NDArray[np.float64]], keep_ratio: float) -> list[int]:
    """Ranks that keep the components of highest score within the budget.

    All components beyond the floors are sorted once; the cut is the longest prefix of that order whose price fits,
    found by bisection on the running sum of prices. Then single components are added in the order of their score
    wherever the rest of the budget still pays for a matrix's next one, so that less is left than the cheapest component
    that could be added.

    Args:
        specs: The matrices.
        scores: Of each matrix's components, ``(min(rows, columns),)``, in the order in which they would be kept. A
            component never counts for more than the one before it.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].

    Returns:
        A rank per matrix; one at or above the break-even means dense.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors alone cost more than the budget.
    """
    check_keep_ratio(keep_ratio)
    budget = math.floor(keep_ratio * sum(spec.dense_cost for spec in specs) + 1e-9)
    ranks = [min(spec.floor, spec.rows, spec.columns) for spec in specs]
    left = budget - sum(spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True))
    if left < 0:
        raise BudgetError(
            f"keep_ratio={keep_ratio} allows {budget} parameters, but the rank floor (min_rank) alone needs "
            f"{budget - left}; raise keep_ratio or lower min_rank"
        )
    monotone = [np.minimum.accumulate(np.asarray(values, dtype=np.float64)) for values in scores]
    taken, paid = _longest_prefix(specs, monotone, ranks, left)
    ranks = [rank + count for rank, count in zip(ranks, taken, strict=True)]
    return _fill(specs, monotone, ranks, left - paid)


def _longest_prefix(
    specs: Sequence[MatrixSpec], scores: Sequence[NDArray[np.float64]], ranks: Sequence[int], budget: int
) -> tuple[list[int], int]:
    """Components taken of each matrix by the longest affordable prefix of the global order, and what they cost."""
    flat = np.concatenate([values[rank:] for values, rank in zip(scores, ranks, strict=True)])
    prices = np.concatenate([spec.step_costs()[rank:] for spec, rank in zip(specs, ranks, strict=True)])
    owner = np.repeat(np.arange(len(specs)), [len(values) - rank for values, rank in zip(scores, ranks, strict=True)])
    # A stable sort keeps a matrix's components in their own order among equal scores.
    order = np.argsort(-flat, kind="stable")
    paid = np.cumsum(prices[order])
    length = int(np.searchsorted(paid, budget, side="right"))
    taken = np.bincount(owner[order[:length]], minlength=len(specs))
    return [int(count) for count in taken], int(paid[length - 1]) if length else 0


def _fill(specs: Sequence[MatrixSpec], scores: Sequence[NDArray[np.float64]], ranks: list[int], left: int) -> list[int]:
    """Add single components by score while the budget pays for one; a matrix whose next one is too dear is out for
    good."""
    prices = [spec.step_costs() for spec in specs]
    ranks = list(ranks)
    heap = [
        (-values[rank], index)
        for index, (values, rank) in enumerate(zip(scores, ranks, strict=True))
        if rank < len(values)
    ]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        price = int(prices[index][ranks[index]])
        if price <= left:
            ranks[index] += 1
            left -= price
            if ranks[index] < len(scores[index]):
                heapq.heappush(heap, (-scores[index][ranks[index]], index))
    return ranks
