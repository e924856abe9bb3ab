"""Allocators: spectra, costs and a budget in, one rank per matrix out."""

from lowrank_lit.allocation.allocate import ALLOCATORS, allocate, needs_importance
from lowrank_lit.allocation.budget import MatrixSpec, check_keep_ratio, spend

__all__ = ["ALLOCATORS", "MatrixSpec", "allocate", "check_keep_ratio", "needs_importance", "spend"]
