"""The whole path from a dense model to a factored one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowrank_lit import FactoredLinear, compress, perplexity, plan_ranks
from lowrank_lit.compress import Settings, fingerprint
from lowrank_lit.errors import BudgetError, LowRankError, ModelError, NonFiniteError
from lowrank_lit.hub import export
from lowrank_lit.spectrum import compute_spectrum
from lowrank_lit.surgery import count_parameters, dense_weight, find_targets, replace_module
from tests.tiny import batches, tiny_model

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox", "phi", "opt", "gpt2", "gemma2")


@pytest.fixture(autouse=True)
def _few_tokens_are_fine() -> None:
    warnings.filterwarnings("ignore", message="calibration has")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_factors_give_the_original_logits(family: str) -> None:
    model = tiny_model(family).double()
    batch = batches(n=1)[0]
    with torch.no_grad():
        expected = model(**batch).logits
        for name, target in find_targets(model).items():
            weight = dense_weight(target.module)
            spectrum = compute_spectrum(weight, None, metric="identity", name=name)
            outer, inner = spectrum.factors(weight, min(weight.shape))
            bias = target.module.bias
            replace_module(model, target, FactoredLinear.from_factors(outer, inner, bias))
        assert sum(isinstance(module, FactoredLinear) for module in model.modules()) >= 8
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allocator", ["uniform", "unirank"])
def test_the_budget_is_kept_to_the_last_parameter(family: str, allocator: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    dense = count_parameters(model)
    result = compress(model, batches(structured=True), keep_ratio=0.6, allocator=allocator, min_rank=2)
    plan = result.plan
    assert plan.keep_ratio <= 0.6
    steps = [m.rows + m.columns for m in plan.matrices if m.form == "factored"]
    assert 0.6 * plan.dense_parameters - plan.parameters < min(steps)
    export(model, plan, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    factored = {m.name for m in plan.matrices if m.form == "factored"}
    numbers = 0
    for key, tensor in saved.items():
        owner = key.removesuffix(".weight")
        pair = owner.removesuffix(".outer").removesuffix(".inner")
        is_target = any(m.name in (owner, pair) for m in plan.matrices) and key.endswith(".weight")
        numbers += tensor.numel() if is_target else 0
    assert factored
    assert numbers == plan.parameters == result.record["parameters"]["targets"]
    assert sum(t.numel() for t in saved.values()) == count_parameters(model) == result.record["parameters"]["model"]
    assert result.record["keep_ratio"]["whole_model"] == pytest.approx(count_parameters(model) / dense)


@pytest.mark.parametrize("metric", ["identity", "input"])
@pytest.mark.parametrize("allocator", ["uniform", "unirank"])
def test_more_budget_is_a_closer_model(metric: str, allocator: str) -> None:
    data = batches(structured=True, n=6)
    reference = tiny_model("llama")
    with torch.no_grad():
        expected = reference(**data[0]).logits
    errors = []
    for keep_ratio in (0.3, 0.6, 0.9, 1.0):
        model = copy.deepcopy(reference)
        compress(model, data, keep_ratio=keep_ratio, metric=metric, allocator=allocator, min_rank=1)
        with torch.no_grad():
            errors.append(float((model(**data[0]).logits - expected).norm() / expected.norm()))
    assert errors[0] > errors[1] > errors[2] > errors[3] == 0


def test_a_plan_alone_leaves_the_model_alone_and_is_what_compress_follows() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    plan = plan_ranks(model, batches(), keep_ratio=0.5, min_rank=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert compress(model, batches(), keep_ratio=0.5, min_rank=2).plan == plan


def test_fingerprint_changes_with_weights_data_and_settings() -> None:
    model, data = tiny_model("llama"), batches()
    base = fingerprint(model, data, Settings(0.5))
    assert base == fingerprint(copy.deepcopy(model), batches(), Settings(0.5))
    assert base != fingerprint(model, batches(seed=1), Settings(0.5))
    assert base != fingerprint(model, data, Settings(0.6))
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert base != fingerprint(model, data, Settings(0.5))


def test_gradients_dtype_and_bias_follow_the_dense_layer() -> None:
    model = tiny_model("qwen2").bfloat16()
    model.requires_grad_(False)
    bias = model.model.layers[0].self_attn.q_proj.bias.clone()
    compress(model, batches(), keep_ratio=0.4, min_rank=2)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, FactoredLinear)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.outer.bias, bias)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_errors_come_first_and_leave_the_model() -> None:
    model, data = tiny_model("llama"), batches()
    kinds = [type(module) for module in model.modules()]
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(BudgetError, match=r"keep_ratio=1\.5 is outside"):
        compress(model, data, keep_ratio=1.5)
    with pytest.raises(BudgetError, match="raise keep_ratio to at least"):
        compress(model, data, keep_ratio=0.1)  # the default floor of 8 is much for width 32
    with pytest.raises(ModelError, match=r"\*\.q_prj"):
        compress(model, data, keep_ratio=0.6, targets=["*.q_prj"])
    with pytest.raises(LowRankError, match="metric='plain' is unknown"):
        compress(model, data, keep_ratio=0.6, metric="plain")
    with pytest.raises(LowRankError, match=r"damping=2 is outside \[0, 1\]"):
        compress(model, data, keep_ratio=0.6, damping=2)
    assert not calls  # nothing was run before the settings were checked
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.down_proj"):
        compress(model, data, keep_ratio=0.6, min_rank=2)
    assert [type(module) for module in model.modules()] == kinds


def test_few_tokens_are_a_warning_with_the_number_needed() -> None:
    with pytest.warns(UserWarning, match=r"calibration has 4 tokens.*give at least \d+ tokens") as caught:
        result = compress(tiny_model("llama"), batches(n=1, batch=1, length=4), keep_ratio=0.6, min_rank=2)
    assert any("calibration has 4 tokens" in str(item.message) for item in caught)
    assert any("calibration has 4 tokens" in note for note in result.record["notes"])


def test_published_figures_of_the_reference_model(reference: Path) -> None:
    """WikiText-2 test perplexity of the small reference Llama: 39.16 dense, 64.1 at keep ratio 0.6 with unirank."""
    from lowrank_lit import LowRankModule, TextDataModule

    sources = {split: str(reference / "text" / "wikitext2" / f"wiki.{split}.txt") for split in ("train", "test")}
    path = str(reference / "models" / "wiki-llama-3m")
    data = TextDataModule(sources, path)
    module = LowRankModule(path)
    module.configure_model()
    blocks = data.evaluation("test")
    assert perplexity(module.model, blocks) == pytest.approx(39.16, rel=1e-3)
    compress(module.model, data.calibration_batches(), keep_ratio=0.6)
    assert perplexity(module.model, blocks) < 64.1 * 1.03
