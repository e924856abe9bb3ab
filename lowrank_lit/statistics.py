"""What calibration keeps of the activations: sums in float64 and the number of tokens behind them.

Sums, not means: they can be added over batches and over processes in any order and divided once at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_lit.linalg import require_finite


class MomentSum:
    """Sum of outer products ``x x^T`` over tokens.

    A batch's product is taken in float32 (float64 for float64 activations) and added to a float64 sum: half precision
    would lose the small eigenvalues next to the massive activations of some layers, and float32 sums would lose them
    over many batches.

    Attributes:
        sum: float64 ``(d, d)``.
        tokens: Number of tokens summed over.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        accumulate = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.sum = torch.zeros(size, size, dtype=accumulate, device=device)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """Add the tokens in ``rows``, shape ``(tokens, d)``."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self.sum += rows.mT @ rows
        self.tokens += len(rows)

    def merge(self, other: MomentSum) -> None:
        """Add another sum over other tokens."""
        self.sum += other.sum.to(self.sum.device)
        self.tokens += other.tokens

    def mean(self) -> Tensor:
        """The second moment ``E[x x^T]``, ``(d, d)``."""
        return self.sum / max(1, self.tokens)


@dataclass(frozen=True)
class LayerStatistics:
    """Second moments of one layer, kept on the smaller side.

    Attributes:
        tokens: Tokens seen.
        input_moment: ``R = E[x x^T]``, ``(columns, columns)``, or ``None`` where the output side is smaller.
        output_moment: ``E[y y^T] = W R W^T``, ``(rows, rows)``, bias left out, or ``None``.
        input_energy: ``tr R``, the mean squared length of an input.
    """

    tokens: int
    input_moment: Tensor | None
    output_moment: Tensor | None
    input_energy: float

    def check(self, name: str) -> None:
        """Check that the moments are finite.

        Raises:
            NonFiniteError: Naming the layer.
        """
        for label, moment in (("inputs", self.input_moment), ("outputs", self.output_moment)):
            if moment is not None:
                require_finite(moment, f"the {label} of layer '{name}' on the calibration text (second moment)")
