"""Calibration batches out of the data that a project trains on."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lowrank_lit.batches import count_tokens
from lowrank_lit.errors import DataError, reason_of
from lowrank_lit.streaming import Batch, evaluating, run_model

ROWS = 128
"""Rows (sequences, images) to take at least, where there are as many."""

TOKENS_PER_INPUT = 4
"""Tokens to take for each input of the widest matrix: fewer make its moment noisy."""

MEMORY = 2**30
"""Bytes of batches after which no more are taken."""

_REMEDY = "pass batches=[...] to the callback"


def train_loader(trainer: pl.Trainer, user: str) -> Any:
    """What the fit will train on, before Lightning has set its loop up: the datamodule's or the module's
    ``train_dataloader()``, or what was given to ``trainer.fit``.

    Raises:
        DataError: If there is none, or the hook fails.
    """
    source = getattr(getattr(trainer, "fit_loop", None), "_data_source", None)
    owner = getattr(source, "instance", None)
    if owner is None:
        raise DataError(f"{user} has no calibration text: the trainer has no train dataloader; {_REMEDY}")
    if not isinstance(owner, (pl.LightningDataModule, pl.LightningModule)):
        return owner
    try:
        return owner.train_dataloader()
    except Exception as error:  # a hook of the user's own
        late = isinstance(owner, pl.LightningModule)  # Lightning sets a module up after the callbacks
        raise DataError(
            f"{user} has no calibration text: {type(owner).__name__}.train_dataloader() fails "
            f"({type(error).__name__}: {reason_of(error)}){' before setup()' if late else ''}; {_REMEDY}"
            f"{', or move the data to a LightningDataModule' if late else ''}"
        ) from error


def drawn_batches(loader: Any, user: str) -> Iterator[Any]:
    """Batches of a train loader, the same in every run and process; the loader itself is left as it is.

    Rows of a dataset with a length are taken evenly over all of it, by the loader's batch size and ``collate_fn``, in
    this process; its sampler is not asked, unless it is one of the project's own, of which a copy is. A dataset
    without a length is read from its beginning.

    Raises:
        DataError: If ``loader`` is several loaders, or can be read once only.
    """
    if isinstance(loader, (CombinedLoader, list, tuple, Mapping)):
        raise DataError(f"{user} cannot tell which of several train dataloaders to calibrate on; {_REMEDY}")
    if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
        raise DataError(
            f"{user} cannot calibrate on a {type(loader).__name__}, which the training reads once; {_REMEDY}"
        )
    if not isinstance(loader, DataLoader):
        yield from loader
        return
    for rows in _rows(loader):
        yield loader.collate_fn(rows)


def _rows(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader collates into each batch."""
    data: Any = loader.dataset
    if isinstance(data, IterableDataset):
        if isinstance(data, Iterator):
            raise DataError(f"{type(data).__name__} can be read once only, which is for the training; {_REMEDY}")
        rows = iter(data)
        if loader.batch_size is None:
            yield from rows
            return
        while batch := [row for _, row in zip(range(loader.batch_size), rows, strict=False)]:
            yield batch
        return
    for indices in _indices(loader, len(data)):
        yield [data[index] for index in indices] if isinstance(indices, list) else data[indices]


def _indices(loader: DataLoader[Any], size: int) -> Iterator[Any]:
    """Numbers of the rows of each batch; without automatic batching, of one row, which is a batch."""
    usual = type(loader.sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
    batched: Any = loader.batch_sampler
    if not usual or (batched is not None and type(batched) is not BatchSampler):
        own = batched if batched is not None else loader.sampler
        for indices in copy.deepcopy(own, {id(loader.dataset): loader.dataset}):  # a sampler may draw, or count
            yield list(indices) if batched is not None else indices
        return
    order = spread(size)
    if loader.batch_size is None:
        yield from order
        return
    for start in range(0, size, loader.batch_size):
        if start + loader.batch_size <= size or not loader.drop_last or not start:
            yield order[start : start + loader.batch_size]


class _Spread(Sequence[int]):
    """All of ``0 .. size - 1`` in an order of which every part is spread evenly over the whole."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._step = max(1, round(size * (math.sqrt(5) - 1) / 2))
        while math.gcd(self._step, size) > 1:
            self._step += 1

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(self._size))]
        if not 0 <= place < self._size:
            raise IndexError(place)
        return place * self._step % self._size


def spread(size: int) -> Sequence[int]:
    """The numbers below ``size``, each once, neighbours far apart: a dataset may be sorted by its classes."""
    return _Spread(size)


class Enough:
    """Tells when batches are enough for the widest matrix.

    Args:
        model: What is compressed.
        widest: Its target layer of most inputs.
        columns: How many those are.
    """

    def __init__(self, model: nn.Module, widest: nn.Module, columns: int) -> None:
        self._model, self._widest = model, widest
        self._tokens = TOKENS_PER_INPUT * columns
        self._per_row: float | None = None
        self.rows, self.tokens, self.memory = 0, 0.0, 0

    def add(self, batch: Batch, given: Any) -> bool:
        """Count a batch; whether it was the last one that is needed."""
        rows = len(next(iter(batch.values())))
        if self._per_row is None or not _is_dense(batch):
            self._per_row = self._reaching(batch) if _is_dense(batch) else count_tokens(batch) / max(1, rows)
        self.rows += rows
        self.tokens += rows * self._per_row
        leaves = tree_leaves(dict(given) if isinstance(given, Mapping) else given)
        self.memory += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return (self.rows >= ROWS and self.tokens >= self._tokens) or self.memory >= MEMORY

    def _reaching(self, batch: Batch) -> float:
        """How many vectors of one row reach the widest layer; what the batch looks like where the row does not run."""
        seen: list[int] = []
        handle = self._widest.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
        try:
            with evaluating(self._model), torch.no_grad():
                run_model(self._model, {key: value[:1] for key, value in batch.items()})
        except Exception:  # a forward of the user's own; what cannot run is told of by the calibration
            seen.clear()
        finally:
            handle.remove()
        return float(sum(seen)) or 1.0


def _is_dense(batch: Batch) -> bool:
    """Whether the batch holds images or the like, of which nothing but a forward says how many vectors they become."""
    first = next(iter(batch.values()))
    return first.is_floating_point() and first.ndim > 2
