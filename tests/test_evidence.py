"""Curves of predicted loss, first-order changes and places, against definitions and finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.allocation import MatrixSpec
from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.collector import Calibration
from lowrank_lit.evidence import (
    block_importance,
    component_changes,
    loss_curve,
    places_of,
    predicts_nats,
    profiles_of,
    specs_of,
)
from lowrank_lit.gradients import next_token_loss
from lowrank_lit.metrics import METRIC_MOMENTS
from lowrank_lit.settings import Settings
from lowrank_lit.spectrum import Spectrum, compute_spectrum
from lowrank_lit.statistics import LayerStatistics
from lowrank_lit.surgery import dense_weight, find_targets
from tests.tiny import batches, tiny_model


def statistics_of(weight: Tensor, seed: int = 0) -> tuple[LayerStatistics, Tensor, Tensor]:
    """Statistics of a weight on random inputs and gradients, and their second moments R and C."""
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, columns, dtype=torch.float64)
    x = torch.randn(200, columns, generator=generator, dtype=torch.float64) * scale
    g = torch.randn(200, rows, generator=generator, dtype=torch.float64) * 0.1
    r, c = x.T @ x / 200, g.T @ g / 200
    tall = columns < rows
    return (
        LayerStatistics(
            200,
            input_energy=float(r.trace()),
            input_moment=r,
            gradient_energy=float(c.trace()),
            gradient_moment=None if tall else c,
            pulled_moment=weight.T @ c @ weight if tall else None,
        ),
        r,
        c,
    )


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (9, 9)])
@pytest.mark.parametrize("metric", ["two_sided", "input"])
def test_a_curve_is_half_the_curvature_of_what_is_left_out(shape: tuple[int, int], metric: str) -> None:
    weight = torch.randn(*shape, dtype=torch.float64)
    statistics, r, c = statistics_of(weight)
    spectrum = compute_spectrum(weight, statistics, metric=metric, name="w", damping=0, shrinkage=0)
    curve = loss_curve(spectrum, statistics, metric, importance=5.0)  # which nats have no use for
    assert curve.shape == (min(shape) + 1,)
    assert float(curve[-1]) == 0
    if metric == "input":
        c = float(c.trace()) / shape[0] * torch.eye(shape[0], dtype=torch.float64)
    for rank in range(min(shape) + 1):
        left_out = weight.clone()
        if rank:
            outer, inner = spectrum.factors(weight, rank)
            left_out -= outer @ inner
        assert float(curve[rank]) == pytest.approx(
            0.5 * float((c @ left_out @ r @ left_out.T).trace()), rel=1e-8, abs=1e-10
        )


def test_a_curve_without_a_unit_is_a_share_of_the_energy() -> None:
    spectrum = Spectrum(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64), torch.eye(3))
    expected = 0.5 * torch.tensor([6.0, 2.0, 1.0, 0.0], dtype=torch.float64) / 6
    for metric in ("identity", "input", "activation_scale", "corda"):
        torch.testing.assert_close(loss_curve(spectrum, None, metric, 0.5), expected)
        torch.testing.assert_close(loss_curve(spectrum, LayerStatistics(1), metric, 0.5), expected)
    for metric in ("fisher_input", "fisher_two_sided", "two_sided"):
        torch.testing.assert_close(loss_curve(spectrum, None, metric, 0.5), expected * 6)


def test_a_curve_of_zeros() -> None:
    spectrum = Spectrum(torch.zeros(3, dtype=torch.float64), torch.eye(3))
    assert not loss_curve(spectrum, None, "identity", 1.0).any()


def test_a_layer_that_the_loss_does_not_depend_on_is_free() -> None:
    """Its gradients were collected and are zero: not the share of energy that a curve without a unit is."""
    spectrum = Spectrum(torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    dead = LayerStatistics(5, input_energy=3.0, gradient_moment=torch.zeros(3, 3, dtype=torch.float64))
    assert not loss_curve(spectrum, dead, "input", 1.0).any()


def test_which_metrics_predict_nats() -> None:
    none, sized = {"a": LayerStatistics(4)}, {"a": LayerStatistics(4), "b": LayerStatistics(4, gradient_energy=1.0)}
    assert predicts_nats("two_sided", none)
    assert predicts_nats("input", sized)
    assert not predicts_nats("input", none)
    assert not predicts_nats("identity", sized)


class Causal(nn.Module):
    """Predicts each token from the one before it; all in float64, where transformers computes norms in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(7, 20)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 7)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.down(torch.tanh(self.up(self.embedding(input_ids)))))
        return logits


