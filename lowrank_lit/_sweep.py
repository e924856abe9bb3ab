"""``lowrank-lit sweep RECIPE``: the grid from the command line, and its table and picture."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowrank_lit._dry_run import compression_callback
from lowrank_lit._session import RecipeCLI
from lowrank_lit._settings import callback_entry, several
from lowrank_lit._tables import table
from lowrank_lit.errors import RecipeError
from lowrank_lit.report import replacing, write_text
from lowrank_lit.sweep import COMMON, CellStore, Grid, Row, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

METRICS = ("input", "two_sided")
ALLOCATORS = ("uniform", "unirank", "knapsack")
KEEP_RATIOS = ("0.8", "0.6", "0.4")
PRESETS = ("best",)
# Okabe and Ito's colours, told apart by everyone; the rest for larger grids.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#7F3C8D", "#11A579", "#A5AA99", "#80BA5A", "#E68310", "#CF1C90", "#3969AC", "#008695", "#F2B701", "#E73F74"),
)
_MARKERS = "osD^vPhX<>pd8"

Axis = Sequence[str] | None


def grid_of(
    metric: Axis = None,
    allocator: Axis = None,
    keep_ratio: Axis = None,
    feedback: Axis = None,
    storage: Axis = None,
    preset: Axis = None,
) -> Grid:
    """The grid of the options, each repeated or separated by commas; common settings are still missing.

    Naming a metric, allocator or feedback asks for the cells in closed form, naming a preset for that preset; naming
    neither asks for both.

    Raises:
        LowRankError: If a name or value is unknown.
    """
    closed = any(axis is not None for axis in (metric, allocator, feedback))
    presets = _values("preset", preset, () if closed else PRESETS)
    open_axes = closed or preset is None
    grid = Grid(
        keep_ratios=[_number(text) for text in _values("keep-ratio", keep_ratio, KEEP_RATIOS)],
        metrics=_values("metric", metric, METRICS) if open_axes else (),
        allocators=_values("allocator", allocator, ALLOCATORS) if open_axes else (),
        feedbacks=_values("feedback", feedback, ("none",)),
        storages=_values("storage", storage, ("factored",)),
        presets=presets,
    )
    grid.cells()  # refuses what is unknown
    return grid


def _values(option: str, given: Axis, default: Sequence[str]) -> list[str]:
    return list(default) if given is None else several(option, given)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise RecipeError(f"option '--keep-ratio': '{text}' is no number; give shares such as 0.8,0.6,0.4") from error


def draws_of(datamodule: Any, count: int) -> dict[int, list[dict[str, Tensor]]]:
    """Calibration batches by seed: the recipe's own draw first, further ones at random."""
    own = datamodule.calibration_seed
    others = [seed for seed in range(1, count + 1) if seed != own][: count - 1]
    return {seed: datamodule.calibration_batches(seed) for seed in (own, *others)}


def overlap(draws: Mapping[int, Sequence[Mapping[str, Tensor]]]) -> float | None:
    """Mean share of the blocks of a draw that the first draw has too; ``None`` with one draw."""
    sets = [{tuple(row) for batch in draw for row in batch["input_ids"].tolist()} for draw in draws.values()]
    shares = [len(blocks & sets[0]) / len(blocks) for blocks in sets[1:]]
    return sum(shares) / len(shares) if shares else None


