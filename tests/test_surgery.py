"""Finding, replacing and counting linear layers, over every model family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.errors import ModelError, NonFiniteError, PlanError
from lowrank_lit.layers import LAYER_OF_FORM, FactoredLayer, FactoredLinear, PivotLinear
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.surgery import (
    Target,
    apply_plan,
    bias_of,
    check_applied,
    count_parameters,
    dense_weight,
    find_targets,
    replace_module,
    stored_bytes,
    target_parameters,
    to_dense,
)
from tests.tiny import CAUSAL_FAMILIES, FAMILIES, batches, tiny_model

PER_LAYER = {  # linear layers of one block
    "llama": 7,
    "qwen2": 7,
    "qwen3": 7,
    "mistral": 7,
    "gemma2": 7,
    "gpt_neox": 4,
    "gpt2": 4,
    "phi": 6,
    "opt": 6,
    "bert": 6,
    "mixtral": 4,  # experts are fused
    "qwen3_moe": 4,
}


def factorise(
    model: nn.Module,
    rank: int | None = None,
    patterns: Sequence[str] | None = None,
    form: Literal["factored", "pivot"] = "factored",
) -> RankPlan:
    """Factor every target in place by a float64 SVD, at full rank or at ``rank``, and return the plan."""
    matrices = []
    for name, target in find_targets(model, patterns).items():
        weight = dense_weight(target.module).detach()
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        r = len(s) if rank is None else min(rank, len(s))
        outer, inner = u[:, :r] * s[:r].sqrt(), s[:r].sqrt()[:, None] * vt[:r]
        new = LAYER_OF_FORM[form].from_factors(outer, inner, bias_of(target.module), dtype=weight.dtype)
        replace_module(model, target, new)
        matrices.append(MatrixPlan(name, target.rows, target.columns, form, r))
    return RankPlan(tuple(matrices), 1.0, "identity", "uniform", storage=form)


@torch.no_grad()
def output(model: Any, **batch: Tensor) -> Tensor:
    result = model(**(batch or batches(n=1, padding=True)[0]))
    value: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return value


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_factors_leave_the_model_as_it_was(family: str) -> None:
    model = tiny_model(family).double()
    before = output(model)
    dense = {name: dense_weight(target.module).clone() for name, target in find_targets(model).items()}
    plan = factorise(model)
    # Families whose last norm rounds to float32 give the same bits; the others differ by at most 3e-14.
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-9)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}
    assert layers.keys() == dense.keys()
    assert len(layers) >= PER_LAYER[family] * 2
    for name, layer in layers.items():
        torch.testing.assert_close(layer.weight, dense[name], rtol=0, atol=1e-12)  # measured 1e-15
    assert target_parameters(model, plan) == plan.parameters
    check_applied(model, plan)
    to_dense(model)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())
    torch.testing.assert_close(output(model), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_factor_is_in_use(family: str) -> None:
    """Rank 1 everywhere changes the output, so the identity above is not that of layers nobody calls."""
    model = tiny_model(family).double()
    before = output(model)
    first_block = {name: target for name, target in find_targets(model).items() if "0" in name.split(".")}
    assert len(first_block) == PER_LAYER[family]
    for name, target in first_block.items():
        weight = dense_weight(target.module)
        u, s, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
        new = FactoredLinear.from_factors(u[:, :1] * s[:1], vt[:1], bias_of(target.module))
        replace_module(model, target, new)
        assert (output(model) - before).abs().max() > 1e-6, name
        replace_module(model, Target(name, new), target.module)
        assert torch.equal(output(model), before), name


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets(family: str) -> None:
    model = tiny_model(family)
    targets = find_targets(model)
    names = [name for name, _ in model.named_modules()]
    assert list(targets) == sorted(targets, key=names.index)
    head = model.get_output_embeddings()
    blocks = [name for name in targets if any(part.isdigit() for part in name.split("."))]
    assert len(blocks) == PER_LAYER[family] * model.config.num_hidden_layers
    assert set(targets) - set(blocks) == ({"pooler.dense"} if family == "bert" else set())
    for name, target in targets.items():
        assert target.module is not head
        assert target.name == name
        assert target.aliases == ()
        assert (target.rows, target.columns) == dense_weight(target.module).shape
        x = torch.randn(2, target.columns)
        expected = x @ dense_weight(target.module).T + (0 if bias_of(target.module) is None else bias_of(target.module))
        torch.testing.assert_close(target.module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_apply_plan_takes_the_weights(family: str) -> None:
    factored = tiny_model(family)
    plan = factorise(factored, rank=5)
    empty = tiny_model(family, seed=1)
    bare = replace(plan, matrices=(replace(plan.matrices[0], form="dense"), *plan.matrices[1:]))
    with pytest.raises(PlanError, match="factored at rank 5 in the model and dense"):
        check_applied(factored, bare)
    with pytest.raises(ModelError, match=rf"still dense .* \({len(plan.matrices)} of {len(plan.matrices)} are\)"):
        check_applied(empty, plan)
    apply_plan(empty, plan)
    apply_plan(empty, plan)  # what has the form already stays
    assert target_parameters(empty, plan) == plan.parameters
    assert output(empty).isnan().all()
    empty.load_state_dict(factored.state_dict())
    assert torch.equal(output(empty), output(factored))
    assert count_parameters(empty) == count_parameters(factored)


def test_apply_plan_on_meta_and_in_another_dtype() -> None:
    plan = factorise(tiny_model("qwen2"), rank=3)
    with torch.device("meta"):
        model = tiny_model("qwen2").to(torch.bfloat16)
    apply_plan(model, plan)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, FactoredLinear)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert layer.bias is not None
    assert target_parameters(model, plan) == plan.parameters


def test_apply_plan_that_does_not_fit_changes_nothing() -> None:
    plan = factorise(tiny_model("llama"), rank=3)
    model = tiny_model("llama", num_hidden_layers=1)
    with pytest.raises(PlanError, match=r"in 7 of 14 matrices, first: 'model\.layers\.1\.self_attn\.q_proj'"):
        apply_plan(model, plan)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())


def test_dense_matrices_of_a_plan_stay() -> None:
    model = tiny_model("gpt2")
    plan = factorise(model, rank=4, patterns=["*.attn.*"])
    matrix = MatrixPlan("transformer.h.0.mlp.c_fc", 48, 32, "dense", 32)
    plan = replace(plan, matrices=(*plan.matrices, matrix))
    check_applied(model, plan)
    assert target_parameters(model, plan) == plan.parameters
    assert type(model.get_submodule(matrix.name)).__name__ == "Conv1D"


@pytest.mark.parametrize(
    ("pattern", "count"), [("*.self_attn.*", 8), ("*.mlp.down_proj", 2), ("model.layers.1.*", 7), ("*.[kv]_proj", 4)]
)
def test_patterns(pattern: str, count: int) -> None:
    model = tiny_model("mistral")
    assert len(find_targets(model, [pattern])) == count
    both = find_targets(model, ["*.mlp.*", pattern])
    assert list(both) == [name for name in find_targets(model) if name in both]
    assert find_targets(model, pattern) == find_targets(model, [pattern])  # a single string is one pattern


def test_an_untied_head_can_be_asked_for() -> None:
    model = tiny_model("mistral")
    assert list(find_targets(model, ["lm_head"])) == ["lm_head"]
    before = output(model)
    factorise(model, patterns=["lm_head"])
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-4)


def test_pattern_without_a_match_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"pattern '\*\.attention\.q_proj' matches no linear layer; nearest: .*q_proj"):
        find_targets(tiny_model("llama"), ["*.mlp.*", "*.attention.q_proj"])


@pytest.mark.parametrize("pattern", ["lm_head", "*head", "*"])
def test_a_tied_weight_is_refused(pattern: str) -> None:
    with pytest.raises(ModelError, match=r"matches 'lm_head', whose weight is tied to 'model\.embed_tokens'"):
        find_targets(tiny_model("llama"), [pattern])


def test_heads_and_models_without_targets() -> None:
    heads = nn.ModuleDict(
        {"body": nn.Linear(3, 3), "classifier": nn.Sequential(nn.Linear(3, 3)), "score": nn.Linear(3, 2)}
    )
    assert list(find_targets(heads)) == ["body"]
    assert list(find_targets(heads, ["score"])) == ["score"]
    with pytest.raises(ModelError, match="Sequential has no linear layer to factor"):
        find_targets(nn.Sequential(nn.LayerNorm(3)))
    model = tiny_model("llama")
    factorise(model)
    with pytest.raises(ModelError, match="no linear layer to factor"):
        find_targets(model)


class Odd(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_that_are_not_what_they_seem_are_left_alone() -> None:
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {"odd": Odd(4, 4), "attention": nn.MultiheadAttention(4, 2), "norm": parametrised, "plain": nn.Linear(4, 4)}
    )
    assert list(find_targets(model)) == ["plain"]


class Shared(nn.Module):
    """One linear layer under two names, and one block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        block = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh())
        self.blocks = nn.ModuleList([block, block])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, *self.blocks):
            x = layer(x)
        return x


