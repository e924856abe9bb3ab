"""Spectra and factors against brute force in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_lit.errors import LowRankError, NonFiniteError
from lowrank_lit.linalg import damp
from lowrank_lit.spectrum import Spectrum, compute_spectrum
from lowrank_lit.statistics import LayerStatistics, MomentSum

SHAPES = [(6, 9), (9, 6), (7, 7)]


def problem(rows: int, columns: int, *, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs ``(tokens, columns)`` of controlled conditioning."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    mix = torch.randn(columns, columns, dtype=torch.float64, generator=generator)
    scales = torch.logspace(0, -2, columns, dtype=torch.float64)
    inputs = torch.randn(tokens, columns, dtype=torch.float64, generator=generator) * scales
    return weight, inputs @ mix


def statistics_of(weight: Tensor, inputs: Tensor, *, side: str) -> LayerStatistics:
    """Statistics as calibration gives them, on the input or the output side."""
    observed = inputs if side == "input" else inputs @ weight.mT
    total = MomentSum(observed.shape[1])
    for chunk in observed.split(64):
        total.add(chunk)
    energy = float(inputs.square().sum() / len(inputs))
    mean = total.mean()
    return LayerStatistics(len(inputs), mean if side == "input" else None, None if side == "input" else mean, energy)


def metric_error(weight: Tensor, approximation: Tensor, inputs: Tensor, damping: float) -> float:
    """tr(D R D^T) by brute force, with the damped moment of the inputs."""
    moment = damp(inputs.mT @ inputs / len(inputs), damping)
    difference = weight - approximation
    return float((difference @ moment @ difference.mT).trace())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_truncation_loss_is_the_dropped_energy(shape: tuple[int, int], side: str) -> None:
    weight, inputs = problem(*shape)
    spectrum = compute_spectrum(
        weight, statistics_of(weight, inputs, side=side), metric="input", name="layer", damping=1e-3
    )
    total = spectrum.loss(0)
    for rank in range(1, min(shape) + 1):
        outer, inner = spectrum.factors(weight, rank)
        assert outer.shape == (shape[0], rank)
        assert inner.shape == (rank, shape[1])
        measured = metric_error(weight, outer @ inner, inputs, 1e-3)
        assert measured == pytest.approx(spectrum.loss(rank), abs=1e-10 * total)  # measured 4e-15 of the total


@pytest.mark.parametrize("shape", SHAPES)
def test_truncation_is_the_optimum_of_whitened_svd(shape: tuple[int, int]) -> None:
    """The truncated SVD of W S with the Cholesky root S, undone by S^-1, is SVD-LLM's own optimum."""
    weight, inputs = problem(*shape)
    spectrum = compute_spectrum(weight, statistics_of(weight, inputs, side="input"), metric="input", name="layer")
    root = torch.linalg.cholesky(damp(inputs.mT @ inputs / len(inputs), 1e-4))
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    torch.testing.assert_close(spectrum.singular_values, s, rtol=1e-9, atol=1e-9 * float(s[0]))
    rank = 3
    expected = torch.linalg.solve_triangular(root, (u[:, :rank] * s[:rank]) @ vh[:rank], upper=False, left=False)
    outer, inner = spectrum.factors(weight, rank)
    torch.testing.assert_close(outer @ inner, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_sides_give_one_spectrum(shape: tuple[int, int]) -> None:
    weight, inputs = problem(*shape)
    one, other = (
        compute_spectrum(weight, statistics_of(weight, inputs, side=side), metric="input", name="layer")
        for side in ("input", "output")
    )
    k = min(shape)
    torch.testing.assert_close(
        one.singular_values[:k], other.singular_values[:k], rtol=1e-7, atol=1e-7 * float(one.singular_values[0])
    )
    outer, inner = one.factors(weight, 2)
    outer_2, inner_2 = other.factors(weight, 2)
    torch.testing.assert_close(outer @ inner, outer_2 @ inner_2, rtol=1e-7, atol=1e-7)


def test_input_metric_beats_plain_svd_on_the_inputs_and_loses_on_the_weight() -> None:
    weight, inputs = problem(8, 8)
    statistics = statistics_of(weight, inputs, side="input")
    errors = {}
    for metric in ("identity", "input"):
        outer, inner = compute_spectrum(weight, statistics, metric=metric, name="layer").factors(weight, 3)
        approximation = outer @ inner
        errors[metric] = (float(((weight - approximation) @ inputs.mT).norm()), float((weight - approximation).norm()))
    assert errors["input"][0] < 0.9 * errors["identity"][0]
    assert errors["identity"][1] < errors["input"][1]


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_is_exact_even_where_inputs_span_little(shape: tuple[int, int]) -> None:
    weight, inputs = problem(*shape, tokens=3)  # three tokens: the moment has rank 3, damping alone fills the rest
    for side in ("input", "output"):
        spectrum = compute_spectrum(weight, statistics_of(weight, inputs, side=side), metric="input", name="layer")
        outer, inner = spectrum.factors(weight, min(shape))
        torch.testing.assert_close(outer @ inner, weight, rtol=1e-9, atol=1e-9)


def test_identity_is_plain_svd() -> None:
    weight, _ = problem(6, 9)
    spectrum = compute_spectrum(weight, None, metric="identity", name="layer")
    torch.testing.assert_close(spectrum.singular_values, torch.linalg.svdvals(weight))
    assert spectrum.kept_energy(6) == 1.0
    assert Spectrum(torch.zeros(3), torch.eye(3)).kept_energy(1) == 1.0


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 9), columns=st.integers(2, 9), tokens=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_more_rank_never_costs_more(rows: int, columns: int, tokens: int, seed: int) -> None:
    weight, inputs = problem(rows, columns, tokens=tokens, seed=seed)
    spectrum = compute_spectrum(weight, statistics_of(weight, inputs, side="input"), metric="input", name="layer")
    errors = []
    for rank in range(1, min(rows, columns) + 1):
        outer, inner = spectrum.factors(weight, rank)
        errors.append(metric_error(weight, outer @ inner, inputs, 1e-4))
    slack = 1e-10 * (spectrum.loss(0) + 1e-300)
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))


def test_errors_name_the_layer_and_the_setting() -> None:
    weight, inputs = problem(4, 4)
    statistics = statistics_of(weight, inputs, side="input")
    bad = weight.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the weight of layer 'model\.q_proj'"):
        compute_spectrum(bad, statistics, metric="input", name="model.q_proj")
    broken = LayerStatistics(3, torch.full((4, 4), float("inf")), None, 1.0)
    with pytest.raises(NonFiniteError, match=r"the inputs of layer 'model\.q_proj' on the calibration text"):
        compute_spectrum(weight, broken, metric="input", name="model.q_proj")
    with pytest.raises(LowRankError, match="metric='inputs' is unknown; choose one of identity, input"):
        compute_spectrum(weight, statistics, metric="inputs", name="layer")
    with pytest.raises(LowRankError, match="metric='input' needs statistics of layer 'layer'"):
        compute_spectrum(weight, None, metric="input", name="layer")
