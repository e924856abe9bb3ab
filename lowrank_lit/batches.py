"""Batches of calibration text: their forms, checks and sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowrank_lit.errors import DataError, warn_caller
from lowrank_lit.streaming import (
    POSITIONAL,
    Batch,
    parameters_of,
    takes,
)

PARTS = 5
"""Batches that a single one is split into, so that a fifth of the sequences can be held out."""


_TARGETS = frozenset({"labels", "label", "targets", "target", "y"})


class CalibrationBatch(dict[str, Tensor]):
    """Keyword arguments for the model, with the batch that they were taken from.

    Args:
        arguments: What the model's forward takes; :data:`POSITIONAL` names its first positional argument.
        given: The whole batch, targets included, as a loss of the caller's reads it.
    """

    def __init__(self, arguments: Mapping[str, Tensor], given: Any) -> None:
        super().__init__(arguments)
        self.given = given


def given_batch(batch: Batch) -> Any:
    """The batch as its owner gave it, targets included."""
    return batch.given if isinstance(batch, CalibrationBatch) else batch


def as_batches(batches: Sequence[Any] | Any, model: nn.Module | None = None) -> list[dict[str, Tensor]]:
    """Calibration batches in one form: dictionaries of keyword arguments for the model, labels left out.

    Args:
        batches: An iterable of dictionaries (``input_ids``, optionally ``attention_mask``), of tensors, which the model
            takes as its first positional argument (token ids ``(batch, length)``, features ``(batch, ..., columns)``),
            or of tuples whose first element is one of these.
        model: With it, a dictionary may have entries that its forward does not take, which are left out; where it takes
            none of them, its first tensor of two dimensions or more that is not called a label or target is the first
            positional argument. A tuple gives as many arguments as the forward has without a default.

    Returns:
        :class:`CalibrationBatch`; one that is given is taken as it is.

    Raises:
        DataError: If there is none, one has another form, or a batch holds no tokens.
    """
    single = isinstance(batches, Mapping) or (isinstance(batches, Tensor) and batches.ndim < 3)
    if single or not isinstance(batches, Iterable):
        hint = ", such as [batches]" if single else ""
        raise DataError(f"batches is a {type(batches).__name__}; give a list of calibration batches{hint}")
    result: list[dict[str, Tensor]] = []
    for number, batch in enumerate(batches):
        tensors = dict(batch) if isinstance(batch, CalibrationBatch) else _arguments(number, batch, model)
        if not tensors or any(value.numel() == 0 for value in tensors.values()):
            raise DataError(f"calibration batch {number} is empty; give at least one sequence per batch")
        _check_shapes(number, tensors)
        result.append(CalibrationBatch(tensors, batch.given if isinstance(batch, CalibrationBatch) else batch))
    if not result:
        raise DataError("batches is empty; give at least one calibration batch")
    return result


def _arguments(number: int, batch: Any, model: nn.Module | None) -> dict[str, Tensor]:
    """What the forward takes of a batch."""
    if isinstance(batch, (tuple, list)) and batch:
        required = [] if model is None else [entry.name for entry in parameters_of(model) if _is_required(entry)]
        if 1 < len(required) <= len(batch) and all(isinstance(part, Tensor) for part in batch[: len(required)]):
            return dict(zip(required, batch, strict=False))
        batch = batch[0]
    if isinstance(batch, Tensor):
        return {POSITIONAL: batch}
    if not isinstance(batch, Mapping):
        raise DataError(
            f"calibration batch {number} is a {type(batch).__name__}; give dictionaries with input_ids, or tensors"
        )
    tensors = {str(key): value for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}
    taken = {key: value for key, value in tensors.items() if model is None or takes(model, key)}
    if taken or not tensors:
        return taken
    inputs = [value for key, value in tensors.items() if key not in _TARGETS and value.ndim > 1]
    if not inputs:
        raise DataError(
            f"calibration batch {number} has {', '.join(tensors)}, of which the forward of {type(model).__name__} "
            "takes none; give dictionaries of its arguments"
        )
    return {POSITIONAL: inputs[0]}


def _is_required(entry: inspect.Parameter) -> bool:
    return entry.kind is entry.POSITIONAL_OR_KEYWORD and entry.default is entry.empty


def split_single(batches: Sequence[Batch], *, whole: bool = False) -> Sequence[Batch]:
    """A single batch as up to :data:`PARTS`, by its sequences; several batches as they are.

    Args:
        batches: From :func:`as_batches`.
        whole: Whether what a part was taken from has to be split with it, for a loss that reads the targets; a batch of
            which that cannot be split, for it holds more than tensors with a row per sequence, stays as it is.
    """
    batch = batches[0]
    sizes = {len(value) if value.ndim else 0 for value in batch.values()}
    count = min(PARTS, *sizes)
    if len(batches) > 1 or len(sizes) > 1 or count < 2:  # of several sizes, one is shared by all sequences
        return batches
    pieces = zip(*(value.tensor_split(count) for value in batch.values()), strict=True)
    parts: list[Batch] = [dict(zip(batch, values, strict=True)) for values in pieces]
    if whole:
        given = _split(given_batch(batch), count, sizes.pop())
        parts = [CalibrationBatch(part, own) for part, own in zip(parts, given, strict=False)]
    return parts if parts and all(count_tokens(part) for part in parts) else batches


def _split(given: Any, count: int, rows: int) -> list[Any]:
    """A batch in parts by its rows; none where one of its leaves is no tensor of as many."""
    leaves, form = tree_flatten(given)
    if not all(isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows for leaf in leaves):
        return []
    pieces = zip(*(leaf.tensor_split(count) for leaf in leaves), strict=True)
    return [tree_unflatten(list(values), form) for values in pieces]


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
    return (first.shape[:-1] if first.is_floating_point() and first.ndim > 1 else first.shape[:2]).numel()


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
