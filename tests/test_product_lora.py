"""The baseline: LoRA on the product, merged and truncated to the rank that was there."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.product_lora import AdaptedProduct, add_product_adapters, product_ranks


def model_of_two(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(FactoredLinear(20, 30, 8, dtype=dtype), nn.Tanh(), FactoredLinear(30, 16, 6, dtype=dtype))


@torch.no_grad()
def move(model: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))


def text(tokens: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(tokens, 20, generator=generator, dtype=torch.float64) * torch.arange(1, 21) ** -1.0


def test_adapters_start_at_nothing_and_train_alone() -> None:
    model, x = model_of_two(), text()
    plain = copy.deepcopy(model.state_dict())
    before = model(x).detach()
    adapters = add_product_adapters(model, rank=3, alpha=6.0)
    assert torch.equal(model(x), before)
    assert adapters.trainable_parameters == 3 * (20 + 30 + 30 + 16)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.{part}.weight" for i in (0, 2) for part in "ab"
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    layer = model[0]
    assert isinstance(layer, AdaptedProduct)
    torch.testing.assert_close(layer(x), x @ layer.weight.mT + layer.base.outer.bias, rtol=0, atol=1e-12)
    assert torch.equal(layer.base.outer.weight, plain["0.outer.weight"])


def test_the_plain_truncation_is_the_best_of_its_rank() -> None:
    model = model_of_two()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adapters = add_product_adapters(model, rank=3)
    move(model, 0.05)
    weights = {i: model[i].weight.detach() for i in (0, 2)}
    old = {i: model[i].base.weight.detach() for i in (0, 2)}
    record = adapters.merge()
    lost = []
    for i, rank in ((0, 8), (2, 6)):
        u, s, vt = torch.linalg.svd(weights[i], full_matrices=False)
        torch.testing.assert_close(model[i].weight.detach(), u[:, :rank] * s[:rank] @ vt[:rank], rtol=0, atol=1e-12)
        lost.append(float(s[rank:].norm() / (weights[i] - old[i]).norm()))
    assert record.largest_loss == pytest.approx(max(lost), rel=1e-9)
    assert record.parameters_before == record.parameters_after == sum(p.numel() for p in model.parameters())
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    with pytest.raises(ModelError, match="merged already"):
        adapters.merge()


def test_the_whitened_truncation_is_the_best_on_the_inputs() -> None:
    x, errors = text(), {}
    for metric in ("identity", "input"):
        model = model_of_two()
        adapters = add_product_adapters(model, rank=3)
        move(model, 0.05)
        exact = x @ model[0].weight.detach().mT
        adapters.merge(metric=metric, batches=[x])
        errors[metric] = float((x @ model[0].weight.detach().mT - exact).norm())
        root = torch.linalg.cholesky(x.mT @ x).mT
    assert errors["input"] < 0.95 * errors["identity"]
    model = model_of_two()
    add_product_adapters(model, rank=3)
    move(model, 0.05)
    best = torch.linalg.svdvals(root @ model[0].weight.detach().mT)[8:].norm()
    assert errors["input"] == pytest.approx(float(best), rel=1e-2)  # damping is all that is between them


def test_a_small_generic_update_loses_the_share_of_the_formula() -> None:
    torch.manual_seed(0)
    weight = torch.randn(96, 96, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(weight)
    pair = FactoredLinear.from_factors(u[:, :24] * s[:24].sqrt(), s[:24].sqrt()[:, None] * vt[:24], None)
    adapters = add_product_adapters(nn.Sequential(pair), rank=4)
    move(adapters.model, 1e-3)
    assert adapters.merge().median_loss == pytest.approx(1 - 24 / 96, rel=0.1)  # sqrt of a square


def test_without_an_update_nothing_is_lost() -> None:
    model = model_of_two(torch.float32)
    before = copy.deepcopy(model.state_dict())
    record = add_product_adapters(model, rank=2).merge()
    assert (record.median_update, record.largest_loss) == (0.0, 0.0)
    product = before["0.outer.weight"] @ before["0.inner.weight"]
    torch.testing.assert_close(model[0].weight.detach(), product, rtol=0, atol=1e-6)


def test_ranks_reach_a_number_of_parameters() -> None:
    model = model_of_two()
    for wanted in (1, 96, 300, 500, 1000):
        ranks = product_ranks(model, wanted)
        adapters = add_product_adapters(copy.deepcopy(model), rank=ranks)
        assert wanted <= adapters.trainable_parameters < max(wanted, 96) + 50
        assert max(ranks.values()) - min(ranks.values()) <= 1
    assert math.isclose(
        add_product_adapters(copy.deepcopy(model), rank=4, alpha=8.0, use_rslora=True).model.get_submodule("0").scale,
        4.0,
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ModelError, match="'0' is in pivot form"):
        add_product_adapters(nn.Sequential(PivotLinear(8, 8, 4)))
    with pytest.raises(ModelError, match="no factored layer"):
        add_product_adapters(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(LowRankError, match="rank=0 is too small"):
        add_product_adapters(model_of_two(), rank=0)
    with pytest.raises(LowRankError, match="metric='input' needs statistics"):
        add_product_adapters(model_of_two(), rank=2).merge(metric="input")
