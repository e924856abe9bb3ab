"""Spectra and factors in every metric against brute force in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_lit.errors import LowRankError, NonFiniteError
from lowrank_lit.linalg import damp
from lowrank_lit.metrics import METRIC_MOMENTS
from lowrank_lit.spectrum import Spectrum, compute_spectrum, effective_rank, rank_for_energy, scalar_gradient
from lowrank_lit.statistics import LayerStatistics

SHAPES = [(6, 9), (9, 6), (7, 7)]
METRICS = tuple(METRIC_MOMENTS)
SEQUENCE = 8  # tokens
DAMPING, SHRINKAGE, ALPHA = 1e-3, 0.05, 0.5


def problem(rows: int, columns: int, *, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs ``(tokens, columns)`` and correlated gradients ``(tokens, rows)``."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def correlated(size: int) -> Tensor:
        mix = noise(size, size)
        return (noise(tokens, size) * torch.logspace(0, -2, size, dtype=torch.float64)) @ mix

    return noise(rows, columns), correlated(columns), 0.1 * correlated(rows)


def second_moment(samples: Tensor) -> Tensor:
    return samples.mT @ samples / len(samples)


def fisher(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Mean over sequences of the squared gradient of the weight, one sequence at a time."""
    squares = [(g.mT @ x).square() for x, g in zip(inputs.split(SEQUENCE), gradients.split(SEQUENCE), strict=True)]
    return torch.stack(squares).mean(0)


