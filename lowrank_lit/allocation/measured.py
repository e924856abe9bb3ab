"""Ranks from one measurement per matrix, extended by its spectrum, and an exact knapsack (as LEMS does).

The KL divergence of the model's output was measured with each matrix alone cut to one rank. At other ranks it is taken
to follow the energy left out, ``loss(k) = KL * tail(k) / tail(k_probe)``, and it is weighted by depth, from 6 in the
first block linearly to 1 in the last, since early errors grow on their way. The sum over the matrices is minimised by
dynamic programming over the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import budget_of
from lowrank_lit.allocation.curves import Problem, fill, improve, lagrangian
from lowrank_lit.allocation.multiple_choice import multiple_choice
from lowrank_lit.allocation.profile import MatrixProfile
from lowrank_lit.errors import LowRankError

_FIRST_BLOCK, _LAST_BLOCK = 6.0, 1.0


def measured_ranks(profiles: Sequence[MatrixProfile], keep_ratio: float, *, grid: int = 8) -> list[int]:
    """Ranks of least measured and extrapolated loss.

    Args:
        profiles: Their ``probe`` and ``block`` are used; a matrix without a block has weight 1.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].
        grid: Ranks that the dynamic program tries are the floor, multiples of this, and dense, all of them levels. What
            it leaves of the budget is spent, and exchanged between pairs, on all levels.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
        LowRankError: If a profile has no probe, or one at a rank that leaves out no energy.
    """
    if grid < 1:
        raise LowRankError(f"grid={grid} must be at least 1; it is the distance of the ranks to try, such as 8")
    specs = [profile.spec for profile in profiles]
    problem = Problem.of(specs, measured_curves(profiles), budget_of(specs, keep_ratio))
    tried = []
    for levels in problem.levels:
        chosen = levels % grid == 0
        chosen[[0, -1]] = True
        tried.append(np.flatnonzero(chosen))
    picked = multiple_choice(
        [cost[at] for cost, at in zip(problem.costs, tried, strict=True)],
        [loss[at] for loss, at in zip(problem.losses, tried, strict=True)],
        problem.budget,
    )
    plan = [int(at[choice]) for at, choice in zip(tried, picked, strict=True)]
    # In a large model, rounding to units can cost the program more than the multiplier gives away by its last segment.
    relaxed, bound = lagrangian(problem)
    start = min((fill(problem, plan), fill(problem, relaxed)), key=problem.loss)
    return problem.ranks(improve(problem, start, bound))


def measured_curves(profiles: Sequence[MatrixProfile]) -> list[NDArray[np.float64]]:
    """Weighted loss by rank of each matrix, ``(p + 1,)``; nothing at full rank.

    Raises:
        LowRankError: If a profile has no probe, or one at a rank that leaves out no energy.
    """
    blocks = [profile.block for profile in profiles if profile.block is not None]
    first, last = min(blocks, default=0), max(blocks, default=0)
    curves = []
    for profile in profiles:
        name = profile.spec.name
        if len(profile.spec.levels()) == 1:  # no rank to choose, so none that could have been probed
            curves.append(np.zeros_like(profile.tail_energy))
            continue
        if profile.probe is None:
            raise LowRankError(f"matrix '{name}' has no probe; set probe of its profile (rank and measured KL)")
        rank, divergence = profile.probe
        tail = profile.tail_energy
        if not (0 <= rank < len(tail) and (tail[rank] > 0 or tail[0] == 0)):
            raise LowRankError(f"probe of matrix '{name}' at rank {rank} leaves out no energy; probe at a lower rank")
        depth = 1.0
        if profile.block is not None and last > first:
            depth = _FIRST_BLOCK + (_LAST_BLOCK - _FIRST_BLOCK) * (profile.block - first) / (last - first)
        curves.append(max(divergence, 0.0) * depth * (tail / tail[rank] if tail[0] > 0 else tail))
    return curves
