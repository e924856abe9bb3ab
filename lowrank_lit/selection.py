"""Choosing among compressed models by what they do to a part of the calibration sequences.

No closed form tells how the errors of many matrices add up over the depth of a network, and which correction helps
depends on the model. Candidates are few and cheap to make, so they are measured: by the KL divergence of the dense
model's next-token predictions from the compressed model's, which needs no labels and has far less noise than a loss.
The statistics have seen these sequences too; the trial fits of a refit have not (:mod:`lowrank_lit.refit`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit import distributed
from lowrank_lit.batches import count_sequences, count_tokens
from lowrank_lit.calibration import own_share
from lowrank_lit.errors import DataError
from lowrank_lit.refit import held_out, substituted
from lowrank_lit.streaming import Batch, evaluating, logits_of, moved, real_positions, to_device

TOKENS = 2**15
"""Tokens to measure on, at least where there are as many: a batch that passes this is the last one."""

LEAST = -1e4
"""Least log-probability, within half precision: a class that a model rules out has no probability either way."""


class Judge:
    """Divergence from the dense model on the calibration batches that the trial fits of a refit hold out.

    Processes that cooperate read a share of these batches each, and all get the divergence over all of them. The dense
    model's log-probabilities are kept in half precision, ``tokens x vocabulary``: 2 GiB for 32,000 classes.

    Args:
        model: The dense model; its logits have one row per token.
        batches: Calibration batches; with fewer than two, all of them judge.
        layers: The target layers by name.
        device: Where to compute; ``None`` is where the model is.

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
    ) -> None:
        self._model, self._layers, self._device = model, layers, device
        self._batches = _enough([batches[number] for number in held_out(len(batches))] or batches)
        self._share = count_sequences(self._batches) / count_sequences(batches)
        self.passes = self._share
        self._mine = own_share(self._batches)
        self._batches = [self._batches[number] for number in self._mine]
        with distributed.together("measuring candidates"), measuring(model, device) as place:
            self._dense = [log_probabilities(model, batch, place).to("cpu", torch.float16) for batch in self._batches]

    def divergence(self, weights: Mapping[str, Tensor]) -> float:
        """:func:`divergence` with ``weights`` ``(rows, columns)`` in the layers, in nats per token."""
        self.passes += self._share
        with (
            distributed.together("measuring candidates"),
            measuring(self._model, self._device) as place,
            substituted(self._layers, weights),
        ):
            sums = divergence_sums(self._model, self._batches, self._dense, place)
        parts = distributed.gather("measuring candidates", dict(zip(self._mine, sums, strict=True)))
        # Added up in the order of the batches: the same for any number of processes.
        return _mean(values for _, values in sorted(entry for part in parts for entry in part.items()))


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
    return _mean(divergence_sums(model, batches, dense, place))


def _mean(sums: Iterable[tuple[float, int]]) -> float:
    total, tokens = 0.0, 0
    for value, count in sums:
        total += value
        tokens += count
    return total / max(1, tokens) if total == total else math.inf


def divergence_sums(
    model: nn.Module, batches: Sequence[Batch], dense: Sequence[Tensor], place: torch.device | None
) -> list[tuple[float, int]]:
    """Sum over tokens and their number for each batch, of which :func:`divergence` is the mean; arguments as there."""
    found = []
    for batch, teacher in zip(batches, dense, strict=True):
        own = log_probabilities(model, batch, place)
        wide = teacher.to(own.device, own.dtype)
        # Half precision rounds the teacher's probabilities; what they then sum to is divided out.
        wide = wide - wide.logsumexp(-1, keepdim=True)
        values = F.kl_div(own, wide, reduction="none", log_target=True).sum(-1)
        mask = real_positions(batch)
        if mask is not None and mask.shape == values.shape:
            values = values[mask.to(values.device)]
        found.append((float(values.double().sum()), values.numel()))
    return found


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
