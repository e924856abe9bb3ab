"""Records of a run: one JSON file, one table, one picture."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_lit._version import __version__
from lowrank_lit.errors import ExportError, LowRankError, NonFiniteError
from lowrank_lit.overview import place_of
from lowrank_lit.plan import MatrixPlan, RankPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

RECORD_VERSION = 1
"""Version of the record's keys; a reader refuses a newer one."""

_PACKAGES = (
    *("torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "safetensors", "numpy"),
    *("bitsandbytes", "deepspeed"),
)
_STAGES = ("calibrate", "allocate", "factor", "recover", "evaluate", "total")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "keep_ratio": ("requested", "achieved", "whole_model"),
    "parameters": ("targets_dense", "targets", "model_dense", "model"),
    "bytes": ("dense", "compressed"),
    "perplexity": ("dense", "compressed", "recovered", "protocol"),
    "seconds": _STAGES,
    "data_hash": ("calibration", "evaluation"),
}
COMPRESSION_STAGES = ("calibrate", "decompose", "measure", "allocate", "select", "feedback", "factor")
"""What ``seconds`` of a record are of the compression; one that was taken from an earlier run has that run's."""

_REQUIRED_VALUES = ("complete", "peak_memory_bytes", "fingerprint", "weights_hash", "versions", "seed", "config")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the installed packages that a result depends on."""
    found = {"python": platform.python_version(), "lowrank-lit": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def data_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over types, shapes and values of tensors, in order, as 64 hexadecimal digits.

    The same tokens cut into other batches have another hash.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def assemble(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """One record from what several stages measured; a later part wins where two hold the same key, section by section.

    Keys that every record has (``null`` where a stage did not run):

    - ``complete``: false while the run goes on, and for ever where it died.
    - ``keep_ratio``: ``requested`` and ``achieved`` of the target matrices, ``whole_model`` of every parameter.
    - ``parameters``: counts behind these ratios; ``bytes``: of the whole model in its storage type.
    - ``perplexity``: ``dense``, ``compressed`` before and ``recovered`` after training, and the ``protocol`` in words.
    - ``seconds``: wall time of every stage; ``total`` has the time between the stages too.
    - ``peak_memory_bytes``, ``data_hash`` (``calibration``, ``evaluation``), ``fingerprint`` of the plan,
      ``weights_hash`` of the dense model (:func:`lowrank_lit.compress.weights_hash`), ``versions``, ``seed`` and
      ``config``.

    Raises:
        LowRankError: If a section is no mapping.
    """
    record: dict[str, Any] = {"record_version": RECORD_VERSION, "complete": False}
    record |= {section: dict.fromkeys(keys) for section, keys in _REQUIRED.items()}
    record |= dict.fromkeys(name for name in _REQUIRED_VALUES if name not in record) | {"versions": versions()}
    for part in parts:
        for key, value in part.items():
            if key not in _REQUIRED:
                record[key] = value
            elif isinstance(value, Mapping):
                record[key] = {**record[key], **value}
            else:
                raise LowRankError(f"record.{key}={value!r} must be a mapping with {', '.join(_REQUIRED[key])}")
    return record


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write a record as JSON; the file is complete or is not there, or is the one that was there before.

    JSON has no infinity: it is written as the string ``"Infinity"``, which ``float()`` reads. A list of numbers takes
    one line, and so does each entry of a list of mappings.

    Raises:
        LowRankError: If a key that every record has is missing.
        NonFiniteError: If a value is NaN; the message names the key.
        ExportError: If the file cannot be written.
    """
    missing = [name for name in _REQUIRED_VALUES if name not in record]
    missing += [f"{name}.{key}" for name, keys in _REQUIRED.items() for key in keys if key not in record.get(name, {})]
    if missing:
        raise LowRankError(f"the record lacks '{missing[0]}'; make it with lowrank_lit.report.assemble")
    text = _json(plain_json(record, "record")) + "\n"
    write_text(path, text)


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_record` wrote; infinities are numbers again.

    Raises:
        LowRankError: If the file is missing, truncated, no record, or of a newer version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        found = record["record_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LowRankError(f"record '{path}' cannot be read ({error}); give a record.json of a RankReport") from error
    if found > RECORD_VERSION:
        raise LowRankError(f"record '{path}' has version {found}, newer than {RECORD_VERSION}; upgrade lowrank-lit")
    for section in ("perplexity", "predicted"):
        if record.get(section):
            record[section] = {k: math.inf if v == "Infinity" else v for k, v in record[section].items()}
    return dict(record)


def prediction(predicted: Mapping[str, Any] | None, perplexity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The predicted rise of the loss beside the measured one, for a record's key ``predicted``.

    Args:
        predicted: ``nats`` per token and ``perplexity_ratio`` of a compression's record; ``None`` where there is none.
        perplexity: ``dense`` and ``compressed``.

    Returns:
        What was given with ``measured_nats``, ``ln(compressed / dense)``, ``None`` without the two, and ``kind``, which
        says that the former is an estimate.
    """
    if not predicted:
        return None
    dense, compressed = perplexity.get("dense"), perplexity.get("compressed")
    measured = None if dense is None or compressed is None else math.log(compressed) - math.log(dense)
    return {**predicted, "measured_nats": measured, "kind": "estimate from second moments of the calibration text"}


def recovery_note(record: Mapping[str, Any]) -> str | None:
    """What a record says of a recovery that has made the model worse; ``None`` where it has not, or nothing is known.

    That is a ``recovered`` perplexity above the ``compressed`` one. A reallocation leaves a smaller model than the one
    that the latter was measured on: nothing is said of its recovery.
    """
    one_shot, recovered = record["perplexity"]["compressed"], record["perplexity"]["recovered"]
    if record.get("reallocation") or one_shot is None or recovered is None or recovered <= one_shot:
        return None
    digits = next((n for n in range(5, 17) if f"{one_shot:.{n}g}" != f"{recovered:.{n}g}"), 17)
    return (
        f"the recovery made the model worse: perplexity {recovered:.{digits}g} after it, {one_shot:.{digits}g} "
        "one-shot, on the same text; lower learning_rate, or train on more text, and watch val_loss"
    )


def plain_json(value: Any, where: str) -> Any:
    """The same value in JSON's types; anything unknown by its text, so that a setting of any type can be recorded."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a number in a tensor or a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            raise NonFiniteError(f"{where} is NaN; find the stage that measured it, a record of NaN says nothing")
        return "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _json(value: Any, indent: str = "") -> str:
    """JSON with a line for each key, and for each entry of a list that holds more than plain values."""
    inner = indent + "  "
    if isinstance(value, dict) and value:
        lines = [f"{inner}{json.dumps(key)}: {_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, (dict, list, str)) for item in value):
        lines = [inner + json.dumps(item, allow_nan=False) for item in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` if the body succeeds and vanishes if not."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"'{path}' cannot be written ({reason}); free space or choose another folder") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """A text file that is complete or is not there, or is the one that was there before.

    Raises:
        ExportError: If it cannot be written.
    """
    with replacing(Path(path)) as partial:
        partial.write_text(text, encoding="utf-8")


def summary_table(record: Mapping[str, Any]) -> Table:
    """The figures of a record as one table, each with what it counts."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = "Low-rank compression" if record["complete"] else "Low-rank compression (unfinished run)"
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    for heading in ("dense", "compressed", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it counts", ratio=1)
    for row in summary_rows(record):
        table.add_row(*row)
    return table


_Row = tuple[str, str, str, str, str]


def summary_rows(record: Mapping[str, Any]) -> list[_Row]:
    """The figures of a record: name, dense, compressed, ratio, what it counts; a figure that is not there is "–"."""
    return [*_size_rows(record), *_perplexity_rows(record), *_prediction_rows(record), *_cost_rows(record)]


def _size_rows(record: Mapping[str, Any]) -> Iterator[_Row]:
    count, keep, size = record["parameters"], record["keep_ratio"], record["bytes"]
    matrices = record.get("matrices") or {}
    which = "the {targets} target matrices, {factored} of them factored".format_map(matrices) if matrices else "targets"
    if matrices.get("pivot"):
        which += f" ({matrices['pivot']} in pivot form)"
    asked = f"numbers stored for {which}; keep ratio asked for: {_number(keep['requested'], '.4f')}"
    yield "targets", _whole(count["targets_dense"]), _whole(count["targets"]), _number(keep["achieved"], ".4f"), asked
    every = "all parameters of the model, tied ones once"
    yield "model", _whole(count["model_dense"]), _whole(count["model"]), _number(keep["whole_model"], ".4f"), every
    ratio = _quotient(size["compressed"], size["dense"], ".4f")
    yield "MB", _scaled(size["dense"]), _scaled(size["compressed"]), ratio, "weights on disk, in millions of bytes"
    if record.get("weights_hash"):
        what = "which weights: the first digits of their SHA-256, that of record.json; names and values alone"
        yield "dense weights", record["weights_hash"][:12], "", "", what


def _perplexity_rows(record: Mapping[str, Any]) -> Iterator[_Row]:
    values = record["perplexity"]
    after = "no training step was made" if values["recovered"] is None else "the same text, after training"
    after += ", which made it worse" if recovery_note(record) else ""
    for key, label, text in (
        ("compressed", "perplexity, one-shot", values["protocol"]),
        ("recovered", "perplexity, recovered", values["protocol"] and after),
    ):
        text = text or "not measured: no text"
        ratio = _quotient(values[key], values["dense"], ".3f")
        yield label, _number(values["dense"], ".5g"), _number(values[key], ".5g"), ratio, text


def _prediction_rows(record: Mapping[str, Any]) -> Iterator[_Row]:
    predicted = record.get("predicted") or {}
    if predicted.get("nats") is None:
        return
    measured = predicted.get("measured_nats")
    ratio = _number(None if measured is None else math.exp(min(measured, 700.0)), ".3f")
    text = "nats per token: ln of the perplexity's ratio, one-shot"
    yield "loss rise, measured", "", _number(measured, ".4f"), ratio, text
    ratio = _number(predicted.get("perplexity_ratio"), ".3f")
    what = "an estimate, from the calibration text; ratio: of perplexities, that it means"
    yield "loss rise, predicted", "", _number(predicted["nats"], ".4f"), ratio, what


def _cost_rows(record: Mapping[str, Any]) -> Iterator[_Row]:
    texts = {
        "calibrate": "passes over the calibration text for the statistics",
        "decompose": "spectra of every matrix",
        "measure": "what the allocator measures by itself",
        "allocate": "ranks from the spectra",
        "select": "candidate plans measured on calibration text",
        "feedback": "statistics of the compressed model, and its refit",
        "factor": "factors of every matrix",
        "recover": "training",
        "evaluate": "all perplexities",
        "total": "from set-up to this table",
    }
    for stage, text in texts.items():
        if stage in record["seconds"]:  # some belong to some settings only
            if record.get("from_cache") and stage in COMPRESSION_STAGES:
                text += ", in the earlier run that it was taken from"
            yield f"seconds, {stage}", "", _number(record["seconds"][stage], ".1f"), "", text
    memory = record.get("peak_memory_counts") or "largest so far"
    yield "peak memory, MB", "", _scaled(record["peak_memory_bytes"]), "", memory


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _whole(value: int | None) -> str:
    return _number(value, ",")


def _scaled(size: int | None) -> str:
    return "–" if size is None else format(size / 1e6, ",.1f" if size >= 1e7 else ".3f")


def _quotient(value: float | None, reference: float | None, form: str) -> str:
    return "–" if value is None or not reference or math.isinf(reference) else format(value / reference, form)


def plot_ranks(plan: RankPlan, path: str | os.PathLike[str]) -> None:
    """Draw the rank of every matrix of a plan as a map, layer by projection, and save it as PNG.

    Colour is the rank as a share of min(rows, columns), the number is the rank; matrices that stay dense are hatched,
    those in pivot form have a frame.
    The layer is the first number in a module's name; names without one share one unnumbered column.

    Raises:
        ExportError: If the file cannot be written.
    """
    figure = ranks_figure(plan)
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def ranks_figure(plan: RankPlan) -> Figure:
    """What :func:`plot_ranks` saves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells, columns, rows = _grid(plan)
    width = min(24.0, max(6.4, 2.6 + 0.46 * len(columns)))
    height = min(24.0, 1.5 + 0.36 * len(rows))
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # a canvas of its own: no pyplot, no window, no state that outlives the call
    axes = figure.add_subplot()
    _draw_cells(figure, axes, cells, numbers=len(columns) <= 48 and len(rows) <= 64)
    _label(axes, columns, rows)
    axes.set_title(
        f"Rank per matrix: {plan.keep_ratio:.3f} of the numbers kept ({plan.requested_keep_ratio:g} asked), "
        f"{plan.metric} metric, {plan.allocator}",
        fontsize=9,
        loc="left",
        wrap=True,
    )
    return figure


def plot_prediction(
    points: Sequence[tuple[float, float]],
    path: str | os.PathLike[str],
    *,
    keep_ratio: float,
    nats: float | None,
    basis: str = "statistics of the dense model",
) -> None:
    """Draw the predicted rise of the loss against the keep ratio, and save it as PNG.

    Args:
        points: ``(keep_ratio, nats per token)`` of the line, from statistics of the dense model; what is not above 0
            has no place on the logarithmic axis.
        path: To write.
        keep_ratio: Of the recipe, which is marked.
        nats: Predicted for the recipe's own plan, if known; its mark need not lie on the line.
        basis: What that prediction rests on, in words, for the mark's label.

    Raises:
        ExportError: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    shown = sorted(point for point in points if point[1] > 0)
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axvline(keep_ratio, color="#D55E00", linewidth=1.2, linestyle=(0, (5, 3)))
    axes.plot(*zip(*shown, strict=True), color="#0072B2", linewidth=2, marker="o", markersize=4)
    if nats is not None and nats > 0:
        _mark_plan(axes, keep_ratio, nats, basis)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=[1.0, 2.0, 5.0]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    factors = axes.secondary_yaxis("right")
    factors.yaxis.set_major_locator(LogLocator(subs=[1.0, 2.0, 5.0]))
    factors.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{math.exp(min(value, 700.0)):{'.4g' if value >= 0.01 else '.5g'}}")
    )
    factors.yaxis.set_minor_formatter(NullFormatter())
    factors.set_ylabel("perplexity, times the dense model's")
    axes.set_xlabel("keep ratio of the target matrices")
    axes.set_ylabel("predicted rise of the loss, nats per token")
    title = "Predicted, not measured. Line: statistics of the dense model, knapsack ranks"
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)
    for part in (axes, factors):
        part.tick_params(labelsize=9, which="both")
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")


