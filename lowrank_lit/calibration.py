"""Calibration: runs batches through a model and collects what a metric and an allocator need.

A transformer is calibrated block by block: only one decoder or encoder block is on the device at a time, with the
statistics of that block alone, and the hidden states of all batches wait on the CPU (:mod:`lowrank_lit.streaming`). A
model whose blocks are no chain, or with targets outside of them, runs whole instead; the statistics are the same.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit.errors import DataError
from lowrank_lit.residual import BlockCosine, ResidualWatcher, find_repeating_blocks, resolve_importance
from lowrank_lit.statistics import LayerStatistics, MomentSum
from lowrank_lit.streaming import POSITIONAL, Batch, Block, BlockCalls, capture_calls, moved, run_model, to_device

WeightOf = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        statistics: Second moments by layer name; empty where the metric needs none.
        importance: ``1 - cos`` of the sub-block of each layer, by layer name; empty where not asked for.
        tokens: Tokens seen, padding left out.
        mode: ``blocks`` (one block at a time on the device), ``whole``, or ``none`` where nothing had to be collected.
        notes: What a user should know, one sentence each.
    """

    statistics: dict[str, LayerStatistics] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    mode: str = "none"
    notes: tuple[str, ...] = ()


def as_batches(batches: Sequence[Any] | Any) -> list[dict[str, Tensor]]:
    """Calibration batches in one form: dictionaries of keyword arguments for the model, labels left out.

    Args:
        batches: An iterable of dictionaries (``input_ids``, optionally ``attention_mask``), of tensors, which the model
            takes as its first positional argument (token ids ``(batch, length)``, features ``(batch, ..., columns)``),
            or of tuples whose first element is one of these.

    Raises:
        DataError: If there is none, one has another form, or a batch holds no tokens.
    """
    result = []
    for number, batch in enumerate(batches):
        if isinstance(batch, (tuple, list)) and batch:
            batch = batch[0]
        if isinstance(batch, Tensor):
            batch = {POSITIONAL: batch}
        if not isinstance(batch, Mapping):
            raise DataError(
                f"calibration batch {number} is a {type(batch).__name__}; give dictionaries with input_ids, or tensors"
            )
        tensors = {str(key): value for key, value in batch.items() if isinstance(value, Tensor) and key != "labels"}
        if not tensors or any(value.numel() == 0 for value in tensors.values()):
            raise DataError(f"calibration batch {number} is empty; give at least one sequence per batch")
        result.append(tensors)
    if not result:
        raise DataError("batches is empty; give at least one calibration batch")
    return result


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding left out; of features ``(batch, ..., columns)``, the vectors."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    first = next(iter(batch.values()))
    return (first.shape[:-1] if first.is_floating_point() else first.shape[:2]).numel()


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    *,
    weight_of: WeightOf,
    moments: frozenset[str],
    importance: bool,
    device: torch.device | str | None = None,
) -> Calibration:
    """Collect statistics of ``layers`` over ``batches``.

    The model is left as it was found: mode, device, hooks, and the parameters themselves.

    Args:
        model: Called with each batch as keyword arguments.
        batches: See :func:`as_batches`.
        layers: Layers to collect from, by name; each maps ``(..., columns)`` to ``(..., rows)``.
        weight_of: Gives a layer's weight as ``(rows, columns)``.
        moments: What to collect: nothing, or ``{"input"}``.
        importance: Whether to measure the importance of the layers' sub-blocks.
        device: Where to compute; ``None`` is where the model is.

    Raises:
        NonFiniteError: If activations are NaN or infinite; names the layer.
        DataError: If no token reaches some layer.
    """
    if not moments and not importance:
        return Calibration()
    collector = _Collector(layers, weight_of, collect="input" in moments, watch=importance)
    blocks = find_repeating_blocks(model)
    with _frozen_eval(model):
        calls = capture_calls(model, blocks, batches) if _each_in_one_block(layers, blocks) else None
        if calls is None:
            _run_whole(model, batches, collector, blocks, device)
        else:
            _run_blocks(calls, blocks, batches, collector, device)
    return collector.finish("whole" if calls is None else "blocks")


