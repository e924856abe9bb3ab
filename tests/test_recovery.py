"""LoRA on factors: identity at the start, an exact merge, nothing else touched."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lowrank_lit.adapter_starts import adapter_starts
from lowrank_lit.errors import LowRankError, ModelError, NonFiniteError
from lowrank_lit.layers import FactoredLayer, FactoredLinear, PivotLinear
from lowrank_lit.merging import MergeRecord
from lowrank_lit.recovery import Adapters, Turns, add_adapters, factor_groups, pause
from lowrank_lit.unmerging import unmerge
from tests.tiny import batches, tiny_model

Kind = type[FactoredLinear] | type[PivotLinear]


def factored(weight: Tensor, bias: Tensor | None, rank: int, kind: Kind = FactoredLinear) -> FactoredLayer:
    """Balanced truncated SVD of a weight (out, in)."""
    u, s, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = s[:rank].sqrt()
    outer, inner = u[:, :rank] * root, root[:, None] * vt[:rank]
    return kind.from_factors(outer, inner, bias, dtype=weight.dtype, device=weight.device)


def factor_all(model: nn.Module, *, rank: int = 8, kind: Kind = FactoredLinear) -> nn.Module:
    """Replace every nn.Linear inside the blocks of a tiny model by a factored layer of the given rank."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    assert len(names) >= 4
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(
            model.get_submodule(parent), child, factored(linear.weight, linear.bias, rank, kind).train(model.training)
        )
    return model


def tiny_factored(family: str = "llama", *, rank: int = 8, kind: Kind = FactoredLinear, **overrides: Any) -> Any:
    """A tiny causal model in eval mode whose projections are all factored; qwen2 has biases on q, k and v."""
    return factor_all(tiny_model(family, **overrides), rank=rank, kind=kind)


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@torch.no_grad()
def perturb(model: nn.Module, *, size: float = 0.05) -> None:
    """Move every trainable parameter by seeded noise."""
    generator = torch.Generator().manual_seed(1)
    moved = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
            moved += 1
    assert moved > 0


@torch.no_grad()
def logits(model: Any) -> Tensor:
    output: Tensor = model(**batches(n=1)[0]).logits
    return output


def train(model: Any, steps: int, *, lr: float = 3e-3) -> list[float]:
    """Memorise one batch; returns the loss at every step."""
    batch = batches(n=1)[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_adapters_change_nothing_until_they_move(family: str) -> None:
    model = tiny_factored(family)
    before = logits(model)
    kind = type(model)
    add_adapters(model)
    assert type(model) is kind
    assert not hasattr(model, "peft_config")
    pairs = sum(isinstance(module, FactoredLinear) for module in model.modules())
    assert len(adapter_layers(model)) == 2 * pairs > 0
    assert torch.equal(logits(model), before)
    perturb(model)
    assert (logits(model) - before).abs().max() > 1e-2  # 1.1 to 4.2: the identity is not for want of effect


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", [FactoredLinear, PivotLinear])
def test_merged_model_is_the_adapted_one_in_its_old_shape(family: str, use_rslora: bool, kind: Kind) -> None:
    model = tiny_factored(family, kind=kind)
    plain = copy.deepcopy(model.state_dict())
    adapters = add_adapters(model, rank=4, alpha=8.0, use_rslora=use_rslora)
    perturb(model)
    adapted = logits(model)
    record = adapters.merge()
    assert (logits(model) - adapted).abs().max() < 1e-4  # 6e-6
    assert not adapter_layers(model)
    after = model.state_dict()
    assert list(after) == list(plain)
    for name, value in after.items():
        assert value.shape == plain[name].shape, name
        assert value.dtype == plain[name].dtype, name
        is_factor = name.endswith(("inner.weight", "outer.weight"))
        assert torch.equal(value, plain[name]) != is_factor, name  # factors moved, all else is the same to the last bit
    for module in model.modules():
        if isinstance(module, FactoredLayer):
            assert type(module) is kind
            assert type(module.inner) is nn.Linear
            assert type(module.outer) is nn.Linear
            assert int(torch.linalg.matrix_rank(module.weight.detach().double(), rtol=1e-6)) <= module.rank
    assert record.factor_parameters_before == record.factor_parameters_after
    assert record is adapters.merged
    assert record.pairs == adapters.record["pairs"]
    assert record.largest_output_difference < 1e-5  # 1e-6
    assert 0 < record.smallest_update <= record.median_update <= record.largest_update


def test_merge_adds_the_scaled_product_to_each_factor() -> None:
    pair = FactoredLinear(12, 20, 6, bias=True, dtype=torch.float64)
    outer, inner = pair.outer.weight.detach().clone(), pair.inner.weight.detach().clone()
    assert pair.bias is not None
    bias = pair.bias.detach().clone()
    model = nn.Sequential(pair)
    adapters = add_adapters(model, rank=2, alpha=5.0)
    perturb(model, size=0.3)
    values = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    assert len(values) == 4
    record = adapters.merge()
    expected = {}
    for factor, old in (("inner", inner), ("outer", outer)):
        a, b = (values[f"0.{factor}.lora_{letter}.recovery.weight"].double() for letter in "AB")
        expected[factor] = old + 5.0 / 2 * b @ a
        torch.testing.assert_close(getattr(pair, factor).weight.detach(), expected[factor], rtol=0, atol=1e-12)  # 0
    assert torch.equal(pair.bias.detach(), bias)
    product, new = outer @ inner, expected["outer"] @ expected["inner"]
    assert record.median_update == pytest.approx(float((new - product).norm() / product.norm()), rel=1e-10)


def test_merging_a_pivot_form_measures_the_update_of_its_weight() -> None:
    model = nn.Sequential(factored(torch.randn(20, 12, dtype=torch.float64), torch.randn(20), 6, PivotLinear))
    layer: Any = model[0]
    assert isinstance(layer, PivotLinear)
    before, positions, bias = layer.weight.detach().clone(), layer.positions.clone(), layer.bias
    adapters = add_adapters(model, rank=2, alpha=5.0)
    assert adapters.record["factor_parameters"] == 6 * (20 + 12 - 6) + 20
    perturb(model, size=0.3)
    x = torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        adapted = model(x)
        record = adapters.merge()
        torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-9)
        after = layer.weight
    assert record.median_update == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-9)
    assert record.median_update > 0.1
    assert torch.equal(layer.positions, positions)
    assert layer.bias is bias
    assert int(torch.linalg.matrix_rank(after, rtol=1e-9)) == 6


