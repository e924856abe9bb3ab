"""The same keep ratio for every matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec


def uniform_scores(spec: MatrixSpec) -> NDArray[np.float64]:
    """Scores whose global order keeps the same share of every matrix: component ``i`` of a matrix scores minus the
    share ``(i + 1) (rows + columns) / (rows columns)`` that the matrix would have reached with it.
    """
    ranks = np.arange(1, min(spec.rows, spec.columns) + 1, dtype=np.float64)
    return -ranks * (spec.rows + spec.columns) / spec.dense_cost
