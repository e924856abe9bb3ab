"""Calibration: runs batches through a model and collects what a metric and an allocator need.

A transformer is calibrated block by block: only one decoder or encoder block is on the device at a time, with the
statistics of that block alone, and the hidden states of all batches wait on the CPU (:mod:`lowrank_lit.streaming`). A
model whose blocks are no chain, or with targets outside of them, runs whole instead; the statistics are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit import distributed
from lowrank_lit.errors import DataError, warn_caller
from lowrank_lit.gradients import (
    GradientCollector,
    Loss,
    SampledTokenLoss,
    WeightOf,
    frozen,
    next_token_loss,
    require_next_token_model,
)
from lowrank_lit.linalg import require_finite
from lowrank_lit.paging import Workspace, release
from lowrank_lit.residual import BlockCosine, ResidualWatcher, find_repeating_blocks, resolve_importance
from lowrank_lit.statistics import (
    BACKWARD_MOMENTS,
    FORWARD_MOMENTS,
    GradientSums,
    InputSums,
    LayerStatistics,
    check_moments,
    full_float32,
    real_tokens,
    stored_statistics,
)
from lowrank_lit.streaming import (
    POSITIONAL,
    Batch,
    Block,
    BlockCalls,
    capture_calls,
    each_in_one_block,
    ending_in,
    evaluating,
    layers_inside,
    moved,
    moved_around,
    real_positions,
    run_model,
    to_device,
)

PARTS = 5
"""Batches that a single one is split into, so that a fifth of the sequences can be held out."""


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
    single = isinstance(batches, Mapping) or (isinstance(batches, Tensor) and batches.ndim < 3)
    if single or not isinstance(batches, Iterable):
        hint = ", such as [batches]" if single else ""
        raise DataError(f"batches is a {type(batches).__name__}; give a list of calibration batches{hint}")
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
        _check_shapes(number, tensors)
        result.append(tensors)
    if not result:
        raise DataError("batches is empty; give at least one calibration batch")
    return result


def split_single(batches: Sequence[Batch]) -> Sequence[Batch]:
    """A single batch as up to :data:`PARTS`, by its sequences; several batches as they are."""
    batch = batches[0]
    sizes = {len(value) if value.ndim else 0 for value in batch.values()}
    count = min(PARTS, *sizes)
    if len(batches) > 1 or len(sizes) > 1 or count < 2:  # of several sizes, one is shared by all sequences
        return batches
    pieces = zip(*(value.tensor_split(count) for value in batch.values()), strict=True)
    parts: list[Batch] = [dict(zip(batch, values, strict=True)) for values in pieces]
    return parts if all(count_tokens(part) for part in parts) else batches


def _check_shapes(number: int, batch: Mapping[str, Tensor]) -> None:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    first = batch.get(POSITIONAL)
    if first is not None and first.ndim < 2:
        raise DataError(
            f"calibration batch {number} is a tensor of shape {tuple(first.shape)}; give token ids (batch, length) or "
            "features (batch, ..., columns)"
        )
    if ids is not None and (ids.ndim != 2 or ids.is_floating_point()):
        raise DataError(
            f"calibration batch {number}: input_ids of shape {tuple(ids.shape)} and type {ids.dtype}; give whole "
            "numbers (batch, length)"
        )
    if ids is not None and mask is not None and mask.ndim == 2:
        if mask.shape != ids.shape:
            raise DataError(
                f"calibration batch {number}: attention_mask {tuple(mask.shape)} does not fit input_ids "
                f"{tuple(ids.shape)}; give one number per token"
            )
        if not bool(mask.any()):
            raise DataError(f"calibration batch {number} is all padding; leave it out")


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch, padding left out; of features ``(batch, ..., columns)``, the vectors."""
    mask = batch.get("attention_mask")
    if mask is not None:
        return int(mask.sum())
    first = next(iter(batch.values()))
    return (first.shape[:-1] if first.is_floating_point() else first.shape[:2]).numel()


def count_sequences(batches: Sequence[Batch]) -> int:
    """Sequences of all batches together."""
    return sum(len(next(iter(batch.values()))) for batch in batches)