class _Collector:
    """Owns the hooks and sums of one calibration."""

    def __init__(self, layers: Mapping[str, nn.Module], weight_of: WeightOf, *, collect: bool, watch: bool) -> None:
        self.layers = layers
        self.weight_of = weight_of
        self.collect = collect
        self.watcher = (
            ResidualWatcher({name: list(layer.parameters()) for name, layer in layers.items()}) if watch else None
        )
        self.cosines: BlockCosine | None = None
        self.mask: Tensor | None = None
        self.tokens = 0
        self._sums: dict[str, MomentSum] = {}
        self._results: dict[str, LayerStatistics] = {}
        self._energy: dict[str, float] = {}
        # Layers fed the same tensor share one sum; the first of them that is called owns it.
        self._owner: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None

    def count(self, batch: Batch) -> None:
        """Count the tokens of a batch, padding left out."""
        self.tokens += count_tokens(batch)

    @contextmanager
    def on(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks on ``layers`` for the time of the context; their sums are turned into statistics at its end."""
        handles = []
        try:
            if self.collect:
                handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]
            yield
            self._close(layers)
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, batch: Batch, device: torch.device | None) -> Iterator[None]:
        """The context of one forward."""
        mask = batch.get("attention_mask")
        self.mask = None if mask is None or mask.ndim != 2 else mask.bool().to(device)
        with ExitStack() as stack:
            if self.watcher is not None:
                stack.enter_context(self.watcher.batch(self.mask))
            yield
        self._last = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            # The watcher follows the model's own operations; those of the statistics are none of its business.
            with torch._C.DisableTorchFunction():
                self._add(name, layer, args[0])

        return hook

    def _add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        last, sharer = self._last if self._last is not None else (None, name)
        owner = self._owner.setdefault(name, sharer if last is x else name)
        if owner != name:
            if last is not x:  # adding nothing here would leave these tokens out of the sum
                raise DataError(
                    f"layer '{name}' shares its input with '{owner}' in one forward and not in another; "
                    "leave it out of targets"
                )
            return
        rows, columns = self.weight_of(layer).shape
        tokens = self._real_tokens(x)
        total = self._sums.setdefault(name, MomentSum(min(rows, columns), x.device))
        if columns <= rows:
            total.add(tokens)
            self._last = (x, name)
            return
        # The weight is applied here, in float32 or wider: a half-precision layer's own output is rounded.
        wide = tokens if tokens.dtype == torch.float64 else tokens.float()
        self._energy[name] = self._energy.get(name, 0.0) + float(wide.double().square().sum())
        total.add(wide @ self.weight_of(layer).to(wide.dtype).mT)

    def _real_tokens(self, x: Tensor) -> Tensor:
        """Activations ``(..., d)`` as ``(tokens, d)``, padding left out."""
        flat = x.detach().reshape(-1, x.shape[-1])
        if self.mask is not None and self.mask.numel() == len(flat):
            flat = flat[self.mask.reshape(-1)]
        return flat

    def _close(self, layers: Mapping[str, nn.Module]) -> None:
        """Turn the sums of ``layers`` into statistics and let the sums go."""
        own = {name: self._statistics(name, total) for name, total in self._sums.items()}
        for name in layers if self.collect else ():
            statistics = own.get(self._owner.get(name, ""))
            if statistics is None or statistics.tokens == 0:
                raise DataError(
                    f"no calibration token reached layer '{name}'; leave it out of targets, or give text that uses it"
                )
            statistics.check(name)
            self._results[name] = statistics
        self._sums.clear()

    def _statistics(self, name: str, total: MomentSum) -> LayerStatistics:
        moment = total.mean().cpu()  # the device holds the sums of one block at a time
        if name in self._energy:
            return LayerStatistics(total.tokens, None, moment, self._energy[name] / max(1, total.tokens))
        return LayerStatistics(total.tokens, moment, None, float(moment.trace()))

    def finish(self, mode: str) -> Calibration:
        notes: tuple[str, ...] = ()
        importance: dict[str, float] = {}
        if self.watcher is not None:
            fallback = {} if self.cosines is None else self.cosines.importance()
            importance, notes = resolve_importance(list(self.layers), self.watcher.importance(), fallback)
        return Calibration(self._results, importance, self.tokens, mode, notes)


@contextmanager
def _frozen_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _each_in_one_block(layers: Mapping[str, nn.Module], blocks: Sequence[Block]) -> bool:
    """Whether every layer belongs to exactly one block; one shared by blocks has to see the inputs of all of them."""
    counts = Counter(id(module) for _, block in blocks for module in block.modules())
    return all(counts[id(layer)] == 1 for layer in layers.values())


def _run_whole(
    model: nn.Module,
    batches: Sequence[Batch],
    collector: _Collector,
    blocks: Sequence[Block],
    device: torch.device | str | None,
) -> None:
    if collector.watcher is not None and blocks:
        collector.cosines = BlockCosine(dict(blocks))
    with moved(model, device) as place, collector.on(collector.layers):
        for batch in tqdm(batches, desc="calibrating", unit="batch", disable=None, leave=False):
            collector.count(batch)
            inputs = to_device(dict(batch), place)
            with collector.batch(inputs, place), ExitStack() as stack:
                if collector.cosines is not None:
                    stack.enter_context(collector.cosines.batch(collector.mask))
                run_model(model, inputs)


def _run_blocks(
    calls: list[BlockCalls],
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    collector: _Collector,
    device: torch.device | str | None,
) -> None:
    for batch in batches:
        collector.count(batch)
    if collector.watcher is not None:
        collector.cosines = BlockCosine(dict(blocks))
    progress = tqdm(blocks, desc="calibrating", unit="block", disable=None, leave=False)
    for index, (_, block) in enumerate(progress):
        members = {id(module) for module in block.modules()}
        inside = {name: layer for name, layer in collector.layers.items() if id(layer) in members}
        with moved(block, device) as place, collector.on(inside):
            for call, batch in zip(calls, batches, strict=True):
                with collector.batch(batch, place), ExitStack() as stack:
                    if collector.cosines is not None:
                        stack.enter_context(collector.cosines.batch(collector.mask))
                    call.step(block, index, place)


def warn_if_short(tokens: int, widest: int, name: str) -> tuple[str, ...]:
    """A warning, also returned as a note, where the calibration text cannot give second moments of full rank."""
    if tokens >= widest:
        return ()
    note = (
        f"calibration has {tokens} tokens, fewer than the width {widest} of layer '{name}', so that its second moment "
        f"is rank-deficient: give at least {widest} tokens (better {4 * widest}) through calibration_blocks or "
        "longer text"
    )
    warnings.warn(note, stacklevel=3)
    return (note,)
