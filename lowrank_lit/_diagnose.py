"""``lowrank-lit diagnose RECIPE``: its options, tables and pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from lowrank_lit._dry_run import compression_callback
from lowrank_lit._session import RecipeCLI
from lowrank_lit._tables import markdown, table
from lowrank_lit.diagnosis import Diagnosis, MatrixDiagnosis, diagnose
from lowrank_lit.errors import ExportError, RecipeError
from lowrank_lit.head_tail import PartOutput
from lowrank_lit.intruders import FactorComparison, check_intruder_settings, compare_models, suspicion
from lowrank_lit.overview import kinds_of
from lowrank_lit.pictures import HeatPanel, agreement_figure, heat_figure, save_figure
from lowrank_lit.plan import RankPlan
from lowrank_lit.report import plain_json, versions, write_text
from lowrank_lit.unmerging import is_record, merge_again

DIAGNOSTICS_VERSION = 1
"""Version of the keys of diagnostics.json."""

_Rows = list[list[str]]


@dataclass(frozen=True)
class DiagnosisOptions:
    """What the options ask for."""

    plan: str | None
    split: str | None
    head: float | None
    compressed: str | None
    recovered: str | None
    threshold: float
    top: int


def diagnosis_options(**given: Any) -> DiagnosisOptions:
    """The options of the command, checked before anything is loaded.

    Raises:
        RecipeError: Naming the option that cannot be met.
        ExportError: If a folder is not there.
        LowRankError: If a number is out of range.
    """
    asked = DiagnosisOptions(**given)
    if asked.recovered is not None and asked.compressed is None:
        raise RecipeError("option '--recovered' needs the compression before it; add --compressed FOLDER")
    if asked.head is not None and not 0 < asked.head < 1:
        raise RecipeError(f"option '--head': {asked.head:g} is outside (0, 1); it is a share of the full rank")
    check_intruder_settings(asked.threshold, asked.top)
    for name in ("compressed", "recovered"):
        folder = getattr(asked, name)
        if folder is not None and not Path(folder).is_dir():
            raise ExportError(f"option '--{name}': '{folder}' is no folder; give the folder of an export")
    return asked


def diagnose_recipe(cli: RecipeCLI, recipe: Path, asked: DiagnosisOptions, folder: Path) -> int:
    """Measure, print and write ``diagnostics.json``, ``diagnostics.md`` and the pictures.

    Raises:
        LowRankError: As :func:`lowrank_lit.diagnosis.diagnose` and :func:`lowrank_lit.intruders.compare_models`.
    """
    settings = compression_callback(cli, recipe).settings()
    compressed, recovered = _models(asked)
    plan = _plan(asked, compressed)
    cli.datamodule.prepare_data()
    batches = cli.datamodule.calibration_batches()
    split, blocks = _text(cli, asked.split)
    cli.model.configure_model()
    model, device = cli.model.model, cli.trainer.strategy.root_device
    compared: dict[str, FactorComparison] = {}
    if compressed is not None:  # first: a folder of another model is found in seconds
        limits: dict[str, Any] = {"threshold": asked.threshold, "top": asked.top, "head": asked.head}
        compared = compare_models(model, compressed, recovered, device=device, **limits)
    own = {key: value for key, value in settings.items() if plan is None or key not in ("keep_ratio", "targets")}
    found = diagnose(model, batches, plan=plan, blocks=blocks, head=asked.head, device=device, **own)
    text = _in_words(cli, split, blocks, batches, found)
    tables = [
        ("Matrices", matrix_rows(found), matrix_notes(found, text)),
        ("Head and tail", part_rows(found, compared), part_notes(found)),
    ]
    if compared:
        tables.append(("Intruder dimensions", intruder_rows(compared), intruder_notes(compared, asked)))
    parts = []
    for title, rows, notes in tables:
        print("\n".join([title, table(rows), *notes, ""]))
        parts += [f"## {title}", markdown(rows), *notes]
    for note in found.notes:
        print(f"note: {note}")
    record = {
        "diagnostics_version": DIAGNOSTICS_VERSION,
        "model": str(cli.model.source),
        "text": text,
        **found.to_dict(),
        "compared": {name: dataclasses.asdict(entry) for name, entry in compared.items()},
        "options": dataclasses.asdict(asked),
        "versions": versions(),
    }
    parts += [f"Note: {note}" for note in found.notes]
    _write(folder, record, "\n\n".join(["# Diagnostics", *parts]) + "\n", found)
    return 0


def _models(asked: DiagnosisOptions) -> tuple[nn.Module | None, nn.Module | None]:
    """The compressed and the recovered model of the options."""
    from lowrank_lit.hub import load

    if asked.compressed is None:
        return None, None
    compressed: nn.Module = load(asked.compressed, dtype="auto")
    if asked.recovered is None:
        return compressed, None
    if not is_record(asked.recovered):
        return compressed, load(asked.recovered, dtype="auto")
    recovered: nn.Module = load(asked.compressed, dtype="auto").double()
    merge_again(recovered, asked.recovered)
    return compressed, recovered


def _plan(asked: DiagnosisOptions, compressed: Any) -> RankPlan | None:
    if asked.plan is not None:
        return RankPlan.load(asked.plan)
    if compressed is None:
        return None
    entry: Any = getattr(compressed.config, "quantization_config", None)
    if not hasattr(entry, "rank_plan"):
        raise ExportError(
            f"option '--compressed': '{asked.compressed}' holds a dense model; give the export of a compression"
        )
    plan: RankPlan = entry.rank_plan()
    return plan


def _text(cli: RecipeCLI, asked: str | None) -> tuple[str, Tensor]:
    """Split and blocks that losses are measured on."""
    data = cli.datamodule
    split = asked or ("validation" if data.has("validation") else "calibration")
    if split == "calibration" and not data.has("calibration"):  # what calibration reads then
        import torch

        return "train", torch.cat([batch["input_ids"] for batch in data.calibration_batches()])
    return split, data.evaluation(split)


def _in_words(cli: RecipeCLI, split: str, blocks: Tensor, batches: Sequence[Any], found: Diagnosis) -> str:
    count, length = blocks.shape
    calibrated = sum(len(batch["input_ids"]) for batch in batches)
    return (
        f"losses on split {split} ({cli.datamodule.sources[split]}): {count} blocks of {length} tokens, "
        f"{found.targets:,} tokens scored, weights in {str(cli.model.dtype_in_memory).removeprefix('torch.')}; "
        f"statistics of {calibrated} blocks of calibration text"
    )


def matrix_rows(found: Diagnosis) -> _Rows:
    """A row for each matrix: spectra, importance, and the losses that its cut costs."""
    heading = ["matrix", "rank of full", "effective rank", "in metric", "stable rank", "in metric", "90/95/99 %"]
    heading += ["in metric", "in/out cosine", "kept energy", "predicted nats", "measured nats", "± s.e."]
    rows = [heading]
    for entry in found.matrices:
        full = min(entry.rows, entry.columns)
        rank = f"{full} (dense)" if entry.form == "dense" else f"{entry.rank} of {full}"
        ranks = [f"{s.rank_90}/{s.rank_95}/{s.rank_99}" for s in (entry.plain, entry.metric)]
        cut = entry.measured
        rows.append(
            [
                entry.name,
                rank,
                *(f"{spectrum.effective_rank:.1f}" for spectrum in (entry.plain, entry.metric)),
                *(f"{spectrum.stable_rank:.2f}" for spectrum in (entry.plain, entry.metric)),
                *ranks,
                _number(entry.cosine, ".4f"),
                f"{entry.kept_energy:.4f}",
                _number(entry.predicted, ".5f"),
                _number(None if cut is None else cut.rise, ".5f"),
                _number(None if cut is None else cut.error, ".5f"),
            ]
        )
    return rows


def matrix_notes(found: Diagnosis, text: str) -> list[str]:
    """What the first table counts, and its totals."""
    cut = [entry for entry in found.matrices if entry.measured is not None]
    together = found.losses["head"].change
    measured = sum(entry.measured.rise for entry in cut if entry.measured is not None)
    lines = [
        f"Dense loss {found.dense_loss:.5f} nats per token; {text}. Metric: {found.metric}; ranks: keep ratio "
        f"{found.plan.keep_ratio:.4f}, {found.plan.allocator}. Measured: rise of the loss with this matrix alone cut "
        "to its rank, all others dense, ± its standard error over the blocks. Predicted: of the same cut, from second "
        "moments of the calibration text.",
        f"Measured rises add up to {measured:.4f} nats over the {len(cut)} matrices that are cut; the heads everywhere "
        f"cost {together.rise:.4f}.",
    ]
    if found.rank_correlation is not None:
        predicted = sum(entry.predicted or 0.0 for entry in cut)
        weighted = _number(found.weighted_correlation, ".2f")
        lines.append(
            f"Predicted rises add up to {predicted:.4f}. Rank correlation (Spearman) of predicted and measured over "
            f"the matrices that are cut: {found.rank_correlation:.2f}; times the importance of the module: {weighted}."
        )
    else:
        lines.append(f"No prediction in nats per token by metric {found.metric}, or too few matrices to compare.")
    return lines


def part_rows(found: Diagnosis, compared: Mapping[str, FactorComparison]) -> _Rows:
    """A row for each matrix that is split; with a recovered model, where its update lies."""
    overlaps = any(entry.overlap is not None for entry in compared.values())
    heading = ["matrix", "head", "cosine, head", "tail", "variance, head", "tail", "mean, head", "tail"]
    rows = [heading + (["update / weight", "in head, left", "right", "chance, left", "right"] if overlaps else [])]
    for entry in found.matrices:
        if entry.parts is None:
            continue
        head, tail = entry.parts.head, entry.parts.tail
        row = [entry.name, f"{entry.parts.components} of {entry.parts.full_rank}"]
        row += [f"{value:.3f}" for pair in zip(_values(head), _values(tail), strict=True) for value in pair]
        own = compared[entry.name].overlap if entry.name in compared else None
        if overlaps:
            row += (
                [""] * 5
                if own is None
                else [
                    f"{value:.3f}" for value in (own.relative, own.left, own.right, own.left_chance, own.right_chance)
                ]
            )
        rows.append(row)
    return rows


def _values(part: PartOutput) -> tuple[float, float, float]:
    return part.cosine, part.variance, part.mean


def part_notes(found: Diagnosis) -> list[str]:
    """What the second table counts, and the losses."""
    split = [entry.parts for entry in found.matrices if entry.parts is not None]
    lines = [
        "Outputs of the head (leading components, in the metric) and of the tail (the others) beside the dense output "
        "on the dense model's inputs: mean cosine, variance as a share of the dense output's, squared norm of the mean "
        "output as a share of that of the dense one's. Shares of head and tail add up to 1 only where the two are "
        "uncorrelated."
    ]
    losses = []
    for part, words in (("head", "head alone everywhere"), ("tail", "tail alone everywhere"), ("both", "both")):
        own = found.losses[part]
        losses.append(
            f"{words} {own.change.loss:.5f} ({own.change.rise:+.5f}; frequent tokens {own.frequent:+.4f}, rare "
            f"{own.rare:+.4f})"
        )
    lines.append(
        f"Loss, nats per token: dense {found.dense_loss:.5f}; {'; '.join(losses)}. Frequent: the most frequent "
        "tokens of the text that make up half of it."
    )
    means = [
        f"{name} cosine {fmean(part.cosine for part in own):.3f}, variance {fmean(part.variance for part in own):.3f}, "
        f"mean output {fmean(part.mean for part in own):.3f}"
        for name, own in (("head", [entry.head for entry in split]), ("tail", [entry.tail for entry in split]))
    ]
    share = fmean(entry.components / entry.full_rank for entry in split)
    lines.append(f"Means over {len(split)} matrices: head {share:.2f} of the components; {'; '.join(means)}.")
    return lines


def intruder_rows(compared: Mapping[str, FactorComparison]) -> _Rows:
    """Intruders by projection, summed over blocks, and a last row for all."""
    kinds = kinds_of(compared)
    groups: dict[str, list[FactorComparison]] = {}
    for name, entry in compared.items():
        groups.setdefault(kinds[name][0], []).append(entry)
    recovered = any(entry.recovered is not None for entry in compared.values())
    heading = ["projection", "matrices", "looked at", "compressed / base", "all components"]
    heading += ["recovered / base", "all components", "recovered / compressed", "all components"] if recovered else []
    groups["all"] = list(compared.values())
    return [heading, *(_intruder_row(kind, own, recovered) for kind, own in groups.items())]


def _intruder_row(kind: str, entries: Sequence[FactorComparison], recovered: bool) -> list[str]:
    row = [kind, str(len(entries)), str(sum(entry.compressed.looked_at for entry in entries))]
    for name in ("compressed", "recovered", "since")[: 3 if recovered else 1]:
        own = [getattr(entry, name) for entry in entries]
        left, right, left_all, right_all, rank = (
            sum(getattr(one, field) for one in own) for field in ("left", "right", "left_all", "right_all", "rank")
        )
        row += [f"{left} + {right}", f"{left_all} + {right_all} of {rank}"]
    return row


def intruder_notes(compared: Mapping[str, FactorComparison], asked: DiagnosisOptions) -> list[str]:
    """What the third table counts."""
    lines = [
        f"Singular vectors, output + input side, whose greatest absolute cosine with the singular vectors of the other "
        f"model's matrix is below {asked.threshold:g}: among the first {asked.top} of each matrix, and among all."
    ]
    overlaps = [entry.overlap for entry in compared.values() if entry.overlap is not None]
    if overlaps:
        fields = ("relative", "left", "left_chance", "right", "right_chance", "neither")
        mean = {name: fmean(getattr(overlap, name) for overlap in overlaps) for name in fields}
        lines.append(
            f"Update of the recovery, means over {len(overlaps)} matrices: norm {mean['relative']:.3f} of the weight's;"
            f" of its energy {mean['left']:.3f} lie in the head's output directions (by chance "
            f"{mean['left_chance']:.3f}), {mean['right']:.3f} in its input directions ({mean['right_chance']:.3f}), "
            f"{mean['neither']:.4f} in neither."
        )
    doubt = suspicion(compared)
    return [*lines, f"Note: {doubt}."] if doubt else lines


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _write(folder: Path, record: Mapping[str, Any], text: str, found: Diagnosis) -> None:
    content = json.dumps(plain_json(record, "diagnostics"), indent=1, allow_nan=False) + "\n"
    names = {"diagnostics.json": content, "diagnostics.md": text}
    for name, written in names.items():
        write_text(folder / name, written)
    cut = [entry for entry in found.matrices if entry.measured is not None]
    panels = [_panel("measured", cut, lambda entry: entry.measured.rise)]
    if all(entry.predicted is not None for entry in cut):
        panels.append(_panel("predicted", cut, lambda entry: entry.predicted))
        points = [(entry.predicted or 0.0, entry.measured.rise) for entry in cut if entry.measured is not None]
        save_figure(agreement_figure(points, [entry.kind for entry in cut]), folder / "agreement.png")
        names["agreement.png"] = ""
    figures = {"losses.png": heat_figure(panels, "rise of the loss, nats per token", signed=True)}
    split = [entry for entry in found.matrices if entry.parts is not None]
    panels = [
        _panel("head, cosine", split, lambda entry: entry.parts.head.cosine),
        _panel("tail, cosine", split, lambda entry: entry.parts.tail.cosine),
        _panel("head, variance", split, lambda entry: entry.parts.head.variance),
        _panel("tail, variance", split, lambda entry: entry.parts.tail.variance),
    ]
    figures["head_tail.png"] = heat_figure(panels, "beside the dense output", signed=False)
    for name, figure in figures.items():
        save_figure(figure, folder / name)
    print(f"Written to {folder}: {', '.join([*names, *figures])}")


def _panel(title: str, entries: Sequence[MatrixDiagnosis], value: Callable[[Any], float]) -> HeatPanel:
    """Of the experts of a block their mean."""
    groups: dict[tuple[str, int | None], list[float]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.block), []).append(value(entry))
    return HeatPanel(title, {key: fmean(own) for key, own in groups.items()})
