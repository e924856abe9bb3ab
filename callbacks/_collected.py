"""What a report collects from a run besides the compression's record."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lowrank_lit.callbacks._shared import find_callback
from lowrank_lit.callbacks.export import ExportOnFitEnd
from lowrank_lit.curves import Curve
from lowrank_lit.data import TextDataModule
from lowrank_lit.module import model_of

_CURVES = ("train_loss", "learning_rate", "validation_loss")


class TrainingCurves:
    """Losses and learning rates of a fit as its hooks show them, whatever the logger; of process 0 alone.

    The training loss is what ``training_step`` returns; the validation loss the logged ``val_loss``, or the first
    logged figure with ``val`` and ``loss`` in its name; the learning rate the largest of the optimizers' groups.
    """

    def __init__(self) -> None:
        self._curves = {name: Curve() for name in _CURVES}
        self._metric: str | None = None

    def before_batch(self, trainer: pl.Trainer) -> None:
        """Note the learning rate of the step; after the batch the scheduler has moved on."""
        rates = [float(group["lr"]) for made in trainer.optimizers for group in made.param_groups if "lr" in group]
        if rates:
            self._curves["learning_rate"].add(trainer.global_step + 1, max(rates))

    def after_batch(self, trainer: pl.Trainer, outputs: Any) -> None:
        """Note the loss of a batch, where the module gives one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # Lightning has divided it by the number of batches of a step.
            self._curves["train_loss"].add(trainer.global_step, loss.detach() * trainer.accumulate_grad_batches)

    def after_validation(self, trainer: pl.Trainer) -> None:
        """Note the validation loss; that of a sanity check only where it is of the whole text."""
        if trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches:
            return
        metrics = trainer.callback_metrics
        self._metric = self._metric or next(
            (name for name in sorted(metrics, key=lambda name: name != "val_loss") if "val" in name and "loss" in name),
            None,
        )
        if self._metric in metrics:
            self._curves["validation_loss"].add(trainer.global_step, metrics[self._metric])

    def record(self) -> dict[str, Any] | None:
        """The curves that have points, what they count in words, and the metric's name; ``None`` without any."""
        found: dict[str, Any] = {name: curve.to_dict() for name, curve in self._curves.items()}
        found = {name: curve for name, curve in found.items() if curve["steps"] or curve["skipped"]}
        if not found:
            return None
        counts = "Training loss: of the batches of process 0, as the module's training_step returns it."
        if self._metric is not None:
            counts += f" Validation loss: {self._metric}."
        return {**found, "counts": counts}

    def state_dict(self) -> dict[str, Any]:
        """All curves, for a checkpoint."""
        return {"metric": self._metric, **{name: curve.state_dict() for name, curve in self._curves.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._metric = state["metric"]
        for name, curve in self._curves.items():
            curve.load_state_dict(state[name])


def hardware(trainer: pl.Trainer) -> dict[str, str | int]:
    """What the run is on: system, processor, devices and processes; no name of the machine."""
    device = trainer.strategy.root_device
    found: dict[str, str | int] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "CPU cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": trainer.world_size,
        "nodes": trainer.num_nodes,
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
    }
    if device.type == "cuda":
        found["device memory"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _processor() -> str:
    with suppress(OSError):  # Linux alone has the file
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usage(trainer: pl.Trainer) -> dict[str, Any] | None:
    """Where the model is exported to, and what it is evaluated on; ``None`` where it is not exported."""
    export = find_callback(trainer, ExportOnFitEnd)
    if export is None:
        return None
    weight = next(model_of(trainer.lightning_module).parameters())
    dtype = getattr(trainer.lightning_module, "dtype_in_memory", weight.dtype)
    found: dict[str, Any] = {
        "folder": str(export.folder(trainer)),
        "dtype": str(dtype).removeprefix("torch."),
        "test": None,
    }
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, TextDataModule) and data.has("test"):
        sizes = {"block_size": data.block_size, "evaluation_blocks": data.evaluation_blocks}
        found |= {"test": data.sources["test"], **sizes}
    return found
