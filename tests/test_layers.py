"""FactoredLinear: the product of its factors, and the refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_lit.errors import ModelError, NonFiniteError
from lowrank_lit.layers import FactoredLinear


def factors(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(rows, rank, dtype=dtype),
        torch.randn(rank, columns, dtype=dtype),
        torch.randn(rows, dtype=dtype),
    )


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), data=st.data(), bias=st.booleans())
def test_forward_is_the_product(rows: int, columns: int, data: st.DataObject, bias: bool) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    outer, inner, offset = factors(rows, columns, rank)
    layer = FactoredLinear.from_factors(outer, inner, offset if bias else None)
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    expected = x @ (outer @ inner).T + (offset if bias else 0.0)
    # Measured: below 1e-14 for entries of order 10.
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight, outer @ inner, rtol=1e-12, atol=1e-12)
    assert layer.weight.shape == (rows, columns)
    assert (layer.bias is not None) is bias


def test_factors_are_copied_and_trainable() -> None:
    outer, inner, offset = factors(5, 4, 2)
    before = outer.clone()
    layer = FactoredLinear.from_factors(outer, inner, offset)
    layer(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            assert parameter.requires_grad
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0
            parameter.add_(1.0)
    assert torch.equal(outer, before)


def test_children_are_plain_linear_layers() -> None:
    layer = FactoredLinear(6, 5, 3)
    assert type(layer.inner) is nn.Linear
    assert type(layer.outer) is nn.Linear
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "inner.weight": (3, 6),
        "outer.weight": (5, 3),
        "outer.bias": (5,),
    }
    assert (layer.in_features, layer.out_features, layer.rank) == (6, 5, 3)
    assert "rank=3" in repr(layer)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_from_factors_casts_and_keeps_the_dtype_by_default() -> None:
    outer, inner, offset = factors(5, 4, 2)
    assert FactoredLinear.from_factors(outer, inner, offset).weight.dtype == torch.float64
    low = FactoredLinear.from_factors(outer, inner, offset, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert torch.equal(low.inner.weight, inner.bfloat16())


def test_empty_shows_what_was_not_loaded_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    layer = FactoredLinear.empty(4, 5, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.isnan().all() for parameter in layer.parameters())
    assert len(list(layer.parameters())) == 3
    assert FactoredLinear.empty(4, 5, 2, device="meta").weight.is_meta
    with torch.device("meta"):
        assert FactoredLinear.empty(4, 5, 2).weight.is_meta


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ModelError, match=rf"rank={rank} .* shape \(6, 4\); choose a rank from 1 to 4"):
        FactoredLinear(4, 6, rank)


@pytest.mark.parametrize(
    ("outer", "inner", "bias"),
    [((5, 2), (3, 4), (5,)), ((5, 2), (2,), (5,)), ((5, 2), (2, 4), (4,)), ((5, 2), (2, 4), (5, 1))],
)
def test_shapes_that_do_not_belong_together(outer: tuple[int, ...], inner: tuple[int, ...], bias: tuple[int]) -> None:
    with pytest.raises(ModelError, match="shape"):
        FactoredLinear.from_factors(torch.ones(outer), torch.ones(inner), torch.ones(bias))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_factors_are_refused(which: int, value: float) -> None:
    parts = factors(5, 4, 2)
    parts[which].view(-1)[1] = value
    with pytest.raises(NonFiniteError, match=["factor outer", "factor inner", "factor bias"][which]):
        FactoredLinear.from_factors(*parts)


def test_overflow_in_the_target_dtype_is_refused() -> None:
    outer, inner, offset = factors(5, 4, 2)
    inner[0, 0] = 7e4
    with pytest.raises(NonFiniteError, match=r"factor inner reaches 7e\+04, more than torch.float16 holds"):
        FactoredLinear.from_factors(outer, inner, offset, dtype=torch.float16)
    assert FactoredLinear.from_factors(outer, inner, offset, dtype=torch.bfloat16).weight.isfinite().all()
