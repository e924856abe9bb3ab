"""What a run will need, from shapes alone: parameters, memory of each stage, disk. No weight and no text is read.

Every formula is a function of :mod:`lowrank_lit._footprints` and every number says what it counts. Bytes are of
tensors: Python, libraries, the CUDA context, fragmentation and matrix-multiplication workspaces come on top (about 1 to
2 GiB).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_lit._footprints import (
    ModelSize,
    Recovery,
    RunShape,
    activation_bytes,
    backward_bytes,
    block_width,
    dequantized_bytes,
    factor_parameters,
    kept_parameters,
    logit_bytes,
    loss_bytes,
    optimizer_bytes,
    refining_bytes,
    statistics_bytes,
    trained_parameters,
    training_weight_bytes,
    vector_bytes,
    workspace_bytes,
)
from lowrank_lit.refit import HELD_OUT
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.surgery import count_parameters, find_targets

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")
STAGES = ("calibrate", "feedback", "factor", "reallocate", "refine", "recover", "evaluate", "export")
COMPRESSION = "compress"
"""What the first three are measured as, together."""
_STATISTICS = "statistics of all target matrices, float64"
_DENSE = "weights of the dense model"
_TRAINED = {"factors": "factors that train", "all": "the whole model"}


@dataclass(frozen=True)
class Item:
    """One thing that takes space.

    Attributes:
        stage: One of ``STAGES``.
        place: ``device`` (where the model runs), ``host`` (the machine's memory) or ``disk``.
        what: What is counted.
        bytes: How much.
        copy: Whether it is on the host as well, so that it takes no more where the device is the host.
    """

    stage: str
    place: Place
    what: str
    bytes: int
    copy: bool = False


def measure(model: nn.Module, patterns: Sequence[str] | None = None) -> ModelSize:
    """Shapes of a model, which may be on the meta device.

    Args:
        model: A causal language model of transformers.
        patterns: Names of the target layers, as for a compression.

    Raises:
        ModelError: If a pattern matches nothing or there is no target.
    """
    targets = find_targets(model, patterns)
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
    return ModelSize(
        parameters=count_parameters(model),
        matrices=tuple(matrices.values()),
        moments=tuple(moments.values()),
        inputs=tuple(inputs.values()),
        block=max(blocks, default=count_parameters(model)),
        blocks=max(1, len(blocks)),
        hidden=int(getattr(config, "hidden_size", 0) or max(columns for _, columns in matrices.values())),
        vocabulary=int(getattr(config, "vocab_size", 0)),
        shared=found is not None,
    )


def estimate(size: ModelSize, run: RunShape) -> list[Item]:
    """Everything that takes space, stage by stage.

    The items of a stage that are in one place are there at the same time. Where the device is the CPU, device and host
    are one, see :func:`on_host`.
    """
    dense = size.parameters * run.weight_bytes
    final = kept_parameters(size, run.final_ratio)
    export = final * (run.weight_bytes + run.storage_bytes)
    teacher = dense if run.recovery and run.recovery.teacher else 0  # stays to the end
    return [
        *(_compression(size, run) if run.compressed else []),
        *(_reallocation(size, run) if run.reallocated is not None else []),
        *(_refinement(size, run) if run.refined else []),
        *(_recovery(size, run, run.recovery) if run.recovery else []),
        *_stage(
            "evaluate",
            ("device", f"{_DENSE} (the compressed one needs less)", dense),
            ("device", "weights of the teacher, after the training", teacher),
            ("device", "logits of one batch", logit_bytes(size, run, backward=False)),
            ("device", "logits and losses of one block, float32", run.block_size * size.vocabulary * 8),
        ),
        *_stage(
            "export",
            ("host", "weights of the compressed model, and their copy in the storage type", export),
            ("device", "weights of the teacher", teacher),
            ("disk", "compressed model", final * run.storage_bytes),
        ),
    ]


def on_host(items: Iterable[Item]) -> list[Item]:
    """The same where the device is the host: what is on both is there once."""
    return [replace(item, place="disk" if item.place == "disk" else "host") for item in items if not item.copy]


def _stage(stage: str, *rows: tuple[Place, str, int], copies: tuple[tuple[str, int], ...] = ()) -> list[Item]:
    """The items of one stage; what takes no space is none. ``copies`` are on the device what is on the host too."""
    items = [Item(stage, place, what, count) for place, what, count in rows if count]
    return items + [Item(stage, "device", what, count, copy=True) for what, count in copies if count]


def _compression(size: ModelSize, run: RunShape) -> list[Item]:
    vectors = vector_bytes(size, components=run.components)
    kept = kept_parameters(size, run.keep_ratio)
    factors = (kept - size.parameters + size.target_parameters) * run.weight_bytes
    return [
        *_calibration(size, run),
        *_feedback(size, run),
        *_stage(
            "factor",
            ("host", _DENSE, size.parameters * run.weight_bytes),
            ("host", "singular vectors of all target matrices, float32", vectors),
            ("host", "factors, until they replace the matrices", factors),
            ("host", _STATISTICS, statistics_bytes(size, run.moments)),
            ("device", "decomposition of the largest matrix, float64", workspace_bytes(size)),
            ("disk", "factors, kept for a later run", factors),
        ),
    ]


def _calibration(size: ModelSize, run: RunShape, stage: str = "calibrate") -> list[Item]:
    statistics = statistics_bytes(size, run.moments)
    weights = size.parameters * run.weight_bytes
    if run.backward:
        return _stage(
            stage,
            ("host", _STATISTICS, statistics),
            ("device", "weights of the whole model, for the backward pass", weights),
            ("device", "activations of one batch, for the backward pass", backward_bytes(size, run)),
            ("device", "logits of one batch, their log-softmax and gradient", logit_bytes(size, run, backward=True)),
            copies=((_STATISTICS, statistics),),
        )
    hidden = run.calibration_tokens * size.hidden * run.weight_bytes
    width = run.tokens * block_width(size) * run.weight_bytes
    return _stage(
        stage,
        ("host", _DENSE, weights),
        ("host", "hidden states of the calibration text", hidden),
        ("host", _STATISTICS, statistics),
        ("device", "activations of one batch in one block", width),
        copies=(
            ("weights of one block", size.block * run.weight_bytes),
            ("statistics of one block, float64", statistics // max(1, size.blocks)),
        ),
    )


def _feedback(size: ModelSize, run: RunShape) -> list[Item]:
    """What candidates, further rounds and refits keep on the host beside the dense model; the device has no more than
    in calibration."""
    if not (run.measured or run.rounds > 1 or run.refitted):
        return []
    rounds = 2 if run.rounds > 1 else 1  # the statistics and vectors of the round before stay until the choice
    held = HELD_OUT * run.calibration_tokens * size.vocabulary * 2
    hidden = 3 * run.calibration_tokens * size.hidden * run.weight_bytes
    vectors = vector_bytes(size, components=run.components)
    return _stage(
        "feedback",
        ("host", _DENSE, size.parameters * run.weight_bytes),
        ("host", "compressed target matrices, twice", 2 * size.target_parameters * run.weight_bytes),
        ("host", "statistics of the rounds, float64", rounds * statistics_bytes(size, run.moments)),
        ("host", "singular vectors of the rounds, float32", rounds * vectors),
        ("host", "predictions on held-out sequences, float16", int(held) if run.measured else 0),
        ("host", "hidden states of both models", hidden if run.refitted else 0),
    )


def _reallocation(size: ModelSize, run: RunShape) -> list[Item]:
    """Whole factors of every target are made from statistics of both sides, and take the places of the matrices when
    all of them are there."""
    both = replace(run, moments=frozenset({"input", "gradient"}))
    factors = sum(factor_parameters(size, run).values()) * run.weight_bytes
    return [
        *_calibration(size, both, "reallocate"),
        *_stage(
            "reallocate",
            ("host", "factors, until they replace the matrices", factors),
            ("disk", "factors, kept for a later run", factors),
        ),
    ]


def _refinement(size: ModelSize, run: RunShape) -> list[Item]:
    """Both models go through the text block by block; what one block holds is counted at its mean size."""
    factors = sum(factor_parameters(size, run).values())
    small = training_weight_bytes(size, replace(run, recovery=None))  # whatever becomes of them afterwards
    wide = max(4, run.weight_bytes)
    outside = size.parameters - size.block * size.blocks
    block = wide * (small // run.weight_bytes - outside) // size.blocks
    widened = "weights of one block, float32"
    return _stage(
        "refine",
        ("host", _DENSE, size.parameters * run.weight_bytes),
        ("host", "weights of the compressed model", small),
        ("host", "hidden states of both models", 3 * run.calibration_tokens * size.hidden * run.weight_bytes),
        ("device", widened, block if wide > run.weight_bytes else 0),
        ("device", "gradients, AdamW's moments and best state of a block's factors", 4 * wide * factors // size.blocks),
        ("device", "activations of one batch in one block", refining_bytes(size, run)),
        ("disk", "refined factors, kept for a later run", factors * run.weight_bytes),
        copies=((widened, 0 if wide > run.weight_bytes else block),),
    )


def _recovery(size: ModelSize, run: RunShape, recovery: Recovery) -> list[Item]:
    trained, width = trained_parameters(size, run)
    adapters = recovery.trained == "adapters"
    name = f"LoRA of rank {recovery.adapter_rank} on both factors, float32" if adapters else _TRAINED[recovery.trained]
    extra = trained * width if adapters else 0
    weights = training_weight_bytes(size, run)
    state = optimizer_bytes(recovery.optimizer, trained, width)
    paged = recovery.optimizer.startswith("paged")
    quantized = f", {' and '.join(recovery.quantized)} factors in NF4" if recovery.quantized else ""
    checkpointing = ", computed again block by block" if recovery.checkpointing else ""
    return _stage(
        "recover",
        (
            "device",
            f"weights of the compressed model{quantized}" if run.compressed else "weights of the model",
            weights,
        ),
        ("device", "one factor, dequantised", dequantized_bytes(size, run)),
        ("device", f"{name}: weights", extra),
        ("device", f"{name}: gradients", trained * width),
        (
            "host" if paged else "device",
            f"{name}: state of {recovery.optimizer}{', in pages that the driver moves' if paged else ''}",
            state,
        ),
        ("device", f"activations for the backward pass{checkpointing}", activation_bytes(size, run)),
        ("device", _logits(recovery), loss_bytes(size, run)),
        *_teacher(size, run, recovery),
        ("host", f"{name}: best state so far", trained * width if recovery.keeps_best else 0),
        ("disk", "one checkpoint: weights and optimizer", weights + extra + state),
    )


def _logits(recovery: Recovery) -> str:
    return f"logits of one batch{' and of the teacher' if recovery.teacher else ''}, their log-softmax and gradient"


def _teacher(size: ModelSize, run: RunShape, recovery: Recovery) -> list[tuple[Place, str, int]]:
    weights = size.parameters * run.weight_bytes
    if recovery.teacher != "cached":
        return [("device", "weights of the teacher", weights if recovery.teacher else 0)]
    per_token = 4 * size.vocabulary if recovery.top_k is None else 8 * recovery.top_k
    tokens = recovery.cached_tokens or run.block_size
    what = "at most" if recovery.cached_tokens else "of each sequence of the training text"
    return [
        ("device", "weights of the teacher, unless all its predictions are on disk", weights),
        ("disk", f"predictions of the teacher, {what}", tokens * per_token),
    ]


def totals(items: Iterable[Item]) -> dict[tuple[str, Place], int]:
    """Bytes by stage and place."""
    result: dict[tuple[str, Place], int] = {}
    for item in items:
        result[item.stage, item.place] = result.get((item.stage, item.place), 0) + item.bytes
    return result


def measured_peaks(items: Iterable[Item]) -> dict[tuple[str, Place], int]:
    """As :func:`totals`, with the largest of calibration, feedback and factoring as ``compress``."""
    result: dict[tuple[str, Place], int] = {}
    for (stage, place), count in totals(items).items():
        key = (COMPRESSION if stage in STAGES[:3] else stage, place)
        result[key] = max(result.get(key, 0), count)
    return result


def training_items(
    parameters: Iterable[Tensor], buffers: Iterable[Tensor], optimizers: Iterable[torch.optim.Optimizer]
) -> list[Item]:
    """What the training of any module takes, from the module itself: everything but what is kept for the backward pass.

    Args:
        parameters: Of the module, each once.
        buffers: Of the module.
        optimizers: Of them, those of Adam's kind are known to have two moments of each number; others count nothing.
    """
    own = list(parameters)
    weights = sum(tensor.nbytes for tensor in (*own, *buffers))
    groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
    moments = sum(
        2 * parameter.nbytes for optimizer, group in groups if _is_adam(optimizer) for parameter in group["params"]
    )
    return _stage(
        "recover",
        ("device", "weights", weights),
        ("device", "gradients", sum(parameter.nbytes for parameter in own if parameter.requires_grad)),
        ("device", "moments of Adam's kind", moments),
    )


def _is_adam(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam))


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