def calibrate(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    *,
    weight_of: WeightOf,
    moments: frozenset[str],
    importance: bool,
    device: torch.device | str | None = None,
    loss: Loss | None = None,
    workspace: Workspace | None = None,
) -> Calibration:
    """Collect statistics of ``layers`` over ``batches``, in one pass, whatever is asked for.

    The model is left as it was found: mode, device, hooks, and the parameters themselves, gradients included.

    ===================  ======================================================================  ==========
    moment               what of :class:`~lowrank_lit.statistics.LayerStatistics` it gives       needs
    ===================  ======================================================================  ==========
    ``input``            second moment of the inputs, on the smaller side of the matrix          activations
    ``input_full``       second moment of the inputs                                             activations
    ``magnitude``        mean magnitude of each input channel                                    activations
    ``gradient``         second moment of the output gradients, on the smaller side              gradients
    ``fisher``           row and column sums of the squared gradient of the weight               gradients
    ``weight_gradient``  mean gradient of the weight                                             gradients
    ===================  ======================================================================  ==========

    What needs gradients takes one forward and one backward of the whole model on its device; weights get no gradient.
    With a workspace it goes block by block too: a forward that keeps what every block was fed, and a backward that
    computes one block after the other again, the last one first.

    Processes that cooperate (:mod:`lowrank_lit.distributed`) read a share of the batches each, and all get the
    statistics of all. The share is of whole batches, never a part of one: kernels round by the number of their rows,
    and the statistics of any number of processes are to differ by the order of float64 sums alone. With fewer batches
    than processes some have nothing to read.

    Args:
        model: Called with each batch as keyword arguments.
        batches: See :func:`as_batches`.
        layers: Layers to collect from, by name; each maps ``(..., columns)`` to ``(..., rows)``.
        weight_of: Gives the weight ``W`` ``(rows, columns)`` to form ``W R W^T`` and ``W^T C W`` with, which may be
            another than the layer computes with at present; called where one of the two is collected.
        moments: What to collect; may be empty.
        importance: Whether to measure the importance of the layers' sub-blocks.
        device: Where to compute; ``None`` is where the model is.
        loss: Where gradients are needed: the loss summed over target tokens, in nats. ``None`` is
            :func:`~lowrank_lit.gradients.next_token_loss`.
        workspace: Where statistics, and block inputs beyond its budget, wait; ``None`` keeps all in memory. The weights
            of a block that are mapped from a file are dropped from memory after it.

    Raises:
        LowRankError: If a moment is unknown, or the workspace is full.
        NonFiniteError: If activations or gradients are NaN or infinite; names the layer.
        DataError: If no token reaches some layer.
        GradientError: If there is no next-token loss to differentiate, or its gradients vanish.
    """
    check_moments(moments)
    if not moments and not importance:
        return Calibration()
    collector = _Collector(layers, weight_of, moments, watch=importance, workspace=workspace)
    blocks = find_repeating_blocks(model)
    for batch in batches:
        collector.count(batch)
    mine = own_share(batches)
    own = [batches[number] for number in mine]
    with distributed.together("calibration"), evaluating(model), torch.no_grad():
        backward = bool(moments & BACKWARD_MOMENTS)
        checked = _checked_loss(loss, model, batches, device) if backward else None
        streamed = each_in_one_block(layers, blocks) and (workspace is not None or not backward)
        checked = None if checked is None else _in_turn(checked, batches, mine)
        calls = capture_calls(model, blocks, own or batches[:1]) if streamed else None
        chained = all(distributed.gather("the model's blocks", calls is not None))
        if calls is None or not chained:
            _run_whole(model, own, collector, blocks, device, checked)
            return collector.finish("whole")
        calls = calls[: len(own)]
        if collector.watcher is not None:
            collector.cosines = BlockCosine(dict(blocks))
        if checked is None:
            _run_blocks(calls, blocks, own, collector, device)
        else:
            _run_blocks_back(model, calls, blocks, own, collector, device, checked)
        return collector.finish("blocks")


def own_share(batches: Sequence[Batch]) -> list[int]:
    """Numbers of the batches that this process reads, in order; all of them where it is alone."""
    readers = distributed.owners([float(next(iter(batch.values())).numel()) for batch in batches])
    return [number for number, reader in enumerate(readers) if reader == distributed.rank()]


def _in_turn(loss: Loss, batches: Sequence[Batch], mine: Sequence[int]) -> Loss:
    """The loss of the batches ``mine``, called in this order, with labels as in one process that reads them all."""
    if not isinstance(loss, SampledTokenLoss):
        return loss
    following = iter(zip((-1, *mine), mine, strict=False))

    def of_own(model: nn.Module, batch: Batch) -> Tensor:
        before, number = next(following)
        for other in range(before + 1, number):
            loss.skip(batches[other])
        return loss(model, batch)

    return of_own


