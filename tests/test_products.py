"""Products of factored layers: their values, their derivatives, and what they keep for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.layers import LAYER_OF_FORM, FactoredLinear, PivotLinear
from lowrank_lit.products import is_plain, recomputed, reordered, stacked

KINDS = pytest.mark.parametrize("kind", LAYER_OF_FORM.values(), ids=LAYER_OF_FORM.keys())


def layer_of(kind: type[FactoredLinear] | type[PivotLinear], *, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return kind.from_factors(
        torch.randn(14, 6, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64), torch.randn(14), dtype=dtype
    )


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).square().sum().backward()
    found = [tensor.grad for tensor in (x, *layer.parameters())]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes of activations that a forward keeps for its backward; parameters are there anyway."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x)
    assert output.requires_grad
    return sum(kept.values())


def test_derivatives_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    x, first, second, outer, bias = draw(2, 3, 5), draw(4, 5), draw(2, 5), draw(6, 4), draw(6)
    positions = torch.randperm(5, generator=generator)
    assert torch.autograd.gradcheck(recomputed, (x, first, outer, bias))
    assert torch.autograd.gradcheck(lambda value: reordered(value, positions), (x,))
    assert torch.autograd.gradgradcheck(lambda value: reordered(value, positions).square(), (x,))

    def both(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return stacked(x, torch.cat([first, second]).detach(), (first, second))

    assert torch.autograd.gradcheck(both, (x, first, second))


@KINDS
def test_recomputing_changes_no_gradient(kind: type[FactoredLinear] | type[PivotLinear]) -> None:
    layer, x = layer_of(kind), torch.randn(2, 7, 10, dtype=torch.float64)
    expected, values = gradients(layer, x), layer(x)
    layer.recompute = True
    # Measured: 0 and below 1e-15.
    torch.testing.assert_close(layer(x), values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(layer, x), expected, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled, x), expected, rtol=1e-12, atol=1e-12)


@KINDS
def test_recomputing_keeps_no_more_than_a_dense_layer(kind: type[FactoredLinear] | type[PivotLinear]) -> None:
    layer, x = layer_of(kind, dtype=torch.float32), torch.randn(2, 50, 10)
    dense = kept_bytes(nn.Linear(10, 14), x.clone().requires_grad_() * 1)
    assert dense == x.nbytes
    assert kept_bytes(layer, x.clone().requires_grad_() * 1) == dense + 2 * 50 * 6 * 4
    layer.recompute = True
    assert kept_bytes(layer, x.clone().requires_grad_() * 1) == dense
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(layer, x.clone().requires_grad_() * 1) == dense // 2


@KINDS
def test_recomputing_under_autocast(kind: type[FactoredLinear] | type[PivotLinear]) -> None:
    layer, x = layer_of(kind, dtype=torch.float32), torch.randn(2, 7, 10)
    with torch.autocast("cpu", torch.bfloat16):
        expected, kind_of = gradients(layer, x), layer(x).dtype
        layer.recompute = True
        found = gradients(layer, x)
        assert layer(x).dtype == kind_of
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        # bfloat16 has 8 bits. Measured: 0.004 of the largest.
        assert float((one - other).abs().max()) <= 0.02 * float(other.abs().max())


def test_a_layer_with_adapters_or_hooks_computes_as_it_is_called() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model, x = nn.Sequential(layer_of(FactoredLinear)), torch.randn(3, 10, dtype=torch.float64)
    model[0].recompute = True
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0.inner", "0.outer"], init_lora_weights=False), model)
    adapted = model[0].outer(model[0].inner(x))
    torch.testing.assert_close(model(x), adapted, rtol=1e-12, atol=1e-12)
    layer = layer_of(FactoredLinear)
    assert is_plain(layer.inner)
    assert not is_plain(model[0].inner)
    assert not is_plain(nn.ReLU())
    with layer.inner.register_forward_hook(lambda *_: None):
        assert not is_plain(layer.inner)
    layer.inner.weight.data = layer.inner.weight.data[:0]  # as where a process holds a part
    assert not is_plain(layer.inner)
