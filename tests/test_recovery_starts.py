"""EVA's and CorDA's start values from second moments: where moments come from, and what is made of them."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.adapter_starts import adapter_starts, corda_components, eva_ranks, input_moments, starts_from_data
from lowrank_lit.errors import LowRankError, ModelError, NonFiniteError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.recovery import add_adapters
from lowrank_lit.statistics import LayerStatistics

EVA: dict[str, Any] = {
    "class_path": "LoraConfig",
    "init_args": {
        "r": 3,
        "init_lora_weights": "eva",
        "eva_config": {"class_path": "EvaConfig", "init_args": {"rho": 1.0}},
    },
}


def corda(method: str, rank: int = 3) -> dict[str, Any]:
    nested = {"class_path": "CordaConfig", "init_args": {"corda_method": method}}
    return {"class_path": "LoraConfig", "init_args": {"r": rank, "init_lora_weights": "corda", "corda_config": nested}}


def inputs(columns: int, tokens: int = 200, seed: int = 0) -> Tensor:
    """Tokens with a steep spectrum in directions that are no axes."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    scales = torch.arange(1, columns + 1).float() ** -1.5
    return torch.randn(tokens, columns, generator=generator) * scales @ basis


def moment(x: Tensor) -> Tensor:
    return x.double().mT @ x.double() / len(x)