def _checked_loss(
    loss: Loss | None, model: nn.Module, batches: Sequence[Batch], device: torch.device | str | None
) -> Loss:
    """The loss; where it is one of ours, after a check that the model predicts next tokens."""
    if loss is None or loss is next_token_loss or isinstance(loss, SampledTokenLoss):
        with moved(model, device) as place:
            require_next_token_model(model, to_device(dict(batches[0]), place))
    return loss or next_token_loss


class _Collector:
    """Owns the hooks and sums of one calibration."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        weight_of: WeightOf,
        moments: frozenset[str],
        *,
        watch: bool,
        workspace: Workspace | None = None,
    ) -> None:
        self.layers = layers
        self.workspace = workspace
        self.wanted = moments
        self.weight_of = weight_of
        self.moments = moments & FORWARD_MOMENTS
        self.gradients = GradientCollector(moments, weight_of) if moments & BACKWARD_MOMENTS else None
        self.watcher = (
            ResidualWatcher({name: list(layer.parameters()) for name, layer in layers.items()}) if watch else None
        )
        self.cosines: BlockCosine | None = None
        self.mask: Tensor | None = None
        self.tokens = 0
        self._in_forward = False
        self._sums: dict[str, InputSums] = {}
        self._results: dict[str, LayerStatistics] = {}
        # Layers fed the same tensor share one sum; the first of them that is called owns it.
        self._owner: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None

    def count(self, batch: Batch) -> None:
        """Count the tokens of a batch, padding left out."""
        self.tokens += count_tokens(batch)

    @contextmanager
    def on(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks on ``layers`` for the time of the context; their sums are turned into statistics at its end."""
        with ExitStack() as hooks:
            for name, layer in layers.items() if self.moments else ():
                hooks.callback(layer.register_forward_pre_hook(self._hook(name)).remove)
            if self.gradients is not None:  # after the inputs' hooks, which are to see what the model hands over
                hooks.enter_context(self.gradients.on(layers))
            yield
            self._close(layers)

    @contextmanager
    def batch(self, batch: Batch, device: torch.device | None) -> Iterator[None]:
        """The context of one forward; a backward comes after it."""
        mask = real_positions(batch)
        self.mask = None if mask is None or bool(mask.all()) else mask.to(device)
        self._in_forward = True
        try:
            with ExitStack() as stack:
                if self.gradients is not None:
                    stack.enter_context(self.gradients.batch(batch, self.mask))
                for watcher in (self.watcher, self.cosines):
                    if watcher is not None:
                        stack.enter_context(watcher.batch(self.mask))
                yield
        finally:
            self._in_forward = False
            self._last = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            # Gradient checkpointing runs forwards again in the backward, whose inputs have been counted. And the
            # watcher follows the model's own operations; those of the statistics are none of its business.
            if self._in_forward:
                with torch._C.DisableTorchFunction(), torch.no_grad(), full_float32():
                    self._add(name, layer, args[0])

        return hook

    def _add(self, name: str, layer: nn.Module, x: Tensor) -> None:
        last, sharer = self._last if self._last is not None else (None, name)
        owner = self._owner.setdefault(name, sharer if last is x else name)
        if owner != name:
            if last is not x:  # adding nothing here would leave these tokens out of the sum
                _check_owner(name, owner, name)
            return
        if name not in self._sums:
            self._sums[name] = InputSums(self.moments, lambda: self.weight_of(layer).shape[0], x.shape[-1], x.device)
        sums = self._sums[name]
        sums.add(real_tokens(x, self.mask), lambda: self.weight_of(layer).detach())
        if sums.outputs is None:  # a moment of the outputs is the layer's own
            self._last = (x, name)

    def _merge(self, layers: Mapping[str, nn.Module]) -> None:
        """Add up the sums of ``layers`` over all processes. One whose share does not reach a layer, such as an expert,
        adds zeros."""
        if distributed.size() == 1:
            return
        gradients = {} if self.gradients is None else self.gradients.sums
        owners = {name: owner for name, owner in self._owner.items() if name in layers}
        columns = {name: sums.columns for name, sums in self._sums.items()}
        shapes = {name: sums.shape for name, sums in gradients.items()}
        seen = distributed.gather("the sums of calibration", (owners, columns, shapes))
        for owners, _, _ in seen:
            for name, owner in owners.items():
                _check_owner(name, owner, self._owner.setdefault(name, owner))
        # In the same order everywhere: for the sums, and for the layer that an error names.
        for name, size in {name: size for _, found, _ in seen for name, size in found.items()}.items():
            inputs = self._sums.pop(name, None) or _no_inputs(self, layers[name], size)
            inputs.reduce(distributed.add_up)
            self._sums[name] = inputs
        for name, shape in {name: shape for _, _, found in seen for name, shape in found.items()}.items():
            sums = gradients.pop(name, None) or GradientSums(self.wanted, *shape, _place(layers[name]))
            sums.reduce(distributed.add_up)
            gradients[name] = sums

    def _close(self, layers: Mapping[str, nn.Module]) -> None:
        """Turn the sums of ``layers`` into statistics and let the sums go."""
        self._merge(layers)
        own = {name: LayerStatistics(sums.tokens, **sums.means()) for name, sums in self._sums.items()}
        self._sums.clear()
        called = () if self.gradients is None else tuple(self.gradients.sums)
        gradients = {name: self.gradients.take(name) for name in called} if self.gradients is not None else {}
        for name in layers if self.moments or self.gradients is not None else ():
            sums = gradients.get(name)
            if self.moments:
                statistics = own.get(self._owner.get(name, ""), LayerStatistics(0))
            else:
                statistics = LayerStatistics(0 if sums is None else sums.tokens)
            if statistics.tokens == 0:
                raise DataError(
                    f"no calibration token reached layer '{name}'; leave it out of targets, or give text that uses it"
                )
            statistics.check(name)
            self._results[name] = statistics
        # After all inputs: a NaN in one layer's outputs is one in every layer's gradients.
        for name, sums in gradients.items():
            if sums is not None:
                self._results[name] = replace(self._results[name], **sums.means())
                self._results[name].check(name)
        if self.workspace is not None:
            self._results |= stored_statistics({name: self._results[name] for name in layers}, self.workspace.keep)

    def finish(self, mode: str) -> Calibration:
        if self.gradients is not None:
            self.gradients.check_gradients()
        results = {name: self._results[name] for name in self.layers if name in self._results}
        notes: tuple[str, ...] = ()
        importance: dict[str, float] = {}
        if self.watcher is not None:
            watcher, cosines = _merged(self.watcher, self.cosines)
            fallback = {} if cosines is None else cosines.importance()
            importance, notes = resolve_importance(list(self.layers), watcher.importance(), fallback)
        return Calibration(results, importance, self.tokens, mode, notes)