@pytest.mark.parametrize("metric", ["two_sided", "input", "identity"])
def test_first_order_changes_are_derivatives_of_the_loss(metric: str) -> None:
    """Of the loss per token with one component scaled by 1 - e, at e = 0, by central differences."""
    model = Causal()
    data = as_batches(batches(20, n=2, padding=True))
    layers = {"up": model.up, "down": model.down}
    moments = METRIC_MOMENTS[metric] | {"weight_gradient"}
    found = calibrate(model, data, layers, weight_of=dense_weight, moments=moments, importance=False)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data)

    @torch.no_grad()
    def loss() -> float:
        return sum(float(next_token_loss(model, batch)) for batch in data) / tokens

    for name, layer in layers.items():
        statistics, weight = found.statistics[name], layer.weight.detach().clone()
        spectrum = compute_spectrum(weight, statistics, metric=metric, name=name)
        assert statistics.weight_gradient is not None
        changes = component_changes(spectrum, weight, statistics.weight_gradient)
        outer, inner = spectrum.factors(weight, min(weight.shape), nested=True)
        for index in range(min(weight.shape)):
            component = outer[:, index : index + 1] @ inner[index : index + 1]
            values = []
            for step in (1e-4, -1e-4):
                layer.weight.data = weight - step * component
                values.append(loss())
            layer.weight.data = weight
            derivative = (values[0] - values[1]) / 2e-4
            assert float(changes[index]) == pytest.approx(derivative, rel=1e-6, abs=1e-10)
        # All components together are the weight.
        total = -float((statistics.weight_gradient * weight).sum())
        assert float(changes.sum()) == pytest.approx(total, rel=1e-8, abs=1e-10)


def test_places_are_names_inside_the_repeating_blocks() -> None:
    model = tiny_model("llama")
    names = list(find_targets(model))
    places = places_of(model, [*names, "lm_head"])
    assert places["model.layers.1.mlp.gate_proj"] == ("mlp.gate_proj", 1)
    assert places["model.layers.0.self_attn.q_proj"] == ("self_attn.q_proj", 0)
    assert places["lm_head"] == ("lm_head", None)
    ten = tiny_model("gpt2", n_layer=11)
    assert places_of(ten, ["transformer.h.10.mlp.c_fc", "transformer.h.1.mlp.c_fc"]) == {
        "transformer.h.10.mlp.c_fc": ("mlp.c_fc", 10),
        "transformer.h.1.mlp.c_fc": ("mlp.c_fc", 1),
    }
    assert places_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), ["0"]) == {"0": ("0", None)}


def test_block_importance_is_the_mean_of_a_blocks_branches() -> None:
    places: dict[str, tuple[str, int | None]] = {
        "0.q": ("q", 0),
        "0.k": ("k", 0),
        "0.up": ("up", 0),
        "1.q": ("q", 1),
        "head": ("head", None),
        "other": ("other", None),
    }
    given = {"0.q": 0.2, "0.k": 0.2, "0.up": 0.6, "1.q": 0.3, "head": 1.0, "other": 0.5}
    found = block_importance(given, places)
    assert found == pytest.approx({**given, "0.q": 0.4, "0.k": 0.4, "0.up": 0.4})


def test_specs_follow_shapes_and_settings() -> None:
    targets = find_targets(tiny_model("gpt2"))  # whose weights are stored the other way round
    specs = specs_of(targets, Settings(0.5, storage="pivot", quantum=4, min_rank=40))
    assert [spec.name for spec in specs] == list(targets)
    fc = next(spec for spec in specs if spec.name.endswith("c_fc"))
    assert (fc.rows, fc.columns, fc.floor, fc.storage, fc.quantum) == (48, 32, 32, "pivot", 4)


def profiles(metric: str, power: float, **given: Any) -> list[Any]:
    weight = torch.randn(6, 8, dtype=torch.float64)
    statistics, _, _ = statistics_of(weight)
    spectra = {"a": compute_spectrum(weight, statistics, metric=metric, name="a")}
    calibration = Calibration({"a": statistics}, {"a": 0.25}, 200)
    spec = MatrixSpec("a", 6, 8)
    return profiles_of([spec], spectra, calibration, {"a": ("q", 3)}, metric=metric, power=power, **given)


def test_profiles_weight_nats_by_a_power_of_the_importance() -> None:
    torch.manual_seed(1)
    (plain,) = profiles("two_sided", 0.0)
    torch.manual_seed(1)
    (weighted,) = profiles("two_sided", 0.5)
    np.testing.assert_allclose(weighted.nats, math.sqrt(0.25) * plain.nats)
    assert (plain.importance, plain.kind, plain.block) == (0.25, "q", 3)
    assert plain.first_order is None
    assert plain.table is None
    assert plain.probe is None
    torch.manual_seed(1)
    (share,) = profiles("identity", 0.5, tables={"a": {0.5: 1.0}}, probes={"a": (2, 0.1)})
    assert share.nats[0] == pytest.approx(0.25)  # the importance itself, whatever the power
    assert share.table == {0.5: 1.0}
    assert share.probe == (2, 0.1)
