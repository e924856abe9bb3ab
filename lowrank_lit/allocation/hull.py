"""Lower convex hull of a cost-loss curve."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def lower_hull(cost: NDArray[Any], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the vertices of the lower convex hull of the points ``(cost, loss)``, from the first to the last.

    Between two vertices every other point lies on or above their chord: whatever the multiplier ``λ``, the minimum of
    ``loss + λ cost`` is at a vertex. Points on a chord are kept, so a straight curve keeps all its steps.

    Args:
        cost: Strictly rising, ``(L,)``, ``L >= 1``.
        loss: At each cost, ``(L,)``; it need be neither convex nor falling.
    """
    run, fall = np.diff(np.asarray(cost, dtype=np.float64)), np.diff(loss)
    bends = fall[:-1] * run[1:] > fall[1:] * run[:-1]  # the slope falls at the middle one of three neighbours
    if not bends.any():
        return np.arange(len(loss), dtype=np.int64)
    first = int(np.argmax(bends)) + 1
    if first == len(loss) - 2:
        # Convex but for the jump to its last point, the dense form: the usual curve. The hull leaves it at the tangent.
        slopes = (loss[-1] - loss[:-1]) / (cost[-1] - cost[:-1])
        tangent = first - int(np.argmax(slopes[::-1]))
        return np.append(np.arange(tangent + 1, dtype=np.int64), np.int64(first + 1))
    # Andrew's monotone chain; up to the first bend the curve is its own hull.
    x, y = np.asarray(cost, dtype=np.float64).tolist(), loss.tolist()
    chain = list(range(first + 1))
    for point in range(first + 1, len(x)):
        while len(chain) > 1:
            a, b = chain[-2], chain[-1]
            if (y[b] - y[a]) * (x[point] - x[b]) <= (y[point] - y[b]) * (x[b] - x[a]):
                break
            chain.pop()
        chain.append(point)
    return np.asarray(chain, dtype=np.int64)
