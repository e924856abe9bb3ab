"""A record as one page that asks for nothing else: no network, no script, pictures drawn in it.

Only what a record holds is shown. Where a stage did not run, a sentence stands in the place of its figures.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank_lit._markup import (
    RAMP,
    STYLE,
    Markup,
    absent,
    bar,
    breakable,
    element,
    paragraph,
    ramp,
    scrolling,
    table,
)
from lowrank_lit._tables import gibibytes
from lowrank_lit.pictures import curves_of, cut_of, depth_of, heights_of, panels_of
from lowrank_lit.report import COMPRESSION_STAGES, read_record, summary_rows, write_text
from lowrank_lit.svg import Line, line_chart

PAGE, RECORD = "report.html", "record.json"

_SHOWN = (
    *("complete", "keep_ratio", "parameters", "bytes", "perplexity", "predicted", "seconds", "peak_memory_bytes"),
    *("peak_memory_counts", "memory", "matrices", "ranks", "spectra", "curves", "config", "versions", "hardware"),
    *("seed", "notes", "usage", "weights_hash"),
)
"""Keys of a record that have a section of their own; all others are listed under the details."""


def render(record: Mapping[str, Any]) -> str:
    """The page of a record, see :func:`lowrank_lit.report.read_record`."""
    made = [(name, title, content) for name, title, content in _sections(record) if content]
    links = [element("li", element("a", title, href=f"#{name}")) for name, title, _ in made]
    sections = [
        element("section", element("h2", title, id=f"{name}-title"), *content, id=name, aria_labelledby=f"{name}-title")
        for name, title, content in made
    ]
    title = _title(record)
    head = element(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        element("style", STYLE),
    )
    top = element(
        "header", element("h1", title), *_lead(record), element("nav", element("ul", *links), aria_label="Sections")
    )
    release = record["versions"].get("lowrank-lit", "")
    foot = element("footer", paragraph(f"A run of lowrank-lit {release}; the figures are those of {RECORD}."))
    body = element("body", top, element("main", *sections), foot)
    return f'<!DOCTYPE html>\n<html lang="en">{head}{body}</html>\n'


def write_page(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write the page of a record; the file is complete or is not there, or is the one that was there before.

    Raises:
        ExportError: If the file cannot be written.
    """
    page = render(record)
    write_text(path, page)


def page_of_folder(folder: str | os.PathLike[str]) -> Path:
    """Make the page of a run again, from the record in its folder; returns the page's path.

    Raises:
        LowRankError: If there is no record that can be read.
        ExportError: If the page cannot be written.
    """
    record = read_record(Path(folder) / RECORD)
    write_page(Path(folder) / PAGE, record)
    return Path(folder) / PAGE


def _sections(record: Mapping[str, Any]) -> Iterator[tuple[str, str, list[Markup]]]:
    yield "summary", "Summary", _summary(record)
    yield "ranks", "Ranks", _ranks(record)
    yield "spectra", "Spectra", _spectra(record)
    yield "training", "Training", _training(record)
    yield "prediction", "Loss, predicted and measured", _prediction(record)
    yield "cost", "Time and memory", [*_time(record), *_memory(record)]
    yield "use", "Load and evaluate", _usage(record)
    yield "settings", "Settings", _settings(record)
    yield "notes", "Notes", _notes(record)
    yield "details", "Further figures", _details(record)


def _title(record: Mapping[str, Any]) -> str:
    requested = record["keep_ratio"]["requested"]
    run = "Low-rank compression" if record["complete"] else "Low-rank compression, unfinished run"
    return run if requested is None else f"{run}: keep ratio {requested:g}"


def _lead(record: Mapping[str, Any]) -> list[Markup]:
    keep, size, values = record["keep_ratio"], record["bytes"], record["perplexity"]
    cards: list[tuple[str, str, str]] = []
    if keep["achieved"] is not None:
        cards.append(("keep ratio of the targets", f"{keep['achieved']:.4f}", f"asked for: {keep['requested']:.4f}"))
        cards.append(("of the whole model", f"{keep['whole_model']:.4f}", "all parameters, tied ones once"))
    if size["dense"]:
        cards.append(("weights on disk", _megabytes(size["compressed"]), f"dense: {_megabytes(size['dense'])}"))
    for key, label in (("compressed", "perplexity, one-shot"), ("recovered", "perplexity, recovered")):
        if values[key] is not None and values["dense"] is not None:
            cards.append((label, f"{values[key]:.5g}", f"dense: {values['dense']:.5g}"))
    found = [
        element("div", element("dt", label), element("dd", value, element("small", rest)))
        for label, value, rest in cards
    ]
    return [element("dl", *found, class_="cards")] if found else []


