"""What the loss does when weights are changed for a moment, and LASER: one matrix at a time cut to a low rank.

LASER (Sharma, Ash and Misra 2023, arXiv:2312.13558) replaces one weight matrix of one layer by the best approximation
of a share of its rank, and leaves all others as they are. Each cell here is such a cut; the dense weight is back, the
very same memory, before the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit.collection import Collection, require_finite_weights
from lowrank_lit.collector import Calibration
from lowrank_lit.errors import DataError, LowRankError
from lowrank_lit.evaluation import exp_of, token_losses
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.metrics import moments_of
from lowrank_lit.overview import kinds_of
from lowrank_lit.refit import substituted
from lowrank_lit.spectrum import compute_spectrum
from lowrank_lit.statistics import LayerStatistics
from lowrank_lit.streaming import evaluating, moved
from lowrank_lit.surgery import dense_weight, find_targets

KEEP_SHARES = (0.8, 0.6, 0.4, 0.2, 0.1, 0.05)
"""Shares of the full rank that :func:`laser` keeps by default."""

CLEAR = 2.0
"""Standard errors by which a loss has to fall for a cell to count as clearly better."""


@dataclass(frozen=True)
class Change:
    """The loss of a changed model on a text, beside the dense model's on the same text.

    Attributes:
        loss: Mean next-token loss, nats per token.
        rise: The same less the dense model's; below 0 where the change is an improvement.
        error: Standard error of the rise over the blocks, which are compared in pairs; ``None`` for a single block, or
            where the loss is infinite.
    """

    loss: float
    rise: float
    error: float | None


class LossMeter:
    """Losses of a model on one text, with the dense model's known.

    Args:
        model: The dense model, on the device that it is to run on.
        blocks: Token ids ``(n, length)``, as :func:`lowrank_lit.perplexity` takes them.
        batch_size: Blocks per forward pass.

    Attributes:
        dense: The dense model's losses, nats, ``(n, length - 1)`` float64.

    Raises:
        LowRankError: As :func:`lowrank_lit.perplexity`.
    """

    def __init__(self, model: nn.Module, blocks: Tensor, batch_size: int = 8) -> None:
        self._model, self._blocks, self._batch_size = model, blocks, batch_size
        self.dense = self.losses()

    @property
    def dense_loss(self) -> float:
        """Mean of the dense model's losses, nats per token."""
        return float(self.dense.mean())

    def losses(self) -> Tensor:
        """Losses of the model as it is at present, nats, ``(n, length - 1)`` float64."""
        return torch.stack(token_losses(self._model, self._blocks, batch_size=self._batch_size))

    def with_weights(self, layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Tensor:
        """Losses with other weights ``(rows, columns)`` in some layers; the model is then as it was, bit for bit."""
        with substituted(layers, weights):
            return self.losses()

    def change(self, losses: Tensor) -> Change:
        """Losses of a changed model beside the dense one's."""
        rises = (losses - self.dense).mean(1)
        known = len(rises) > 1 and bool(torch.isfinite(rises).all())
        error = float(rises.std()) / math.sqrt(len(rises)) if known else None
        return Change(float(losses.mean()), float(losses.mean()) - self.dense_loss, error)


@dataclass(frozen=True)
class LaserCell:
    """One matrix cut, everything else dense.

    Attributes:
        name: Of the matrix.
        kind: Projection, as :func:`lowrank_lit.overview.kinds_of` names it.
        block: Number of the block, if any.
        keep_share: Share of the full rank that was asked for.
        rank: What was kept of ``full_rank``: the share of it, rounded down, and 1 at least.
        full_rank: min(rows, columns).
        perplexity: With this cut.
        change: Of the loss.
    """

    name: str
    kind: str
    block: int | None
    keep_share: float
    rank: int
    full_rank: int
    perplexity: float
    change: Change

    @property
    def improves(self) -> bool:
        """Whether the loss is below the dense model's, by however little."""
        return self.change.rise < 0

    @property
    def clearly(self) -> bool:
        """Whether it is below it by more than :data:`CLEAR` standard errors."""
        return self.change.error is not None and self.change.rise < -CLEAR * self.change.error


@dataclass(frozen=True)
class Laser:
    """All cells of a sweep.

    Attributes:
        metric: In which matrices were cut.
        dense_loss: Of the dense model, nats per token.
        tokens: Targets that losses are means over.
        cells: In the order of the model, largest share first.
        notes: Remarks for the reader.
    """

    metric: str
    dense_loss: float
    tokens: int
    cells: tuple[LaserCell, ...]
    notes: tuple[str, ...] = ()

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of the dense model on the same text."""
        return exp_of(self.dense_loss)

    @property
    def best(self) -> LaserCell:
        """The cell of least loss, better than the dense model or not."""
        return min(self.cells, key=lambda cell: cell.change.loss)


@torch.no_grad()
def laser(
    model: nn.Module,
    blocks: Tensor,
    *,
    keep_shares: Sequence[float] = KEEP_SHARES,
    metric: str = "identity",
    batches: Sequence[Any] | None = None,
    targets: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    after: Callable[[LaserCell], None] | None = None,
) -> Laser:
    """Measure a language model with each target matrix alone cut to each share of its rank (LASER, arXiv:2312.13558).

    The model is left as it is; a cell costs one pass over ``blocks``. A matrix has one decomposition for all shares.

    Args:
        model: A dense causal language model.
        blocks: Token ids ``(n, length)`` to measure on, as :func:`lowrank_lit.perplexity` takes them.
        keep_shares: Shares of the full rank to keep, in (0, 1).
        metric: In which components are small: ``identity`` is the paper's plain SVD; others need ``batches``.
        batches: Calibration batches, see :func:`lowrank_lit.compress`.
        targets: Shell patterns of layer names, or ``None`` for all that a compression would take.
        device: Where to compute; ``None`` is where the model is.
        after: Called with every cell when it is measured.

    Raises:
        LowRankError: If a share or the metric is unknown or out of range, or batches are missing; and as
            :func:`lowrank_lit.perplexity`.
    """
    _check(keep_shares, metric, batches)
    shares = sorted(set(keep_shares), reverse=True)
    with ExpertsApart(model):
        layers = {name: target.module for name, target in find_targets(model, targets).items()}
        require_finite_weights(model)
        found = Calibration()
        if batches is not None and moments_of(metric):
            collection = Collection(model, batches, targets, device)
            found = collection.calibration(moments_of(metric), importance=False, labels="model")
        with moved(model, device), evaluating(model):
            meter = LossMeter(model, blocks)
            cells = []
            for cell in _cells(layers, found.statistics, meter, shares, metric):
                cells.append(cell)
                if after is not None:
                    after(cell)
    if not cells:
        raise LowRankError("every target has a single row or column, of which nothing can be cut; choose other targets")
    return Laser(metric, meter.dense_loss, meter.dense.numel(), tuple(cells), found.notes)


def _cells(
    layers: Mapping[str, nn.Module],
    statistics: Mapping[str, LayerStatistics],
    meter: LossMeter,
    shares: Sequence[float],
    metric: str,
) -> Iterator[LaserCell]:
    kinds = kinds_of(layers)
    for name, layer in tqdm(layers.items(), desc="cutting", unit="matrix", disable=None, leave=False):
        spectrum = compute_spectrum(dense_weight(layer), statistics.get(name), metric=metric, name=name)
        full = len(spectrum.singular_values)
        for share, rank in _ranks(full, shares):
            cut = spectrum.truncated(dense_weight(layer), rank)
            change = meter.change(meter.with_weights(layers, {name: cut}))
            yield LaserCell(name, *kinds[name], share, rank, full, exp_of(change.loss), change)


def _check(keep_shares: Sequence[float], metric: str, batches: Sequence[Any] | None) -> None:
    if not keep_shares:
        raise LowRankError("keep_shares is empty; give shares of the full rank, such as 0.5")
    for share in keep_shares:
        if not 0 < share < 1:
            raise LowRankError(f"keep share {share:g} is outside (0, 1); it is the share of the full rank to keep")
    if moments_of(metric) and batches is None:
        raise DataError(f"metric='{metric}' needs calibration batches; give batches, or metric='identity'")


def _ranks(full: int, shares: Sequence[float]) -> Iterator[tuple[float, int]]:
    for share in shares:
        rank = max(1, math.floor(share * full + 1e-9))
        if rank < full:
            yield share, rank
