"""Fitting a compressed model's factors to what the dense model computes, block by block.

A factored block gets other inputs than the dense one: the errors of the blocks before it. Where ``x`` is what a matrix
gets in the dense model and ``z`` what it gets in the compressed one, the best map of ``z`` to the dense output ``W x``
is ``W (I + K)``, ``K = (E[x z^T] - E[z z^T]) E[z z^T]^-1``. The anchored target goes a part ``beta`` of that way,
``W (I + beta K)``, and is truncated in the metric of the compressed inputs (SAES-SVD and AA-SVD, arXiv 2604.02119, are
the cases of a fitted and of a full ``beta``). ``beta`` is chosen for each block by the error of its output on sequences
that were held out of the moments, in the norm of the loss's curvature where gradients are known; then the block is
fitted to all sequences with it. The factors stay as they were where every candidate is clearly worse.

The ranks do not change, and nothing is trained: every step is a closed form on second moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit.linalg import damp, dual_roots, require_finite, to_double
from lowrank_lit.metrics import GRADIENT_SHRINKAGE
from lowrank_lit.paging import Shelf, Workspace, release
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.statistics import LayerStatistics, MomentSum, full_float32, real_tokens, tensors_of, widen
from lowrank_lit.streaming import (
    Batch,
    BlockCalls,
    capture_calls,
    each_in_one_block,
    evaluating,
    layers_inside,
    moved,
    real_positions,
)
from lowrank_lit.surgery import dense_weight

BETAS = (0.0, 0.5, 1.0)
"""Mixing weights that are tried: 0 fits the dense weight to the compressed inputs, 1 the dense output."""

HELD_OUT = 0.2
"""Share of the calibration batches that decide, and are not fitted."""

RIDGE = 1e-3
"""Relative damping of ``E[z z^T]`` where it is solved with: a fit to few tokens goes astray in weak directions."""

SLACK = 1.1
"""Error of a fitted block, relative to the block as it was, above which its factors are kept. The trial fit has not
seen the held-out sequences and the factors before it have, which is worth some per cent."""

_Moments = Mapping[str, tuple[Tensor, Tensor]]

Fit = Callable[[str, Tensor, LayerStatistics], tuple[Tensor, Tensor]]
"""Layer name, target weight and its statistics in, the factors of the truncated weight out."""


@dataclass(frozen=True)
class AnchoredRefit:
    """Result of :func:`anchored_refit`.

    Attributes:
        factors: New factors of every layer whose block was fitted, on the CPU, or mapped from the workspace.
        betas: The weight chosen for each block, by block name; ``None`` where its factors were kept.
        passes: Forward passes, in units of the whole calibration text.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    betas: dict[str, float | None]
    passes: float


def held_out(batches: int) -> range:
    """Numbers of the batches that decide and are not fitted, the last ones; none where there are fewer than two."""
    return range(batches - max(1, round(HELD_OUT * batches)), batches) if batches > 1 else range(0)


