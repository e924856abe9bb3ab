"""Linear algebra against closed forms in float64."""

from __future__ import annotations

import pytest
import torch

from lowrank_lit.errors import NonFiniteError
from lowrank_lit.linalg import balance, damp, numerical_rank, orthonormalise, require_finite, symmetric_eigen


def test_symmetric_eigen_rebuilds_the_matrix_largest_first() -> None:
    root = torch.randn(12, 7, dtype=torch.float64)
    matrix = root @ root.mT  # rank 7 of 12: five eigenvalues are zero up to rounding
    values, vectors = symmetric_eigen(matrix)
    assert torch.all(values[:-1] >= values[1:])
    assert torch.all(values >= 0)
    assert numerical_rank(values, 12, 12) == 7
    torch.testing.assert_close((vectors * values) @ vectors.mT, matrix, rtol=1e-12, atol=1e-12)  # measured 2e-15


def test_float32_is_decomposed_in_float64() -> None:
    matrix = torch.diag(torch.tensor([1e6, 1.0, 1e-3]))
    values, _ = symmetric_eigen(matrix)
    assert values.dtype == torch.float64


def test_damping_is_relative_and_keeps_the_trace() -> None:
    root = torch.randn(6, 3, dtype=torch.float64)
    moment = root @ root.mT
    damped = damp(moment, 0.01)
    torch.testing.assert_close(damped.trace(), moment.trace())
    torch.testing.assert_close(damp(1e6 * moment, 0.01), 1e6 * damped)
    assert torch.linalg.eigvalsh(damped)[0] == pytest.approx(0.01 * float(moment.trace()) / 6)
    assert torch.linalg.eigvalsh(moment)[0].abs() < 1e-12  # and without damping it is singular


def test_orthonormalise_keeps_every_leading_span_and_its_direction() -> None:
    columns = torch.randn(9, 4, dtype=torch.float64)
    basis = orthonormalise(columns)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4, dtype=torch.float64))
    for k in range(1, 5):
        projected = basis[:, :k] @ (basis[:, :k].mT @ columns[:, :k])
        torch.testing.assert_close(projected, columns[:, :k])
    assert torch.all((basis * columns).sum(0) > 0)


def test_balance_keeps_the_product_and_equalises_the_factors() -> None:
    outer = torch.randn(10, 4, dtype=torch.float64) * torch.tensor([1e3, 1.0, 1e-2, 5.0], dtype=torch.float64)
    inner = torch.randn(4, 7, dtype=torch.float64)
    left, right = balance(outer, inner)
    torch.testing.assert_close(left @ right, outer @ inner, rtol=1e-10, atol=1e-10)
    expected = torch.linalg.svdvals(outer @ inner)[:4].sqrt()
    torch.testing.assert_close(torch.linalg.svdvals(left), expected)
    torch.testing.assert_close(torch.linalg.svdvals(right), expected)


def test_numerical_rank_of_zeros_is_zero() -> None:
    assert numerical_rank(torch.zeros(5), 5, 5) == 0
    assert numerical_rank(torch.tensor([]), 5, 0) == 0


def test_require_finite_names_what_and_counts() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf")])
    with pytest.raises(NonFiniteError, match=r"the weight of layer 'a\.b': 2 of 3 values"):
        require_finite(values, "the weight of layer 'a.b'")
