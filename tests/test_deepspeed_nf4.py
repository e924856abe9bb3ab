"""4-bit factors are never repacked, whatever the CPU: bitsandbytes' own layer does it in eval mode on AVX512-BF16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

bnb = pytest.importorskip("bitsandbytes")

from lowrank_lit.layers import FactoredLinear  # noqa: E402
from lowrank_lit.quantize import apply_quantization, quantize_factors  # noqa: E402
from lowrank_lit.recovery import add_adapters  # noqa: E402


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Weights that bitsandbytes repacks, on a CPU that it takes for one with AVX512-BF16."""
    from bitsandbytes.nn import modules

    seen: list[torch.Tensor] = []

    def repack(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        seen.append(weight)
        return weight, state

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", repack)
    return seen


def test_the_flag_reaches_the_layer_of_bitsandbytes(repacked: list[torch.Tensor]) -> None:
    """Else the next test would show nothing."""
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu").eval()
    layer(torch.randn(2, 64))
    assert len(repacked) == 1


def test_factors_stay_as_they_are_in_eval_mode(repacked: list[torch.Tensor]) -> None:
    made = nn.Sequential(FactoredLinear(128, 128, 64))
    record = quantize_factors(made)
    loaded = nn.Sequential(FactoredLinear(128, 128, 64))
    apply_quantization(loaded, record)
    loaded.load_state_dict(made.state_dict())
    for model in (made, loaded):
        add_adapters(model, rank=4)
        layers: list[Any] = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
        assert len(layers) == 2
        assert all(layer.support_avx512bf16_for_cpu for layer in layers)
        before = [(layer.weight.data.clone(), copy.deepcopy(layer.weight.quant_state)) for layer in layers]
        inputs = torch.randn(3, 128)
        model.train()
        trained = model(inputs)
        model.eval()
        with torch.no_grad():
            validated = model(inputs)
        model.train()
        again = model(inputs)
        again.sum().backward()
        assert not repacked
        assert torch.equal(trained, validated)
        assert torch.equal(trained, again)
        for layer, (data, state) in zip(layers, before, strict=True):
            now = layer.weight.quant_state
            assert layer.weight.shape == data.shape
            assert torch.equal(layer.weight.data, data)
            assert now.shape == state.shape
            assert torch.equal(now.absmax, state.absmax)
            assert torch.equal(now.state2.absmax, state.state2.absmax)
            assert not getattr(now, "packing_format_for_cpu", False)
