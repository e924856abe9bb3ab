"""UniRank: one global order of all singular components (arXiv 2606.21847).

A component scores its share of its matrix's energy times the importance of the module that the matrix belongs to, ``s_i
= I * sigma_i^2 / sum_j sigma_j^2`` with ``I = 1 - E[cos(h_in, h_out)]``. The paper names the two criteria; that they
are combined by their product, and that ``h`` is the residual stream before and after an attention or MLP sub-block (or
a whole layer, as the caller chooses), is our reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import spend
from lowrank_lit.allocation.profile import MatrixProfile


def unirank_ranks(profiles: Sequence[MatrixProfile], keep_ratio: float, *, cost_aware: bool = False) -> list[int]:
    """Ranks by one sort over the components of all matrices.

    Args:
        profiles: Their ``importance`` is used.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].
        cost_aware: Divide a component's score by its price, which the paper does not: one of an 11008 x 4096 matrix
            costs 1.84 times one of a 4096 x 4096 matrix. The dense step then counts for all components that it brings.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
    """
    scores = [unirank_scores(profile.energy, profile.importance) for profile in profiles]
    return spend([profile.spec for profile in profiles], scores, keep_ratio, per_parameter=cost_aware)


def unirank_scores(energy: NDArray[np.float64], importance: float) -> NDArray[np.float64]:
    """Scores of one matrix's components.

    Args:
        energy: Squared singular values in the chosen metric, largest first, ``(p,)``.
        importance: ``1 - cos`` of the matrix's sub-block, in [0, 2].
    """
    total = float(energy.sum())
    return importance * energy / total if total > 0 else np.zeros_like(energy)
