"""A grid of compressions of one model, measured from one calibration pass per draw of the calibration text.

Metrics, allocators and budgets differ in what they make of the statistics, not in what has to be collected: one pass
with everything that any cell needs serves all of them, and :class:`~lowrank_lit.study.Study` keeps the spectra. A
cell is measured with its truncated weights in the dense model's own layers: the products of the factors, rounded to the
model's type once, where two stored factors round twice. No layer is built or replaced.

Every measured cell is written down at once, under a key made of the model, both texts, the settings and the draw, so
that a sweep which was interrupted or widened measures what is missing and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lowrank_lit.compress import fingerprint
from lowrank_lit.errors import GradientError, LowRankError
from lowrank_lit.evaluation import perplexity
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.refit import substituted
from lowrank_lit.report import data_hash
from lowrank_lit.settings import PRESETS, Settings
from lowrank_lit.statistics import BACKWARD_MOMENTS
from lowrank_lit.study import Study
from lowrank_lit.surgery import count_parameters, stored_bytes

COMMON = (
    *("targets", "min_rank", "quantum", "damping", "shrinkage", "alpha", "labels", "importance_of", "cost_aware"),
)
"""Settings that all cells of a grid share. ``nested`` is none of them: most allocators have no order of components."""

_AXES = ("metric", "allocator", "feedback", "rounds", "select", "storage", "keep_ratio")


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep: the product of the axes, and whole presets.

    Attributes:
        keep_ratios: Shares of the target matrices' parameters to keep.
        metrics: Of the cells in closed form, as the next three.
        allocators: How ranks are shared out.
        feedbacks: ``recollect`` and ``anchored`` take as many rounds as the preset ``best``; candidates are not
            measured.
        storages: Of the cells and of the presets.
        presets: Whole presets, as further cells.
        common: The settings named in :data:`COMMON`.
    """

    keep_ratios: Sequence[float]
    metrics: Sequence[str] = ()
    allocators: Sequence[str] = ()
    feedbacks: Sequence[str] = ("none",)
    storages: Sequence[str] = ("factored",)
    presets: Sequence[str] = ()
    common: Mapping[str, Any] = field(default_factory=dict)

    def cells(self) -> list[Settings]:
        """Settings of every cell, each once, in the order of the axes.

        Raises:
            LowRankError: If a name or a value of an axis is unknown or out of range, or there is no cell.
        """
        found: dict[str, Settings] = {}
        families: list[dict[str, Any]] = [
            {"preset": "unirank", "metric": metric, "allocator": allocator, "feedback": feedback, **_rounds(feedback)}
            for metric in self.metrics
            for allocator in self.allocators
            for feedback in self.feedbacks
        ]
        families += [{"preset": preset} for preset in self.presets]
        for family in families:
            for storage in self.storages:
                for keep_ratio in self.keep_ratios:
                    cell = Settings(keep_ratio, storage=storage, **family, **self.common)
                    found.setdefault(_text(cell), cell)
        if not found:
            raise LowRankError(
                "the grid has no cell; name at least one keep_ratio, and a metric and allocator or preset"
            )
        return list(found.values())

    def base(self) -> Settings:
        """What the cells have in common, whatever their axes."""
        return Settings(1.0, preset="unirank", **self.common)

    def holds(self, row: Row) -> bool:
        """Whether a row that was measured with the grid's common settings is one of its cells."""
        return any(row.settings == _axes(cell) for cell in self.cells())


