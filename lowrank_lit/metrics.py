"""In which norm a component of a matrix counts as large, and which moments of calibration that norm needs.

With ``y = W x``, ``R = E[x x^T]``, ``g`` the gradient of the loss at ``y``, ``C = E[g g^T]``, ``F`` the mean over
sequences of the squared gradient of ``W``, ``c`` and ``r`` its column and row sums:

====================  =============================================================  ==============================
metric                a truncation ``D`` of the weight costs                         source
====================  =============================================================  ==============================
``identity``          ``||D||_F^2``                                                  plain SVD
``activation_scale``  ``||D diag(s)||_F^2``, ``s_j = (E |x_j|)^alpha``                ASVD (arXiv 2312.05821)
``input``             ``E ||D x||^2 = tr(D R D^T)``                                  SVD-LLM (arXiv 2403.07378)
``corda``             ``||D R||_F^2``                                                CorDA (arXiv 2406.05223)
``fisher_input``      ``sum_aj D_aj^2 c_j / rows``                                   FWSVD (arXiv 2207.00112)
``fisher_two_sided``  ``sum_aj D_aj^2 r_a c_j / sum(F)``                             LQ-LoRA (arXiv 2311.12023)
``two_sided``         ``tr(C D R D^T)``                                              K-FAC (arXiv 1503.05671)
====================  =============================================================  ==============================

Half the cost in ``two_sided`` estimates the change of the loss in nats per token, half that of the two Fisher metrics
in nats per sequence: these compare across matrices. See docs/methods.md for each.
"""

from __future__ import annotations

import math

from lowrank_lit.errors import LowRankError

# Moments that a metric needs of every target matrix: calibration collects these and no others.
METRIC_MOMENTS: dict[str, frozenset[str]] = {
    "identity": frozenset(),
    "input": frozenset({"input"}),
    "activation_scale": frozenset({"magnitude"}),
    "fisher_input": frozenset({"fisher"}),
    "fisher_two_sided": frozenset({"fisher"}),
    "corda": frozenset({"input_full"}),
    "two_sided": frozenset({"input", "gradient"}),
}

DAMPING = 1e-4
"""Default share of the mean variance that is added to every direction of the inputs."""

GRADIENT_SHRINKAGE = 0.1
"""Default shrinkage of the gradients' second moment: far noisier than the inputs', see docs/methods.md."""

SCALE_EXPONENT = 0.5
"""Default exponent of ``activation_scale``, ASVD's."""


def moments_of(metric: str) -> frozenset[str]:
    """Names of the moments that ``metric`` needs.

    Raises:
        LowRankError: If there is no such metric.
    """
    if metric not in METRIC_MOMENTS:
        raise LowRankError(f"metric='{metric}' is unknown; choose one of {', '.join(METRIC_MOMENTS)}")
    return METRIC_MOMENTS[metric]


def check_metric_settings(
    damping: float = DAMPING, shrinkage: float = GRADIENT_SHRINKAGE, alpha: float = SCALE_EXPONENT
) -> None:
    """Check the settings that metrics share.

    Raises:
        LowRankError: Naming the setting that is out of range.
    """
    if not 0 <= damping <= 1:
        raise LowRankError(f"damping={damping} is outside [0, 1]; it is a share of the mean variance, such as 1e-4")
    if not 0 <= shrinkage <= 1:
        raise LowRankError(
            f"shrinkage={shrinkage} is outside [0, 1]; it is a share of the gradients' mean variance, such as 0.1"
        )
    if not (math.isfinite(alpha) and alpha >= 0):
        raise LowRankError(f"alpha={alpha} is not a number of at least 0; ASVD's exponent is 0.5, and 0 is plain SVD")
