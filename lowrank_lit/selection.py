"""Choosing among compressed models by what they do to a part of the calibration sequences.

No closed form tells how the errors of many matrices add up over the depth of a network, and which correction helps
depends on the model. Candidates are few and cheap to make, so they are measured: by the KL divergence of the dense
model's next-token predictions from the compressed model's, which needs no labels and has far less noise than a loss.
The statistics have seen these sequences too; the trial fits of a refit have not (:mod:`lowrank_lit.refit`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit import distributed
from lowrank_lit.batches import count_sequences, count_tokens
from lowrank_lit.calibration import own_share
from lowrank_lit.errors import DataError
from lowrank_lit.paging import Shelf, Workspace, release
from lowrank_lit.refit import held_out, substituted
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.streaming import (
    Batch,
    BlockCalls,
    capture_calls,
    each_in_one_block,
    ending_in,
    evaluating,
    logits_of,
    moved,
    moved_around,
    real_positions,
    to_device,
)

_T = TypeVar("_T")

TOKENS = 2**15
"""Tokens to measure on, at least where there are as many: a batch that passes this is the last one."""

LEAST = -1e4
"""Least log-probability, within half precision: a class that a model rules out has no probability either way."""


class Judge:
    """Divergence from the dense model on the calibration batches that the trial fits of a refit hold out.

    Processes that cooperate read a share of these batches each, and all get the divergence over all of them. The dense
    model's log-probabilities are kept in half precision, ``tokens x vocabulary``: 2 GiB for 32,000 classes, in the
    workspace where there is one. The model is then run one block at a time, on all batches each, where its blocks are a
    chain.

    Args:
        model: The dense model; its logits have one row per token.
        batches: Calibration batches; with fewer than two, all of them judge.
        layers: The target layers by name.
        device: Where to compute; ``None`` is where the model is.
        workspace: Where predictions, and hidden states beyond its budget, wait; ``None`` keeps all in memory.

    Attributes:
        passes: Forward passes so far, in units of the whole calibration text.

    Raises:
        DataError: If the model gives no logits.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        layers: Mapping[str, nn.Module],
        device: torch.device | str | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        self._model, self._layers, self._device, self._workspace = model, layers, device, workspace
        self._batches = _enough([batches[number] for number in held_out(len(batches))] or batches)
        self._share = count_sequences(self._batches) / count_sequences(batches)
        self.passes = self._share
        self._mine = own_share(self._batches)
        self._batches = [self._batches[number] for number in self._mine]
        self._blocks = find_repeating_blocks(model)
        with distributed.together("measuring candidates"):
            self._calls = self._captured()
            self._dense = self._read(lambda _, values: self._waiting(values.to("cpu", torch.float16)))

    def divergence(self, weights: Mapping[str, Tensor]) -> float:
        """:func:`divergence` with ``weights`` ``(rows, columns)`` in the layers, in nats per token."""
        self.passes += self._share
        with distributed.together("measuring candidates"), substituted(self._layers, weights):
            sums = self._read(self._compared)
        parts = distributed.gather("measuring candidates", dict(zip(self._mine, sums, strict=True)))
        # Added up in the order of the batches: the same for any number of processes.
        return _mean(values for _, values in sorted(entry for part in parts for entry in part.items()))

    def _captured(self) -> list[BlockCalls] | None:
        """The blocks' calls, whose arguments no weight of a block changes; ``None`` where the model runs whole."""
        if self._workspace is None or not each_in_one_block(self._layers, self._blocks):
            return None
        with evaluating(self._model), torch.no_grad():
            calls = capture_calls(self._model, self._blocks, self._batches) if self._batches else []
        for call in calls or ():
            call.hidden = self._waiting(call.states)
        return calls

    def _read(self, take: Callable[[int, Tensor], _T]) -> list[_T]:
        """What ``take`` makes of every batch's number and the model's log-probabilities."""
        batches = list(enumerate(self._batches))
        if self._calls is None:
            with measuring(self._model, self._device) as place:
                return [take(number, log_probabilities(self._model, batch, place)) for number, batch in batches]
        shelf = Shelf(self._workspace, [call.states.nbytes for call in self._calls], copies=2)
        states = [call.states for call in self._calls]
        found = []
        with evaluating(self._model), torch.no_grad():
            for index, (_, block) in enumerate(self._blocks):
                with moved(block, self._device) as place:
                    for number, call in enumerate(self._calls):
                        states[number] = shelf.put(number, call.run(block, index, states[number], place))
                release(block.parameters())
            with moved_around(self._model, self._blocks, self._device) as place:
                for number, batch in batches:
                    with ending_in(self._blocks, self._calls[number], to_device(states[number], place)):
                        found.append(take(number, log_probabilities(self._model, batch, place)))
                    shelf.leave(number, states[number])
        release(self._model.parameters())
        return found

    def _waiting(self, values: Tensor) -> Tensor:
        return values if self._workspace is None else self._workspace.keep({"values": values})["values"]

    def _compared(self, number: int, own: Tensor) -> tuple[float, int]:
        found = _divergence_sum(own, self._dense[number], self._batches[number])
        if self._workspace is not None:
            release([self._dense[number]])
        return found


