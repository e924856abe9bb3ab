"""Measuring what happens to a model when one matrix alone is cut; the dense model is left as it was.

Two tables of the field, both by forward passes: ASVD's losses at a few keep ratios (``sensitivity``), and the
divergence from the dense model's predictions at one low rank (``measured``). Only a part of the calibration text is
used, since every matrix needs passes of its own; how many passes over the whole text that amounts to is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit.allocation import MatrixSpec
from lowrank_lit.batches import count_sequences
from lowrank_lit.errors import GradientError
from lowrank_lit.gradients import next_token_loss, predicted_positions, require_next_token_model
from lowrank_lit.refit import substituted
from lowrank_lit.selection import divergence, log_probabilities, measuring
from lowrank_lit.streaming import Batch, to_device

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Keep ratios of a loss table, ASVD's grid."""

PROBE_SHARE = 0.1
"""Rank of a divergence probe, relative to the rank at which two factors store as much as the matrix (LEMS)."""

SEQUENCES = 16
"""Sequences that are measured on."""

Cut = Callable[[str, int], Tensor]
"""Layer name and rank in, weight ``(rows, columns)`` of that rank out."""


def loss_tables(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    specs: Sequence[MatrixSpec],
    cut: Cut,
    *,
    device: torch.device | str | None = None,
    ratios: Sequence[float] = RATIOS,
    sequences: int = SEQUENCES,
) -> tuple[dict[str, dict[float, float]], float]:
    """Next-token loss with each matrix alone cut to each keep ratio.

    Args:
        model: The dense model, a causal language model.
        batches: Calibration batches.
        layers: The matrices' layers by name.
        specs: Of the matrices.
        cut: Gives the weight of a rank.
        device: Where to compute.
        ratios: Keep ratios in (0, 1); one that gives no rank of at least 1 below the break-even is left out.
        sequences: Sequences to measure on.

    Returns:
        Losses in nats per token by name and ratio, and the passes over the whole calibration text that they took.

    Raises:
        GradientError: If the model predicts no next tokens.
    """
    own, share = _part(batches, sequences)
    tables: dict[str, dict[float, float]] = {}
    runs = 0
    with measuring(model, device) as place:
        try:
            require_next_token_model(model, to_device(dict(own[0]), place))
        except GradientError as error:
            raise GradientError(
                f"allocator='sensitivity' measures next-token losses, but {str(error).rpartition(';')[0]}; choose "
                "another allocator, such as knapsack"
            ) from error
        for spec in tqdm(specs, desc="measuring", unit="matrix", disable=None, leave=False):
            table: dict[float, float] = {}
            for ratio in ratios:
                rank = _rank_of(spec, ratio)
                if rank:
                    with substituted(layers, {spec.name: cut(spec.name, rank)}):
                        table[ratio] = _loss(model, own, place)
                    runs += 1
            tables[spec.name] = table
        dense = _loss(model, own, place)
    for table in tables.values():
        table[1.0] = dense
    return tables, (runs + 1) * share


def divergences(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    specs: Sequence[MatrixSpec],
    cut: Cut,
    *,
    device: torch.device | str | None = None,
    sequences: int = SEQUENCES,
) -> tuple[dict[str, tuple[int, float]], float]:
    """KL divergence of the model's predictions from the dense ones with each matrix alone cut to a low rank.

    Args:
        model: The dense model; its logits have one row per token.
        batches: Calibration batches.
        layers: The matrices' layers by name.
        specs: Of the matrices.
        cut: Gives the weight of a rank.
        device: Where to compute.
        sequences: Sequences to measure on.

    Returns:
        Rank and divergence in nats per token by name, of the matrices that have a lower rank, and the passes over the
        whole calibration text that they took.

    Raises:
        DataError: If the model gives no logits.
    """
    own, share = _part(batches, sequences)
    found: dict[str, tuple[int, float]] = {}
    with measuring(model, device) as place:
        dense = [log_probabilities(model, batch, place) for batch in own]
        for spec in tqdm(specs, desc="measuring", unit="matrix", disable=None, leave=False):
            rank = max(1, round(PROBE_SHARE * spec.dense_cost / (spec.rows + spec.columns)))
            if rank >= spec.full_rank:  # a single row or column cannot be cut
                continue
            with substituted(layers, {spec.name: cut(spec.name, rank)}):
                found[spec.name] = (rank, max(0.0, divergence(model, own, dense, place)))
    return found, (len(found) + 1) * share


def _rank_of(spec: MatrixSpec, ratio: float) -> int:
    """Largest rank below the break-even that stores no more than this share of the matrix; 0 where none does."""
    costs = spec.costs(np.arange(1, spec.break_even, dtype=np.int64))
    return int(np.searchsorted(costs, ratio * spec.dense_cost + 1e-6, side="right"))


def _part(batches: Sequence[Batch], sequences: int) -> tuple[list[Batch], float]:
    """The first sequences, and their share of all."""
    part: list[Batch] = []
    for batch in batches:
        left = sequences - count_sequences(part)
        if left > 0:
            part.append({key: value[:left] for key, value in batch.items()})
    return part, count_sequences(part) / count_sequences(batches)


def _loss(model: nn.Module, batches: Sequence[Batch], place: torch.device | None) -> float:
    total, tokens = 0.0, 0
    for batch in batches:
        total += float(next_token_loss(model, to_device(dict(batch), place)))
        tokens += int(predicted_positions(batch).sum())
    return total / max(1, tokens)