def _summary(record: Mapping[str, Any]) -> list[Markup]:
    rows = [row for row in summary_rows(record) if any(cell not in ("", "–") for cell in row[1:4])]
    missing = [row[0] for row in summary_rows(record) if row not in rows]
    parts = [] if record["complete"] else [absent("The run has not come to its end; what it had measured is here.")]
    parts.append(
        table("What was measured", ["figure", "dense", "compressed", "ratio", "what it counts"], rows, 3, wordy=True)
    )
    return parts + ([absent(f"Not measured: {'; '.join(missing)}.")] if missing else [])


def _ranks(record: Mapping[str, Any]) -> list[Markup]:
    cells = record.get("ranks")
    if not cells:
        return [absent("The record holds no ranks; it was written by an older release, plan.json has them.")]
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    blocks = list(dict.fromkeys(cell["block"] for cell in cells))
    largest = max((cell["share"] for cell in cells if cell["share"] is not None), default=1.0)
    at = {(cell["kind"], cell["block"]): cell for cell in cells}
    head = [element("th", breakable(kind), scope="col") for kind in kinds]
    rows = [
        element(
            "tr",
            element("th", "outside" if block is None else block, scope="row"),
            *(_cell(at.get((kind, block)), largest) for kind in kinds),
        )
        for block in blocks
    ]
    caption = "Rank as a share of the full rank, by block and projection"
    grid = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", element("th", "block", scope="col"), *head)),
        element("tbody", *rows),
        class_="heat",
    )
    key = element("span", class_="key", style=f"background:linear-gradient(to right, {RAMP})", aria_hidden="true")
    words = ["Colour: 0 ", key, f" {largest:.2f}."]
    if any(cell["dense"] for cell in cells):
        words.append(" Hatched: stays dense.")
    if any(cell["pivot"] for cell in cells):
        words.append(" Framed: pivot form.")
    if any(cell["matrices"] > 1 for cell in cells):
        words.append(" Of several experts: mean of those that are factored, least and most, how many stay dense.")
    return [scrolling(grid, caption), element("p", *words, class_="dim"), _rank_figures(record)]


def _cell(cell: Mapping[str, Any] | None, largest: float) -> Markup:
    if cell is None:
        return element("td")
    if cell["share"] is None:
        return element("td", "dense", class_="dense", title=f"stays dense, full rank {cell['full_rank']}")
    lines: list[object] = [f"{cell['share']:.2f}"]
    if cell["matrices"] > 1:
        lines.append(element("small", f"{cell['least']:.2f}–{cell['most']:.2f}"))
    if cell["dense"]:
        lines.append(element("small", f"{cell['dense']} of {cell['matrices']} dense"))
    colour, ink = ramp(cell["share"] / largest)
    kind = "pivot" if cell["pivot"] else None
    what = f"rank {cell['rank']:g} of {cell['full_rank']}"
    return element("td", *lines, class_=kind, style=f"background:{colour};color:{ink}", title=what)


def _rank_figures(record: Mapping[str, Any]) -> Markup:
    effective = {(cell["kind"], cell["block"]): cell["effective_rank"] for cell in record.get("spectra") or []}
    rows = []
    for cell in record["ranks"]:
        several = cell["matrices"] > 1 and cell["share"] is not None
        rows.append(
            [
                breakable(cell["kind"]),
                "–" if cell["block"] is None else cell["block"],
                cell["matrices"],
                cell["dense"],
                "dense" if cell["rank"] is None else f"{cell['rank']:g}",
                cell["full_rank"],
                "–" if cell["share"] is None else f"{cell['share']:g}",
                f"{cell['least']:g}–{cell['most']:g}" if several else "",
                "–" if cell["kept_energy"] is None else f"{cell['kept_energy']:g}",
                f"{found:g}" if (found := effective.get((cell["kind"], cell["block"]))) is not None else "–",
            ]
        )
    head = ["projection", "block", "matrices", "dense", "rank", "full rank", "share", "least–most"]
    caption = "Kept energy: share of the squared singular values, in the plan's metric, that the rank keeps"
    shown = table(caption, [*head, "kept energy", "effective rank"], rows, 9)
    return element("details", element("summary", "The same as a table, with kept energy and effective rank"), shown)


