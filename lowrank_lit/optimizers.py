"""Optimizers by name: AdamW and Lion with their moments in 32 or 8 bits, paged to the host or not.

What is left of a training step's memory once the weights are in 4 bits is mostly the optimizer's: AdamW keeps two
numbers per trained parameter, Lion (arXiv:2302.06675) one. bitsandbytes stores them in 8 bits, in blocks of 256 with a
scale of their own (arXiv:2110.02861); tensors of fewer than 4096 numbers stay in 32 bits. The paged ones live in memory
that the driver moves to the host when the GPU is full (arXiv:2305.14314); on a CPU paging does nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.extras import load_bitsandbytes

_ADAM_BETAS = (0.9, 0.95)
_LION_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class _Kind:
    """An optimizer: its class in ``bitsandbytes.optim`` (``None`` is torch's own AdamW) and its decay rates."""

    name: str | None
    betas: tuple[float, float]


_KINDS = {
    "adamw": _Kind(None, _ADAM_BETAS),
    "adamw8bit": _Kind("AdamW8bit", _ADAM_BETAS),
    "paged_adamw": _Kind("PagedAdamW", _ADAM_BETAS),
    "paged_adamw8bit": _Kind("PagedAdamW8bit", _ADAM_BETAS),
    "lion": _Kind("Lion", _LION_BETAS),
    "lion8bit": _Kind("Lion8bit", _LION_BETAS),
    "paged_lion": _Kind("PagedLion", _LION_BETAS),
    "paged_lion8bit": _Kind("PagedLion8bit", _LION_BETAS),
}

OPTIMIZERS = tuple(_KINDS)
"""The names that :func:`build_optimizer` knows."""


def build_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Make an optimizer of :data:`OPTIMIZERS`.

    Betas are 0.9 and 0.95 for AdamW, 0.9 and 0.99 for Lion. A step of Lion has every entry of size ``learning_rate``,
    so that it wants a rate three to ten times smaller than AdamW. Every name but ``adamw`` needs bitsandbytes.

    Args:
        name: Of the optimizer.
        parameters: What to train, or groups ``{"params": [...], "lr": ...}`` with settings of their own.
        learning_rate: Of the groups without one.
        weight_decay: Decoupled from the gradient; of the groups without one.

    Raises:
        LowRankError: If the name is unknown, bitsandbytes is missing, or a number is negative or not finite.
        ModelError: If there is nothing to train.
    """
    if name not in _KINDS:
        close = difflib.get_close_matches(name, OPTIMIZERS, n=1)
        meant = f"did you mean '{close[0]}'? Known are" if close else "choose one of"
        raise LowRankError(f"optimizer='{name}' is unknown; {meant} {', '.join(OPTIMIZERS)}")
    for setting, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < float("inf"):
            raise LowRankError(f"{setting}={value} is out of range; give a finite number of 0 or more")
    entries: list[Any] = list(parameters)
    if not any(entry["params"] if isinstance(entry, dict) else True for entry in entries):
        raise ModelError(f"optimizer='{name}' has no parameter to train; let one require a gradient")
    kind = _KINDS[name]
    if kind.name is None:
        return torch.optim.AdamW(entries, lr=learning_rate, weight_decay=weight_decay, betas=kind.betas)
    package = load_bitsandbytes(f"optimizer='{name}'")
    optimizer: Optimizer = getattr(package.optim, kind.name)(
        entries, lr=learning_rate, weight_decay=weight_decay, betas=kind.betas
    )
    return optimizer
