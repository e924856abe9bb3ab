"""Export of the model when a fit ends."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lowrank_lit import distributed
from lowrank_lit.callbacks._shared import find_callback
from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.errors import ExportError, ModelError
from lowrank_lit.hub import LowRankConfig, export, refuse_foreign
from lowrank_lit.memory import stage as memory_stage
from lowrank_lit.module import model_of
from lowrank_lit.plain import save_module
from lowrank_lit.plan import RankPlan
from lowrank_lit.strategies import LowRankDeepSpeed


class ExportOnFitEnd(pl.Callback):
    """Write the model as a Hugging Face folder, which ``from_pretrained`` loads after ``import lowrank_lit``; a module
    without a transformers model in ``model`` as one that :func:`lowrank_lit.load_module` loads.

    The weights in memory are rounded to the type that they are stored in, so that what is measured after the fit is
    what the folder holds; gradients of the last step are dropped. An earlier export of the same run (same dense
    weights, calibration text and settings) is replaced; a folder with anything else in it is refused before the run
    begins.

    Args:
        dirpath: Folder to write; by default ``model`` in the trainer's root folder.
        dtype: Type of the stored weights: ``auto`` is that of the dense checkpoint (of the weights in memory where
            there is none), else a name such as ``bfloat16``.

    List it after a callback that changes the model when the fit ends, such as RankPreservingLoRA.

    Raises:
        ExportError: Before the run computes anything, if the folder holds something else; at the end, if a weight is
            too large for the stored type or the folder cannot be written.
        ModelError: Before the run, if the strategy splits the weights over processes, or ``dtype`` is unknown; at the
            end, if adapters were left in the model.
        NonFiniteError: At the end, if a weight is NaN or infinite.
    """

    def __init__(self, dirpath: str | None = None, *, dtype: str = "auto") -> None:
        super().__init__()
        known = getattr(torch, dtype, None)
        if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
            raise ModelError(f"dtype='{dtype}' is unknown; choose auto, float32, bfloat16 or float16")
        self.dirpath = dirpath
        self.dtype = dtype

    def folder(self, trainer: pl.Trainer) -> Path:
        """Where the export goes."""
        return Path(trainer.default_root_dir) / "model" if self.dirpath is None else Path(self.dirpath)

    def check(self, trainer: pl.Trainer, fingerprint: str) -> None:
        """Refuse what could not be exported: another run's folder, weights in pieces."""
        refuse_sharded(trainer, "ExportOnFitEnd", at_end=True)
        refuse_foreign(self.folder(trainer), fingerprint)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out now what would fail at the end of the fit."""
        if stage != "fit":
            return
        pl_module.configure_model()
        # A compression asks for the check itself, once it knows the fingerprint.
        if find_callback(trainer, LowRankCompression) is None:
            self.check(trainer, own_fingerprint(pl_module))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Round the weights to the stored type and write the folder."""
        model: Any = model_of(pl_module)
        _refuse_adapters(model)
        pl_module.zero_grad()  # as much memory as what has trained, and the next fit would begin with this
        stored = self._stored_dtype(pl_module)
        if stored is not None:
            round_weights(model, stored)
        with distributed.cooperating("the export"):  # an error of the process that writes is raised in all
            if trainer.is_global_zero:
                self._write(trainer, pl_module, stored)

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stored: torch.dtype | None) -> None:
        model: Any = model_of(pl_module)
        compression = find_callback(trainer, LowRankCompression)
        result = None if compression is None else compression.result
        plan = plan_of(pl_module, model) if result is None else result.plan
        fingerprint = own_fingerprint(pl_module) if result is None else None
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        with memory_stage("export"):
            if hasattr(model, "save_pretrained"):
                export(model, plan, self.folder(trainer), dtype=stored, tokenizer=tokenizer, fingerprint=fingerprint)
            else:
                save_module(model, plan, self.folder(trainer), dtype=stored, fingerprint=fingerprint)

    def _stored_dtype(self, pl_module: pl.LightningModule) -> torch.dtype | None:
        chosen = getattr(pl_module, "storage_dtype", None) if self.dtype == "auto" else getattr(torch, self.dtype)
        return chosen if isinstance(chosen, torch.dtype) else None


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every floating-point weight to values that ``dtype`` holds; the weights keep their own type.

    Weights are what a state dict lists: parameters and persistent buffers. What a model computes from its config, such
    as rotary frequencies, is not stored and stays as it is.

    Raises:
        ExportError: If a weight is too large for ``dtype``; the weights before it are rounded by then.
    """
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point() and weight.dtype != dtype:  # writing to a mapped one would copy it
                rounded = weight.to(dtype).to(weight.dtype)
                if bool(torch.isinf(rounded).any()) and not bool(torch.isinf(weight).any()):
                    raise ExportError(f"'{name}' has values beyond {dtype}; choose a wider ExportOnFitEnd.dtype")
                weight.copy_(rounded)


def refuse_sharded(trainer: pl.Trainer, name: str, *, at_end: bool = False) -> None:
    """Refuse a strategy that gives every process a piece of the weights.

    Args:
        trainer: Of the fit.
        name: Of the callback that needs them whole.
        at_end: Whether it needs them not before ``on_fit_end``, when those of
            :class:`lowrank_lit.strategies.LowRankDeepSpeed` are whole again in every stage.

    Raises:
        ModelError: Under FSDP, tensor parallelism or DeepSpeed's ZeRO stage 3; names the callback.
    """
    strategy = trainer.strategy
    stage_3 = getattr(strategy, "zero_stage_3", False)
    if isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)) or (
        stage_3 and not (at_end and isinstance(strategy, LowRankDeepSpeed))
    ):
        remedy = "lowrank_lit.strategies.LowRankDeepSpeed" if at_end else "DeepSpeed ZeRO stage 1 or 2"
        raise ModelError(
            f"strategy {type(strategy).__name__} splits the weights over processes, and {name} needs them whole; "
            f"use DDP or {remedy}"
        )


def _refuse_adapters(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ModelError(
                f"'{name}' still has an adapter when ExportOnFitEnd writes the model; "
                "list RankPreservingLoRA before ExportOnFitEnd, or merge adapters of your own first"
            )


def plan_of(pl_module: pl.LightningModule, model: Any) -> RankPlan | None:
    """The plan of a model that was loaded factored, from a checkpoint or an export; None for a dense one."""
    loaded = getattr(pl_module, "plan", None)
    if isinstance(loaded, RankPlan):
        return loaded
    stored = getattr(getattr(model, "config", None), "quantization_config", None)
    return stored.rank_plan() if isinstance(stored, LowRankConfig) else None


def own_fingerprint(pl_module: pl.LightningModule) -> str:
    """Identity of a run that compresses nothing: what the module was made from.

    Not the plan's own, even where the model was loaded factored: the run must not replace the folder it came from.
    """
    source = getattr(pl_module, "source", type(pl_module).__qualname__)
    return hashlib.sha256(f"dense {source}".encode()).hexdigest()[:32]
