"""Each allocator against its formula, brute force or a plain re-implementation on enumerable matrices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_lit.allocation import MatrixProfile, MatrixSpec, allocate, budget_of, lower_bound, predicted_loss
from lowrank_lit.allocation.curves import Problem, lagrangian
from lowrank_lit.allocation.effective_rank import effective_rank, optimal_ranks
from lowrank_lit.allocation.hull import lower_hull
from lowrank_lit.allocation.measured import measured_curves
from lowrank_lit.allocation.multiple_choice import multiple_choice
from lowrank_lit.allocation.svd_llm_v2 import removed_shares
from lowrank_lit.errors import BudgetError, LowRankError

Curves = list[np.ndarray]


def cost(specs: list[MatrixSpec], ranks: list[int]) -> int:
    return sum(spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True))


def best_plan(specs: list[MatrixSpec], curves: Curves, budget: int) -> float:
    """Least summed loss of any plan, by trying all."""
    plans = itertools.product(*(spec.levels().tolist() for spec in specs))
    fits = (plan for plan in plans if cost(specs, list(plan)) <= budget)
    return min(sum(curve[rank] for curve, rank in zip(curves, plan, strict=True)) for plan in fits)


def shaped(generator: np.random.Generator, count: int, largest: int, **options: object) -> list[MatrixSpec]:
    sizes = generator.integers(3, largest, (count, 2)).tolist()
    return [MatrixSpec(f"m{i}", rows, columns, **options) for i, (rows, columns) in enumerate(sizes)]  # type: ignore[arg-type]


def with_nats(specs: list[MatrixSpec], curves: Curves) -> list[MatrixProfile]:
    return [MatrixProfile(spec, np.ones(spec.full_rank), nats=curve) for spec, curve in zip(specs, curves, strict=True)]


# -- uniform and UniRank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["factored", "pivot"])
def test_uniform_keeps_the_same_share_of_every_shape(storage: str) -> None:
    specs = [MatrixSpec(str(s), *s, storage=storage) for s in [(100, 400), (200, 200), (300, 50)]]  # type: ignore[arg-type]
    ranks = allocate([MatrixProfile(s, np.ones(s.full_rank)) for s in specs], allocator="uniform", keep_ratio=0.6)
    for spec, rank in zip(specs, ranks, strict=True):
        assert abs(spec.cost(rank) - 0.6 * spec.dense_cost) <= 1.5 * (spec.rows + spec.columns)
    # 4096 x 4096 at 20 / 40 / 60 % removed, from the design document
    square = MatrixSpec("a", 4096, 4096, storage=storage)  # type: ignore[arg-type]
    known = {"factored": (1638, 1228, 819), "pivot": (2264, 1505, 923)}[storage]
    for keep_ratio, rank in zip((0.8, 0.6, 0.4), known, strict=True):
        assert allocate([MatrixProfile(square, np.ones(4096))], allocator="uniform", keep_ratio=keep_ratio) == [rank]


def test_unirank_cut_equals_brute_force_global_sort() -> None:
    generator = np.random.default_rng(0)
    specs = [MatrixSpec("a", 12, 10), MatrixSpec("b", 20, 8), MatrixSpec("c", 9, 9)]
    energies = [np.sort(generator.exponential(size=s.full_rank))[::-1] for s in specs]
    importance = [0.3, 0.9, 0.05]
    budget = math.floor(0.5 * sum(s.dense_cost for s in specs))
    scored = sorted(
        (
            (importance[i] * e / energies[i].sum(), i)
            for i, s in enumerate(specs)
            for e in energies[i][1 : s.break_even]  # the first one is the floor
        ),
        reverse=True,
    )
    ranks = [1, 1, 1]
    for _, index in scored:  # in score order, one at a time, as long as each fits
        trial = [rank + (at == index) for at, rank in enumerate(ranks)]
        if cost(specs, trial) > budget:
            break
        ranks = trial
    profiles = [MatrixProfile(s, e, importance=w) for s, e, w in zip(specs, energies, importance, strict=True)]
    found = allocate(profiles, allocator="unirank", keep_ratio=0.5)
    assert all(got >= least for got, least in zip(found, ranks, strict=True))
    assert sum(found) - sum(ranks) <= 1  # at most the fill after the cut
    assert len(set(found)) > 1


def test_cost_awareness_prefers_the_cheap_component() -> None:
    energy = np.linspace(1, 0.9, 16)
    profiles = [MatrixProfile(MatrixSpec("thin", 16, 16), energy), MatrixProfile(MatrixSpec("wide", 16, 160), energy)]
    plain = allocate(profiles, allocator="unirank", keep_ratio=0.4)
    aware = allocate(profiles, allocator="unirank", keep_ratio=0.4, cost_aware=True)
    assert aware[0] == 16 > plain[0]  # per parameter, all of the small matrix comes before any of the large one
    assert aware[1] <= plain[1]


# -- D-Rank ------------------------------------------------------------------------------------------------------------


def test_effective_rank_is_the_exponential_of_the_entropy() -> None:
    assert effective_rank(np.ones(7)) == pytest.approx(7, rel=1e-14)
    assert effective_rank(np.array([3.0, 0, 0])) == 1
    assert effective_rank(np.zeros(4)) == 0
    assert effective_rank(np.array([2.0, 1, 1])) == pytest.approx(2**1.5, rel=1e-14)  # entropy 3/2 bits


def test_unclipped_ranks_are_the_closed_form() -> None:
    specs = [MatrixSpec("a", 400, 300), MatrixSpec("b", 500, 200), MatrixSpec("c", 300, 300)]
    effective, pair = np.array([20.0, 90, 40]), np.array([700.0, 700, 600])
    budget = 60_000
    closed = budget * np.sqrt(effective / pair) / np.sqrt(effective * pair).sum()
    np.testing.assert_allclose(optimal_ranks(specs, effective, budget), closed, rtol=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_no_ranks_of_the_budget_have_a_smaller_objective(seed: int) -> None:
    """Clipped at floor and break-even: against every integer plan, and against real exchanges between two matrices."""
    generator = np.random.default_rng(seed)
    specs = shaped(generator, 3, 24, floor=2)
    effective = generator.uniform(1, 20, 3) ** 2
    least = cost(specs, [int(spec.levels()[0]) for spec in specs])
    budget = int(least + 0.4 * (sum(spec.dense_cost for spec in specs) - least))
    ranks = optimal_ranks(specs, effective, budget)
    value = float((effective / ranks).sum())
    pair = np.array([spec.rows + spec.columns for spec in specs])
    assert float(ranks @ pair) == pytest.approx(budget, rel=1e-9)
    tops = np.array([spec.dense_cost / (spec.rows + spec.columns) for spec in specs])
    lows = np.minimum(2, tops)
    for plan in itertools.product(*(range(2, spec.break_even) for spec in specs)):
        if np.array(plan) @ pair <= budget:
            assert (effective / np.array(plan)).sum() >= value - 1e-9
    moved = 0
    for a, b in itertools.permutations(range(3), 2):
        trial = ranks.copy()
        step = 1e-3 * ranks[a]
        trial[a] -= step
        trial[b] += step * pair[a] / pair[b]
        if (trial >= lows).all() and (trial <= tops).all():
            moved += 1
            assert (effective / trial).sum() > value
    assert moved


def attention(
    keys: int = 32, kinds: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj"), energy: np.ndarray | None = None
) -> list[MatrixProfile]:
    found = []
    for kind, rows in zip(kinds, (128, keys, keys), strict=True):
        spec = MatrixSpec(f"layers.0.attn.{kind}", rows, 128)
        spectrum = np.arange(1.0, spec.full_rank + 1) ** -1 if energy is None else energy[: spec.full_rank]
        found.append(MatrixProfile(spec, spectrum, kind=kind, block=0))
    return found


@pytest.mark.parametrize("kinds", [("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv")])
@pytest.mark.parametrize("keys", [128, 64])
def test_shift_moves_parameters_from_q_and_k_to_v(kinds: tuple[str, str, str], keys: int) -> None:
    profiles = attention(keys, kinds)
    before = allocate(profiles, allocator="effective_rank", keep_ratio=0.4, beta=0.0)
    after = allocate(profiles, allocator="effective_rank", keep_ratio=0.4, beta=0.3)
    pair = [p.spec.rows + p.spec.columns for p in profiles]
    for index in (0, 1):  # within the rounding of two plans
        assert after[index] == pytest.approx(0.7 * before[index], abs=2)
    moved = 0.3 * (before[0] * pair[0] + before[1] * pair[1])
    room = profiles[2].spec.dense_cost - before[2] * pair[2]
    assert profiles[2].spec.cost(after[2]) - before[2] * pair[2] == pytest.approx(min(moved, room), abs=2 * sum(pair))


def test_no_shift_where_the_projections_are_not_known() -> None:
    for kinds in [("qkv", "k_proj", "v_proj"), ("a", "b", "c")]:
        profiles = attention(128, kinds)
        plain = allocate(profiles, allocator="effective_rank", keep_ratio=0.4, beta=0.0)
        assert allocate(profiles, allocator="effective_rank", keep_ratio=0.4) == plain
    with pytest.raises(LowRankError, match=r"beta=1.5 is outside \[0, 1\)"):
        allocate(attention(), allocator="effective_rank", keep_ratio=0.4, beta=1.5)


# -- SVD-LLM v2 --------------------------------------------------------------------------------------------------------


def test_removed_shares_are_the_papers_where_nothing_clips() -> None:
    specs = [MatrixSpec(str(i), 100, 100) for i in range(4)]
    losses = np.array([3.0, 5, 4, 9])
    logs = 1 + np.log(losses / losses.min())
    expected = 4 * 0.3 * (1 / logs) / (1 / logs).sum()
    assert expected.max() < 0.9
    np.testing.assert_allclose(removed_shares(losses, specs, 0.3), expected, rtol=1e-12)
    np.testing.assert_allclose(removed_shares(losses * 1e-30, specs, 0.3), expected, rtol=1e-10)  # no unit
    np.testing.assert_allclose(removed_shares(np.zeros(4), specs, 0.3), 0.3, rtol=1e-12)


def test_removed_shares_clip_at_the_floor_and_keep_the_budget() -> None:
    specs = [MatrixSpec("a", 40, 40, floor=10), MatrixSpec("b", 40, 80, floor=1), MatrixSpec("c", 40, 40, floor=1)]
    shares = removed_shares(np.array([1.0, 50, 2]), specs, 0.6)
    dense = np.array([spec.dense_cost for spec in specs])
    assert shares[0] == pytest.approx(0.5)  # ten of the twenty ranks below the break-even
    assert float(shares @ dense) == pytest.approx(0.6 * dense.sum(), rel=1e-12)


def test_every_type_keeps_its_budget() -> None:
    generator = np.random.default_rng(2)
    profiles = [
        MatrixProfile(
            MatrixSpec(f"{block}.{kind}", rows, 96),
            np.sort(generator.exponential(size=min(rows, 96)))[::-1] * scale * generator.uniform(0.1, 10),
            kind=kind,
        )
        for block in range(4)
        for kind, rows, scale in [("q_proj", 96, 1.0), ("up_proj", 256, 1e6)]
    ]
    ranks = allocate(profiles, allocator="svd_llm_v2", keep_ratio=0.6)
    for kind in ("q_proj", "up_proj"):
        pairs = [(p.spec, rank) for p, rank in zip(profiles, ranks, strict=True) if p.kind == kind]
        kept = sum(spec.cost(rank) for spec, rank in pairs) / sum(spec.dense_cost for spec, _ in pairs)
        assert kept == pytest.approx(0.6, abs=0.02)  # one component of one matrix is 0.5 % of a type
    assert len(set(ranks[::2])) > 1


# -- ASVD's table ------------------------------------------------------------------------------------------------------


def test_table_search_takes_the_shortest_list_that_fits() -> None:
    specs = [MatrixSpec("a", 20, 20), MatrixSpec("b", 20, 20), MatrixSpec("c", 20, 20)]
    tables = [{0.8: 1.0, 0.4: 2.0}, {0.8: 1.5, 0.4: 9.0}, {0.8: 5.0, 0.4: 7.0}]
    profiles = [MatrixProfile(s, np.ones(20), table=t) for s, t in zip(specs, tables, strict=True)]
    # by loss: a 0.8, b 0.8, a 0.4, c 0.8, c 0.4, b 0.4; keeping (0.4 + 0.8 + 1) / 3 = 0.733 needs the first three
    assert allocate(profiles, allocator="sensitivity", keep_ratio=0.734) == [4, 8, 20]
    # 0.70 needs the fourth, which leaves 0.1 of a matrix: one component of the gain per parameter that is largest, c's
    assert allocate(profiles, allocator="sensitivity", keep_ratio=0.70) == [4, 8, 9]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.25, 0.95))
def test_table_search_equals_a_walk_from_the_front(seed: int, keep_ratio: float) -> None:
    generator = np.random.default_rng(seed)
    specs = shaped(generator, 4, 30)
    ratios = (0.1, 0.3, 0.5, 0.7, 0.9)
    tables = [dict(zip(ratios, generator.uniform(0, 5, 5).tolist(), strict=True)) for _ in specs]
    profiles = [MatrixProfile(s, np.ones(s.full_rank), table=t) for s, t in zip(specs, tables, strict=True)]
    budget = math.floor(keep_ratio * sum(spec.dense_cost for spec in specs) + 1e-9)
    entries = sorted((loss, i, ratio) for i, table in enumerate(tables) for ratio, loss in table.items())
    kept = [1.0] * 4
    ranks = [spec.full_rank for spec in specs]
    for _, index, ratio in [(0.0, 0, 1.0), *entries]:
        kept[index] = min(kept[index], ratio)
        level = [
            k
            for k in specs[index].levels().tolist()
            if specs[index].cost(k) <= kept[index] * specs[index].dense_cost + 1e-6
        ]
        ranks[index] = max(level, default=1)
        if cost(specs, ranks) <= budget:
            break
    else:
        with pytest.raises(BudgetError, match=r"measure lower keep ratios|rank floor"):
            allocate(profiles, allocator="sensitivity", keep_ratio=keep_ratio)
        return
    found = allocate(profiles, allocator="sensitivity", keep_ratio=keep_ratio)
    assert all(got >= least for got, least in zip(found, ranks, strict=True))  # the fill only adds


def test_table_below_its_reach_and_bad_ratios() -> None:
    spec = MatrixSpec("a", 20, 20)
    with pytest.raises(
        BudgetError, match="smallest ratios keep 160 parameters of 120 allowed; measure lower keep ratios"
    ):
        allocate([MatrixProfile(spec, np.ones(20), table={0.4: 1.0})], allocator="sensitivity", keep_ratio=0.3)
    with pytest.raises(LowRankError, match="table of matrix 'a' has a keep ratio of 40"):
        allocate([MatrixProfile(spec, np.ones(20), table={40: 1.0})], allocator="sensitivity", keep_ratio=0.9)


# -- ZS-SVD ------------------------------------------------------------------------------------------------------------


def zero_sum_plainly(specs: list[MatrixSpec], changes: Curves, budget: int) -> tuple[list[int], float]:
    """One component at a time by linear search; floors of 1, quantum 1, nothing given back."""
    ranks, total = [spec.full_rank for spec in specs], 0.0
    while cost(specs, ranks) > budget:
        open_ = [i for i, spec in enumerate(specs) if ranks[i] > 1 and spec.break_even > 1]
        nexts = [(abs(changes[i][ranks[i] - 1]), i, changes[i][ranks[i] - 1]) for i in open_]
        raising, lowering = [n for n in nexts if n[2] >= 0], [n for n in nexts if n[2] < 0]
        first, second = (raising, lowering) if total <= 0 else (lowering, raising)
        _, index, change = min(first or second)
        ranks[index] -= 1
        total += change
    return ranks, total


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.4, 1.0), st.sampled_from(["factored", "pivot"]))
def test_zero_sum_equals_a_plain_simulation(seed: int, keep_ratio: float, storage: str) -> None:
    generator = np.random.default_rng(seed)
    specs = shaped(generator, 4, 20, storage=storage)
    changes = [generator.normal(size=spec.full_rank) for spec in specs]
    if cost(specs, [1] * 4) > keep_ratio * sum(spec.dense_cost for spec in specs):
        return
    ranks, _ = zero_sum_plainly(specs, changes, budget_of(specs, keep_ratio))
    ranks = [spec.full_rank if rank >= spec.break_even else rank for spec, rank in zip(specs, ranks, strict=True)]
    profiles = [MatrixProfile(s, np.ones(s.full_rank), first_order=c) for s, c in zip(specs, changes, strict=True)]
    found = allocate(profiles, allocator="zero_sum", keep_ratio=keep_ratio)
    assert all(got >= least for got, least in zip(found, ranks, strict=True))
    dearest = max(spec.rows + spec.columns for spec in specs)
    assert cost(specs, found) - cost(specs, ranks) < dearest  # only what the last removal saved too much


def test_zero_sum_by_hand() -> None:
    """6 x 6, break-even 3. Removals, with the running sum: a 1, b -1, a 0, a 1, b -1, a 0 (a saves from here on: 60
    parameters), a 1 (48, a at its floor), b -1, b -3 (36)."""
    spec = [MatrixSpec("a", 6, 6), MatrixSpec("b", 6, 6)]
    profiles = [MatrixProfile(s, np.ones(6), first_order=np.full(6, c)) for s, c in zip(spec, (1.0, -2.0), strict=True)]
    for parameters, expected in [(72, [6, 6]), (71, [2, 6]), (60, [2, 6]), (59, [1, 6]), (48, [1, 6]), (47, [1, 2])]:
        found = allocate(profiles, allocator="zero_sum", keep_ratio=parameters / 72)
        assert found == expected


# -- measured (LEMS) ---------------------------------------------------------------------------------------------------


def test_measured_curve_follows_the_tail_and_the_depth() -> None:
    energy = np.array([4.0, 3, 2, 1])
    profiles = [
        MatrixProfile(MatrixSpec(str(block), 4, 4), energy, block=block, probe=(2, 0.3)) for block in (3, 5, 13)
    ]
    first, second, last = measured_curves(profiles)
    np.testing.assert_allclose(first, 6 * 0.3 * np.array([10, 6, 3, 1, 0]) / 3, rtol=1e-14)
    np.testing.assert_allclose(second[:4] / last[:4], 5, rtol=1e-14)  # 6 - 5 * 2 / 10
    assert last[2] == pytest.approx(0.3)
    with pytest.raises(LowRankError, match="probe of matrix 'a' at rank 4 leaves out no energy; probe at a lower rank"):
        measured_curves([MatrixProfile(MatrixSpec("a", 4, 4), energy, probe=(4, 0.3))])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_dynamic_program_equals_exhaustive_search(seed: int, grain: int) -> None:
    """Losses of any shape, costs in multiples of a grain."""
    generator = np.random.default_rng(seed)
    costs = [grain * np.cumsum(generator.integers(1, 9, generator.integers(1, 6))) for _ in range(4)]
    losses = [generator.normal(size=len(values)) for values in costs]
    budget = int(sum(values[0] for values in costs) + generator.integers(0, 60 * grain))
    picked = multiple_choice(costs, losses, budget)
    plans = itertools.product(*(range(len(values)) for values in costs))
    fits = [plan for plan in plans if sum(int(c[i]) for c, i in zip(costs, plan, strict=True)) <= budget]
    best = min(sum(float(v[i]) for v, i in zip(losses, plan, strict=True)) for plan in fits)
    assert sum(int(c[i]) for c, i in zip(costs, picked, strict=True)) <= budget
    assert sum(float(v[i]) for v, i in zip(losses, picked, strict=True)) == pytest.approx(best, abs=1e-12)
    coarse = multiple_choice(costs, losses, budget, units=5)  # rounded up: never too dear, never below the optimum
    assert sum(int(c[i]) for c, i in zip(costs, coarse, strict=True)) <= budget
    assert sum(float(v[i]) for v, i in zip(losses, coarse, strict=True)) >= best - 1e-12


@pytest.mark.parametrize("seed", range(6))
def test_measured_plan_is_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    specs = shaped(generator, 3, 14)
    profiles = [
        MatrixProfile(
            spec,
            np.sort(generator.exponential(size=spec.full_rank))[::-1],
            block=i,
            probe=(1, generator.uniform(0.1, 2)),
        )
        for i, spec in enumerate(specs)
    ]
    ranks = allocate(profiles, allocator="measured", keep_ratio=0.7, grid=1)
    curves = measured_curves(profiles)
    value = sum(curve[rank] for curve, rank in zip(curves, ranks, strict=True))
    best = best_plan(specs, curves, budget_of(specs, 0.7))
    assert value == pytest.approx(best, rel=1e-12)
    coarse = allocate(profiles, allocator="measured", keep_ratio=0.7, grid=8)
    assert sum(curve[rank] for curve, rank in zip(curves, coarse, strict=True)) >= best - 1e-12
    with pytest.raises(LowRankError, match="grid=0 must be at least 1"):
        allocate(profiles, allocator="measured", keep_ratio=0.7, grid=0)


# -- knapsack ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-6, 6)), min_size=1, max_size=12), st.booleans())
def test_hull_lies_below_all_points_and_on_its_own(points: list[tuple[int, int]], falling: bool) -> None:
    x = np.cumsum([step for step, _ in points])
    y = np.array([float(value) for _, value in points])
    if falling:  # convex but for the last point, the usual curve
        y = np.append(np.cumsum(-np.sort(np.abs(y[:-1]))[::-1]), y[-1] - 9)
    corners = lower_hull(x, y)
    hull = np.interp(x, x[corners], y[corners])
    below = [
        min(
            (y[a] + (y[b] - y[a]) * (x[i] - x[a]) / (x[b] - x[a]) if a < b else y[i])
            for a in range(i + 1)
            for b in range(i, len(x))
        )
        for i in range(len(x))
    ]
    np.testing.assert_allclose(hull, below, atol=1e-12)
    assert (corners[0], corners[-1]) == (0, len(x) - 1)


def curves_of(generator: np.random.Generator, specs: list[MatrixSpec], shape: str) -> Curves:
    found = []
    for spec in specs:
        steps = generator.exponential(size=spec.full_rank)
        if shape == "convex":
            steps = np.sort(steps)[::-1]
        tail = np.append(np.cumsum(steps[::-1])[::-1], 0.0)
        found.append(generator.uniform(0, 3, spec.full_rank + 1) if shape == "any" else tail)
    return found


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    keep_ratio=st.floats(0.3, 1.0),
    storage=st.sampled_from(["factored", "pivot"]),
    shape=st.sampled_from(["convex", "falling", "any"]),
    quantum=st.sampled_from([1, 2]),
)
def test_knapsack_between_its_bounds(seed: int, keep_ratio: float, storage: str, shape: str, quantum: int) -> None:
    generator = np.random.default_rng(seed)
    specs = shaped(generator, 3, 12, storage=storage, quantum=quantum)
    curves = curves_of(generator, specs, shape)
    profiles = with_nats(specs, curves)
    try:
        budget = budget_of(specs, keep_ratio)
    except BudgetError:
        return
    ranks = allocate(profiles, allocator="knapsack", keep_ratio=keep_ratio)
    value, bound = predicted_loss(profiles, ranks), lower_bound(profiles, keep_ratio)
    best = best_plan(specs, curves, budget)
    assert bound - 1e-9 <= best <= value + 1e-9
    uniform = allocate(profiles, allocator="uniform", keep_ratio=keep_ratio)
    assert value <= predicted_loss(profiles, uniform) + 1e-9
    segments = []
    for spec, curve in zip(specs, curves, strict=True):
        levels = spec.levels()
        corners = lower_hull(spec.costs(levels), curve[levels])
        segments.append(float(-np.diff(curve[levels][corners]).min(initial=0.0)))
    assert value - bound <= max(segments) + 1e-9  # one segment of one hull


@pytest.mark.parametrize("seed", range(10))
def test_knapsack_is_within_one_component_on_convex_curves(seed: int) -> None:
    """Shapes whose break-even is a whole number, nothing lost beyond it: dense is then a component like any other."""
    generator = np.random.default_rng(seed)
    specs = [MatrixSpec("a", 12, 12), MatrixSpec("b", 24, 8), MatrixSpec("c", 10, 40)]
    dense = sum(spec.dense_cost for spec in specs)
    curves = []
    for spec in specs:
        steps = np.sort(generator.exponential(size=spec.full_rank))[::-1]
        steps[spec.break_even :] = 0
        curves.append(np.append(np.cumsum(steps[::-1])[::-1], 0.0))
    profiles = with_nats(specs, curves)
    for keep_ratio in (0.4, 0.55, 0.7):
        problem = Problem.of(specs, curves, budget_of(specs, keep_ratio))
        start, bound = lagrangian(problem)
        ranks = problem.ranks(start)
        following = [
            curve[rank] - curve[min(rank + 1, len(curve) - 1)] for curve, rank in zip(curves, ranks, strict=True)
        ]
        plan = allocate(profiles, allocator="knapsack", keep_ratio=keep_ratio)
        assert 0 <= predicted_loss(profiles, plan) - bound + 1e-12 <= max(following)
        # With a budget that the multiplier's plan meets exactly nothing is rounded: plan, bound and optimum agree.
        met = cost(specs, ranks)
        plan = allocate(profiles, allocator="knapsack", keep_ratio=met / dense)
        assert plan == ranks
        assert predicted_loss(profiles, plan) == pytest.approx(lower_bound(profiles, met / dense), rel=1e-12)
        assert predicted_loss(profiles, plan) == pytest.approx(best_plan(specs, curves, met), rel=1e-12)


def test_knapsack_is_optimal_on_small_problems() -> None:
    """Measured: all 100 plans are optimal; of the multiplier's plans alone, 36 are."""
    alone = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        specs = shaped(generator, 4, 10)
        curves = curves_of(generator, specs, "falling")
        profiles = with_nats(specs, curves)
        budget = budget_of(specs, 0.7)
        best = best_plan(specs, curves, budget)
        value = predicted_loss(profiles, allocate(profiles, allocator="knapsack", keep_ratio=0.7))
        assert best - 1e-9 <= value <= best * (1 + 1e-3)
        problem = Problem.of(specs, curves, budget)
        alone += problem.loss(lagrangian(problem)[0]) <= best + 1e-9
    assert alone < 60  # else the cases are too easy to show anything


def test_knapsack_makes_the_jump_to_dense() -> None:
    """A flat curve that falls to nothing at full rank alone is worth the dense form or the floor, nothing between."""
    flat = np.append(np.full(20, 1.0), 0.0)
    steep = np.append(np.cumsum(2.0 ** -np.arange(20)[::-1])[::-1], 0.0)
    specs = [MatrixSpec("flat", 20, 20), MatrixSpec("steep", 20, 20)]
    profiles = with_nats(specs, [flat, steep])
    assert allocate(profiles, allocator="knapsack", keep_ratio=0.8) == [20, 6]
    assert allocate(profiles, allocator="knapsack", keep_ratio=0.4)[0] == 1


def test_predicted_loss_counts_the_dense_form_from_the_break_even_on() -> None:
    curve = np.linspace(1, 0, 11)
    profiles = with_nats([MatrixSpec("a", 10, 10)], [curve])
    assert predicted_loss(profiles, [4]) == pytest.approx(0.6)
    assert predicted_loss(profiles, [5]) == predicted_loss(profiles, [10]) == 0
    with pytest.raises(LowRankError, match="matrix 'a' has no predicted loss; set nats"):
        predicted_loss([MatrixProfile(MatrixSpec("a", 10, 10), np.ones(10))], [4])
