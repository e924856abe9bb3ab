"""ZS-SVD: components are removed so that their first-order changes of the loss add up to about zero.

Every component has a signed prediction of what its removal does to the loss. Inside a matrix only the component of
smallest singular value may go. While the running sum is zero or below, the candidate of smallest change among those
that raise the loss goes next, otherwise the one of smallest size among those that lower it; where one side is empty,
the other serves. Removing components saves parameters only below the break-even; matrices that end above it stay dense.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from lowrank_lit.allocation.budget import budget_of
from lowrank_lit.allocation.profile import MatrixProfile
from lowrank_lit.errors import LowRankError


def zero_sum_ranks(profiles: Sequence[MatrixProfile], keep_ratio: float) -> list[int]:
    """Ranks by removal with a running sum near zero.

    A quantum above 1 removes that many components at a time, judged by the sum of their changes. What the last removals
    save beyond the need is given back in reverse order where it fits.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
        LowRankError: If a profile has no ``first_order``.
    """
    specs = [profile.spec for profile in profiles]
    budget = budget_of(specs, keep_ratio)
    stops, changes, savings = _removals(profiles)
    excess = sum(spec.dense_cost for spec in specs) - budget
    done = [0] * len(specs)  # removals of each matrix
    raising: list[tuple[float, int]] = []  # the next removal of each matrix, by the sign of its change
    lowering: list[tuple[float, int]] = []
    for index, pending in enumerate(changes):
        if pending:
            (lowering if pending[0] < 0 else raising).append((abs(pending[0]), index))
    heapq.heapify(raising)
    heapq.heapify(lowering)
    log: list[int] = []
    total = 0.0
    while excess > 0:
        _, index = heapq.heappop(lowering if lowering and (total > 0 or not raising) else raising)
        pending, at = changes[index], done[index]
        total += pending[at]
        excess -= savings[index][at]
        log.append(index)
        done[index] = at = at + 1
        if at < len(pending):
            heapq.heappush(lowering if pending[at] < 0 else raising, (abs(pending[at]), index))
    blocked: set[int] = set()
    for index in reversed(log):
        saved = savings[index][done[index] - 1]
        if index not in blocked and saved <= -excess:
            done[index] -= 1
            excess += saved
        else:
            blocked.add(index)
            if len(blocked) == len(specs):
                break
    return [spec.dense_or(stop[count]) for spec, stop, count in zip(specs, stops, done, strict=True)]


def _removals(profiles: Sequence[MatrixProfile]) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
    """Per matrix: the ranks that removal passes from full to floor, and the change and the saving of each removal."""
    stops, changes, savings = [], [], []
    for profile in profiles:
        if profile.first_order is None:
            raise LowRankError(
                f"matrix '{profile.spec.name}' has no first-order changes; set first_order of its profile, "
                "one per component"
            )
        spec = profile.spec
        least = int(spec.levels()[0])
        if least >= spec.break_even:
            ranks = np.array([spec.full_rank])
        else:
            ranks = np.append(np.arange(least, spec.full_rank, spec.quantum), spec.full_rank)
        sums = np.add.reduceat(np.asarray(profile.first_order, np.float64), ranks[:-1]) if len(ranks) > 1 else ranks[:0]
        stops.append(ranks[::-1].tolist())
        changes.append([float(value) for value in sums[::-1]])
        savings.append(np.diff(spec.costs(ranks))[::-1].tolist())
    return stops, changes, savings
