"""Cost model, budgets and what every allocator promises; the methods themselves are in test_allocation_methods.py."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lowrank_lit.allocation import (
    ALLOCATORS,
    NEEDS,
    MatrixProfile,
    MatrixSpec,
    allocate,
    budget_of,
    check_allocator,
    predicted_loss,
    spend,
)
from lowrank_lit.errors import BudgetError, LowRankError, NonFiniteError

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
# These make no move without a gain; where none is left they leave budget unspent.
SPENDS_ONLY_ON_GAINS = {"sensitivity", "measured", "knapsack"}


def profile(
    spec: MatrixSpec, generator: np.random.Generator, *, kind: str = "", block: int | None = None
) -> MatrixProfile:
    """Random, with a decaying spectrum and everything that any allocator needs."""
    size = spec.full_rank
    energy = np.sort(np.arange(1.0, size + 1) ** -generator.uniform(0.1, 2.0) * generator.uniform(0.5, 1.5, size))[::-1]
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    ratios = (0.01, 0.3, 0.6, 0.9)
    return MatrixProfile(
        spec,
        energy,
        importance=float(generator.uniform(0.01, 1)),
        kind=kind,
        block=block,
        first_order=generator.normal(size=size) * np.sqrt(energy),
        nats=generator.uniform(0.1, 2) * tail,
        table={ratio: float(generator.uniform(0.5, 1.5) * (1 - ratio)) for ratio in ratios},
        probe=(size // 4, float(generator.uniform(0.01, 1))),
    )


@st.composite
def cases(draw: st.DrawFn) -> list[MatrixProfile]:
    """Up to seven matrices of mixed shapes, forms, floors and quanta."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    quantum = draw(st.sampled_from([1, 1, 2, 4]))
    storage = draw(st.sampled_from(["factored", "pivot"]))
    found = []
    for index in range(draw(st.integers(1, 7))):
        spec = MatrixSpec(
            f"layer.{index // 6}.attention.{index}",
            draw(st.integers(2, 24)),
            draw(st.integers(2, 24)),
            floor=draw(st.integers(1, 3)),
            storage=storage,
            quantum=quantum,
        )
        found.append(profile(spec, generator, kind=KINDS[index % 6], block=index // 6))
    return found


def cost(profiles: list[MatrixProfile], ranks: list[int]) -> int:
    return sum(p.spec.cost(rank) for p, rank in zip(profiles, ranks, strict=True))


def least_ratio(profiles: list[MatrixProfile]) -> float:
    least = sum(p.spec.cost(int(p.spec.levels()[0])) for p in profiles)
    return least / sum(p.spec.dense_cost for p in profiles)


# -- cost model --------------------------------------------------------------------------------------------------------


def test_two_factors_cost_what_they_store() -> None:
    spec = MatrixSpec("a", 10, 10)
    assert (spec.break_even, spec.full_rank) == (5, 10)
    assert [spec.cost(k) for k in (4, 5, 10)] == [80, 100, 100]
    odd = MatrixSpec("b", 9, 5)  # 45 / 14 = 3.2: the fourth component costs only the remainder
    assert odd.levels().tolist() == [1, 2, 3, 5]
    assert np.diff(odd.costs(odd.levels())).tolist() == [14, 14, 3]
    assert spend([odd], [np.array([5.0, 4, 3, 2, 1])], 1.0) == [5]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(["factored", "pivot"]), st.integers(1, 9))
def test_levels_and_costs(rows: int, columns: int, storage: str, quantum: int) -> None:
    spec = MatrixSpec("a", rows, columns, storage=storage, quantum=quantum)  # type: ignore[arg-type]
    stored = [
        k * columns + (rows - k) * k if storage == "pivot" else rows * k + k * columns
        for k in range(min(rows, columns) + 1)
    ]
    reached = [k for k, numbers in enumerate(stored) if numbers >= rows * columns]
    assert spec.break_even == reached[0]
    assert [spec.cost(k) for k in range(len(stored))] == [min(numbers, rows * columns) for numbers in stored]
    levels = spec.levels()
    assert levels[-1] == min(rows, columns)
    assert all(rank % quantum == 0 and rank < spec.break_even for rank in levels[:-1])
    assert (np.diff(spec.costs(levels)) > 0).all()
    assert spec.costs(levels).tolist() == [spec.cost(int(rank)) for rank in levels]


def test_pivot_prices_fall_to_the_dense_cost() -> None:
    spec = MatrixSpec("a", 7, 5, storage="pivot")
    assert np.diff([spec.cost(k) for k in range(6)]).tolist() == [12 - 2 * k - 1 for k in range(5)]
    assert spec.cost(5) == spec.dense_cost
    assert spec.break_even == 5


def test_floor_is_rounded_up_to_the_quantum_or_to_dense() -> None:
    assert MatrixSpec("a", 40, 40, floor=9, quantum=8).levels().tolist() == [16, 40]
    assert MatrixSpec("a", 40, 40, floor=17, quantum=8).levels().tolist() == [40]
    assert MatrixSpec("a", 40, 40, floor=90).levels().tolist() == [40]


@pytest.mark.parametrize("field", ["rows", "columns", "floor", "quantum"])
def test_spec_refuses_numbers_below_one(field: str) -> None:
    with pytest.raises(LowRankError, match=f"{field}=0 of matrix 'a' must be at least 1"):
        MatrixSpec(**{"name": "a", "rows": 4, "columns": 4, field: 0})


def test_spec_refuses_an_unknown_storage() -> None:
    with pytest.raises(LowRankError, match="storage='sparse' of matrix 'a' is unknown; choose one of factored, pivot"):
        MatrixSpec("a", 4, 4, storage="sparse")  # type: ignore[arg-type]


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_ratio_outside_its_range_is_refused(keep_ratio: float) -> None:
    with pytest.raises(BudgetError, match=r"keep_ratio=.* is outside \(0, 1\]"):
        spend([MatrixSpec("a", 4, 4)], [np.ones(4)], keep_ratio)


def test_floor_above_the_budget_says_what_to_change() -> None:
    with pytest.raises(BudgetError, match=r"raise keep_ratio to at least 0\.16 or lower min_rank$"):
        budget_of([MatrixSpec("a", 100, 100, floor=8)], 0.1)
    with pytest.raises(BudgetError, match=r"raise keep_ratio to at least 0\.32 or lower min_rank or the quantum$"):
        budget_of([MatrixSpec("a", 100, 100, floor=8, quantum=16)], 0.1)
    assert budget_of([MatrixSpec("a", 100, 100, floor=8)], 0.16) == 1600


@pytest.mark.parametrize("storage", ["factored", "pivot"])
@pytest.mark.parametrize("quantum", [1, 3])
@pytest.mark.parametrize("per_parameter", [False, True])
def test_spend_equals_a_walk_through_the_sorted_steps(storage: str, quantum: int, per_parameter: bool) -> None:
    """Against single steps in the order of their scores, rises within a matrix flattened or pooled by search."""
    generator, checked = np.random.default_rng(3), 0
    for _ in range(30):
        specs = [
            MatrixSpec(str(i), *generator.integers(4, 16, 2).tolist(), storage=storage, quantum=quantum)  # type: ignore[arg-type]
            for i in range(3)
        ]
        scores = [generator.exponential(size=spec.full_rank) for spec in specs]
        budget = math.floor(0.7 * sum(spec.dense_cost for spec in specs))
        ranks = [int(spec.levels()[0]) for spec in specs]
        left = budget - sum(spec.cost(rank) for spec, rank in zip(specs, ranks, strict=True))
        if left < 0:
            continue
        steps = []
        for index, spec in enumerate(specs):
            levels = spec.levels().tolist()
            for at, (low, high) in enumerate(itertools.pairwise(levels)):
                if per_parameter:  # the best quotient of any run of steps through this one, of the worst start
                    urgent = min(
                        max(scores[index][a:b].sum() / (spec.cost(b) - spec.cost(a)) for b in levels if b > low)
                        for a in levels[: at + 1]
                    )
                else:
                    urgent = np.minimum.accumulate(scores[index])[low : min(high, spec.break_even)].mean()
                steps.append((-urgent, index, high, spec.cost(high) - spec.cost(low)))
        blocked: set[int] = set()
        for _, index, high, price in sorted(steps, key=lambda step: (round(step[0], 12), step[1], step[2])):
            if index not in blocked and price <= left:
                ranks[index], left = high, left - price
            else:
                blocked.add(index)
        assert spend(specs, scores, 0.7, per_parameter=per_parameter) == ranks
        checked += 1
    assert checked >= 10


# -- what every allocator promises -------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(profiles=cases(), keep_ratio=st.floats(0.05, 1.0), allocator=st.sampled_from(ALLOCATORS), aware=st.booleans())
def test_budget_floor_quantum_and_form(
    profiles: list[MatrixProfile], keep_ratio: float, allocator: str, aware: bool
) -> None:
    specs = [p.spec for p in profiles]
    dense = sum(spec.dense_cost for spec in specs)
    budget = math.floor(keep_ratio * dense + 1e-9)
    if cost(profiles, [int(spec.levels()[0]) for spec in specs]) > budget:
        with pytest.raises(BudgetError, match="rank floor"):
            allocate(profiles, allocator=allocator, keep_ratio=keep_ratio)
        return
    ranks = allocate(profiles, allocator=allocator, keep_ratio=keep_ratio, cost_aware=aware, grid=2)
    spent = cost(profiles, ranks)
    assert spent <= budget <= keep_ratio * dense + 1e-6
    for spec, rank in zip(specs, ranks, strict=True):
        assert type(rank) is int
        assert rank >= min(spec.floor, spec.full_rank)
        assert rank in spec.levels()
        assert rank == spec.full_rank or (rank < spec.break_even and rank % spec.quantum == 0)
    if allocator not in SPENDS_ONLY_ON_GAINS:  # what is left pays for no further step of any matrix
        for spec, rank in zip(specs, ranks, strict=True):
            further = [spec.cost(int(level)) - spec.cost(rank) for level in spec.levels() if level > rank]
            assert not further or further[0] > budget - spent


@settings(max_examples=60, deadline=None)
@given(profiles=cases(), allocator=st.sampled_from(ALLOCATORS), seed=st.integers(0, 1000), slack=st.floats(0.05, 0.95))
def test_the_order_of_the_matrices_is_irrelevant(
    profiles: list[MatrixProfile], allocator: str, seed: int, slack: float
) -> None:
    least = least_ratio(profiles)
    keep_ratio = least + slack * (1 - least)
    order = np.random.default_rng(seed).permutation(len(profiles))
    first = allocate(profiles, allocator=allocator, keep_ratio=keep_ratio)
    again = allocate([profiles[i] for i in order], allocator=allocator, keep_ratio=keep_ratio)
    if allocator in {"uniform", "effective_rank", "svd_llm_v2"}:
        # Shares of a target tie, between matrices of one shape or at the dense target; the rest goes by position then.
        step = max(int(np.diff(p.spec.costs(p.spec.levels()), prepend=0).max()) for p in profiles)
        assert abs(cost(profiles, first) - cost([profiles[i] for i in order], again)) <= step
    else:
        assert [first[i] for i in order] == again


@settings(max_examples=60, deadline=None)
@given(profiles=cases(), allocator=st.sampled_from(ALLOCATORS), slack=st.floats(0.05, 0.95))
def test_the_unit_of_the_measurements_is_irrelevant(
    profiles: list[MatrixProfile], allocator: str, slack: float
) -> None:
    """Everything times a power of two, which is exact; spectra may even differ from matrix to matrix where their shape
    alone counts."""
    least = least_ratio(profiles)
    keep_ratio = least + slack * (1 - least)
    own = allocator in {"uniform", "unirank", "effective_rank", "measured"}
    scaled = [
        dataclasses.replace(
            p,
            energy=p.energy * 4.0 ** (index if own else 3),
            importance=p.importance * 0.25,
            first_order=p.first_order * 8,  # type: ignore[operator]
            nats=p.nats * 16,  # type: ignore[operator]
            table={ratio: loss * 32 for ratio, loss in p.table.items()},  # type: ignore[union-attr]
            probe=(p.probe[0], p.probe[1] * 64),  # type: ignore[index]
        )
        for index, p in enumerate(profiles)
    ]
    first = allocate(profiles, allocator=allocator, keep_ratio=keep_ratio)
    again = allocate(scaled, allocator=allocator, keep_ratio=keep_ratio)
    if allocator == "svd_llm_v2":  # logarithms of a scaled loss round differently; a tie may turn
        assert sum(abs(a - b) for a, b in zip(first, again, strict=True)) <= 2 * max(p.spec.full_rank for p in profiles)
    else:
        assert first == again


@pytest.mark.parametrize("storage", ["factored", "pivot"])
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_whole_budget_keeps_everything_dense(allocator: str, storage: str) -> None:
    generator = np.random.default_rng(0)
    shapes = [(12, 7), (5, 30), (16, 16)]
    profiles = [profile(MatrixSpec(str(shape), *shape, storage=storage), generator) for shape in shapes]  # type: ignore[arg-type]
    assert allocate(profiles, allocator=allocator, keep_ratio=1.0) == [7, 5, 16]


@pytest.mark.parametrize("allocator", [name for name in ALLOCATORS if name not in {"uniform"}])
def test_every_allocator_tells_the_matrices_apart(allocator: str) -> None:
    """Perturb and see it move: one of two equal matrices is made to matter more."""
    generator = np.random.default_rng(1)
    base = profile(MatrixSpec("a", 32, 32), generator, kind="o_proj", block=0)
    flat = np.linspace(1, 0.5, 32)
    tail = np.append(np.cumsum(flat[::-1])[::-1], 0.0)
    more = dataclasses.replace(
        base,
        spec=MatrixSpec("b", 32, 32),
        energy=flat,
        importance=base.importance * 2,
        first_order=np.abs(base.first_order) * 9,  # type: ignore[arg-type]
        nats=tail * 9,
        table={ratio: loss * 3 for ratio, loss in base.table.items()},  # type: ignore[union-attr]
        probe=(8, 9.0),
    )
    less = dataclasses.replace(base, first_order=np.abs(base.first_order))  # type: ignore[arg-type]
    ranks = allocate([less, more], allocator=allocator, keep_ratio=0.5)
    assert ranks[0] < ranks[1]
    assert allocate([more, less], allocator=allocator, keep_ratio=0.5) == ranks[::-1]
    assert predicted_loss([less, more], ranks) < predicted_loss([less, more], ranks[::-1])


# -- the entry ---------------------------------------------------------------------------------------------------------


def test_unknown_allocator_lists_the_known() -> None:
    with pytest.raises(
        LowRankError, match="allocator='uni' is unknown; choose one of uniform, unirank, effective_rank"
    ):
        check_allocator("uni")
    with pytest.raises(LowRankError, match="allocator='uni' is unknown"):
        allocate([MatrixProfile(MatrixSpec("a", 4, 4), np.ones(4))], allocator="uni", keep_ratio=0.9)


def test_needs_are_fields_and_their_absence_is_named() -> None:
    fields = {field.name for field in dataclasses.fields(MatrixProfile)}
    assert set(NEEDS) == set(ALLOCATORS)
    bare = [MatrixProfile(MatrixSpec("model.up", 8, 8), np.ones(8))]
    for allocator, needed in NEEDS.items():
        assert needed <= fields
        if needed <= {"importance"}:
            assert allocate(bare, allocator=allocator, keep_ratio=0.8) == [3]
        else:
            with pytest.raises(LowRankError, match=f"'model.up' has no .*set {next(iter(needed))} of its profile"):
                allocate(bare, allocator=allocator, keep_ratio=0.8)


@pytest.mark.parametrize("field", ["energy", "first_order", "nats", "importance", "table", "probe"])
def test_a_number_that_is_not_finite_names_the_matrix(field: str) -> None:
    good = profile(MatrixSpec("model.up", 8, 8), np.random.default_rng(0))
    bad = {
        "energy": np.full(8, np.nan),
        "first_order": np.full(8, np.inf),
        "nats": np.full(9, np.nan),
        "importance": math.nan,
        "table": {0.5: math.inf},
        "probe": (2, math.nan),
    }
    with pytest.raises(NonFiniteError, match=f"{field} of matrix 'model.up' holds a NaN or infinity"):
        allocate([dataclasses.replace(good, **{field: bad[field]})], allocator="uniform", keep_ratio=0.9)


def test_wrong_shapes_and_signs_are_refused() -> None:
    spec = MatrixSpec("model.up", 8, 6)
    with pytest.raises(LowRankError, match=r"energy of matrix 'model.up' has shape \(8,\); it must be \(6,\)"):
        allocate([MatrixProfile(spec, np.ones(8))], allocator="uniform", keep_ratio=0.9)
    with pytest.raises(LowRankError, match=r"nats of matrix 'model.up' has shape \(6,\); it must be \(7,\)"):
        allocate([MatrixProfile(spec, np.ones(6), nats=np.ones(6))], allocator="knapsack", keep_ratio=0.9)
    with pytest.raises(LowRankError, match="must not be negative"):
        allocate([MatrixProfile(spec, -np.ones(6))], allocator="uniform", keep_ratio=0.9)
    with pytest.raises(LowRankError, match="there is no matrix"):
        allocate([], allocator="uniform", keep_ratio=0.9)


@settings(max_examples=30, deadline=None)
@given(profiles=cases(), allocator=st.sampled_from(ALLOCATORS))
def test_a_zero_matrix_is_no_obstacle(profiles: list[MatrixProfile], allocator: str) -> None:
    size = profiles[0].spec.full_rank
    zeros = dataclasses.replace(
        profiles[0], energy=np.zeros(size), first_order=np.zeros(size), nats=np.zeros(size + 1), importance=0.0
    )
    profiles = [zeros, *profiles[1:]]
    assume(least_ratio(profiles) <= 0.8)
    ranks = allocate(profiles, allocator=allocator, keep_ratio=0.8)
    assert cost(profiles, ranks) <= 0.8 * sum(p.spec.dense_cost for p in profiles) + 1e-6
