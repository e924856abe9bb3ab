"""Bytes, numbers and operations that follow from shapes alone, one formula a function; :mod:`lowrank_lit.estimate` adds
them up, docs/scaling.md lists them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowrank_lit.quantize import nf4_bytes
from lowrank_lit.statistics import BACKWARD_MOMENTS

Trained = Literal["adapters", "factors", "all"]
_SIDES = ("inner", "outer")


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
        experts: ``(count, rows, columns)`` of every parameter that holds the matrices of a block's experts.
        active: Experts that one token goes through.
        expert_targets: How many of the targets are experts, the last ones; see :func:`with_experts`.
        lookup: Numbers of the input embedding, which multiply nothing; 0 where it is the output embedding as well.
        attention: Heads times the width of a head, in one block; 0 where it is not known.
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
    experts: tuple[tuple[int, int, int], ...] = ()
    active: int = 0
    expert_targets: int = 0
    lookup: int = 0
    attention: int = 0

    @property
    def expert_parameters(self) -> int:
        """Numbers in the experts, targets or not."""
        return sum(count * rows * columns for count, rows, columns in self.experts)

    @property
    def active_share(self) -> float:
        """Share of the experts that one token goes through; 1 without any."""
        count = max((count for count, _, _ in self.experts), default=0)
        return min(1.0, self.active / count) if count else 1.0

    @property
    def target_parameters(self) -> int:
        """Numbers in the target matrices."""
        return sum(rows * columns for rows, columns in self.matrices)


@dataclass(frozen=True)
class Recovery:
    """What trains after the compression, and how.

    Attributes:
        trained: ``adapters`` on both factors, the ``factors`` themselves, or ``all`` parameters.
        adapter_rank: Rank of the adapters.
        sides: Which factors train, where these do.
        quantized: Which factors are in NF4.
        optimizer: As :func:`lowrank_lit.optimizers.build_optimizer` takes it.
        checkpointing: Whether activations are computed again in the backward pass.
        teacher: Whether there is a teacher: ``""``, in ``memory``, or with its predictions ``cached`` on disk.
        mixed: Whether the labels count besides the teacher.
        top_k: Tokens per position whose predictions are cached; ``None`` is all.
        cached_tokens: Tokens of text that predictions are cached for at most; 0 where it is not known.
        keeps_best: Whether a copy of the best state so far is kept.
    """

    trained: Trained = "adapters"
    adapter_rank: int = 8
    sides: tuple[str, ...] = _SIDES
    quantized: tuple[str, ...] = ()
    optimizer: str = "adamw"
    checkpointing: bool = False
    teacher: Literal["", "memory", "cached"] = ""
    mixed: bool = False
    top_k: int | None = None
    cached_tokens: int = 0
    keeps_best: bool = False


@dataclass(frozen=True)
class RunShape:
    """Settings of a run that its memory follows from.

    Attributes:
        keep_ratio: Share of the target matrices' parameters that the compression keeps; 1 without one.
        weight_bytes: Bytes per weight in memory.
        storage_bytes: Bytes per weight in the exported files.
        batch_size: Blocks of text per batch.
        block_size: Tokens per block of text.
        calibration_tokens: Tokens that statistics are collected on.
        recovery: What trains; ``None`` where nothing does.
        moments: What calibration collects; names as in :func:`lowrank_lit.calibration.calibrate`.
        components: Whether both vectors of each component wait for the ranks, as in the two-sided metrics.
        measured: Whether candidate plans are measured on held-out calibration sequences.
        rounds: Rounds of statistics, of which those after the first are of the compressed model.
        refitted: Whether every block is fitted to the dense one's outputs.
        compressed: Whether there is a compression before the fit.
        streamed: Whether the compression has a workspace, and goes one block at a time.
        refined: Whether the factors of one block after the other are trained before the fit.
        reallocated: Share that is kept after a re-allocation during the fit, ``None`` without one.
        training_batches: Whether batches of the training are of the same shape; if it is not known, nothing that grows
            with them is counted.
        training_steps: Batches that each process trains on; 0 where it is not known.
        checkpoints: Checkpoints of the training that are kept.
        epochs: Passes of the refinement over the calibration text.
        reported: Whether the model is evaluated after the fit.
    """

    keep_ratio: float
    weight_bytes: int
    storage_bytes: int
    batch_size: int
    block_size: int
    calibration_tokens: int
    recovery: Recovery | None = Recovery()
    moments: frozenset[str] = frozenset({"input"})
    components: bool = False
    measured: bool = False
    rounds: int = 1
    refitted: bool = False
    compressed: bool = True
    streamed: bool = False
    refined: bool = False
    reallocated: float | None = None
    training_batches: bool = True
    training_steps: int = 0
    checkpoints: int = 1
    epochs: int = 1
    reported: bool = False

    @property
    def backward(self) -> bool:
        """Whether calibration takes a backward pass, for which the whole model is on the device."""
        return bool(self.moments & BACKWARD_MOMENTS)

    @property
    def tokens(self) -> int:
        """Tokens per batch."""
        return self.batch_size * self.block_size

    @property
    def training_tokens(self) -> int:
        """Tokens per batch of the training, 0 where it is not known."""
        return self.tokens if self.training_batches else 0

    @property
    def final_ratio(self) -> float:
        """Share of the target matrices' parameters that is exported."""
        return self.keep_ratio if self.reallocated is None else self.reallocated


