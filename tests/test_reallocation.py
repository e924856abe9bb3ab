"""The schedule, the running scores and the choice of components."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.allocation import MatrixSpec, spend
from lowrank_lit.errors import BudgetError, LowRankError, NonFiniteError, PlanError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.masks import MaskedLinear
from lowrank_lit.reallocation import (
    LatentSums,
    check_schedule,
    choose_components,
    load_sums,
    scheduled_ratio,
    share_sums,
    sums_to_dict,
)


def ratio(step: int, schedule: str) -> float:
    return scheduled_ratio(step, begin=10, end=30, first=0.9, last=0.4, schedule=schedule)


def test_schedules_by_hand() -> None:
    assert [ratio(step, "linear") for step in (0, 10, 15, 20, 30, 99)] == pytest.approx(
        [0.9, 0.9, 0.775, 0.65, 0.4, 0.4], abs=1e-12
    )
    assert [ratio(step, "cubic") for step in (0, 10, 20, 25, 30, 99)] == pytest.approx(
        [0.9, 0.9, 0.4 + 0.5 / 8, 0.4 + 0.5 / 64, 0.4, 0.4], abs=1e-12
    )
    assert ratio(30, "cubic") == ratio(30, "linear") == 0.4, "the target is reached exactly"


@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_schedules_never_rise(schedule: str) -> None:
    values = [ratio(step, schedule) for step in range(40)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("begin", "end", "every", "schedule", "named"),
    [
        (10, 10, 5, "cubic", "begin=10"),
        (20, 10, 5, "cubic", "begin=20"),
        (-1, 10, 5, "cubic", "begin=-1"),
        (0, 101, 5, "cubic", "end=101"),
        (0, 10, 0, "cubic", "every=0"),
        (0, 10, 5, "quartic", "schedule='quartic'"),
    ],
)
def test_a_schedule_that_does_not_fit_is_named(begin: int, end: int, every: int, schedule: str, named: str) -> None:
    with pytest.raises(LowRankError, match=named):
        check_schedule(begin, end, every, schedule, 100)


def test_a_schedule_may_end_with_the_run_and_a_run_without_end_takes_any() -> None:
    check_schedule(0, 100, 100, "linear", 100)
    check_schedule(0, 10**9, 1, "cubic", math.inf)


def layer(rank: int = 4) -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(FactoredLinear(6, 5, rank, bias=False, dtype=torch.float64))


def step(pair: MaskedLinear, x: Tensor, weights: Tensor) -> None:
    """Forward and backward of a loss that is a mean over the tokens."""
    (pair(x) * weights).sum(-1).mean().backward()


def test_sums_are_the_moments_of_latents_and_of_the_summed_losss_gradient() -> None:
    pair, sums = layer(), LatentSums.zeros(4)
    pair.sums = sums
    pair.mask.copy_(torch.tensor([True, False, True, True]))
    x, weights = torch.randn(3, 7, 6, dtype=torch.float64), torch.randn(3, 7, 5, dtype=torch.float64)
    step(pair, x, weights)
    latents = x @ pair.inner.weight.T
    pulled = weights @ pair.outer.weight  # of the summed loss, for components that are off as well
    expected = latents.square().mean((0, 1)) * pulled.square().mean((0, 1)) / 2
    assert float(sums.tokens) == 21
    torch.testing.assert_close(sums.nats("x"), expected, rtol=1e-12, atol=0)


def test_the_score_is_half_the_squared_singular_value_of_two_sided() -> None:
    """Exact where the components are the metric's and the loss is linear in the outputs."""
    from lowrank_lit.spectrum import compute_spectrum
    from lowrank_lit.statistics import LayerStatistics

    x, g = torch.randn(64, 6, dtype=torch.float64), torch.randn(64, 5, dtype=torch.float64)
    weight = torch.randn(5, 6, dtype=torch.float64)
    moment, steep = x.T @ x / 64, g.T @ g / 64
    statistics = LayerStatistics(
        64, input_energy=float(moment.trace()), input_moment=moment,
        gradient_energy=float(steep.trace()), gradient_moment=steep,
    )  # fmt: skip
    spectrum = compute_spectrum(weight, statistics, metric="two_sided", name="w", damping=0.0, shrinkage=0.0)
    outer, inner = spectrum.factors(weight, 5, nested=True)
    pair = MaskedLinear(FactoredLinear.from_factors(outer, inner, None))
    pair.sums = LatentSums.zeros(5)
    step(pair, x, g)
    torch.testing.assert_close(pair.sums.nats("w"), spectrum.energy() / 2, rtol=1e-9, atol=0)


def test_old_tokens_count_less() -> None:
    pair, sums = layer(), LatentSums.zeros(4)
    pair.sums = sums
    x, weights = torch.ones(10, 6, dtype=torch.float64), torch.ones(10, 5, dtype=torch.float64)
    step(pair, x, weights)
    first = sums.inputs.clone()
    sums.decay(0.25)
    step(pair, 2 * x, weights)
    torch.testing.assert_close(sums.inputs, 0.25 * first + 4 * first)
    assert float(sums.tokens) == 12.5


def test_padding_evaluation_and_overflow_are_not_counted() -> None:
    pair, sums = layer(), LatentSums.zeros(4)
    pair.sums = sums
    x, weights = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    with torch.no_grad():
        pair(x)
    pair(x)  # a forward without a backward
    step(pair, x, weights * math.inf)
    assert float(sums.tokens) == 0
    assert not bool(sums.inputs.any())
    sums.mask = torch.tensor([[True, True, False], [True, False, False]])
    step(pair, x, weights)
    assert float(sums.tokens) == 3
    expected = (x @ pair.inner.weight.T)[sums.mask].square().sum(0)
    torch.testing.assert_close(sums.inputs, expected)


