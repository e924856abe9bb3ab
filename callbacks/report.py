"""The record, the page, the pictures and the table of a run."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn

from lowrank_lit.callbacks._collected import TrainingCurves, hardware, usage
from lowrank_lit.callbacks._shared import find_callback
from lowrank_lit.callbacks.compression import LowRankCompression, evaluation_hash, measure
from lowrank_lit.callbacks.export import refuse_sharded
from lowrank_lit.callbacks.memory import MemoryReport
from lowrank_lit.callbacks.recovery import RankPreservingLoRA
from lowrank_lit.compress import CompressionResult
from lowrank_lit.errors import ExportError
from lowrank_lit.evaluation import peak_memory_bytes
from lowrank_lit.html import PAGE, RECORD, write_page
from lowrank_lit.module import model_of
from lowrank_lit.overview import rank_cells
from lowrank_lit.pictures import loss_figure, save_figure, spectra_figure
from lowrank_lit.report import (
    assemble,
    prediction,
    ranks_figure,
    read_record,
    recovery_note,
    summary_table,
    write_record,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SPLIT = "test"  # where LowRankCompression measures too; another one would compare perplexities of two texts

_QUANTISED = ("settings", "parameters", "bytes", "bits_per_weight", "largest_product_error", "error_law", "unquantized")


class RankReport(pl.Callback):
    """Write ``record.json``, the page ``report.html`` and ``ranks.png``, ``spectra.png`` and ``loss.png``; print one
    table with the plan's notes; log settings, figures and pictures.

    Record and page are also written when the fit starts and when training ends, so that a run which dies later leaves
    what it had measured; the page can be made again from the record, :func:`lowrank_lit.html.page_of_folder`. A file
    that cannot be written costs a warning, not the run. Without a LowRankCompression among the trainer's callbacks
    there is nothing to report, which is warned of. Perplexities are measured on the datamodule's
    ``evaluation("test")``, where it has one.

    Every logger of the trainer is given the settings (``log_hyperparams``) and figures (``log_metrics``) under
    ``lowrank/``. Pictures go to those that take them: an ``experiment`` with ``add_figure`` (TensorBoard), or a logger
    with ``log_image`` (Weights & Biases).

    Args:
        dirpath: Folder to write to; by default the trainer's root folder.

    Attributes:
        record: What ``record.json`` holds, once the fit has ended.

    Raises:
        ExportError: Before calibration, if ``dirpath`` cannot be made.
        ModelError: At setup, if the strategy splits the weights over processes.
    """

    evaluates_recovered = True
    """For the estimate of memory: the model is evaluated once more after the fit."""

    def __init__(self, dirpath: str | None = None) -> None:
        super().__init__()
        self.dirpath = dirpath
        self.record: dict[str, Any] = {}
        self._started = self._train_started = time.perf_counter()
        self._recover: float | None = None
        self._curves = TrainingCurves()

    def check(self, trainer: pl.Trainer, fingerprint: str) -> None:
        """Find out before the calibration whether there is a folder to write to; any earlier record is replaced."""
        try:
            self._folder(trainer).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                f"RankReport.dirpath='{self._folder(trainer)}' cannot be made ({error.strerror}); choose another folder"
            ) from error

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock, unless the compression, listed earlier, has started it."""
        if stage != "fit":
            return
        refuse_sharded(trainer, "RankReport", at_end=True)
        self._started, self._recover, self._curves = _start_of(trainer, self), None, TrainingCurves()
        if find_callback(trainer, LowRankCompression) is None:
            rank_zero_warn("RankReport has nothing to report: there is no LowRankCompression among the callbacks")
        if (memory := find_callback(trainer, MemoryReport)) is not None:
            memory.report_elsewhere()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the compression measured, and log how it was made."""
        self._write(trainer, self._assemble(trainer))
        _log_settings(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the recovery."""
        self._train_started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rate."""
        self._curves.before_batch(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        self._curves.after_batch(trainer, outputs)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the validation loss."""
        self._curves.after_validation(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Key ``curves``: what was seen of the training, which a run that goes on continues."""
        return {"curves": self._curves.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of a checkpoint."""
        self._curves.load_state_dict(state_dict["curves"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of the recovery."""
        self._recover = time.perf_counter() - self._train_started
        self._write(trainer, self._assemble(trainer))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Measure the recovered model, which is merged, rounded and exported by now, and report."""
        if stage != "fit":
            return
        result, memory = _result(trainer), find_callback(trainer, MemoryReport)
        if result is not None and trainer.is_global_zero:
            recovered = self._recovered(trainer, pl_module)
            self.record = self._assemble(trainer, recovered) | {"complete": True}
            if note := recovery_note(self.record):
                self.record["notes"] = [note, *(self.record.get("notes") or [])]
                warnings.warn(note, stacklevel=2)
            written = self._write(trainer, self.record)
            pictures = {
                "ranks": ranks_figure(result.plan),
                "spectra": spectra_figure(self.record),
                "loss": loss_figure(self.record),
            }
            written += _save_pictures(self._folder(trainer), pictures)
            _show(self.record, self._folder(trainer), written)
            _log(trainer, self.record)
            _log_pictures(trainer, self._folder(trainer), {k: v for k, v in pictures.items() if f"{k}.png" in written})
        if memory is not None:
            memory.finish(trainer)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir if self.dirpath is None else self.dirpath)

    def _write(self, trainer: pl.Trainer, record: dict[str, Any]) -> list[str]:
        """Write record and page; returns the names of the files that could be written."""
        if _result(trainer) is None or not trainer.is_global_zero:
            return []
        folder = self._folder(trainer)
        written = _attempt(RECORD, lambda: write_record(folder / RECORD, record))
        if written:  # from the record as it is read: what `lowrank-lit report` makes of it again
            written += _attempt(PAGE, lambda: write_page(folder / PAGE, read_record(folder / RECORD)))
        return written

    def _recovered(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[float | None, float]:
        """Perplexity after the fit, ``None`` without a step or a text, and the seconds that it took."""
        return (None, 0.0) if trainer.global_step == 0 else measure(trainer, model_of(pl_module))

    def _assemble(self, trainer: pl.Trainer, recovered: tuple[float | None, float] = (None, 0.0)) -> dict[str, Any]:
        result = _result(trainer)
        if result is None:
            return assemble()
        before = result.record
        value, seconds = recovered
        device = trainer.strategy.root_device
        tuning = find_callback(trainer, RankPreservingLoRA)
        merged = None if tuning is None else tuning.record
        quantised = None if tuning is None else tuning.quantization
        memory = find_callback(trainer, MemoryReport)
        trained = trainer.global_step > 0
        now = {
            "perplexity": {"recovered": value, "protocol": _protocol(trainer)},
            "predicted": prediction(before.get("predicted"), before["perplexity"]),
            "seconds": {
                "recover": self._recover if trained else None,
                "evaluate": before["seconds"].get("evaluate", 0.0) + seconds,
                "total": time.perf_counter() - self._started,
            },
            # PyTorch's own peak is reset where the stages of a MemoryReport begin.
            "peak_memory_bytes": max(peak_memory_bytes(device), 0 if memory is None else memory.largest),
            "peak_memory_counts": "CUDA tensors" if device.type == "cuda" else "the process, largest resident size",
            "memory": None if memory is None else memory.record(),
            "fingerprint": result.plan.fingerprint,
            "data_hash": {
                "calibration": before["calibration"]["hash"],
                "evaluation": evaluation_hash(trainer),
            },
            "matrices": {
                "targets": len(result.plan.matrices),
                "factored": sum(matrix.form != "dense" for matrix in result.plan.matrices),
                "pivot": sum(matrix.form == "pivot" for matrix in result.plan.matrices),
            },
            "recovery": None if merged is None else {**merged.to_dict(), "steps": trainer.global_step},
            "quantization": quantised and {key: quantised[key] for key in _QUANTISED},
            "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
            "config": _config(trainer),
            "ranks": rank_cells(result.plan),
            "curves": self._curves.record(),
            "hardware": hardware(trainer),
            "usage": usage(trainer),
        }
        return assemble(before, now)


def _result(trainer: pl.Trainer) -> CompressionResult | None:
    compression = find_callback(trainer, LowRankCompression)
    return None if compression is None else compression.result


def _start_of(trainer: pl.Trainer, report: RankReport) -> float:
    """Now, or when the compression began if it is listed first; else its clock still tells of the fit before."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    earlier = callbacks[: callbacks.index(report)]
    starts = [callback.started for callback in earlier if isinstance(callback, LowRankCompression)]
    return min([start for start in starts if start is not None], default=time.perf_counter())


def _protocol(trainer: pl.Trainer) -> str | None:
    """How perplexity is measured, in words."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if evaluation_hash(trainer) is None:
        return None
    count, length = datamodule.evaluation(_SPLIT).shape
    return (
        f"{_SPLIT} text, {count} blocks of {length} tokens from its start, {length - 1} targets each, no special tokens"
    )


def _config(trainer: pl.Trainer) -> dict[str, Any]:
    """The command line's whole configuration, or the compression's settings where there was no command line."""
    saved = find_callback(trainer, SaveConfigCallback)
    if isinstance(saved, SaveConfigCallback):
        # What `config` names has gone into the rest.
        return {key: value for key, value in saved.config.as_dict().items() if key != "config"}
    compression = find_callback(trainer, LowRankCompression)
    return compression.settings() if isinstance(compression, LowRankCompression) else {}


def _attempt(name: str, write: Callable[[], None]) -> list[str]:
    """``[name]`` if it could be written; a report is not worth losing a run for."""
    try:
        write()
    except ExportError as error:
        warnings.warn(f"{error}; the run goes on without", stacklevel=2)
        return []
    return [name]


def _save_pictures(folder: Path, pictures: Mapping[str, Figure | None]) -> list[str]:
    """Save what there is; a picture of an earlier run that this one has no figures for goes."""
    written = []
    for key, figure in pictures.items():
        path = folder / f"{key}.png"
        if figure is None:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        else:
            written += _attempt(path.name, partial(save_figure, figure, path))
    return written


def _show(record: dict[str, Any], folder: Path, written: list[str]) -> None:
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120)
    console.print(summary_table(record))
    for note in record.get("notes") or []:
        console.print(f"note: {note}", soft_wrap=True, markup=False, highlight=False)
    if written:
        console.print(f"Written to {folder}: {', '.join(written)}", soft_wrap=True, markup=False, highlight=False)


def _log_settings(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """The compression's settings in every logger, and the module's own: TensorBoard shows what it is given first."""
    result = _result(trainer)
    if result is None:
        return
    logged: Any = pl_module
    own = dict(logged.hparams_initial) if logged._log_hyperparams else {}
    settings = {f"lowrank/{key}": value for key, value in result.record["settings"].items()}
    for logger in trainer.loggers:
        logger.log_hyperparams({key: value for key, value in own.items() if key != "_class_path"} | settings)


def _log_pictures(trainer: pl.Trainer, folder: Path, pictures: Mapping[str, Figure | None]) -> None:
    """Pictures, in the loggers that take them."""
    for logger in trainer.loggers:
        experiment: Any = getattr(logger, "experiment", None)
        for key, figure in pictures.items():
            if hasattr(logger, "log_image"):
                logger.log_image(f"lowrank/{key}", [str(folder / f"{key}.png")], step=trainer.global_step)
            elif hasattr(experiment, "add_figure"):
                experiment.add_figure(f"lowrank/{key}", figure, trainer.global_step)
        logger.save()


def _log(trainer: pl.Trainer, record: dict[str, Any]) -> None:
    """The scalar figures under ``lowrank/...`` in every logger."""
    sections = ("keep_ratio", "parameters", "bytes", "perplexity", "predicted", "seconds")
    figures = {
        f"lowrank/{section}/{key}": float(value)
        for section in sections
        for key, value in (record.get(section) or {}).items()
        if isinstance(value, (int, float))
    }
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)
        logger.save()
