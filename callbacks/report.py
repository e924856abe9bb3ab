"""The record, the picture and the table of a run."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import SaveConfigCallback

from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.recovery import RankPreservingLoRA
from lowrank_lit.compress import CompressionResult
from lowrank_lit.evaluation import peak_memory_bytes, perplexity
from lowrank_lit.module import model_of
from lowrank_lit.report import assemble, data_hash, plot_ranks, summary_table, write_record


class RankReport(pl.Callback):
    """Write ``record.json`` and ``ranks.png``, print one table, and log its figures.

    A record is also written when the fit starts, so that a run which dies later leaves what it had measured. Where no
    callback compressed the model there is nothing to report.

    Args:
        dirpath: Folder to write to; by default the trainer's root folder.
        split: Split of the datamodule that perplexities are measured on.
    """

    def __init__(self, dirpath: str | None = None, *, split: str = "test") -> None:
        super().__init__()
        self.dirpath = dirpath
        self.split = split
        self.record: dict[str, Any] = {}
        self._started = self._train_started = time.perf_counter()
        self._recover: float | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the clock, unless the compression, listed earlier, has started it."""
        compression = _find(trainer, LowRankCompression)
        self._started = time.perf_counter()
        if isinstance(compression, LowRankCompression) and compression.started is not None:
            self._started = min(self._started, compression.started)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep what the compression measured."""
        self._write(trainer, self._assemble(trainer))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of the recovery."""
        self._train_started = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock of the recovery."""
        self._recover = time.perf_counter() - self._train_started

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Measure the recovered model, which is merged, rounded and exported by now, and report."""
        result = _result(trainer)
        if stage != "fit" or result is None or not trainer.is_global_zero:
            return
        recovered = self._recovered(trainer, pl_module)
        self.record = self._assemble(trainer, recovered) | {"complete": True}
        self._write(trainer, self.record)
        plot_ranks(result.plan, self._folder(trainer) / "ranks.png")
        _show(summary_table(self.record), self._folder(trainer))
        _log(trainer, self.record)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(trainer.default_root_dir if self.dirpath is None else self.dirpath)

    def _write(self, trainer: pl.Trainer, record: dict[str, Any]) -> None:
        if _result(trainer) is not None and trainer.is_global_zero:
            write_record(self._folder(trainer) / "record.json", record)

    def _recovered(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[float | None, float]:
        """Perplexity after the fit, ``None`` without a step or a text, and the seconds that it took."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        if trainer.global_step == 0 or not hasattr(datamodule, "evaluation") or not datamodule.has(self.split):
            return None, 0.0
        started = time.perf_counter()
        blocks = datamodule.evaluation(self.split)
        device = trainer.strategy.root_device
        value = perplexity(model_of(pl_module), blocks, batch_size=datamodule.batch_size, device=device)
        return value, time.perf_counter() - started

    def _assemble(self, trainer: pl.Trainer, recovered: tuple[float | None, float] = (None, 0.0)) -> dict[str, Any]:
        result = _result(trainer)
        if result is None:
            return assemble()
        before = result.record
        value, seconds = recovered
        device = trainer.strategy.root_device
        tuning = _find(trainer, RankPreservingLoRA)
        merged = tuning.record if isinstance(tuning, RankPreservingLoRA) else None
        trained = trainer.global_step > 0
        now = {
            "perplexity": {"recovered": value, "protocol": _protocol(trainer, self.split)},
            "seconds": {
                "recover": self._recover if trained else None,
                "evaluate": before["seconds"].get("evaluate", 0.0) + seconds,
                "total": time.perf_counter() - self._started,
            },
            "peak_memory_bytes": peak_memory_bytes(device),
            "peak_memory_counts": "CUDA tensors" if device.type == "cuda" else "the process, largest resident size",
            "fingerprint": result.plan.fingerprint,
            "data_hash": {
                "calibration": before["calibration"]["hash"],
                "evaluation": _evaluation_hash(trainer, self.split),
            },
            "matrices": {
                "targets": len(result.plan.matrices),
                "factored": sum(matrix.form == "factored" for matrix in result.plan.matrices),
            },
            "recovery": None if merged is None else {**merged.to_dict(), "steps": trainer.global_step},
            "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
            "config": _config(trainer),
        }
        return assemble(before, now)


def _find(trainer: pl.Trainer, kind: type[pl.Callback]) -> pl.Callback | None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _result(trainer: pl.Trainer) -> CompressionResult | None:
    compression = _find(trainer, LowRankCompression)
    return compression.result if isinstance(compression, LowRankCompression) else None


def _protocol(trainer: pl.Trainer, split: str) -> str | None:
    """How perplexity is measured, in words."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "evaluation") or not datamodule.has(split):
        return None
    count, length = datamodule.evaluation(split).shape
    return (
        f"{split} text, {count} blocks of {length} tokens from its start, {length - 1} targets each, no special tokens"
    )


def _evaluation_hash(trainer: pl.Trainer, split: str) -> str | None:
    datamodule: Any = getattr(trainer, "datamodule", None)
    return data_hash([datamodule.evaluation(split)]) if _protocol(trainer, split) else None


def _config(trainer: pl.Trainer) -> dict[str, Any]:
    """The command line's whole configuration, or the compression's settings where there was no command line."""
    saved = _find(trainer, SaveConfigCallback)
    if isinstance(saved, SaveConfigCallback):
        return dict(saved.config.as_dict())
    compression = _find(trainer, LowRankCompression)
    return compression.settings() if isinstance(compression, LowRankCompression) else {}


def _show(table: Any, folder: Path) -> None:
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120)
    console.print(table)
    console.print(f"Written to {folder}: record.json, ranks.png", soft_wrap=True)


def _log(trainer: pl.Trainer, record: dict[str, Any]) -> None:
    """The scalar figures under ``lowrank/...`` in every logger."""
    sections = ("keep_ratio", "parameters", "bytes", "perplexity", "seconds")
    figures = {
        f"lowrank/{section}/{key}": float(value)
        for section in sections
        for key, value in record[section].items()
        if isinstance(value, (int, float))
    }
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)
        logger.save()
