"""What an allocator may know of one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.allocation.budget import MatrixSpec


@dataclass(frozen=True, eq=False)
class MatrixProfile:
    """One matrix as the allocators see it; ``p = min(rows, columns)``. Each allocator reads the part that it needs.

    Attributes:
        spec: Shape, floor, storage and quantum.
        energy: Squared singular values in the chosen metric, largest first, ``(p,)``.
        importance: Of the module that the matrix belongs to, such as ``1 - cos`` of its sub-block in [0, 2].
        kind: Projection type, such as ``q_proj``; empty where unknown.
        block: Number of the transformer block, if any.
        first_order: Predicted change of the loss when component ``i`` alone is removed, with its sign, ``(p,)``.
        nats: Predicted loss at each rank ``0..p``, in nats per token against the dense matrix, ``(p + 1,)``.
        table: Keep ratio in (0, 1] to the loss measured with this matrix alone cut to it.
        probe: Rank, and the KL divergence in nats per token measured with this matrix alone cut to that rank.
    """

    spec: MatrixSpec
    energy: NDArray[np.float64]
    importance: float = 1.0
    kind: str = ""
    block: int | None = None
    first_order: NDArray[np.float64] | None = None
    nats: NDArray[np.float64] | None = None
    table: Mapping[float, float] | None = None
    probe: tuple[int, float] | None = None

    @property
    def tail_energy(self) -> NDArray[np.float64]:
        """Energy left out at each rank ``0..p``, ``(p + 1,)``; summed from the small end, so that small tails are
        exact."""
        return np.append(np.cumsum(np.asarray(self.energy, dtype=np.float64)[::-1])[::-1], 0.0)
