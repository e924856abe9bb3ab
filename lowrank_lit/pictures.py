"""What is drawn of a record's spectra and curves, and both as pictures for papers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lowrank_lit.report import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_LINES = 16
"""Blocks in one panel of spectra; of more, that many at equal distances."""

_Cell = Mapping[str, Any]


def panels_of(record: Mapping[str, Any]) -> dict[str, tuple[list[_Cell], int]]:
    """Spectra by projection: those that are drawn, the first and the last among them, and how many there are."""
    kinds: dict[str, list[_Cell]] = {}
    for cell in record.get("spectra") or []:
        kinds.setdefault(cell["kind"], []).append(cell)
    found = {}
    for kind, cells in kinds.items():
        drawn = min(len(cells), MOST_LINES)
        picked = [cells[round(i * (len(cells) - 1) / max(1, drawn - 1))] for i in range(drawn)]
        found[kind] = (picked, len(cells))
    return found


def depth_of(record: Mapping[str, Any], cell: _Cell) -> float:
    """Where a cell's block is between the first, 0, and the last, 1."""
    last = max((other["block"] or 0 for other in record["spectra"]), default=0)
    return (cell["block"] or 0) / last if last else 0.0


def heights_of(record: Mapping[str, Any]) -> tuple[float, float]:
    """Least and largest value of the axis of all panels: the last tenth of a spectrum, which may end in rounding, does
    not count."""
    least = [
        value
        for cell in record["spectra"]
        for number, value in zip(cell["components"], cell["values"], strict=True)
        if value > 0 and number <= 0.9 * cell["full_rank"]
    ]
    return max(min(least, default=0.1), 1e-6) / 1.5, 1.2


def cut_of(record: Mapping[str, Any], cell: _Cell) -> tuple[float, float] | None:
    """Where the plan cuts a cell's spectrum: share of the full rank, and the line's height there; ``None`` where
    everything stays dense, or the line is at 0."""
    place = (cell["kind"], cell["block"])
    share = next((own["share"] for own in record.get("ranks") or [] if (own["kind"], own["block"]) == place), None)
    if share is None:
        return None
    rank = share * cell["full_rank"]
    points = list(zip(cell["components"], cell["values"], strict=True))
    for (left, high), (right, low) in pairwise(points):
        if left <= rank <= right and low > 0:
            # The line is straight between its points on a logarithmic axis.
            return share, high * (low / high) ** ((rank - left) / (right - left))
    return (share, points[0][1]) if rank <= points[0][0] and points[0][1] > 0 else None


