"""Calibration: runs batches through a model and collects what a metric and an allocator need.

A transformer is calibrated block by block: only one decoder or encoder block is on the device at a time, with the
statistics of that block alone, and the hidden states of all batches wait on the CPU (:mod:`lowrank_lit.streaming`). A
model whose blocks are no chain, or with targets outside of them, runs whole instead; the statistics are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit import distributed
from lowrank_lit.batches import given_batch
from lowrank_lit.collector import Calibration, Collector
from lowrank_lit.experts import sides_of
from lowrank_lit.gradients import (
    Loss,
    SampledTokenLoss,
    WeightOf,
    frozen,
    next_token_loss,
    require_next_token_model,
)
from lowrank_lit.linalg import require_finite
from lowrank_lit.paging import Shelf, Workspace, release
from lowrank_lit.residual import BlockCosine, find_repeating_blocks
from lowrank_lit.statistics import (
    BACKWARD_MOMENTS,
    check_moments,
)
from lowrank_lit.streaming import (
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
    refuses,
    run_model,
    to_device,
)


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
        loss: Where gradients are needed: the loss summed over targets, in nats. ``None`` is
            :func:`~lowrank_lit.gradients.next_token_loss`. One of the caller's own is called with the batch as it was
            given to :func:`as_batches`, targets included, its tensors on the device; the whole model then runs at once,
            and where the model has no forward that runs on the batches, it stands in for that.
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
    sides = sides_of(model, layers)
    collector = Collector(layers, weight_of, moments, watch=importance, sides=sides, workspace=workspace)
    blocks = find_repeating_blocks(model)
    for batch in batches:
        collector.count(batch)
    mine = own_share(batches)
    own = [batches[number] for number in mine]
    with distributed.together("calibration"), evaluating(model), torch.no_grad():
        backward = bool(moments & BACKWARD_MOMENTS)
        own_loss = loss is None or loss is next_token_loss or isinstance(loss, SampledTokenLoss)
        needs_loss = backward or (not own_loss and bool(refuses(model, batches[0])))
        checked = _checked_loss(loss, model, batches, device) if needs_loss else None
        streamed = each_in_one_block(layers, blocks) and (workspace is not None or not backward)
        streamed = streamed and (own_loss or not needs_loss)
        checked = None if checked is None else _in_turn(checked, mine)
        calls = capture_calls(model, blocks, own or batches[:1]) if streamed else None
        chained = all(distributed.gather("the model's blocks", calls is not None))
        if calls is None or not chained:
            fed = own if own_loss or checked is None else [given_batch(batch) for batch in own]
            _run_whole(model, own, collector, blocks, device, checked, fed)
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


def _in_turn(loss: Loss, mine: Sequence[int]) -> Loss:
    """The loss of the batches ``mine``, called in this order, with labels as in one process that reads them all."""
    if not isinstance(loss, SampledTokenLoss):
        return loss
    following = iter(zip((-1, *mine), mine, strict=False))

    def of_own(model: nn.Module, batch: Batch) -> Tensor:
        before, number = next(following)
        loss.skip(number - before - 1)
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


def _run_whole(
    model: nn.Module,
    batches: Sequence[Batch],
    collector: Collector,
    blocks: Sequence[Block],
    device: torch.device | str | None,
    loss: Loss | None = None,
    fed: Sequence[Any] = (),
) -> None:
    """One forward per batch, which is the loss's where there is one, and one backward where gradients are collected.

    ``fed`` is what the loss reads in place of each batch."""
    if collector.watcher is not None and blocks:
        collector.cosines = BlockCosine(dict(blocks))
    with moved(model, device) as place, collector.on(collector.layers):
        progress = tqdm(batches, desc="calibrating", unit="batch", disable=None, leave=False)
        for batch, own in zip(progress, fed or batches, strict=True):
            inputs = to_device(dict(batch), place)
            if loss is None:
                with collector.batch(inputs, place):
                    run_model(model, inputs)
            elif collector.gradients is None:
                with collector.batch(inputs, place):
                    loss(model, to_device(own, place))
            else:
                read = inputs if own is batch else to_device(own, place)
                with frozen(model):
                    with collector.batch(inputs, place):
                        value = loss(model, read)
                    collector.gradients.check_loss(value)
                    value.backward()  # type: ignore[no-untyped-call]


def _run_blocks(
    calls: list[BlockCalls],
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    collector: Collector,
    device: torch.device | str | None,
) -> None:
    shelf = Shelf(collector.workspace, [call.states.nbytes for call in calls], copies=2)
    progress = tqdm(blocks, desc="calibrating", unit="block", disable=None, leave=False)
    for index, (_, block) in enumerate(progress):
        with moved(block, device) as place, collector.on(layers_inside(collector.layers, block)):
            for number, (call, batch) in enumerate(zip(calls, batches, strict=True)):
                with collector.batch(batch, place):
                    call.step(block, index, place)
                call.hidden = shelf.put(number, call.states)
        if collector.workspace is not None:
            release(block.parameters())


def _run_blocks_back(
    model: nn.Module,
    calls: list[BlockCalls],
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    collector: Collector,
    device: torch.device | str | None,
    loss: Loss,
) -> None:
    """A forward and a backward, both one block at a time; what each block was fed waits in the workspace."""
    assert collector.workspace is not None
    assert collector.gradients is not None
    shelf = Shelf(collector.workspace, [call.states.nbytes for call in calls], copies=3)
    for number, call in enumerate(calls):
        call.hidden = shelf.put(number, call.states)
    fed: list[list[Tensor]] = []
    for index, (_, block) in enumerate(tqdm(blocks, desc="forward", unit="block", disable=None, leave=False)):
        fed.append([])
        with moved(block, device) as place:
            for number, call in enumerate(calls):
                fed[index].append(shelf.put_away(number, call.states))
                call.hidden = shelf.put(number, call.run(block, index, call.states, place))
                release([fed[index][number]])
        release(block.parameters())
    gradients = []
    with moved_around(model, blocks, device) as place:
        for number, (call, batch) in enumerate(zip(calls, batches, strict=True)):
            states = call.states.detach().to(place).requires_grad_()
            call.hidden = None
            if not bool(torch.isfinite(states).all()):  # the loss would speak of the logits alone
                _blame(blocks, fed, states)
            with frozen(model), ending_in(blocks, call, states):
                value = loss(model, to_device(dict(batch), place))
            collector.gradients.check_loss(value)
            value.backward()  # type: ignore[no-untyped-call]
            assert states.grad is not None
            gradients.append(shelf.put(number, states.grad.to(fed[0][number].device)))
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
                    torch.autograd.backward(output, gradients[number].to(output.device))
                assert states.grad is not None
                gradients[number] = shelf.put(number, states.grad.to(fed[index][number].device))
                release([fed[index][number]])
                call.forget(index)
        fed.pop()
        release(block.parameters())


def _blame(blocks: Sequence[Block], fed: Sequence[Sequence[Tensor]], last: Tensor) -> None:
    """Name the first block whose outputs are not finite."""
    for (name, _), states in zip(blocks, (*fed[1:], [last]), strict=True):
        for state in states:
            require_finite(state, f"the hidden states after block '{name}' on the calibration text")