@contextmanager
def substituted(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Linear layers compute with other weights for the time of the context; nothing is copied back.

    Args:
        layers: ``nn.Linear`` or ``Conv1D``, by name.
        weights: ``(rows, columns)`` by name; cast to the layer's dtype and device. Layers without one keep theirs.

    Raises:
        NonFiniteError: If a weight is not finite in the layer's dtype; names the layer.
    """
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for name, weight in weights.items():
            parameter = cast(nn.Parameter, layers[name].weight)
            turned = dense_weight(layers[name]) is not parameter  # Conv1D stores (columns, rows)
            value = (weight.mT if turned else weight).to(parameter.device, parameter.dtype).contiguous()
            require_finite(value, f"the compressed weight of layer '{name}'")
            release([value])
            own.append((parameter, parameter.data))
            parameter.data = value
        yield
    finally:
        for parameter, data in reversed(own):
            parameter.data = data.to(parameter.device)


def anchored_refit(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    fit: Fit,
    *,
    betas: Sequence[float] = BETAS,
    device: torch.device | str | None = None,
    workspace: Workspace | None = None,
) -> AnchoredRefit | None:
    """Fit the factors of every block, in order, to the outputs of the dense model on the inputs that they really get.

    The dense and the compressed model run side by side, one block at a time; the model is left as it was.

    Args:
        model: The dense model.
        batches: Calibration batches, at least two.
        layers: All target layers by name, each in exactly one block.
        weights: Present compressed weights ``(rows, columns)`` of the layers to fit; the others stay dense.
        statistics: Of the layers; their gradient moments are kept.
        fit: Truncates a target weight given its statistics, on the device.
        betas: Mixing weights to try.
        device: Where to compute; ``None`` is where the model is.
        workspace: Where new factors, and hidden states beyond its budget, wait; ``None`` keeps all in memory. What is
            mapped from files is dropped from memory after each block.

    Returns:
        ``None`` where the model's blocks are no chain, or there is nothing to hold out. A layer whose inputs in the two
        models cannot be paired (a router sends it other tokens) keeps its factors.

    Raises:
        NonFiniteError: If the compressed model's activations are NaN or infinite; names the layer.
    """
    blocks = find_repeating_blocks(model)
    if not held_out(len(batches)) or not each_in_one_block(layers, blocks):
        return None
    with torch.no_grad(), full_float32(), evaluating(model):
        calls = capture_calls(model, blocks, batches)
        if calls is None:
            return None
        streams = _Streams(calls, batches, workspace)
        share = len(streams.held) / len(batches)
        result = AnchoredRefit({}, {}, 3 + share * (1 + len(betas)))
        for index, (name, block) in enumerate(tqdm(blocks, desc="fitting", unit="block", disable=None, leave=False)):
            inside = layers_inside(layers, block)
            with moved(block, device) as place:
                stage = _Stage(index, block, layers_inside({key: layers[key] for key in weights}, block), place)
                own = {key: weights[key] for key in stage.layers}
                root = _output_root(streams, stage, inside, statistics)
                found = _fit_block(streams, stage, own, statistics, root, fit, betas)
                streams.advance(stage, found.weights)
            result.betas[name] = found.beta
            for key, factors in found.factors.items():
                result.factors[key] = _waiting(factors, dense_weight(layers[key]).dtype, workspace)
            if workspace is not None:
                moments = [value for key in inside for value in tensors_of(statistics[key]).values()]
                release([*block.parameters(), *own.values(), *moments])
    return result


def _waiting(factors: tuple[Tensor, Tensor], dtype: torch.dtype, workspace: Workspace | None) -> tuple[Tensor, Tensor]:
    """Factors for a layer of a dtype, in float32 at least, where they wait for the end of the refit."""
    kind = torch.promote_types(dtype, torch.float32)
    outer, inner = (part.to("cpu", kind) for part in factors)
    if workspace is None:
        return outer, inner
    kept = workspace.keep({"outer": outer, "inner": inner})
    return kept["outer"], kept["inner"]


@dataclass(frozen=True)
class _Stage:
    """One block where it is computed with, and the layers in it that are fitted."""

    index: int
    block: nn.Module
    layers: Mapping[str, nn.Module]
    place: torch.device | None


@dataclass
class _Candidate:
    """Weights of one block, how they came about, and the error of its output on the held-out batches."""

    beta: float | None
    weights: Mapping[str, Tensor]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    error: float = math.inf


class _Streams:
    """Hidden states of the dense and of the compressed model between two blocks, for every batch."""

    def __init__(
        self, calls: Sequence[BlockCalls], batches: Sequence[Batch], workspace: Workspace | None = None
    ) -> None:
        self.calls = calls
        self.masks = [real_positions(batch) for batch in batches]
        # Before and after a block, of the dense and of the compressed model.
        self.shelf = Shelf(workspace, [call.states.nbytes for call in calls], copies=4)
        self.dense = [self.shelf.put(number, call.states) for number, call in enumerate(calls)]
        for call in calls:
            call.hidden = None
        self.compressed = list(self.dense)
        self.after: list[Tensor] = []  # the dense block's outputs
        self.held = held_out(len(calls))

    def run(self, stage: _Stage, number: int, hidden: Tensor) -> Tensor:
        """What the block as it is returns for hidden states of a batch."""
        output = self.calls[number].run(stage.block, stage.index, hidden, stage.place)
        self.shelf.leave(number, hidden)
        return output

    def outputs(
        self, stage: _Stage, weights: Mapping[str, Tensor], numbers: Sequence[int]
    ) -> Iterator[tuple[int, Tensor]]:
        """What the block with these weights returns for the compressed model's hidden states of some batches, with
        their numbers."""
        with substituted(stage.layers, weights):
            for number in numbers:
                yield number, self.run(stage, number, self.compressed[number])

    def error(self, stage: _Stage, weights: Mapping[str, Tensor], root: Tensor | None) -> float:
        """Squared distance of the block's output from the dense one's over the held-out tokens, in the norm of
        ``root root^T``."""
        total = 0.0
        for number, output in self.outputs(stage, weights, self.held):
            wide = widen(real_tokens(output - self.after[number], self.masks[number]))
            self.shelf.leave(number, self.after[number])
            wide = wide if root is None else wide @ root.to(wide)
            total += float(wide.square().sum(dtype=torch.float64))
        return total

    def advance(self, stage: _Stage, weights: Mapping[str, Tensor]) -> None:
        """Both models go on to the next block."""
        for number, output in self.outputs(stage, weights, range(len(self.calls))):
            self.compressed[number] = self.shelf.put(number, output)
        self.dense, self.after = self.after, []
        for call in self.calls:
            call.arguments[stage.index] = ((), {})


def _fit_block(
    streams: _Streams,
    stage: _Stage,
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    root: Tensor | None,
    fit: Fit,
    betas: Sequence[float],
) -> _Candidate:
    fitted, everything = _paired_moments(streams, stage, weights)
    kept = _Candidate(None, weights, {})
    if not fitted:
        return kept
    kept.error = streams.error(stage, weights, root)
    tried = []
    for beta in betas:
        candidate = _candidate(beta, fitted, stage.layers, weights, statistics, fit)
        candidate.error = streams.error(stage, candidate.weights, root)
        tried.append(candidate)
    best = min(tried, key=lambda candidate: candidate.error)
    if best.beta is None or not best.error <= SLACK * kept.error:
        return kept
    return _candidate(best.beta, everything, stage.layers, weights, statistics, fit)


def _candidate(
    beta: float,
    moments: _Moments,
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    statistics: Mapping[str, LayerStatistics],
    fit: Fit,
) -> _Candidate:
    """The block's weights fitted to the moments with the mixing weight ``beta``."""
    factors = {}
    for name, (own, cross) in moments.items():
        dense = to_double(dense_weight(layers[name]))
        ahead = beta * _correction(name, own, cross)
        factors[name] = fit(name, dense + dense @ ahead, _anchored_statistics(statistics[name], own, ahead))
    return _Candidate(beta, {**weights, **{name: outer @ inner for name, (outer, inner) in factors.items()}}, factors)


def _output_root(
    streams: _Streams, stage: _Stage, layers: Mapping[str, nn.Module], statistics: Mapping[str, LayerStatistics]
) -> Tensor | None:
    """Root of the loss's curvature at a block's output, ``(width, width)``; ``None`` where it is not known.

    A layer that moves the block's output by just as much as its own output moves, such as the last projection of a
    block with its norms in front, gets the gradient of the block's output.
    """
    width = streams.dense[0].shape[-1]
    for name in reversed(list(layers)):
        moment = statistics[name].gradient_moment
        if moment is not None and len(moment) == width and moment.any() and _moves(streams, stage, layers[name]):
            return dual_roots(damp(moment.to(stage.place), GRADIENT_SHRINKAGE))[0]
    return None


def _moves(streams: _Streams, stage: _Stage, layer: nn.Module) -> bool:
    """Whether what is added to a layer's output comes out of the block as it is."""
    hidden = streams.dense[0]
    step = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden) * hidden.std()
    before = streams.run(stage, 0, hidden)
    hook = layer.register_forward_hook(lambda _, __, output: output + step.to(output.device))
    try:
        difference = streams.run(stage, 0, hidden) - before - step
    finally:
        hook.remove()
    return float(widen(difference).square().mean()) < 0.01 * float(widen(step).square().mean())