def with_experts(size: ModelSize, matrices: Sequence[tuple[int, int]]) -> ModelSize:
    """The same model with matrices of experts ``(rows, columns)`` as targets too, each with a second moment and an
    input of its own."""
    return replace(
        size,
        matrices=(*size.matrices, *matrices),
        moments=(*size.moments, *(min(matrix) for matrix in matrices)),
        inputs=(*size.inputs, *(columns for _, columns in matrices)),
        expert_targets=len(matrices),
    )


def of_one_token(size: ModelSize, count: Callable[[ModelSize], int]) -> int:
    """``count`` of the targets that one token goes through: of those that are experts, their active share."""
    if not size.expert_targets:
        return count(size)
    plain = replace(
        size,
        matrices=size.matrices[: -size.expert_targets],
        moments=size.moments[: -size.expert_targets],
        inputs=size.inputs[: -size.expert_targets],
        expert_targets=0,
        experts=(),
    )
    rest = count(plain)
    return rest + math.ceil((count(size) - rest) * size.active_share)


def uniform_rank(rows: int, columns: int, keep_ratio: float) -> int:
    """Rank at which a matrix keeps ``keep_ratio`` of its numbers as two factors: ``floor(keep_ratio m n / (m + n))``,
    at least 1.
    """
    return max(1, math.floor(keep_ratio * rows * columns / (rows + columns)))


def kept_parameters(size: ModelSize, keep_ratio: float) -> int:
    """Numbers of the compressed model: everything that is no target, and ``keep_ratio`` of the targets."""
    return size.parameters - size.target_parameters + math.floor(keep_ratio * size.target_parameters)


def training_ranks(size: ModelSize, run: RunShape) -> list[int]:
    """Rank of every target matrix while the model trains, 0 where it is dense: uniform ranks, and whole ones where
    ranks are re-allocated and nothing was compressed before.
    """
    if run.keep_ratio < 1:
        return [uniform_rank(rows, columns, run.keep_ratio) for rows, columns in size.matrices]
    return [0 if run.reallocated is None else min(matrix) for matrix in size.matrices]


def factor_parameters(size: ModelSize, run: RunShape) -> dict[str, int]:
    """Numbers of all factors while the model trains: ``inner`` the sum of ``r n``, ``outer`` of ``m r``. Whole factors
    of a square matrix are twice the matrix.
    """
    pairs = list(zip(training_ranks(size, run), size.matrices, strict=True))
    inner = sum(rank * columns for rank, (_, columns) in pairs)
    return {"inner": inner, "outer": sum(rank * rows for rank, (rows, _) in pairs)}


def training_weight_bytes(size: ModelSize, run: RunShape) -> int:
    """Bytes of the model while it trains, adapters left out: quantised factors by
    :func:`lowrank_lit.quantize.nf4_bytes`, everything else in the dtype in memory.
    """
    quantized = run.recovery.quantized if run.recovery else ()
    dense = sum(
        rows * columns
        for rank, (rows, columns) in zip(training_ranks(size, run), size.matrices, strict=True)
        if not rank
    )
    rest = size.parameters - size.target_parameters + dense
    factors = factor_parameters(size, run).items()
    return rest * run.weight_bytes + sum(
        nf4_bytes(count) if side in quantized else count * run.weight_bytes for side, count in factors
    )


