"""ASVD's search on a table of measured losses (STRS, arXiv 2312.05821).

Every matrix was cut alone to a few keep ratios and the loss of the model measured. All (matrix, ratio, loss) are sorted
by loss; a cut keeps the entries up to some loss, each matrix takes its smallest ratio among them, and the shortest list
that meets the budget is found by bisection. A matrix without an entry in the list stays dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec, budget_of
from lowrank_lit.allocation.curves import Problem, fill
from lowrank_lit.allocation.profile import MatrixProfile
from lowrank_lit.errors import BudgetError, LowRankError

_Table = dict[float, float]


def sensitivity_ranks(profiles: Sequence[MatrixProfile], keep_ratio: float) -> list[int]:
    """Ranks from measured losses.

    A ratio means the largest level that costs no more than this share of the dense matrix. The rest of the budget is
    spent by gain per parameter along straight lines between the measured points; where a table has no entry for ratio
    1, dense counts as the smallest loss of all tables.

    Raises:
        BudgetError: If the ratio is outside (0, 1], the floors do not fit, or the tables' smallest ratios keep more
            than the budget.
        LowRankError: If a profile has no table, or one with a ratio outside (0, 1].
    """
    specs = [profile.spec for profile in profiles]
    budget = budget_of(specs, keep_ratio)
    tables = [_table(profile) for profile in profiles]
    best = min(min(table.values()) for table in tables)
    curves = [_curve(spec, table, best) for spec, table in zip(specs, tables, strict=True)]
    problem = Problem.of(specs, curves, budget)
    entries = sorted(
        (loss, index, _level(problem.costs[index], ratio * spec.dense_cost))
        for index, (spec, table) in enumerate(zip(specs, tables, strict=True))
        for ratio, loss in table.items()
    )
    owner = np.array([index for _, index, _ in entries])
    level = np.array([at for _, _, at in entries])

    def plan_of(length: int) -> list[int]:
        plan = np.array([len(values) - 1 for values in problem.levels])
        np.minimum.at(plan, owner[:length], level[:length])
        return [int(at) for at in plan]

    low, high = 0, len(entries)
    if problem.left(plan_of(high)) < 0:
        raise BudgetError(
            f"keep_ratio={keep_ratio} is below what the sensitivity tables reach: their smallest ratios keep "
            f"{budget - problem.left(plan_of(high))} parameters of {budget} allowed; measure lower keep ratios"
        )
    while low < high:  # a longer list never costs more
        middle = (low + high) // 2
        low, high = (low, middle) if problem.left(plan_of(middle)) >= 0 else (middle + 1, high)
    return problem.ranks(fill(problem, plan_of(low)))


def _table(profile: MatrixProfile) -> _Table:
    table = dict(profile.table or {})
    if not table:
        raise LowRankError(
            f"matrix '{profile.spec.name}' has no sensitivity table; set table of its profile (keep ratio to loss)"
        )
    for ratio in table:
        if not 0 < ratio <= 1:
            raise LowRankError(
                f"table of matrix '{profile.spec.name}' has a keep ratio of {ratio}; ratios are in (0, 1], such as 0.6"
            )
    return table


def _level(costs: NDArray[np.int64], parameters: float) -> int:
    return max(int(np.searchsorted(costs, parameters + 1e-6, side="right")) - 1, 0)


def _curve(spec: MatrixSpec, table: _Table, dense: float) -> NDArray[np.float64]:
    """Loss by rank, ``(p + 1,)``, on straight lines in the number of parameters between the measured points."""
    points = sorted({1.0: dense, **table}.items())
    ranks = np.arange(spec.full_rank + 1, dtype=np.int64)
    share = spec.costs(ranks) / spec.dense_cost
    return np.interp(share, [ratio for ratio, _ in points], [loss for _, loss in points])