@dataclass(frozen=True)
class Row:
    """One cell over all draws.

    Attributes:
        settings: By name: ``metric``, ``allocator``, ``feedback``, ``rounds``, ``select``, ``storage``, ``keep_ratio``.
        preset: Name of the preset that stands for these settings, if there is one.
        used_metric: The metric, or the one that was used in its place where there were no gradients.
        seeds: Draws of the calibration text that the cell was measured on; means and the spread are over these.
        dense_perplexity: Of the dense model.
        achieved: Stored / original numbers of the target matrices, mean over the draws, as the next two.
        whole_model: The same of the whole model.
        bytes: Of the whole model in its storage type, as :func:`~lowrank_lit.surgery.stored_bytes` counts them.
        perplexity: Mean over the draws.
        spread: Sample standard deviation of the perplexity over the draws; ``None`` with one.
        excess: Mean of ``ln(perplexity) - ln(dense perplexity)``, nats per token.
        predicted: Predicted rise of the loss, nats per token, if the metric gives one; an estimate from the statistics
            of the round that chose the ranks.
        seconds: To compress, statistics that cells share and the perplexity left out.
        error: Why draws are missing; empty where none is.
        notes: Of the plans of all draws, each once, such as a fallback that was taken.
    """

    settings: Mapping[str, Any]
    preset: str
    used_metric: str
    seeds: tuple[int, ...]
    dense_perplexity: float
    achieved: float | None = None
    whole_model: float | None = None
    bytes: int | None = None
    perplexity: float | None = None
    spread: float | None = None
    excess: float | None = None
    predicted: float | None = None
    seconds: float | None = None
    error: str = ""
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> tuple[Any, ...]:
        """Everything but the budget: rows with one family are points of one line."""
        return tuple(self.settings[name] for name in _AXES[:-1])

    @property
    def label(self) -> str:
        """The family in words."""
        parts = [f"{self.settings['metric']} + {self.settings['allocator']}"]
        if self.settings["feedback"] != "none":
            parts.append(self.settings["feedback"])
        text = f"preset {self.preset}" if self.preset else ", ".join(parts)
        return text if self.settings["storage"] == "factored" else f"{text}, {self.settings['storage']}"


class CellStore:
    """Measured cells, one JSON object a line; a line that an interruption cut short is left out.

    Args:
        path: Read if it is there; appended to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")
        self.entries: dict[str, dict[str, Any]] = {}
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                if "error" in entry or "saved" in entry:  # or of an earlier form: measured again
                    self.entries[entry["key"]] = entry
            except (ValueError, TypeError, KeyError):
                continue

    def done(self, key: str) -> bool:
        """Whether the cell has been measured; one that failed is tried again."""
        return "perplexity" in self.entries.get(key, {})

    def add(self, entry: dict[str, Any]) -> None:
        """Keep an entry, on disk first."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps(entry) + "\n")
        self._torn = False
        self.entries[entry["key"]] = entry

    def of(self, identities: Sequence[str]) -> list[dict[str, Any]]:
        """Entries of these models and texts."""
        return [entry for entry in self.entries.values() if entry.get("identity") in identities]


