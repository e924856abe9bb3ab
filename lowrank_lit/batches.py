"""Batches of calibration text: their forms, checks and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lowrank_lit.errors import DataError, warn_caller
from lowrank_lit.streaming import (
    POSITIONAL,
    Batch,
)

PARTS = 5
"""Batches that a single one is split into, so that a fifth of the sequences can be held out."""


def as_batches(batches: Sequence[Any] | Any) -> list[dict[str, Tensor]]:
    """Calibration batches in one form: dictionaries of keyword arguments for the model, labels left out.

    Args:
        batches: An iterable of dictionaries (``input_ids``, optionally ``attention_mask``), of tensors, which the model
            takes as its first positional argument (token ids ``(batch, length)``, features ``(batch, ..., columns)``),
            or of tuples whose first element is one of these.

    Raises:
        DataError: If there is none, one has another form, or a batch holds no tokens.
    """
    single = isinstance(batches, Mapping) or (isinstance(batches, Tensor) and batches.ndim < 3)
    if single or not isinstance(batches, Iterable):
        hint = ", such as [batches]" if single else ""
        raise DataError(f"batches is a {type(batches).__name__}; give a list of calibration batches{hint}")
    result = []
    for number, batch in enumerate(batches):
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if isinstance(batch, Tensor):
            batch = {POSITIONAL: batch}
        if not isinstance(batch, Mapping):
            raise DataError(
                f"calibration batch {number} is a {type(batch).__name__}; give dictionaries with input_ids, or tensors"
            )
        tensors = {str(key): value for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}
        if not tensors or any(value.numel() == 0 for value in tensors.values()):
            raise DataError(f"calibration batch {number} is empty; give at least one sequence per batch")
        _check_shapes(number, tensors)
        result.append(tensors)
    if not result:
        raise DataError("batches is empty; give at least one calibration batch")
    return result


def split_single(batches: Sequence[Batch]) -> Sequence[Batch]:
    """A single batch as up to :data:`PARTS`, by its sequences; several batches as they are."""
    batch = batches[0]
    sizes = {len(value) if value.ndim else 0 for value in batch.values()}
    count = min(PARTS, *sizes)
    if len(batches) > 1 or len(sizes) > 1 or count < 2:  # of several sizes, one is shared by all sequences
        return batches
    pieces = zip(*(value.tensor_split(count) for value in batch.values()), strict=True)
    parts: list[Batch] = [dict(zip(batch, values, strict=True)) for values in pieces]
    return parts if all(count_tokens(part) for part in parts) else batches


def _check_shapes(number: int, batch: Mapping[str, Tensor]) -> None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    first = batch.get(POSITIONAL)
    if first is not None and first.ndim < 2:
        raise DataError(
            f"calibration batch {number} is a tensor of shape {tuple(first.shape)}; give token ids (batch, length) or "
            "features (batch, ..., columns)"
        )
    if ids is not None and (ids.ndim != 2 or ids.is_floating_point()):
        raise DataError(
            f"calibration batch {number}: input_ids of shape {tuple(ids.shape)} and type {ids.dtype}; give whole "
            "numbers (batch, length)"
        )
    if ids is not None and mask is not None and mask.ndim == 2:
        if mask.shape != ids.shape:
            raise DataError(
                f"calibration batch {number}: attention_mask {tuple(mask.shape)} does not fit input_ids "
                f"{tuple(ids.shape)}; give one number per token"
            )
        if not bool(mask.any()):
            raise DataError(f"calibration batch {number} is all padding; leave it out")


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding left out; of features ``(batch, ..., columns)``, the vectors."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    first = next(iter(batch.values()))
    return (first.shape[:-1] if first.is_floating_point() else first.shape[:2]).numel()


def count_sequences(batches: Sequence[Batch]) -> int:
    """Sequences of all batches together."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def check_tokens(tokens: int, widest: int, name: str, least: int) -> tuple[str, ...]:
    """A warning, also returned as a note, where the calibration text is short for the second moment of a layer.

    Args:
        tokens: Of the text.
        widest: Inputs of the layer.
        name: Of the layer.
        least: Least rank that a matrix may get. The moments of fewer tokens have a lower rank than what is kept, so
            that the damping alone would choose the rest.

    Raises:
        DataError: If there are fewer than ``least``.
    """
    enough = 4 * widest
    remedy = f"give at least {enough} tokens: more batches or longer ones (in a recipe data.calibration_blocks)"
    if tokens < least:
        raise DataError(f"calibration has {tokens} tokens, fewer than min_rank={least}; {remedy}")
    if tokens >= enough:
        return ()
    lack = "rank-deficient" if tokens < widest else "noisy"
    note = f"calibration has {tokens} tokens, so that the moment of the {widest} inputs of '{name}' is {lack}; {remedy}"
    warn_caller(note)
    return (note,)
