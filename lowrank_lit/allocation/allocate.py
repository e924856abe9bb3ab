"""One entry to all allocators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_lit.allocation.effective_rank import effective_rank_ranks
from lowrank_lit.allocation.knapsack import knapsack_ranks
from lowrank_lit.allocation.measured import measured_ranks
from lowrank_lit.allocation.profile import MatrixProfile
from lowrank_lit.allocation.sensitivity import sensitivity_ranks
from lowrank_lit.allocation.svd_llm_v2 import svd_llm_v2_ranks
from lowrank_lit.allocation.uniform import uniform_ranks
from lowrank_lit.allocation.unirank import unirank_ranks
from lowrank_lit.allocation.zero_sum import zero_sum_ranks
from lowrank_lit.errors import LowRankError, NonFiniteError

NEEDS: dict[str, frozenset[str]] = {
    "uniform": frozenset(),
    "unirank": frozenset({"importance"}),
    "effective_rank": frozenset(),
    "svd_llm_v2": frozenset(),
    "sensitivity": frozenset({"table"}),
    "zero_sum": frozenset({"first_order"}),
    "measured": frozenset({"probe"}),
    "knapsack": frozenset({"nats"}),
}
"""By allocator: the fields of :class:`MatrixProfile` that it needs beyond the energies."""

ALLOCATORS = tuple(NEEDS)


def check_allocator(allocator: str) -> None:
    """Check that there is such an allocator.

    Raises:
        LowRankError: If not; it lists the choices.
    """
    if allocator not in NEEDS:
        raise LowRankError(f"allocator='{allocator}' is unknown; choose one of {', '.join(ALLOCATORS)}")


def allocate(
    profiles: Sequence[MatrixProfile],
    *,
    allocator: str,
    keep_ratio: float,
    cost_aware: bool = False,
    beta: float = 0.3,
    grid: int = 8,
) -> list[int]:
    """Rank of every matrix within the budget; the full rank ``min(rows, columns)`` stands for the dense form.

    Whatever the allocator, the parameters stored never exceed ``keep_ratio`` of the dense ones, no rank is below the
    floor, and ranks below the break-even are multiples of the quantum.

    Args:
        profiles: The matrices, with what the allocator needs; see :data:`NEEDS`.
        allocator: One of :data:`ALLOCATORS`.
        keep_ratio: Share of the matrices' parameters to keep, in (0, 1].
        cost_aware: ``unirank``: score per parameter instead of per component.
        beta: ``effective_rank``: share of Q and K that moves to V.
        grid: ``measured``: distance of the ranks that the dynamic program tries.

    Raises:
        BudgetError: If the budget cannot be met.
        LowRankError: If the allocator is unknown, or a profile lacks what it needs.
        NonFiniteError: If a profile holds a NaN or infinity.
    """
    check_allocator(allocator)
    if not profiles:
        raise LowRankError("there is no matrix to allocate ranks to; check targets")
    for profile in profiles:
        _check(profile)
    match allocator:
        case "unirank":
            return unirank_ranks(profiles, keep_ratio, cost_aware=cost_aware)
        case "effective_rank":
            return effective_rank_ranks(profiles, keep_ratio, beta=beta)
        case "svd_llm_v2":
            return svd_llm_v2_ranks(profiles, keep_ratio)
        case "sensitivity":
            return sensitivity_ranks(profiles, keep_ratio)
        case "zero_sum":
            return zero_sum_ranks(profiles, keep_ratio)
        case "measured":
            return measured_ranks(profiles, keep_ratio, grid=grid)
        case "knapsack":
            return knapsack_ranks(profiles, keep_ratio)
        case _:
            return uniform_ranks([profile.spec for profile in profiles], keep_ratio)


def _check(profile: MatrixProfile) -> None:
    """Shapes, and that every number is finite."""
    name, size = profile.spec.name, profile.spec.full_rank
    arrays = {"energy": (profile.energy, size), "first_order": (profile.first_order, size)}
    arrays["nats"] = (profile.nats, size + 1)
    for field, (values, length) in arrays.items():
        if values is not None and np.shape(values) != (length,):
            raise LowRankError(f"{field} of matrix '{name}' has shape {np.shape(values)}; it must be ({length},)")
    numbers: dict[str, object] = {
        "energy": profile.energy,
        "first_order": profile.first_order,
        "nats": profile.nats,
        "importance": profile.importance,
        "table": list((profile.table or {}).values()),
        "probe": profile.probe,
    }
    for field, found in numbers.items():
        if found is not None and not np.isfinite(np.asarray(found, dtype=np.float64)).all():
            raise NonFiniteError(f"{field} of matrix '{name}' holds a NaN or infinity; check its weight and statistics")
    if (np.asarray(profile.energy) < 0).any() or profile.importance < 0:
        raise LowRankError(f"energy and importance of matrix '{name}' must not be negative")
