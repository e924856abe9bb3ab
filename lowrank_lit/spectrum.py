"""Singular values of a weight in a metric, and its best factors of any rank.

With ``S S^T = R`` the truncation error ``E ||(W - W_k) x||^2`` is ``||(W - W_k) S||_F^2``, so the best ``W_k`` keeps
the leading left singular vectors ``U_k`` of ``W S``, and ``W_k = U_k U_k^T W``: the root ``S`` is never inverted. The
vectors come from whichever Gram matrix is smaller, ``W R W^T`` (rows) or ``S^T W^T W S`` (columns). This is SVD-LLM's
optimum (arXiv 2403.07378) by the route of Swift-SVD; see also LoRD (arXiv 2309.14021), which takes the eigenvectors of
the outputs' covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_lit.errors import LowRankError
from lowrank_lit.linalg import balance, damp, orthonormalise, require_finite, symmetric_eigen, to_double
from lowrank_lit.metrics import moments_of
from lowrank_lit.statistics import LayerStatistics


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of one weight ``W`` ``(rows, columns)`` in a metric; ``p = min(rows, columns)``.

    Attributes:
        singular_values: ``(p,)`` float64, largest first; their squares are in the unit of the metric (squared output
            per token).
        left: Orthonormal columns ``(rows, p)``: keeping the first ``k`` gives the best approximation of rank ``k``.
    """

    singular_values: Tensor
    left: Tensor

    def energy(self) -> Tensor:
        """Squared singular values, ``(p,)``."""
        return self.singular_values.square()

    def loss(self, rank: int) -> float:
        """Squared error of the truncation to ``rank`` in the metric: the sum of the dropped squared singular values."""
        return float(self.energy()[rank:].sum())

    def kept_energy(self, rank: int) -> float:
        """Share of the squared singular values that ``rank`` keeps, in [0, 1]; 1 for a matrix of zeros."""
        total = float(self.energy().sum())
        return 1.0 if total == 0 else float(self.energy()[:rank].sum()) / total

    def factors(self, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Balanced factors of the best approximation of rank ``rank``.

        Args:
            weight: The weight ``(rows, columns)`` that the spectrum was taken of.
            rank: 1 to ``p``.

        Returns:
            ``outer`` ``(rows, rank)`` and ``inner`` ``(rank, columns)`` in float64, with ``outer inner = U_k U_k^T W``.
        """
        left = to_double(self.left[:, :rank].to(weight.device))
        return balance(left, left.mT @ to_double(weight))


def identity_spectrum(weight: Tensor) -> Spectrum:
    """Plain SVD of ``weight`` ``(rows, columns)``."""
    u, s, _ = torch.linalg.svd(to_double(weight), full_matrices=False)
    return Spectrum(s, u)


def input_spectrum(weight: Tensor, statistics: LayerStatistics, damping: float) -> Spectrum:
    """Spectrum of ``weight`` ``(rows, columns)`` in the norm ``tr(D R D^T)`` of the damped input moment ``R``.

    Args:
        weight: ``W``.
        statistics: With the input moment, or the output moment where that is the smaller one; both give the same
            spectrum.
        damping: Relative damping of ``R``, see :func:`lowrank_lit.linalg.damp`.
    """
    double = to_double(weight)
    rows, columns = weight.shape
    if statistics.output_moment is not None:
        # The damping of R, carried to the outputs: W (mean I) W^T with mean = tr(R) / columns.
        moment = to_double(statistics.output_moment.to(weight.device))
        mean = statistics.input_energy / columns
        return _left_spectrum((1 - damping) * moment + damping * mean * (double @ double.mT))
    if statistics.input_moment is None:
        raise LowRankError("the metric 'input' needs calibration statistics; calibrate with the moment 'input'")
    moment = damp(to_double(statistics.input_moment.to(weight.device)), damping)
    if rows <= columns:
        return _left_spectrum(double @ moment @ double.mT)
    values, vectors = symmetric_eigen(moment)
    whitened = double @ (vectors * values.sqrt())  # W S, (rows, columns)
    energy, right = symmetric_eigen(whitened.mT @ whitened)
    return Spectrum(energy.sqrt(), orthonormalise(whitened @ right))


def _left_spectrum(gram: Tensor) -> Spectrum:
    energy, vectors = symmetric_eigen(gram)
    return Spectrum(energy.sqrt(), vectors)


def compute_spectrum(
    weight: Tensor, statistics: LayerStatistics | None, *, metric: str, name: str, damping: float = 1e-4
) -> Spectrum:
    """Spectrum of one weight in a metric.

    Args:
        weight: ``(rows, columns)``.
        statistics: Of the layer; may be ``None`` for a metric that needs none.
        metric: ``identity`` or ``input``.
        name: Of the layer, for errors.
        damping: Relative damping of the moments.

    Raises:
        NonFiniteError: If the weight or the moments are not finite; names the layer.
        LowRankError: If the metric is unknown, or its moments were not collected.
    """
    require_finite(weight, f"the weight of layer '{name}'")
    if not moments_of(metric):
        return identity_spectrum(weight)
    if statistics is None:
        raise LowRankError(f"metric='{metric}' needs statistics of layer '{name}', which no calibration batch reached")
    statistics.check(name)
    return input_spectrum(weight, statistics, damping)
