"""In which norm a component of a matrix counts as large, and which moments of the activations that norm needs.

=============  ==================================================  =======================================
metric         a truncation ``D`` of the weight costs              source
=============  ==================================================  =======================================
``identity``   ``||D||_F^2``                                       plain SVD
``input``      ``E ||D x||^2 = tr(D R D^T)``, ``R = E[x x^T]``      SVD-LLM (arXiv 2403.07378)
=============  ==================================================  =======================================
"""

from __future__ import annotations

from lowrank_lit.errors import LowRankError

# Moments that a metric needs of every target matrix: calibration collects these and no others.
METRIC_MOMENTS: dict[str, frozenset[str]] = {"identity": frozenset(), "input": frozenset({"input"})}


def moments_of(metric: str) -> frozenset[str]:
    """Names of the moments that ``metric`` needs.

    Raises:
        LowRankError: If there is no such metric.
    """
    if metric not in METRIC_MOMENTS:
        raise LowRankError(f"metric='{metric}' is unknown; choose one of {', '.join(METRIC_MOMENTS)}")
    return METRIC_MOMENTS[metric]
