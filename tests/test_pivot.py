"""The pivot form: lossless, of bounded coefficients, and as small as it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_lit.errors import ModelError, NonFiniteError
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.linalg import orthonormalise
from lowrank_lit.pivot import BOUND, LIMIT, PivotFactors, pivot_factors


def rebuilt(found: PivotFactors) -> Tensor:
    return torch.cat([found.pivots, found.coefficients @ found.pivots])[found.positions]


def factors(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, rank, generator=generator, dtype=torch.float64),
        torch.randn(rank, columns, generator=generator, dtype=torch.float64),
    )


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(2, 40), columns=st.integers(1, 40), data=st.data(), seed=st.integers(0, 99))
def test_the_same_matrix_in_fewer_numbers(rows: int, columns: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(1, min(rows - 1, columns)))
    outer, inner = factors(rows, columns, rank, seed)
    found = pivot_factors(outer, inner)
    product = outer @ inner
    assert (rebuilt(found) - product).norm() <= 1e-12 * product.norm()  # measured 2e-15
    assert torch.equal(found.pivots, outer[found.rows] @ inner)
    assert torch.equal(found.rows, found.rows.sort().values)
    assert len(found.rows.unique()) == rank
    assert found.coefficients.shape == (rows - rank, rank)
    assert float(found.coefficients.abs().max()) <= BOUND
    assert found.pivots.numel() + found.coefficients.numel() == rank * (rows + columns - rank)
    assert torch.equal(found.positions.sort().values, torch.arange(rows))


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_rows_and_components_of_very_different_size(spread: float) -> None:
    """Singular values over twelve orders of magnitude and rows over six: the coefficients stay bounded."""
    outer, inner = factors(60, 50, 30)
    scale = torch.logspace(0, spread, 60, dtype=torch.float64)[torch.randperm(60)][:, None]
    outer = scale * orthonormalise(outer) * torch.logspace(0, -12, 30, dtype=torch.float64)
    found = pivot_factors(outer, inner)
    error = (rebuilt(found) - outer @ inner).norm(dim=1) / (outer @ inner).norm()
    assert float(error.max()) < 1e-14  # measured 3e-16
    assert float(found.coefficients.abs().max()) <= BOUND


def test_partial_pivoting_alone_can_fail_and_exchanges_mend_it() -> None:
    """Wilkinson's matrix: elimination with partial pivoting takes its rows in order, with coefficients that double."""
    rank = 24
    triangle = torch.eye(rank, dtype=torch.float64) - torch.ones(rank, rank, dtype=torch.float64).tril(-1)
    outer = torch.cat([triangle, -torch.ones(1, rank, dtype=torch.float64)])
    naive = torch.linalg.solve(triangle, outer[rank:], left=False)
    assert float(naive.abs().max()) > 1e6
    found = pivot_factors(outer, torch.eye(rank, dtype=torch.float64))
    assert float(found.coefficients.abs().max()) <= BOUND
    torch.testing.assert_close(rebuilt(found), outer, rtol=0, atol=1e-12)


def test_exchanges_are_needed_for_some_and_end() -> None:
    """Over many small matrices the start is not always within the bound."""
    counts = []
    for seed in range(60):
        outer, inner = factors(120, 40, 40, seed)
        found = pivot_factors(outer, inner)
        counts.append(found.exchanges)
        assert float(found.coefficients.abs().max()) <= BOUND < LIMIT
        torch.testing.assert_close(rebuilt(found), outer @ inner, rtol=0, atol=1e-10)
    assert 0 < sum(count > 0 for count in counts) < 60
    assert max(counts) < 10


def test_a_factor_of_smaller_rank_than_its_columns() -> None:
    outer, inner = factors(12, 9, 5)
    outer[:, 3:] = 0
    found = pivot_factors(outer, inner)
    torch.testing.assert_close(rebuilt(found), outer @ inner, rtol=0, atol=1e-13)
    nothing = pivot_factors(torch.zeros(6, 2), torch.zeros(2, 4))
    assert torch.equal(rebuilt(nothing), torch.zeros(6, 4, dtype=torch.float64))


def test_a_pivot_layer_is_the_factored_layer() -> None:
    """float32: to 1e-6 of the norm; float64: to 1e-10."""
    outer, inner = factors(96, 64, 32)
    x = torch.randn(7, 64, dtype=torch.float64)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-10)):  # measured 1e-7 and 4e-16
        two = FactoredLinear.from_factors(outer, inner, None, dtype=dtype)
        one = PivotLinear.from_factors(outer, inner, None, dtype=dtype)
        exact = x @ (outer @ inner).T
        with torch.no_grad():
            weight, output = one.weight - two.weight, one(x.to(dtype)) - exact
        assert float(weight.norm() / (outer @ inner).norm()) < tolerance
        assert float(output.norm() / exact.norm()) < tolerance
        assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in two.parameters()) - 32**2


@pytest.mark.parametrize(
    ("rows", "columns", "rank"), [(512, 512, 256), (768, 300, 200), (300, 768, 200)], ids=["square", "tall", "wide"]
)
def test_rounding_to_bfloat16_grows_by_a_bounded_factor(rows: int, columns: int, rank: int) -> None:
    """An error in a pivot row reaches the other rows times their coefficients; two factors have no such path."""
    outer, inner = factors(rows, columns, rank)
    errors = []
    for kind in (FactoredLinear, PivotLinear):
        layer = kind.from_factors(outer, inner, None, dtype=torch.bfloat16).double()
        with torch.no_grad():
            errors.append(float((layer.weight - outer @ inner).norm() / (outer @ inner).norm()))
    assert errors[0] < 3e-3  # measured 2.3e-3
    assert errors[1] < 1.2e-2  # measured 4e-3 to 1e-2


@pytest.mark.parametrize(("rows", "rank"), [(4, 4), (4, 5)])
def test_no_row_is_left(rows: int, rank: int) -> None:
    with pytest.raises(ModelError, match=rf"rank={rank} leaves no rows .* from 1 to {rows - 1}, or store"):
        pivot_factors(torch.ones(rows, rank), torch.ones(rank, 6))


def test_factors_that_do_not_multiply_or_are_not_finite() -> None:
    with pytest.raises(ModelError, match="do not multiply"):
        pivot_factors(torch.ones(4, 2), torch.ones(3, 6))
    outer, inner = factors(6, 5, 3)
    outer[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="factor outer: 1 of 18"):
        pivot_factors(outer, inner)