def sweep_recipe(cli: RecipeCLI, recipe: Path, grid: Grid, *, seeds: int, split: str, folder: Path) -> int:
    """Measure, print and write the grid; 1 where a cell failed."""
    grid = replace(grid, common=common_of(cli, recipe))
    cells = grid.cells()
    data = cli.datamodule
    data.prepare_data()
    blocks, draws = data.evaluation(split), draws_of(data, seeds)
    cli.model.configure_model()
    folder.mkdir(parents=True, exist_ok=True)
    device = cli.trainer.strategy.root_device
    sweep = Sweep(
        cli.model.model,
        blocks,
        draws,
        CellStore(folder / "cells.jsonl"),
        batch_size=data.batch_size,
        device=device,
        dtype=cli.model.storage_dtype,
    )
    print(f"{len(cells)} cells x {len(draws)} draws of the calibration text, measured on {split}")
    rows = sweep.run(grid, _progress(len(cells) * len(draws)))
    note = "\n".join([_protocol(cli, sweep, split, blocks, draws), _settings_in_words(grid.common)])
    print(table(_cells(rows)))
    print("\n".join([*_footnotes(rows), note]))
    written = write_tables(folder, rows, note)
    if any(row.perplexity is not None for row in rows):
        written.append(folder / "sweep.png")
        plot_sweep(rows, written[-1], title=f"{_name(cli)}: one-shot compression, {split} text")
    print(f"Written to {folder}: cells.jsonl, {', '.join(path.name for path in written)}")
    # Rows of earlier grids in this folder stand in the table; whether this run went well is about its own.
    failed = [row for row in rows if row.error and grid.holds(row)]
    for row in failed:
        print(f"failed: {row.label}, keep ratio {row.settings['keep_ratio']:g}: {row.error}")
    return 1 if failed else 0


def common_of(cli: RecipeCLI, recipe: Path) -> dict[str, Any]:
    """What all cells take from the recipe's compression.

    ``labels`` are as the recipe has them: its own allocator may want other labels than those of the grid.

    Raises:
        RecipeError: If the recipe has no compression.
    """
    options = compression_callback(cli, recipe).settings()
    entry = callback_entry(cli.config.as_dict(), "LowRankCompression") or {}
    labels = (entry.get("init_args") or {}).get("labels", options["labels"])
    return {name: options[name] for name in COMMON} | {"labels": labels}


def _settings_in_words(common: Mapping[str, Any]) -> str:
    parts = []
    for name in COMMON:
        value = common[name]
        shown = "all" if value is None else ", ".join(value) if isinstance(value, list) else str(value).lower()
        parts.append(f"{name} {shown}")
    return (
        f"Common settings: {'; '.join(parts)}. The allocator zero_sum takes labels of the text in any case.\n"
        "The presets best and fast measure candidate plans (select true); rows of a metric and an allocator by name "
        "do not (select false)."
    )


def _progress(total: int) -> Callable[[dict[str, Any]], None]:
    count = 0

    def show(entry: dict[str, Any]) -> None:
        nonlocal count
        count += 1
        axes = entry["settings"]
        name = entry["preset"] or f"{axes['metric']} + {axes['allocator']}"
        measured = "perplexity" in entry
        figures = f"perplexity {float(entry['perplexity']):.5g}, {entry['seconds']:.2f} s" if measured else "failed"
        where = f"seed {entry['seed']}, {name}, {axes['feedback']}, {axes['storage']}, keep {axes['keep_ratio']:g}"
        print(f"[{count}/{total}] {where}: {figures}", flush=True)

    return show


def _name(cli: RecipeCLI) -> str:
    source = cli.model.source
    return str(source.get("model_type", "model")) if isinstance(source, dict) else "/".join(Path(source).parts[-2:])


def _protocol(
    cli: RecipeCLI, sweep: Sweep, split: str, blocks: Tensor, draws: Mapping[int, Sequence[Mapping[str, Tensor]]]
) -> str:
    """How the figures came about, in sentences."""
    data = cli.datamodule
    count, length = blocks.shape
    first = next(iter(draws.values()))
    calibration = sum(len(batch["input_ids"]) for batch in first)
    shared = overlap(draws)
    sentences = [
        f"Dense perplexity {sweep.dense:.5g}; {sweep.parameters:,} parameters of {sweep.weight_bytes} bytes each. MB: "
        "of the whole model, in millions of bytes.",
        f"Measured on split {split} ({data.sources[split]}): {count} blocks of {length} tokens from its start, "
        f"{length - 1} targets each, weights in {str(cli.model.dtype_in_memory).removeprefix('torch.')}.",
        f"Calibrated on {calibration} blocks of {length} tokens, draws {', '.join(map(str, draws))}"
        + ("." if shared is None else f"; a further draw shares {shared:.0%} of its blocks with the first."),
        "Figures are means over the draws that a row was measured on, with ± the sample standard deviation over these. "
        "Excess: ln(perplexity) - ln(dense perplexity), nats per token. Predicted: an estimate of it from the "
        "calibration text, by the statistics of the round that chose the ranks.",
        "Seconds: of one compression without the statistics that cells share and without the perplexity; the first "
        "cell of a metric has its decompositions.",
    ]
    if sweep.calibration_seconds:
        spent = ", ".join(f"{seconds:.1f}" for seconds in sweep.calibration_seconds.values())
        sentences.append(f"Calibration of this run, seconds by draw: {spent}.")
    return "\n".join(sentences)


