"""Masked layers: what they compute, what they are made from, and what they are cut to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.batches import as_batches
from lowrank_lit.errors import ModelError, NonFiniteError
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.masks import MaskedLinear, MaskedModel, factor_fully, mask_layers
from lowrank_lit.plan import RankPlan
from lowrank_lit.recovery import add_adapters
from lowrank_lit.surgery import check_applied, dense_weight, find_targets, target_parameters
from tests.tiny import batches, tiny_model

CALIBRATION = as_batches(batches(n=2, structured=True))


def masked(family: str = "llama", **overrides: Any) -> tuple[Any, MaskedModel, dict[str, nn.Module]]:
    """A model of one block, all of it masked, and the dense layers that were there before."""
    model: Any = tiny_model(family, num_hidden_layers=1, **overrides)
    before = {name: target.module for name, target in find_targets(model).items()}
    factor_fully(model, CALIBRATION, list(before))
    return model, mask_layers(model, list(before), min_rank=2, dense=before), before


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(**batches(n=1)[0]).logits
    return result


def drop(found: MaskedModel, kept: int) -> None:
    """Leave the first ``kept`` components on."""
    found.move([torch.arange(layer.rank) < kept for layer in found.layers.values()])


def test_a_masked_layer_leaves_components_out() -> None:
    pair = MaskedLinear(FactoredLinear(6, 5, 3, dtype=torch.float64))
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    assert pair.kept == 3
    pair.mask[1] = False
    outer, inner = pair.outer.weight[:, [0, 2]], pair.inner.weight[[0, 2]]
    torch.testing.assert_close(pair(x), x @ (outer @ inner).T + pair.outer.bias, rtol=0, atol=1e-14)
    torch.testing.assert_close(pair.weight, outer @ inner, rtol=0, atol=1e-14)
    assert set(pair.state_dict()) == {"inner.weight", "outer.weight", "outer.bias", "mask"}


def test_what_is_off_gets_no_gradient() -> None:
    pair = MaskedLinear(FactoredLinear(6, 5, 3))
    pair.mask[1] = False
    pair(torch.randn(4, 6)).square().sum().backward()
    outer, inner = pair.outer.weight.grad, pair.inner.weight.grad
    assert outer is not None
    assert inner is not None
    assert not bool(outer[:, 1].any())
    assert not bool(inner[1].any())
    assert bool(outer[:, [0, 2]].all())
    assert bool(inner[[0, 2]].all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_does_not_change_the_dtype(dtype: torch.dtype) -> None:
    pair = MaskedLinear(FactoredLinear(6, 5, 3, dtype=dtype))
    assert pair(torch.randn(4, 6, dtype=dtype)).dtype == dtype
    assert pair.to(torch.float64).mask.dtype == torch.bool


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_whole_factors_leave_the_model_what_it_is(family: str) -> None:
    """Conv1D (gpt2) and biases (gpt2, qwen2) included."""
    model: Any = tiny_model(family, num_hidden_layers=1)
    expected = logits(model)
    names = list(find_targets(model))
    weights = {name: dense_weight(model.get_submodule(name)).detach().clone() for name in names}
    factor_fully(model, CALIBRATION, names)
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, FactoredLinear)
        assert layer.rank == min(weight.shape)
        torch.testing.assert_close(layer.weight, weight, rtol=0, atol=1e-5)  # 8e-7 measured
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_components_come_in_the_metrics_order_for_factored_matrices_too() -> None:
    """A second pass over the same text, on the factors of the first, finds the same components."""
    model: Any = tiny_model("llama", num_hidden_layers=1)
    names = list(find_targets(model))
    factor_fully(model, CALIBRATION, names)
    first = {name: model.get_submodule(name) for name in names}
    factor_fully(model, CALIBRATION, names)
    for name, before in first.items():
        after: Any = model.get_submodule(name)
        assert after is not before
        for rank in (1, 4):
            ours = after.outer.weight[:, :rank] @ after.inner.weight[:rank]
            torch.testing.assert_close(
                ours, before.outer.weight[:, :rank] @ before.inner.weight[:rank], rtol=0, atol=1e-4
            )


def test_masking_and_cutting_with_everything_on_gives_the_dense_model_back() -> None:
    model, found, before = masked("gpt2")
    expected = logits(model)
    assert all(parameter.is_meta for layer in before.values() for parameter in layer.parameters())
    assert found.keep_ratio == 1.0
    plan = found.shrink()
    assert {entry.form for entry in plan} == {"dense"}
    assert all(model.get_submodule(name) is layer for name, layer in before.items()), "the Conv1D layers themselves"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_cutting_keeps_the_outputs(family: str) -> None:
    model, found, _ = masked(family)
    drop(found, 9)
    expected, stored = logits(model), found.stored
    plan = RankPlan(found.shrink(), 0.6, "two_sided", "progressive")
    check_applied(model, plan)
    assert {entry.form for entry in plan.matrices} == {"factored"}
    assert all(entry.rank == 9 for entry in plan.matrices)
    assert target_parameters(model, plan) == plan.parameters == stored
    assert not any(isinstance(layer, MaskedLinear) for layer in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_components_anywhere_are_cut_out() -> None:
    model, found, _ = masked()
    generator = torch.Generator().manual_seed(0)
    found.move([torch.randperm(layer.rank, generator=generator) < 7 for layer in found.layers.values()])
    expected = logits(model)
    found.shrink()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_a_matrix_whose_factors_save_nothing_is_dense_again() -> None:
    """At the break-even of 16 for 32 x 32 the product of what is on stands in one matrix."""
    model, found, _ = masked()
    drop(found, 16)
    expected = logits(model)
    plan = found.shrink()
    forms = {(entry.rows, entry.columns): entry.form for entry in plan}
    assert forms[32, 32] == "dense"
    assert "factored" in forms.values(), "wider matrices still save by factors of rank 16"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_moves_are_counted() -> None:
    _, found, _ = masked()
    number = len(found.layers)
    assert found.move([torch.arange(layer.rank) < 8 for layer in found.layers.values()])["returned"] == 0
    result = found.move(
        [(torch.arange(layer.rank) > 0) & (torch.arange(layer.rank) < 10) for layer in found.layers.values()]
    )
    assert result == {"removed": number, "returned": 2 * number}


def test_factors_that_are_masked_keep_their_parameters() -> None:
    model: Any = tiny_model("llama", num_hidden_layers=1)
    names = list(find_targets(model))
    factor_fully(model, CALIBRATION, names)
    kept = {id(parameter) for parameter in model.parameters()}
    mask_layers(model, names, min_rank=2)
    assert {id(parameter) for parameter in model.parameters()} == kept


def test_frozen_layers_stay_frozen() -> None:
    model: Any = tiny_model("qwen2", num_hidden_layers=1)
    names = list(find_targets(model))
    frozen, *_ = names
    model.get_submodule(frozen).requires_grad_(False)
    factor_fully(model, CALIBRATION, names)
    found = mask_layers(model, names, min_rank=2)
    assert not any(parameter.requires_grad for parameter in model.get_submodule(frozen).parameters())
    drop(found, 5)
    found.shrink()
    for name in names:
        assert all(parameter.requires_grad is (name != frozen) for parameter in model.get_submodule(name).parameters())


def test_hooks_of_the_user_survive() -> None:
    model: Any = tiny_model("llama", num_hidden_layers=1)
    name = next(iter(find_targets(model)))
    calls: list[str] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    factor_fully(model, CALIBRATION, [name])
    found = mask_layers(model, [name], min_rank=2)
    calls.clear()
    logits(model)
    drop(found, 4)
    found.shrink()
    logits(model)
    assert calls == ["MaskedLinear", "FactoredLinear"]
    handle.remove()
    logits(model)
    assert len(calls) == 2


def test_adapters_train_inside_the_mask_and_have_to_be_merged_before_the_cut() -> None:
    model, found, _ = masked()
    drop(found, 6)
    adapters = add_adapters(model, rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    expected = logits(model)
    with pytest.raises(ModelError, match="still has an adapter"):
        found.shrink()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    adapters.merge()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    found.shrink()
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_bad_layers_are_named() -> None:
    model: Any = tiny_model("llama", num_hidden_layers=1)
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ModelError, match=f"'{name}' is a Linear"):
        mask_layers(model, [name], min_rank=2)
    weight = model.get_submodule(name).weight.detach()
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    model.model.layers[0].mlp.up_proj = PivotLinear.from_factors(u[:, :4] * s[:4], vt[:4], None)
    with pytest.raises(ModelError, match=f"'{name}' is in pivot form"):
        factor_fully(model, CALIBRATION, [name])


def test_adapters_that_are_there_before_are_refused() -> None:
    model, _, _ = masked()
    name = next(name for name, layer in model.named_modules() if isinstance(layer, MaskedLinear))
    add_adapters(model, rank=2)
    with pytest.raises(ModelError, match="list RankReallocation before"):
        factor_fully(model, CALIBRATION, [name])


def test_weights_that_are_not_finite_or_not_whole_are_refused_before_anything_is_cut() -> None:
    model, found, _ = masked()
    *_, (name, layer) = found.layers.items()
    kept = layer.inner.weight.data
    layer.inner.weight.data = kept.clone().fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"'{name}.inner'"):
        found.shrink()
    layer.inner.weight.data = kept[:1]
    with pytest.raises(ModelError, match="not whole on this process"):
        found.shrink()
    layer.inner.weight.data = kept
    assert all(isinstance(model.get_submodule(other), MaskedLinear) for other in found.layers)