def test_gradients_come_where_nothing_before_requires_one() -> None:
    """The first layer of a model whose inner factors are frozen."""
    pair, sums = layer(), LatentSums.zeros(4)
    pair.sums = sums
    pair.inner.requires_grad_(False)
    x, weights = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    step(pair, x, weights)
    torch.testing.assert_close(
        sums.gradients, (weights @ pair.outer.weight.detach()).square().sum(0)
    )  # of the sum, not of the mean


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    pair, sums = layer(), LatentSums.zeros(4)
    pair.sums = sums
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    result: Tensor = checkpoint(pair, x, use_reentrant=reentrant)
    result.sum().backward()
    assert float(sums.tokens) == 7
    torch.testing.assert_close(sums.inputs, (x @ pair.inner.weight.T).detach().square().sum(0))


def test_non_finite_sums_name_the_layer() -> None:
    sums = LatentSums.zeros(3)
    sums.inputs[1] = math.nan
    with pytest.raises(NonFiniteError, match=r"'blocks\.0\.up'"):
        sums.nats("blocks.0.up")


def test_shared_sums_are_the_mean_and_their_total_stays() -> None:
    """Two processes: each gets the same, and a later sum over both is the sum of all they saw."""
    ours, theirs = [LatentSums.zeros(2), LatentSums.zeros(3)], [LatentSums.zeros(2), LatentSums.zeros(3)]
    for number, entry in enumerate((*ours, *theirs)):
        for total in entry.totals:
            total += number + 1
    sent: list[Tensor] = []
    share_sums(theirs, lambda total: sent.append(total.clone()) or total, 1)  # type: ignore[func-returns-value]
    share_sums(ours, lambda total: total + sent[0], 2)
    assert [float(entry.tokens) for entry in ours] == [2.0, 3.0]  # (1 + 3) / 2 and (2 + 4) / 2
    assert ours[1].inputs.tolist() == [3.0] * 3


def specs_and_scores(seed: int = 0) -> tuple[list[MatrixSpec], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    specs = [MatrixSpec("a", 32, 32, 2), MatrixSpec("b", 64, 32, 2), MatrixSpec("c", 16, 32, 2)]
    scores = [torch.rand(spec.full_rank, generator=generator, dtype=torch.float64).pow(4) for spec in specs]
    return specs, scores


@pytest.mark.parametrize("keep_ratio", [0.9, 0.6, 0.4, 0.2])
def test_the_choice_keeps_the_budget_and_the_highest_scores(keep_ratio: float) -> None:
    specs, scores = specs_and_scores()
    masks = choose_components(specs, scores, keep_ratio)
    ranks = [int(mask.sum()) for mask in masks]
    sorted_scores = [values.sort(descending=True).values.numpy() for values in scores]
    assert ranks == spend(specs, sorted_scores, keep_ratio, per_parameter=True)
    stored = sum(spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True))
    assert stored <= keep_ratio * sum(spec.dense_cost for spec in specs)
    for mask, values in zip(masks, scores, strict=True):
        assert bool(mask.all()) or float(values[mask].min()) >= float(values[~mask].max())


def test_the_order_of_components_does_not_matter() -> None:
    specs, scores = specs_and_scores()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    masks = choose_components(specs, scores, 0.4)
    again = choose_components(specs, [scores[0][order], *scores[1:]], 0.4)
    assert torch.equal(masks[0][order], again[0])


def test_a_matrix_of_lower_rank_has_no_more_than_its_components() -> None:
    specs, scores = specs_and_scores()
    masks = choose_components(specs, [scores[0][:5] + 100, *scores[1:]], 0.6)
    assert masks[0].tolist() == [True] * 5
    least = choose_components(specs, [scores[0][:1], *scores[1:]], 0.9)
    assert len(least[0]) == 1


def test_a_budget_below_the_floors_is_refused() -> None:
    specs, scores = specs_and_scores()
    with pytest.raises(BudgetError, match="min_rank"):
        choose_components(specs, scores, 0.05)


def test_without_tokens_the_first_components_stay() -> None:
    """Equal scores keep the order, which is the metric's."""
    specs, _ = specs_and_scores()
    masks = choose_components(specs, [torch.zeros(spec.full_rank) for spec in specs], 0.4)
    for mask in masks:
        assert np.all(np.diff(mask.numpy().astype(int)) <= 0)


def test_sums_survive_a_checkpoint() -> None:
    pair = layer()
    pair.sums = LatentSums.zeros(4)
    step(pair, torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64))
    stored = sums_to_dict({"x": pair.sums})
    again = {"x": LatentSums.zeros(4)}
    load_sums(again, stored)
    assert all(torch.equal(a, b) for a, b in zip(again["x"].totals, pair.sums.totals, strict=True))
    again["x"].decay(0.5)
    assert float(stored["x"]["tokens"]) == 7, "a copy"
    for other in ({"y": LatentSums.zeros(4)}, {"x": LatentSums.zeros(5)}):
        with pytest.raises(PlanError, match="other layers or ranks"):
            load_sums(other, stored)


def test_watching_leaves_outputs_and_gradients_alone() -> None:
    pair, x = layer(), torch.randn(7, 6, dtype=torch.float64)
    plain = FactoredLinear.from_factors(pair.outer.weight.detach(), pair.inner.weight.detach(), None)
    pair.sums = LatentSums.zeros(4)
    assert torch.equal(pair(x), plain(x))
    pair(x).square().sum().backward()
    plain(x).square().sum().backward()
    for key in ("inner", "outer"):
        ours: nn.Linear = getattr(pair, key)
        assert torch.equal(ours.weight.grad, getattr(plain, key).weight.grad)  # type: ignore[arg-type]
