"""The gauge of two factors: which of the pairs with the same product is the one to quantise.

Factors are free up to an invertible matrix between them: outer R and R^-1 inner are the same map. Four bits are not
indifferent to that choice. Numbers are quantised in blocks along the rows, with a scale for each; noise is e = 0.092 of
a block's own size, and a component with a large column in ``outer`` coarsens the scale for its neighbours. Balanced
factors (outer = U S^1/2, inner = S^1/2 V^T) rotated by a random orthogonal matrix have all components alike, and the
product's relative error is

    ||W' - W||_F / ||W||_F = sqrt(2) e ||W||_* / (sqrt(r) ||W||_F)

with both factors quantised, and 1 / sqrt(2) of that with one of them: at most sqrt(2) e, for a flat spectrum, and less
the faster the spectrum decays. The rotation is folded into the factors and costs nothing afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lowrank_lit.linalg import orthonormalise

NF4_ERROR = 0.092
"""Relative error of NF4 on normally distributed numbers."""
GAUGES = ("rotated", "balanced", "none")

_REFIT_DAMPING = 1e-3


def rotation(rank: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix (rank, rank) in float64, the same for the same seed.

    A Hadamard matrix with random signs of its rows where the rank is a power of two, which spreads every component
    evenly over all; else the Q of a normal matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    if rank & (rank - 1):
        return orthonormalise(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    result = torch.ones(1, 1, dtype=torch.float64)
    while len(result) < rank:
        result = torch.cat([torch.cat([result, result], dim=1), torch.cat([result, -result], dim=1)])
    signs = 2 * torch.randint(2, (rank, 1), generator=generator).double() - 1
    return signs * result / math.sqrt(rank)


def error_law(singular_values: Tensor, *, quantised: int = 2) -> float:
    """Relative error of a product of balanced, randomly rotated factors in NF4: sqrt(q) e ||W||_* / (sqrt(r) ||W||_F).

    Args:
        singular_values: Of the product W, all r of them.
        quantised: How many of the two factors are (q).
    """
    nuclear, frobenius = float(singular_values.sum()), float(singular_values.norm())
    if frobenius == 0:
        return 0.0
    return math.sqrt(quantised) * NF4_ERROR * nuclear / (math.sqrt(len(singular_values)) * frobenius)


def in_gauge(
    gauge: str, factors: Mapping[str, Tensor], balanced: tuple[Tensor, Tensor], seed: int
) -> Mapping[str, Tensor]:
    """Factors of the same product in one of :data:`GAUGES`.

    Args:
        gauge: ``rotated``, ``balanced``, or ``none``: the factors as they are.
        factors: ``outer`` (out, r) and ``inner`` (r, in).
        balanced: Of :func:`lowrank_lit.linalg.balance`, (outer, inner).
        seed: Of the rotation.
    """
    if gauge == "none":
        return factors
    outer, inner = balanced
    if gauge == "rotated":
        turn = rotation(outer.shape[1], seed).to(outer)
        outer, inner = outer @ turn, turn.mT @ inner
    return {"outer": outer, "inner": inner}


def refit_outer(outer: Tensor, inner: Tensor, quantised: Tensor, moment: Tensor) -> Tensor:
    """The ``outer`` of least output error beside a quantised inner: B + B (A - Q) C Q^T (Q C Q^T)^-1, damped.

    Solves min_X ||(B A - X Q) C^1/2||_F; damping, relative to the mean of the diagonal, holds X to B.

    Args:
        outer: B (out, r).
        inner: A (r, in).
        quantised: Q (r, in), what has become of A.
        moment: C (in, in), second moment of the inputs.
    """
    weighted = moment @ quantised.mT  # (in, r)
    gram = quantised @ weighted
    ridge = _REFIT_DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    target = (inner - quantised) @ weighted  # (r, r)
    change: Tensor = torch.linalg.solve((gram + gram.mT) / 2 + ridge, target.mT).mT
    return outer + outer @ change


def product_error(before: Mapping[str, Tensor], after: Mapping[str, Tensor], moment: Tensor | None = None) -> float:
    """||(W' - W) C^1/2||_F / ||W C^1/2||_F of two products in one gauge, C = I without a moment.

    Nothing of the shape (out, in) is formed: the norm of a product is sqrt(sum((left^T left) * (right C right^T))).

    Args:
        before: ``outer`` (out, r) and ``inner`` (r, in) of W.
        after: The same of W'.
        moment: C (in, in), second moment of the inputs.
    """
    # W' - W = (outer' - outer) inner' + outer (inner' - inner): nothing large cancels in it.
    left = torch.cat([after["outer"] - before["outer"], before["outer"]], dim=1)
    right = torch.cat([after["inner"], after["inner"] - before["inner"]], dim=0)
    size = _norm(before["outer"], before["inner"], moment)
    return _norm(left, right, moment) / size if size > 0 else 0.0


def _norm(left: Tensor, right: Tensor, moment: Tensor | None) -> float:
    weighted = right if moment is None else right @ moment
    return math.sqrt(max(0.0, float(((left.mT @ left) * (weighted @ right.mT)).sum())))
