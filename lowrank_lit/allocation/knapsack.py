"""Ranks that lose the fewest predicted nats: a multiple-choice knapsack over curves of loss against rank.

Each matrix brings the loss that it is predicted to cause at every rank, in nats per token, the same unit for all: for
spectra in the two-sided metric that is ``1/2 sum_{i>k} sigma_i^2`` (the second-order change of the cross entropy under
a Kronecker Fisher), for probed models whatever was measured. The plan minimises the sum of the curves under the budget,
with the dense form as one more choice at its own cost and loss.

For a multiplier λ, ``min_k nats[k] + λ cost(k)`` separates over the matrices. The λ of the budget gives the optimum of
the linear relaxation but for one segment of one curve's convex hull; the rest of the budget is then spent by gain per
parameter and pairs of matrices exchange ranks while that helps. A few matrices with large steps (small models, the jump
to dense) may still be far from the bound; dynamic programming then decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import budget_of
from lowrank_lit.allocation.curves import Problem, improve, lagrangian
from lowrank_lit.allocation.multiple_choice import multiple_choice
from lowrank_lit.allocation.profile import MatrixProfile
from lowrank_lit.allocation.uniform import uniform_ranks
from lowrank_lit.errors import LowRankError

_GAP = 1e-3  # relative gap to the bound above which dynamic programming is worth its seconds


def knapsack_ranks(profiles: Sequence[MatrixProfile], keep_ratio: float) -> list[int]:
    """Ranks of least summed ``nats`` within the budget.

    The loss is within 0.1 % of the best possible, or what dynamic programming found: the best possible where the budget
    has at most 10,000 units of the costs' greatest common divisor. In every case it exceeds the best by at most the
    gain of one hull segment (one component, where the curves are convex and the quantum is 1) and never exceeds the
    uniform plan's. Parameters that no curve has a use for are not spent.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
        LowRankError: If a profile has no ``nats``.
    """
    problem = _problem(profiles, keep_ratio)
    start, bound = lagrangian(problem)
    plan = improve(problem, start, bound)
    others = [problem.plan(uniform_ranks([profile.spec for profile in profiles], keep_ratio))]
    if problem.loss(plan) - bound > _GAP * abs(bound):
        others.append(multiple_choice(problem.costs, problem.losses, problem.budget))
    for other in others:
        if problem.loss(other) < problem.loss(plan):
            plan = improve(problem, other, bound)
    return problem.ranks(plan)


def lower_bound(profiles: Sequence[MatrixProfile], keep_ratio: float) -> float:
    """Summed ``nats`` below which no plan of this budget can fall: the optimum of the linear relaxation.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
        LowRankError: If a profile has no ``nats``.
    """
    return lagrangian(_problem(profiles, keep_ratio))[1]


def predicted_loss(profiles: Sequence[MatrixProfile], ranks: Sequence[int]) -> float:
    """Sum of ``nats`` at the given ranks, in nats per token; a rank from the break-even on counts as dense.

    Raises:
        LowRankError: If a profile has no ``nats``.
    """
    return float(
        sum(
            curve[profile.spec.dense_or(rank)]
            for profile, curve, rank in zip(profiles, _curves(profiles), ranks, strict=True)
        )
    )


def _problem(profiles: Sequence[MatrixProfile], keep_ratio: float) -> Problem:
    specs = [profile.spec for profile in profiles]
    return Problem.of(specs, _curves(profiles), budget_of(specs, keep_ratio))


def _curves(profiles: Sequence[MatrixProfile]) -> list[NDArray[np.float64]]:
    curves = []
    for profile in profiles:
        if profile.nats is None:
            raise LowRankError(
                f"matrix '{profile.spec.name}' has no predicted loss; set nats of its profile (the loss at ranks 0..p)"
            )
        curves.append(profile.nats)
    return curves
