"""How the matrices of a compressed and of a recovered model lie to those of the base model, on thin factors.

An intruder dimension (Shuttleworth, Andreas, Torralba and Sharma 2024, arXiv:2410.21228) is a singular vector of a
tuned matrix that resembles no singular vector of the base matrix: its greatest absolute cosine with all of them is
below a threshold. A factored matrix gives its singular vectors by a QR of each factor and a small SVD
(:func:`lowrank_lit.linalg.factored_svd`); the product is never formed. Only the base matrix, which is dense, is
decomposed as it is.

What recovery changed, ``dW``, is a product of thin factors too: ``outer' inner' - outer inner = [outer', -outer]
[inner'; inner]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.linalg import factored_svd, left_singular, numerical_rank, orthonormalise, require_finite, to_double
from lowrank_lit.surgery import dense_weight

THRESHOLD = 0.5
"""Greatest absolute cosine below which a singular vector is an intruder."""

TOP = 10
"""Singular vectors of a matrix that are looked at, those of the largest singular values."""


@dataclass(frozen=True)
class SingularVectors:
    """Thin SVD of one matrix ``(rows, columns)``; ``p`` components, largest first.

    Attributes:
        left: Output directions ``(rows, p)``.
        values: ``(p,)``.
        right: Input directions ``(columns, p)``.
    """

    left: Tensor
    values: Tensor
    right: Tensor


@dataclass(frozen=True)
class Intruders:
    """Intruder dimensions of one matrix.

    Attributes:
        looked_at: Singular vectors that were looked at: the first ``top``, fewer where the rank is lower.
        left: Intruders among their output directions, which the paper counts.
        right: Among their input directions.
        rank: All components above rounding.
        left_all: Intruders among the output directions of all of these.
        right_all: The same of the input directions.
        least: Least of the greatest absolute cosines of the output directions that were looked at.
    """

    looked_at: int
    left: int
    right: int
    rank: int
    left_all: int
    right_all: int
    least: float


@dataclass(frozen=True)
class Overlap:
    """Where an update ``dW`` of a matrix lies to the head of the matrix that it was made on; ``U`` and ``V`` are the
    output and input directions of the head's ``k`` components.

    Attributes:
        components: ``k``.
        relative: ``||dW||_F / ||W||_F``.
        left: ``||U^T dW||_F^2 / ||dW||_F^2``, the mean squared cosine of the principal angles, by energy.
        right: ``||dW V||_F^2 / ||dW||_F^2``.
        neither: ``||(I - U U^T) dW (I - V V^T)||_F^2 / ||dW||_F^2``.
        left_chance: ``k / rows``, what a random update has on ``left``.
        right_chance: ``k / columns``.
    """

    components: int
    relative: float
    left: float
    right: float
    neither: float
    left_chance: float
    right_chance: float


@dataclass(frozen=True)
class FactorComparison:
    """One factored matrix in three models.

    Attributes:
        compressed: Intruders of the compressed matrix against the base one.
        recovered: Of the recovered against the base one; ``None`` without a recovered model.
        since: Of the recovered against the compressed one.
        overlap: Of what recovery changed; ``None`` where it changed nothing.
    """

    compressed: Intruders
    recovered: Intruders | None = None
    since: Intruders | None = None
    overlap: Overlap | None = None


def singular_vectors(module: nn.Module, device: torch.device | str | None = None) -> SingularVectors:
    """Singular vectors of a linear layer's weight, float64: of a factored one from its factors.

    Raises:
        ModelError: If the module is no linear layer.
        NonFiniteError: If a weight is NaN or infinite.
    """
    if isinstance(module, FactoredLayer):
        outer, inner = (to_double(part.detach().to(device)) for part in module.factors())
        require_finite(outer, "a factor")
        require_finite(inner, "a factor")
        return SingularVectors(*factored_svd(outer, inner))
    weight = to_double(dense_weight(module).detach().to(device))
    require_finite(weight, "a weight")
    if weight.shape[0] <= weight.shape[1]:
        values, left = left_singular(weight)
        return SingularVectors(left, values, orthonormalise(weight.mT @ left))
    values, right = left_singular(weight.mT)
    return SingularVectors(orthonormalise(weight @ right), values, right)


def greatest_cosines(vectors: Tensor, basis: Tensor) -> Tensor:
    """``max_i |cos(b_i, v_j)|`` for each of some unit vectors, ``(k,)``.

    Args:
        vectors: ``(d, k)``, columns of length 1.
        basis: ``(d, p)``, the same.
    """
    return (basis.mT @ vectors).abs().amax(0)


def count_intruders(
    tuned: SingularVectors, base: SingularVectors, *, threshold: float = THRESHOLD, top: int = TOP
) -> Intruders:
    """Intruder dimensions of a matrix against the one it comes from, both ``(rows, columns)``.

    Components of the tuned matrix that are zero to rounding have no direction, and are left out.
    """
    rank = numerical_rank(tuned.values, len(tuned.left), len(tuned.right))
    seen = min(top, rank)
    left = greatest_cosines(tuned.left[:, :rank], base.left)
    right = greatest_cosines(tuned.right[:, :rank], base.right)
    below = {side: cosines < threshold for side, cosines in (("left", left), ("right", right))}
    return Intruders(
        seen,
        int(below["left"][:seen].sum()),
        int(below["right"][:seen].sum()),
        rank,
        int(below["left"].sum()),
        int(below["right"].sum()),
        float(left[:seen].min()) if seen else 1.0,
    )


def update_overlap(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], *, components: int | None = None
) -> Overlap | None:
    """How much of an update of a factored matrix lies in its head.

    Args:
        before: ``outer`` ``(rows, rank)`` and ``inner`` ``(rank, columns)`` of the matrix.
        after: Of the same matrix after the update; its rank may be another.
        components: Of the head, the largest ones; ``None`` is all that the matrix has.

    Returns:
        ``None`` where nothing was changed, up to rounding.
    """
    (outer, inner), (new_outer, new_inner) = (tuple(map(to_double, pair)) for pair in (before, after))
    u, values, v = factored_svd(outer, inner)
    count = min(components or len(values), numerical_rank(values, len(u), len(v)))
    u, v = u[:, :count], v[:, :count]
    columns, rows = torch.cat([new_outer, -outer], 1), torch.cat([new_inner, inner])
    left, left_triangle = torch.linalg.qr(columns)
    right, right_triangle = torch.linalg.qr(rows.mT)
    core = left_triangle @ right_triangle.mT
    size, whole = float(core.norm()), float(values.norm())
    if size <= 1e-12 * whole:
        return None
    inside, across = u.mT @ left, v.mT @ right
    rest_left, rest_right = left - u @ inside, right - v @ across
    # ||X C Y^T||_F^2 by the small Gram matrices of X and Y.
    neither = ((rest_left.mT @ rest_left @ core) * (core @ (rest_right.mT @ rest_right))).sum()
    energy = size**2
    return Overlap(
        count,
        size / whole if whole else float("inf"),
        float((inside @ core).square().sum()) / energy,
        float((core @ across.mT).square().sum()) / energy,
        max(0.0, float(neither)) / energy,
        count / len(u),
        count / len(v),
    )


def intruder_dimensions(
    base: nn.Module,
    tuned: nn.Module,
    *,
    threshold: float = THRESHOLD,
    top: int = TOP,
    device: torch.device | str | None = None,
) -> dict[str, Intruders]:
    """Intruder dimensions of every factored matrix of a model (arXiv:2410.21228), by name.

    Args:
        base: The model to compare with, dense or factored.
        tuned: The compressed or recovered model.
        threshold: Greatest absolute cosine below which a vector is an intruder, in (0, 1].
        top: Singular vectors to look at, the first ones.
        device: Where to compute, one matrix at a time; ``None`` is where each weight is.

    Raises:
        ModelError: If ``tuned`` has no factored matrix, or ``base`` has not all of them, in the same shapes.
        LowRankError: If ``threshold`` or ``top`` is out of range.
    """
    found = compare_models(base, tuned, threshold=threshold, top=top, device=device)
    return {name: entry.compressed for name, entry in found.items()}


@torch.no_grad()
def compare_models(
    base: nn.Module,
    compressed: nn.Module,
    recovered: nn.Module | None = None,
    *,
    threshold: float = THRESHOLD,
    top: int = TOP,
    head: float | None = None,
    device: torch.device | str | None = None,
) -> dict[str, FactorComparison]:
    """Every matrix that is factored in the compressed model, in two or three models.

    Args:
        base: The dense model.
        compressed: Its compression.
        recovered: The compression after training, of any ranks; ``None`` compares two models.
        threshold: As :func:`intruder_dimensions`.
        top: As there.
        head: Share of a matrix's full rank that is its head, in (0, 1), for the overlap; ``None`` is its whole rank.
        device: As there.

    Raises:
        ModelError: If a model is none of the same architecture, or nothing is factored.
        LowRankError: If ``threshold``, ``top`` or ``head`` is out of range.
    """
    check_intruder_settings(threshold, top)
    factored: dict[str, FactoredLayer] = {
        name: module for name, module in compressed.named_modules() if isinstance(module, FactoredLayer)
    }
    if not factored:
        raise ModelError(
            f"the compressed {type(compressed).__name__} has no factored matrix; give an export of a compression"
        )
    result = {}
    with ExpertsApart(base, list(factored)):
        others = [_partners(base, factored, "base")]
        if recovered is not None:
            others.append(_partners(recovered, factored, "recovered"))
        for name, layer in factored.items():
            own, dense = singular_vectors(layer, device), singular_vectors(others[0][name], device)
            entry = FactorComparison(count_intruders(own, dense, threshold=threshold, top=top))
            if recovered is not None:
                new = others[1][name]
                vectors = singular_vectors(new, device)
                share = None if head is None else max(1, int(head * min(layer.in_features, layer.out_features)))
                entry = FactorComparison(
                    entry.compressed,
                    count_intruders(vectors, dense, threshold=threshold, top=top),
                    count_intruders(vectors, own, threshold=threshold, top=top),
                    update_overlap(_factors(layer, device), _factors(new, device), components=share),
                )
            result[name] = entry
    return result


def suspicion(comparisons: Mapping[str, FactorComparison]) -> str:
    """Why the recovered model may be none of this compression; empty where nothing speaks for it."""
    sizes = [entry.overlap.relative for entry in comparisons.values() if entry.overlap is not None]
    if sizes and median(sizes) > 0.9:
        return (
            f"the recovered matrices differ from the compressed ones by {median(sizes):.2f} of their norm (median): "
            "it may be the recovery of another compression"
        )
    return ""


def _factors(layer: nn.Module, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    if isinstance(layer, FactoredLayer):
        outer, inner = (to_double(part.detach().to(device)) for part in layer.factors())
        return outer, inner
    weight = to_double(dense_weight(layer).detach().to(device))  # a matrix that recovery has made dense
    return weight, torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)


def _partners(model: nn.Module, factored: Mapping[str, FactoredLayer], what: str) -> dict[str, nn.Module]:
    """The layers of the same names in another model, of the same shapes."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in factored.items():
        shape = (layer.out_features, layer.in_features)
        try:
            found = tuple(dense_weight(modules[name]).shape) if name in modules else None
        except ModelError:
            found = None
        if found != shape:
            has = "no such linear layer" if found is None else f"{found[0]} x {found[1]} there"
            raise ModelError(
                f"the {what} model is none of the compressed one's: matrix '{name}' is {shape[0]} x {shape[1]} in the "
                f"compressed model, {has}; give folders of one model"
            )
    return {name: modules[name] for name in factored}


def check_intruder_settings(threshold: float, top: int) -> None:
    """Check what both functions share.

    Raises:
        LowRankError: Naming the setting that is out of range.
    """
    if not 0 < threshold <= 1:
        raise LowRankError(f"threshold={threshold:g} is outside (0, 1]; it is an absolute cosine, such as {THRESHOLD}")
    if top < 1:
        raise LowRankError(f"top={top} is too small; give the number of singular vectors to look at, such as {TOP}")
