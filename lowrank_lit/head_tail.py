"""Head and tail of the weights: what the leading components of every matrix compute, what the others do, and the loss
that each has by itself.

The head of a matrix is its truncation ``W_k``, the tail ``W - W_k``. A common picture of low-rank compression says that
the head carries what all inputs have in common and the tail the corrections of single ones. Whether it holds is told
by three measurements: how the outputs of each part lie to the dense outputs on the same inputs, what the mean output
has of each, and on which tokens the loss rises when a part is missing everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit.cuts import Change, LossMeter
from lowrank_lit.evaluation import causal_logits
from lowrank_lit.linalg import to_double
from lowrank_lit.surgery import bias_of, dense_weight


@dataclass(frozen=True)
class PartOutput:
    """What a part of a matrix gives on the inputs that the matrix has in the dense model, beside the whole output
    ``y = W x``, biases left out.

    Attributes:
        cosine: Mean over tokens of ``cos(part, y)``.
        variance: ``(E ||part||^2 - ||E part||^2) / (E ||y||^2 - ||E y||^2)``.
        mean: ``||E part||^2 / ||E y||^2``: of what the outputs of all tokens have in common.
    """

    cosine: float
    variance: float
    mean: float


@dataclass(frozen=True)
class HeadTail:
    """One matrix, split.

    Attributes:
        components: Of the head, out of ``full_rank``.
        full_rank: min(rows, columns).
        tokens: That reached the matrix.
        head: Output of the head.
        tail: Of the tail.
        both: Of both added up, which is the dense output but for rounding.
    """

    components: int
    full_rank: int
    tokens: int
    head: PartOutput
    tail: PartOutput
    both: PartOutput


@dataclass(frozen=True)
class PartLoss:
    """The loss with one part of every split matrix in its place.

    Attributes:
        change: Of the loss over all targets.
        frequent: Rise over the targets that are one of the text's most frequent tokens, which make up half of it.
        rare: Rise over the others.
    """

    change: Change
    frequent: float
    rare: float


class _Sums:
    """Sums over tokens of one part's outputs."""

    def __init__(self, rows: int) -> None:
        self.vector, self.square, self.cosine = torch.zeros(rows, dtype=torch.float64), 0.0, 0.0

    def add(self, part: Tensor, whole: Tensor) -> None:
        self.vector += part.sum(0, dtype=torch.float64).cpu()
        self.square += float(part.square().sum(dtype=torch.float64))
        self.cosine += float(F.cosine_similarity(part, whole, dim=-1).sum(dtype=torch.float64))


class _Split:
    """A hook that computes a layer's parts beside it.

    Args:
        layer: The dense layer.
        head: The weight ``(rows, columns)`` of its head.
    """

    def __init__(self, layer: nn.Module, head: Tensor) -> None:
        weight = dense_weight(layer).detach()
        kind = torch.promote_types(weight.dtype, torch.float32)
        self._head, self._weight = head.to(weight.device, kind), weight.to(kind)
        self._tail = (to_double(weight) - to_double(head.to(weight.device))).to(kind)
        self.sums = {part: _Sums(len(weight)) for part in ("whole", "head", "tail", "both")}
        self.tokens = 0

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs = arguments[0].detach().flatten(0, -2).to(self._head.dtype)
        bias = bias_of(module)
        whole = output.detach().flatten(0, -2).to(inputs)
        whole = whole if bias is None else whole - bias.detach()
        head, tail = F.linear(inputs, self._head), F.linear(inputs, self._tail)
        self.tokens += len(inputs)
        for name, part in (("whole", whole), ("head", head), ("tail", tail), ("both", head + tail)):
            self.sums[name].add(part, whole)

    def result(self, components: int) -> HeadTail | None:
        """``None`` where no token came by."""
        if not self.tokens:
            return None
        parts = {name: self._part(name) for name in ("head", "tail", "both")}
        return HeadTail(components, min(self._head.shape), self.tokens, **parts)

    def _part(self, name: str) -> PartOutput:
        own, whole = self.sums[name], self.sums["whole"]
        return PartOutput(
            own.cosine / self.tokens,
            _share(self._variance(own), self._variance(whole)),
            _share(float(own.vector.square().sum()), float(whole.vector.square().sum())),
        )

    def _variance(self, sums: _Sums) -> float:
        return max(0.0, sums.square / self.tokens - float((sums.vector / self.tokens).square().sum()))