_HEADINGS = (
    *("metric", "allocator", "feedback", "storage", "keep", "achieved", "model", "MB", "perplexity", "excess"),
    *("predicted", "seconds", "draws", "notes"),
)
_NUMBER = re.compile(r"(?<![\w.,])(\d+(?:\.\d+)?)(?![\w,]|\.\w)")
"""A number in a note that stands by itself, not one in a layer's name or with thousands marked."""


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table for people; the last column has the numbers of the footnotes."""
    found = [list(_HEADINGS)]
    numbers = {shape: str(number) for number, shape in enumerate(_merged(rows), start=1)}
    for row in rows:
        axes = row.settings
        metric = axes["metric"] + ("" if row.used_metric == axes["metric"] else f" ({row.used_metric} used)")
        allocator = axes["allocator"] + (f" (preset {row.preset})" if row.preset else "")
        size = None if row.bytes is None else row.bytes / 1e6
        names = [metric, allocator, axes["feedback"], axes["storage"], f"{axes['keep_ratio']:g}"]
        sizes = [_shown(row.achieved, ".4f"), _shown(row.whole_model, ".4f"), _shown(size, ".3f")]
        losses = [_with_spread(row), _shown(row.excess, ".4f"), _shown(row.predicted, ".4f")]
        marks = dict.fromkeys(numbers[_shape(note)] for note in row.notes)
        found.append([*names, *sizes, *losses, _shown(row.seconds, ".2f"), str(len(row.seeds)), " ".join(marks)])
    return found


def _footnotes(rows: Sequence[Row]) -> list[str]:
    """The plans' notes, one of each kind, where only numbers differ with the range of these."""
    return [f"note {number}: {text}" for number, text in enumerate(_merged(rows).values(), start=1)]


def _shape(note: str) -> tuple[str, ...]:
    """What a note says, its numbers left out."""
    return tuple(_NUMBER.split(note)[::2])


def _merged(rows: Sequence[Row]) -> dict[tuple[str, ...], str]:
    """Notes by what they say, in the order of the rows."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for note in dict.fromkeys(note for row in rows for note in row.notes):
        kinds.setdefault(_shape(note), []).append(_NUMBER.split(note)[1::2])
    merged = {}
    for shape, found in kinds.items():
        text = shape[0]
        for values, after in zip(zip(*found, strict=True), shape[1:], strict=True):
            low, high = min(values, key=float), max(values, key=float)
            text += (low if float(low) == float(high) else f"{low} to {high}") + after
        merged[shape] = text
    return merged


def _with_spread(row: Row) -> str:
    if row.perplexity is None:
        return "failed"
    return f"{row.perplexity:.5g}" + ("" if row.spread is None else f" ± {row.spread:.2g}")


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def write_tables(folder: Path, rows: Sequence[Row], note: str) -> list[Path]:
    """``sweep.csv``, every figure and note in full, and ``sweep.md``; returns their paths.

    Raises:
        ExportError: If a file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    axes = ("metric", "allocator", "feedback", "rounds", "select", "storage")
    figures = ("dense_perplexity", "perplexity", "spread", "excess", "predicted", "seconds", "error")
    names = ("keep_ratio", "achieved_keep_ratio", "whole_model_ratio", "bytes")
    writer.writerow(["preset", *axes, "used_metric", *names, *figures, "seeds", "draws", "notes"])
    for row in rows:
        own = [row.preset, *(row.settings[name] for name in axes), row.used_metric, row.settings["keep_ratio"]]
        own += [row.achieved, row.whole_model, row.bytes, *(getattr(row, name) for name in figures)]
        writer.writerow([*own, " ".join(map(str, row.seeds)), len(row.seeds), " | ".join(row.notes)])
    lines = _cells(rows)
    marked = [lines[0], ["---"] * 4 + ["---:"] * (len(lines[0]) - 5) + ["---"], *lines[1:]]
    failed = [
        f"Failed: {row.label}, keep ratio {row.settings['keep_ratio']:g}: {row.error}" for row in rows if row.error
    ]
    content = "\n".join(["| " + " | ".join(line) + " |" for line in marked])
    below = [*_footnotes(rows), *note.split("\n"), *failed]
    contents = {"sweep.csv": text.getvalue(), "sweep.md": "\n\n".join([content, *below]) + "\n"}
    for name, written in contents.items():
        write_text(folder / name, written)
    return [folder / name for name in contents]