def _spectra(record: Mapping[str, Any]) -> list[Markup]:
    panels = panels_of(record)
    if not panels:
        return [absent("The record holds no spectra; the compression was computed by an older release.")]
    heights = heights_of(record)
    figures = [_panel(record, kind, cells, count, heights) for kind, (cells, count) in panels.items()]
    words = (
        "Singular values in the plan's metric, divided by the largest, at up to 32 components; from blue, the first "
        "block, over purple to orange, the last. A ring is the cut: components to the right of it are left out. A line "
        "without a ring stays dense; what is below the axis is not drawn. Of experts: geometric means, the mean cut."
    )
    return [element("p", words, class_="dim"), element("div", *figures, class_="panels")]


def _panel(
    record: Mapping[str, Any], kind: str, cells: Sequence[Mapping[str, Any]], count: int, heights: tuple[float, float]
) -> Markup:
    if not any(value > 0 for cell in cells for value in cell["values"]):
        return element("figure", absent(f"{kind}: all singular values are 0 in the metric."))
    lines = []
    for cell in cells:
        cut = cut_of(record, cell)
        points = [(n / cell["full_rank"], v) for n, v in zip(cell["components"], cell["values"], strict=True)]
        colour = f"hsl({220 + 180 * depth_of(record, cell):.0f} 65% 52%)"
        lines.append(Line(points, colour, marks=[cut] if cut else []))
    label = f"Singular values of {kind}, {len(cells)} of {count} blocks"
    axes = {"x_label": "component / full rank", "y_label": "value / largest"}
    chart = line_chart(lines, label=label, **axes, log_y=True, x_range=(0.0, 1.0), y_range=heights, size=(300, 210))
    shown = "" if len(cells) == count else f" ({len(cells)} of {count} blocks)"
    return element("figure", element("figcaption", breakable(kind), shown), Markup(chart))


def _training(record: Mapping[str, Any]) -> list[Markup]:
    curves = curves_of(record)
    if "train" not in curves:
        why = "No training step was made." if record["complete"] else "No training step has been recorded."
        return [absent(why)]
    parts = [_loss_chart(curves), _rate_chart(curves)]
    train = record["curves"]["train_loss"]
    over = "one batch" if train["mean_over"] == 1 else f"the mean over {train['mean_over']} batches"
    words = f"{record['curves']['counts']} A point is {over}."
    parts.append(element("p", words, class_="dim"))
    if train["skipped"]:
        parts.append(absent(f"{train['skipped']} losses were not finite and are in no mean."))
    return parts + ([] if "validation" in curves else [absent("Nothing was validated while training.")])


def _loss_chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    train, validation = curves["train"], curves.get("validation", [])
    lines = [Line(train)] + ([Line(validation, "var(--second)", dashed=True, dots=True)] if validation else [])
    chart = line_chart(lines, label="Loss while training", x_label="step", y_label="loss")
    key: list[object] = [
        *(element("span", class_="swatch", style="border-color:var(--accent)", aria_hidden="true"), "training: "),
        f"{train[0][1]:.4g} at step {train[0][0]:g}, {train[-1][1]:.4g} at step {train[-1][0]:g}",
    ]
    if validation:
        key += [
            *(", ", element("span", class_="swatch", style="border-color:var(--second)", aria_hidden="true")),
            f"validation: {validation[0][1]:.4g} at step {validation[0][0]:g}, {validation[-1][1]:.4g} at step "
            f"{validation[-1][0]:g}",
        ]
    return element("figure", element("figcaption", *key), Markup(chart), class_="chart")


def _rate_chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Markup:
    rates = curves.get("rate")
    if not rates:
        return absent("No optimizer told its learning rate.")
    chart = line_chart(
        [Line(rates)], label="Learning rate while training", x_label="step", y_label="learning rate", size=(480, 150)
    )
    return element("figure", element("figcaption", "Learning rate"), Markup(chart), class_="chart")


def _prediction(record: Mapping[str, Any]) -> list[Markup]:
    predicted, values = record.get("predicted") or {}, record["perplexity"]
    rises = [("predicted, one-shot", predicted.get("nats")), ("measured, one-shot", predicted.get("measured_nats"))]
    if values["dense"] and values["recovered"]:
        rises.append(("measured, after training", math.log(values["recovered"] / values["dense"])))
    known = [(label, value) for label, value in rises if value is not None]
    if predicted.get("nats") is None:
        return [absent("This metric predicts no loss in nats, so there is nothing to compare.")]
    largest = max((value for _, value in known if math.isfinite(value)), default=0.0)
    rows = [
        [label, f"{value:.4f}", f"{math.exp(min(value, 700.0)):.3f}", bar(value / largest if largest > 0 else 0.0)]
        for label, value in known
    ]
    caption = "Rise of the loss over the dense model's, in nats per token, and the ratio of perplexities that it means"
    shown = table(caption, ["loss rise", "nats", "ratio", "compared"], rows, 2)
    parts = [shown, paragraph(f"The prediction is an {predicted['kind']}.")]
    return parts if predicted.get("measured_nats") is not None else [*parts, absent("The loss was not measured.")]


