"""Running a model on batches, whole or one repeating block at a time.

The arguments of the blocks (masks, rotary embeddings, what else a model passes) are captured once, for each block
separately, because models pass different masks to different blocks. A short probe checks that the blocks really are a
chain, each fed exactly what the one before returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Batch = Mapping[str, Tensor]
# Key of the tensor that the model takes as its first positional argument, for a batch that does not name its arguments.
POSITIONAL = ""
Block = tuple[str, nn.Module]


def real_positions(batch: Batch) -> Tensor | None:
    """The batch's ``attention_mask`` as bool ``(batch, length)``, true at real tokens; ``None`` where it has no mask of
    that form."""
    mask = batch.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.bool()


class BlockCalls:
    """The calls of all blocks for one batch, and the hidden states between them."""

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Keep one block's arguments, and the hidden states of the first block; returns the hidden states it was called
        with."""
        args, kwargs, hidden = _split(args, kwargs)
        if self.hidden is None:
            self.hidden = hidden
        self.arguments.append((args, kwargs))
        return hidden

    def step(self, block: nn.Module, index: int, device: torch.device | None) -> None:
        """Run block ``index`` on the hidden states and keep what it returns, on the device that the first states came
        from."""
        assert self.hidden is not None
        self.hidden = self.run(block, index, self.hidden, device)
        self.arguments[index] = ((), {})  # the masks of a finished block are of no more use

    def run(self, block: nn.Module, index: int, hidden: Tensor, device: torch.device | None) -> Tensor:
        """What block ``index`` returns for ``hidden``, on the device that ``hidden`` came from."""
        args, kwargs = to_device(self.arguments[index], device)
        result: Tensor = _states(block(to_device(hidden, device), *args, **kwargs))
        return result.to(hidden.device)


def capture_calls(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> list[BlockCalls] | None:
    """The blocks' arguments for every batch, or ``None`` where the blocks are no chain over hidden states.

    The first sequence goes through the real blocks once, to learn what they return and to see that they are a chain.
    Then the model runs on every batch with its blocks passing the hidden states through unchanged, up to the last
    block: what a model hands to its blocks beside the hidden states does not depend on what they compute.
    """
    outputs = _probe(model, blocks, batches[0]) if blocks else None
    if outputs is None:
        return None
    result = []
    for batch in batches:
        calls = BlockCalls()
        with (
            _patched(blocks, partial(_pass_through, calls, outputs)),
            suppress(_LastBlockReached),
        ):
            run_model(model, to_device(dict(batch), _device_of(model)))
        if len(calls.arguments) != len(blocks):
            return None
        result.append(calls)
    return result


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Forward of the model on a batch, without a cache of keys and values, which would keep every block's states for
    nothing."""
    named: dict[str, Any] = {key: value for key, value in batch.items() if key != POSITIONAL}
    if hasattr(getattr(model, "config", None), "use_cache"):
        named["use_cache"] = False
    return model(batch[POSITIONAL], **named) if POSITIONAL in batch else model(**named)


def logits_of(model: nn.Module, batch: Batch) -> Tensor | None:
    """Logits of a forward: its output, the first of a tuple, or its ``logits``; ``None`` where that is no tensor. Their
    shape is the caller's to check."""
    output = run_model(model, batch)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    return logits if isinstance(logits, Tensor) else None


def to_device(tree: Any, device: torch.device | None) -> Any:
    """``tree`` with every tensor in it on ``device``; ``None`` leaves them."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) and device is not None else leaf, tree)


@contextmanager
def moved(module: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """``module`` on ``device`` for the time of the context, then back where it was; gives the device that it is on."""
    home = _device_of(module)
    target = home if device is None else torch.device(device)
    if target is None or target == home:
        yield target
        return
    try:
        module.to(target)
        yield target
    finally:
        module.to(home)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the context; then every module gets its own mode back, because a model may be
    frozen in parts."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def each_in_one_block(layers: Mapping[str, nn.Module], blocks: Sequence[Block]) -> bool:
    """Whether every layer belongs to exactly one block; one shared by blocks has to see the inputs of all of them."""
    counts = Counter(id(module) for _, block in blocks for module in block.modules())
    return all(counts[id(layer)] == 1 for layer in layers.values())


def layers_inside(layers: Mapping[str, nn.Module], block: nn.Module) -> dict[str, nn.Module]:
    """Those of ``layers`` that belong to the block, in the same order."""
    members = {id(module) for module in block.modules()}
    return {name: layer for name, layer in layers.items() if id(layer) in members}


class _LastBlockReached(Exception):
    """Ends a capturing forward: the head after the last block need not run."""


def _pass_through(calls: BlockCalls, outputs: Sequence[Any], index: int) -> Callable[..., Any]:
    """A forward for block ``index`` that records its arguments and returns the hidden states in the form the block
    does."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = calls.record(args, kwargs)
        if index == len(outputs) - 1:
            raise _LastBlockReached
        output = outputs[index]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return forward


@contextmanager
def _patched(blocks: Sequence[Block], make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Give every block another ``forward`` for the time of the context."""
    own = [block.__dict__.get("forward") for _, block in blocks]
    try:
        for index, (_, block) in enumerate(blocks):
            block.forward = make(index)
        yield
    finally:
        for (_, block), forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward


def _probe(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> list[Any] | None:
    """What each block returns for one sequence, or ``None`` if the blocks are no chain."""
    outputs: list[Any] = []
    fed: list[Any] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        fed.append(args[0] if args else kwargs.get("hidden_states"))
        outputs.append(output)

    handles = [block.register_forward_hook(record, with_kwargs=True) for _, block in blocks]
    try:
        run_model(model, to_device({key: value[:1] for key, value in batch.items()}, _device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    if len(outputs) != len(blocks) or not all(isinstance(states, Tensor) for states in fed):
        return None
    states = [_states(output) for output in outputs]
    # The last block's output has no successor among the blocks to be compared with.
    chained = all(
        isinstance(state, Tensor) and state.shape == following.shape and torch.equal(state, following)
        for state, following in zip(states[:-1], fed[1:], strict=True)
    )
    return outputs if chained and isinstance(states[-1], Tensor) else None


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Arguments of a block without its hidden states, and the hidden states."""
    if args:
        return args[1:], dict(kwargs), args[0]
    rest = dict(kwargs)
    return (), rest, rest.pop("hidden_states")


def _states(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _device_of(model: nn.Module) -> torch.device | None:
    first = next(chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device
