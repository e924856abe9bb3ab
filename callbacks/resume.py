"""A run that goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lowrank_lit._checkpoints import disk_reason, unwritten

_KEY = "random_states"


class ExactResume(pl.Callback):
    """Make checkpoints whole, and what follows a resume the same as without the interruption.

    Adds to every checkpoint the random states (Python, NumPy, torch, and the GPU's) of every process, and puts them
    back when training goes on. The position in the data is in the loader's own state
    (:class:`lowrank_lit.loader.ResumableLoader`), which Lightning saves; it loads none where the length of an epoch was
    asked for before (``trainer.estimated_stepping_batches`` with ``max_epochs``), so it is loaded here. Checkpoints are
    written beside their name and moved there when they are complete.

    ``lightning run`` adds this callback to every recipe. In a list of callbacks it stands last. A checkpoint in the
    middle of accumulated gradients (``ModelCheckpoint(train_time_interval=...)``) lacks the part that was accumulated;
    ``every_n_train_steps`` writes none of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self._random: dict[str, Any] | None = None
        self._loaders: list[dict[str, Any]] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have checkpoints written at once or not at all, unless the trainer has another way of writing them."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Key ``random_states``: one dictionary per process."""
        states: list[Any] = [_random_states(trainer.strategy.root_device)]
        if dist.is_available() and dist.is_initialized():
            states *= dist.get_world_size()
            dist.all_gather_object(states, states[0])
        checkpoint[_KEY] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what is put back when training starts."""
        states = checkpoint.get(_KEY, [])
        # With more processes than before, the new ones keep the state that they were seeded with.
        self._random = states[trainer.global_rank] if trainer.global_rank < len(states) else None
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        self._loaders = loop.get("state_dict", {}).get("combined_loader", [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the data and the random states where they were; what draws before this draws in vain."""
        loaders = torch.utils._pytree.tree_leaves(trainer.train_dataloader)
        stateful = [loader for loader in loaders if hasattr(loader, "load_state_dict")]
        if len(stateful) == len(self._loaders):
            for loader, state in zip(stateful, self._loaders, strict=True):
                loader.load_state_dict(state)
        if self._random is not None:
            _set_random_states(self._random, trainer.strategy.root_device)
        self._random, self._loaders = None, []


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints that are whole or not there.

    Lightning's own are written to the folder for temporary files and moved, which is a copy where that folder is on
    another disk, and they are first built in memory. Here a checkpoint is written to ``NAME.part`` in its own folder
    and renamed. Addresses such as ``s3://`` are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            ExportError: If the disk is full or read-only; an earlier checkpoint of that name is then left as it was.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())  # a machine that loses its power has the data before the name
            os.replace(part, target)
        except BaseException as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            if isinstance(error, OSError) or (isinstance(error, RuntimeError) and "inline_container" in str(error)):
                raise unwritten(target, disk_reason(error)) from error
            raise


def _random_states(device: torch.device) -> dict[str, Any]:
    """Random states in types that ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