def _share(part: float, whole: float) -> float:
    """Where the whole is nothing, so is the part."""
    return part / whole if whole > 0 else 0.0


@torch.no_grad()
def part_outputs(
    model: nn.Module,
    blocks: Tensor,
    layers: Mapping[str, nn.Module],
    heads: Mapping[str, Tensor],
    components: Mapping[str, int],
    *,
    batch_size: int = 8,
) -> dict[str, HeadTail]:
    """Outputs of head, tail and both of every split matrix, in one pass of the dense model.

    Args:
        model: The dense model where it is to run, in evaluation mode.
        blocks: Token ids ``(n, length)``.
        layers: The layers by name.
        heads: Weights ``(rows, columns)`` of the heads, of the matrices that are split.
        components: Of each head.
        batch_size: Blocks per forward pass.

    Returns:
        By name; an expert that no token reached is left out.
    """
    splits = {name: _Split(layers[name], head) for name, head in heads.items()}
    place = next(model.parameters()).device
    with _hooked(layers, splits):
        for start in range(0, len(blocks), batch_size):
            causal_logits(model, blocks[start : start + batch_size].to(place))
    found = {name: split.result(components[name]) for name, split in splits.items()}
    return {name: entry for name, entry in found.items() if entry is not None}


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], splits: Mapping[str, _Split]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, split in splits.items():
            stack.callback(layers[name].register_forward_hook(split).remove)
        yield


@torch.no_grad()
def part_losses(
    meter: LossMeter, blocks: Tensor, layers: Mapping[str, nn.Module], heads: Mapping[str, Tensor]
) -> dict[str, PartLoss]:
    """Losses with the ``head`` alone everywhere, the ``tail`` alone everywhere, and ``both``, which are the dense
    weights again but for rounding. Matrices without a head stay as they are in all three.

    Args:
        meter: With the dense model's losses.
        blocks: The text that it reads.
        layers: The layers by name.
        heads: As :func:`part_outputs`.
    """
    frequent = frequent_targets(blocks)

    def weight_of(part: str, name: str) -> Tensor:
        head = heads[name]
        if part == "head":
            return head
        tail = (to_double(dense_weight(layers[name]).detach()) - to_double(head)).to(head.dtype)
        return tail if part == "tail" else (to_double(head) + to_double(tail)).to(head.dtype)

    found = {}
    for part in ("head", "tail", "both"):
        losses = meter.with_weights(layers, {name: weight_of(part, name) for name in heads})
        rises = losses - meter.dense
        found[part] = PartLoss(meter.change(losses), _mean(rises[frequent]), _mean(rises[~frequent]))
    return found


def _mean(values: Tensor) -> float:
    """0 where a text is made of so few tokens that there is nothing to take a mean of."""
    return float(values.mean()) if values.numel() else 0.0


def frequent_targets(blocks: Tensor) -> Tensor:
    """Which targets ``(n, length - 1)`` of some blocks are among the most frequent token ids, as few as make up half of
    the targets."""
    targets = blocks[:, 1:]
    counts = torch.bincount(targets.flatten().cpu())
    values, order = counts.sort(descending=True, stable=True)
    enough = int((values.cumsum(0) < targets.numel() / 2).sum()) + 1
    chosen = torch.zeros(len(counts), dtype=torch.bool)
    chosen[order[:enough]] = True
    return chosen[targets.cpu()]