def curves_of(record: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """``(step, value)`` of the curves ``train``, ``rate`` and ``validation``, of those that have points."""
    curves = record.get("curves") or {}
    names = {"train": "train_loss", "rate": "learning_rate", "validation": "validation_loss"}
    found = {}
    for name, key in names.items():
        curve = curves.get(key)
        if curve and curve["steps"]:
            found[name] = list(zip(curve["steps"], curve["values"], strict=True))
    return found


def spectra_figure(record: Mapping[str, Any]) -> Figure | None:
    """Spectra by projection with the cuts of the plan, a panel each; ``None`` where the record holds none."""
    from matplotlib import colormaps

    panels = panels_of(record)
    if not panels:
        return None
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.0 * columns, 2.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (kind, (cells, _)) in zip(grid.flat, panels.items(), strict=False):
        for cell in cells:
            colour = colormaps["plasma"](0.85 * depth_of(record, cell))
            shares = [number / cell["full_rank"] for number in cell["components"]]
            axes.plot(shares, [value if value > 0 else math.nan for value in cell["values"]], color=colour, linewidth=1)
            if (cut := cut_of(record, cell)) is not None:
                axes.plot(*cut, color=colour, marker="o", markersize=4, markerfacecolor="white", linestyle="none")
        axes.set_yscale("log")
        axes.set_ylim(*heights_of(record))
        axes.set_title(kind, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("component / full rank (ring: the cut; dark: first block, light: last)", fontsize=9)
    figure.supylabel("singular value / largest", fontsize=9)
    return figure


def loss_figure(record: Mapping[str, Any]) -> Figure | None:
    """Loss and learning rate against the step; ``None`` where no step has been recorded."""
    from matplotlib.ticker import MaxNLocator

    curves = curves_of(record)
    if "train" not in curves:
        return None
    figure = _figure(6.4, 3.6)
    axes = figure.add_subplot()
    _plot(axes, curves["train"], color="#0072B2", label="training")
    if "validation" in curves:
        _plot(axes, curves["validation"], color="#D55E00", label="validation", marker="o", markersize=4, linestyle="--")
    drawn = [axes]
    if "rate" in curves:
        rate = axes.twinx()
        _plot(rate, curves["rate"], color="#888888", label="learning rate", linewidth=1, linestyle=":")
        rate.set_ylabel("learning rate", fontsize=9)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        rate.tick_params(labelsize=8)
        drawn.append(rate)
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss", fontsize=9)
    axes.tick_params(labelsize=8)
    handles = [handle for part in drawn for handle in part.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8, frameon=False)
    return figure


@dataclass(frozen=True)
class HeatPanel:
    """Values by projection and block.

    Attributes:
        title: Of the panel.
        values: By (projection, block); a block that is ``None`` has a column of its own.
    """

    title: str
    values: Mapping[tuple[str, int | None], float]


def heat_figure(panels: Sequence[HeatPanel], label: str, *, signed: bool) -> Figure:
    """Maps of projection by block on one scale of colours, a panel each.

    Args:
        panels: At least one; values that are not finite are drawn as the largest that is.
        label: What the values are.
        signed: Blue below 0, white at 0, red above, linear around 0 and logarithmic beyond a hundredth of the largest;
            otherwise a scale from 0 to 1. Grey where there is no value.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, SymLogNorm

    kinds = list(dict.fromkeys(kind for panel in panels for kind, _ in panel.values))
    blocks = sorted({block for panel in panels for _, block in panel.values}, key=lambda b: (b is None, b or 0))
    sizes = [abs(value) for panel in panels for value in panel.values.values() if math.isfinite(value)]
    most = max(sizes, default=0.0) or 1.0
    norm = SymLogNorm(most / 100, vmin=-most, vmax=most) if signed else Normalize(0.0, 1.0)
    # Matplotlib's annotations ask for arrays where it takes a number as well.
    scale: Any = ScalarMappable(norm, colormaps["RdBu_r" if signed else "viridis"])
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(columns * max(2.6, 1.4 + 0.3 * len(blocks)), rows * max(1.8, 0.8 + 0.26 * len(kinds)))
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=False):
        cells = [[panel.values.get((kind, block), math.nan) for block in blocks] for kind in kinds]
        axes.imshow(np.clip(cells, -most, most), cmap=scale.cmap, norm=norm, aspect="auto")  # what is not there is NaN
        axes.set_facecolor("#cccccc")
        axes.set_title(panel.title, fontsize=9, loc="left")
        step = max(1, len(blocks) // 12)
        axes.set_xticks(range(0, len(blocks), step), ["" if b is None else str(b) for b in blocks[::step]], fontsize=7)
        axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
        axes.tick_params(length=0)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel("block", fontsize=8)
    bar = figure.colorbar(scale, ax=list(grid.flat), pad=0.015, aspect=24)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def agreement_figure(points: Sequence[tuple[float, float]], labels: Sequence[str]) -> Figure:
    """Measured against predicted rises of the loss, nats per token, with the line on which they agree.

    Args:
        points: ``(predicted, measured)``; those that are not above 0 on both have no place on the axes.
        labels: Projection of each, which has its colour.
    """
    from matplotlib import colormaps

    figure = _figure(4.6, 4.2)
    axes = figure.add_subplot()
    for index, kind in enumerate(dict.fromkeys(labels)):
        own = [point for point, label in zip(points, labels, strict=True) if label == kind and min(point) > 0]
        if own:
            colour = colormaps["tab10"](index % 10)
            axes.plot(*zip(*own, strict=True), marker="o", markersize=4, linestyle="none", color=colour, label=kind)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ends = [value for point in points if min(point) > 0 for value in point] or [1e-4, 1.0]
    axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color="#888888", linewidth=1, linestyle="--")
    axes.set_xlabel("predicted rise of the loss, nats per token", fontsize=9)
    axes.set_ylabel("measured, this matrix alone cut", fontsize=9)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Save a figure as PNG; the file is complete or is not there.

    Raises:
        ExportError: If the file cannot be written.
    """
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: no pyplot, no window, no state that outlives the call
    return figure


def _plot(axes: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    axes.plot(*zip(*points, strict=True), **{"linewidth": 1.6, **style})
