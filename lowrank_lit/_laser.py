"""``lowrank-lit sweep RECIPE --laser``: its options, table and picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_lit._dry_run import compression_callback
from lowrank_lit._session import RecipeCLI
from lowrank_lit._settings import several
from lowrank_lit._tables import markdown, table
from lowrank_lit.cuts import CLEAR, KEEP_SHARES, Laser, LaserCell, laser
from lowrank_lit.errors import RecipeError
from lowrank_lit.metrics import moments_of
from lowrank_lit.pictures import HeatPanel, heat_figure, save_figure
from lowrank_lit.report import plain_json, write_text

LASER_VERSION = 1
"""Version of the keys of laser.json."""

_OF_GRIDS = ("allocator", "keep_ratio", "feedback", "storage", "preset")


@dataclass(frozen=True)
class LaserOptions:
    """What the options ask for."""

    metric: str
    keep_shares: tuple[float, ...]


def laser_options(axes: Mapping[str, Sequence[str] | None], keep_share: Sequence[str] | None) -> LaserOptions:
    """The options of the command, checked before anything is loaded.

    Args:
        axes: Of the grid, of which ``metric`` alone has a meaning here.
        keep_share: Each repeated, or separated by commas.

    Raises:
        RecipeError: Naming the option that cannot be met.
        LowRankError: If the metric is unknown.
    """
    for name in _OF_GRIDS:
        if axes.get(name) is not None:
            raise RecipeError(f"option '--{name}' belongs to the grid of compressions; leave it out with --laser")
    metrics = several("metric", axes.get("metric") or ["identity"])
    if len(metrics) != 1:
        raise RecipeError(f"option '--metric': --laser takes one metric, not {len(metrics)}; name one, such as input")
    moments_of(metrics[0])
    shares = []
    for text in several("keep-share", keep_share or [",".join(map(str, KEEP_SHARES))]):
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            raise RecipeError(f"option '--keep-share': '{text}' is no share in (0, 1); give some, such as 0.5,0.1")
        shares.append(share)
    return LaserOptions(metrics[0], tuple(sorted(set(shares), reverse=True)))


def laser_recipe(cli: RecipeCLI, recipe: Path, options: LaserOptions, *, split: str, folder: Path) -> int:
    """Measure, print and write ``laser.json``, ``laser.md`` and ``laser.png``.

    Raises:
        LowRankError: As :func:`lowrank_lit.cuts.laser`.
    """
    targets = compression_callback(cli, recipe).settings()["targets"]
    data = cli.datamodule
    data.prepare_data()
    blocks = data.evaluation(split)
    batches = data.calibration_batches() if moments_of(options.metric) else None
    cli.model.configure_model()
    found = laser(
        cli.model.model,
        blocks,
        keep_shares=options.keep_shares,
        metric=options.metric,
        batches=batches,
        targets=targets,
        device=cli.trainer.strategy.root_device,
        after=_told,
    )
    count, length = blocks.shape
    text = f"split {split} ({data.sources[split]}): {count} blocks of {length} tokens, {found.tokens:,} tokens scored"
    rows, notes = cell_rows(found), _notes(found, text)
    print(table(rows))
    print("\n".join(notes))
    record = record_of(found) | {"model": str(cli.model.source), "text": text}
    written = {
        "laser.json": json.dumps(plain_json(record, "laser"), indent=1, allow_nan=False) + "\n",
        "laser.md": "\n\n".join([markdown(rows), *notes]) + "\n",
    }
    for name, content in written.items():
        write_text(folder / name, content)
    save_figure(heat_figure(panels_of(found), "rise of the loss, nats per token", signed=True), folder / "laser.png")
    print(f"Written to {folder}: {', '.join(written)}, laser.png")
    return 0


def _told(cell: LaserCell) -> None:
    mark = " improves" if cell.improves else ""
    print(f"{cell.name}, rank {cell.rank} of {cell.full_rank}: perplexity {cell.perplexity:.5g}{mark}", flush=True)


def record_of(found: Laser) -> dict[str, Any]:
    """All figures, ready for JSON."""
    cells = [dataclasses.asdict(cell) | {"improves": cell.improves, "clearly": cell.clearly} for cell in found.cells]
    return {
        "laser_version": LASER_VERSION,
        "metric": found.metric,
        "dense_loss": found.dense_loss,
        "dense_perplexity": found.dense_perplexity,
        "tokens": found.tokens,
        "cells": cells,
        "notes": list(found.notes),
    }


def cell_rows(found: Laser) -> list[list[str]]:
    """A row for each matrix, in the order of the model, a column for each share; ``*`` marks an improvement, ``**`` a
    clear one."""
    shares = sorted({cell.keep_share for cell in found.cells}, reverse=True)
    by_name: dict[str, dict[float, LaserCell]] = {}
    for cell in found.cells:
        by_name.setdefault(cell.name, {})[cell.keep_share] = cell
    rows = [["layer", "projection", "full rank", *(f"keep {share:g}" for share in shares)]]
    for name, cells in by_name.items():
        first = next(iter(cells.values()))
        layer = "" if first.block is None else str(first.block)
        kind = name if ".experts." in name else first.kind
        shown = [_shown(cells[share]) if share in cells else "" for share in shares]
        rows.append([layer, kind, str(first.full_rank), *shown])
    return rows


def _shown(cell: LaserCell) -> str:
    return f"{cell.perplexity:.5g}{'*' * (cell.improves + (cell.improves and cell.clearly))}"


def _notes(found: Laser, text: str) -> list[str]:
    best, better = found.best, [cell for cell in found.cells if cell.improves]
    clear = sum(cell.clearly for cell in better)
    what = "plain SVD" if found.metric == "identity" else f"metric {found.metric}"
    sign = "*: below the dense model's" + f"; **: by more than {CLEAR:g} standard errors over the blocks"
    return [
        f"Dense perplexity {found.dense_perplexity:.5g}. Each figure: perplexity with this matrix alone cut to the "
        f"share of its rank ({what}), all others dense. {sign}.",
        f"Measured on {text}.",
        f"{len(better)} of {len(found.cells)} cuts improve the perplexity, {clear} of them clearly; by chance alone "
        f"about {0.023 * len(found.cells):.0f} cuts that change nothing would count as clear. Best: {best.name}, rank "
        f"{best.rank} of {best.full_rank}, perplexity {best.perplexity:.5g} ({best.change.rise:+.5f} nats per token).",
        *found.notes,
    ]


def panels_of(found: Laser) -> list[HeatPanel]:
    """Rises of the loss, a panel for each share; of the experts of a block their mean."""
    panels = []
    for share in sorted({cell.keep_share for cell in found.cells}, reverse=True):
        groups: dict[tuple[str, int | None], list[float]] = {}
        for cell in found.cells:
            if cell.keep_share == share:
                groups.setdefault((cell.kind, cell.block), []).append(cell.change.rise)
        panels.append(HeatPanel(f"keep {share:g}", {key: sum(own) / len(own) for key, own in groups.items()}))
    return panels
