"""Mixtures of experts: fused parameters as targets one by one, by routed tokens, shrunk to the block's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM

import lowrank_lit
from lowrank_lit import add_adapters, compress, export, load, plan_ranks, quantize_factors, refine_blocks
from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.calibration import calibrate
from lowrank_lit.collection import Collection
from lowrank_lit.compress import fingerprint, settings_of
from lowrank_lit.errors import DataError, ModelError
from lowrank_lit.evidence import places_of, profiles_of, specs_of
from lowrank_lit.experts import ExpertsApart, SeparateExperts, separate_experts
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.pooling import SMOOTHING, pool_experts, pooled_weight
from lowrank_lit.settings import Settings
from lowrank_lit.statistics import LayerStatistics
from lowrank_lit.surgery import dense_weight, find_targets
from tests.tiny import batches, randomise, tiny_model

FAMILIES = ("mixtral", "qwen3_moe")
DATA = batches(n=6, batch=2, length=32, structured=True)
PADDED = batches(n=4, batch=3, length=24, padding=True, structured=True)
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
FAST: dict[str, Any] = {"preset": "unirank", "min_rank": 2}


def moe(family: str, **overrides: Any) -> PreTrainedModel:
    """A tiny mixture whose fused experts run in the form that ours are compared with."""
    return tiny_model(family, **overrides)


def gpt_oss() -> PreTrainedModel:
    """Experts that are transposed, interleaved and have biases."""
    config = GptOssConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        pad_token_id=0,
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config)
    randomise(model)
    model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor] = DATA[0]) -> Tensor:
    result: Tensor = model(**batch).logits
    return result


def experts_in(model: nn.Module) -> list[SeparateExperts]:
    return [module for module in model.modules() if isinstance(module, SeparateExperts)]


# Separate experts compute what the fused ones do


@pytest.mark.parametrize("build", [*(lambda f=f: moe(f) for f in FAMILIES), gpt_oss], ids=[*FAMILIES, "gpt_oss"])
def test_separate_experts_are_the_same_map(build: Any) -> None:
    model = build()
    expected = logits(model)
    fused = separate_experts(model)
    assert len(fused) == 2 == len(experts_in(model))

    def same(one: Tensor, other: Tensor) -> None:
        """To the last bit, but where a transposed weight is multiplied by another kernel: 2.4e-7 there."""
        tolerance = 2e-6 if build is gpt_oss else 0.0
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)

    same(logits(model), expected)
    model.train()  # where all experts run, also those without tokens
    same(logits(model), expected)
    parameters = list(model.parameters())
    model(**DATA[0]).logits.square().mean().backward()
    own = [p for module in experts_in(model) for p in module.parameters()]
    assert all(p.grad is not None for p in own), "DDP and ZeRO wait for a gradient of every parameter"
    assert {id(p) for p in own} < {id(p) for p in parameters}


def test_weights_are_views_until_they_are_factored() -> None:
    model = moe("mixtral")
    fused = model.model.layers[0].mlp.experts
    separate_experts(model)
    assert model.model.layers[0].mlp.experts.expert(1).down.weight.data_ptr() == fused.down_proj[1].data_ptr()


def test_gradients_are_those_of_the_fused_module() -> None:
    model, other = moe("qwen3_moe").double(), moe("qwen3_moe").double()
    separate_experts(other)
    for net in (model, other):
        net(**DATA[0]).logits.square().mean().backward()
    fused = model.model.layers[1].mlp.experts.down_proj.grad
    own = [layer.down.weight.grad for layer in (other.model.layers[1].mlp.experts.expert(n) for n in range(6))]
    for number, gradient in enumerate(own):
        wanted = fused[number]
        assert torch.allclose(
            torch.zeros_like(wanted) if gradient is None else gradient, wanted, rtol=1e-10, atol=1e-14
        )
    assert sum(gradient is not None for gradient in own) >= 3


def test_a_context_leaves_the_model_as_it_was() -> None:
    model = moe("mixtral")
    names, experts = set(model.state_dict()), model.model.layers[0].mlp.experts
    seen = []
    experts.register_forward_hook(lambda *_: seen.append(1))
    with ExpertsApart(model) as apart:
        assert set(model.state_dict()) != names
        logits(model)
        assert seen == [1], "a user's hook works on"
        with apart.undone():
            assert set(model.state_dict()) == names
        assert experts_in(model)
    assert model.model.layers[0].mlp.experts is experts

    def fail() -> None:
        with ExpertsApart(model) as kept:
            kept.keep(["model.layers.0.mlp.experts.0.down"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(model.state_dict()) == names


def test_routers_stay_dense() -> None:
    model = moe("mixtral")
    block = model.model.layers[0].mlp
    block.gate.linear = nn.Linear(32, 4)  # where a family has its router as a layer
    block.other = nn.Linear(32, 6)
    names = set(find_targets(model))
    separate_experts(model)
    found = set(find_targets(model))
    assert "model.layers.0.mlp.other" in found
    block.router = nn.Linear(32, 4)
    assert "model.layers.0.mlp.router" not in find_targets(model)
    assert not any(name.endswith("mlp.gate") for name in found)
    assert {name.rpartition(".")[2] for name in found - names} == {"gate_up", "down"}


# Statistics


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("streamed", [True, False])
def test_moments_are_of_routed_real_tokens(family: str, streamed: bool) -> None:
    """Against the inputs that a fused forward gathers by hand, padding left out."""
    model = moe(family).double()
    captured: dict[int, list[Tensor]] = {}
    experts = model.model.layers[1].mlp.experts
    mask: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden, chosen, _ = args
        for number in range(experts.num_experts):
            rows = (chosen == number).any(-1) & mask[0].bool().reshape(-1)
            captured.setdefault(number, []).append(hidden[rows].detach())

    handle = experts.register_forward_pre_hook(hook)
    for batch in PADDED:
        mask[:] = [batch["attention_mask"]]
        logits(model, batch)
    handle.remove()
    separate_experts(model)
    layers = {name: target.module for name, target in find_targets(model).items()}
    chosen = layers if streamed else {**layers, "lm_head": model.lm_head}
    moments = frozenset({"input_full"})
    found = calibrate(model, PADDED, chosen, weight_of=dense_weight, moments=moments, importance=True)
    assert found.mode == ("blocks" if streamed else "whole")
    total = sum(int(batch["attention_mask"].sum()) for batch in PADDED)
    assert found.tokens == total
    every = torch.cat([x for parts in captured.values() for x in parts])
    pool = every.T @ every / len(every)
    assert len(every) == 2 * total
    for number, parts in captured.items():
        x = torch.cat(parts)
        entry = found.statistics[f"model.layers.1.mlp.experts.{number}.gate_up"]
        assert entry.tokens == len(x)
        share = 32 / (32 + 16 * len(x))
        assert share == pytest.approx(pooled_weight(32, len(x)))
        own = x.T @ x / max(1, len(x))
        torch.testing.assert_close(entry.input_moment, (1 - share) * own + share * pool, rtol=1e-9, atol=1e-12)
        mean = 2 * total / len(captured)
        expected = ((1 - SMOOTHING) * len(x) + SMOOTHING * mean) / total
        assert entry.frequency == pytest.approx(expected)
    assert sum(e.frequency or 0 for n, e in found.statistics.items() if "layers.1" in n) == pytest.approx(2 * 2)
    importance = {found.importance[name] for name in layers if "layers.1.mlp.experts" in name}
    assert len(importance) == 1


def test_gradient_moments_leave_padding_out() -> None:
    """With padding in a batch, and with the same sequences one by one without any."""
    model = moe("mixtral").double()
    separate_experts(model)
    layers = {name: target.module for name, target in find_targets(model).items()}
    moments = frozenset({"input", "gradient"})
    padded = calibrate(model, PADDED, layers, weight_of=dense_weight, moments=moments, importance=False)
    rows = [
        {"input_ids": ids[: int(mask.sum())][None]}
        for batch in PADDED
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    plain = calibrate(model, rows, layers, weight_of=dense_weight, moments=moments, importance=False)
    for name, entry in plain.statistics.items():
        other = padded.statistics[name]
        assert other.tokens == entry.tokens
        for field in ("input_moment", "output_moment", "gradient_moment", "pulled_moment"):
            one, two = getattr(entry, field), getattr(other, field)
            assert (one is None) == (two is None)
            if one is not None:
                difference = float((two - one).norm() / one.norm())
                assert difference < 1e-5, (name, field, difference)  # norms and routers compute in float32: 3e-7


def statistics(tokens: int, moment: Tensor | None = None, **fields: Any) -> LayerStatistics:
    energy = 0.0 if moment is None else float(moment.trace())
    return LayerStatistics(tokens, input_energy=energy, input_moment=moment, **fields)


def test_pooling_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    parts = {"a": x[:30], "b": x[30:], "c": x[:0]}
    own = {
        name: statistics(len(part), part.T @ part / len(part) if len(part) else None) for name, part in parts.items()
    }
    shapes = dict.fromkeys(own, (6, 4))
    up = pool_experts(own, "up", shapes, lambda name: torch.zeros(6, 4), inputs=None, tokens=20)
    whole = x.T @ x / 40
    torch.testing.assert_close(up["c"].input_moment, whole, rtol=1e-12, atol=0)
    blended = (160 * own["b"].input_moment + 4 * whole) / 164
    torch.testing.assert_close(up["b"].input_moment, blended, rtol=1e-12, atol=0)
    assert all(entry.input_energy == pytest.approx(float(entry.input_moment.trace())) for entry in up.values())
    assert sum(entry.frequency for entry in up.values()) == pytest.approx(40 / 20)
    down = pool_experts(own, "down", shapes, lambda name: torch.zeros(6, 4), inputs=None, tokens=20)
    torch.testing.assert_close(
        down["c"].input_moment, torch.eye(4, dtype=torch.float64) * whole.trace() / 4, rtol=1e-12, atol=0
    )


def test_pooled_outputs_are_those_of_pooled_inputs() -> None:
    """A moment of the outputs and one of the inputs say the same of ``W R W^T`` of the pool."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    weights = {name: torch.randn(3, 6, generator=generator, dtype=torch.float64) for name in "ab"}
    own = {}
    for name, part in (("a", x), ("b", x[:0])):
        y = part @ weights[name].T
        moment = y.T @ y / len(y) if len(y) else None
        energy = float(part.square().sum() / max(1, len(part)))
        own[name] = LayerStatistics(len(part), input_energy=energy, output_moment=moment)
    inputs = x.T @ x / 50
    shapes = dict.fromkeys(own, (3, 6))
    found = pool_experts(own, "up", shapes, weights.__getitem__, inputs=inputs, tokens=50)
    torch.testing.assert_close(found["b"].output_moment, weights["b"] @ inputs @ weights["b"].T, rtol=1e-12, atol=0)
    assert found["b"].input_energy == pytest.approx(float(inputs.trace()))
    down = pool_experts(own, "down", shapes, weights.__getitem__, inputs=None, tokens=50)
    expected = float(inputs.trace()) / 6 * weights["b"] @ weights["b"].T
    torch.testing.assert_close(down["b"].output_moment, expected, rtol=1e-12, atol=0)


