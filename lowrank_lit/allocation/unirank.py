"""UniRank: one global order of all singular components (arXiv 2606.21847).

A component scores its share of its matrix's energy times the importance of the module that the matrix belongs to, ``s_i
= I * sigma_i^2 / sum_j sigma_j^2`` with ``I = 1 - E[cos(h_in, h_out)]``. The paper names the two criteria; that they
are combined by their product, and that ``h`` is the residual stream before and after an attention or MLP sub-block, is
our reading.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unirank_scores(energy: NDArray[np.float64], importance: float) -> NDArray[np.float64]:
    """Scores of one matrix's components.

    Args:
        energy: Squared singular values in the chosen metric, largest first, ``(p,)``.
        importance: ``1 - cos`` of the matrix's sub-block, in [0, 2].
    """
    total = float(energy.sum())
    return importance * energy / total if total > 0 else np.zeros_like(energy)
