"""What a run will need, from shapes alone: parameters, memory of each stage, disk. No weight and no text is read.

Every formula is a function of :mod:`lowrank_lit._footprints` and every number says what it counts. Bytes are of
tensors: Python, libraries, the CUDA context, fragmentation and matrix-multiplication workspaces come on top (about 1 to
2 GiB).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from lowrank_lit._footprints import (
    ModelSize,
    Recovery,
    RunShape,
    activation_bytes,
    adapter_parameters,
    backward_bytes,
    block_width,
    decomposition_flops,
    dequantized_bytes,
    factor_parameters,
    kept_parameters,
    logit_bytes,
    loss_bytes,
    of_one_token,
    optimizer_bytes,
    refining_bytes,
    statistics_bytes,
    statistics_flops,
    token_flops,
    trained_parameters,
    training_weight_bytes,
    vector_bytes,
    workspace_bytes,
)
from lowrank_lit.paging import BUDGET
from lowrank_lit.refit import HELD_OUT

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")
STAGES = (
    "calibrate",
    "feedback",
    "factor",
    "reallocate",
    "mask",
    "refine",
    "recover",
    "checkpoint",
    "evaluate",
    "report",
    "export",
)
COMPRESSED_STAGES = STAGES[:3]
COMPRESSION = "compress"
_MEASURED_AS = dict.fromkeys(COMPRESSED_STAGES, COMPRESSION) | {
    "mask": "reallocate",
    "checkpoint": "recover",
    "report": "evaluate",
}
"""Stages that follow one another and are measured as one: its peak is that of the largest."""
_STATISTICS = "statistics of all target matrices, float64"
_DENSE = "weights of the dense model"
_TRAINED = {"factors": "factors that train", "all": "the whole model"}
_BUCKET = 50_000_000
"""Numbers in one of DeepSpeed's two buckets, as :class:`lowrank_lit.strategies.LowRankDeepSpeed` sets them."""

Part = Literal["", "weights", "gradients", "state"]
"""What ZeRO splits over processes: states from stage 1, gradients from 2, weights from 3."""
_Row = tuple[Place, str, int] | tuple[Place, str, int, Part]


@dataclass(frozen=True)
class Item:
    """One thing that takes space.

    Attributes:
        stage: One of ``STAGES``.
        place: ``device`` (where the model runs), ``host`` (the machine's memory) or ``disk``.
        what: What is counted.
        bytes: How much.
        copy: Whether it is on the host as well, so that it takes no more where the device is the host.
        part: What it is of the training, where that can be split over processes.
    """

    stage: str
    place: Place
    what: str
    bytes: int
    copy: bool = False
    part: Part = ""


def estimate(size: ModelSize, run: RunShape) -> list[Item]:
    """Everything that takes space, stage by stage.

    The items of a stage that are in one place are there at the same time. Where the device is the CPU, device and host
    are one, see :func:`on_host`.
    """
    dense = size.parameters * run.weight_bytes
    final = kept_parameters(size, run.final_ratio)
    cast = final * run.storage_bytes if run.storage_bytes != run.weight_bytes else 0
    largest = size.vocabulary * size.hidden * (run.weight_bytes + 2)
    teacher = dense if run.recovery and run.recovery.teacher else 0  # stays to the end
    return [
        *(streamed(size, run) if run.streamed else _compression(size, run) if run.compressed else []),
        *(_reallocation(size, run) if run.reallocated is not None else []),
        *(_refinement(size, run) if run.refined else []),
        *(_recovery(size, run, run.recovery) if run.recovery else []),
        *_evaluation("evaluate", size, run, ("device", f"{_DENSE} (the compressed one needs less)", dense)),
        *_report(size, run, final * run.weight_bytes, teacher),
        *_stage(
            "export",
            ("host", "weights of the compressed model", final * run.weight_bytes),
            ("host", "their copy in the storage type", cast),
            ("host", "the largest weight, while it is checked", largest),
            *_kept_state(size, run),
            ("device", "weights of the teacher", teacher),
            ("disk", "compressed model", final * run.storage_bytes),
        ),
    ]


