"""Singular values of a weight in a metric, and its best factors of any rank.

A metric has a root on each side, ``S`` on the inputs and ``Q`` on the outputs: a change ``D`` of the weight costs
``||Q^T D S||_F^2``. The best approximation of rank ``k`` truncates the SVD ``Q^T W S = U diag(s) P^T``, and costs the
sum of the dropped ``s_i^2``. The scaling is undone without inverting the large root:

* one-sided metrics, ``Q = I``: ``W_k = U_k U_k^T W``. SVD-LLM's optimum (arXiv 2403.07378) by the route of LoRD (arXiv
  2309.14021), which takes the eigenvectors of the outputs' covariance; here the same for every other ``S``.
* two-sided, from whichever side is smaller: ``W_k = (Q^-T U_k) (U_k^T Q^T W)`` or ``W_k = (W S P_k) (P_k^T S^-1)``.
  Only that side's moment is decomposed; of the other side the product with ``W`` is enough.

docs/methods.md has the derivations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_lit.errors import LowRankError
from lowrank_lit.linalg import (
    add_gram,
    balance,
    balance_projection,
    damp,
    dual_roots,
    equalise,
    floor_weights,
    left_singular,
    lower_eigen,
    lower_root,
    mirrored,
    require_finite,
    symmetric_eigen,
    symmetric_product,
    to_double,
)
from lowrank_lit.metrics import DAMPING, GRADIENT_SHRINKAGE, SCALE_EXPONENT, check_metric_settings, moments_of
from lowrank_lit.statistics import LayerStatistics


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of one weight ``W`` ``(rows, columns)`` in a metric; ``p = min(rows, columns)``.

    The approximation of rank ``k`` is ``W_k = left[:, :k] inner[:k]``: components are nested.

    Attributes:
        singular_values: ``(p,)`` float64, largest first; their squares are in the unit of the metric.
        left: ``(rows, p)``, or its first columns: outer directions, orthonormal where ``inner`` is ``None``.
        inner: ``(p, columns)``, or ``None`` for ``left^T W`` (one-sided metrics).
    """

    singular_values: Tensor
    left: Tensor
    inner: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by attribute."""
        found = {"singular_values": self.singular_values, "left": self.left}
        return found if self.inner is None else {**found, "inner": self.inner}

    def energy(self) -> Tensor:
        """Squared singular values, ``(p,)``."""
        return self.singular_values.square()

    def loss(self, rank: int) -> float:
        """Cost of the truncation to ``rank`` in the metric: the sum of the dropped squared singular values."""
        return float(self.energy()[rank:].sum())

    def kept_energy(self, rank: int) -> float:
        """Share of the squared singular values that ``rank`` keeps, in [0, 1]; 1 for a matrix of zeros."""
        total = float(self.energy().sum())
        return 1.0 if total == 0 else float(self.energy()[:rank].sum()) / total

    def factors(self, weight: Tensor, rank: int, *, nested: bool = False) -> tuple[Tensor, Tensor]:
        """Factors of the best approximation of rank ``rank``.

        Args:
            weight: The weight ``(rows, columns)`` that the spectrum was taken of.
            rank: 1 to ``p``, or to the number of components that :meth:`to` kept.
            nested: Keep the components in order, the two vectors of each with equal norms, so that any prefix of them
                is the best approximation of its rank. By default the factors are balanced instead (equal singular
                values, see :func:`lowrank_lit.linalg.balance`), which mixes the components.

        Returns:
            ``outer`` ``(rows, rank)`` and ``inner`` ``(rank, columns)`` in float64, ``outer inner = W_k``.

        Raises:
            LowRankError: If the spectrum holds fewer components.
        """
        if not 1 <= rank <= self.left.shape[1]:
            raise LowRankError(f"rank={rank} is outside 1 to {self.left.shape[1]}, the components of this spectrum")
        outer = to_double(self.left[:, :rank].to(weight.device))
        stored = self.inner
        inner = outer.mT @ to_double(weight) if stored is None else to_double(stored[:rank].to(weight.device))
        if nested:
            return equalise(outer, inner)
        return balance_projection(outer, inner) if stored is None else balance(outer, inner)

    def truncated(self, weight: Tensor, rank: int) -> Tensor:
        """``W_k`` ``(rows, columns)``, float64 on the weight's device; arguments and errors as :meth:`factors`."""
        outer, inner = self.factors(weight, rank, nested=True)  # the cheap gauge: the product is the same
        return outer @ inner

    def to(self, device: torch.device | str, dtype: torch.dtype, *, components: int | None = None) -> Spectrum:
        """The same spectrum with its vectors elsewhere, in another precision, or only the first ``components`` of them.

        All singular values stay, in float64 on the same device as the vectors: they are few, and an allocation needs
        every one.
        """
        return Spectrum(
            self.singular_values.to(device),
            self.left[:, :components].to(device, dtype, copy=components is not None),
            None if self.inner is None else self.inner[:components].to(device, dtype, copy=components is not None),
        )


