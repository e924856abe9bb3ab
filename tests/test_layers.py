"""FactoredLinear and PivotLinear: the product of their factors, and the refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowrank_lit.errors import ModelError, NonFiniteError
from lowrank_lit.layers import LAYER_OF_FORM, FactoredLayer, FactoredLinear, PivotLinear


def factors(rows: int, columns: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(rows, rank, dtype=dtype),
        torch.randn(rank, columns, dtype=dtype),
        torch.randn(rows, dtype=dtype),
    )


KINDS = pytest.mark.parametrize("kind", LAYER_OF_FORM.values(), ids=LAYER_OF_FORM.keys())


@KINDS
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(2, 9), columns=st.integers(1, 9), data=st.data(), bias=st.booleans())
def test_forward_is_the_product(
    kind: type[FactoredLinear] | type[PivotLinear], rows: int, columns: int, data: st.DataObject, bias: bool
) -> None:
    rank = data.draw(st.integers(1, min(rows - (kind is PivotLinear), columns)))
    outer, inner, offset = factors(rows, columns, rank)
    layer = kind.from_factors(outer, inner, offset if bias else None)
    assert isinstance(layer, FactoredLayer)
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    expected = x @ (outer @ inner).T + (offset if bias else 0.0)
    # Measured: below 1e-14 for entries of order 10.
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight, outer @ inner, rtol=1e-12, atol=1e-12)
    assert layer.weight.shape == (rows, columns)
    left, right = layer.factors()
    assert (left.shape, right.shape) == ((rows, rank), (rank, columns))
    torch.testing.assert_close(left @ right, layer.weight, rtol=1e-12, atol=1e-12)
    assert (layer.bias is not None) is bias


@KINDS
def test_factors_are_copied_and_trainable(kind: type[FactoredLinear] | type[PivotLinear]) -> None:
    outer, inner, offset = factors(5, 4, 2)
    before = outer.clone()
    layer = kind.from_factors(outer, inner, offset)
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


def test_a_pivot_form_has_plain_children_its_own_bias_and_the_order_of_its_rows() -> None:
    layer = PivotLinear(6, 5, 3)
    assert type(layer.inner) is nn.Linear
    assert type(layer.outer) is nn.Linear
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "bias": (5,),
        "positions": (5,),
        "inner.weight": (3, 6),
        "outer.weight": (2, 3),
    }
    assert sum(parameter.numel() for parameter in layer.parameters()) == 3 * (6 + 5 - 3) + 5
    assert (layer.in_features, layer.out_features, layer.rank) == (6, 5, 3)
    assert "rank=3" in repr(layer)
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    outer, inner, _ = factors(5, 6, 3, torch.float32)
    layer = PivotLinear.from_factors(outer, inner, None)
    again = PivotLinear.empty(6, 5, 3, bias=False)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.weight, layer.weight)
    half = layer.to(torch.bfloat16)
    assert half.positions.dtype == torch.int32  # indices are not cast with the weights
    assert half(torch.ones(2, 6, dtype=torch.bfloat16)).shape == (2, 5)


@KINDS
def test_it_compiles_and_takes_autocast(kind: type[FactoredLinear] | type[PivotLinear]) -> None:
    outer, inner, offset = factors(6, 5, 3, torch.float32)
    layer = kind.from_factors(outer, inner, offset)
    x = torch.randn(4, 5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), layer.double()(x.double()).float(), rtol=0.05, atol=0.1)


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


def test_an_empty_pivot_form_shows_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    layer = PivotLinear.empty(4, 5, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.isnan().all() for parameter in layer.parameters())
    assert layer.positions.tolist() == [-1] * 5
    with pytest.raises((IndexError, RuntimeError)):
        layer(torch.ones(1, 4))
    assert PivotLinear.empty(4, 5, 2, device="meta").positions.is_meta


@pytest.mark.parametrize("rank", [0, 4, 5])
def test_rank_out_of_range_for_a_pivot_form(rank: int) -> None:
    with pytest.raises(ModelError, match=rf"rank={rank} .* shape \(4, 6\); choose a rank from 1 to 3"):
        PivotLinear(6, 4, rank)


@pytest.mark.parametrize("rank", [0, -1, 5])
def test_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ModelError, match=rf"rank={rank} .* shape \(6, 4\); choose a rank from 1 to 4"):
        FactoredLinear(4, 6, rank)


@KINDS
@pytest.mark.parametrize(
    ("outer", "inner", "bias"),
    [((5, 2), (3, 4), (5,)), ((5, 2), (2,), (5,)), ((5, 2), (2, 4), (4,)), ((5, 2), (2, 4), (5, 1))],
)
def test_shapes_that_do_not_belong_together(
    kind: type[FactoredLinear] | type[PivotLinear], outer: tuple[int, ...], inner: tuple[int, ...], bias: tuple[int]
) -> None:
    with pytest.raises(ModelError, match="shape"):
        kind.from_factors(torch.ones(outer), torch.ones(inner), torch.ones(bias))


@KINDS
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_factors_are_refused(
    kind: type[FactoredLinear] | type[PivotLinear], which: int, value: float
) -> None:
    parts = factors(5, 4, 2)
    parts[which].view(-1)[1] = value
    with pytest.raises(NonFiniteError, match=["factor outer", "factor inner", "factor bias"][which]):
        kind.from_factors(*parts)


def test_overflow_in_the_target_dtype_is_refused() -> None:
    outer, inner, offset = factors(5, 4, 2)
    inner[0, 0] = 7e4
    with pytest.raises(NonFiniteError, match=r"factor inner reaches 7e\+04, more than torch.float16 holds"):
        FactoredLinear.from_factors(outer, inner, offset, dtype=torch.float16)
    assert FactoredLinear.from_factors(outer, inner, offset, dtype=torch.bfloat16).weight.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.ao, which sends to torchao
def test_a_quantiser_that_knows_nothing_of_us_takes_the_factors() -> None:
    """torch's own int8, by the type of a layer: both factors of each are quantised, and the output stays close."""
    quantize_dynamic = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    model = nn.Sequential(FactoredLinear(48, 64, 15), nn.ReLU(), FactoredLinear(64, 32, 9)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        x = torch.randn(64, 48)
        expected = model(x)
        small = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        error = (small(x) - expected).norm() / expected.norm()
    quantised = [name for name, part in small.named_modules() if type(part).__name__ == "Linear"]
    assert quantised == ["0.inner", "0.outer", "2.inner", "2.outer"]
    assert type(small[0].inner) is not nn.Linear
    assert error < 0.1  # measured 0.033