def _mark_plan(axes: Axes, keep_ratio: float, nats: float, basis: str) -> None:
    axes.plot([keep_ratio], [nats], color="#D55E00", marker="D", markersize=7, linestyle="none")
    figures = f"keep ratio {keep_ratio:g}, {nats:.3g} nats, perplexity × {math.exp(min(nats, 700.0)):.3f}"
    right = keep_ratio > 0.62
    place: dict[str, Any] = {"xytext": (-12 if right else 12, 10), "textcoords": "offset points"}
    side = "right" if right else "left"
    box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    label = f"this plan, {basis}:\n{figures}"
    axes.annotate(label, (keep_ratio, nats), ha=side, fontsize=9, color="#B34700", bbox=box, **place)


def _grid(plan: RankPlan) -> tuple[dict[tuple[int, int], MatrixPlan], list[str], list[str]]:
    """Cells by (column, row), and the labels of both: layers in order, projections in the order of the model."""
    places = [(place_of(matrix.name), matrix) for matrix in plan.matrices]
    stacks = {stack for (stack, layer, _), _ in places if layer is not None}
    layers = sorted({layer for (_, layer, _), _ in places if layer is not None})
    columns = [str(layer) for layer in layers]
    if any(layer is None for (_, layer, _), _ in places):
        columns.append("")
    rows: dict[str, int] = {}
    cells = {}
    for (stack, layer, projection), matrix in places:
        # An encoder's layer 0 and a decoder's are different layers: with several stacks the row names its own.
        label = f"{stack}.{projection}".strip(".") if len(stacks) > 1 and layer is not None else projection or stack
        row = rows.setdefault(label or "layer", len(rows))
        cells[layers.index(layer) if layer is not None else len(layers), row] = matrix
    return cells, columns, list(rows)