def effective_rank(energy: Tensor) -> float:
    """Effective rank ``exp(-sum p_i ln p_i)``, ``p_i = s_i^2 / sum s^2`` (Roy and Vetterli 2007, with D-Rank's ``p``).

    Between 1 and the number of non-zero entries, reached where all are equal; 0 for a spectrum of zeros.

    Args:
        energy: Squared singular values ``(p,)``.
    """
    total = float(energy.sum())
    return 0.0 if total == 0 else float(torch.special.entr(energy / total).sum().exp())


def stable_rank(energy: Tensor) -> float:
    """Stable rank ``||W||_F^2 / ||W||_2^2 = sum s_i^2 / s_1^2`` (Rudelson and Vershynin 2007).

    Between 1 and the rank, and never above :func:`effective_rank`; 0 for a spectrum of zeros.

    Args:
        energy: Squared singular values ``(p,)``.
    """
    total = float(energy.sum())
    return 0.0 if total == 0 else total / float(energy.max())


def rank_for_energy(energy: Tensor, share: float) -> int:
    """Least rank that keeps ``share`` of the energy; 0 for a spectrum of zeros.

    Args:
        energy: Squared singular values ``(p,)``, largest first.
        share: In [0, 1].

    Raises:
        LowRankError: If ``share`` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise LowRankError(f"share={share} is outside [0, 1]; it is the share of the squared singular values to keep")
    # Summed from the small end, and compared with what may be dropped: exact for shares close to 1.
    dropped = energy.flip(0).cumsum(0).flip(0)
    return int((dropped > (1 - share) * dropped[:1]).sum())


def scalar_gradient(spectrum: Spectrum, statistics: LayerStatistics) -> Spectrum:
    """An ``input`` spectrum in the unit of ``two_sided``, with gradients known by their mean size alone.

    ``C = w I`` with ``w = E ||g||^2 / rows``: what ``two_sided`` gives at a shrinkage of 1. The vectors stay.

    Args:
        spectrum: In the metric ``input``.
        statistics: With the energy of the gradients.

    Raises:
        LowRankError: If no gradients were collected.
    """
    if statistics.gradient_energy == 0 and statistics.gradient_moment is None and statistics.pulled_moment is None:
        raise LowRankError("the size of the gradients is unknown; calibrate with the moment 'gradient'")
    weight = statistics.gradient_energy / spectrum.left.shape[0]
    return replace(spectrum, singular_values=spectrum.singular_values * weight**0.5)


def compute_spectrum(
    weight: Tensor,
    statistics: LayerStatistics | None,
    *,
    metric: str,
    name: str,
    damping: float = DAMPING,
    shrinkage: float = GRADIENT_SHRINKAGE,
    alpha: float = SCALE_EXPONENT,
    components: int | None = None,
) -> Spectrum:
    """Spectrum of one weight in a metric.

    Where the metric is zero altogether (no inputs, or no gradients but zeros) every rank costs nothing: the singular
    values are zero, the vectors those of the plain SVD.

    Args:
        weight: ``(rows, columns)``.
        statistics: Of the layer; may be ``None`` for a metric that needs none.
        metric: One of :data:`lowrank_lit.metrics.METRIC_MOMENTS`.
        name: Of the layer, for errors.
        damping: Relative damping of the inputs' moment, see :func:`lowrank_lit.linalg.damp`; for weights per channel
            or row the least one relative to the mean, see :func:`lowrank_lit.linalg.floor_weights`. In [0, 1].
        shrinkage: The same for the gradients' moment (``two_sided`` alone), in [0, 1].
        alpha: Exponent of the mean magnitudes (``activation_scale`` alone), at least 0.
        components: Vectors that are wanted, the largest; ``None`` is all ``p``. The singular values are all there.

    Raises:
        NonFiniteError: If the weight or the moments are not finite; names the layer.
        LowRankError: If the metric is unknown, a setting is out of range, or the moments of the metric were not
            collected.
    """
    needed = moments_of(metric)
    check_metric_settings(damping, shrinkage, alpha)
    require_finite(weight, f"the weight of layer '{name}'")
    if not needed:
        return Spectrum(*left_singular(to_double(weight), components))
    if statistics is None:
        raise LowRankError(f"metric='{metric}' needs statistics of layer '{name}', which no calibration batch reached")
    statistics.check(name)
    source = _Source(to_double(weight), statistics, metric, name, components)
    if metric == "two_sided":
        spectrum = _two_sided(source, damping, shrinkage)
    elif metric == "fisher_two_sided":
        spectrum = _fisher_two_sided(source, damping)
    else:
        spectrum = _one_sided(source, damping, alpha)
    return spectrum if bool(spectrum.singular_values.any()) else _free(source)


def _free(source: _Source) -> Spectrum:
    """Spectrum of a weight whose changes cost nothing: zeros, with the vectors of the plain SVD to break the tie."""
    values, left = left_singular(source.weight, source.components)
    return Spectrum(torch.zeros_like(values), left)


@dataclass(frozen=True)
class _Source:
    """A weight in float64 and its statistics, of which moments are asked by name."""

    weight: Tensor
    statistics: LayerStatistics
    metric: str
    name: str
    components: int | None

    def moment(self, field: str, collect: str, size: int) -> Tensor:
        """A field of the statistics, ``size`` long on every axis, in float64 on the weight's device.

        ``collect`` is the moment that calibration collects it as.
        """
        value: Tensor | None = getattr(self.statistics, field)
        if value is None:
            raise LowRankError(
                f"metric='{self.metric}' needs the moment '{collect}' of layer '{self.name}', which was not collected; "
                f"calibrate with moments={sorted(moments_of(self.metric))}"
            )
        if set(value.shape) != {size}:
            raise LowRankError(
                f"the moment '{collect}' of layer '{self.name}' has shape {tuple(value.shape)}, but its weight of "
                f"shape {tuple(self.weight.shape)} needs {size} on each axis; calibrate the model that is compressed"
            )
        return to_double(value.to(self.weight.device))


def _one_sided(source: _Source, damping: float, alpha: float) -> Spectrum:
    """``W_k = U_k U_k^T W`` with ``U`` the left singular vectors of ``W S``, for every root ``S`` on the inputs."""
    weight = source.weight
    rows, columns = weight.shape
    if source.metric == "input" and rows <= columns:
        energy, left = lower_eigen(_output_moment(source, damping), source.components)
        return Spectrum(energy.sqrt(), left)
    if source.metric == "activation_scale":
        scaled = weight * floor_weights(source.moment("input_magnitude", "magnitude", columns), damping).pow(alpha)
    elif source.metric == "fisher_input":
        # Column means, not sums: F_aj = c_j / rows is the best fit that is constant along rows, and its unit is F's.
        means = source.moment("fisher_columns", "fisher", columns) / rows
        scaled = weight * floor_weights(means, damping).sqrt()
    elif source.metric == "corda":
        scaled = weight @ damp(source.moment("input_moment", "input_full", columns), damping)
    else:
        scaled = weight @ lower_root(damp(source.moment("input_moment", "input", columns), damping))
    return Spectrum(*left_singular(scaled, source.components))


def _fisher_two_sided(source: _Source, damping: float) -> Spectrum:
    """Scales on both sides, ``diag(r)^1/2 W diag(c)^1/2``: exact where ``F`` has rank one, ``F = r c^T / sum(F)``."""
    rows, columns = source.weight.shape
    # Rows are divided by, so that none may be zero even where the damping is.
    row_sums = floor_weights(source.moment("fisher_rows", "fisher", rows), max(damping, torch.finfo(torch.float32).eps))
    column_sums = floor_weights(source.moment("fisher_columns", "fisher", columns), damping)
    total = float(row_sums.sum())
    if total == 0:
        return _free(source)
    scale = (row_sums / total).sqrt()[:, None]
    scaled = scale * source.weight
    values, left = left_singular(scaled * column_sums.sqrt(), source.components)
    return Spectrum(values, left / scale, left.mT @ scaled)


def _two_sided(source: _Source, damping: float, shrinkage: float) -> Spectrum:
    """Kronecker-factored Fisher, decomposed on the smaller side.

    With the small side's root ``S`` (dual ``T = S^-T``), ``G`` the other side's moment as seen from there and ``P`` the
    eigenvectors of ``S^T G S``, the components are ``W (S P) (T P)^T`` for a tall weight, ``(T P) (S P)^T W`` for a
    wide one. ``S P (T P)^T = I``, so all of them together are ``W`` whatever the moments' ranks.
    """
    weight = source.weight
    rows, columns = weight.shape
    if rows <= columns:
        small = damp(source.moment("gradient_moment", "gradient", rows), shrinkage)
        gram = mirrored(_output_moment(source, damping))
    else:
        small = damp(source.moment("input_moment", "input", columns), damping)
        gram = _pulled_moment(source, shrinkage)
    if float(small.trace()) == 0:
        return _free(source)
    root, dual = dual_roots(small)
    energy, rotation = symmetric_eigen(symmetric_product(root, gram @ root), source.components)
    forward, backward = root @ rotation, dual @ rotation
    if rows <= columns:
        return Spectrum(energy.sqrt(), backward, forward.mT @ weight)
    return Spectrum(energy.sqrt(), weight @ forward, backward.mT)


def _output_moment(source: _Source, damping: float) -> Tensor:
    """``W R W^T`` of the damped ``R``, ``(rows, rows)``, from either moment; both give the same. Its lower triangle:
    what is above it has no meaning."""
    weight, statistics = source.weight, source.statistics
    rows, columns = weight.shape
    if statistics.output_moment is None:
        products = weight @ damp(source.moment("input_moment", "input", columns), damping)
        total = weight.new_zeros(rows, rows)
        add_gram(total, weight.mT, products.mT)
        return total
    # The damping of R, carried to the outputs: W (mean I) W^T with mean = tr(R) / columns.
    mean = statistics.input_energy / columns
    total = (1 - damping) * source.moment("output_moment", "input", rows)
    add_gram(total, (damping * mean) * weight.mT, weight.mT)
    return total


def _pulled_moment(source: _Source, shrinkage: float) -> Tensor:
    """``W^T C W`` of the shrunk ``C``, ``(columns, columns)``: shrinkage carried through as in the output moment."""
    weight, statistics = source.weight, source.statistics
    rows, columns = weight.shape
    mean = statistics.gradient_energy / rows
    return (1 - shrinkage) * source.moment("pulled_moment", "gradient", columns) + (
        shrinkage * mean
    ) * symmetric_product(weight)
