"""NF4 factors against an own small reference of the format; the gauge against its error law."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.compress import compress
from lowrank_lit.errors import LowRankError, ModelError, NonFiniteError
from lowrank_lit.gauge import error_law, in_gauge, product_error, refit_outer, rotation
from lowrank_lit.hub import export
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.linalg import balance
from lowrank_lit.quantize import (
    apply_quantization,
    dequantize_linear,
    dequantize_model,
    nf4_bytes,
    packed_bytes,
    quantize_factors,
    requantize_factors,
)
from lowrank_lit.recovery import add_adapters
from tests.tiny import batches, tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")
from lowrank_lit.nf4 import NF4Linear  # noqa: E402

# The 16 quantiles of NF4, from appendix E of arXiv:2305.14314, to the digits that are printed there.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def nf4_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest codes (blocks, 64), scales (blocks,), and what they stand for, of a weight whose size is whole blocks."""
    blocks = weight.float().reshape(-1, 64)
    scales = blocks.abs().amax(dim=1)
    codes = (blocks / scales[:, None]).unsqueeze(-1).sub(NF4).abs().argmin(dim=-1)
    return codes, scales, (NF4[codes] * scales[:, None]).reshape(weight.shape)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int, rank: int, power: float, *, seed: int = 0) -> FactoredLinear:
    """A layer with singular values k^-power, all of them in ``outer``."""
    left = torch.linalg.qr(randn(rows, rank, seed=seed).double()).Q
    right = torch.linalg.qr(randn(columns, rank, seed=seed + 1).double()).Q
    values = torch.arange(1, rank + 1).double() ** -power
    return FactoredLinear.from_factors(left * values, right.mT, randn(rows, seed=seed + 2), dtype=torch.float32)


def factored_model(rank: int = 64, width: int = 128, seed: int = 0) -> nn.Sequential:
    """Two factored layers, the second with another width, and a plain one."""
    return nn.Sequential(
        decaying(width + 32, width, rank, 0.6, seed=seed),
        decaying(width, width + 32, rank, 0.6, seed=seed + 3),
        nn.Linear(width, 10),
    )


# ---- the format, for every shape ------------------------------------------------------------------------------------

# Widths: multiples of 64; of 16 but not of 64, where bitsandbytes' CPU kernel is wrong; neither. Rows: ranks and other.
SHAPES = [(64, 64), (128, 48), (320, 80), (100, 192), (64, 1632), (512, 96), (192, 40), (64, 30), (384, 512)]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_numbers_are_those_of_the_reference(shape: tuple[int, int], double_quant: bool) -> None:
    weight = randn(*shape)
    codes, scales, values = nf4_reference(weight)
    layer = NF4Linear.from_weight(weight, double_quant=double_quant)
    packed = layer.weight.detach().reshape(-1)
    assert torch.equal(torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1, 64).long(), codes)
    plain = dequantize_linear(layer)
    if double_quant:  # 8 bits for a scale: at most 1 / 128 of the largest of 256, here 0.002 of the weight's norm
        assert float((plain.weight.detach() - values).norm() / values.norm()) < 5e-3
        state = layer.weight.quant_state
        scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        values = (NF4[codes] * scales[:, None]).reshape(shape)
    assert torch.equal(plain.weight.detach(), values)
    assert 0.08 < float((plain.weight.detach() - weight).norm() / weight.norm()) < 0.1


def test_bitsandbytes_own_layer_is_wrong_where_the_guard_is_right() -> None:
    """If this fails, the guard in nf4.py is no longer needed: bitsandbytes is right by itself, or has no AVX-512."""
    weight = randn(128, 48)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    own = bitsandbytes.functional.dequantize_4bit(packed, state)
    wrong = float((own - weight).norm() / weight.norm())
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or wrong < 0.1:
        pytest.skip("bitsandbytes dequantises this shape rightly here")
    assert wrong > 0.15