def _draw_cells(figure: Figure, axes: Axes, cells: Mapping[tuple[int, int], MatrixPlan], *, numbers: bool) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch, Rectangle

    shares = [_share(matrix) for matrix in cells.values() if matrix.form != "dense"]
    # Matplotlib's annotations ask for arrays where it takes a number as well.
    scale: Any = ScalarMappable(Normalize(0.0, max(shares, default=1.0)), colormaps["viridis"])
    dense: dict[str, Any] = {"facecolor": "#eeeeee", "edgecolor": "#999999", "hatch": "////", "linewidth": 0.0}
    pivot: dict[str, Any] = {"edgecolor": "#d62728", "linewidth": 1.0}
    for (column, row), matrix in cells.items():
        corner = (column - 0.48, row - 0.46)
        if matrix.form == "dense":
            axes.add_patch(Rectangle(corner, 0.96, 0.92, **dense))
            continue
        frame = pivot if matrix.form == "pivot" else {}
        axes.add_patch(Rectangle(corner, 0.96, 0.92, facecolor=scale.to_rgba(_share(matrix)), **frame))
        if numbers:
            ink = "black" if scale.norm(_share(matrix)) > 0.6 else "white"
            axes.text(column, row, str(matrix.rank), ha="center", va="center", fontsize=7, color=ink)
    if shares:
        bar = figure.colorbar(scale, ax=axes, pad=0.015, aspect=24)
        bar.set_label("rank / full rank", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    forms = {matrix.form for matrix in cells.values()}
    handles = [Patch(label="stays dense", **dense)] if "dense" in forms else []
    handles += [Patch(label="pivot form", facecolor="none", **pivot)] if "pivot" in forms else []
    if handles:
        key: dict[str, Any] = {"loc": "outside lower right", "fontsize": 7, "frameon": False, "ncols": len(handles)}
        figure.legend(handles=handles, **key)


def _share(matrix: MatrixPlan) -> float:
    return matrix.rank / min(matrix.rows, matrix.columns)


def _label(axes: Axes, columns: list[str], rows: list[str]) -> None:
    step = max(1, len(columns) // 40)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the model's first projection on top
    axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if any(columns):
        axes.set_xlabel("layer", fontsize=8)
