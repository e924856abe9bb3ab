"""What several callbacks ask a trainer for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import lightning.pytorch as pl
from torch import nn

from lowrank_lit.errors import DataError
from lowrank_lit.paging import give_back

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


def calibration_text(trainer: pl.Trainer, user: str, *given: Sequence[Any] | None) -> list[Any]:
    """Calibration batches: the first that are ``given``, else the datamodule's ``calibration_batches()``.

    Args:
        trainer: Of the fit.
        user: Name of the callback that needs them, for errors.
        given: Where they may have been passed to a callback.

    Raises:
        DataError: If there are none.
    """
    for batches in given:
        if batches is not None:
            return list(batches)
    datamodule: Any = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "calibration_batches"):
        raise DataError(f"{user} has no calibration text: pass batches=..., or fit with a TextDataModule")
    return list(datamodule.calibration_batches())