def _check_owner(name: str, owner: str, other: str) -> None:
    """Check that a layer shares its input with the same one always."""
    if owner != other:
        raise DataError(
            f"layer '{name}' shares its input with '{owner if owner != name else other}' in one forward and not in "
            "another; leave it out of targets"
        )


def _no_inputs(collector: _Collector, layer: nn.Module, columns: int) -> InputSums:
    return InputSums(collector.moments, lambda: collector.weight_of(layer).shape[0], columns, _place(layer))


def _place(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _merged(watcher: ResidualWatcher, cosines: BlockCosine | None) -> tuple[ResidualWatcher, BlockCosine | None]:
    """Watchers with the sums of all processes, added in the order of the processes everywhere."""
    if distributed.size() == 1:
        return watcher, cosines
    own = [dict(sums) for sums in (watcher.sums, {} if cosines is None else cosines.sums)]
    whole, of_blocks = watcher.empty(), None if cosines is None else cosines.empty()
    for branches, blocks in distributed.gather("the importance of the modules", own):
        whole.merge(branches)
        if of_blocks is not None:
            of_blocks.merge(blocks)
    return whole, of_blocks


def _run_whole(
    model: nn.Module,
    batches: Sequence[Batch],
    collector: _Collector,
    blocks: Sequence[Block],
    device: torch.device | str | None,
    loss: Loss | None = None,
) -> None:
    """One forward per batch, and one backward where there is a loss."""
    if collector.watcher is not None and blocks:
        collector.cosines = BlockCosine(dict(blocks))
    with moved(model, device) as place, collector.on(collector.layers):
        for batch in tqdm(batches, desc="calibrating", unit="batch", disable=None, leave=False):
            inputs = to_device(dict(batch), place)
            if loss is None or collector.gradients is None:
                with collector.batch(inputs, place):
                    run_model(model, inputs)
            else:
                with frozen(model):
                    with collector.batch(inputs, place):
                        value = loss(model, inputs)
                    collector.gradients.check_loss(value)
                    value.backward()  # type: ignore[no-untyped-call]


def _run_blocks(
    calls: list[BlockCalls],
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    collector: _Collector,
    device: torch.device | str | None,
) -> None:
    progress = tqdm(blocks, desc="calibrating", unit="block", disable=None, leave=False)
    for index, (_, block) in enumerate(progress):
        with moved(block, device) as place, collector.on(layers_inside(collector.layers, block)):
            for call, batch in zip(calls, batches, strict=True):
                with collector.batch(batch, place):
                    call.step(block, index, place)
        if collector.workspace is not None:
            _put_away(calls, collector.workspace)
            release(block.parameters())


def _run_blocks_back(
    model: nn.Module,
    calls: list[BlockCalls],
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    collector: _Collector,
    device: torch.device | str | None,
    loss: Loss,
) -> None:
    """A forward and a backward, both one block at a time; what each block was fed waits in the workspace."""
    assert collector.workspace is not None
    assert collector.gradients is not None
    fed: list[list[Tensor]] = []
    for index, (_, block) in enumerate(tqdm(blocks, desc="forward", unit="block", disable=None, leave=False)):
        _put_away(calls, collector.workspace, beside=sum(state.nbytes for states in fed for state in states))
        fed.append([call.states for call in calls])
        with moved(block, device) as place:
            for call in calls:
                call.hidden = call.run(block, index, call.states, place)
        release(block.parameters())
    gradients = []
    with moved_around(model, blocks, device) as place:
        for call, batch in zip(calls, batches, strict=True):
            states = call.states.detach().to(place).requires_grad_()
            call.hidden = None
            with frozen(model), ending_in(blocks, call, states):
                value = loss(model, to_device(dict(batch), place))
            if not bool(torch.isfinite(value).all()):
                _blame(blocks, fed, states)
            collector.gradients.check_loss(value)
            value.backward()  # type: ignore[no-untyped-call]
            assert states.grad is not None
            gradients.append(states.grad)
    release(model.parameters())
    backwards = tqdm(range(len(blocks) - 1, -1, -1), desc="backward", unit="block", disable=None, leave=False)
    for index in backwards:
        block = blocks[index][1]
        with moved(block, device) as place, collector.on(layers_inside(collector.layers, block)):
            for number, (call, batch) in enumerate(zip(calls, batches, strict=True)):
                with frozen(block):
                    states = fed[index][number].to(place).detach().requires_grad_()
                    with collector.batch(batch, place):
                        output = call.run(block, index, states, place)
                    output.backward(gradients[number])
                assert states.grad is not None
                gradients[number] = states.grad
                call.forget(index)
        fed.pop()
        release(block.parameters())


def _put_away(calls: Sequence[BlockCalls], workspace: Workspace, beside: int = 0) -> None:
    """Move hidden states into the workspace, as many batches as are over its budget for them.

    Args:
        calls: Whose states.
        workspace: Its ``budget`` counts.
        beside: Bytes of other states.
    """
    for call in calls:
        beside += call.states.nbytes
        if beside > workspace.budget:
            call.hidden = workspace.keep({"states": call.states})["states"]


def _blame(blocks: Sequence[Block], fed: Sequence[Sequence[Tensor]], last: Tensor) -> None:
    """Name the first block whose outputs are not finite."""
    for (name, _), states in zip(blocks, (*fed[1:], [last]), strict=True):
        for state in states:
            require_finite(state, f"the hidden states after block '{name}' on the calibration text")


def check_tokens(tokens: int, widest: int, name: str, least: int) -> tuple[str, ...]:
    """A warning, also returned as a note, where the calibration text is short for the second moment of a layer.

    Args:
        tokens: Of the text.
        widest: Inputs of the layer.
        name: Of the layer.
        least: Least rank that a matrix may get. The moments of fewer tokens have a lower rank than what is kept, so
            that the damping alone would choose the rest.

    Raises:
        DataError: If there are fewer than ``least``.
    """
    enough = 4 * widest
    remedy = f"give at least {enough} tokens: more batches or longer ones (in a recipe data.calibration_blocks)"
    if tokens < least:
        raise DataError(f"calibration has {tokens} tokens, fewer than min_rank={least}; {remedy}")
    if tokens >= enough:
        return ()
    lack = "rank-deficient" if tokens < widest else "noisy"
    note = f"calibration has {tokens} tokens, so that the moment of the {widest} inputs of '{name}' is {lack}; {remedy}"
    warn_caller(note)
    return (note,)
