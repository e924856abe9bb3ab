"""A series of any length in a bounded number of points."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_WAITING = 32
"""Values that wait on their device before they are fetched together: a fetch makes the host wait for the device."""


class Curve:
    """Means of a series over windows of equally many values; whenever all points are used, neighbours are merged.

    Args:
        limit: Most closed windows, an even number.

    Attributes:
        window: Values that a point is the mean of.
        skipped: Values that were not finite; they are in no mean.
    """

    def __init__(self, limit: int = 256) -> None:
        assert limit > 0
        assert limit % 2 == 0
        self.window = 1
        self.skipped = 0
        self._limit = limit
        self._points: list[tuple[int, float]] = []
        self._sum, self._count, self._step = 0.0, 0, 0  # of the open window
        self._waiting: list[tuple[int, Tensor | float]] = []

    def add(self, step: int, value: Tensor | float) -> None:
        """Add one value, of one element if it is a tensor, measured at ``step``."""
        # Cloned, for the tensor may be a buffer that the next step writes into.
        self._waiting.append((step, value.detach().reshape(()).clone() if isinstance(value, Tensor) else float(value)))
        if len(self._waiting) >= _WAITING:
            self._fetch()

    def _fetch(self) -> None:
        waiting, self._waiting = self._waiting, []
        tensors = [value for _, value in waiting if isinstance(value, Tensor)]
        fetched = iter(torch.stack(tensors).float().tolist() if tensors else [])
        for step, value in waiting:
            number = next(fetched) if isinstance(value, Tensor) else value
            if math.isfinite(number):
                self._take(step, number)
            else:
                self.skipped += 1

    def _take(self, step: int, value: float) -> None:
        self._sum, self._count, self._step = self._sum + value, self._count + 1, step
        if self._count < self.window:
            return
        self._points.append((step, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self._points) == self._limit:
            pairs = zip(self._points[::2], self._points[1::2], strict=True)
            self._points = [(later[0], (earlier[1] + later[1]) / 2) for earlier, later in pairs]
            self.window *= 2

    def to_dict(self) -> dict[str, Any]:
        """``steps``, the last of each window, and ``values``, the means, of which the last window may not be full;
        ``mean_over`` values, and how many were ``skipped``."""
        self._fetch()
        points = [*self._points, *([(self._step, self._sum / self._count)] if self._count else [])]
        return {
            "steps": [step for step, _ in points],
            "values": [value for _, value in points],
            "mean_over": self.window,
            "skipped": self.skipped,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint; see :meth:`load_state_dict`."""
        self._fetch()
        open_window = [self._sum, self._count, self._step]
        points = [list(point) for point in self._points]
        return {"window": self.window, "skipped": self.skipped, "points": points, "open": open_window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.window, self.skipped = state["window"], state["skipped"]
        self._points = [(step, value) for step, value in state["points"]]
        self._sum, self._count, self._step = state["open"]
        self._waiting = []
