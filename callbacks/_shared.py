"""What several callbacks ask a trainer for."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lowrank_lit.batches import CalibrationBatch, as_batches
from lowrank_lit.callbacks._loaders import Enough, drawn_batches, train_loader
from lowrank_lit.callbacks._training_step import TrainingStepLoss, forward_arguments
from lowrank_lit.errors import DataError
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.gradients import Loss, require_next_token_model
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.module import LowRankModule, model_of
from lowrank_lit.paging import give_back
from lowrank_lit.streaming import POSITIONAL, Batch, evaluating, moved, takes, to_device
from lowrank_lit.surgery import find_targets

_Kind = TypeVar("_Kind", bound=pl.Callback)


def callbacks_of(trainer: pl.Trainer) -> list[pl.Callback]:
    """All callbacks, in the order in which they are called."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def find_callback(trainer: pl.Trainer, kind: type[_Kind]) -> _Kind | None:
    """The first callback of a class or a child of it, ``None`` without one."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def forget(trainer: pl.Trainer, parameters: list[nn.Parameter]) -> None:
    """Have the trainer's optimizers let go of parameters that have left the model, with their gradients and states.

    The trainer keeps its optimizers after the fit, and with them whatever they hold. The list is emptied, so that the
    memory can go back to the system at once.
    """
    gone = set(map(id, parameters))
    if not gone:
        return
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    while parameters:
        _drop(trainer, parameters.pop())
    give_back()


def _drop(trainer: pl.Trainer, parameter: nn.Parameter) -> None:
    parameter.grad = None
    for optimizer in trainer.optimizers:
        optimizer.state.pop(parameter, None)


def calibration_text(trainer: pl.Trainer, user: str, *given: Sequence[Any] | None) -> list[Batch]:
    """Batches of :func:`calibration_of` alone, for what needs no loss."""
    return calibration_of(trainer, user, *given)[0]


def calibration_of(
    trainer: pl.Trainer, user: str, *given: Sequence[Any] | None, targets: Sequence[str] | None = None
) -> tuple[list[Batch], Loss | None]:
    """Calibration batches: the first that are ``given``, else the datamodule's ``calibration_batches()``, else rows of
    what the fit trains on; and whose gradients are to be taken.

    Of the training data as many batches are taken as give the widest matrix four tokens for each of its inputs, and 128
    rows, but no more than 1 GiB; the same ones in every run, by no draw of the loader's
    (:func:`lowrank_lit.callbacks._loaders.drawn_batches`). A batch becomes what ``training_step`` hands to the model's
    forward, or, where that does not show, what :func:`lowrank_lit.batches.as_batches` makes of it.

    Args:
        trainer: Of the fit.
        user: Name of the callback that needs them, for errors.
        given: Where they may have been passed to a callback.
        targets: Shell patterns of the layers that will be calibrated.

    Returns:
        The batches, and the loss of ``training_step``: ``None`` where the model predicts next tokens, or where inputs
        alone were given.

    Raises:
        DataError: If there are none.
        ModelError: If the model has no linear layer.
    """
    module = trainer.lightning_module
    model = model_of(module)
    own = next((batches for batches in given if batches is not None), None)
    datamodule: Any = getattr(trainer, "datamodule", None)
    if own is None and hasattr(datamodule, "calibration_batches"):
        own = datamodule.calibration_batches()
    if own is not None:
        listed = [] if isinstance(own, (Tensor, Mapping)) or not isinstance(own, Iterable) else list(own)
        if isinstance(module, LowRankModule) or all(isinstance(batch, Tensor) for batch in listed):
            return list(as_batches(listed or own, model)), None
        found = [_adapted(trainer, model, batch, of_project=_is_of_project(model, batch)) for batch in listed]
    else:
        found = _taken(trainer, user, model, targets)
    if isinstance(module, LowRankModule) or not is_overridden("training_step", module):
        return found, None
    known = _predicts_next_tokens(model, found[0], trainer.strategy.root_device)
    return found, None if known else TrainingStepLoss(trainer, module)


def _taken(trainer: pl.Trainer, user: str, model: nn.Module, targets: Sequence[str] | None) -> list[Batch]:
    """Batches of what the fit trains on, until they are enough."""
    enough = _enough(model, targets)
    with isolate_rng():  # a dataset may draw: the same numbers in every run, and the training's are left alone
        _seed(0)
        found: list[Batch] = []
        for batch in drawn_batches(train_loader(trainer, user), user):
            found.append(_adapted(trainer, model, batch))
            if enough.add(found[-1], batch):
                break
    if not found:
        raise DataError(f"{user} has no calibration text: the train dataloader is empty; pass batches=[...]")
    return found


def _seed(seed: int) -> None:
    """Seed Python, numpy and torch; the caller has kept their states."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _enough(model: nn.Module, targets: Sequence[str] | None) -> Enough:
    """Counts for the widest matrix, of those that are factored already where some are."""
    factored = [module for module in model.modules() if isinstance(module, FactoredLayer)]
    if factored:
        inner = max(factored, key=lambda layer: layer.in_features)
        return Enough(model, inner, inner.in_features)
    with ExpertsApart(model):
        widest = max(find_targets(model, targets).values(), key=lambda target: target.columns)
        return Enough(model, widest.module, widest.columns)


def _is_of_project(model: nn.Module, batch: Any) -> bool:
    """Whether a batch that was given may be one that ``training_step`` takes, for the forward takes no part of it."""
    return not isinstance(batch, Tensor) and not (
        isinstance(batch, Mapping) and any(takes(model, key) for key in batch)
    )


def _adapted(trainer: pl.Trainer, model: nn.Module, batch: Any, *, of_project: bool = True) -> Batch:
    """A batch of the project as the model's forward takes it.

    Args:
        trainer: Of the fit.
        model: What is compressed.
        batch: Of the project.
        of_project: Whether it may be one that ``training_step`` takes.
    """
    module = trainer.lightning_module
    if of_project and not isinstance(module, LowRankModule):
        arguments = forward_arguments(trainer, module, model, batch)
        if arguments:
            return CalibrationBatch(arguments, batch)
    try:
        return as_batches([batch], model)[0]
    except DataError:
        # The forward does not take it, and the loss may: then its rows count, and nothing else is asked of it.
        leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
        first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 1 and leaf.numel()), None)
        if first is None or not of_project:
            raise
        return CalibrationBatch({POSITIONAL: first}, batch)


def _predicts_next_tokens(model: nn.Module, batch: Batch, device: torch.device) -> bool:
    if not any(not value.is_floating_point() and value.ndim == 2 for value in batch.values()):
        return False
    try:
        with moved(model, device) as place, evaluating(model):
            require_next_token_model(model, to_device(dict(batch), place))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a forward of the user's own may raise anything; his training_step then says what is wrong
        return False
    return True
