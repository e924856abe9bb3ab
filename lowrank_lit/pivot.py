"""Pivot form of a low-rank matrix: some of its own rows, and what the other rows are made of.

A matrix W (m, n) of rank k is determined by k linearly independent rows P (k, n) and the coefficients E (m - k, k) that
give every other row as a combination of them. That is k (m + n - k) numbers instead of the k (m + n) of two factors,
without any loss, and it reaches m n exactly at k = min(m, n): there is no rank at which the form costs more than the
matrix (PIFA, arXiv:2501.19090).

Any k independent rows will do on paper. In floating point the entries of E decide: an error in P enters the other rows
times E. Rows that span the largest volume keep every |entry| at or below 1; finding them is hard, finding ones within a
factor is not (strong rank-revealing factorisations: Gu and Eisenstat 1996; the exchange is the one of maximal-volume
submatrices). Pivoted LU of an orthonormal basis starts within a small factor, and exchanges of single rows do the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_lit.errors import ModelError
from lowrank_lit.linalg import require_finite, to_double

BOUND = 2.0
"""Rows are exchanged while a coefficient is larger than this; every exchange multiplies the volume by more than it."""
LIMIT = 10.0
"""Coefficients beyond this are refused."""


@dataclass(frozen=True)
class PivotFactors:
    """A matrix W (m, n) of rank k as rows and coefficients: ``W[rows] = pivots``, ``W[others] = coefficients pivots``.

    Attributes:
        rows: Indices of the pivot rows (k,), int64, ascending; the others are the remaining rows, ascending.
        pivots: The pivot rows (k, n), float64.
        coefficients: Of the other rows (m - k, k), float64.
        exchanges: Rows that were exchanged after the start.
    """

    rows: Tensor
    pivots: Tensor
    coefficients: Tensor
    exchanges: int = 0

    @property
    def positions(self) -> Tensor:
        """Where row i of W stands among the pivot rows followed by the others: (m,), int64, a permutation."""
        size = len(self.rows) + len(self.coefficients)
        order = torch.cat([self.rows, _others(self.rows, size)])
        return torch.empty_like(order).scatter_(0, order, torch.arange(size, device=order.device))


def pivot_factors(outer: Tensor, inner: Tensor) -> PivotFactors:
    """The pivot form of ``outer inner``, exact up to rounding in float64.

    Args:
        outer: Left factor (m, k), k < m; its rank may be smaller than k.
        inner: Right factor (k, n).

    Raises:
        ModelError: If the shapes do not belong together, k is not below m, or a coefficient is larger than ``LIMIT``.
        NonFiniteError: If a factor has a NaN or infinity.
    """
    if outer.ndim != 2 or inner.ndim != 2 or outer.shape[1] != inner.shape[0]:
        raise ModelError(
            f"factors of shapes {tuple(outer.shape)} and {tuple(inner.shape)} do not multiply; "
            "give outer (out, rank) and inner (rank, in)"
        )
    rows, rank = outer.shape
    if not 1 <= rank < rows:
        raise ModelError(
            f"rank={rank} leaves no rows to express by others in a matrix of {rows} rows; choose a rank from 1 to "
            f"{rows - 1}, or store the matrix dense"
        )
    require_finite(outer, "factor outer")
    require_finite(inner, "factor inner")
    # The coefficients depend on the column space alone, so its best-conditioned basis serves; this also gives every row
    # a meaning where the rank of the factor is below k.
    basis, _ = torch.linalg.qr(to_double(outer))
    chosen, coefficients, exchanges = _select(basis)
    largest = float(coefficients.abs().max())
    if largest > LIMIT:
        raise ModelError(
            f"the pivot form of a matrix of {rows} rows at rank {rank} has coefficients up to {largest:.3g} after "
            f"{exchanges} exchanges, more than {LIMIT:g}; store this matrix factored or dense"
        )
    return PivotFactors(chosen, to_double(outer)[chosen] @ to_double(inner), coefficients, exchanges)


def _select(basis: Tensor) -> tuple[Tensor, Tensor, int]:
    """Rows of an orthonormal basis (m, k) that span nearly the largest volume, ascending, and the others' coefficients.

    With ``basis[others] = E basis[chosen]``, an entry |E_ij| above 1 says that putting row i in place of row j
    multiplies the volume |det basis[chosen]| by |E_ij|. The volume is bounded, so exchanges above ``BOUND`` end.
    """
    rows, rank = basis.shape
    order, coefficients = _start(basis)
    exchanges = 0
    for _ in range(4 * rows):
        flat = int(coefficients.abs().argmax())
        i, j = divmod(flat, rank)
        entry = float(coefficients[i, j])
        if abs(entry) <= BOUND:
            break
        # Row i becomes a pivot and pivot j one of the others: a change of rank one, worked out from expressing the old
        # pivot by the new one in every row.
        column, row = coefficients[:, j].clone(), coefficients[i].clone()
        column[i] += 1
        row[j] -= 1
        coefficients.addr_(column, row, alpha=-1 / entry)
        order[[j, rank + i]] = order[[rank + i, j]]
        exchanges += 1
    if exchanges:  # the updates have gathered rounding errors
        coefficients = torch.linalg.solve(basis[order[:rank]], basis[order[rank:]], left=False)
    chosen, columns = order[:rank].sort()
    return chosen, coefficients[order[rank:].argsort()][:, columns], exchanges


def _start(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Row order (m,), pivots first, and the others' coefficients (m - k, k), by LU with partial pivoting.

    P basis = L U gives basis[others] = L2 L1^-1 basis[pivots].
    """
    rows, rank = basis.shape
    packed, transpositions = torch.linalg.lu_factor(basis)
    order = list(range(rows))
    for step, other in enumerate(transpositions.tolist()):  # LAPACK counts from one
        order[step], order[other - 1] = order[other - 1], order[step]
    coefficients = torch.linalg.solve_triangular(
        packed[:rank], packed[rank:], upper=False, unitriangular=True, left=False
    )
    return torch.tensor(order, device=basis.device), coefficients.contiguous()


def _others(rows: Tensor, size: int) -> Tensor:
    """The row indices below ``size`` that are not in ``rows``, ascending."""
    rest = torch.ones(size, dtype=torch.bool, device=rows.device)
    rest[rows] = False
    return rest.nonzero()[:, 0]