def dequantized_bytes(size: ModelSize, run: RunShape) -> int:
    """Bytes of the largest quantised factor as a plain matrix, computed in float32: one is there at a time."""
    if run.recovery is None or not run.recovery.quantized:
        return 0
    sides = [columns if side == "inner" else rows for rows, columns in size.matrices for side in run.recovery.quantized]
    ranks = [rank for rank in training_ranks(size, run) for _ in run.recovery.quantized]
    return max(rank * side for rank, side in zip(ranks, sides, strict=True)) * (4 + run.weight_bytes)


def trained_parameters(size: ModelSize, run: RunShape) -> tuple[int, int]:
    """How many numbers train and the bytes of each: adapters are float32, the rest in the dtype in memory."""
    recovery = run.recovery
    if recovery is None:
        return 0, run.weight_bytes
    factors = factor_parameters(size, run)
    if recovery.trained == "adapters":
        return adapter_parameters(size, run, recovery.adapter_rank), 4
    if recovery.trained == "factors":
        return sum(factors[side] for side in recovery.sides), run.weight_bytes
    dense = sum(math.prod(m) for rank, m in zip(training_ranks(size, run), size.matrices, strict=True) if not rank)
    return size.parameters - size.target_parameters + dense + sum(factors.values()), run.weight_bytes


def adapter_parameters(size: ModelSize, run: RunShape, rank: int) -> int:
    """Numbers of LoRA adapters of rank ``l`` on both factors of rank ``r``: the sum of ``l (n + r) + l (r + m)``."""
    total = 0
    for kept, (rows, columns) in zip(training_ranks(size, run), size.matrices, strict=True):
        total += min(rank, max(1, kept - 1)) * (rows + columns + 2 * kept) if kept else 0
    return total


