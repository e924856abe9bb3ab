"""One entry to all allocators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec, spend
from lowrank_lit.allocation.uniform import uniform_scores
from lowrank_lit.allocation.unirank import unirank_scores
from lowrank_lit.errors import LowRankError

ALLOCATORS = ("uniform", "unirank")


def needs_importance(allocator: str) -> bool:
    """Whether the allocator uses the modules' importance, which calibration then has to measure.

    Raises:
        LowRankError: If there is no such allocator.
    """
    if allocator not in ALLOCATORS:
        raise LowRankError(f"allocator='{allocator}' is unknown; choose one of {', '.join(ALLOCATORS)}")
    return allocator == "unirank"


def allocate(
    specs: Sequence[MatrixSpec],
    energies: Sequence[NDArray[np.float64]],
    *,
    allocator: str,
    keep_ratio: float,
    importance: Mapping[str, float],
) -> list[int]:
    """Rank of every matrix within the budget; one at or above a matrix's break-even means dense.

    Args:
        specs: The matrices.
        energies: Squared singular values of each, largest first, ``(min(rows, columns),)``.
        allocator: ``uniform`` or ``unirank``.
        keep_ratio: Share of the matrices' parameters to keep, in (0, 1].
        importance: By matrix name; used by ``unirank``.

    Raises:
        BudgetError: If the budget cannot be met.
        LowRankError: If the allocator is unknown.
    """
    if needs_importance(allocator):
        scores = [unirank_scores(energy, importance[spec.name]) for spec, energy in zip(specs, energies, strict=True)]
    else:
        scores = [uniform_scores(spec) for spec in specs]
    return spend(specs, scores, keep_ratio)
