"""Running a model on batches, whole or one repeating block at a time.

The arguments of the blocks (masks, rotary embeddings, what else a model passes) are captured once, for each block
separately, because models pass different masks to different blocks. A short probe checks that the blocks really are a
chain, each fed exactly what the one before returned.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lowrank_lit.errors import reason_of
from lowrank_lit.paging import release

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
    """The calls of all blocks for one batch, and the hidden states between them.

    Args:
        forms: What each block returns beside the hidden states.
    """

    def __init__(self, forms: Sequence[Any]) -> None:
        self.forms = forms
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

    @property
    def states(self) -> Tensor:
        """The hidden states that are there."""
        assert self.hidden is not None
        return self.hidden

    def step(self, block: nn.Module, index: int, device: torch.device | None) -> None:
        """Run block ``index`` on the hidden states and keep what it returns, on the device that the first states came
        from."""
        self.hidden = self.run(block, index, self.states, device)
        self.forget(index)

    def forget(self, index: int) -> None:
        """Let the arguments of block ``index`` go: the masks of a finished block are of no more use."""
        self.arguments[index] = ((), {})

    def run(self, block: nn.Module, index: int, hidden: Tensor, device: torch.device | None) -> Tensor:
        """What block ``index`` returns for ``hidden``, on the device that ``hidden`` came from."""
        args, kwargs = to_device(self.arguments[index], device)
        result: Tensor = _states(block(to_device(hidden, device), *args, **kwargs))
        return _returned(result, hidden.device)


def capture_calls(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> list[BlockCalls] | None:
    """The blocks' arguments for every batch, or ``None`` where the blocks are no chain over hidden states.

    The first sequence goes through the real blocks once, to learn what they return and to see that they are a chain.
    Then the model runs on every batch with its blocks passing the hidden states through unchanged, up to the last
    block: what a model hands to its blocks beside the hidden states does not depend on what they compute.
    """
    forms = _probe(model, blocks, batches[0]) if blocks else None
    if forms is None:
        return None
    result = []
    for batch in batches:
        calls = BlockCalls(forms)
        with (
            _patched(blocks, partial(_record_and_pass, calls)),
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
    if hasattr(getattr(model, "config", None), "use_cache") and takes(model, "use_cache"):
        named["use_cache"] = False
    return model(batch[POSITIONAL], **named) if POSITIONAL in batch else model(**named)


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of the model's forward, in order; none where Python cannot tell."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # such as a forward that is compiled code
        return []


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes an argument of this name, or any (``**kwargs``), or cannot be asked."""
    known = parameters_of(model)
    return not known or any(
        entry.kind is entry.VAR_KEYWORD or (entry.name == name and entry.kind is not entry.POSITIONAL_ONLY)
        for entry in known
    )


def refuses(model: nn.Module, batch: Batch) -> str:
    """Why the model's forward does not run on the first sequence of a batch, in a line; empty where it does."""
    try:
        with evaluating(model), torch.no_grad():
            run_model(model, to_device({key: value[:1] for key, value in batch.items()}, _device_of(model)))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a forward of the user's own may raise anything
        return f"{type(error).__name__}: {reason_of(error)}"
    return ""


def logits_of(model: nn.Module, batch: Batch) -> Tensor | None:
    """Logits of a forward: its output, the first of a tuple, or its ``logits``; ``None`` where that is no tensor. Their
    shape is the caller's to check."""
    output = run_model(model, batch)
    logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
    return logits if isinstance(logits, Tensor) else None


def to_device(tree: Any, device: torch.device | None) -> Any:
    """``tree`` with every tensor in it on ``device``; ``None`` leaves them."""
    if device is None:
        return tree
    # Towards a CUDA device the copy of page-locked memory may run beside the kernels before it; they share a stream.
    beside = device.type == "cuda"
    return tree_map(lambda leaf: leaf.to(device, non_blocking=beside) if isinstance(leaf, Tensor) else leaf, tree)


def _returned(states: Tensor, home: torch.device) -> Tensor:
    """The states on ``home``; from a CUDA device to the CPU in page-locked memory, which both copies are faster for.
    The copy is done when this returns: a workspace may read it next."""
    if states.device.type != "cuda" or home.type != "cpu":
        return states.to(home)
    return torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states)