def test_an_adapter_is_smaller_than_its_factor_in_pivot_form_too() -> None:
    """At rank 6 of 9 rows the coefficients are (3, 6): rank 5 for the pivot rows, 2 for them."""
    model = nn.Sequential(factored(torch.randn(9, 12), None, 6, PivotLinear))
    adapters = add_adapters(model)
    ranks = {name: parameter.shape[0] for name, parameter in model.named_parameters() if "lora_A" in name}
    assert ranks == {"0.inner.lora_A.recovery.weight": 5, "0.outer.lora_A.recovery.weight": 2}
    assert adapters.record["clamped"] == {"0": 2}


def test_training_lowers_the_loss_and_touches_adapters_alone() -> None:
    model = tiny_factored(num_hidden_layers=1).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = add_adapters(model, rank=4)
    losses = train(model, 20)
    assert losses[-1] < 0.5 * losses[0]  # 13.0 -> 4.2
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
            assert parameter.grad is None, name
    adapted = logits(model)
    adapters.merge()
    assert (logits(model) - adapted).abs().max() < 1e-4  # 1e-5
    assert model.training


def test_requires_grad_comes_back_as_it_was() -> None:
    model = tiny_factored("qwen2")
    frozen = [name for index, (name, _) in enumerate(model.named_parameters()) if index % 3 == 0]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    identities = {name: id(p) for name, p in model.named_parameters()}
    adapters = add_adapters(model)
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert adapters.trainable_parameters == sum(trainable.values())
    adapters.merge()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert {name: id(p) for name, p in model.named_parameters()} == identities