@pytest.mark.parametrize("rank", [64, 128, 192, 512])
@pytest.mark.parametrize("width", [128, 48, 208])
def test_forward_and_backward_are_those_of_the_dequantised_layer(rank: int, width: int) -> None:
    for shape in ((rank, width), (width, rank)):  # inner, outer
        bias = nn.Parameter(randn(shape[0]))
        weight = randn(*shape, seed=1)
        layer = NF4Linear.from_weight(weight, bias, double_quant=False)
        reference = nf4_reference(weight)[2]
        for training in (True, False, True):  # eval mode must not change the layer for good
            layer.train(training)
            x = randn(2, 5, shape[1], seed=2).requires_grad_()
            bias.grad = None
            y = layer(x)
            torch.testing.assert_close(y, x @ reference.T + bias, rtol=1e-5, atol=1e-4)
            gradient = randn(*y.shape, seed=3)
            y.backward(gradient)
            torch.testing.assert_close(x.grad, gradient @ reference, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(bias.grad, gradient.sum(dim=(0, 1)), rtol=1e-5, atol=1e-4)
        assert layer.weight.grad is None


def test_repacking_for_inference_never_happens() -> None:
    """On a CPU with AVX-512-BF16 bitsandbytes repacks in eval mode; the flag makes it do so on any CPU."""
    layer = NF4Linear.from_weight(randn(64, 64))
    own = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    x = randn(3, 64)
    before, packed = layer(x), layer.weight.detach().clone()
    for each in (layer, own):
        each.support_avx512bf16_for_cpu = True
        each.eval()
        with torch.no_grad():
            each(x)
        each.train()
    assert own.weight.quant_state.packing_format_for_cpu  # bitsandbytes' own stays repacked in train mode
    with pytest.raises(ModelError, match="repacked by bitsandbytes"):
        dequantize_linear(own)
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(layer.weight.detach(), packed)
    assert torch.equal(layer(x), before)


def test_dtypes_follow_input_autocast_and_setting() -> None:
    weight, bias = randn(64, 128), nn.Parameter(randn(64))
    layer = NF4Linear.from_weight(weight, bias, dtype=torch.bfloat16)
    x = randn(3, 128)
    assert layer(x).dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert layer(x.double()).dtype == torch.float64
    torch.testing.assert_close(layer(x.double()).float(), layer(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    low = NF4Linear.from_weight(weight, bias, compute_dtype=torch.bfloat16)
    assert low(x).dtype == torch.float32
    torch.testing.assert_close(low(x), layer(x), rtol=0.05, atol=0.1)
    assert not torch.equal(low(x), layer(x))
    assert bias.dtype == torch.float32  # bitsandbytes' layer would have cast it for good
    assert dequantize_linear(layer).weight.dtype == torch.bfloat16
    assert dequantize_linear(layer, torch.float32).weight.dtype == torch.float32


def test_dequantised_layer_keeps_bias_mode_and_peft_base() -> None:
    bias = nn.Parameter(randn(64))
    layer = NF4Linear.from_weight(randn(64, 128), bias).eval()
    plain = dequantize_linear(layer)
    assert type(plain) is nn.Linear
    assert plain.bias is bias
    assert not plain.training
    assert plain.weight.requires_grad
    wrapper = nn.Module()
    wrapper.base_layer = layer
    assert torch.equal(dequantize_linear(wrapper).weight, plain.weight)
    with pytest.raises(ModelError, match="Linear is not quantised"):
        dequantize_linear(plain)


def test_foreign_4bit_layers_are_dequantised_too() -> None:
    """bitsandbytes' own layer, of any 4-bit type and with a size that is no multiple of a block."""
    for kind, shape in (("nf4", (5, 48)), ("fp4", (3, 50)), ("nf4", (7, 11))):
        weight = randn(*shape)
        layer = bitsandbytes.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type=kind)
        layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type=kind)
        plain = dequantize_linear(layer.to("cpu"))
        assert 0.05 < float((plain.weight.detach() - weight).norm() / weight.norm()) < 0.16


# ---- the gauge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 64, 96, 256])
def test_rotation_is_orthogonal_and_seeded(rank: int) -> None:
    turn = rotation(rank, seed=3)
    torch.testing.assert_close(turn @ turn.mT, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(turn, rotation(rank, seed=3))
    assert rank == 1 or not torch.equal(turn, rotation(rank, seed=4))


@pytest.mark.parametrize("gauge", ["rotated", "balanced", "none"])
def test_gauge_keeps_the_product(gauge: str) -> None:
    factors = {"outer": randn(48, 32).double(), "inner": randn(32, 40, seed=1).double()}
    moved = in_gauge(gauge, factors, balance(factors["outer"], factors["inner"]), 0)
    torch.testing.assert_close(moved["outer"] @ moved["inner"], factors["outer"] @ factors["inner"], atol=1e-11, rtol=0)
    if gauge != "none":  # balanced, in any rotation: outer^T outer = inner inner^T
        gram = moved["outer"].mT @ moved["outer"]
        torch.testing.assert_close(gram, moved["inner"] @ moved["inner"].mT, atol=1e-9, rtol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_product_error_is_that_of_the_products(weighted: bool) -> None:
    before = {"outer": randn(20, 6).double(), "inner": randn(6, 15, seed=1).double()}
    after = {key: value + 0.01 * randn(*value.shape, seed=2) for key, value in before.items()}
    root = randn(15, 15, seed=4).double() if weighted else torch.eye(15, dtype=torch.float64)
    dense = before["outer"] @ before["inner"]
    expected = ((after["outer"] @ after["inner"] - dense) @ root).norm() / (dense @ root).norm()
    found = product_error(before, after, root @ root.mT if weighted else None)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert product_error(before, before) == 0


def test_refit_is_the_least_squares_fit() -> None:
    outer, inner = randn(20, 6).double(), randn(6, 15, seed=1).double()
    quantised = inner + 0.1 * randn(6, 15, seed=2)
    root = randn(15, 40, seed=3).double()
    target, inputs = (outer @ inner @ root).mT, (quantised @ root).mT
    expected = torch.linalg.lstsq(inputs, target).solution.mT
    found = refit_outer(outer, inner, quantised, root @ root.mT)
    start, best, own = ((x @ quantised @ root - target.mT).norm() for x in (outer, expected, found))
    assert best <= own < best + 0.01 * (start - best)  # the damping costs this much at most
    torch.testing.assert_close(refit_outer(outer, inner, inner, root @ root.mT), outer, rtol=0, atol=1e-12)


@pytest.mark.parametrize("power", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("rank", [64, 192, 256])
def test_rotated_factors_follow_the_error_law(rank: int, power: float) -> None:
    model = nn.Sequential(decaying(320, 288, rank, power))
    (figures,) = quantize_factors(model)["layers"].values()
    values = torch.arange(1, rank + 1).double() ** -power
    assert figures["error_law"] == pytest.approx(error_law(values), rel=1e-5)
    assert figures["product_error"] == pytest.approx(figures["error_law"], rel=0.1)


def test_one_quantised_factor_makes_half_the_squared_error() -> None:
    for which in ("inner", "outer"):
        model = nn.Sequential(decaying(320, 288, 128, 0.6))
        (figures,) = quantize_factors(model, which=which)["layers"].values()
        assert figures["product_error"] == pytest.approx(figures["error_law"], rel=0.1)
        assert figures["error_law"] == pytest.approx(error_law(torch.arange(1, 129) ** -0.6, quantised=1), rel=1e-4)


def test_rotation_beats_balance_beats_all_in_outer() -> None:
    errors = []
    for gauge in ("rotated", "balanced", "none"):
        model = nn.Sequential(decaying(320, 288, 256, 1.0))
        errors.append(quantize_factors(model, gauge=gauge)["largest_product_error"])
    assert errors[0] < 0.9 * errors[1] < 0.81 * errors[2]


def test_refit_lowers_the_error_of_the_outputs() -> None:
    inputs = randn(500, 288) * torch.arange(1, 289) ** -0.5
    errors = []
    for moments in (None, {"0": inputs.T @ inputs / len(inputs)}):
        model = nn.Sequential(decaying(320, 288, 128, 0.6))
        expected = model(inputs)
        record = quantize_factors(model, moments=moments)
        bias = model[0].bias
        errors.append(float((model(inputs) - expected).norm() / (expected - bias).norm()))
    assert errors[1] < 0.95 * errors[0]
    assert record["layers"]["0"]["output_error"] == pytest.approx(errors[1], rel=1e-3)


# ---- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["both", "inner", "outer"])
def test_quantised_model_is_close_frozen_and_reported(which: str) -> None:
    model = factored_model()
    x = randn(7, 128)
    expected, biases = model(x), [model[0].bias, model[1].bias]
    record = quantize_factors(model, which=which)
    chosen = ["inner", "outer"] if which == "both" else [which]
    assert record["quantized"] == [f"{layer}.{factor}" for layer in "01" for factor in chosen]
    for index in (0, 1):
        for factor in ("inner", "outer"):
            child = getattr(model[index], factor)
            assert isinstance(child, NF4Linear) == (factor in chosen)
            assert child.weight.requires_grad == (factor not in chosen)
        assert model[index].bias is biases[index]
    assert 0 < float((model(x) - expected).norm() / expected.norm()) < 0.3
    names = [model.get_submodule(name) for name in record["quantized"]]
    assert record["parameters"] == sum(layer.in_features * layer.out_features for layer in names)
    assert record["bytes"] == sum(packed_bytes(layer) for layer in names)
    assert set(record["layers"]) == {"0", "1"}
    worst = max(figures["product_error"] for figures in record["layers"].values())
    assert record["largest_product_error"] == worst


def test_product_error_of_the_record_is_that_of_the_layer() -> None:
    model = factored_model()
    before = model[0].weight.detach().double()
    record = quantize_factors(model, which="both")
    assert dequantize_model(model) == 4
    after = model[0].weight.detach().double()
    expected = float((after - before).norm() / before.norm())
    assert record["layers"]["0"]["product_error"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_bytes_are_estimated(double_quant: bool) -> None:
    layer = NF4Linear.from_weight(randn(512, 320), double_quant=double_quant)
    tables = 16 * 4 + (4 + 256 * 4 if double_quant else 0)
    assert packed_bytes(layer) == nf4_bytes(512 * 320, double_quant=double_quant) + tables
    assert nf4_bytes(64 * 256 * 100) * 8 / (64 * 256 * 100) == pytest.approx(4.127, abs=1e-3)


def test_a_dense_layer_is_quantised_when_asked() -> None:
    model = factored_model()
    weight = model[2].weight.detach().clone()
    record = quantize_factors(model, dense=["2"])
    assert record["quantized"][-1] == "2"
    assert isinstance(model[2], NF4Linear)
    assert 0.05 < float((dequantize_linear(model[2]).weight.detach() - weight).norm() / weight.norm()) < 0.11


def test_state_dict_resumes_bitwise_in_an_empty_copy(tmp_path: Path) -> None:
    model = factored_model()
    empty = copy.deepcopy(model)
    record = quantize_factors(model, compute_dtype=torch.float32)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(float("nan"))
    apply_quantization(empty, record)
    empty.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = randn(3, 128)
    assert torch.equal(empty(x), model(x))
    assert empty[0].inner.compute_dtype == torch.float32
    state, again = model.state_dict(), empty.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in state.items())
    assert torch.equal(copy.deepcopy(empty)(x), model(x))


def test_state_dicts_of_another_kind_are_refused() -> None:
    model, plain = factored_model(), factored_model()
    quantize_factors(model)
    with pytest.raises(RuntimeError, match=r"0\.inner\.weight is not quantised in what is loaded"):
        model.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict(model.state_dict())
    other = factored_model(rank=128)
    quantize_factors(other)
    with pytest.raises(RuntimeError, match=r"0\.inner\.weight is nf4 of shape \(128, 128\)"):
        model.load_state_dict(other.state_dict())


def test_adapters_train_on_quantised_factors_through_validation_and_merge() -> None:
    """Train, validate, train on one model; the merged model is what the adapted one was."""
    model = factored_model()
    quantize_factors(model)
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    adapters = add_adapters(model, rank=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    x, target = randn(64, 128), randn(64, 10, seed=5)
    losses = []
    for _ in range(5):
        model.eval()
        with torch.no_grad():
            losses.append(float((model(x) - target).square().mean()))
        model.train()
        for _ in range(3):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            assert all(parameter.grad is not None for parameter in trained)
            optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(dict(model.named_parameters())[f"{n}"], v) for n, v in _base_names(model, packed).items())
    model.eval()
    expected = model(x).detach()
    merged = adapters.merge()
    assert merged.dequantised == 4
    assert not any(isinstance(module, NF4Linear) for module in model.modules())
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def _base_names(model: nn.Module, packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed weights by their names under PEFT's layers."""
    names = [name for name, _ in model.named_parameters() if "base_layer.weight" in name]
    assert len(names) == len(packed) == 4
    return {name: packed[name.replace(".base_layer", "")] for name in names}


def test_requantising_says_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    model = factored_model()
    x = randn(64, 128)
    target = model(x).detach()

    def loss(each: nn.Module) -> float:
        return float((each(x) - target).square().mean())

    record = requantize_factors(model, loss, which="outer")
    assert record["loss"]["before"] == 0
    assert record["loss"]["after"] == loss(model) == record["loss"]["increase"] > 0
    assert record["settings"]["which"] == "outer"
    assert f"loss 0.0000 -> {record['loss']['after']:.4f} nats per token" in capsys.readouterr().out


DORA = {"class_path": "LoraConfig", "init_args": {"r": 4, "use_dora": True}}


def test_dora_on_quantised_factors_is_merged_into_what_it_was_trained_on() -> None:
    model = nn.Sequential(decaying(192, 128, 64, 0.6), decaying(128, 192, 64, 0.6))
    x = randn(7, 128)
    quantize_factors(model)
    before = model(x).detach()
    adapters = add_adapters(model, config=DORA)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    adapted = model(x).detach()
    assert adapters.merge().smallest_update > 0.05
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DORA, "use_dora needs rows that are multiples of 64, and these have 160"),  # bitsandbytes reads them wrongly
        ({"class_path": "MissConfig", "init_args": {"r": 4}}, "Miss reads or rewrites factors"),
        ({"class_path": "LoraConfig", "init_args": {"r": 4, "init_lora_weights": "pissa"}}, "pissa reads or rewrites"),
        ({"class_path": "LoraConfig", "init_args": {"r": 4, "init_lora_weights": "mica"}}, "mica reads or rewrites"),
        ({"class_path": "OFTConfig", "init_args": {"r": 0, "oft_block_size": 4}}, "OFT reads or rewrites"),
    ],
)
def test_methods_that_cannot_read_packed_factors_are_refused(config: dict[str, Any], message: str) -> None:
    model = factored_model()
    quantize_factors(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=f"{message}.*leave the factors unquantised"):
        add_adapters(model, config=config)
    assert unchanged(model, state)


def test_merged_factors_train_if_they_did_before_they_were_quantised() -> None:
    model = factored_model()
    model[0].inner.weight.requires_grad_(False)
    model[1].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    quantize_factors(model)
    adapters = add_adapters(model, rank=2)
    adapters.merge()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_the_record_tells_the_bits_of_a_weight_and_what_stays() -> None:
    model = factored_model()
    both = quantize_factors(copy.deepcopy(model))
    outer = quantize_factors(model, which="outer")
    numbers, dense = 2 * 64 * (128 + 160), 2 * 128 * 160
    tables = 4 * 8 * (16 * 4 + 256 * 4 + 4) / dense  # of four factors
    assert both["bits_per_weight"] == pytest.approx(4.127 * numbers / dense + tables, rel=1e-2)
    half = 64 * (128 + 160)
    assert outer["bits_per_weight"] == pytest.approx((4.127 + 32) * half / dense + tables / 2, rel=1e-2)
    assert both["unquantized"] == ["2"]
    assert outer["unquantized"] == ["0.inner", "1.inner", "2"]
    worst = max(both["layers"].values(), key=lambda figures: figures["product_error"])
    assert both["error_law"] == worst["error_law"]


def test_a_language_model_is_quantised_and_trains() -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=144)
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj"):  # inner has 64 columns; outer 144 rows
            linear = getattr(block.mlp, name)
            left, s, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
            setattr(block.mlp, name, FactoredLinear.from_factors(left * s, right, None))
    (batch,) = batches(n=1)
    batch["labels"] = batch["input_ids"]
    before = float(model(**batch).loss)
    quantize_factors(model)
    add_adapters(model, rank=2)
    loss = model(**batch).loss
    loss.backward()
    assert float(loss) == pytest.approx(before, rel=0.05)
    gradients = [p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name]
    assert len(gradients) == 8
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


# ---- bad input ------------------------------------------------------------------------------------------------------


def unchanged(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(
        torch.equal(now[k].nan_to_num(), v.nan_to_num()) for k, v in state.items()
    )


def nan_factor(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[1].outer.weight[3, 4] = float("nan")


def adapted(model: nn.Sequential) -> None:
    add_adapters(model, rank=2)


def with_pivots(model: nn.Sequential) -> None:
    model[1] = PivotLinear.from_factors(randn(128, 64), randn(64, 160, seed=1), None)


@pytest.mark.parametrize(
    ("prepare", "settings", "error", "message"),
    [
        (None, {"which": "up"}, LowRankError, "which='up'.*choose which from both, inner, outer"),
        (None, {"gauge": "svd"}, LowRankError, "gauge from rotated, balanced, none"),
        (nan_factor, {}, NonFiniteError, r"layer '1\.outer'"),
        (adapted, {}, ModelError, "has an adapter already"),
        (with_pivots, {}, ModelError, "layer '1' is in pivot form.*storage='factored'"),
        (quantize_factors, {}, ModelError, r"layer '0\.inner' is quantised already"),
        (None, {"dense": ["9"]}, ModelError, "layer '9' is not in the model"),
        (None, {"dense": ["0"]}, ModelError, "layer '0' is a FactoredLinear"),
        (None, {"dense": ["0.inner"]}, ModelError, r"layer '0\.inner' is a factor"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    prepare: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = factored_model()
    if prepare is not None:
        prepare(model)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        quantize_factors(model, **settings)
    assert unchanged(model, state)


def test_a_rank_between_the_quanta_is_refused_with_the_setting() -> None:
    model = nn.Sequential(decaying(160, 128, 64, 0.6), decaying(128, 160, 48, 0.6))
    with pytest.raises(LowRankError, match=r"layer '1' has rank 48.*\(1 of 2 layers\).*LowRankCompression\.quantum=64"):
        quantize_factors(model)
    assert not any(isinstance(module, NF4Linear) for module in model.modules())


def test_a_tied_weight_is_not_quantised() -> None:
    model = factored_model()
    model.append(nn.Linear(128, 10))
    model[3].weight = model[2].weight
    with pytest.raises(ModelError, match="layer '2' shares its weight"):
        quantize_factors(model, dense=["2"])


def test_a_model_without_factors_is_refused() -> None:
    with pytest.raises(ModelError, match="no factored layer"):
        quantize_factors(nn.Sequential(nn.Linear(64, 64)))


def test_layers_in_4_bits_are_not_exported(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=384)
    plan = compress(model, batches(), keep_ratio=0.8, preset="unirank", quantum=64).plan
    quantize_factors(model)
    with pytest.raises(ModelError, match=r"is in 4 bits, which an export does not hold; call dequantize_model"):
        export(model, plan, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    dequantize_model(model)
    export(model, plan, tmp_path / "model")


def test_missing_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LowRankError, match=r"pip install 'lowrank-lit\[qlora\]'"):
        quantize_factors(factored_model())
