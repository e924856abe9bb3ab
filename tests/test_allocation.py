"""Budgets and allocators: brute force on small cases, properties on random ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_lit.allocation import ALLOCATORS, MatrixSpec, allocate, spend
from lowrank_lit.errors import BudgetError, LowRankError

sizes = st.integers(2, 24)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[MatrixSpec], list[np.ndarray], dict[str, float]]:
    """Random matrices with decaying spectra and random importance; floors of 1, so that any budget above them works."""
    count = draw(st.integers(1, 6))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    specs, energies, importance = [], [], {}
    for index in range(count):
        rows, columns = draw(sizes), draw(sizes)
        specs.append(MatrixSpec(f"layer.{index}", rows, columns, floor=1))
        decay = generator.uniform(0.1, 2.0)
        noise = generator.uniform(0.5, 1.5, min(rows, columns))
        energies.append(np.sort(np.arange(1.0, min(rows, columns) + 1) ** -decay * noise)[::-1])
        importance[f"layer.{index}"] = float(generator.uniform(0, 1))
    return specs, energies, importance


def cost(specs: list[MatrixSpec], ranks: list[int]) -> int:
    return sum(spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True))


@settings(max_examples=80, deadline=None)
@given(case=cases(), keep_ratio=st.floats(0.05, 1.0), allocator=st.sampled_from(ALLOCATORS))
def test_budget_is_kept_and_used(
    case: tuple[list[MatrixSpec], list[np.ndarray], dict[str, float]], keep_ratio: float, allocator: str
) -> None:
    specs, energies, importance = case
    budget = keep_ratio * sum(spec.dense_cost for spec in specs)
    if cost(specs, [1] * len(specs)) > budget:
        with pytest.raises(BudgetError, match="rank floor"):
            allocate(specs, energies, allocator=allocator, keep_ratio=keep_ratio, importance=importance)
        return
    ranks = allocate(specs, energies, allocator=allocator, keep_ratio=keep_ratio, importance=importance)
    spent = cost(specs, ranks)
    assert spent <= budget + 1e-6
    assert all(1 <= rank <= min(spec.rows, spec.columns) for spec, rank in zip(specs, ranks, strict=True))
    # What is left pays for no further component of any matrix.
    further = [spec.cost(rank + 1) - spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True)]
    real = [price for spec, rank, price in zip(specs, ranks, further, strict=True) if rank < spec.break_even]
    assert all(price > math.floor(budget + 1e-9) - spent for price in real)


@settings(max_examples=40, deadline=None)
@given(case=cases(), allocator=st.sampled_from(ALLOCATORS), seed=st.integers(0, 1000))
def test_relabelling_changes_nothing_but_the_order(
    case: tuple[list[MatrixSpec], list[np.ndarray], dict[str, float]], allocator: str, seed: int
) -> None:
    specs, energies, importance = case
    order = np.random.default_rng(seed).permutation(len(specs))
    keep_ratio = 0.9
    if cost(specs, [1] * len(specs)) > keep_ratio * sum(spec.dense_cost for spec in specs):
        return
    first = allocate(specs, energies, allocator=allocator, keep_ratio=keep_ratio, importance=importance)
    again = allocate(
        [specs[i] for i in order],
        [energies[i] for i in order],
        allocator=allocator,
        keep_ratio=keep_ratio,
        importance=importance,
    )
    spent_first, spent_again = cost(specs, first), cost([specs[i] for i in order], again)
    if allocator == "unirank":  # real-valued scores do not tie; the uniform ones do, between matrices of one shape
        assert [first[i] for i in order] == again
    assert abs(spent_first - spent_again) < max(spec.rows + spec.columns for spec in specs)


def test_unirank_cut_equals_brute_force_global_sort() -> None:
    generator = np.random.default_rng(0)
    specs = [MatrixSpec("a", 12, 10), MatrixSpec("b", 20, 8), MatrixSpec("c", 9, 9)]
    energies = [np.sort(generator.exponential(size=min(s.rows, s.columns)))[::-1] for s in specs]
    importance = {"a": 0.3, "b": 0.9, "c": 0.05}
    keep_ratio = 0.5
    budget = math.floor(keep_ratio * sum(s.dense_cost for s in specs))
    ranks = [1, 1, 1]
    scored = sorted(
        (
            (importance[s.name] * e / energies[i].sum(), i, k)
            for i, s in enumerate(specs)
            for k, e in enumerate(energies[i])
            if k >= 1
        ),
        reverse=True,
    )
    for _, index, _ in scored:  # in score order, one at a time, as long as each fits; then whatever still fits
        trial = list(ranks)
        trial[index] += 1
        if cost(specs, trial) > budget:
            break
        ranks = trial
    found = allocate(specs, energies, allocator="unirank", keep_ratio=keep_ratio, importance=importance)
    assert all(got >= least for got, least in zip(found, ranks, strict=True))
    assert sum(found) - sum(ranks) <= 1  # at most the fill after the cut
    assert len(set(found)) > 1


def test_importance_moves_rank() -> None:
    specs = [MatrixSpec("a", 32, 32), MatrixSpec("b", 32, 32)]
    energy = np.linspace(1, 0.01, 32)
    low = allocate(specs, [energy, energy], allocator="unirank", keep_ratio=0.5, importance={"a": 0.1, "b": 0.9})
    assert low[0] < low[1]
    even = allocate(specs, [energy, energy], allocator="uniform", keep_ratio=0.5, importance={})
    assert even == [8, 8]


def test_uniform_keeps_the_same_share_of_every_shape() -> None:
    specs = [MatrixSpec("wide", 100, 400), MatrixSpec("square", 200, 200), MatrixSpec("tall", 300, 50)]
    energies = [np.ones(min(s.rows, s.columns)) for s in specs]
    ranks = allocate(specs, energies, allocator="uniform", keep_ratio=0.6, importance={})
    for spec, rank in zip(specs, ranks, strict=True):
        assert abs(rank - 0.6 * spec.dense_cost / (spec.rows + spec.columns)) <= 1.5


def test_break_even_turns_dense_at_the_dense_price() -> None:
    spec = MatrixSpec("a", 10, 10)
    assert spec.break_even == 5
    assert [spec.cost(k) for k in (4, 5, 10)] == [80, 100, 100]
    assert list(spec.step_costs()) == [20, 20, 20, 20, 20, 0, 0, 0, 0, 0]
    odd = MatrixSpec("b", 9, 5)  # 45 / 14 = 3.2: the fourth component costs only the remainder
    assert list(odd.step_costs()) == [14, 14, 14, 3, 0]
    assert spend([odd], [np.array([5.0, 4, 3, 2, 1])], 1.0) == [5]


def test_whole_budget_keeps_everything_dense() -> None:
    specs = [MatrixSpec("a", 12, 7), MatrixSpec("b", 5, 30)]
    energies = [np.ones(7), np.ones(5)]
    for allocator in ALLOCATORS:
        ranks = allocate(specs, energies, allocator=allocator, keep_ratio=1.0, importance={"a": 0.1, "b": 0.0})
        assert cost(specs, ranks) == sum(spec.dense_cost for spec in specs)


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_ratio_outside_its_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(BudgetError, match=r"keep_ratio=.* is outside \(0, 1\]"):
        spend([MatrixSpec("a", 4, 4)], [np.ones(4)], keep_ratio)


def test_floor_above_the_budget_says_what_to_change() -> None:
    with pytest.raises(BudgetError, match="raise keep_ratio or lower min_rank"):
        spend([MatrixSpec("a", 100, 100, floor=8)], [np.ones(100)], 0.1)


def test_unknown_allocator_lists_the_known() -> None:
    with pytest.raises(LowRankError, match="allocator='uni' is unknown; choose one of uniform, unirank"):
        allocate([MatrixSpec("a", 4, 4)], [np.ones(4)], allocator="uni", keep_ratio=0.9, importance={})