def _paired_moments(streams: _Streams, stage: _Stage, weights: Mapping[str, Tensor]) -> tuple[_Moments, _Moments]:
    """``E[z z^T]`` and ``E[x z^T]`` of every layer, over the fitted batches and over all; the dense outputs are kept.

    A layer is left out where some batch gives it other than one vector per token of the block, once.
    """
    sums: dict[tuple[str, ...], tuple[_PairSum, _PairSum]] = {}
    inputs = _Inputs()
    unpaired: set[str] = set()
    with ExitStack() as hooks:
        for name, layer in stage.layers.items():
            hooks.callback(layer.register_forward_pre_hook(inputs.hook(name)).remove)
        streams.after = []
        for number, hidden in enumerate(streams.dense):
            streams.after.append(streams.shelf.put(number, streams.run(stage, number, hidden)))
            dense = inputs.take(hidden)
            for _ in streams.outputs(stage, weights, [number]):
                pass
            compressed, mask = inputs.take(hidden), streams.masks[number]
            both = [name for name in stage.layers if name in dense and name in compressed]
            unpaired.update(stage.layers.keys() - both)
            for group in _sharers(both, dense, compressed):
                x, z = dense[group[0]], compressed[group[0]]
                if group not in sums:
                    sums[group] = (_PairSum(x.shape[-1], x.device), _PairSum(x.shape[-1], x.device))
                sums[group][number in streams.held].add(real_tokens(x, mask), real_tokens(z, mask))
    paired = {group: pairs for group, pairs in sums.items() if not unpaired.intersection(group)}
    fitted = {name: pairs[0].means() for group, pairs in paired.items() for name in group}
    for own, held in paired.values():
        own.merge(held)
    return fitted, {name: pairs[0].means() for group, pairs in paired.items() for name in group}


