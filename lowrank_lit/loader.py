"""Shuffled batches whose order and position survive an interrupted run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lowrank_lit.errors import DataError


def shuffled_loader(
    dataset: Dataset[Any], batch_size: int, *, seed: int | None = None, replicas: int = 1, rank: int = 0
) -> ResumableLoader:
    """Batches of one process, shuffled anew in every epoch.

    The order is a function of seed and epoch alone: all processes share it and take every ``replicas``-th sample of it.
    An incomplete last batch is left out, unless it is the only one.

    Args:
        dataset: Sized, with samples by index.
        batch_size: Samples per batch and process.
        seed: By default that of ``seed_everything``, or 0 where nothing was seeded.
        replicas: Number of processes.
        rank: Which of them this is.
    """
    sampler = EpochSampler(
        dataset,
        num_replicas=replicas,
        rank=rank,
        seed=int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed,
        drop_last=len(dataset) >= replicas,  # type: ignore[arg-type]
    )
    # With a generator of its own the loader leaves the global one, which dropout draws from, as it was.
    return ResumableLoader(
        dataset, batch_size, sampler=sampler, drop_last=len(sampler) >= batch_size, generator=torch.Generator()
    )


class EpochSampler(DistributedSampler[Any]):
    """``DistributedSampler`` that can begin inside an epoch.

    Attributes:
        start: Samples of this process that the next pass leaves out at its beginning.
    """

    start = 0

    def __iter__(self) -> Iterator[Any]:
        """Indices of this process's samples."""
        # torch adds epoch and seed, so that epoch 1 of seed 0 would be epoch 0 of seed 1.
        own, self.seed = self.seed, self.seed << 20
        try:
            return islice(super().__iter__(), self.start, None)
        finally:
            self.seed = own


class ResumableLoader(DataLoader[Any]):
    """``DataLoader`` over an :class:`EpochSampler` with the state that Lightning keeps in a checkpoint.

    The state counts the batches that have been taken, not those that worker processes have read ahead. Nothing is read
    before the first batch is asked for, so that a state may be loaded after ``iter()``.
    """

    _taken = 0
    _resume: tuple[int, int] | None = None  # epoch and batch to begin at

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Batches from the position loaded last, where it is of the sampler's epoch, else from the beginning."""
        sampler, resume = self.sampler, self._resume
        self._taken, self._resume = 0, None
        if isinstance(sampler, EpochSampler):
            self._taken = resume[1] if resume is not None and resume[0] == sampler.epoch else 0
            sampler.start = self._taken * (self.batch_size or 1)
        for batch in super().__iter__():
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Seed, epoch and batches taken, with the sizes that give them a meaning."""
        sampler = self.sampler
        if not isinstance(sampler, EpochSampler):  # Lightning has put in one of its own, to overfit batches
            return {}
        epoch, taken = self._resume or (sampler.epoch, self._taken)
        return {
            "seed": sampler.seed,
            "epoch": epoch,
            "batch": taken,
            "batch_size": (self.batch_size or 1) * sampler.num_replicas,
            "samples": len(self.dataset),  # type: ignore[arg-type]
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state; the seed is the state's from then on.

        Another number of processes or batch size is allowed: samples are then counted.

        Raises:
            DataError: If the state is of another training text.
        """
        sampler = self.sampler
        if not state or not isinstance(sampler, EpochSampler):
            return
        own = len(self.dataset)  # type: ignore[arg-type]
        if state["samples"] != own:
            raise DataError(
                f"the checkpoint was made with {state['samples']} training samples and not {own}; "
                "resume with the data.sources.train, tokenizer and block_size that made it"
            )
        sampler.seed = state["seed"]
        sampler.set_epoch(state["epoch"])
        together = (self.batch_size or 1) * sampler.num_replicas
        self._resume = (state["epoch"], state["batch"] * state["batch_size"] // together)