def test_an_expert_counts_by_its_frequency() -> None:
    model = moe("qwen3_moe")
    separate_experts(model)
    settings = Settings(0.6, **FAST)
    collection = Collection(model, DATA, None, None)
    evidence = collection.dense(settings)
    places = places_of(model, list(collection.targets))
    specs = specs_of(collection.targets, settings)
    profiles = profiles_of(specs, evidence.spectra, evidence.calibration, places, metric="input", power=1.0)
    for profile in profiles:
        entry, name = evidence.calibration.statistics[profile.spec.name], profile.spec.name
        module = evidence.calibration.importance[name]
        assert (entry.frequency is not None) == (".experts." in name)
        frequency = 1.0 if entry.frequency is None else entry.frequency
        assert profile.importance == pytest.approx(module * frequency)
    kinds = {profile.kind for profile in profiles}
    assert {"mlp.experts.gate_up", "mlp.experts.down"} < kinds
    assert len(kinds) == 6


# The whole way


@pytest.mark.parametrize("preset", ["unirank", "fast", "best"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compress_export_load(family: str, preset: str, tmp_path: Path) -> None:
    model = moe(family)
    dense = sum(p.numel() for p in model.parameters())
    result = compress(model, DATA, keep_ratio=0.6, preset=preset, min_rank=2)
    plan, record = result.plan, result.record
    names = [matrix.name for matrix in plan.matrices]
    assert sum(".experts." in name for name in names) == 2 * 2 * experts_in(model)[0].count
    assert plan.keep_ratio <= 0.6
    assert record["parameters"]["model_dense"] == dense
    own = sum(p.numel() for p in model.parameters())
    assert own == record["parameters"]["model"] == dense - plan.dense_parameters + plan.parameters
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == own * 4, "no fused parameter is kept alive by a view of it"
    expected = logits(model)
    export(model, plan, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **EAGER).eval()
    assert torch.equal(logits(again), expected)
    ids = DATA[0]["input_ids"][:1, :4]
    assert again.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 8)
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", **EAGER).eval()), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_nested_exports_load_smaller(family: str, tmp_path: Path) -> None:
    model = moe(family)
    result = compress(model, DATA, keep_ratio=0.8, nested=True, **FAST)
    export(model, result.plan, tmp_path / "out")
    small = load(tmp_path / "out", keep_ratio=0.5).eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    assert torch.isfinite(logits(small)).all()


@pytest.mark.parametrize("metric", ["identity", "activation_scale", "fisher_two_sided", "corda", "input", "two_sided"])
def test_full_rank_keeps_the_model(metric: str) -> None:
    """Every metric's factors of full rank are the weights, also of experts that saw nothing."""
    model = moe("qwen3_moe").double()
    rows = [{"input_ids": DATA[0]["input_ids"][:1, :3]}]
    separate_experts(model)
    settings = settings_of(0.9, {"metric": metric, "allocator": "uniform", "preset": "unirank", "min_rank": 1})
    collection = Collection(model, rows, None, None)
    evidence = collection.dense(settings)
    seen = [entry.tokens for name, entry in evidence.calibration.statistics.items() if "experts" in name]
    assert not seen or 0 in seen
    for name, target in collection.targets.items():
        weight = dense_weight(target.module)
        outer, inner = evidence.spectra[name].factors(
            weight, min(evidence.spectra[name].left.shape[1], min(weight.shape))
        )
        kept = outer @ inner
        assert torch.isfinite(kept).all()
        whole = lowrank_lit.spectrum.compute_spectrum(
            weight, evidence.calibration.statistics.get(name), metric=metric, name=name
        )
        outer, inner = whole.factors(weight, min(weight.shape))
        torch.testing.assert_close(outer @ inner, weight.double(), rtol=1e-6, atol=1e-6)


def test_planning_leaves_the_experts_fused() -> None:
    model = moe("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_ranks(model, DATA, keep_ratio=0.6, **FAST)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    result = compress(model, DATA, keep_ratio=0.6, **FAST)
    assert result.plan == plan


def test_an_error_leaves_the_experts_fused(tmp_path: Path) -> None:
    model = moe("mixtral")
    names = set(model.state_dict())
    with pytest.raises(ModelError, match="matches no linear layer"):
        compress(model, DATA, keep_ratio=0.6, targets=["*.nothing"])
    assert set(model.state_dict()) == names
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"experts\.2\.down|experts\.down_proj"):
        compress(model, DATA, keep_ratio=0.6)
    assert set(model.state_dict()) == names


def test_experts_that_are_no_targets_stay_fused(tmp_path: Path) -> None:
    model = moe("mixtral")
    result = compress(model, DATA, keep_ratio=0.6, targets=["*.self_attn.*"], **FAST)
    assert not experts_in(model)
    export(model, result.plan, tmp_path / "out")
    again = load(tmp_path / "out").eval()
    assert torch.allclose(logits(again), logits(model), atol=1e-5)  # grouped and eager round differently


def test_experts_alone_are_targets(tmp_path: Path) -> None:
    model = moe("mixtral")
    result = compress(model, DATA, keep_ratio=0.6, targets=["*.experts.*"], **FAST)
    assert all(".experts." in matrix.name for matrix in result.plan.matrices)
    export(model, result.plan, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out", **EAGER).eval()), logits(model))


def test_the_cache_restores_experts(tmp_path: Path) -> None:
    model, other = moe("mixtral"), moe("mixtral")
    settings = settings_of(0.6, FAST)
    identity = fingerprint(model, DATA, settings)
    result = compress(model, DATA, keep_ratio=0.6, **FAST)
    assert result.plan.fingerprint == identity
    save_compression(tmp_path, model, result)
    assert load_compression(tmp_path, other, "another") is None
    assert not experts_in(other)
    found = load_compression(tmp_path, other, identity)
    assert found is not None
    assert found.plan == result.plan
    assert torch.equal(logits(other), logits(model))


def test_a_workspace_gives_the_same(tmp_path: Path) -> None:
    moe("qwen3_moe").save_pretrained(tmp_path / "dense")
    found = []
    for given in ({}, {"workspace": tmp_path / "space"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto").eval()
        result = compress(model, DATA, keep_ratio=0.6, metric="two_sided", **FAST, **given)
        found.append((result.plan, logits(model)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


def test_experts_that_no_token_reached_are_factored_by_the_others() -> None:
    """One sequence of four tokens reaches at most eight of twelve experts."""
    model = moe("qwen3_moe", num_experts=12)
    rows = [{"input_ids": DATA[0]["input_ids"][:1, :4]}, {"input_ids": DATA[1]["input_ids"][:1, :4]}]
    result = compress(model, rows, keep_ratio=0.7, **FAST)
    assert any("saw fewer tokens" in note for note in result.plan.notes)
    assert sum(isinstance(m, FactoredLinear) for e in experts_in(model) for m in e.modules()) >= 24
    assert torch.isfinite(logits(model)).all()


def test_adapters_on_experts_train_and_merge() -> None:
    model = moe("mixtral")
    compress(model, DATA, keep_ratio=0.6, **FAST)
    adapters = add_adapters(model, rank=2)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    model(**DATA[0], labels=DATA[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.01)
    expected = logits(model.eval())
    adapters.merge()
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_experts_in_four_bits() -> None:
    """Factors of experts in NF4; those without tokens multiply nothing."""
    model = moe("qwen3_moe", hidden_size=256, head_dim=64, moe_intermediate_size=256, num_hidden_layers=1)
    compress(model, DATA, keep_ratio=0.7, quantum=64, preset="unirank", allocator="uniform")
    before = logits(model)
    assert any(isinstance(m, FactoredLinear) for e in experts_in(model) for m in e.modules())
    quantize_factors(model)
    adapters = add_adapters(model, rank=2)
    model.train()
    model(**DATA[0], labels=DATA[0]["input_ids"]).loss.backward()
    assert adapters is not None
    far = float((logits(model.eval()) - before).norm() / before.norm())
    assert 0 < far < 0.5


def test_blocks_of_experts_are_refined() -> None:
    teacher, model = moe("mixtral"), moe("mixtral")
    compress(model, DATA, keep_ratio=0.5, **FAST)
    found = refine_blocks(model, teacher, DATA, epochs=2, learning_rate=3e-3)
    assert all(after <= before for before, after in found.errors.values())
    assert any(after < before for before, after in found.errors.values())


def test_a_block_that_no_token_reaches_is_an_error() -> None:
    model = moe("mixtral")
    separate_experts(model)
    layers = {name: target.module for name, target in find_targets(model).items() if ".experts." in name}
    own = {name: LayerStatistics(0) for name in list(layers)[:2]}
    assert own
    experts = experts_in(model)[1]
    model.model.layers[1].mlp.forward = lambda hidden: hidden  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"no calibration token reached layer 'model\.layers\.1\.mlp\.experts"):
        calibrate(model, DATA, layers, weight_of=dense_weight, moments=frozenset({"input"}), importance=False)
    assert experts.count == 4
