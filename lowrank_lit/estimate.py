"""What a run will need, from shapes alone: parameters, memory of each stage, disk. No weight and no text is read.

Every formula is a function here and every number says what it counts. Bytes are of tensors: Python, libraries, the CUDA
context, fragmentation and matrix-multiplication workspaces come on top (about 1 to 2 GiB).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowrank_lit.refit import HELD_OUT
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.statistics import BACKWARD_MOMENTS
from lowrank_lit.surgery import count_parameters, find_targets

Place = Literal["device", "host", "disk"]
PLACES: tuple[Place, ...] = ("device", "host", "disk")
STAGES = ("calibrate", "feedback", "factor", "recover", "evaluate", "export")
_STATISTICS = "statistics of all target matrices, float64"
_BACKWARD_LOGITS = "logits of one batch, their log-softmax and gradient"


@dataclass(frozen=True)
class ModelSize:
    """Shapes of a model that its memory follows from.

    Attributes:
        parameters: Numbers in the whole model, tied ones once.
        matrices: ``(rows, columns)`` of every target matrix.
        moments: Side of every second moment that is kept: the smaller side of its matrix. One over the inputs is shared
            by all matrices that are fed the same tensor later.
        inputs: Width of every distinct input of a target matrix.
        block: Numbers in the largest repeating block, of which one at a time is on the device; the whole model's where
            none repeats.
        blocks: Number of repeating blocks.
        hidden: Width of the hidden states.
        vocabulary: Width of the logits.
        shared: Whether it could be seen which matrices are fed one tensor; if not, every one counts its own.
    """

    parameters: int
    matrices: tuple[tuple[int, int], ...]
    moments: tuple[int, ...]
    inputs: tuple[int, ...]
    block: int
    blocks: int
    hidden: int
    vocabulary: int
    shared: bool = True

    @property
    def target_parameters(self) -> int:
        """Numbers in the target matrices."""
        return sum(rows * columns for rows, columns in self.matrices)


@dataclass(frozen=True)
class RunShape:
    """Settings of a run that its memory follows from.

    Attributes:
        keep_ratio: Share of the target matrices' parameters to keep.
        weight_bytes: Bytes per weight in memory.
        storage_bytes: Bytes per weight in the exported files.
        batch_size: Blocks of text per batch.
        block_size: Tokens per block of text.
        calibration_tokens: Tokens that statistics are collected on.
        adapter_rank: Rank of the LoRA on the factors; ``None`` trains every parameter.
        trained: Whether there is a recovery at all.
        moments: What calibration collects; names as in :func:`lowrank_lit.calibration.calibrate`.
        components: Whether both vectors of each component wait for the ranks, as in the two-sided metrics.
        measured: Whether candidate plans are measured on held-out calibration sequences.
        rounds: Rounds of statistics, of which those after the first are of the compressed model.
        refitted: Whether every block is fitted to the dense one's outputs.
    """

    keep_ratio: float
    weight_bytes: int
    storage_bytes: int
    batch_size: int
    block_size: int
    calibration_tokens: int
    adapter_rank: int | None = 8
    trained: bool = True
    moments: frozenset[str] = frozenset({"input"})
    components: bool = False
    measured: bool = False
    rounds: int = 1
    refitted: bool = False

    @property
    def backward(self) -> bool:
        """Whether calibration takes a backward pass, for which the whole model is on the device."""
        return bool(self.moments & BACKWARD_MOMENTS)

    @property
    def tokens(self) -> int:
        """Tokens per batch."""
        return self.batch_size * self.block_size


@dataclass(frozen=True)
class Item:
    """One thing that takes space.

    Attributes:
        stage: One of ``STAGES``.
        place: ``device`` (where the model runs), ``host`` (the machine's memory) or ``disk``.
        what: What is counted.
        bytes: How much.
    """

    stage: str
    place: Place
    what: str
    bytes: int


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


def uniform_rank(rows: int, columns: int, keep_ratio: float) -> int:
    """Rank at which a matrix keeps ``keep_ratio`` of its numbers as two factors: ``floor(keep_ratio m n / (m + n))``,
    at least 1.
    """
    return max(1, math.floor(keep_ratio * rows * columns / (rows + columns)))


def kept_parameters(size: ModelSize, keep_ratio: float) -> int:
    """Numbers of the compressed model: everything that is no target, and ``keep_ratio`` of the targets."""
    return size.parameters - size.target_parameters + math.floor(keep_ratio * size.target_parameters)


def adapter_parameters(matrices: Iterable[tuple[int, int]], keep_ratio: float, rank: int) -> int:
    """Numbers of LoRA adapters of rank ``l`` on both factors, at uniform ranks ``r``: the sum of ``l (n + r) + l (r +
    m)``.
    """
    total = 0
    for rows, columns in matrices:
        kept = uniform_rank(rows, columns, keep_ratio)
        total += min(rank, max(1, kept - 1)) * (rows + columns + 2 * kept)
    return total


def training_bytes(trainable: int, value_bytes: int) -> int:
    """Bytes of AdamW beside the weights: a gradient and two moments per trained number, ``3 n b``."""
    return 3 * trainable * value_bytes


def activation_bytes(size: ModelSize, run: RunShape) -> int:
    """Bytes of activations kept for the backward pass of one batch, without gradient checkpointing and without the
    logits.

    Per token: of every target matrix, the input ``n`` of its first factor and ``r`` of its second, and its output
    ``m``, which the next operation keeps; of every block, its two normalised hidden states in float32 (and what was
    normalised, where the norms' weights train). Adapters read a float32 copy of their own of a half-precision input,
    and keep their ``l`` outputs twice; otherwise matrices fed one tensor share it. An attention that keeps its scores
    (``eager``) needs more.
    """
    reading = 4 if run.adapter_rank else run.weight_bytes
    shared = reading == run.weight_bytes
    inputs = sum(size.inputs) if shared else sum(columns for _, columns in size.matrices)
    ranks = sum(uniform_rank(rows, columns, run.keep_ratio) for rows, columns in size.matrices)
    outputs = sum(rows for rows, _ in size.matrices)
    adapters = 2 * 4 * (run.adapter_rank or 0) * len(size.matrices)
    norms = (2 if run.adapter_rank else 4) * 4 * size.hidden * size.blocks
    return run.tokens * (reading * (inputs + ranks) + run.weight_bytes * outputs + adapters + norms)


def logit_bytes(size: ModelSize, run: RunShape, *, backward: bool) -> int:
    """Bytes of one batch's logits: as the model returns them; for a backward also in float32, their log-softmax and its
    gradient.
    """
    return run.tokens * size.vocabulary * (run.weight_bytes + (12 if backward else 0))


def moment_bytes(size: ModelSize) -> int:
    """Bytes of the second moments of all targets in float64: the sum of ``8 min(m, n)^2``, shared inputs once."""
    return sum(8 * side * side for side in size.moments)


def statistics_bytes(size: ModelSize, moments: frozenset[str]) -> int:
    """Bytes of all statistics in float64, per moment: ``input`` as :func:`moment_bytes`; ``input_full`` ``8 n^2`` and
    ``magnitude`` ``8 n`` of every distinct input; ``gradient`` ``8 min(m, n)^2``, ``fisher`` ``8 (m + n)`` and
    ``weight_gradient`` ``8 m n`` of every target, for no two share an output.
    """
    per_matrix = {
        "gradient": sum(8 * min(rows, columns) ** 2 for rows, columns in size.matrices),
        "fisher": sum(8 * (rows + columns) for rows, columns in size.matrices),
        "weight_gradient": 8 * size.target_parameters,
        "input_full": sum(8 * side * side for side in size.inputs),
        "magnitude": sum(8 * side for side in size.inputs),
    }
    shared = moment_bytes(size) if "input" in moments and "input_full" not in moments else 0
    return shared + sum(count for name, count in per_matrix.items() if name in moments)


def backward_bytes(size: ModelSize, run: RunShape) -> int:
    """Bytes of activations kept for the backward pass of one calibration batch, the logits left out.

    No weight is trained, so a linear layer keeps no input. Per token, and without gradient checkpointing: the outputs
    of the target matrices, which the next operation keeps, and as many again of the widest (the activation function's
    result); of every block, its two normalised hidden states in float32. The moments ``fisher`` and ``weight_gradient``
    keep the inputs too. An attention that keeps its scores (``eager``) needs more.
    """
    outputs = sum(rows for rows, _ in size.matrices) + size.blocks * max(rows for rows, _ in size.matrices)
    inputs = sum(size.inputs) if run.moments & {"fisher", "weight_gradient"} else 0
    return run.tokens * (run.weight_bytes * (outputs + inputs) + 2 * 4 * size.hidden * size.blocks)


def vector_bytes(size: ModelSize, *, components: bool = False) -> int:
    """Bytes of the singular vectors of all targets, which wait in float32 for the ranks: the sum of ``4 m min(m, n)``
    for the left ones alone, of ``4 (m + n) min(m, n)`` for both (``components``).
    """
    return sum(4 * (rows + components * columns) * min(rows, columns) for rows, columns in size.matrices)


def workspace_bytes(size: ModelSize) -> int:
    """Bytes to decompose the largest target in float64: the matrix, and three matrices of its smaller side (Gram,
    vectors, work).
    """
    return max(8 * (rows * columns + 3 * min(rows, columns) ** 2) for rows, columns in size.matrices)


def estimate(size: ModelSize, run: RunShape) -> list[Item]:
    """Everything that takes space, stage by stage.

    The items of a stage that are in one place are there at the same time. Where the device is the CPU, device and host
    are one.
    """
    kept = kept_parameters(size, run.keep_ratio)
    dense, small = size.parameters * run.weight_bytes, kept * run.weight_bytes
    factors = (kept - size.parameters + size.target_parameters) * run.weight_bytes
    vectors = vector_bytes(size, components=run.components)
    return [
        *_calibration(size, run),
        *_feedback(size, run),
        *_stage(
            "factor",
            ("host", "weights of the dense model", dense),
            ("host", "singular vectors of all target matrices, float32", vectors),
            ("host", "factors, until they replace the matrices", factors),
            ("host", _STATISTICS, statistics_bytes(size, run.moments)),
            ("device", "decomposition of the largest matrix, float64", workspace_bytes(size)),
            ("disk", "factors, kept for a later run", factors),
        ),
        *(_recovery(size, run, kept) if run.trained else []),
        *_stage(
            "evaluate",
            ("device", "weights of the dense model (the compressed one needs less)", dense),
            ("device", "logits of one batch", logit_bytes(size, run, backward=False)),
            ("device", "logits and losses of one block, float32", run.block_size * size.vocabulary * 8),
        ),
        *_stage(
            "export",
            (
                "host",
                "weights of the compressed model, and their copy in the storage type",
                small + kept * run.storage_bytes,
            ),
            ("disk", "compressed model", kept * run.storage_bytes),
        ),
    ]


def _stage(stage: str, *rows: tuple[Place, str, int]) -> list[Item]:
    """The items of one stage; what takes no space is none."""
    return [Item(stage, place, what, count) for place, what, count in rows if count]


def _calibration(size: ModelSize, run: RunShape) -> list[Item]:
    statistics = statistics_bytes(size, run.moments)
    weights = size.parameters * run.weight_bytes
    if run.backward:
        return _stage(
            "calibrate",
            ("host", _STATISTICS, statistics),
            ("device", "weights of the whole model, for the backward pass", weights),
            ("device", _STATISTICS, statistics),
            ("device", "activations of one batch, for the backward pass", backward_bytes(size, run)),
            ("device", _BACKWARD_LOGITS, logit_bytes(size, run, backward=True)),
        )
    hidden = run.calibration_tokens * size.hidden * run.weight_bytes
    width = run.tokens * _block_width(size) * run.weight_bytes
    return _stage(
        "calibrate",
        ("host", "weights of the dense model", weights),
        ("host", "hidden states of the calibration text", hidden),
        ("device", "weights of one block", size.block * run.weight_bytes),
        ("device", "statistics of one block, float64", statistics // max(1, size.blocks)),
        ("host", _STATISTICS, statistics),
        ("device", "activations of one batch in one block", width),
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
        ("host", "weights of the dense model", size.parameters * run.weight_bytes),
        ("host", "compressed target matrices, twice", 2 * size.target_parameters * run.weight_bytes),
        ("host", "statistics of the rounds, float64", rounds * statistics_bytes(size, run.moments)),
        ("host", "singular vectors of the rounds, float32", rounds * vectors),
        ("host", "predictions on held-out sequences, float16", int(held) if run.measured else 0),
        ("host", "hidden states of both models", hidden if run.refitted else 0),
    )


def _recovery(size: ModelSize, run: RunShape, kept: int) -> list[Item]:
    if run.adapter_rank is None:
        trained, width, name = kept, run.weight_bytes, "the whole model"
        extra = 0
    else:
        trained = adapter_parameters(size.matrices, run.keep_ratio, run.adapter_rank)
        width, name = 4, f"LoRA of rank {run.adapter_rank} on both factors, float32"
        extra = trained * width
    weights = kept * run.weight_bytes
    return _stage(
        "recover",
        ("device", "weights of the compressed model", weights),
        ("device", f"{name}: weights", extra),
        ("device", f"{name}: gradients and AdamW's moments", training_bytes(trained, width)),
        ("device", "activations for the backward pass", activation_bytes(size, run)),
        ("device", _BACKWARD_LOGITS, logit_bytes(size, run, backward=True)),
        ("disk", "one checkpoint: weights and optimizer", weights + extra + 2 * trained * width),
    )


def _block_width(size: ModelSize) -> int:
    """Numbers per token that one block holds at most: the widest target's input and output, two hidden states."""
    return 2 * size.hidden + max(rows + columns for rows, columns in size.matrices)


def totals(items: Iterable[Item]) -> dict[tuple[str, Place], int]:
    """Bytes by stage and place."""
    result: dict[tuple[str, Place], int] = {}
    for item in items:
        result[item.stage, item.place] = result.get((item.stage, item.place), 0) + item.bytes
    return result


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