def optimizer_bytes(name: str, trained: int, value_bytes: int) -> int:
    """Bytes of an optimizer's state, without the gradients: AdamW has two moments of a parameter and Lion one. torch's
    AdamW keeps them in the parameter's dtype, bitsandbytes in float32, or in 8 bits with a float32 scale per 256.
    """
    moments = 1 if "lion" in name else 2
    if "8bit" in name:
        return moments * (trained + 4 * -(-trained // 256))
    return moments * trained * (value_bytes if name == "adamw" else 4)


def activation_bytes(size: ModelSize, run: RunShape) -> int:
    """Bytes of activations kept for the backward pass of one batch, without the logits.

    Per token: of every target matrix, the input ``n`` of its first factor and ``r`` of its second, and its output
    ``m``, which the next operation keeps; of every block, its two normalised hidden states in float32 (and what was
    normalised, where the norms' weights train). Adapters read a float32 copy of their own of a half-precision input,
    and keep their ``l`` outputs twice; otherwise matrices fed one tensor share it. Masked components are kept twice.
    With gradient checkpointing: the input of every block, and the above of one block. An attention that keeps its
    scores (``eager``) needs more.
    """
    if run.recovery is None:
        return 0
    whole = _block_activations(size, run, run.recovery, run.weight_bytes)
    if run.recovery.checkpointing:
        whole = run.weight_bytes * size.hidden * size.blocks + whole // size.blocks
    return run.training_tokens * whole


def refining_bytes(size: ModelSize, run: RunShape) -> int:
    """The same for one block whose factors are trained to give the dense block's outputs, in float32 at least."""
    width = max(4, run.weight_bytes)
    whole = _block_activations(size, run, Recovery("factors"), width) // size.blocks
    return run.tokens * (whole + 3 * width * size.hidden)  # outputs, targets and their difference


def _block_activations(size: ModelSize, run: RunShape, recovery: Recovery, width: int) -> int:
    """Bytes per token of all blocks, at ``width`` bytes per number."""
    own = of_one_token(size, lambda targets: _target_activations(targets, run, recovery, width))
    norms = (4 if recovery.trained == "all" else 2) * 4 * size.hidden * size.blocks
    return own + norms + width * _expert_numbers(size)


def _expert_numbers(size: ModelSize) -> int:
    """Numbers per token that experts which are no targets keep: input and output of those that it goes through."""
    if size.expert_targets:
        return 0
    return sum(min(count, size.active) * (rows + columns) for count, rows, columns in size.experts)


def _target_activations(size: ModelSize, run: RunShape, recovery: Recovery, width: int) -> int:
    adapters = recovery.trained == "adapters"
    reading = 4 if adapters else width
    inputs = sum(size.inputs) if reading == width else sum(columns for _, columns in size.matrices)
    ranks = sum(training_ranks(size, run)) * (1 if run.reallocated is None else 2)
    outputs = sum(rows for rows, _ in size.matrices)
    beside = 2 * 4 * recovery.adapter_rank * len(size.matrices) if adapters else 0
    return reading * (inputs + ranks) + width * outputs + beside


def logit_bytes(size: ModelSize, run: RunShape, *, backward: bool) -> int:
    """Bytes of one batch's logits: as the model returns them; for a backward also in float32, their log-softmax and its
    gradient.
    """
    return run.tokens * size.vocabulary * (run.weight_bytes + (12 if backward else 0))


def loss_bytes(size: ModelSize, run: RunShape) -> int:
    """Bytes of the logits in a training step. With a teacher: the student's as the model returns them and those that
    count, scaled, their log-softmax and its gradient, and of the teacher's predictions all, those that count, and their
    probabilities, all in float32.
    """
    if not run.training_batches or run.recovery is None:
        return 0
    own = logit_bytes(size, run, backward=True)
    if not run.recovery.teacher:
        return own
    distilled = run.tokens * size.vocabulary * (2 * run.weight_bytes + 24)
    return distilled + (own if run.recovery.mixed else 0)


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
    reads = bool(run.moments & {"fisher", "weight_gradient"})
    kept = of_one_token(size, lambda own: sum(rows for rows, _ in own.matrices) + reads * sum(own.inputs))
    kept += size.blocks * max(rows for rows, _ in size.matrices) + _expert_numbers(size)
    return run.tokens * (run.weight_bytes * kept + 2 * 4 * size.hidden * size.blocks)


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


def block_width(size: ModelSize) -> int:
    """Numbers per token that one block holds at most: the widest target's input and output, two hidden states."""
    return 2 * size.hidden + max(rows + columns for rows, columns in size.matrices)


def token_flops(size: ModelSize, length: int, keep_ratio: float = 1.0) -> int:
    """Floating-point operations of one token's forward pass, a multiplication and an addition being two: ``2 P`` and,
    for the scores and their use, ``4 L h`` in every block.

    ``P`` are the numbers that a token meets: no input embedding, of the experts the active ones, of the targets
    ``keep_ratio``. ``L`` is the length of the sequence (all positions: causal kernels may do half), ``h`` the heads'
    width together.
    """
    experts = size.expert_parameters
    targets = size.target_parameters - (experts if size.expert_targets else 0)
    rest = size.parameters - size.lookup - experts - targets
    active = experts * size.active_share * (keep_ratio if size.expert_targets else 1.0)
    return int(2 * (rest + keep_ratio * targets + active)) + 4 * length * size.attention * size.blocks


def statistics_flops(size: ModelSize, moments: frozenset[str]) -> int:
    """Operations of one token for the statistics: it adds one product to every number of them."""
    return 2 * of_one_token(size, lambda own: statistics_bytes(own, moments)) // 8


def decomposition_flops(size: ModelSize, *, two_sided: bool = False) -> int:
    """Operations in float64 to decompose all targets, to leading order: with ``s = min(m, n)``, eigenvectors of a
    symmetric matrix at ``9 s^3`` (Golub and Van Loan, section 8.3) and ``6 m n s`` for its products; in a two-sided
    metric one more decomposition, and ``2 m n max(m, n)``.
    """
    total = 0
    for rows, columns in size.matrices:
        side = min(rows, columns)
        total += 9 * side**3 + 6 * rows * columns * side
        total += (9 * side**3 + 2 * rows * columns * max(rows, columns)) if two_sided else 0
    return total
