"""What a rank costs, and how scores spend a budget.

A matrix of ``rows x columns`` may be stored in three forms:

* ``factored``, two factors: ``k (rows + columns)`` numbers at rank ``k``;
* ``pivot``, ``k`` rows of the matrix and the coefficients of the others in them: ``k (rows + columns - k)`` numbers, so
  each further component is cheaper than the one before, ``rows + columns - 2k - 1`` after rank ``k``;
* dense: ``rows * columns``, charged from the break-even rank on, where the form above stores no less.

The ranks that a plan may contain are a matrix's *levels*: the multiples of its quantum from the floor (rounded up to
one) to below the break-even, and the full rank, which stands for the dense form. Every allocator chooses one level per
matrix; the costs of the levels rise strictly.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.hull import lower_hull
from lowrank_lit.errors import BudgetError, LowRankError

Storage = Literal["factored", "pivot"]


@dataclass(frozen=True)
class MatrixSpec:
    """Shape of one target matrix, how it will be stored and the least rank that it may get.

    Attributes:
        name: Of the layer.
        rows: Outputs m.
        columns: Inputs n.
        floor: Least rank, at least 1; rounded up to a multiple of the quantum. At or above the break-even it keeps the
            matrix dense.
        storage: Form below the break-even: ``factored`` or ``pivot``.
        quantum: Ranks below the break-even are multiples of it.

    Raises:
        LowRankError: If a number is below 1 or the storage is unknown.
    """

    name: str
    rows: int
    columns: int
    floor: int = 1
    storage: Storage = "factored"
    quantum: int = 1

    def __post_init__(self) -> None:
        for field in ("rows", "columns", "floor", "quantum"):
            if getattr(self, field) < 1:
                raise LowRankError(f"{field}={getattr(self, field)} of matrix '{self.name}' must be at least 1")
        if self.storage not in get_args(Storage):
            raise LowRankError(
                f"storage='{self.storage}' of matrix '{self.name}' is unknown; choose one of "
                f"{', '.join(get_args(Storage))}"
            )

    @property
    def full_rank(self) -> int:
        """``min(rows, columns)``, the rank that stands for the dense form."""
        return min(self.rows, self.columns)

    @property
    def dense_cost(self) -> int:
        """Parameters of the dense matrix."""
        return self.rows * self.columns

    @property
    def break_even(self) -> int:
        """Least rank at which the storage takes no fewer numbers than the dense matrix; ranks from here on mean dense.

        ``ceil(rows columns / (rows + columns))`` for two factors, ``min(rows, columns)`` for the pivot form.
        """
        if self.storage == "pivot":
            return self.full_rank
        return -(-self.dense_cost // (self.rows + self.columns))

    def cost(self, rank: int) -> int:
        """Parameters stored at ``rank``, with the dense form from the break-even on."""
        if rank >= self.break_even:
            return self.dense_cost
        return rank * (self.rows + self.columns - (rank if self.storage == "pivot" else 0))

    def costs(self, ranks: NDArray[np.int64]) -> NDArray[np.int64]:
        """:meth:`cost` of an array of ranks."""
        pair = self.rows + self.columns - (ranks if self.storage == "pivot" else 0)
        return np.where(ranks >= self.break_even, self.dense_cost, ranks * pair)

    def levels(self) -> NDArray[np.int64]:
        """All ranks that a plan may give the matrix, smallest first; the last is the full rank (dense)."""
        least = -(-self.floor // self.quantum) * self.quantum
        below = np.arange(least, self.break_even, self.quantum, dtype=np.int64)
        return np.append(below, np.int64(self.full_rank))

    def dense_or(self, rank: int) -> int:
        """``rank``, or the full rank where ``rank`` reaches the break-even: how a plan writes the dense form."""
        return self.full_rank if rank >= self.break_even else rank


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


def budget_of(specs: Sequence[MatrixSpec], keep_ratio: float) -> int:
    """Parameters that ``keep_ratio`` allows, after checking that the floors fit.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors alone cost more than the budget.
    """
    check_keep_ratio(keep_ratio)
    dense = sum(spec.dense_cost for spec in specs)
    budget = math.floor(keep_ratio * dense + 1e-9)
    least = sum(spec.cost(int(spec.levels()[0])) for spec in specs)
    if least > budget:
        wish = "lower min_rank" if all(spec.quantum == 1 for spec in specs) else "lower min_rank or the quantum"
        raise BudgetError(
            f"keep_ratio={keep_ratio} allows {budget} parameters, but the rank floor (min_rank) alone needs {least}; "
            f"raise keep_ratio to at least {math.ceil(least / dense * 1e4) / 1e4:g} or {wish}"
        )
    return budget


def step_priorities(
    spec: MatrixSpec, scores: NDArray[np.float64], levels: NDArray[np.int64], *, per_parameter: bool = False
) -> NDArray[np.float64]:
    """How urgent each step from one level of a matrix to the next is, ``(levels - 1,)``, never rising.

    Args:
        spec: The matrix.
        scores: Of its components, ``(min(rows, columns),)``, in the order in which they would be kept.
        levels: Of :meth:`MatrixSpec.levels`, all or without the last.
        per_parameter: False: a step counts for the mean score of the components that it pays for, and a component never
            for more than the one before it. True: a step counts for its score per parameter, and the dense step brings
            the components beyond the break-even as well. Prices differ between steps (the last one before dense, all of
            the pivot form), so the quotient may rise; steps are then pooled, as on the convex hull of score left out
            against cost: a later step with a better quotient lifts the steps that lead to it.
    """
    if len(levels) == 1:
        return np.zeros(0)
    if not per_parameter:
        ends = np.minimum(levels[1:], spec.break_even)
        paid = np.minimum.accumulate(scores)[: ends[-1]]
        means: NDArray[np.float64] = np.add.reduceat(paid, levels[:-1]) / (ends - levels[:-1])
        return means
    gains = np.add.reduceat(scores[: levels[-1]], levels[:-1])
    left_out = np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    costs = spec.costs(levels)
    vertices = lower_hull(costs, left_out)
    slopes = -np.diff(left_out[vertices]) / np.diff(costs[vertices])
    # Rounding may let equal slopes rise by a bit.
    return np.minimum.accumulate(np.repeat(slopes, np.diff(vertices)))


def spend(
    specs: Sequence[MatrixSpec],
    scores: Sequence[NDArray[np.float64]],
    keep_ratio: float,
    *,
    per_parameter: bool = False,
) -> list[int]:
    """Ranks that keep the components of highest score within the budget.

    The steps between levels are sorted once over all matrices; the cut is the longest prefix of that order whose price
    fits, found by bisection on the running sum of prices. Then single steps are added in the same order wherever the
    rest of the budget still pays for a matrix's next one; less is then left than the cheapest step that could follow.

    Args:
        specs: The matrices.
        scores: Of each matrix's components, ``(min(rows, columns),)``, in the order in which they would be kept.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].
        per_parameter: Sort by score per parameter; see :func:`step_priorities`.

    Returns:
        A rank per matrix; the full rank stands for dense.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors alone cost more than the budget.
    """
    budget = budget_of(specs, keep_ratio)
    levels = [spec.levels() for spec in specs]
    costs = [spec.costs(ranks) for spec, ranks in zip(specs, levels, strict=True)]
    urgency = [
        step_priorities(spec, np.asarray(values, dtype=np.float64), ranks, per_parameter=per_parameter)
        for spec, values, ranks in zip(specs, scores, levels, strict=True)
    ]
    prices = [np.diff(values) for values in costs]
    left = budget - sum(int(values[0]) for values in costs)
    taken, paid = longest_prefix(urgency, prices, left)
    taken = _fill(urgency, prices, taken, left - paid)
    return [int(ranks[count]) for ranks, count in zip(levels, taken, strict=True)]


def spend_towards(specs: Sequence[MatrixSpec], targets: NDArray[np.float64], keep_ratio: float) -> list[int]:
    """Ranks whose costs come as close as the budget allows to a wished number of parameters per matrix.

    All matrices are filled at the same pace, each relative to its own target: the score of a component is minus the
    share of the target that the matrix has reached with it. Between floor and dense this is the common factor ``t`` of
    water-filling, ``cost_j = t * target_j``.

    Args:
        specs: The matrices.
        targets: Parameters wished for each, ``(len(specs),)``, not negative; their sum need not be the budget.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].

    Raises:
        BudgetError: As :func:`spend`.
    """
    scores = [
        -spec.costs(np.arange(1, spec.full_rank + 1, dtype=np.int64)) / max(float(target), 1.0)
        for spec, target in zip(specs, targets, strict=True)
    ]
    return spend(specs, scores, keep_ratio)


def longest_prefix(
    urgency: Sequence[NDArray[np.float64]], prices: Sequence[NDArray[np.int64]], budget: int
) -> tuple[list[int], int]:
    """Steps taken of each matrix by the longest affordable prefix of the common order, and what they cost.

    The urgency of a matrix's steps must not rise; equals keep their order, matrix by matrix.
    """
    flat, price = np.concatenate(urgency), np.concatenate(prices)
    owner = np.repeat(np.arange(len(urgency)), [len(values) for values in urgency])
    order = np.argsort(-flat, kind="stable")
    paid = np.cumsum(price[order])
    length = int(np.searchsorted(paid, budget, side="right"))
    taken = np.bincount(owner[order[:length]], minlength=len(urgency))
    return [int(count) for count in taken], int(paid[length - 1]) if length else 0


def _fill(
    urgency: Sequence[NDArray[np.float64]], prices: Sequence[NDArray[np.int64]], taken: list[int], left: int
) -> list[int]:
    """Add single steps by urgency while the budget pays for one; a matrix whose next is too dear is out for good."""
    taken = list(taken)
    heap = [
        (-values[count], index)
        for index, (values, count) in enumerate(zip(urgency, taken, strict=True))
        if count < len(values)
    ]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        price = int(prices[index][taken[index]])
        if price <= left:
            taken[index] += 1
            left -= price
            if taken[index] < len(urgency[index]):
                heapq.heappush(heap, (-urgency[index][taken[index]], index))
    return taken