@pytest.mark.parametrize(("rank", "adapter", "expected"), [(4, 8, 3), (4, 4, 3), (4, 3, 3), (1, 8, 1)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_adapter_rank_stays_below_the_layer_and_its_scale_as_asked(
    rank: int, adapter: int, expected: int, use_rslora: bool
) -> None:
    small, large = FactoredLinear(16, 24, rank), FactoredLinear(16, 24, 12)
    # Twelve layers: what is set for '1.inner' must not reach '11.inner'.
    model = nn.ModuleList(
        [large if index != 1 else small for index in range(2)] + [FactoredLinear(16, 24, 12) for _ in range(10)]
    )
    adapters = add_adapters(model, rank=adapter, alpha=16.0, use_rslora=use_rslora)
    assert adapters.rank == adapter
    assert adapters.record["clamped"] == ({} if expected == adapter else {"1": expected})
    scale = 16.0 / (adapter**0.5 if use_rslora else adapter)
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            assert module.r["recovery"] == (expected if name.startswith("1.") else adapter), name
            assert module.scaling["recovery"] == pytest.approx(scale, rel=1e-12), name
    perturb(model)
    inputs = torch.randn(5, 16)
    adapted = small(inputs).detach()
    adapters.merge()
    assert (small(inputs) - adapted).abs().max() < 1e-5  # 2e-7


class Block(nn.Module):
    """No transformers model: names with regex characters in them, a layer used twice, an unfactored layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = FactoredLinear(8, 20, 5, bias=True)
        self.up_projX = nn.Linear(20, 8)
        self.experts = nn.ModuleDict({"a+b": FactoredLinear(8, 8, 4, bias=False)})
        self.again = self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        y = self.up_projX(torch.relu(self.up_proj(x))) + self.again(x)[..., :8]
        return self.experts["a+b"](y)  # type: ignore[no-any-return]


def test_any_module_is_adapted_and_a_layer_used_twice_only_once() -> None:
    model = Block()
    keys = list(model.state_dict())
    inputs = torch.randn(3, 8)
    before = model(inputs).detach()
    adapters = add_adapters(model, rank=2)
    assert adapters.record["pairs"] == 2
    assert adapters.record["adapters"] == 4
    assert torch.equal(model(inputs), before)
    perturb(model)
    adapted = model(inputs).detach()
    assert (adapted - before).abs().max() > 1e-2  # 0.6
    adapters.merge()
    assert model.again is model.up_proj
    assert list(model.state_dict()) == keys
    assert (model(inputs) - adapted).abs().max() < 1e-5  # 6e-8


def test_a_factored_layer_by_itself() -> None:
    model = FactoredLinear(8, 8, 4)
    adapters = add_adapters(model, rank=2)
    perturb(model)
    inputs = torch.randn(3, 8)
    adapted = model(inputs).detach()
    assert adapters.merge().worst_pair == ""
    assert (model(inputs) - adapted).abs().max() < 1e-5  # 1e-7


def test_dropout_acts_in_train_mode_and_not_in_a_merge() -> None:
    model = tiny_factored()
    adapters = add_adapters(model, rank=4, dropout=0.5)
    perturb(model)
    adapted = logits(model)
    assert torch.equal(logits(model), adapted)  # eval mode reaches the new layers
    model.train()
    assert not torch.equal(logits(model), logits(model))
    modes = {name: module.training for name, module in model.named_modules() if "lora" not in name}
    record = adapters.merge()
    assert record.largest_output_difference < 1e-5  # 8e-7
    assert all(module.training == modes[name] for name, module in model.named_modules())
    assert (logits(model.eval()) - adapted).abs().max() < 1e-4  # 6e-6


def test_bfloat16_factors_have_float32_adapters_and_stay_bfloat16() -> None:
    model = tiny_factored(num_hidden_layers=1).to(torch.bfloat16)
    adapters = add_adapters(model, rank=4)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train(model, 8)
    assert losses[-1] < losses[0] - 2  # 13.0 -> 9.2
    adapted = logits(model).float()
    record = adapters.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    # What rounding the factors to 8 bits costs; merged in float32 it would be 1e-7.
    assert 1e-4 < record.largest_relative_difference < 1e-2  # 2.5e-3
    assert (logits(model).float() - adapted).norm() / adapted.norm() < 0.05  # 0.01


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_reaches_every_adapter(use_reentrant: bool) -> None:
    model = tiny_factored().train()
    batch = batches(n=1)[0]
    add_adapters(model, rank=4)
    perturb(model)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        assert len(found) == sum(p.requires_grad for p in model.parameters()) > 0
        return found

    expected = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)  # 0


def test_merge_measures_on_the_inputs_given() -> None:
    model = nn.Sequential(FactoredLinear(8, 8, 4).to(torch.bfloat16))
    adapters = add_adapters(model, rank=2)
    perturb(model)
    again, handle = copy.deepcopy((model, adapters))
    small = adapters.merge(probe={"0": torch.full((3, 8), 1e-3)})
    large = handle.merge(probe={"0": torch.full((3, 8), 1e3)})
    assert isinstance(again[0].inner, nn.Linear)
    assert 0 < 1e5 * small.largest_output_difference < large.largest_output_difference
    assert small.largest_relative_difference == pytest.approx(large.largest_relative_difference, rel=1)
    assert MergeRecord(**small.to_dict()) == small


def broken(value: float) -> tuple[Any, Adapters, str]:
    """A model of which one adapter in the middle holds a value."""
    model = tiny_factored()
    adapters = add_adapters(model)
    perturb(model)
    name = "model.layers.1.mlp.down_proj.outer"
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.lora_B["recovery"].weight[0, 0] = value
    return model, adapters, name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_merge_that_is_not_finite_names_the_layer_and_writes_nothing(value: float) -> None:
    model, adapters, name = broken(value)
    with torch.no_grad():
        model.get_submodule(name).lora_A["recovery"].weight.fill_(100.0)  # 1e38 is finite, its product is not
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        adapters.merge()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before)
    assert len(adapter_layers(model)) == 28
    assert not any(layer.merged for layer in adapter_layers(model))
    with torch.no_grad():
        model.get_submodule(name).lora_B["recovery"].weight.zero_()
    assert adapters.merge().pairs == 14


def test_a_second_merge_and_a_second_adapter_are_refused() -> None:
    model = tiny_factored()
    adapters = add_adapters(model)
    with pytest.raises(ModelError, match="has an adapter already"):
        add_adapters(model)
    adapters.merge()
    with pytest.raises(ModelError, match="merged already"):
        adapters.merge()
    again = add_adapters(model)
    assert again.merge().largest_update == 0


def test_a_layer_replaced_under_its_adapters_is_refused() -> None:
    model = nn.Sequential(FactoredLinear(8, 8, 4))
    adapters = add_adapters(model, rank=2)
    model.get_parameter("0.inner.base_layer.weight").data = torch.zeros(
        0
    )  # how a partitioned weight looks on one process
    with pytest.raises(
        ModelError, match=r"layer '0\.inner' is a Linear with a weight of shape \(0,\) instead of the factor \(4, 8\)"
    ):
        adapters.merge()


def test_nothing_to_adapt_is_an_error() -> None:
    with pytest.raises(ModelError, match="Sequential has no factored layer to adapt; compress it first"):
        add_adapters(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("setting", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(LowRankError, match=next(iter(setting))):
        add_adapters(nn.Sequential(FactoredLinear(4, 4, 2)), **setting)


def test_shared_and_quantised_factors_are_refused() -> None:
    first, second = FactoredLinear(8, 8, 4), FactoredLinear(8, 8, 4)
    second.inner = first.inner
    with pytest.raises(ModelError, match=r"'0\.inner' is shared"):
        add_adapters(nn.Sequential(first, second))
    second.inner = nn.Linear(8, 4, bias=False)
    second.inner.weight = first.inner.weight
    with pytest.raises(ModelError, match=r"'0\.inner' is shared"):
        add_adapters(nn.Sequential(first, second))
    packed = FactoredLinear(8, 8, 4)
    packed.outer.weight = nn.Parameter(torch.zeros(8, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"'0\.outer' is a Linear without real weights"):
        add_adapters(nn.Sequential(packed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["nowhere"]}, "matches no layer"),
        ({"target_modules": ["lm_head", "inner"]}, "matches 'lm_head', which is no factor"),
        ({"target_modules": r".*\.q_proj"}, r"matches 'model\.layers\.0\.self_attn\.q_proj', which is no factor"),
        ({"target_modules": ["inner"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["inner"], "bias": "all"}, "bias"),
    ],
)
def test_a_configuration_that_reaches_elsewhere_is_refused(settings: dict[str, Any], message: str) -> None:
    model = tiny_factored()
    with pytest.raises(ModelError, match=message):
        add_adapters(model, config=peft.LoraConfig(**settings))
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_configuration_that_peft_refuses_leaves_the_model_as_it_was() -> None:
    model = tiny_factored()
    children = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=r"PEFT refuses it .*no_such_initialisation"):
        add_adapters(model, config=peft.LoraConfig(r=4, init_lora_weights="no_such_initialisation"))  # type: ignore[arg-type]
    assert {name: id(module) for name, module in model.named_modules()} == children
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ModelError, match="PromptTuningConfig adapts no layers"):
        add_adapters(model, config=peft.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ModelError, match="AdaLoraConfig moves ranks by calls that no callback makes"):
        add_adapters(model, config=peft.AdaLoraConfig(total_step=10))


def test_a_configuration_may_choose_among_the_factors() -> None:
    model = tiny_factored()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["outer"], rank_pattern={r"q_proj\.outer": 20}, exclude_modules=["x"]
    )
    given = copy.deepcopy(config)
    adapters = add_adapters(model, config=config)
    assert config == given
    assert {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    } == {"outer"}
    assert adapters.record["adapters"] == 14
    assert adapters.record["clamped"] == {f"model.layers.{layer}.self_attn.q_proj": 7 for layer in range(2)}
    perturb(model)
    adapted = logits(model)
    adapters.merge()
    assert (logits(model) - adapted).abs().max() < 1e-4  # 3e-6


METHODS: dict[str, dict[str, Any]] = {
    "dora": {"class_path": "LoraConfig", "init_args": {"r": 4, "use_dora": True}},
    "pissa": {"class_path": "LoraConfig", "init_args": {"r": 4, "init_lora_weights": "pissa"}},
    "olora": {"class_path": "LoraConfig", "init_args": {"r": 4, "init_lora_weights": "olora"}},
    "eva": {
        "class_path": "peft.LoraConfig",
        "init_args": {
            "r": 4,
            "init_lora_weights": "eva",
            "eva_config": {"class_path": "EvaConfig", "init_args": {"rho": 1.5}},
        },
    },
    "corda": {
        "class_path": "LoraConfig",
        "init_args": {
            "r": 4,
            "init_lora_weights": "corda",
            "corda_config": {"class_path": "CordaConfig", "init_args": {"corda_method": "kpm"}},
        },
    },
    "miss": {"class_path": "MissConfig", "init_args": {"r": 4}},
}
DATA = {"eva", "corda"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_methods_of_peft_train_merge_keep_the_rank_and_are_taken_back(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_factored(num_hidden_layers=1).to(dtype)
    plain, before, keys = copy.deepcopy(model.state_dict()), logits(model).float(), list(model.state_dict())
    config = METHODS[method]
    starts = adapter_starts(model, config, batches=batches(n=8)) if method in DATA else None
    adapters = add_adapters(model, config=config, starts=starts)
    identity = 1e-4 if dtype == torch.float32 else 0.1  # 4e-6 and 0.05, where the factor's residual is rounded
    torch.testing.assert_close(logits(model).float(), before, rtol=0, atol=identity)
    losses = train(model, 3)
    assert losses[-1] < losses[0] - 0.1
    adapted = logits(model).float()
    record = adapters.merge(unmerge_record=tmp_path)
    assert record.smallest_update > 0
    assert (logits(model).float() - adapted).norm() / adapted.norm() < (1e-5 if dtype == torch.float32 else 0.05)
    assert list(model.state_dict()) == keys
    for module in model.modules():
        if isinstance(module, FactoredLayer):
            assert type(module.inner) is type(module.outer) is nn.Linear
            weight = module.outer.weight.detach().double() @ module.inner.weight.detach().double()
            assert int(torch.linalg.matrix_rank(weight, rtol=1e-9)) == module.rank == 8
            assert not hasattr(module.inner, "eigens")
    assert unmerge(model, tmp_path) == 2 * record.pairs
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_the_record_of_adapters_makes_them_again(method: str) -> None:
    """What a checkpoint needs: names and shapes from plain values, weights from the checkpoint."""
    model = tiny_factored(num_hidden_layers=1)
    starts = adapter_starts(model, METHODS[method], batches=batches(n=4)) if method in DATA else None
    adapters = add_adapters(model, config=METHODS[method], starts=starts)
    perturb(model, size=0.01)
    again = tiny_factored(num_hidden_layers=1, seed=1)
    handle = add_adapters(again, **json.loads(json.dumps(adapters.settings)))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-6)
    adapted = logits(again)
    handle.merge()
    assert (logits(again) - adapted).abs().max() < 1e-4


def test_a_refused_method_leaves_factors_that_it_had_rewritten_as_they_were() -> None:
    """PiSSA splits the first factors, and then stumbles over a float64 one."""
    model = nn.Sequential(FactoredLinear(8, 8, 4), FactoredLinear(8, 8, 4, dtype=torch.float64))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="PEFT refuses it for these factors"):
        add_adapters(model, config=peft.LoraConfig(r=2, init_lora_weights="pissa"))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_rank_below_no_factor_is_refused_where_it_was_asked_for() -> None:
    model = nn.Sequential(FactoredLinear(16, 24, 6), FactoredLinear(16, 24, 4))
    with pytest.raises(LowRankError, match=r"adapter rank 6 is not below .* any factor, of which the largest is 6"):
        add_adapters(model, rank=6)
    with pytest.raises(LowRankError, match="choose 5 or less"):
        add_adapters(model, config=peft.LoraConfig())
    assert not adapter_layers(model)
    assert add_adapters(model, rank=5).record["clamped"] == {"1": 3}
    model = nn.Sequential(FactoredLinear(16, 24, 6), FactoredLinear(16, 24, 4))
    assert add_adapters(model).record["clamped"] == {"0": 5, "1": 3}  # nobody asked for 8


@pytest.mark.parametrize("factor", ["inner", "outer"])
def test_one_factor_alone(factor: str) -> None:
    model = nn.Sequential(FactoredLinear(16, 24, 6))
    adapters = add_adapters(model, rank=2, factors=[factor])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"0.{factor}.lora_{letter}.recovery.weight" for letter in "AB"
    }
    assert len(adapters.parameters(factor)) == 2
    perturb(model)
    adapters.merge()
    with pytest.raises(LowRankError, match="choose inner, outer or both"):
        add_adapters(model, rank=2, factors=["up"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_path": "os.system", "init_args": {"r": 2}}, "'os.system' is no configuration of PEFT"),
        ({"class_path": "LoraModel"}, "'LoraModel' is no configuration of PEFT"),
        ({"class_path": "LoraConfig", "init_args": {"rnk": 2}}, "LoraConfig refuses its init_args .*rnk"),
        ({"class_path": "LoraConfig", "r": 2}, "unknown key 'r'"),
        ({"class_path": "LoraConfig", "init_args": {"r": 2, "init_lora_weights": "eva"}}, "give starts=adapter_starts"),
    ],
)
def test_plain_configurations_are_checked(config: dict[str, Any], message: str) -> None:
    model = nn.Sequential(FactoredLinear(16, 24, 6))
    with pytest.raises(ModelError, match=message):
        add_adapters(model, config=config)
    assert not adapter_layers(model)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD], ids=["adamw", "sgd"])
def test_turns_are_pauses_that_need_no_gradient_dropped(kind: Any) -> None:
    """The same values and norms, by moments that did not move, and each moves one factor at a time."""
    ends = []
    for by_turns in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(FactoredLinear(8, 8, 4), nn.Linear(8, 8))
        adapters = add_adapters(model, rank=2)
        perturb(model)
        groups = factor_groups(model)
        assert [group["factor"] for group in groups] == ["inner", "outer"]
        assert sum(p.numel() for group in groups for p in group["params"]) == adapters.trainable_parameters
        optimizer = kind(groups, lr=0.1, weight_decay=0.1)
        own = {factor: adapters.parameters(factor) for factor in ("inner", "outer")}
        turns = Turns(SimpleNamespace(optimizer=optimizer), own) if by_turns else None
        values = {factor: [p.detach().clone() for p in own[factor]] for factor in own}
        for paused, moved in (("inner", "outer"), ("outer", "inner")):
            for _ in range(3):
                optimizer.zero_grad()
                if turns is not None:
                    turns.paused = paused
                model(torch.ones(3, 8)).square().sum().backward()
                if turns is None:
                    pause(own[paused])
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                assert norm > 1
                optimizer.step()
                assert [len(group["params"]) for group in optimizer.param_groups] == [len(own[f]) for f in own]
            for factor in (paused, moved):
                same = [torch.equal(p, v) for p, v in zip(own[factor], values[factor], strict=True)]
                assert all(same) if factor == paused else not any(same)
                values[factor] = [p.detach().clone() for p in own[factor]]
        ends.append([*values["inner"], *values["outer"], norm])
        if turns is not None:
            turns.end()
            model(torch.ones(3, 8)).square().sum().backward()
            optimizer.step()
            assert not any(torch.equal(p, v) for f in own for p, v in zip(own[f], values[f], strict=True))
    for one, other in zip(*ends, strict=True):  # norms are summed in another order
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