@contextmanager
def measuring(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """The model on the device, in evaluation mode and without gradients; gives the device that it is on."""
    with moved(model, device) as place, evaluating(model), torch.no_grad():
        yield place


def _enough(batches: Sequence[Batch]) -> list[Batch]:
    """The first batches, up to the one that passes :data:`TOKENS`."""
    chosen: list[Batch] = []
    tokens = 0
    for batch in batches:
        if tokens < TOKENS:
            chosen.append(batch)
            tokens += count_tokens(batch)
    return chosen


def divergence(
    model: nn.Module, batches: Sequence[Batch], dense: Sequence[Tensor], place: torch.device | None
) -> float:
    """Mean over tokens of ``KL(dense || model)`` in nats, padding left out; infinite where the model's predictions are
    not finite.

    Args:
        model: The compressed model.
        batches: What it reads.
        dense: Log-probabilities of the dense model for each batch, of :func:`log_probabilities`.
        place: Device of the model.
    """
    pairs = zip(batches, dense, strict=True)
    return _mean(_divergence_sum(log_probabilities(model, batch, place), teacher, batch) for batch, teacher in pairs)


def _mean(sums: Iterable[tuple[float, int]]) -> float:
    total, tokens = 0.0, 0
    for value, count in sums:
        total += value
        tokens += count
    return total / max(1, tokens) if total == total else math.inf


def _divergence_sum(own: Tensor, teacher: Tensor, batch: Batch) -> tuple[float, int]:
    """Sum over a batch's tokens and their number, of which :func:`divergence` is the mean."""
    wide = teacher.to(own.device, own.dtype)
    # Half precision rounds the teacher's probabilities; what they then sum to is divided out.
    wide = wide - wide.logsumexp(-1, keepdim=True)
    values = F.kl_div(own, wide, reduction="none", log_target=True).sum(-1)
    mask = real_positions(batch)
    if mask is not None and mask.shape == values.shape:
        values = values[mask.to(values.device)]
    return float(values.double().sum()), values.numel()


def log_probabilities(model: nn.Module, batch: Batch, place: torch.device | None) -> Tensor:
    """Log-probabilities ``(batch, length, classes)`` of a model's predictions, float32.

    Raises:
        DataError: If the model gives no logits of that shape.
    """
    logits = logits_of(model, to_device(dict(batch), place))
    if logits is None or logits.ndim != 3:
        raise DataError(
            f"measuring candidates needs logits (batch, length, classes), which {type(model).__name__} does not give; "
            "choose preset='unirank', or select=False and an allocator that measures nothing"
        )
    return F.log_softmax(logits.float(), -1).clamp_min(LEAST)