class Sweep:
    """One model, one text to measure on, and draws of the calibration text, for any number of grids.

    Args:
        model: The dense model; left as it is.
        blocks: Token ids ``(n, length)`` that perplexities are measured on.
        draws: Calibration batches by the seed of their draw, see :func:`lowrank_lit.compress.compress`.
        store: What has been measured so far.
        batch_size: Blocks per forward pass of a perplexity.
        device: Where to compute; ``None`` is where the model is.
        dtype: Type that weights are stored in, which bytes are counted by; ``None`` is as in memory.

    Attributes:
        calibration_seconds: Of the passes of this run, by seed.
        dense: Perplexity of the dense model; known once something has run.
        dense_bytes: Of the dense model in its storage type.
        weight_bytes: Of one stored weight.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Tensor,
        draws: Mapping[int, Sequence[Any]],
        store: CellStore,
        *,
        batch_size: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.blocks, self.draws, self.store = model, blocks, draws, store
        self.batch_size, self.device = batch_size, device
        self.parameters = count_parameters(model)
        self.dense_bytes = stored_bytes(model, dtype)
        self.weight_bytes = (dtype or next(model.parameters()).dtype).itemsize
        self.calibration_seconds: dict[int, float] = {}
        self.dense: float | None = None
        self._identities: dict[tuple[int, str], str] = {}

    def run(self, grid: Grid, after: Callable[[dict[str, Any]], None] | None = None) -> list[Row]:
        """Measure the cells that the store lacks.

        Args:
            grid: The cells.
            after: Called with the entry of every cell of the grid, those found in the store too.

        Returns:
            A row for every cell that the store holds of this model, these texts and the grid's common settings, those
            of earlier grids too.

        Raises:
            LowRankError: If the weights, the texts or the calibration are unusable. What makes one cell fail, such as
                a budget below the rank floor or a decomposition that does not converge, is recorded with it.
        """
        cells = grid.cells()
        for seed in self.draws:
            identity = self._identity(seed, grid)
            keys = {_key(identity, cell): cell for cell in cells}
            missing = {key: cell for key, cell in keys.items() if not self.store.done(key)}
            for key in keys.keys() - missing.keys():
                self.dense = float(self.store.entries[key]["dense_perplexity"])
            for key in (key for key in keys if key not in missing):
                _tell(after, self.store.entries[key])
            if missing:
                self._measure(seed, identity, missing, after)
        return rows_of(self.store.of([self._identity(seed, grid) for seed in self.draws]), self._bytes)

    def _identity(self, seed: int, grid: Grid) -> str:
        """Of the model, both texts, the draw and the common settings."""
        place = (seed, _text(grid.base()))
        if place not in self._identities:  # reads every weight
            parts = [fingerprint(self.model, self.draws[seed], grid.base()), data_hash([self.blocks]), str(seed)]
            self._identities[place] = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
        return self._identities[place]

    def _measure(
        self,
        seed: int,
        identity: str,
        cells: Mapping[str, Settings],
        after: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        if self.dense is None:
            self.dense = perplexity(self.model, self.blocks, batch_size=self.batch_size, device=self.device)
        targets = next(iter(cells.values())).targets
        with ExpertsApart(self.model):
            study = Study(self.model, self.draws[seed], targets=targets, device=self.device)
            started = time.perf_counter()
            collect(study, list(cells.values()))
            self.calibration_seconds[seed] = time.perf_counter() - started
            for key, cell in cells.items():
                of_cell = {"key": key, "identity": identity, "seed": seed, "preset": preset_of(cell)}
                entry = {**of_cell, "settings": _axes(cell), "dense_perplexity": _plain(self.dense)}
                try:
                    entry |= self._cell(study, cell)
                except (LowRankError, LinAlgError, torch.OutOfMemoryError, MemoryError) as error:
                    entry["error"] = " ".join(str(error).split()) or type(error).__name__
                self.store.add(entry)
                _tell(after, entry)

    def _cell(self, study: Study, settings: Settings) -> dict[str, Any]:
        started = time.perf_counter()
        draft = study.draft(settings)
        weights = study.weights(draft)
        compressed = time.perf_counter()
        with substituted(study.layers, weights):
            value = perplexity(self.model, self.blocks, batch_size=self.batch_size, device=self.device)
        plan = draft.plan
        saved = plan.dense_parameters - plan.parameters
        return {
            "used_metric": plan.metric,
            "achieved": plan.keep_ratio,
            "whole_model": (self.parameters - saved) / self.parameters,
            "saved": saved,
            "positions": sum(matrix.rows for matrix in plan.matrices if matrix.form == "pivot"),
            "perplexity": _plain(value),
            "predicted": plan.predicted_nats,
            "seconds": compressed - started,
            "evaluate_seconds": time.perf_counter() - compressed,
            "passes": draft.passes,
            "notes": list(plan.notes),
        }

    def _bytes(self, entry: Mapping[str, Any]) -> int:
        """Of the compressed model: reckoned for each table, for the storage type is not part of a cell's key.

        The pivot form keeps the positions of its rows as 32-bit numbers, whatever the weights are stored in.
        """
        return int(self.dense_bytes - entry["saved"] * self.weight_bytes + 4 * entry["positions"])


def collect(study: Study, cells: Sequence[Settings]) -> None:
    """Collect in one pass what all cells need of the dense model; with labels of the text and of the model, in two.

    What has no gradients is taken along with the first pass.
    """
    by_labels: dict[str, list[Settings]] = {}
    for cell in cells:
        by_labels.setdefault(cell.labels if cell.moments & BACKWARD_MOMENTS else "", []).append(cell)
    without = by_labels.pop("", [])
    passes = [
        (labels, [*own, *(without if index == 0 else [])]) for index, (labels, own) in enumerate(by_labels.items())
    ]
    for labels, own in passes or [("model", without)]:
        moments = frozenset().union(*(cell.moments for cell in own))
        try:
            study.collection.calibration(moments, importance=_importance(own), labels=labels)
        except GradientError:  # each cell falls back on the activations, and says so, or fails by itself
            study.collection.calibration(moments - BACKWARD_MOMENTS, importance=_importance(own), labels="none")


def preset_of(settings: Settings) -> str:
    """The preset that stands for these settings, or nothing."""
    same = (name for name, own in PRESETS.items() if all(getattr(settings, key) == own[key] for key in own))
    return next(same, "")


def rows_of(entries: Sequence[Mapping[str, Any]], bytes_of: Callable[[Mapping[str, Any]], int]) -> list[Row]:
    """One row for every cell, over all its draws; families in the order of their first entry, and the largest budget
    first.

    Args:
        entries: Of a store.
        bytes_of: Bytes of the compressed model of an entry that was measured.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(json.dumps(entry["settings"], sort_keys=True), []).append(entry)
    rows = [_row(sorted(group, key=lambda entry: entry["seed"]), bytes_of) for group in groups.values()]
    families = list(dict.fromkeys(row.family for row in rows))
    return sorted(rows, key=lambda row: (families.index(row.family), -row.settings["keep_ratio"]))