def plot_sweep(rows: Sequence[Row], path: str | os.PathLike[str], *, title: str) -> None:
    """Draw perplexity against the achieved keep ratio and against bytes, a line for each family, and save it as PNG.

    Args:
        rows: Those without a finite perplexity are left out.
        path: To write.
        title: Of the picture.

    Raises:
        ExportError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [row for row in rows if row.perplexity is not None and math.isfinite(row.perplexity)]
    families: dict[str, list[Row]] = {}
    for row in shown:
        families.setdefault(row.label, []).append(row)
    # The legend has the order of the lines at the smallest budget, from above.
    order = sorted(families, key=lambda label: -(min(families[label], key=_budget).perplexity or 0.0))
    figure = Figure(figsize=(11.5, max(4.6, 2.4 + 0.2 * len(families))), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: no pyplot, no window, no state that outlives the call
    left, right = figure.subplots(1, 2, sharey=True)
    styles = {label: _style(index, families[label][0]) for index, label in enumerate(families)}
    for axes, size in ((left, _achieved), (right, _megabytes)):
        for label in order:
            _draw_family(axes, families[label], size, styles[label])
        if shown:
            axes.axhline(shown[0].dense_perplexity, **_DENSE)
        _dress(axes)
    left.set_xlabel("keep ratio reached, of the target matrices")
    right.set_xlabel("weights of the whole model, millions of bytes")
    left.set_ylabel("perplexity")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles = [Line2D([], [], **styles[label], label=label) for label in order]
    key: dict[str, Any] = {"loc": "outside right center", "fontsize": 9, "frameon": False, "labelspacing": 0.7}
    figure.legend(handles=[*handles, Line2D([], [], **_DENSE, label="dense model")], **key)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


_DENSE: dict[str, Any] = {"color": "#444444", "linewidth": 1.2, "linestyle": (0, (5, 3))}


def _draw_family(axes: Axes, rows: Sequence[Row], size: Callable[[Row], float], style: dict[str, Any]) -> None:
    points = sorted(rows, key=size)
    places, values = [size(row) for row in points], [row.perplexity or 0.0 for row in points]
    axes.plot(places, values, **style)
    spreads = [row.spread or 0.0 for row in points]
    if any(spreads):
        axes.errorbar(places, values, yerr=spreads, fmt="none", ecolor=style["color"], elinewidth=1, capsize=2.5)


def _budget(row: Row) -> float:
    return float(row.settings["keep_ratio"])


def _achieved(row: Row) -> float:
    return row.achieved or 0.0


def _megabytes(row: Row) -> float:
    return (row.bytes or 0) / 1e6


def _style(index: int, row: Row) -> dict[str, Any]:
    """Presets are drawn thicker, beneath the others; the pivot form is dashed."""
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 7 if row.preset else 5.5,
        "linewidth": 3 if row.preset else 1.4,
        "linestyle": "--" if row.settings["storage"] == "pivot" else "-",
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "zorder": 2.1 if row.preset else 2.5,
    }


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    subs = subs if high / low < 12 else [1.0, 2.0, 5.0]
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
