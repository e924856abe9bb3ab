"""The settings of a run that its memory follows from, read from its trainer, module and data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lowrank_lit._footprints import ModelSize, Recovery, RunShape
from lowrank_lit.callbacks._shared import find_callback
from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.reallocation import RankReallocation
from lowrank_lit.callbacks.recovery import FactorTuning, RankPreservingLoRA
from lowrank_lit.callbacks.refinement import Refinement
from lowrank_lit.estimate import measure
from lowrank_lit.module import LowRankModule
from lowrank_lit.quantize import WHICH
from lowrank_lit.recovery import DEFAULT_RANK
from lowrank_lit.settings import Settings

_TWO_SIDED = ("two_sided", "fisher_two_sided")  # their spectra hold the inner vectors too


def settings_of_run(trainer: pl.Trainer) -> Settings | None:
    """Settings of the compression with what its preset stands for filled in, ``None`` without one."""
    found = find_callback(trainer, LowRankCompression)
    return None if found is None else Settings(**found.settings())


def measure_config(config: Any, targets: Any = None) -> ModelSize:
    """Shapes of the language model that a configuration of transformers describes; no weight is made.

    Raises:
        ModelError: If a pattern of ``targets`` matches nothing or there is no target.
    """
    from transformers import AutoModelForCausalLM

    with isolate_rng(), torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return measure(model, targets)


def run_shape(
    trainer: pl.Trainer, module: pl.LightningModule, data: Any, *, weights: torch.dtype, stored: torch.dtype
) -> RunShape:
    """What the callbacks, the module and the data of a run say.

    Args:
        trainer: Its callbacks are asked, and whether it trains.
        module: A LowRankModule, or another, whose optimizer and loss are then not known.
        data: A TextDataModule, or anything else; then the first calibration batch of the callbacks gives the shape, and
            the batches of the training are not known.
        weights: Dtype of the weights in memory.
        stored: In the exported files.
    """
    settings = settings_of_run(trainer)
    batches, tokens, known = _batches(trainer, data)
    refinement, reallocation = find_callback(trainer, Refinement), find_callback(trainer, RankReallocation)
    shape = RunShape(
        keep_ratio=1.0 if settings is None else settings.keep_ratio,
        weight_bytes=weights.itemsize,
        storage_bytes=stored.itemsize,
        batch_size=batches[0],
        block_size=batches[1],
        calibration_tokens=tokens,
        recovery=_recovery(trainer, module, batches) if trainer.max_steps != 0 else None,
        compressed=settings is not None,
        refined=refinement is not None and bool(refinement.settings["epochs"]),
        reallocated=None if reallocation is None else reallocation.keep_ratio,
        training_batches=known,
    )
    if settings is None:
        return shape
    return replace(
        shape,
        moments=settings.moments,
        components=str(settings.metric) in _TWO_SIDED,
        measured=bool(settings.select),
        rounds=int(settings.rounds or 1),
        refitted=settings.feedback == "anchored",
    )


def _recovery(trainer: pl.Trainer, module: pl.LightningModule, batches: tuple[int, int]) -> Recovery:
    adapters, tuning = find_callback(trainer, RankPreservingLoRA), find_callback(trainer, FactorTuning)
    refinement = find_callback(trainer, Refinement)
    found = Recovery("all", keeps_best=refinement is not None)
    if adapters is not None:
        quantized = () if adapters.quantize is None else WHICH[adapters.quantize_factors]
        found = replace(found, trained="adapters", adapter_rank=_adapter_rank(adapters.settings), quantized=quantized)
    elif tuning is not None or refinement is not None:
        sides = WHICH["both" if tuning is None else tuning.factors]
        found = replace(found, trained="factors", sides=sides)
    if not isinstance(module, LowRankModule):
        return found
    cached = module.teacher_cache is not None
    steps = max(0, trainer.max_steps) * trainer.accumulate_grad_batches
    return replace(
        found,
        optimizer=module.optimizer_name,
        checkpointing=module.gradient_checkpointing,
        teacher="" if not module.kd_weight else "cached" if cached else "memory",
        mixed=0 < module.kd_weight < 1,
        top_k=module.teacher_top_k,
        cached_tokens=steps * batches[0] * batches[1],
    )


def _adapter_rank(settings: dict[str, Any]) -> int:
    config = settings.get("config")
    asked = settings.get("rank") if config is None else config.get("init_args", {}).get("r")
    return int(asked or DEFAULT_RANK)


def _batches(trainer: pl.Trainer, data: Any) -> tuple[tuple[int, int], int, bool]:
    """Sequences and tokens of a batch, tokens of the calibration, and whether the training's batches are the same."""
    if hasattr(data, "batch_size") and hasattr(data, "block_size"):
        tokens = getattr(data, "calibration_blocks", 0) * data.block_size
        return (data.batch_size, data.block_size), tokens, True
    for kind in (LowRankCompression, RankReallocation, Refinement):
        given: Any = getattr(find_callback(trainer, kind), "batches", None)
        if given:
            ids = [batch["input_ids"] if isinstance(batch, dict) else batch for batch in given]
            return (ids[0].shape[0], ids[0].shape[-1]), sum(entry.numel() for entry in ids), False
    return (0, 0), 0, False