class _Inputs:
    """What layers are fed in one run of a block."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {}
        self._last: tuple[Tensor, Tensor] | None = None

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._last is None or self._last[0] is not args[0]:
                self._last = (args[0], args[0].clone())  # a block may write to it later on
            self._seen.setdefault(name, []).append(self._last[1])

        return remember

    def take(self, hidden: Tensor) -> dict[str, Tensor]:
        """Inputs by layer name, of the layers that got one vector per token of ``hidden``; forgets them."""
        tokens = hidden.shape[:-1].numel()
        found = {name: seen[0] for name, seen in self._seen.items() if len(seen) == 1}
        self._seen, self._last = {}, None
        return {name: value for name, value in found.items() if value.shape[:-1].numel() == tokens}


class _PairSum:
    """Sums of ``z z^T`` and ``x z^T`` over tokens."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.own = MomentSum(size, device)
        self.cross = torch.zeros_like(self.own.sum)

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        self.own.add(compressed)
        self.cross += widen(dense).mT @ widen(compressed)

    def merge(self, other: _PairSum) -> None:
        self.own.merge(other.own)
        self.cross = self.cross + other.cross

    def means(self) -> tuple[Tensor, Tensor]:
        return self.own.mean(), self.cross / max(1, self.own.tokens)


def _correction(name: str, own: Tensor, cross: Tensor) -> Tensor:
    """``K = (E[x z^T] - E[z z^T]) E[z z^T]^-1`` of the damped moment, by a Cholesky solve, ``(columns, columns)``."""
    require_finite(own, f"the inputs of layer '{name}' in the compressed model")
    if not bool(own.diagonal().any()):  # it is fed nothing but zeros
        return torch.zeros_like(own)
    triangle = torch.linalg.cholesky(damp(own, RIDGE))
    return torch.cholesky_solve((cross - own).mT, triangle).mT


def _anchored_statistics(statistics: LayerStatistics, moment: Tensor, ahead: Tensor) -> LayerStatistics:
    """Statistics for the target ``W (I + A)``, ``A = beta K``, on the compressed inputs.

    ``W^T C W`` becomes ``(I + A)^T W^T C W (I + A)``; the gradients at the outputs are the same.
    """
    pulled = statistics.pulled_moment
    if pulled is not None:
        pulled = to_double(pulled.to(ahead.device))
        half = pulled + pulled @ ahead
        pulled = half + ahead.mT @ half
    return replace(
        statistics,
        input_moment=moment,
        output_moment=None,
        input_energy=float(moment.trace()),
        pulled_moment=pulled,
    )


def _sharers(
    names: Sequence[str], dense: Mapping[str, Tensor], compressed: Mapping[str, Tensor]
) -> list[tuple[str, ...]]:
    """Layers that are fed the same tensors in both models, in the order of the first of them."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        groups.setdefault((id(dense[name]), id(compressed[name])), []).append(name)
    return [tuple(names) for names in groups.values()]