def test_a_shared_layer_is_one_target_and_replaced_everywhere() -> None:
    model = Shared().double()
    x = torch.randn(5, 6, dtype=torch.float64)
    before = model(x)
    targets = find_targets(model)
    assert {name: target.aliases for name, target in targets.items()} == {
        "first": ("second",),
        "blocks.0.0": ("blocks.1.0",),
    }
    assert set(find_targets(model, ["second", "blocks.1.*"])) == set(targets)
    assert count_parameters(model) == 36 + 6 + 36
    plan = factorise(model)
    assert isinstance(model.first, FactoredLinear)
    assert model.first is model.second
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert count_parameters(model) == 72 + 6 + 72
    assert target_parameters(model, plan) == plan.parameters == 144
    empty = Shared().double()
    apply_plan(empty, plan)
    assert empty.first is empty.second
    to_dense(model, ["second"])
    assert model.first is model.second
    assert type(model.first) is nn.Linear
    assert isinstance(model.blocks[0][0], FactoredLinear)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)


def test_hooks_and_training_flag_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model[0].eval()
    seen: list[str] = []
    handles = [
        model[0].register_forward_hook(lambda *_: seen.append("forward")),
        model[0].register_forward_pre_hook(lambda *_, **__: seen.append("pre"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda *_: seen.append("backward")),
        model.register_forward_hook(lambda *_: seen.append("parent")),
    ]
    factorise(model)
    assert [module.training for module in model] == [False, True]
    assert not model[0].inner.training
    model(torch.randn(2, 4, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "parent", "backward"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 4)).sum().backward()
    assert len(seen) == 4


def test_a_stale_target_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    target = find_targets(model)["0"]
    factorise(model)
    with pytest.raises(ModelError, match="'0' is no longer the layer that was found"):
        replace_module(model, target, nn.Identity())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_to_dense_takes_the_product_in_float32(dtype: torch.dtype) -> None:
    outer, inner = torch.randn(40, 8).to(dtype), torch.randn(8, 24).to(dtype)
    model = nn.Sequential(FactoredLinear.from_factors(outer, inner, torch.ones(40, dtype=dtype)))
    to_dense(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, (outer.float() @ inner.float()).to(dtype))
    assert torch.equal(model[0].bias, torch.ones(40, dtype=dtype))
    assert model[0].weight.requires_grad


def test_to_dense_refuses() -> None:
    big = FactoredLinear.from_factors(torch.full((2, 1), 300.0), torch.full((1, 2), 300.0), None, dtype=torch.float16)
    model = nn.Sequential(big, nn.Linear(2, 2))
    with pytest.raises(NonFiniteError, match=r"factors of '0' is not finite in torch\.float16"):
        to_dense(model)
    with pytest.raises(ModelError, match="'1' is no factored layer; nearest: 0"):
        to_dense(model, ["1"])
    with pytest.raises(ModelError, match="LayerNorm is no linear layer"):
        dense_weight(nn.LayerNorm(2))


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_counts_tied_weights_once(family: str) -> None:
    model = tiny_model(family)
    expected = sum({parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}.values())
    assert count_parameters(model) == expected
    assert stored_bytes(model) >= 4 * expected
    head = model.get_output_embeddings().weight.numel()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    listed = sum(parameter.numel() for _, parameter in model.named_parameters(remove_duplicate=False))
    assert listed - count_parameters(model) == (head if tied else 0)


def test_counts_storages_not_parameter_objects() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(4, 3, bias=False), "c": nn.BatchNorm1d(2)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())  # another Parameter, the same memory
    assert count_parameters(model) == 12 + 4
    assert stored_bytes(model) == 4 * (12 + 4) + 4 * 4 + 8  # running mean and variance, an int64 counter
    assert count_parameters(nn.Linear(4, 3, device="meta")) == 15


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_the_pivot_form_is_the_factored_one(family: str) -> None:
    """Same rank, same output, fewer numbers; laid out, counted and made dense like any factored layer."""
    model, other = tiny_model(family).double(), tiny_model(family).double()
    plan, pivots = factorise(model, rank=9), factorise(other, rank=9, form="pivot")
    torch.testing.assert_close(output(other), output(model), rtol=0, atol=1e-5 if family == "gpt2" else 1e-9)
    assert plan.parameters - pivots.parameters == sum(matrix.rank**2 for matrix in plan.matrices)
    assert target_parameters(other, pivots) == pivots.parameters
    assert count_parameters(model) - count_parameters(other) == plan.parameters - pivots.parameters
    indices = 4 * sum(matrix.rows for matrix in plan.matrices)  # bytes, and nothing but bytes
    assert stored_bytes(other) == stored_bytes(model) - 8 * (plan.parameters - pivots.parameters) + indices
    check_applied(other, pivots)
    with pytest.raises(PlanError, match=r"in pivot form at rank 9 in the model and factored in the plan"):
        check_applied(other, plan)
    empty = tiny_model(family).double()
    apply_plan(empty, pivots)
    apply_plan(empty, pivots)  # what has the form already is left as it is
    assert {k: v.shape for k, v in empty.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    empty.load_state_dict(other.state_dict())
    assert torch.equal(output(empty), output(other))
    with pytest.raises(ModelError, match="no linear layer to factor"):
        find_targets(other)
    layers = [module for module in other.modules() if isinstance(module, PivotLinear)]
    assert len(layers) == len(plan.matrices)
    assert torch.equal(dense_weight(layers[0]), layers[0].weight)
    before = output(other)
    to_dense(other)
    assert not any(isinstance(module, FactoredLayer) for module in other.modules())
    torch.testing.assert_close(output(other), before, rtol=0, atol=1e-9)
