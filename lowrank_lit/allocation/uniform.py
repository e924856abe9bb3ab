"""The same keep ratio for every matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lowrank_lit.allocation.budget import MatrixSpec, spend_towards


def uniform_ranks(specs: Sequence[MatrixSpec], keep_ratio: float) -> list[int]:
    """Every matrix keeps the same share of its parameters: about ``keep_ratio * m n / (m + n)`` as the rank of two
    factors, more in the pivot form.

    The rounding's rest goes to single matrices until it pays for no further component.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
    """
    return spend_towards(specs, np.array([float(spec.dense_cost) for spec in specs]), keep_ratio)