def _row(entries: Sequence[Mapping[str, Any]], bytes_of: Callable[[Mapping[str, Any]], int]) -> Row:
    good = [entry for entry in entries if "perplexity" in entry]
    errors = dict.fromkeys(entry["error"] for entry in entries if "error" in entry)
    first = (good or entries)[0]
    dense = float(first["dense_perplexity"])
    row = Row(
        first["settings"],
        first["preset"],
        first.get("used_metric", first["settings"]["metric"]),
        tuple(entry["seed"] for entry in good),
        dense,
        error="; ".join(errors),
        notes=tuple(dict.fromkeys(note for entry in good for note in entry["notes"])),
    )
    if not good:
        return row
    values = [float(entry["perplexity"]) for entry in good]
    predicted = [entry["predicted"] for entry in good if entry["predicted"] is not None]
    return dataclasses.replace(
        row,
        achieved=_mean(good, "achieved"),
        whole_model=_mean(good, "whole_model"),
        bytes=round(statistics.fmean(map(bytes_of, good))),
        perplexity=statistics.fmean(values),
        spread=statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
        excess=statistics.fmean(math.log(value) - math.log(dense) for value in values),
        predicted=statistics.fmean(predicted) if predicted else None,
        seconds=_mean(good, "seconds"),
    )


def _mean(entries: Sequence[Mapping[str, Any]], key: str) -> float:
    return statistics.fmean(entry[key] for entry in entries)


def _importance(cells: Sequence[Settings]) -> bool:
    """Whether any allocator may ask for the importance of modules; it comes with every pass at little cost."""
    return any(cell.needs & {"importance", "nats"} for cell in cells)


def _rounds(feedback: str) -> dict[str, int]:
    return {} if feedback == "none" else {"rounds": PRESETS["best"]["rounds"]}


def _axes(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in _AXES}


def _text(settings: Settings) -> str:
    """The settings as text; the name of the preset says nothing beyond what it has filled in."""
    values = settings.resolved()
    del values["preset"]
    return json.dumps(values, sort_keys=True)


def _key(identity: str, settings: Settings) -> str:
    return hashlib.sha256(f"{identity} {_text(settings)}".encode()).hexdigest()[:32]


def _plain(value: float) -> float | str:
    """JSON has no infinity: the string ``"Infinity"``, which ``float()`` reads."""
    return value if math.isfinite(value) else "Infinity"


def _tell(after: Callable[[dict[str, Any]], None] | None, entry: dict[str, Any]) -> None:
    if after is not None:
        after(entry)
