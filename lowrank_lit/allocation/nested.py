"""One order of all components for all budgets: every smaller model is a prefix of the larger one.

A factored matrix can be cut to any smaller rank by dropping the last columns and rows of its factors. If the components
of all matrices are written in one order, a reader that stops after any number of them has a valid model, and one file
serves every budget.

The rule for the dense form: a nested matrix is stored as two factors at every budget, at ranks below the break-even
only, and never dense, since a dense matrix cannot be cut on reading. A matrix whose floor is at or above the break-even
is dense at every budget; give such a floor to matrices that should stay dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec, budget_of, step_priorities
from lowrank_lit.errors import LowRankError


def component_order(
    specs: Sequence[MatrixSpec], scores: Sequence[NDArray[np.float64]], *, per_parameter: bool = False
) -> list[tuple[int, int]]:
    """All components beyond the floors as (matrix, component), the first to be kept first.

    The components of a matrix come in their own order and in whole quanta.

    Args:
        specs: The matrices, all with factored storage.
        scores: Of each matrix's components, ``(p,)``, such as UniRank's. For a curve of losses by rank, ``(p + 1,)``,
            give what each component saves, ``-np.diff(curve)``, and set ``per_parameter``.
        per_parameter: Order by score per parameter, along the curve's convex hull, instead of by score.

    Raises:
        LowRankError: If a matrix has another storage than factored, or a score per component is missing.
    """
    urgency, starts = [], []
    for spec, values in zip(specs, scores, strict=True):
        if np.shape(values) != (spec.full_rank,):
            raise LowRankError(
                f"scores of matrix '{spec.name}' have shape {np.shape(values)}; give one per component, "
                f"({spec.full_rank},)"
            )
        levels = _factored_levels(spec)
        urgency.append(step_priorities(spec, np.asarray(values, dtype=np.float64), levels, per_parameter=per_parameter))
        starts.append(levels[:-1])
    owner = np.repeat(np.arange(len(specs)), [len(values) for values in starts])
    order = np.argsort(-np.concatenate(urgency), kind="stable") if specs else np.zeros(0, np.int64)
    start = np.concatenate(starts) if specs else np.zeros(0, np.int64)
    return [
        (matrix, component)
        for matrix, first in zip(owner[order].tolist(), start[order].tolist(), strict=True)
        for component in range(first, first + specs[matrix].quantum)
    ]


def ranks_for_budget(order: Sequence[tuple[int, int]], specs: Sequence[MatrixSpec], keep_ratio: float) -> list[int]:
    """Ranks of the longest prefix of the order, in whole quanta, that fits the budget.

    They never fall when the budget rises. What the prefix leaves is not spent; a budget beyond the whole order gives
    the whole order.

    Args:
        order: Of :func:`component_order`.
        specs: The matrices that it was made for.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
        LowRankError: If the order does not fit the matrices.
    """
    budget = budget_of(specs, keep_ratio)
    levels = [_factored_levels(spec) for spec in specs]
    pairs = np.asarray(order, dtype=np.int64).reshape(-1, 2)
    matrix, component = pairs[:, 0], pairs[:, 1]
    ranks = np.array([int(values[0]) for values in levels], dtype=np.int64)
    last = np.array([int(values[-1]) for values in levels], dtype=np.int64)
    _check_order(specs, matrix, component, ranks, last)
    quantum = np.array([spec.quantum for spec in specs], dtype=np.int64)
    price = np.array([spec.rows + spec.columns for spec in specs], dtype=np.int64)
    left = budget - sum(spec.cost(int(rank)) for spec, rank in zip(specs, ranks, strict=True))
    paid = np.cumsum(price[matrix])
    whole = (component + 1) % quantum[matrix] == 0
    ends = np.flatnonzero(whole & (paid <= left))
    length = int(ends[-1]) + 1 if len(ends) else 0
    ranks += np.bincount(matrix[:length], minlength=len(specs))
    return [int(rank) for rank in ranks]


def _factored_levels(spec: MatrixSpec) -> NDArray[np.int64]:
    """Levels without the dense form, or the dense form alone where the floor demands it."""
    if spec.storage != "factored":
        raise LowRankError(
            f"storage='{spec.storage}' of matrix '{spec.name}' cannot be cut on reading; nested plans need 'factored'"
        )
    levels = spec.levels()
    return levels if len(levels) == 1 else levels[:-1]


def _check_order(
    specs: Sequence[MatrixSpec],
    matrix: NDArray[np.int64],
    component: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
) -> None:
    """Each matrix's components must follow its floor one by one, in whole quanta and below the break-even."""
    if len(matrix) and not (matrix.min() >= 0 and matrix.max() < len(specs)):
        raise LowRankError(f"the order names a matrix outside 0..{len(specs) - 1}; make it from the same matrices")
    by_matrix = np.argsort(matrix, kind="stable")
    count = np.bincount(matrix, minlength=len(specs))
    before = np.cumsum(count) - count
    expected = np.arange(len(matrix)) - np.repeat(before, count) + np.repeat(first, count)
    quantum = np.array([spec.quantum for spec in specs], dtype=np.int64)
    inside = (component + 1) % quantum[matrix] != 0
    together = len(matrix) == 0 or not (inside[-1] or (inside[:-1] & (matrix[1:] != matrix[:-1])).any())
    if not (together and np.array_equal(component[by_matrix], expected) and bool(np.all(first + count <= last))):
        raise LowRankError(
            "the order of components does not fit the matrices' floors, quanta and shapes; make it from these matrices"
        )
