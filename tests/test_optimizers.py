"""Optimizers by name, against torch's AdamW and a Lion written out."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.optimizers import OPTIMIZERS, build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
RATE, DECAY = 1e-2, 0.1


def start(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Large enough (4096 numbers) for 8-bit moments."""
    return nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(64, 64, generator=generator)
    return [mean + 0.3 * torch.randn(64, 64, generator=generator) for _ in range(n)]


def train(name: str, given: list[Tensor], parameter: nn.Parameter, **settings: Any) -> Any:
    optimizer = build_optimizer(name, [parameter], **{"learning_rate": RATE, "weight_decay": DECAY, **settings})
    for gradient in given:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return optimizer


def lion(given: list[Tensor], start: Tensor) -> Tensor:
    """Lion as its paper has it: a step by the sign of b1 m + (1 - b1) g, then m = b2 m + (1 - b2) g."""
    weight, moment = start.detach().clone(), torch.zeros_like(start)
    for gradient in given:
        step = (0.9 * moment + 0.1 * gradient).sign() + DECAY * weight
        weight = weight - RATE * step
        moment = 0.99 * moment + 0.01 * gradient
    return weight


def expected(name: str, given: list[Tensor], start: nn.Parameter) -> Tensor:
    if "lion" in name:
        return lion(given, start)
    parameter = copy.deepcopy(start)
    train("adamw", given, parameter)
    return parameter.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_reference(name: str) -> None:
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    given, parameter = gradients(12), start()
    reference = expected(name, given, parameter)
    train(name, given, parameter)
    moved = (reference - start()).detach()
    difference = (parameter - reference).detach()
    # 8-bit moments: 1-2 % of the distance moved on these gradients; 32-bit ones: rounding.
    assert float(difference.norm() / moved.norm()) < (0.1 if "8bit" in name else 1e-4)


@pytest.mark.parametrize(("name", "least", "most"), [("adamw8bit", 2.0, 2.2), ("lion8bit", 1.0, 1.2), ("lion", 4, 4.1)])
def test_state_takes_the_bits_of_its_name(name: str, least: float, most: float) -> None:
    pytest.importorskip("bitsandbytes")
    parameter = nn.Parameter(torch.randn(512, 512))
    optimizer = build_optimizer(name, [parameter], learning_rate=RATE)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state[parameter]
    shared = {"qmap1", "qmap2"}  # one table for all parameters
    held = sum(v.numel() * v.element_size() for k, v in state.items() if isinstance(v, Tensor) and k not in shared)
    assert least <= held / parameter.numel() <= most


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_state_goes_on_bitwise(name: str, tmp_path: Path) -> None:
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    given, whole, half = gradients(6), start(), start()
    train(name, given, whole)
    optimizer = train(name, given[:3], half)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again = build_optimizer(name, [half], learning_rate=RATE, weight_decay=DECAY)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for gradient in given[3:]:
        half.grad = gradient
        again.step()
    assert torch.equal(half, whole)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "lion8bit"])
def test_groups_and_schedules_rule_the_rate(name: str) -> None:
    """A group with a rate of zero stays where it is, bit for bit, and its rate may rise later."""
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    first, second = start(0), start(1)
    groups = [{"params": [first]}, {"params": [second], "lr": 0.0}]
    optimizer = build_optimizer(name, groups, learning_rate=RATE)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0]
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer.step()
    assert not torch.equal(first, start(0))
    assert torch.equal(second, start(1))
    optimizer.param_groups[1]["lr"] = RATE
    optimizer.step()
    assert not torch.equal(second, start(1))


def test_bfloat16_parameters_train_with_8_bit_moments() -> None:
    pytest.importorskip("bitsandbytes")
    parameter = start(dtype=torch.bfloat16)
    train("adamw8bit", gradients(5), parameter)
    assert parameter.dtype == torch.bfloat16
    assert bool(torch.isfinite(parameter).all())
    assert not torch.equal(parameter, start(dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("adamw_8bit", {}, "optimizer='adamw_8bit' is unknown; did you mean 'adamw8bit'"),
        ("zzz", {}, "optimizer='zzz' is unknown; choose one of adamw, "),
        ("adamw", {"learning_rate": -1.0}, "learning_rate=-1.0 is out of range"),
        ("adamw", {"learning_rate": float("nan")}, "learning_rate=nan is out of range"),
        ("adamw", {"weight_decay": float("inf")}, "weight_decay=inf is out of range"),
    ],
)
def test_bad_settings_are_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        build_optimizer(name, [start()], **{"learning_rate": RATE, **settings})


@pytest.mark.parametrize("parameters", [[], [{"params": []}]])
def test_nothing_to_train_is_an_error(parameters: Any) -> None:
    with pytest.raises(ModelError, match="no parameter to train"):
        build_optimizer("adamw", parameters, learning_rate=RATE)


def test_missing_bitsandbytes_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LowRankError, match=r"optimizer='lion8bit' needs bitsandbytes.*'lowrank-lit\[qlora\]'"):
        build_optimizer("lion8bit", [start()], learning_rate=RATE)
