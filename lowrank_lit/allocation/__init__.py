"""Allocators: spectra, costs and a budget in, one rank per matrix out."""

from lowrank_lit.allocation.allocate import ALLOCATORS, NEEDS, allocate, check_allocator
from lowrank_lit.allocation.budget import MatrixSpec, budget_of, check_keep_ratio, spend
from lowrank_lit.allocation.knapsack import lower_bound, predicted_loss
from lowrank_lit.allocation.nested import component_order, ranks_for_budget
from lowrank_lit.allocation.profile import MatrixProfile

__all__ = [
    "ALLOCATORS",
    "NEEDS",
    "MatrixProfile",
    "MatrixSpec",
    "allocate",
    "budget_of",
    "check_allocator",
    "check_keep_ratio",
    "component_order",
    "lower_bound",
    "predicted_loss",
    "ranks_for_budget",
    "spend",
]
