"""Few numbers for many: ranks and spectra by block and projection, series of any length."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

from lowrank_lit.curves import Curve
from lowrank_lit.overview import POINTS, components, kinds_of, place_of, rank_cells, spectrum_cells
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.spectrum import Spectrum


def test_places_by_name() -> None:
    assert place_of("model.layers.3.self_attn.q_proj") == ("model.layers", 3, "self_attn.q_proj")
    assert place_of("lm_head") == ("", None, "lm_head")
    names = [
        "model.layers.0.mlp.experts.13.gate_up",
        "model.layers.0.mlp.experts.2.down",
        "lm_head",
        "model.layers.1.mlp.2",
    ]
    assert list(kinds_of(names).values()) == [
        ("mlp.experts.gate_up", 0),
        ("mlp.experts.down", 0),
        ("lm_head", None),
        ("mlp.2", 1),  # a number that counts no experts tells layers apart
    ]
    two = kinds_of(["encoder.0.fc", "decoder.0.fc", "head"])
    assert list(two.values()) == [("encoder.fc", 0), ("decoder.fc", 0), ("head", None)]
    assert kinds_of(["net.0", "net.2"]) == {"net.0": ("net", 0), "net.2": ("net", 2)}
    assert kinds_of(["0"]) == {"0": ("layer", 0)}


def test_experts_are_averaged_with_their_spread() -> None:
    matrices = [
        MatrixPlan("layers.0.experts.0.down", 40, 100, "factored", 10, kept_energy=0.5),
        MatrixPlan("layers.0.experts.1.down", 40, 100, "factored", 20, kept_energy=0.7),
        MatrixPlan("layers.0.experts.2.down", 40, 100, "dense", 40, kept_energy=1.0),
        MatrixPlan("layers.0.q", 16, 16, "pivot", 4),
        MatrixPlan("layers.1.q", 16, 16, "dense", 16),
    ]
    experts, pivot, dense = rank_cells(RankPlan(tuple(matrices), 0.6, "input", "uniform"))
    assert experts == {
        "kind": "experts.down",
        "block": 0,
        "full_rank": 40,
        "matrices": 3,
        "dense": 1,
        "pivot": 0,
        "rank": 15.0,
        "share": 0.375,
        "least": 0.25,
        "most": 0.5,
        "kept_energy": pytest.approx(2.2 / 3, abs=1e-6),
    }
    assert (pivot["pivot"], pivot["share"], pivot["kept_energy"]) == (1, 0.25, None)
    assert (dense["dense"], dense["rank"], dense["share"], dense["least"]) == (1, None, None, None)


@pytest.mark.parametrize("full_rank", [1, 2, 7, 32, 33, 4096])
def test_components_span_the_spectrum(full_rank: int) -> None:
    numbers = components(full_rank)
    assert numbers[0] == 1
    assert numbers[-1] == full_rank
    assert numbers == sorted(set(numbers))
    assert min(full_rank, 22) <= len(numbers) <= POINTS
    assert all(after - before <= 1 + full_rank / 16 for before, after in pairwise(numbers)), "the tail"
    assert all(after <= 2 * before for before, after in pairwise(numbers)), "the head"


def spectrum(values: list[float]) -> Spectrum:
    return Spectrum(torch.tensor(values, dtype=torch.float64), torch.eye(len(values)))


def test_spectra_are_geometric_means_of_normalised_values() -> None:
    found = spectrum_cells(
        {
            "layers.0.experts.0.up": spectrum([8.0, 4.0, 2.0]),
            "layers.0.experts.1.up": spectrum([100.0, 100.0, 100.0]),
            "layers.0.experts.2.up": spectrum([2.0, 1.0]),  # another size, another cell
            "layers.1.q": spectrum([0.0, 0.0]),
            "layers.2.q": spectrum([5.0, 0.0]),
        }
    )
    pair, other, zero, short = found
    assert pair["components"] == [1, 2, 3]
    assert pair["values"] == [1.0, float(f"{0.5**0.5:.4g}"), 0.5]
    assert pair["matrices"] == 2
    energy = [value / 84 for value in (64, 16, 4)]  # exp of the entropy, by hand
    effective = math.exp(-sum(p * math.log(p) for p in energy))
    assert pair["effective_rank"] == pytest.approx((effective + 3) / 2, rel=1e-3)
    assert (other["full_rank"], other["values"]) == (2, [1.0, 0.5])
    assert (zero["values"], zero["effective_rank"]) == ([0.0, 0.0], 0.0)
    assert short["values"] == [1.0, 0.0]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_large_spectrum_stays_small() -> None:
    values = torch.linspace(0, -9, 4096, dtype=torch.float64).exp()
    (cell,) = spectrum_cells({"layers.0.q": Spectrum(values, torch.zeros(1, 1))})
    for number, value in zip(cell["components"], cell["values"], strict=True):
        assert value == pytest.approx(float(values[number - 1]), rel=1e-3)
    assert len(json.dumps(cell)) < 700  # measured: 560


@pytest.mark.parametrize("count", [1, 7, 8, 9, 50, 1000])
@pytest.mark.parametrize("as_tensors", [False, True])
def test_points_are_means_of_equal_windows(count: int, as_tensors: bool) -> None:
    series = [math.sin(step) + step / 10 for step in range(1, count + 1)]
    curve = Curve(limit=8)
    for step, value in enumerate(series, 1):
        curve.add(step, torch.tensor(value, dtype=torch.float32) if as_tensors else value)
    found = curve.to_dict()
    window = found["mean_over"]
    assert len(found["steps"]) <= 8
    assert count / window <= 8
    windows = [series[start : start + window] for start in range(0, count, window)]
    assert found["steps"] == [min(count, window * (index + 1)) for index in range(len(windows))]
    expected = [sum(values) / len(values) for values in windows]
    assert found["values"] == pytest.approx(expected, rel=1e-6 if as_tensors else 1e-12)
    assert found["skipped"] == 0


@pytest.mark.parametrize("cut", [0, 1, 13, 40, 99])
def test_a_curve_goes_on_from_a_checkpoint(cut: int) -> None:
    whole, first, second = Curve(8), Curve(8), Curve(8)
    for step in range(100):
        whole.add(step, step**0.5)
        if step < cut:
            first.add(step, step**0.5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(cut, 100):
        second.add(step, step**0.5)
    assert second.to_dict() == whole.to_dict()


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    curve = Curve(8)
    for step, value in enumerate((1.0, math.nan, 3.0, math.inf)):
        curve.add(step, torch.tensor(value))
    assert curve.to_dict() == {"steps": [0, 2], "values": [1.0, 3.0], "mean_over": 1, "skipped": 2}


def test_a_buffer_that_is_written_into_does_not_change_the_curve() -> None:
    curve, buffer = Curve(8), torch.tensor(1.0)
    curve.add(1, buffer)
    buffer.fill_(5.0)
    assert curve.to_dict()["values"] == [1.0]
