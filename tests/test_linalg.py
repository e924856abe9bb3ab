"""Linear algebra against closed forms in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank_lit.errors import NonFiniteError
from lowrank_lit.linalg import (
    add_gram,
    balance,
    balance_projection,
    damp,
    dual_roots,
    equalise,
    floor_weights,
    left_singular,
    lower_root,
    mirrored,
    numerical_rank,
    orthonormalise,
    require_finite,
    symmetric_eigen,
    symmetric_product,
)


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


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (7, 7)])
@pytest.mark.parametrize("rank", [7, 3])
def test_left_singular_is_the_svd(shape: tuple[int, int], rank: int) -> None:
    rows, columns = shape
    matrix = torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, columns, dtype=torch.float64)
    values, left = left_singular(matrix)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    # Zero singular values included: roots of the Gram matrix's eigenvalues would be 1e-8 of the largest.
    torch.testing.assert_close(values, s, rtol=1e-12, atol=1e-13 * float(s[0]))
    p = min(shape)
    torch.testing.assert_close(left.mT @ left, torch.eye(p, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    k = min(rank, p)
    torch.testing.assert_close(left[:, :k] @ left[:, :k].mT, u[:, :k] @ u[:, :k].mT, rtol=1e-9, atol=1e-9)


def test_left_singular_of_zeros() -> None:
    for shape in ((3, 5), (5, 3)):
        values, left = left_singular(torch.zeros(shape, dtype=torch.float64))
        assert values.tolist() == [0, 0, 0]
        torch.testing.assert_close(left.mT @ left, torch.eye(3, dtype=torch.float64))


def test_dual_roots_of_a_damped_and_of_a_singular_moment() -> None:
    factor = torch.randn(8, 3, dtype=torch.float64)
    singular = factor @ factor.mT
    for moment, rounding in ((damp(singular, 1e-4), 1e-12), (singular, 1e-7)):
        root, dual = dual_roots(moment)
        torch.testing.assert_close(root @ root.mT, moment, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dual.mT @ root, torch.eye(8, dtype=torch.float64), rtol=rounding, atol=rounding)


def test_floor_weights_raises_only_the_smallest() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0])
    assert floor_weights(weights, 0.0).tolist() == [0, 1, 3]
    assert floor_weights(weights, 0.75).tolist() == [1, 1, 3]
    assert floor_weights(100 * weights, 0.75).tolist() == [100, 100, 300]


def test_equalise_keeps_every_component() -> None:
    scales = torch.tensor([1e-100, 1.0, 1e100, 3.0], dtype=torch.float64)
    outer = torch.randn(5, 4, dtype=torch.float64)
    inner = torch.randn(4, 6, dtype=torch.float64)
    inner[3] = 0
    one, other = equalise(outer * scales, inner / scales[:, None])
    torch.testing.assert_close(one.norm(dim=0), other.norm(dim=1), rtol=1e-14, atol=0)
    assert not one[:, 3].any()
    for i in range(4):
        torch.testing.assert_close(
            one[:, i : i + 1] @ other[i : i + 1], outer[:, i : i + 1] @ inner[i : i + 1], rtol=1e-12, atol=1e-300
        )


@pytest.mark.parametrize("spread", [1.0, 1e2, 1e6])
def test_a_projection_is_balanced_as_any_factors_are(spread: float) -> None:
    """Also where the small values are beyond a Gram matrix; and a basis that is not quite one keeps the product."""
    basis = torch.linalg.qr(torch.randn(40, 8, dtype=torch.float64))[0]
    inner = torch.logspace(0, -math.log10(spread), 8, dtype=torch.float64)[:, None] * torch.randn(8, 30).double()
    left, right = balance_projection(basis, inner)
    torch.testing.assert_close(left @ right, basis @ inner, rtol=0, atol=1e-12)
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-11)
    values = torch.linalg.svdvals(inner)
    torch.testing.assert_close(torch.linalg.svdvals(right).square(), values, rtol=1e-9, atol=1e-13)
    rough = basis.float().double()
    left, right = balance_projection(rough, inner)
    torch.testing.assert_close(left @ right, rough @ inner, rtol=0, atol=1e-12)
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-5)


def test_balance_survives_extreme_scales() -> None:
    outer = torch.randn(10, 4, dtype=torch.float64)
    inner = torch.randn(4, 7, dtype=torch.float64)
    scales = torch.tensor([1e-100, 1e-8, 1.0, 1e100], dtype=torch.float64)
    left, right = balance(outer * scales, inner / scales[:, None])
    torch.testing.assert_close(left @ right, outer @ inner, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.linalg.svdvals(left), torch.linalg.svdvals(right))
    for dead in (torch.zeros_like(outer), outer):
        left, right = balance(dead, torch.zeros_like(inner))
        assert not (left @ right).any()
        assert bool(torch.isfinite(left).all() and torch.isfinite(right).all())


@pytest.mark.parametrize("size", [1, 7, 128, 300, 1100])  # one panel, several, and one that is cut short
def test_symmetric_products_are_the_plain_ones(size: int) -> None:
    rows = torch.randn(40, size, dtype=torch.float64)
    moment = torch.randn(40, 40, dtype=torch.float64)
    moment = moment @ moment.mT
    for found, plain in (
        (symmetric_product(rows), rows.mT @ rows),
        (symmetric_product(rows, moment @ rows), rows.mT @ moment @ rows),
    ):
        assert torch.equal(found, found.mT)
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12 * float(plain.abs().max()))


def test_gram_of_float32_is_added_in_float64() -> None:
    total = torch.zeros(150, 150, dtype=torch.float64)
    big, small = 1e4 * torch.ones(2, 150), torch.ones(3, 150)
    add_gram(total, big)
    add_gram(total, small)  # 3 beside 2e8: less than half a unit of float32 there
    assert torch.equal(mirrored(total), torch.full((150, 150), 2e8 + 3, dtype=torch.float64))


def test_lower_root_of_damped_and_of_singular_moments() -> None:
    factor = torch.randn(40, 9, dtype=torch.float64)
    singular = factor @ factor.mT
    for moment in (damp(singular, 1e-4), singular, torch.zeros_like(singular)):
        root = lower_root(moment)
        torch.testing.assert_close(root @ root.mT, moment, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6, 1e9])
def test_orthonormalise_is_qr(condition: float) -> None:
    """Columns orthogonal but for rounding take another way than others; the basis is the same."""
    basis = torch.linalg.qr(torch.randn(200, 150, dtype=torch.float64))[0]
    scales = torch.logspace(0, -math.log10(condition), 150, dtype=torch.float64)
    noise = torch.randn(150, 150, dtype=torch.float64) * torch.finfo(torch.float64).eps
    columns = basis * scales + basis @ noise  # what images of eigenvectors look like
    for given in (columns, columns + columns.roll(1, 1)):
        q, r = torch.linalg.qr(given)
        found = orthonormalise(given)
        torch.testing.assert_close(found.mT @ found, torch.eye(150, dtype=torch.float64), rtol=0, atol=1e-13)
        torch.testing.assert_close(found, q * r.diagonal().sign(), rtol=0, atol=1e-14 * condition)


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e9])  # the last one takes QR and SVD
def test_balance_is_the_svd(spread: float) -> None:
    outer = torch.randn(150, 40, dtype=torch.float64)
    scales = torch.logspace(0, -math.log10(spread), 40, dtype=torch.float64)
    inner = scales[:, None] * torch.linalg.qr(torch.randn(90, 40, dtype=torch.float64))[0].mT
    left, right = balance(torch.linalg.qr(outer)[0], inner)
    product = torch.linalg.qr(outer)[0] @ inner
    torch.testing.assert_close(left @ right, product, rtol=0, atol=1e-13)
    expected = torch.linalg.svdvals(product)[:40].diag()
    torch.testing.assert_close(left.mT @ left, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(right @ right.mT, expected, rtol=0, atol=1e-10 / spread**0.5)
    assert bool((left.norm(dim=0).diff() <= 1e-12).all())  # largest first


def test_a_finite_tensor_with_an_infinite_sum_is_finite() -> None:
    require_finite(torch.full((4,), torch.finfo(torch.float32).max), "a weight")
    require_finite(torch.full((64,), torch.finfo(torch.float16).max, dtype=torch.float16), "a weight")
    with pytest.raises(NonFiniteError, match="2 of 2 values"):
        require_finite(torch.tensor([float("inf"), -float("inf")]), "a weight")