class Two(nn.Module):
    """A wide layer, whose inputs' moment a compression does not keep, after a tall one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tall = FactoredLinear(10, 24, 6)
        self.wide = FactoredLinear(24, 12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.relu(self.tall(x)))


def test_moments_come_from_the_statistics_and_else_from_the_text() -> None:
    model, x = Two(), inputs(10)
    pairs = {"tall": model.tall, "wide": model.wide}
    mark = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
    statistics = {
        "tall": LayerStatistics(tokens=9, input_moment=mark),
        "wide": LayerStatistics(tokens=9, output_moment=torch.eye(12, dtype=torch.float64)),
    }
    found = input_moments(model, pairs, statistics, [x[:120], x[120:]])
    assert found["tall"] is mark
    torch.testing.assert_close(found["wide"], moment(torch.relu(model.tall(x)).detach()), rtol=1e-5, atol=1e-7)
    found = input_moments(model, pairs, {}, [x])
    torch.testing.assert_close(found["tall"], moment(x), rtol=1e-5, atol=1e-7)


def test_a_missing_moment_without_a_text_is_an_error() -> None:
    model = Two()
    statistics = {"tall": LayerStatistics(tokens=9, input_moment=torch.eye(10, dtype=torch.float64))}
    with pytest.raises(LowRankError, match="inputs of layer 'wide', and 1 layers have none; give batches"):
        adapter_starts(model, EVA, statistics=statistics)
    broken = {"tall": LayerStatistics(tokens=9, input_moment=torch.full((10, 10), float("nan"), dtype=torch.float64))}
    with pytest.raises(NonFiniteError, match="inputs of layer 'tall'"):
        adapter_starts(model, EVA, statistics=broken, batches=[inputs(10)])


def test_eva_starts_at_what_each_factor_sees_most() -> None:
    model, x = Two(), inputs(10)
    starts = adapter_starts(model, EVA, batches=[x])
    assert set(starts) == {f"{name}.{factor}.eva" for name in ("tall", "wide") for factor in ("inner", "outer")}
    hidden = torch.relu(model.tall(x)).detach()
    seen = {
        "tall.inner": x,
        "tall.outer": model.tall.inner(x).detach(),
        "wide.inner": hidden,
        "wide.outer": model.wide.inner(hidden).detach(),
    }
    for name, activations in seen.items():
        start = starts[f"{name}.eva"].double()
        expected = torch.linalg.eigh(moment(activations))[1].flip(1)[:, :3].mT
        assert start.shape == expected.shape
        torch.testing.assert_close((start * expected).sum(dim=1).abs(), torch.ones(3, dtype=torch.float64))
    before = model(x).detach()
    add_adapters(model, config=EVA, starts=starts)
    assert torch.equal(model(x), before)  # b starts at zero
    layer: Any = model.tall.inner
    assert torch.equal(layer.lora_A["recovery"].weight, starts["tall.inner.eva"])


def test_whitened_directions_see_unit_variance() -> None:
    model, x = Two(), inputs(10)
    config = peft.LoraConfig(r=3, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0, whiten=True))
    latent = x @ adapter_starts(model, config, batches=[x])["tall.inner.eva"].mT
    torch.testing.assert_close(moment(latent), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-4)


def test_eva_ranks_go_where_the_variance_is_and_their_sum_stays() -> None:
    shares = {
        "steep": torch.tensor([0.97, 0.01, 0.01, 0.01]),
        "flat": torch.tensor([0.26, 0.25, 0.25, 0.24]),
    }
    ranks = {"steep": 2, "flat": 2}
    assert eva_ranks(shares, ranks, {"steep": 4, "flat": 4}) == {"steep": 1, "flat": 3}
    assert eva_ranks(shares, ranks, ranks) == ranks
    assert eva_ranks(shares, {"steep": 1, "flat": 1}, {"steep": 4, "flat": 4}) == {"steep": 1, "flat": 1}


def test_redistributed_ranks_stay_below_the_factors_and_keep_the_scale() -> None:
    model, x = Two(), inputs(10)
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=3.0))
    starts = adapter_starts(model, config, batches=[x])
    adapters = add_adapters(model, config=config, starts=starts)
    found = {name: m for name, m in model.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    ranks = {name: layer.r["recovery"] for name, layer in found.items()}
    assert sum(ranks.values()) == 12
    assert len(set(ranks.values())) > 1
    assert max(ranks["tall.inner"], ranks["tall.outer"]) < 6
    assert max(ranks["wide.inner"], ranks["wide.outer"]) < 5
    assert all(layer.scaling["recovery"] == pytest.approx(2.0) for layer in found.values())
    adapters.merge()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_takes_its_components_out_of_the_factor(method: str) -> None:
    weight, x = torch.randn(7, 10, generator=torch.Generator().manual_seed(1)), inputs(10)
    u, s, v = corda_components(weight, moment(x), 7, method)
    torch.testing.assert_close(u * s @ v.mT, weight.double(), rtol=0, atol=1e-9)
    # Against the definition: W C = U S X^T with the inverse written out.
    c = moment(x) / moment(x).diagonal().mean()
    c = 0.99 * c + 0.01 * torch.eye(10, dtype=torch.float64)
    expected = torch.linalg.svd(weight.double() @ c, full_matrices=False)
    part = slice(0, 3) if method == "ipm" else slice(4, 7)
    u, s, v = corda_components(weight, moment(x), 3, method)
    product = expected[0][:, part] * expected[1][part] @ expected[2][part] @ torch.linalg.inv(c)
    torch.testing.assert_close(u * s @ v.mT, product, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_splits_the_factor_and_its_adapter_gives_it_back(method: str) -> None:
    model, x = Two(), inputs(10)
    before, inner = model(x).detach(), model.tall.inner.weight.detach().clone()
    adapters = add_adapters(model, config=corda(method), starts=adapter_starts(model, corda(method), batches=[x]))
    layer: Any = model.tall.inner
    assert not torch.allclose(layer.base_layer.weight, inner)
    assert not hasattr(layer.base_layer, "eigens")
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    record = adapters.merge()
    assert record.largest_update < 1e-6  # against the factors before the split, not against what was left of them
    torch.testing.assert_close(model.tall.inner.weight.detach(), inner, rtol=0, atol=1e-6)


def test_a_wider_layer_than_the_limit_takes_passes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Two(), inputs(10)
    whole = adapter_starts(model, EVA, batches=[x])
    monkeypatch.setattr("lowrank_lit.adapter_starts._MOMENT_BYTES", 1)
    alone = adapter_starts(model, EVA, batches=[x])
    assert all(torch.equal(alone[name], value) for name, value in whole.items())


def test_other_starts_are_refused() -> None:
    assert starts_from_data(EVA)
    assert starts_from_data(corda("ipm"))
    assert not starts_from_data(None)
    assert not starts_from_data({"class_path": "MissConfig"})
    with pytest.raises(ModelError, match="init_lora_weights=True starts from no data; choose corda or eva"):
        adapter_starts(Two(), peft.LoraConfig(r=3), batches=[inputs(10)])