def _time(record: Mapping[str, Any]) -> list[Markup]:
    seconds = {key: value for key, value in record["seconds"].items() if value is not None}
    total = seconds.pop("total", None)
    if not seconds:
        return [absent("No stage has been timed.")]
    whole = total or sum(seconds.values())
    earlier = COMPRESSION_STAGES if record.get("from_cache") else ()
    rows = [
        [stage, f"{value:.1f}", "in an earlier run" if stage in earlier else bar(value / whole if whole else 0.0)]
        for stage, value in seconds.items()
    ]
    if total is not None:
        rows.append(["total", f"{total:.1f}", "with the time between the stages"])
    parts = [element("h3", "Time by stage"), table("Wall time", ["stage", "seconds", "share of the total"], rows, 1)]
    if record.get("from_cache"):
        parts.append(absent("The compression was taken from an earlier run; its seconds are those of that run."))
    return parts


def _memory(record: Mapping[str, Any]) -> list[Markup]:
    heading = element("h3", "Memory by stage")
    memory = record.get("memory")
    if not memory or not memory["stages"]:
        return [heading, absent("Memory was not watched by stage: there was no MemoryReport.")]
    rows = [
        [stage, place, _size(pair["estimated"]), _size(pair["used"])]
        for stage, places in memory["stages"].items()
        for place, pair in places.items()
    ]
    counts = [element("li", element("b", key), f": {value}") for key, value in memory["counts"].items()]
    shown = table("Peak of each stage", ["stage", "where", "estimated", "used"], rows, 3)
    return [heading, shown, element("ul", *counts, class_="dim")]


def _usage(record: Mapping[str, Any]) -> list[Markup]:
    usage = record.get("usage")
    if not usage:
        return [absent("The model was not exported: there was no ExportOnFitEnd.")]
    folder, dtype = usage["folder"], usage["dtype"]
    lines = ["import lowrank_lit", "", f"model = lowrank_lit.load({folder!r}, dtype={dtype!r})"]
    parts = [element("pre", element("code", "\n".join(lines)))]
    if usage.get("test"):
        sizes = f"block_size={usage['block_size']}, evaluation_blocks={usage['evaluation_blocks']}"
        lines += [
            f"data = lowrank_lit.TextDataModule({{'test': {usage['test']!r}}}, {folder!r}, {sizes})",
            "print(lowrank_lit.perplexity(model, data.evaluation('test')))",
        ]
        parts = [element("pre", element("code", "\n".join(lines)))]
    parts.append(paragraph("From a shell, beside the dense model, with the recipe of this run:"))
    parts.append(element("pre", element("code", f"lowrank-lit evaluate RECIPE --path={folder}")))
    return parts


def _settings(record: Mapping[str, Any]) -> list[Markup]:
    import yaml

    parts = []
    if record["config"]:
        listing = yaml.safe_dump(record["config"], sort_keys=False, allow_unicode=True, width=100)
        parts.append(element("details", element("summary", "Configuration"), element("pre", listing), open="open"))
    else:
        parts.append(absent("The record holds no settings."))
    seed = "no seed was set" if record["seed"] is None else f"seed {record['seed']}"
    hardware = record.get("hardware") or {}
    machine = [[key, value] for key, value in hardware.items()] + [["seed", seed]]
    if record.get("weights_hash"):
        machine.append(["dense weights, SHA-256", record["weights_hash"]])
    parts.append(table("Machine, seed and weights", ["what", "value"], machine))
    parts.append(table("Versions", ["package", "version"], list(record["versions"].items())))
    return parts


def _notes(record: Mapping[str, Any]) -> list[Markup]:
    notes = record.get("notes") or []
    return [element("ul", *(element("li", note) for note in notes))] if notes else [absent("The plan has no notes.")]


def _details(record: Mapping[str, Any]) -> list[Markup]:
    rest = {key: value for key, value in record.items() if key not in _SHOWN}
    rows = [[breakable(name), value] for name, value in _leaves(rest)]
    return [table("What else the record holds", ["figure", "value"], rows)] if rows else []


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of what is in nested mappings; a list of mappings entry by entry, other lists as one value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}".strip("."))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    elif value is not None:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.4g} MB"


def _size(count: int | None) -> str:
    return "not known" if count is None else gibibytes(count)
