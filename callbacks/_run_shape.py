"""What the memory of a run follows from: the shapes of its model, and the settings of its trainer, module and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lowrank_lit._footprints import (
    ModelSize,
    Recovery,
    RunShape,
    activation_bytes,
    factor_parameters,
    optimizer_bytes,
    trained_parameters,
    with_experts,
)
from lowrank_lit._tables import gibibytes
from lowrank_lit.callbacks._shared import callbacks_of, find_callback
from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.reallocation import RankReallocation
from lowrank_lit.callbacks.recovery import FactorTuning, RankPreservingLoRA
from lowrank_lit.callbacks.refinement import Refinement
from lowrank_lit.estimate import estimate, totals
from lowrank_lit.experts import ExpertsApart, sides_of
from lowrank_lit.module import LowRankModule
from lowrank_lit.quantize import WHICH
from lowrank_lit.reallocation import scheduled_ratio
from lowrank_lit.recovery import DEFAULT_RANK
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.settings import Settings
from lowrank_lit.surgery import count_parameters, find_targets

_TWO_SIDED = ("two_sided", "fisher_two_sided")  # their spectra hold the inner vectors too


def settings_of_run(trainer: pl.Trainer) -> Settings | None:
    """Settings of the compression with what its preset stands for filled in, ``None`` without one."""
    found = find_callback(trainer, LowRankCompression)
    return None if found is None else Settings(**found.settings())


def measure_config(config: Any, targets: Any = None) -> ModelSize:
    """Shapes of the language model that a configuration of transformers describes; no weight is made.

    Args:
        config: Of a causal language model.
        targets: Shell patterns of layer names.

    Raises:
        ModelError: If a pattern of ``targets`` matches nothing or there is no target.
    """
    from transformers import AutoModelForCausalLM

    with isolate_rng(), torch.device("meta"):
        # Experts multiply in groups, which runs without weights in bfloat16 alone; no count depends on the dtype.
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return measure(model, targets)


def measure(model: nn.Module, patterns: Sequence[str] | None = None) -> ModelSize:
    """Shapes of a model, which may be on the meta device.

    Args:
        model: A causal language model of transformers.
        patterns: Names of the target layers, as for a compression.

    Raises:
        ModelError: If a pattern matches nothing or there is no target.
    """
    with ExpertsApart(model):
        every = find_targets(model, patterns)
        of_experts = sides_of(model, {name: target.module for name, target in every.items()})
    targets = {name: target for name, target in every.items() if name not in of_experts}
    matrices = {name: (target.rows, target.columns) for name, target in targets.items()}
    found = _input_owners(model, {name: target.module for name, target in targets.items()})
    owners = {name: name for name in matrices} if found is None else found
    inputs = {owners[name]: columns for name, (_, columns) in matrices.items()}
    moments: dict[str, int] = {}
    for name, owner in owners.items():  # in the order of the calls, as calibration goes
        rows, columns = matrices[name]
        # A sum over inputs serves all that are fed them, one over outputs its own matrix alone.
        if owner not in moments:
            moments[owner if columns <= rows else f"{name}, outputs"] = min(rows, columns)
    blocks = [count_parameters(block) for _, block in find_repeating_blocks(model)]
    config = getattr(model, "config", None)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    width = int(getattr(config, "hidden_size", 0) or 0) // max(1, heads)
    size = ModelSize(
        parameters=count_parameters(model),
        matrices=tuple(matrices.values()),
        moments=tuple(moments.values()),
        inputs=tuple(inputs.values()),
        block=max(blocks, default=count_parameters(model)),
        blocks=max(1, len(blocks)),
        hidden=int(getattr(config, "hidden_size", 0) or max(target.columns for target in every.values())),
        vocabulary=int(getattr(config, "vocab_size", 0)),
        shared=found is not None,
        experts=find_experts(model),
        active=int(getattr(config, "num_experts_per_tok", 0) or 0),
        lookup=_lookup(model),
        attention=heads * int(getattr(config, "head_dim", 0) or width),
    )
    return with_experts(size, [(every[name].rows, every[name].columns) for name in of_experts])


def find_experts(model: nn.Module) -> tuple[tuple[int, int, int], ...]:
    """``(count, rows, columns)`` of every parameter that holds the matrices of several experts: those of three
    dimensions in the repeating blocks, kernels of convolutions left out."""
    blocks = [block for _, block in find_repeating_blocks(model)]
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    own = {
        id(parameter): (int(parameter.shape[0]), int(parameter.shape[1]), int(parameter.shape[2]))
        for block in blocks
        for module in block.modules()
        if not isinstance(module, convolutions)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3
    }
    return tuple(own.values())


def _lookup(model: nn.Module) -> int:
    """Numbers of the input embedding, 0 where the output embedding is the same."""
    try:
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        output = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return 0
    return 0 if getattr(output, "weight", None) is table else int(table.numel())


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
        training_steps=_steps(trainer),
        checkpoints=_checkpoints(trainer),
        reported=any(getattr(callback, "evaluates_recovered", False) for callback in callbacks_of(trainer)),
        epochs=1 if refinement is None else int(refinement.settings["epochs"]),
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
        streamed=getattr(find_callback(trainer, LowRankCompression), "workspace", None) is not None,
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
    return replace(
        found,
        optimizer=module.optimizer_name,
        checkpointing=module.gradient_checkpointing,
        teacher="" if not module.kd_weight else "cached" if cached else "memory",
        mixed=0 < module.kd_weight < 1,
        top_k=module.teacher_top_k,
        cached_tokens=_steps(trainer) * batches[0] * batches[1],
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


def _steps(trainer: pl.Trainer) -> int:
    """Batches that one process trains on, 0 where their number is not set."""
    return max(0, trainer.max_steps) * trainer.accumulate_grad_batches


def _checkpoints(trainer: pl.Trainer) -> int:
    """Checkpoints that are kept: the best or newest of each ModelCheckpoint, and its copy of the last."""
    kept = 0
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            every = callback._every_n_train_steps
            all_of_them = max(1, trainer.max_steps // every) if every and trainer.max_steps > 0 else 1
            kept += all_of_them if callback.save_top_k == -1 else callback.save_top_k
            kept += callback.save_last is True  # a link takes no space
    return kept


def remarks(trainer: pl.Trainer, size: ModelSize, run: RunShape) -> list[str]:
    """What the figures of a run do not say by themselves, a line each: the schedule of a re-allocation, where a paged
    optimizer keeps its state, and what would help where activations take most of the recovery's memory.
    """
    return [*_schedule(trainer, size, run), *_pages(size, run), *_hint(size, run)]


def _schedule(trainer: pl.Trainer, size: ModelSize, run: RunShape) -> list[str]:
    own = find_callback(trainer, RankReallocation)
    if own is None:
        return []
    end = own.end if own.end is not None else int(0.6 * trainer.max_steps) if trainer.max_steps > 0 else None
    start = f"{run.keep_ratio:g} (what the compression keeps, at most)" if run.compressed else "1 (whole matrices)"
    factors = sum(factor_parameters(size, run).values())
    line = f"Re-allocation: the budget falls from {start} of the target parameters to {own.keep_ratio:g}"
    line += f", {own.schedule}, from step {own.begin} to {'60 % of the run' if end is None else end}"
    line += f", every {own.every} steps"
    if end is not None and end > own.begin:
        span = {"begin": own.begin, "end": end, "last": own.keep_ratio, "schedule": own.schedule}
        places = [own.begin + (end - own.begin) * part // 4 for part in range(1, 4)]
        ratios = [(step, scheduled_ratio(step, first=run.keep_ratio, **span)) for step in places]  # type: ignore[arg-type]
        line += f" ({', '.join(f'{ratio:.3f} at {step}' for step, ratio in ratios)})"
    return [f"{line}; until the fit ends all {factors:,} numbers of the factors stay in memory, masked"]


def _pages(size: ModelSize, run: RunShape) -> list[str]:
    if run.recovery is None or not run.recovery.optimizer.startswith("paged"):
        return []
    trained, width = trained_parameters(size, run)
    state = gibibytes(optimizer_bytes(run.recovery.optimizer, trained, width))
    return [
        f"{run.recovery.optimizer}: its state ({state}) is in memory that the driver moves: on the GPU where there is "
        "room, on the host where there is not. It is counted on the host, and PyTorch's own peak has it nowhere. "
        "bitsandbytes pages tensors of 100,000 numbers and more; smaller ones stay on the GPU"
    ]


def _hint(size: ModelSize, run: RunShape) -> list[str]:
    recovery = run.recovery
    if recovery is None or recovery.checkpointing or not run.training_tokens:
        return []
    whole, kept = totals(estimate(size, run)).get(("recover", "device"), 0), activation_bytes(size, run)
    less = activation_bytes(size, replace(run, recovery=replace(recovery, checkpointing=True)))
    if 2 * kept < whole:
        return []
    return [
        f"Hint: activations are {100 * kept // whole} % of the recovery's memory; --model.gradient_checkpointing=true "
        f"makes their {gibibytes(kept)} {gibibytes(less)}, at the price of one more forward pass"
    ]


def _input_owners(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str] | None:
    """First layer fed the same tensor, for every layer, in the order of the calls; ``None`` where eight tokens do not
    run through the model where it is.
    """
    owners: dict[str, str] = {}
    seen: list[tuple[Tensor, str]] = []

    def hook(name: str) -> object:
        def enter(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            owners[name] = next((owners[other] for tensor, other in reversed(seen) if tensor is args[0]), name)
            seen.append((args[0], name))

        return enter

    place = next(model.parameters()).device
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=place))
    except (RuntimeError, ValueError, TypeError):  # an operation that needs values, or other inputs
        return None
    finally:
        for handle in handles:
            handle.remove()
    return owners
