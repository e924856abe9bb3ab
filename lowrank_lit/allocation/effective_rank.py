"""D-Rank: ranks by the effective rank of each spectrum, then rank moved from queries and keys to values.

With ``p_i = sigma_i^2 / sum sigma^2`` the effective rank is ``R = exp(-sum p_i log p_i)``. Minimising ``sum_g R_g /
k_g`` under ``sum_g k_g w_g = T`` with ``w = rows + columns`` gives ``k_g = T sqrt(R_g / w_g) / sum_h sqrt(R_h w_h)``.
Bounds on the ranks only clip: the objective is convex and separable, so the optimum is ``clip(t sqrt(R_g / w_g))`` with
one ``t`` for all matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec, budget_of, spend_towards
from lowrank_lit.allocation.profile import MatrixProfile
from lowrank_lit.errors import LowRankError

_ATTENTION_KINDS = {
    "q": frozenset({"q_proj", "query", "q", "wq", "q_lin", "to_q", "query_proj", "self_attn_q"}),
    "k": frozenset({"k_proj", "key", "k", "wk", "k_lin", "to_k", "key_proj", "self_attn_k"}),
    "v": frozenset({"v_proj", "value", "v", "wv", "v_lin", "to_v", "value_proj", "self_attn_v"}),
}


def effective_rank_ranks(profiles: Sequence[MatrixProfile], keep_ratio: float, *, beta: float = 0.3) -> list[int]:
    """Ranks by D-Rank's closed form and its shift.

    Args:
        profiles: ``kind`` names the queries, keys and values; fused or unknown projections are not shifted.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].
        beta: Share of the parameters of queries and keys that moves to the values of the same attention, in [0, 1).

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
        LowRankError: If ``beta`` is out of its range.
    """
    if not 0 <= beta < 1:
        raise LowRankError(f"beta={beta} is outside [0, 1); it is the share of Q and K that moves to V, such as 0.3")
    specs = [profile.spec for profile in profiles]
    budget = budget_of(specs, keep_ratio)
    ranks = optimal_ranks(specs, np.array([effective_rank(profile.energy) for profile in profiles]), budget)
    return spend_towards(specs, _shift(profiles, _real_costs(specs, ranks), beta), keep_ratio)


def effective_rank(energy: NDArray[np.float64]) -> float:
    """``exp(entropy)`` of the normalised squared singular values ``(p,)``: from 1 to p, and 0 for a zero matrix."""
    total = float(energy.sum())
    if total <= 0:
        return 0.0
    share = energy[energy > 0] / total
    share = share[share > 0]  # a share may underflow
    return float(np.exp(-(share * np.log(share)).sum()))


def optimal_ranks(specs: Sequence[MatrixSpec], effective: NDArray[np.float64], budget: int) -> NDArray[np.float64]:
    """Real ranks ``clip(t sqrt(R / w))`` between floor and break-even whose costs add up to the budget.

    For two factors this minimises ``sum R / k``. The pivot form keeps the proportions; only ``t`` follows its cost.

    Args:
        specs: The matrices; their floors must fit the budget.
        effective: Effective ranks R, ``(len(specs),)``.
        budget: Parameters in all.
    """
    pair = np.array([float(spec.rows + spec.columns) for spec in specs])
    shape = np.sqrt(effective / pair)
    least = np.array([float(spec.levels()[0]) for spec in specs])
    most = np.array([_most(spec) for spec in specs])
    least = np.minimum(least, most)
    low, high = 0.0, float(np.max(most / np.where(shape > 0, shape, np.inf), initial=0.0))
    if _real_costs(specs, most).sum() <= budget:
        return most
    for _ in range(200):  # far beyond double precision; the sum of costs never falls with t
        middle = (low + high) / 2
        fits = _real_costs(specs, np.clip(middle * shape, least, most)).sum() <= budget
        low, high = (middle, high) if fits else (low, middle)
    ranks: NDArray[np.float64] = np.clip(low * shape, least, most)
    return ranks


def _most(spec: MatrixSpec) -> float:
    """Real rank at which the cost is exactly the dense one."""
    return float(spec.full_rank) if spec.storage == "pivot" else spec.dense_cost / (spec.rows + spec.columns)


def _real_costs(specs: Sequence[MatrixSpec], ranks: NDArray[np.float64]) -> NDArray[np.float64]:
    pair = np.array([float(spec.rows + spec.columns) for spec in specs])
    costs: NDArray[np.float64] = ranks * (pair - np.where([spec.storage == "pivot" for spec in specs], ranks, 0.0))
    return costs


def _shift(profiles: Sequence[MatrixProfile], costs: NDArray[np.float64], beta: float) -> NDArray[np.float64]:
    """Move ``beta`` of the parameters of Q and K to V inside each attention, as far as their floors and V's dense size
    allow.

    An attention is the matrices of one block whose names differ in their last part only; it must have one of each.
    """
    attentions: dict[tuple[int | None, str], dict[str, list[int]]] = {}
    for index, profile in enumerate(profiles):
        role = _role(profile.kind)
        if role:
            key = (profile.block, profile.spec.name.rpartition(".")[0])
            attentions.setdefault(key, {}).setdefault(role, []).append(index)
    shifted = costs.copy()
    for members in attentions.values():
        if sorted(members) != ["k", "q", "v"] or any(len(found) != 1 for found in members.values()):
            continue
        givers, taker = [members["q"][0], members["k"][0]], members["v"][0]
        specs = [profiles[index].spec for index in givers]
        floors = np.array([float(spec.cost(int(spec.levels()[0]))) for spec in specs])
        given = np.clip(costs[givers] - floors, 0.0, beta * costs[givers])
        room = max(profiles[taker].spec.dense_cost - costs[taker], 0.0)
        if given.sum() > room:
            given *= room / given.sum()
        shifted[givers] -= given
        shifted[taker] += given.sum()
    return shifted


def _role(kind: str) -> str | None:
    last = kind.rpartition(".")[2].lower()
    return next((role for role, names in _ATTENTION_KINDS.items() if last in names), None)
