"""Statistics of experts that few tokens reached, shrunk to those of all experts of their block.

A router gives an expert a part of the tokens, and a rare one so few that its moments have next to no rank. With ``t``
tokens behind a moment of size ``d`` the estimate becomes ``(1 - a) own + a pool``, ``a = d / (d + 16 t)``: the pool
where nothing was seen, a seventeenth of it where there were as many tokens as unknown directions, hardly any where
there were many.

What the pool is depends on the space. Inputs of an expert's first matrix and gradients at the outputs of its last one
are hidden states of the model, the same space for all experts: there the pool is the moment over all their tokens.
The space between the two matrices is each expert's own, and channels of different experts have nothing in common: there
it is the identity times the mean variance over all their tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_lit.experts import Side
from lowrank_lit.statistics import LayerStatistics

SMOOTHING = 0.1
"""Share of an expert's frequency that is the mean of all: other text than the calibration's reaches other experts."""

TRUST = 16
"""How much more a token of the expert's own says than one of the pool's: experts are made to see other tokens than the
rest, and a stronger pool costs more than the noise that it takes away (benchmarks/RESULTS.md)."""


def pooled_weight(size: int, tokens: int) -> float:
    """``a = d / (d + 16 t)``, the share of the pool.

    Args:
        size: ``d``, rows of a moment.
        tokens: ``t``, behind it.
    """
    return size / (size + TRUST * tokens)


def pool_experts(
    own: Mapping[str, LayerStatistics],
    side: Side,
    shapes: Mapping[str, tuple[int, int]],
    weight_of: Callable[[str], Tensor],
    *,
    inputs: Tensor | None,
    tokens: int,
) -> dict[str, LayerStatistics]:
    """Statistics of the matrices on one side of a block's experts, pooled, with their ``frequency``.

    Args:
        own: By layer name; one that no token reached has zero tokens and no moments. Some have tokens.
        side: Of all of them.
        shapes: ``(rows, columns)`` of their weights.
        weight_of: Gives a weight ``(rows, columns)``; called where moments of outputs were collected.
        inputs: Second moment ``(columns, columns)`` of the inputs over all tokens of all experts, where moments of the
            outputs were collected on the side ``up``.
        tokens: Of the text.

    Returns:
        The same names, with every moment that some of them had.
    """
    counts = [entry.tokens for entry in own.values()]
    mean = sum(counts) / len(counts)
    entries = list(own.values())
    input_energy = _mean([entry.input_energy for entry in entries], counts)
    gradient_energy = _mean([entry.gradient_energy for entry in entries], counts)
    pools = {field: _pool(entries, field) for field in ("input_moment", "pulled_moment", "gradient_moment")}
    hidden = {"input_moment": side == "up", "pulled_moment": side == "up", "gradient_moment": side == "down"}
    vectors = {field: _pool(entries, field) for field in ("input_magnitude", "fisher_rows", "fisher_columns")}
    wide = any(entry.output_moment is not None for entry in entries)
    result = {}
    for name, entry in own.items():
        rows, columns = shapes[name]
        seen = entry.tokens
        found: dict[str, Tensor | None] = {}
        for field, pool in pools.items():
            if pool is not None:
                target = pool if hidden[field] else _isotropic(pool)
                found[field] = _blend(getattr(entry, field), target, pooled_weight(len(pool), seen))
        if wide:
            weight = weight_of(name).double().cpu()
            scattered = input_energy / columns * (weight @ weight.mT) if inputs is None else weight @ inputs @ weight.mT
            found["output_moment"] = _blend(entry.output_moment, scattered, pooled_weight(rows, seen))
        for field, vector in vectors.items():
            if vector is not None:
                common = (side == "up") == (field != "fisher_rows")
                target = vector if common else torch.full_like(vector, float(vector.mean()))
                found[field] = _blend(getattr(entry, field), target, pooled_weight(1, seen))
        gradients = [other.weight_gradient for other in entries if other.weight_gradient is not None]
        if gradients and entry.weight_gradient is None:
            found["weight_gradient"] = torch.zeros_like(gradients[0])
        a = pooled_weight(rows if wide else columns, seen)
        b = pooled_weight(min(rows, columns), seen)
        result[name] = replace(
            entry,
            input_energy=(1 - a) * entry.input_energy + a * input_energy,
            gradient_energy=(1 - b) * entry.gradient_energy + b * gradient_energy,
            frequency=((1 - SMOOTHING) * seen + SMOOTHING * mean) / max(1, tokens),
            **found,  # type: ignore[arg-type]
        )
    return result


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    return sum(value * count for value, count in zip(values, counts, strict=True)) / max(1, sum(counts))


def _pool(entries: Sequence[LayerStatistics], field: str) -> Tensor | None:
    """The mean over all tokens of a field, ``None`` where no entry has it."""
    total: Tensor | None = None
    for entry in entries:
        value: Tensor | None = getattr(entry, field)
        if value is not None:
            total = value * entry.tokens if total is None else total.add_(value, alpha=entry.tokens)
    return None if total is None else total / max(1, sum(entry.tokens for entry in entries))


def _isotropic(pool: Tensor) -> Tensor:
    return torch.eye(len(pool), dtype=pool.dtype) * (pool.trace() / len(pool))


def _blend(own: Tensor | None, pool: Tensor, share: float) -> Tensor:
    return pool.clone() if own is None else torch.lerp(own, pool, share)
