"""One-shot compression at the start of a fit."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.callbacks.export import ExportOnFitEnd
from lowrank_lit.compress import MIN_RANK, CompressionResult, Settings, compress, fingerprint
from lowrank_lit.errors import DataError, PlanError
from lowrank_lit.evaluation import perplexity
from lowrank_lit.surgery import count_parameters


class LowRankCompression(pl.Callback):
    """Calibrate, allocate ranks and factor the model, before the optimizers are made.

    This happens in ``setup("fit")``: a layer replaced any later would be missing from the optimizer and silently never
    train. The compression is kept in the trainer's root folder (``compressed/``), and a later run with the same
    weights, calibration text and settings takes it from there.

    Args:
        keep_ratio: Share of the target matrices' parameters to keep, in (0, 1].
        metric: In which norm components are large: ``identity`` or ``input`` (SVD-LLM).
        allocator: How the budget is shared out: ``unirank`` or ``uniform``.
        targets: Shell patterns of layer names such as ``*.mlp.*``; by default every linear layer but the output
            embedding.
        min_rank: Least rank of a matrix.
        damping: Relative damping of the second moments.
        batches: Calibration batches; by default the datamodule's ``calibration_batches()``.

    Attributes:
        result: Plan and record, once ``setup`` has run.

    Raises:
        LowRankError: A child of it for bad settings, batches or weights; the model is then as it was.
    """

    def __init__(
        self,
        keep_ratio: float = 0.6,
        *,
        metric: str = "input",
        allocator: str = "unirank",
        targets: list[str] | None = None,
        min_rank: int = MIN_RANK,
        damping: float = 1e-4,
        batches: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        self._settings = Settings(keep_ratio, metric, allocator, targets, min_rank, damping)
        self.batches = batches
        self.result: CompressionResult | None = None

    def settings(self) -> dict[str, Any]:
        """The keyword arguments for :func:`lowrank_lit.compress` and :func:`lowrank_lit.plan_ranks`."""
        return dict(vars(self._settings))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Compress the module's model, unless this callback has done so already."""
        if stage != "fit" or self.result is not None:
            return
        pl_module.configure_model()  # Lightning calls it after this hook; it does nothing the second time
        model = model_of(pl_module)
        batches = self._batches(trainer)
        identity = fingerprint(model, batches, self._settings)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ExportOnFitEnd):
                callback.check(trainer, identity)
        self.result = self._compress(trainer, model, batches, identity)
        _describe_storage(self.result.record, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Key ``plan``: the plan as a dictionary, so that a checkpoint tells the shape of its own model."""
        return {} if self.result is None else {"plan": self.result.plan.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another plan.

        Raises:
            PlanError: If the plan in the checkpoint is not the one of this run.
        """
        if self.result is not None and state_dict.get("plan", {}).get("fingerprint") != self.result.plan.fingerprint:
            raise PlanError(
                "the checkpoint belongs to another plan (other weights, calibration text or settings); "
                "resume with the recipe that made it"
            )

    def _batches(self, trainer: pl.Trainer) -> Sequence[Any]:
        if self.batches is not None:
            return self.batches
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "calibration_batches"):
            raise DataError(
                "LowRankCompression has no calibration text: pass batches=..., or fit with a TextDataModule"
            )
        return list(datamodule.calibration_batches())

    def _compress(
        self, trainer: pl.Trainer, model: nn.Module, batches: Sequence[Any], identity: str
    ) -> CompressionResult:
        root = Path(trainer.default_root_dir)
        kept = load_compression(root / "compressed", model, identity)
        if kept is not None:
            trainer.print(
                f"Compression taken from {root / 'compressed'} (same weights, calibration text and settings)"
            )
            return kept
        device = trainer.strategy.root_device
        dense, first = _measure(trainer, model)
        result = compress(model, batches, device=device, **self.settings())
        compressed, second = _measure(trainer, model)
        result.record["perplexity"] = {"dense": dense, "compressed": compressed}
        result.record["seconds"]["evaluate"] = first + second
        if trainer.is_global_zero:
            save_compression(root / "compressed", model, result)
            result.plan.save(root / "plan.json")
        return result


def model_of(pl_module: pl.LightningModule) -> nn.Module:
    """What to compress: the module's transformers model (attribute ``model``), else the module itself."""
    inner: Any = getattr(pl_module, "model", None)
    return inner if hasattr(inner, "save_pretrained") else pl_module


def _measure(trainer: pl.Trainer, model: nn.Module) -> tuple[float | None, float]:
    """Perplexity on the datamodule's test blocks, where it has any, and the seconds it took."""
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "evaluation") or not datamodule.has("test"):
        return None, 0.0
    started = time.perf_counter()
    value = perplexity(
        model, datamodule.evaluation("test"), batch_size=datamodule.batch_size, device=trainer.strategy.root_device
    )
    return value, time.perf_counter() - started


def _describe_storage(record: dict[str, Any], pl_module: pl.LightningModule) -> None:
    """Count bytes as they are stored: weights that are bfloat16 on disk may be float32 while they are trained."""
    dtype = getattr(pl_module, "storage_dtype", None)
    if dtype is not None:
        parameters = record["parameters"]
        record["bytes"] = {
            "dense": parameters["model_dense"] * dtype.itemsize,
            "compressed": count_parameters(model_of(pl_module)) * dtype.itemsize,
        }
