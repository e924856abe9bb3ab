"""One order of components for all budgets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_lit.allocation import MatrixSpec, component_order, ranks_for_budget
from lowrank_lit.errors import BudgetError, LowRankError


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), quantum=st.integers(1, 3), per_parameter=st.booleans())
def test_smaller_models_are_prefixes_of_larger_ones(seed: int, quantum: int, per_parameter: bool) -> None:
    generator = np.random.default_rng(seed)
    specs = [
        MatrixSpec(
            str(i), *generator.integers(4, 24, 2).tolist(), floor=int(generator.integers(1, 12)), quantum=quantum
        )
        for i in range(4)
    ]
    scores = [generator.exponential(size=spec.full_rank) for spec in specs]
    order = component_order(specs, scores, per_parameter=per_parameter)
    assert len(set(order)) == len(order)
    dense = sum(spec.dense_cost for spec in specs)
    floors = [int(spec.levels()[0]) for spec in specs]
    least = sum(spec.cost(rank) for spec, rank in zip(specs, floors, strict=True)) / dense
    before = floors
    for keep_ratio in np.linspace(min(least + 1e-9, 1), 1, 15):
        ranks = ranks_for_budget(order, specs, float(keep_ratio))
        assert sum(spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True)) <= keep_ratio * dense + 1e-6
        assert all(more >= less for more, less in zip(ranks, before, strict=True))
        for spec, rank in zip(specs, ranks, strict=True):
            assert rank in spec.levels()
            assert rank < spec.break_even or len(spec.levels()) == 1  # dense only where the floor says so
        kept = {(i, c) for i, (low, high) in enumerate(zip(floors, ranks, strict=True)) for c in range(low, high)}
        assert set(order[: len(kept)]) == kept
        before = ranks
    tops = [int(levels[-2] if len(levels) > 1 else levels[-1]) for levels in (spec.levels() for spec in specs)]
    assert before == tops  # the whole budget takes the whole order
    with pytest.raises(BudgetError, match="rank floor"):
        ranks_for_budget(order, specs, least / 2)


def test_order_by_score_is_the_global_sort() -> None:
    specs = [MatrixSpec("a", 8, 8), MatrixSpec("b", 8, 8)]
    scores = [np.array([9.0, 7, 5, 3, 1, 1, 1, 1]), np.array([9.0, 8, 2, 1.5, 1, 1, 1, 1])]
    assert component_order(specs, scores) == [(1, 1), (0, 1), (0, 2), (1, 2)]
    assert ranks_for_budget([(1, 1), (0, 1), (0, 2), (1, 2)], specs, 0.6) == [2, 2]  # 64 of 76: the fifth costs 80


def test_prefixes_of_convex_curves_are_the_best_plans_of_their_cost() -> None:
    generator = np.random.default_rng(0)
    specs = [MatrixSpec("a", 12, 12), MatrixSpec("b", 20, 10), MatrixSpec("c", 9, 16)]
    curves = []
    for spec in specs:
        steps = np.sort(generator.exponential(size=spec.full_rank))[::-1]
        curves.append(np.append(np.cumsum(steps[::-1])[::-1], 0.0))
    order = component_order(specs, [-np.diff(curve) for curve in curves], per_parameter=True)
    plans = list(itertools.product(*(range(1, spec.break_even) for spec in specs)))
    losses = np.array([sum(curve[k] for curve, k in zip(curves, plan, strict=True)) for plan in plans])
    costs = np.array([sum(spec.cost(k) for spec, k in zip(specs, plan, strict=True)) for plan in plans])
    ranks, checked = [1, 1, 1], 0
    for matrix, component in order:
        assert component == ranks[matrix]
        ranks[matrix] += 1
        spent = sum(spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True))
        value = sum(curve[rank] for curve, rank in zip(curves, ranks, strict=True))
        assert value == pytest.approx(losses[costs <= spent].min(), rel=1e-12)
        dense = sum(spec.dense_cost for spec in specs)
        assert ranks_for_budget(order, specs, math.nextafter(spent / dense, 1)) == ranks
        checked += 1
    assert checked == sum(spec.break_even - 2 for spec in specs)


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(LowRankError, match="storage='pivot' of matrix 'a' cannot be cut on reading; nested plans need"):
        component_order([MatrixSpec("a", 8, 8, storage="pivot")], [np.ones(8)])
    with pytest.raises(LowRankError, match=r"scores of matrix 'a' have shape \(9,\); give one per component, \(8,\)"):
        component_order([MatrixSpec("a", 8, 8)], [np.ones(9)])


@pytest.mark.parametrize(
    "order",
    [
        [(0, 2), (0, 1)],  # out of order
        [(0, 1), (0, 1)],
        [(0, 2)],  # not from the floor on
        [(0, 1), (0, 2), (0, 3), (0, 4)],  # beyond the break-even
        [(1, 1)],
        [(-1, 1)],
    ],
)
def test_an_order_of_other_matrices_is_refused(order: list[tuple[int, int]]) -> None:
    with pytest.raises(LowRankError, match="make it from"):
        ranks_for_budget(order, [MatrixSpec("a", 8, 8)], 0.9)


@pytest.mark.parametrize("order", [[(0, 2)], [(0, 2), (1, 2), (0, 3), (1, 3)]])
def test_a_quantum_must_not_be_split(order: list[tuple[int, int]]) -> None:
    specs = [MatrixSpec("a", 20, 20, quantum=2), MatrixSpec("b", 20, 20, quantum=2)]
    with pytest.raises(LowRankError, match="make it from"):
        ranks_for_budget(order, specs, 0.9)


def test_nothing_beyond_the_floors_is_an_empty_order() -> None:
    specs = [MatrixSpec("a", 2, 2, floor=2)]
    assert component_order(specs, [np.ones(2)]) == []
    assert ranks_for_budget([], specs, 1.0) == [2]