@contextmanager
def moved(module: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """``module`` on ``device`` for the time of the context, then back where it was; gives the device that it is on.

    What was not written to there gets the memory that it had, so that weights mapped from a file stay mapped.
    """
    home = _device_of(module)
    target = home if device is None else torch.device(device)
    if target is None or target == home:
        yield target
        return
    own = [
        (owner._parameters, key, value, value.data)
        for owner in module.modules()
        for key, value in owner._parameters.items()
        if value is not None
    ]
    try:
        module.to(target)
        versions = [_version(place[key]) for place, key, _, _ in own]
        yield target
    finally:
        for (place, key, value, memory), version in zip(own, versions, strict=True):
            if _version(place[key]) == version:
                value.data = memory
                place[key] = value
        module.to(home)


@contextmanager
def moved_around(model: nn.Module, blocks: Sequence[Block], device: torch.device | str | None) -> Iterator[Any]:
    """All of a model but its blocks on ``device`` for the time of the context, as :func:`moved` does it."""
    inside = {id(module) for _, block in blocks for module in block.modules()}
    place = None if device is None else torch.device(device)
    with ExitStack() as stack:
        for child in list(model.modules()):
            holds = {id(module) for module in child.modules()}
            if not holds & inside and _device_of(child) is not None:
                place = stack.enter_context(moved(child, device)) or place
        yield place


def _version(tensor: Tensor | None) -> int | None:
    """How often a tensor was written to; ``None`` where nobody counts."""
    return None if tensor is None or tensor.is_inference() else tensor._version


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the context; then every module gets its own mode back, because a model may be
    frozen in parts.

    bitsandbytes' 4-bit layers alone compute as in training, where nothing depends on it: in evaluation mode they repack
    their weights in place on CPUs with AVX512-BF16, which gives no gradient and is not undone."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if type(module).__name__ == "Linear4bit":
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def paged(blocks: Sequence[Block]) -> Iterator[None]:
    """For the time of the context the weights of a block that are mapped from a file leave memory after each of its
    forwards, so that a forward of the whole model holds one block at a time."""

    def leave(block: nn.Module, args: Any, output: Any) -> None:
        release(block.parameters())

    handles = [block.register_forward_hook(leave) for _, block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _record_and_pass(calls: BlockCalls, index: int) -> Callable[..., Any]:
    """A forward for block ``index`` that records its arguments and returns the hidden states in the form the block
    does."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = calls.record(args, kwargs)
        if index == len(calls.forms) - 1:
            raise _LastBlockReached
        return _in_form(hidden, calls.forms[index])

    return forward


@contextmanager
def ending_in(blocks: Sequence[Block], calls: BlockCalls, states: Tensor) -> Iterator[None]:
    """For the time of the context a forward of the model computes nothing in its blocks: ``states`` are what the last
    one returns, and the model goes on from there to its head."""

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            last = index == len(calls.forms) - 1
            return _in_form(states if last else _split(args, kwargs)[2], calls.forms[index])

        return forward

    with _patched(blocks, make):
        yield


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


def _in_form(hidden: Tensor, form: Any) -> Any:
    """Hidden states as a block returns them."""
    return hidden if form is None else (hidden, *form)


def _probe(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> list[Any] | None:
    """What each block returns beside the hidden states for one sequence, ``None`` where it is no tuple; or ``None``
    alone if the blocks are no chain."""
    forms: list[Any] = []
    before: list[Any] = []  # what the block before returned: one at a time, so that memory does not grow with depth
    chained = [True]

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        fed, states = args[0] if args else kwargs.get("hidden_states"), _states(output)
        if chained[0] and isinstance(fed, Tensor) and isinstance(states, Tensor):
            chained[0] = all(state.shape == fed.shape and torch.equal(state, fed) for state in before)
        else:
            chained[0] = False
        before[:] = [states]
        forms.append(output[1:] if isinstance(output, tuple) else None)

    handles = [block.register_forward_hook(record, with_kwargs=True) for _, block in blocks]
    try:
        run_model(model, to_device({key: value[:1] for key, value in batch.items()}, _device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return forms if chained[0] and len(forms) == len(blocks) else None


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
