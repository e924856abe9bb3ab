"""Refinement of a compressed model towards the dense one, with its ranks kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_lit.batches import as_batches
from lowrank_lit.callbacks._shared import calibration_text
from lowrank_lit.callbacks.export import refuse_sharded
from lowrank_lit.compress import batches_hash, loaded_hash
from lowrank_lit.errors import DataError, ModelError
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.memory import stage as memory_stage
from lowrank_lit.module import LowRankModule, model_of
from lowrank_lit.refinement import (
    HELD_OUT,
    BlockRefinement,
    factor_parameters,
    load_refinement,
    refine_blocks,
    save_refinement,
)


class Refinement(pl.Callback):
    """Train the factors of a compressed model towards the dense one, and end with the best state seen.

    List it after the callback that compresses the model. First, before the optimizers are made, the factors of one
    block at a time are trained to give the dense block's output on the calibration text
    (:func:`lowrank_lit.refinement.refine_blocks`); the result is kept below the trainer's root folder (``refined/``),
    and a later run of the same takes it from there. Then the fit trains the factors, and nothing else, by the module's
    own loss: ``LowRankModule(loss="kd")`` goes on towards the dense model, ``loss="ce"`` towards the text.

    After each validation the trained parameters are kept if ``monitor`` has fallen to a new minimum; the fit ends with
    the ones kept last. With ``Trainer(num_sanity_val_steps=-1)`` the state before the first step takes part.
    Lightning's ``EarlyStopping`` on the same metric stops a fit that no longer gains; gradient accumulation and
    clipping are the trainer's, gradient checkpointing the module's.

    Args:
        block_epochs: Passes over the calibration text for each block; 0 leaves the first stage out.
        block_learning_rate: Peak, of its AdamW.
        held_out: Share of the calibration batches that decide which state of a block is kept.
        monitor: Metric to keep the best state by, of the validation.
        batches: Calibration batches as :func:`lowrank_lit.compress` takes them; by default the datamodule's
            ``calibration_batches()``.
        teacher: The dense model; by default the one that a ``LowRankModule`` names.

    Attributes:
        blocks: What the first stage did, ``None`` before it or where it was left out.
        record: The least value of ``monitor``, ``None`` before a validation, and the step that it was reached at.

    Raises:
        ModelError: At setup, if the model has no factored layer, or there is no teacher.
        DataError: If there is no calibration text or, at the start of the training, no validation text.

    Example:
        >>> module = LowRankModule("FOLDER", loss="kd", learning_rate=1e-3)  # doctest: +SKIP
        >>> callbacks = [LowRankCompression(keep_ratio=0.6), Refinement()]  # doctest: +SKIP
        >>> pl.Trainer(callbacks=callbacks, max_epochs=4).fit(module, datamodule)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        block_epochs: int = 2,
        block_learning_rate: float = 1e-3,
        held_out: float = HELD_OUT,
        monitor: str = "val_loss",
        batches: Sequence[Any] | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "epochs": block_epochs,
            "learning_rate": block_learning_rate,
            "held_out": held_out,
        }
        self.monitor = monitor
        self.batches = batches
        self.teacher = teacher
        self.blocks: BlockRefinement | None = None
        self.record: dict[str, Any] = {"best": None, "step": None}
        self._best: dict[str, Tensor] = {}
        self._since = 0
        self._model: nn.Module | None = None
        self._flags: list[tuple[nn.Parameter, bool]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refine block by block, unless this callback has done so already, and leave only the factors trainable."""
        if stage != "fit":
            return
        pl_module.configure_model()  # idempotent; Lightning calls it after this hook
        model = model_of(pl_module)
        if self._model is not model:
            _check(trainer, model)
            if self.settings["epochs"]:
                with isolate_rng():  # what follows is the same whether this is computed or taken from disk
                    self.blocks = self._refine(trainer, pl_module, model)
            self._model = model
        self.forget(0)
        chosen = set(map(id, _adapter_parameters(model) or factor_parameters(model)))
        self._flags = [(parameter, parameter.requires_grad) for parameter in pl_module.parameters()]
        for parameter, _ in self._flags:
            parameter.requires_grad_(id(parameter) in chosen)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a fit that nothing would be chosen by."""
        if not sum(trainer.num_val_batches):
            raise DataError(
                f"Refinement keeps the state with the least '{self.monitor}', and the validation set is empty; give "
                "data.sources.validation, and leave trainer.limit_val_batches out"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep a state that is better than all before it."""
        if trainer.sanity_checking and trainer.num_sanity_val_batches != trainer.num_val_batches:
            return  # a part of the text says nothing about the whole
        value = self._monitored(trainer)
        if value < (math.inf if self.record["best"] is None else self.record["best"]):
            self.record = {"best": value, "step": trainer.global_step}
            self._best = {name: parameter.detach().cpu().clone() for name, parameter in _trained(pl_module)}

    def forget(self, step: int) -> None:
        """Choose among the states from ``step`` on: those before it were of another model."""
        self._best, self.record, self._since = {}, {"best": None, "step": None}, step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to the best state, while the model is still on its device."""
        if not self._best:
            rank_zero_warn(
                f"Refinement has chosen no state, for there was no validation in {trainer.global_step - self._since} "
                "steps: the last state stays; lower trainer.val_check_interval"
            )
            return
        with torch.no_grad():
            for name, parameter in _trained(pl_module):
                parameter.copy_(self._best[name])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the parameters their own ``requires_grad`` flags back."""
        self._release()
        self._best = {}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the parameters their own ``requires_grad`` flags back; the weights stay as they are."""
        self._release()

    def _release(self) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self._flags = []

    def state_dict(self) -> dict[str, Any]:
        """Keys ``record`` and ``best``: the best state so far, parameters by name."""
        return {"record": self.record, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the best state of a checkpoint."""
        self.record, self._best = state_dict["record"], state_dict["best"]

    def _monitored(self, trainer: pl.Trainer) -> float:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise DataError(f"Refinement: the validation logs no '{self.monitor}' (metrics: {known}); set monitor")
        # The processes have to choose the same state, though a module may log what it has seen in each.
        own = value.detach().clone().to(trainer.strategy.root_device)
        return float(trainer.strategy.reduce(own, reduce_op="mean"))

    def _refine(self, trainer: pl.Trainer, pl_module: pl.LightningModule, model: nn.Module) -> BlockRefinement:
        batches = as_batches(calibration_text(trainer, "Refinement", self.batches))
        teacher = self._teacher(pl_module)
        folder = Path(trainer.default_root_dir) / "refined"
        identity = f"{loaded_hash(model)} {loaded_hash(teacher)} {batches_hash(batches)} {self.settings}"
        kept = load_refinement(folder, model, identity)
        if kept is not None:
            trainer.print(f"Refined factors taken from {folder} (same model, calibration text and settings)")
            return kept
        with memory_stage("refine"):
            result = refine_blocks(model, teacher, batches, device=trainer.strategy.root_device, **self.settings)
        if trainer.is_global_zero:
            save_refinement(folder, model, identity, result)
        return result

    def _teacher(self, pl_module: pl.LightningModule) -> nn.Module:
        if self.teacher is not None:
            return self.teacher
        if isinstance(pl_module, LowRankModule):
            return pl_module.load_teacher()
        raise ModelError(f"{type(pl_module).__name__} names no dense model: pass Refinement(teacher=...)")


def _check(trainer: pl.Trainer, model: nn.Module) -> None:
    """Refuse what would fail only after the training."""
    refuse_sharded(trainer, "Refinement")
    if not any(isinstance(module, FactoredLayer) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} has no factored layer when Refinement is set up; "
            "list LowRankCompression before Refinement"
        )
    if _adapter_parameters(model):
        raise ModelError("the factors have adapters when Refinement is set up; list it before RankPreservingLoRA")


def _adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Of adapters on factors: a fit that an exception has ended leaves them there, for the next one to train on."""
    layers = [module for module in model.modules() if isinstance(module, FactoredLayer)]
    adapted = [child for layer in layers for child in layer.children() if hasattr(child, "base_layer")]
    found = [entry for child in adapted for entry in child.named_parameters() if not entry[0].startswith("base_layer.")]
    return [parameter for _, parameter in found if parameter.requires_grad]


def _trained(pl_module: pl.LightningModule) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in pl_module.named_parameters() if parameter.requires_grad]
