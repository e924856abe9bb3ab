"""Line charts as SVG that stands in a page: no script, no file beside it, and the page's own colours.

Text is ``currentColor``; a colour may be any CSS colour, such as ``var(--accent)`` or ``hsl(220 65% 50%)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from lowrank_lit.errors import LowRankError

_RIGHT, _TOP, _BOTTOM = 12.0, 10.0, 38.0
_DIGIT = 6.8
"""Width of a digit, for the room that the numbers beside the axis need."""
_LEAST = 1e-12
"""Of a logarithmic axis: what is smaller has no place on it."""


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    Attributes:
        points: ``(x, y)``, by ascending ``x``.
        colour: Of the line.
        dashed: Told apart without colours too.
        marks: Points with a ring.
        dots: Whether each point has a dot, as few points deserve.
    """

    points: Sequence[tuple[float, float]]
    colour: str = "var(--accent)"
    dashed: bool = False
    marks: Sequence[tuple[float, float]] = ()
    dots: bool = False


@dataclass(frozen=True)
class _Axes:
    """Where numbers are in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]
    log_y: bool
    width: float
    height: float

    @property
    def left(self) -> float:
        """Where the plot begins."""
        return 26 + _DIGIT * max(len(_number(value)) for value in self.ticks)

    @property
    def ticks(self) -> list[float]:
        """Of the ``y`` axis."""
        most = 6 if self.height > 200 else 4
        return (log_ticks if self.log_y else linear_ticks)(*self.y, most)

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / (high - low) * (self.width - self.left - _RIGHT)

    def down(self, value: float) -> float:
        low, high = self.y
        if self.log_y:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return _TOP + (high - value) / (high - low) * (self.height - _TOP - _BOTTOM)


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    size: tuple[int, int] = (480, 250),
) -> str:
    """A chart as one ``<svg>`` element.

    Args:
        lines: What is drawn; a point without a place on a logarithmic axis, or outside ``y_range``, is left out.
        label: What the picture shows, read to those who do not see it.
        x_label: Below the axis.
        y_label: Beside the axis.
        log_y: Whether ``y`` is logarithmic.
        x_range: Of the ``x`` axis; by default that of the points.
        y_range: Of the ``y`` axis; by default that of the points, rounded outwards.
        size: In units of the picture, which is scaled to the page.

    Raises:
        LowRankError: If there is no point to draw.
    """
    floor = y_range[0] if y_range else _LEAST if log_y else -math.inf
    shown = [
        [(float(x), float(y)) for x, y in line.points if math.isfinite(y) and y >= floor and (y > 0 or not log_y)]
        for line in lines
    ]
    every = [point for points in shown for point in points]
    if not every:
        raise LowRankError(f"'{label}' has no point to draw; leave the chart out")
    axes = _Axes(*_ranges(every, log_y, x_range, y_range), log_y, *size)
    parts = [*_grid(axes), *_labels(axes, x_label, y_label)]
    for line, points in zip(lines, shown, strict=True):
        parts += _drawn(axes, line, points)
    head = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(label)}">'
    return f"{head}<title>{escape(label)}</title>{''.join(parts)}</svg>"


def _ranges(
    points: Sequence[tuple[float, float]],
    log_y: bool,
    x_range: tuple[float, float] | None,
    y_range: tuple[float, float] | None,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of both axes, wider than nothing."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = y_range or (min(ys), max(ys))
    if y_range is None and log_y:
        low, high = low / 1.1, high * 1.1
    elif y_range is None:
        room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (0.0 if low == 0 else low - room), high + room
    left, right = x_range or (min(xs), max(xs))
    if left == right:
        left, right = left - 0.5, right + 0.5
    return (left, right), (low, high)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers in ``[low, high]``, at most ``most``, in equal steps of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    while True:
        for factor in (1, 2, 5):
            first, last = math.ceil(low / (factor * step) - 1e-9), math.floor(high / (factor * step) + 1e-9)
            if last - first < most:
                return [number * factor * step for number in range(first, last + 1)]
        step *= 10


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten in ``[low, high]``, thinned out to ``most``; with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1,)):
        found = [f * 10.0**power for power in range(first, last + 1) for f in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) <= most:
            # Within a factor of two there may be no round number of this kind.
            return found if len(found) > 1 else linear_ticks(low, high, most)
    return found[:: math.ceil(len(found) / most)]


def _number(value: float) -> str:
    """``0.00025`` as ``2.5e-4``, without the sign and the zero that Python pads an exponent with."""
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _grid(axes: _Axes) -> list[str]:
    right, bottom = axes.width - _RIGHT, axes.height - _BOTTOM
    parts = []
    for value in axes.ticks:
        y = f"{axes.down(value):.1f}"
        parts.append(f'<line class="grid" x1="{axes.left:g}" y1="{y}" x2="{right:g}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{axes.left - 6:g}" y="{y}" dy="0.32em" text-anchor="end">{_number(value)}</text>'
        )
    for value in linear_ticks(*axes.x):
        x = f"{axes.across(value):.1f}"
        parts.append(f'<line class="grid" x1="{x}" y1="{bottom:g}" x2="{x}" y2="{bottom + 4:g}"/>')
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 16:g}" text-anchor="middle">{_number(value)}</text>')
    return parts


def _labels(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    middle, half = (axes.left + axes.width - _RIGHT) / 2, (_TOP + axes.height - _BOTTOM) / 2
    turned = f'transform="rotate(-90 12 {half:g})"'
    return [
        f'<text class="tick" x="{middle:g}" y="{axes.height - 5:g}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="tick" x="12" y="{half:g}" text-anchor="middle" {turned}>{escape(y_label)}</text>',
    ]


def _drawn(axes: _Axes, line: Line, points: Sequence[tuple[float, float]]) -> list[str]:
    colour = escape(line.colour)
    parts = []
    if len(points) > 1:
        path = " ".join(f"{axes.across(x):.1f},{axes.down(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        parts.append(f'<polyline class="series" points="{path}" style="stroke:{colour}"{dash}/>')
    if line.dots or len(points) == 1:
        parts += [
            f'<circle cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}" r="3" style="fill:{colour}"/>'
            for x, y in points
        ]
    low, high = axes.y
    parts += [
        f'<circle class="ring" cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}" r="3.5" style="stroke:{colour}"/>'
        for x, y in line.marks
        if low <= y <= high
    ]
    return parts