def _evaluation(stage: str, size: ModelSize, run: RunShape, *rows: _Row) -> list[Item]:
    return _stage(
        stage,
        *rows,
        ("device", "logits of one batch", logit_bytes(size, run, backward=False)),
        ("device", "logits and losses of one block, float32", run.block_size * size.vocabulary * 8),
    )


def _report(size: ModelSize, run: RunShape, weights: int, teacher: int) -> list[Item]:
    """The evaluation after the fit, where there is one."""
    if not (run.reported and run.recovery):
        return []
    rows: list[_Row] = [
        ("device", "weights of the compressed model", weights),
        ("device", "weights of the teacher", teacher),
        *_kept_state(size, run),
    ]
    return _evaluation("report", size, run, *rows)


def _kept_state(size: ModelSize, run: RunShape) -> list[_Row]:
    """What the trainer keeps after the training, so that it can still write a checkpoint: the optimizer, on the host.

    Adapters that were merged, and factors that were cut, are gone from it.
    """
    if run.recovery is None or run.recovery.trained == "adapters" or run.reallocated is not None:
        return []
    state = optimizer_bytes(run.recovery.optimizer, *trained_parameters(size, run))
    return [("host", f"state of {run.recovery.optimizer}, kept by the trainer", state, "state")]


def on_host(items: Iterable[Item]) -> list[Item]:
    """The same where the device is the host: what is on both is there once."""
    return [replace(item, place="disk" if item.place == "disk" else "host") for item in items if not item.copy]