def statistics_of(weight: Tensor, inputs: Tensor, gradients: Tensor, *, full: bool = False) -> LayerStatistics:
    """Every moment on the side on which calibration keeps it; ``full`` has the input moment whatever the shape."""
    rows, columns = weight.shape
    squares = fisher(inputs, gradients)
    return LayerStatistics(
        tokens=len(inputs),
        input_energy=float(second_moment(inputs).trace()),
        input_moment=second_moment(inputs) if columns <= rows or full else None,
        output_moment=second_moment(inputs @ weight.mT) if rows < columns else None,
        input_magnitude=inputs.abs().mean(0),
        gradient_energy=float(second_moment(gradients).trace()),
        gradient_moment=second_moment(gradients) if rows <= columns else None,
        pulled_moment=second_moment(gradients @ weight) if columns < rows else None,
        sequences=-(-len(inputs) // SEQUENCE),
        fisher_rows=squares.sum(1),
        fisher_columns=squares.sum(0),
    )


def spectrum_of(weight: Tensor, statistics: LayerStatistics | None, metric: str) -> Spectrum:
    return compute_spectrum(
        weight, statistics, metric=metric, name="layer", damping=DAMPING, shrinkage=SHRINKAGE, alpha=ALPHA
    )


def roots_of(metric: str, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Lower triangular or diagonal ``Q`` and ``S``: the metric is ``||Q^T D S||_F^2``. As each source writes it."""
    columns, rows = inputs.shape[1], gradients.shape[1]
    moment = damp(second_moment(inputs), DAMPING)
    squares = fisher(inputs, gradients)
    per_row, per_column = (torch.maximum(sums, DAMPING * sums.mean()) for sums in (squares.sum(1), squares.sum(0)))
    one = torch.eye(rows, dtype=torch.float64)
    if metric == "identity":
        return one, torch.eye(columns, dtype=torch.float64)
    if metric == "input":
        return one, torch.linalg.cholesky(moment)
    if metric == "activation_scale":
        return one, torch.diag(inputs.abs().mean(0) ** ALPHA)
    if metric == "fisher_input":
        return one, torch.diag((per_column / rows).sqrt())
    if metric == "fisher_two_sided":
        return torch.diag((per_row / per_row.sum()).sqrt()), torch.diag(per_column.sqrt())
    if metric == "corda":
        return one, moment
    assert metric == "two_sided"
    return torch.linalg.cholesky(damp(second_moment(gradients), SHRINKAGE)), torch.linalg.cholesky(moment)


def cost(difference: Tensor, roots: tuple[Tensor, Tensor]) -> float:
    """``||Q^T D S||_F^2`` by brute force."""
    return float((roots[0].mT @ difference @ roots[1]).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_fewer_components_are_the_first_of_all(metric: str, shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    statistics = statistics_of(weight, inputs, gradients, full=metric == "corda")
    for known in (statistics, replace(statistics, tokens=1, gradient_moment=_zeros(statistics.gradient_moment))):
        every = spectrum_of(weight, known, metric)
        some = compute_spectrum(
            weight,
            known,
            metric=metric,
            name="layer",
            damping=DAMPING,
            shrinkage=SHRINKAGE,
            alpha=ALPHA,
            components=3,
        )
        assert torch.equal(some.singular_values, every.singular_values)
        assert some.left.shape[1] == 3
        torch.testing.assert_close(some.left, every.left[:, :3], rtol=0, atol=1e-12)
        if every.inner is not None:
            assert some.inner is not None
            torch.testing.assert_close(some.inner, every.inner[:3], rtol=0, atol=1e-12)
        torch.testing.assert_close(some.factors(weight, 2)[0], every.factors(weight, 2)[0], rtol=0, atol=1e-12)


def _zeros(moment: Tensor | None) -> Tensor | None:
    return None if moment is None else torch.zeros_like(moment)


@pytest.mark.parametrize("tall", [True, False])
def test_input_is_the_textbook_at_sizes_of_several_panels(tall: bool) -> None:
    """SVD-LLM's Cholesky root, SVD and inverse in float64, against products of triangles and a sought-for basis."""
    rows, columns = (400, 300) if tall else (300, 400)
    weight, inputs, gradients = problem(rows, columns, tokens=900)
    statistics = statistics_of(weight, inputs, gradients, full=tall)
    spectrum = spectrum_of(weight, statistics, "input")
    root = torch.linalg.cholesky(damp(second_moment(inputs), DAMPING))
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    torch.testing.assert_close(spectrum.singular_values, s, rtol=1e-6, atol=1e-8 * float(s[0]))
    for rank in (1, 40, 150):
        outer, inner = spectrum.factors(weight, rank)
        expected = torch.linalg.solve_triangular(root, (u[:, :rank] * s[:rank]) @ vh[:rank], upper=False, left=False)
        ours, book = (float(((weight - product) @ root).square().sum()) for product in (outer @ inner, expected))
        assert ours == pytest.approx(book, rel=1e-9)
        assert ours == pytest.approx(spectrum.loss(rank), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_truncation_costs_the_dropped_energy(metric: str, shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    roots = roots_of(metric, inputs, gradients)
    spectrum = spectrum_of(weight, statistics_of(weight, inputs, gradients, full=metric == "corda"), metric)
    assert spectrum.loss(0) == pytest.approx(cost(weight, roots), rel=1e-10)
    for rank in range(1, min(shape)):
        outer, inner = spectrum.factors(weight, rank)
        assert (outer.shape, inner.shape) == ((shape[0], rank), (rank, shape[1]))
        # Relative to what is dropped, not to the total: measured 2e-12 at most.
        assert cost(weight - outer @ inner, roots) == pytest.approx(spectrum.loss(rank), rel=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_truncation_is_the_optimum_of_explicit_scaling(metric: str, shape: tuple[int, int]) -> None:
    """SVD of ``Q^T W S`` with Cholesky or diagonal roots, undone by solves: the sources' own way to their optimum."""
    weight, inputs, gradients = problem(*shape)
    q, s = roots_of(metric, inputs, gradients)
    spectrum = spectrum_of(weight, statistics_of(weight, inputs, gradients, full=metric == "corda"), metric)
    u, values, vh = torch.linalg.svd(q.mT @ weight @ s, full_matrices=False)
    torch.testing.assert_close(spectrum.singular_values, values, rtol=1e-9, atol=1e-9 * float(values[0]))
    for rank in (1, 3, min(shape)):
        truncated = (u[:, :rank] * values[:rank]) @ vh[:rank]
        expected = torch.linalg.solve(q.mT, torch.linalg.solve(s, truncated, left=False))
        outer, inner = spectrum.factors(weight, rank)
        torch.testing.assert_close(outer @ inner, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_no_perturbation_of_the_factors_costs_less(metric: str, shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    roots = roots_of(metric, inputs, gradients)
    spectrum = spectrum_of(weight, statistics_of(weight, inputs, gradients, full=metric == "corda"), metric)
    outer, inner = spectrum.factors(weight, 3)
    best = cost(weight - outer @ inner, roots)
    for size in (1e-6, 1e-3, 1e-1):
        for _ in range(20):
            moved = (outer + size * torch.randn_like(outer)) @ (inner + size * torch.randn_like(inner))
            assert cost(weight - moved, roots) >= best * (1 - 1e-12)


@pytest.mark.parametrize("tokens", [200, 3])  # three tokens: both moments have rank 3, damping alone fills the rest
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_all_components_are_the_weight(metric: str, shape: tuple[int, int], tokens: int) -> None:
    weight, inputs, gradients = problem(*shape, tokens=tokens)
    spectrum = spectrum_of(weight, statistics_of(weight, inputs, gradients, full=metric == "corda"), metric)
    for nested in (False, True):
        outer, inner = spectrum.factors(weight, min(shape), nested=nested)
        assert float((outer @ inner - weight).norm() / weight.norm()) < 1e-12  # measured 2e-15, for corda 7e-14


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_every_prefix_of_nested_factors_is_the_best_of_its_rank(metric: str, shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    spectrum = spectrum_of(weight, statistics_of(weight, inputs, gradients, full=metric == "corda"), metric)
    outer, inner = spectrum.factors(weight, min(shape), nested=True)
    torch.testing.assert_close(outer.norm(dim=0), inner.norm(dim=1))
    for rank in range(1, min(shape)):
        best_outer, best_inner = spectrum.factors(weight, rank)
        torch.testing.assert_close(outer[:, :rank] @ inner[:rank], best_outer @ best_inner, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (7, 7)])
def test_input_metric_from_either_side(shape: tuple[int, int]) -> None:
    weight, inputs, _ = problem(*shape)
    by_input = LayerStatistics(tokens=200, input_moment=second_moment(inputs))
    outputs = second_moment(inputs @ weight.mT)
    energy = float(second_moment(inputs).trace())
    by_output = LayerStatistics(tokens=200, input_energy=energy, output_moment=outputs)
    one, other = (spectrum_of(weight, statistics, "input") for statistics in (by_input, by_output))
    torch.testing.assert_close(one.singular_values, other.singular_values, rtol=1e-8, atol=1e-8)
    first, second = (spectrum.factors(weight, 2) for spectrum in (one, other))
    torch.testing.assert_close(first[0] @ first[1], second[0] @ second[1], rtol=1e-7, atol=1e-7)


def test_input_metric_is_lords_principal_outputs() -> None:
    """LoRD keeps the leading eigenvectors of the outputs' covariance and projects on them."""
    weight, inputs, _ = problem(6, 9)
    statistics = LayerStatistics(tokens=200, input_energy=1.0, output_moment=second_moment(inputs @ weight.mT))
    spectrum = compute_spectrum(weight, statistics, metric="input", name="layer", damping=0.0)
    _, vectors = torch.linalg.eigh(second_moment(inputs @ weight.mT))
    kept = vectors[:, -3:]
    outer, inner = spectrum.factors(weight, 3)
    torch.testing.assert_close(outer @ inner, kept @ (kept.mT @ weight), rtol=1e-9, atol=1e-9)
    error = ((weight - outer @ inner) @ inputs.mT).square().sum() / len(inputs)
    assert spectrum.loss(3) == pytest.approx(float(error), rel=1e-9)  # SVD-LLM: the loss on the very inputs


def test_corda_is_its_own_formula() -> None:
    """CorDA writes ``W = (SVD of W R) R^-1``; here without the inverse, and in both orientations."""
    for shape in SHAPES:
        weight, inputs, gradients = problem(*shape)
        moment = damp(second_moment(inputs), DAMPING)
        u, s, vh = torch.linalg.svd(weight @ moment, full_matrices=False)
        spectrum = spectrum_of(weight, statistics_of(weight, inputs, gradients, full=True), "corda")
        outer, inner = spectrum.factors(weight, 2)
        expected = (u[:, :2] * s[:2]) @ vh[:2] @ torch.linalg.inv(moment)
        torch.testing.assert_close(outer @ inner, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sided_contains_the_other_metrics(shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    statistics = statistics_of(weight, inputs, gradients)
    rows, columns = shape
    equal = replace(
        statistics,
        gradient_energy=float(rows),
        gradient_moment=torch.eye(rows, dtype=torch.float64) if rows <= columns else None,
        pulled_moment=weight.mT @ weight if columns < rows else None,
    )
    white = replace(
        equal,
        input_energy=float(columns),
        input_moment=torch.eye(columns, dtype=torch.float64) if columns <= rows else None,
        output_moment=weight @ weight.mT if rows < columns else None,
    )
    for special, metric in ((equal, "input"), (white, "identity")):
        spectrum = spectrum_of(weight, special, "two_sided")
        expected = spectrum_of(weight, statistics, metric)
        torch.testing.assert_close(spectrum.singular_values, expected.singular_values, rtol=1e-8, atol=1e-8)
        one, other = spectrum.factors(weight, 3), expected.factors(weight, 3)
        torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_scalar_gradient_is_two_sided_at_full_shrinkage(shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    statistics = statistics_of(weight, inputs, gradients)
    expected = compute_spectrum(weight, statistics, metric="two_sided", name="layer", damping=DAMPING, shrinkage=1.0)
    spectrum = scalar_gradient(spectrum_of(weight, statistics, "input"), statistics)
    torch.testing.assert_close(spectrum.singular_values, expected.singular_values, rtol=1e-8, atol=1e-10)
    one, other = spectrum.factors(weight, 3), expected.factors(weight, 3)
    torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=1e-8, atol=1e-8)
    with pytest.raises(LowRankError, match="calibrate with the moment 'gradient'"):
        scalar_gradient(spectrum, LayerStatistics(tokens=200))


@pytest.mark.parametrize("shape", SHAPES)
def test_half_the_two_sided_cost_is_the_loss_in_nats(shape: tuple[int, int]) -> None:
    """Exact for a Gaussian likelihood: ``-log N(y + e; W x, V)`` has ``C = V^-1``, whatever the inputs."""
    rows, _ = shape
    weight, inputs, _ = problem(*shape, tokens=50)
    mix = torch.randn(rows, rows, dtype=torch.float64)
    root = torch.linalg.cholesky(mix @ mix.mT + 0.1 * torch.eye(rows, dtype=torch.float64))
    # Every input meets noise whose mean is zero and whose second moment is V exactly.
    noise = rows**0.5 * torch.cat([root.mT, -root.mT])  # (2 rows, rows), one draw a row
    tokens = inputs.repeat_interleave(len(noise), 0)
    errors = noise.repeat(len(inputs), 1)
    gradients = -torch.cholesky_solve(errors.mT, root).mT

    def loss(change: Tensor) -> float:
        residual = errors - tokens @ change.mT
        return float(0.5 * torch.linalg.solve_triangular(root, residual.mT, upper=False).square().sum(0).mean())

    statistics = statistics_of(weight, tokens, gradients)
    spectrum = compute_spectrum(weight, statistics, metric="two_sided", name="layer", damping=0.0, shrinkage=0.0)
    for rank in (1, 3, 5):
        outer, inner = spectrum.factors(weight, rank)
        change = loss(outer @ inner - weight) - loss(torch.zeros_like(weight))
        assert change == pytest.approx(spectrum.loss(rank) / 2, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_undamped_two_sided_does_not_depend_on_the_basis(shape: tuple[int, int]) -> None:
    """``x -> A x``, ``W -> B^-T W A^-1``, ``g -> B g`` is the same model in other coordinates."""
    weight, inputs, gradients = problem(*shape)
    rows, columns = shape
    a = torch.randn(columns, columns, dtype=torch.float64) + 3 * torch.eye(columns, dtype=torch.float64)
    b = torch.randn(rows, rows, dtype=torch.float64) + 3 * torch.eye(rows, dtype=torch.float64)
    moved = torch.linalg.solve(b.mT, torch.linalg.solve(a, weight, left=False))
    spectra = [
        compute_spectrum(w, statistics_of(w, x, g), metric="two_sided", name="layer", damping=0.0, shrinkage=0.0)
        for w, x, g in ((weight, inputs, gradients), (moved, inputs @ a.mT, gradients @ b.mT))
    ]
    first, second = (spectrum.singular_values for spectrum in spectra)
    torch.testing.assert_close(first, second, rtol=1e-8, atol=0)  # measured 1e-11
    one, other = (s.factors(w, 3) for s, w in zip(spectra, (weight, moved), strict=True))
    torch.testing.assert_close(b.mT @ other[0] @ other[1] @ a, one[0] @ one[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("metric", "by_inputs", "by_gradients"),
    [
        ("identity", 1, 1),
        ("input", 10, 1),
        ("activation_scale", 10**ALPHA, 1),
        ("fisher_input", 10, 1000),
        ("fisher_two_sided", 10, 1000),
        ("corda", 100, 1),
        ("two_sided", 10, 1000),
    ],
)
def test_units_scale_the_values_and_leave_the_factors(
    metric: str, by_inputs: float, by_gradients: float, shape: tuple[int, int]
) -> None:
    weight, inputs, gradients = problem(*shape)
    base, scaled = (
        spectrum_of(weight, statistics_of(weight, x, g, full=metric == "corda"), metric)
        for x, g in ((inputs, gradients), (10 * inputs, 1000 * gradients))
    )
    torch.testing.assert_close(scaled.singular_values, by_inputs * by_gradients * base.singular_values)
    one, other = base.factors(weight, 3), scaled.factors(weight, 3)
    torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=1e-8, atol=1e-8)


def test_the_two_fisher_metrics_agree_on_equal_rows() -> None:
    weight, _, _ = problem(6, 9)
    columns = torch.rand(9, dtype=torch.float64)
    statistics = LayerStatistics(tokens=1, fisher_rows=(columns.sum() / 6).repeat(6), fisher_columns=columns)
    one, other = (spectrum_of(weight, statistics, metric) for metric in ("fisher_input", "fisher_two_sided"))
    torch.testing.assert_close(one.singular_values, other.singular_values)
    # And their unit is that of F: with F of rank one the cost is the weighted sum of squares itself.
    squares = columns.expand(6, 9) / 6
    outer, inner = one.factors(weight, 2)
    assert one.loss(2) == pytest.approx(float((squares * (weight - outer @ inner).square()).sum()), rel=1e-10)


def test_metrics_win_in_their_own_norm() -> None:
    weight, inputs, gradients = problem(8, 8)
    statistics = statistics_of(weight, inputs, gradients)
    costs = {}
    for metric in METRICS:
        outer, inner = spectrum_of(weight, statistics, metric).factors(weight, 3)
        costs[metric] = {
            norm: cost(weight - outer @ inner, roots_of(norm, inputs, gradients)) for norm in ("identity", *METRICS)
        }
    for metric in METRICS:
        others = [costs[other][metric] for other in METRICS if other != metric]
        assert costs[metric][metric] < min(others)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", [metric for metric in METRICS if METRIC_MOMENTS[metric]])
def test_a_layer_without_inputs_or_gradients_costs_nothing(metric: str, shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    dead = [statistics_of(weight, 0 * inputs, gradients, full=metric == "corda")]
    if METRIC_MOMENTS[metric] & {"fisher", "gradient"}:
        dead.append(statistics_of(weight, inputs, 0 * gradients))
    for statistics in dead:
        spectrum = spectrum_of(weight, statistics, metric)
        assert spectrum.loss(0) == 0
        assert spectrum.kept_energy(1) == 1
        for rank in (2, min(shape)):  # the tie is broken by plain SVD
            one, other = spectrum.factors(weight, rank), spectrum_of(weight, None, "identity").factors(weight, rank)
            torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_a_dead_channel_and_no_damping_still_give_finite_factors(metric: str, shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    inputs[:, 2] = 0
    gradients[:, 1] = 0
    statistics = statistics_of(weight, inputs, gradients, full=metric == "corda")
    spectrum = compute_spectrum(weight, statistics, metric=metric, name="layer", damping=0.0, shrinkage=0.0)
    outer, inner = spectrum.factors(weight, min(shape))
    error = weight - outer @ inner
    assert bool(torch.isfinite(error).all())
    assert float((error @ inputs.mT).square().mean()) < 1e-9  # nothing is lost on the inputs that there are
    assert spectrum.loss(min(shape)) == 0


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(2, 9), columns=st.integers(2, 9), tokens=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_more_rank_never_costs_more(metric: str, rows: int, columns: int, tokens: int, seed: int) -> None:
    weight, inputs, gradients = problem(rows, columns, tokens=tokens, seed=seed)
    statistics = statistics_of(weight, inputs, gradients, full=metric == "corda")
    spectrum = spectrum_of(weight, statistics, metric)
    losses = [spectrum.loss(rank) for rank in range(min(rows, columns) + 1)]
    assert all(later <= earlier for earlier, later in pairwise(losses))
    roots = roots_of(metric, inputs, gradients)
    factors = [spectrum.factors(weight, rank) for rank in range(1, min(rows, columns) + 1)]
    costs = [cost(weight - outer @ inner, roots) for outer, inner in factors]
    assert costs == pytest.approx(losses[1:], abs=1e-9 * losses[0])


def test_identity_is_plain_svd_down_to_zero_singular_values() -> None:
    weight, _, _ = problem(6, 9)
    for matrix in (weight, weight.mT, weight[:, :2] @ weight[:2]):
        spectrum = compute_spectrum(matrix, None, metric="identity", name="layer")
        expected = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(spectrum.singular_values, expected, rtol=1e-12, atol=1e-13 * float(expected[0]))
    assert spectrum.kept_energy(6) == 1.0
    assert Spectrum(torch.zeros(3), torch.eye(3)).kept_energy(1) == 1.0


def test_half_precision_weights_are_decomposed_in_float64() -> None:
    weight, inputs, gradients = problem(6, 9)
    half = weight.bfloat16()
    for metric in METRICS:
        spectrum = spectrum_of(half, statistics_of(half.double(), inputs, gradients, full=True), metric)
        outer, inner = spectrum.factors(half, 6)
        assert outer.dtype == inner.dtype == spectrum.singular_values.dtype == torch.float64
        torch.testing.assert_close(outer @ inner, half.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("metric", ["input", "two_sided"])
def test_a_stored_spectrum_gives_the_same_factors(metric: str) -> None:
    weight, inputs, gradients = problem(9, 6)
    spectrum = spectrum_of(weight, statistics_of(weight, inputs, gradients), metric)
    stored = spectrum.to("cpu", torch.float32, components=4)
    assert stored.left.shape == (9, 4)
    assert stored.left.untyped_storage().nbytes() == 9 * 4 * 4
    torch.testing.assert_close(stored.singular_values, spectrum.singular_values, rtol=0, atol=0)
    one, other = spectrum.factors(weight, 4), stored.factors(weight, 4)
    torch.testing.assert_close(one[0] @ one[1], other[0] @ other[1], rtol=1e-5, atol=1e-5)
    for rank in (0, 5):
        with pytest.raises(LowRankError, match=f"rank={rank} is outside 1 to 4"):
            stored.factors(weight, rank)


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(torch.full((5,), 3.0)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    # p = (1/2, 1/4, 1/4): entropy 3/2 ln 2
    assert effective_rank(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)) == pytest.approx(2**1.5, rel=1e-14)
    energy = torch.rand(9, dtype=torch.float64)
    assert effective_rank(1e-30 * energy) == pytest.approx(effective_rank(energy))


def test_rank_for_energy_is_the_least_that_keeps_the_share() -> None:
    energy = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    expected = {0.0: 0, 0.1: 1, 0.5: 1, 0.51: 2, 0.75: 2, 0.8: 3, 0.875: 3, 0.9: 4, 1.0: 4}
    assert {share: rank_for_energy(energy, share) for share in expected} == expected
    assert rank_for_energy(torch.zeros(3), 0.9) == 0
    spread = torch.logspace(0, -20, 21, dtype=torch.float64)  # the tail is below rounding of the total
    assert rank_for_energy(spread, 1.0) == 21
    with pytest.raises(LowRankError, match=r"share=1\.5 is outside \[0, 1\]"):
        rank_for_energy(energy, 1.5)


def test_errors_name_the_layer_and_the_setting() -> None:
    weight, inputs, gradients = problem(4, 4)
    statistics = statistics_of(weight, inputs, gradients)
    bad = weight.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(NonFiniteError, match=r"the weight of layer 'model\.q_proj'"):
        compute_spectrum(bad, statistics, metric="input", name="model.q_proj")
    broken = LayerStatistics(tokens=3, input_energy=1.0, input_moment=torch.full((4, 4), float("inf")))
    with pytest.raises(NonFiniteError, match=r"layer 'model\.q_proj'"):
        compute_spectrum(weight, broken, metric="input", name="model.q_proj")
    with pytest.raises(LowRankError, match="metric='inputs' is unknown; choose one of identity, input"):
        compute_spectrum(weight, statistics, metric="inputs", name="layer")
    with pytest.raises(LowRankError, match="metric='input' needs statistics of layer 'layer'"):
        compute_spectrum(weight, None, metric="input", name="layer")
    with pytest.raises(LowRankError, match=r"the moment 'input' of layer 'layer' has shape \(4, 4\)"):
        compute_spectrum(torch.randn(6, 5), statistics, metric="input", name="layer")
    for setting in ("damping", "shrinkage", "alpha"):
        with pytest.raises(LowRankError, match=f"{setting}=-1 is"):
            compute_spectrum(weight, statistics, metric="input", name="layer", **{setting: -1})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("metric", "fields", "moment"),
    [
        ("input", ("input_moment", "output_moment"), "input"),
        ("activation_scale", ("input_magnitude",), "magnitude"),
        ("fisher_input", ("fisher_columns",), "fisher"),
        ("fisher_two_sided", ("fisher_rows",), "fisher"),
        ("fisher_two_sided", ("fisher_columns",), "fisher"),
        ("corda", ("input_moment",), "input_full"),
        ("two_sided", ("input_moment", "output_moment"), "input"),
        ("two_sided", ("gradient_moment", "pulled_moment"), "gradient"),
    ],
)
def test_a_missing_moment_is_named(metric: str, fields: tuple[str, ...], moment: str, shape: tuple[int, int]) -> None:
    weight, inputs, gradients = problem(*shape)
    statistics = replace(statistics_of(weight, inputs, gradients, full=metric == "corda"), **dict.fromkeys(fields))
    with pytest.raises(LowRankError, match=f"metric='{metric}' needs the moment '{moment}' of layer 'layer'"):
        spectrum_of(weight, statistics, metric)
