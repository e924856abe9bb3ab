"""Export of the model when a fit ends."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.errors import ExportError, ModelError
from lowrank_lit.hub import export, refuse_foreign
from lowrank_lit.module import model_of


class ExportOnFitEnd(pl.Callback):
    """Write the model as a Hugging Face folder, which ``from_pretrained`` loads after ``import lowrank_lit``.

    The weights in memory are rounded to the type that they are stored in, so that what is measured after the fit is
    what the folder holds. An earlier export of the same run (same dense weights, calibration text and settings) is
    replaced; a folder with anything else in it is refused before the run begins.

    Args:
        dirpath: Folder to write; by default ``model`` in the trainer's root folder.
        dtype: Type of the stored weights: ``auto`` is that of the dense checkpoint (of the weights in memory where
            there is none), else a name such as ``bfloat16``.

    Raises:
        ExportError: At setup, if the folder holds something else.
        ModelError: At setup, if the module has no transformers model, or ``dtype`` is unknown.
    """

    def __init__(self, dirpath: str | None = None, *, dtype: str = "auto") -> None:
        super().__init__()
        if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ModelError(f"dtype='{dtype}' is unknown; choose auto, float32, bfloat16 or float16")
        self.dirpath = dirpath
        self.dtype = dtype

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the export goes."""
        return Path(trainer.default_root_dir) / "model" if self.dirpath is None else Path(self.dirpath)

    def check(self, trainer: pl.Trainer, fingerprint: str) -> None:
        """Refuse a folder that holds anything but an earlier export of the same fingerprint."""
        refuse_foreign(self.folder(trainer), fingerprint)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out now what would fail at the end of the fit."""
        if stage != "fit":
            return
        pl_module.configure_model()
        if not hasattr(model_of(pl_module), "save_pretrained"):
            raise ModelError(
                f"{type(pl_module).__name__}.model is no transformers model, so there is no format to export it in; "
                "leave ExportOnFitEnd out and save the module's state_dict"
            )
        if _compression(trainer) is None:  # which asks for the check itself, once it knows the fingerprint
            self.check(trainer, _dense_fingerprint(pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Round the weights to the stored type and write the folder."""
        model: Any = model_of(pl_module)
        stored = self._stored_dtype(pl_module)
        if stored is not None:
            round_weights(model, stored)
        if trainer.is_global_zero:
            compression = _compression(trainer)
            plan = compression.result.plan if compression is not None and compression.result is not None else None
            fingerprint = _dense_fingerprint(pl_module) if plan is None else None
            tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
            export(model, plan, self.folder(trainer), dtype=stored, tokenizer=tokenizer, fingerprint=fingerprint)

    def _stored_dtype(self, pl_module: pl.LightningModule) -> torch.dtype | None:
        chosen = getattr(pl_module, "storage_dtype", None) if self.dtype == "auto" else getattr(torch, self.dtype)
        return chosen if isinstance(chosen, torch.dtype) else None


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every floating-point parameter to values that ``dtype`` holds; the parameters keep their own type.

    Raises:
        ExportError: If a weight is too large for ``dtype``.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                rounded = parameter.to(dtype).to(parameter.dtype)
                if bool(torch.isinf(rounded).any()) and not bool(torch.isinf(parameter).any()):
                    raise ExportError(f"'{name}' has values beyond {dtype}; choose a wider ExportOnFitEnd.dtype")
                parameter.copy_(rounded)


def _compression(trainer: pl.Trainer) -> LowRankCompression | None:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, LowRankCompression)), None)


def _dense_fingerprint(pl_module: pl.LightningModule) -> str:
    """Identity of a run that compresses nothing: what the module was made from."""
    source = getattr(pl_module, "source", type(pl_module).__qualname__)
    return hashlib.sha256(f"dense {source}".encode()).hexdigest()[:32]