def over_gpus(items: Iterable[Item], size: ModelSize, run: RunShape, gpus: int, zero: int = 0) -> list[Item]:
    """The same of one of ``gpus`` processes that train under DDP (``zero=0``) or DeepSpeed's ZeRO: states are split
    over them from stage 1 on, gradients from 2, weights from 3. Everything else each process has for itself.

    DDP copies gradients to buckets of its own. DeepSpeed has two buckets, a float32 copy of trained weights that are
    of less, split like the states, and in stage 3 the largest block (or embedding) with all its weights at a time.
    """
    split = {0: (), 1: ("state",), 2: ("state", "gradients"), 3: ("state", "gradients", "weights")}[zero]
    found = [replace(item, bytes=-(-item.bytes // gpus)) if item.part in split else item for item in items]
    if run.recovery is None:
        return found
    trained, width = trained_parameters(size, run)
    if not zero:
        return found + _stage("recover", ("device", "gradients, in the buckets of DDP", trained * width * (gpus > 1)))
    whole = training_weight_bytes(size, run) * size.block // size.parameters
    gathered = max(whole, size.vocabulary * size.hidden * run.weight_bytes)
    return found + _stage(
        "recover",
        ("device", "trained weights in float32", -(-4 * trained // gpus) if width < 4 else 0),
        ("device", "DeepSpeed's buckets", 2 * min(_BUCKET, trained) * width),
        ("device", "weights of the largest block or embedding, gathered", gathered if zero == 3 else 0),
    )


def streamed(size: ModelSize, run: RunShape, gpus: int = 1) -> list[Item]:
    """Calibration, feedback and factoring with a workspace, where one block is in memory at a time: weights are read
    from the files, hidden states between two blocks wait on the host in the weights' type, beyond the workspace's
    budget on its disk, and every process takes its share of the text and of the matrices.

    On the device that is one block, its statistics and one batch, whatever the depth. A backward pass goes from block
    to block, each computed again from its inputs, which wait on the disk, as statistics and singular vectors do until
    there are ranks, and candidates and predictions until they are measured. Items of the device and the host are of one
    process, those of the disk of all.
    """
    if not run.compressed:
        return []
    text = -(-run.calibration_tokens // gpus)
    inputs = run.weight_bytes * size.hidden
    weights = size.block * run.weight_bytes
    statistics = -(-statistics_bytes(size, run.moments) // size.blocks)
    passing = run.tokens * block_width(size) * run.weight_bytes
    activations = backward_bytes(size, run) // size.blocks if run.backward else passing
    head = size.vocabulary * size.hidden * run.weight_bytes + logit_bytes(size, run, backward=True)
    beyond = max(0, head - weights - statistics - activations) if run.backward or run.measured else 0
    factors = (kept_parameters(size, run.keep_ratio) - size.parameters + size.target_parameters) * run.weight_bytes
    both = run.measured or run.rounds > 1 or run.refitted
    held = gpus * int(HELD_OUT * text) * size.vocabulary * 2 if run.measured else 0
    vectors = vector_bytes(size, components=run.components)
    targets = size.target_parameters * run.weight_bytes
    one: tuple[_Row, ...] = (
        ("device", "weights of one block", weights),
        ("device", "statistics of one block, float64", statistics),
    )
    between = (3 if run.backward else 2) * text * inputs
    compared = max(
        4 * text * inputs if run.refitted else 0,
        between if run.rounds > 1 else 0,
        2 * int(HELD_OUT * text) * inputs if run.measured else 0,
    )
    return [
        *_stage(
            "calibrate",
            *one,
            ("host", "hidden states before and after one block", min(BUDGET, between)),
            ("device", "activations of one batch in one block", activations),
            ("device", "head and logits of one batch, beyond that", beyond if run.backward else 0),
            ("disk", "inputs of all blocks", gpus * text * inputs * size.blocks if run.backward else 0),
            ("disk", "hidden states beyond the host's", gpus * max(0, between - BUDGET)),
            ("disk", _STATISTICS, statistics_bytes(size, run.moments)),
        ),
        *_stage(
            "feedback",
            *(one if both else ()),
            ("host", "hidden states before and after one block of both models", min(BUDGET, compared)),
            ("disk", "hidden states beyond the host's", gpus * max(0, compared - BUDGET)),
            ("disk", "predictions on held-out sequences, float16", held),
            ("disk", "compressed target matrices, twice", 2 * targets if both else 0),
            ("disk", _STATISTICS, statistics_bytes(size, run.moments) if run.rounds > 1 else 0),
            ("disk", "singular vectors of two further rounds, float32", 2 * vectors if run.rounds > 1 else 0),
            ("device", "one block of the compressed model", weights if both else 0),
            ("device", "activations of one batch in one block", activations if both else 0),
            ("device", "head and logits of one batch, beyond that", beyond if both else 0),
        ),
        *_stage(
            "factor",
            ("host", "factors of one block", factors // size.blocks),
            ("disk", _STATISTICS, statistics_bytes(size, run.moments)),
            ("disk", "singular vectors of all targets, float32", vectors),
            ("device", "decomposition of the largest matrix, float64", workspace_bytes(size)),
            ("disk", "factors, kept for a later run", factors),
        ),
    ]


def _stage(stage: str, *rows: _Row, copies: tuple[tuple[str, int], ...] = ()) -> list[Item]:
    """The items of one stage; what takes no space is none. ``copies`` are on the device what is on the host too."""
    items = [Item(stage, row[0], row[1], row[2], part=row[3] if len(row) == 4 else "") for row in rows if row[2]]
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
    """Whole factors of every target are made from statistics of both sides, when the backward pass is over, and take
    the places of the matrices when all of them are there."""
    both = replace(run, moments=frozenset({"input", "gradient"}))
    factors = sum(factor_parameters(size, run).values()) * run.weight_bytes
    return [
        *_calibration(size, both, "reallocate"),
        *_stage("reallocate", ("disk", "factors, kept for a later run", factors)),
        *_stage(
            "mask",
            ("host", _DENSE, size.parameters * run.weight_bytes),
            ("host", _STATISTICS, statistics_bytes(size, both.moments)),
            ("host", "factors, until they replace the matrices", factors),
            ("device", "decomposition of the largest matrix, float64", workspace_bytes(size)),
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
    model = f"weights of the compressed model{quantized}" if run.compressed else "weights of the model"
    moved = ", in pages that the driver moves" if paged else ""
    kept: list[_Row] = [
        ("device", model, weights, "weights"),
        ("device", f"{name}: weights", extra, "weights"),
        ("device", f"{name}: gradients", trained * width, "gradients"),
        ("host" if paged else "device", f"{name}: state of {recovery.optimizer}{moved}", state, "state"),
        *_teacher(size, run, recovery),
        ("host", f"{name}: best state so far", trained * width if recovery.keeps_best else 0),
    ]
    training = _stage(
        "recover",
        *kept,
        ("device", "one factor, dequantised", dequantized_bytes(size, run)),
        ("device", f"activations for the backward pass{checkpointing}", activation_bytes(size, run)),
        ("device", _logits(recovery), loss_bytes(size, run)),
        ("disk", f"{_checkpoints(run)}: weights and optimizer", run.checkpoints * (weights + extra + state)),
    )
    if not run.checkpoints:
        return training
    written: _Row = ("host", "the checkpoint, whole in memory while it is written", weights + extra + state)
    return training + _stage("checkpoint", *(row for row in kept if row[0] != "disk"), written)


def _checkpoints(run: RunShape) -> str:
    return "one checkpoint" if run.checkpoints == 1 else f"{run.checkpoints} checkpoints that are kept"


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


def peaks(items: Iterable[Item]) -> dict[Place, int]:
    """Bytes of the largest stage on the device and on the host, for stages follow one another, and of all stages on
    the disk, where what they write stays."""
    found: dict[Place, int] = {}
    for (_, place), count in totals(items).items():
        before = found.get(place, 0)
        found[place] = before + count if place == "disk" else max(before, count)
    return found


def totals(items: Iterable[Item]) -> dict[tuple[str, Place], int]:
    """Bytes by stage and place."""
    result: dict[tuple[str, Place], int] = {}
    for item in items:
        result[item.stage, item.place] = result.get((item.stage, item.place), 0) + item.bytes
    return result


def measured_peaks(items: Iterable[Item]) -> dict[tuple[str, Place], int]:
    """As :func:`totals`, with the largest of calibration, feedback and factoring as ``compress``, that of the training
    and a checkpoint as ``recover``, of the two phases of a re-allocation as ``reallocate``, and of the evaluations as
    ``evaluate``."""
    result: dict[tuple[str, Place], int] = {}
    for (stage, place), count in totals(items).items():
        key = (_MEASURED_AS.get(stage, stage), place)
        result[key] = max(result.get(key, 0), count)
    return result


def stage_flops(size: ModelSize, run: RunShape) -> dict[str, int]:
    """Operations by stage: of all processes together, and of ``recover`` of each, which has batches of its own.

    A backward pass through frozen weights costs as much as the forward pass, with the gradients of what trains twice
    that; checkpointing adds a forward pass, a teacher one of the dense model. Adapters add ``6`` a number and token.
    """
    dense, length = token_flops(size, run.block_size), run.block_size
    small = token_flops(size, length, run.keep_ratio)
    tokens = run.calibration_tokens
    once = tokens * (dense * (2 if run.backward else 1) + statistics_flops(size, run.moments))
    solve = decomposition_flops(size, two_sided=run.components)
    found: dict[str, int] = {}
    if run.compressed:
        found = {"calibrate": once, "factor": solve}
        again = (run.rounds - 1) * (once + solve) + (3 * tokens * dense if run.refitted else 0)
        found |= {"feedback": again} if again else {}
    if run.reallocated is not None:
        moments = statistics_flops(size, frozenset({"input", "gradient"}))
        whole = decomposition_flops(size, two_sided=True)
        found["reallocate"] = tokens * (2 * dense + moments) + whole
    if run.refined:
        found["refine"] = tokens * (dense + 3 * small * run.epochs)
    if run.recovery is not None and run.training_tokens and run.training_steps:
        recovery = run.recovery
        passes = (2 if recovery.trained == "adapters" else 3) + recovery.checkpointing
        step = passes * small + (dense if recovery.teacher else 0)
        if recovery.trained == "adapters":
            step += 6 * of_one_token(size, lambda own: adapter_parameters(own, run, recovery.adapter_rank))
        found["recover"] = run.training_steps * run.training_tokens * step
    return found
