"""SVD-LLM v2: inside each projection type, matrices that lose more are cut less.

With ``L_j`` the truncation loss of matrix ``j`` at the uniform ratio and ``p`` the removed share, the paper removes
``R_j = |G| p (1 / log L_j) / sum_G(1 / log L)`` of each matrix of a type ``G``, so every type keeps the same share.

The formula needs ``log L > 0`` and depends on the unit of the loss. Here losses are divided by the smallest of their
type and multiplied by e, so that ``log L_j = 1 + log(L_j / L_min)`` is at least 1 and no unit is left. A loss below
1e-12 of the largest of its type counts as that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec, budget_of, spend_towards
from lowrank_lit.allocation.profile import MatrixProfile
from lowrank_lit.allocation.uniform import uniform_ranks


def svd_llm_v2_ranks(profiles: Sequence[MatrixProfile], keep_ratio: float) -> list[int]:
    """Ranks by removed shares inside each ``kind``; matrices without one form a type of their own.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors do not fit.
    """
    specs = [profile.spec for profile in profiles]
    budget_of(specs, keep_ratio)
    uniform = uniform_ranks(specs, keep_ratio)
    losses = np.array([profile.tail_energy[rank] for profile, rank in zip(profiles, uniform, strict=True)])
    dense = np.array([float(spec.dense_cost) for spec in specs])
    targets = dense.copy()
    kinds = np.array([profile.kind for profile in profiles])
    for kind in dict.fromkeys(kinds.tolist()):
        members = np.flatnonzero(kinds == kind)
        removed = removed_shares(losses[members], [specs[index] for index in members], 1 - keep_ratio)
        targets[members] = (1 - removed) * dense[members]
    # One pace for all: floors that a type cannot pay for are then paid by all matrices, not by an error.
    return spend_towards(specs, targets, keep_ratio)


def removed_shares(losses: NDArray[np.float64], specs: Sequence[MatrixSpec], removed: float) -> NDArray[np.float64]:
    """Share of its parameters that each matrix of one type loses, ``(len(specs),)``.

    ``clip(c / log L_j, 0, 1 - floor)`` with ``c`` such that the type loses the share ``removed`` of its parameters;
    without clipping and with equal shapes that is the paper's ``c = |G| p / sum(1 / log L)``.

    Args:
        losses: Truncation losses at the uniform ratio, in any unit, ``(len(specs),)``.
        specs: The matrices of the type.
        removed: Share of the parameters to remove, in [0, 1).
    """
    largest = float(losses.max())
    weight = np.ones_like(losses)
    if largest > 0:
        # The logarithms are subtracted: tiny losses would overflow the quotient.
        logs = np.log(np.maximum(losses, max(largest * 1e-12, np.finfo(np.float64).tiny)))
        weight = 1 / (1 + logs - logs.min())
    dense = np.array([float(spec.dense_cost) for spec in specs])
    most = 1 - np.array([float(spec.cost(int(spec.levels()[0]))) for spec in specs]) / dense
    goal = min(removed * float(dense.sum()), float((most * dense).sum()))
    low, high = 0.0, 1.0 / float(weight.min())  # at the upper end every matrix is at its floor
    for _ in range(200):  # far beyond double precision; what is removed never falls with c
        middle = (low + high) / 2
        enough = float((np.clip(middle * weight, 0.0, most) * dense).sum()) >= goal
        low, high = (low, middle) if enough else (middle, high)
    return np.clip(high * weight, 0.0, most)
