"""One product for the inner factors of layers that are fed the same tensor, such as q, k and v.

The inner weights (r_i, n) of a group lie one above the other in one piece of memory, and the layers' own parameters are
views of it: nothing is stored twice, and names, optimizers and checkpoints see what they saw before. The first layer of
the group that is called computes the product of all; the others take their part of it, if they are handed that very
tensor. Otherwise each computes its own. Layers come in as objects, no architecture is known by name.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from lowrank_lit.products import is_plain, stacked


class Member(Protocol):
    """A layer whose first step is the product with ``inner``."""

    inner: nn.Linear
    stack: Part | None
    _modules: dict[str, nn.Module | None]


FEW = 32
"""Tokens below which layers on a CPU compute alone: joining the products gains less there than it costs."""

_stacks: weakref.WeakValueDictionary[int, InnerStack] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class Part:
    """The place of one layer in a stack; what the layer holds of it."""

    __slots__ = ("inner", "layer", "number", "stack")

    def __init__(self, stack: InnerStack, number: int, layer: Member) -> None:
        self.stack = stack
        self.number = number
        self.layer = layer
        self.inner = layer.inner

    def holds(self) -> bool:
        """Whether the inner layer is the one that was stacked, and no more than its weight."""
        # Not by attribute, which takes as long as a small product's launch.
        inner = self.layer._modules["inner"]
        return (
            inner is self.inner and is_plain(inner) and inner._parameters["weight"] is self.stack.weights[self.number]
        )

    def product(self, layer: Member, x: Tensor) -> Tensor:
        """``inner x``, (..., rank): the layer's part of the group's product, or a product of its own.

        Args:
            layer: That holds this part; a replica of the one that it was made for (``DataParallel``) computes alone.
            x: (..., columns).
        """
        few = x.is_cpu and x.numel() < FEW * x.shape[-1] and not torch.compiler.is_compiling()
        joined = not few and layer is self.layer and self.holds()
        result = self.stack.take(self.number, x) if joined else None
        if result is None:
            result = layer.inner(x)
        return result


class InnerStack:
    """The inner factors of one group.

    A layer computes alone, as if there were no stack, while an inner layer of the group is not plain
    (:func:`lowrank_lit.products.is_plain`), while its parameter was replaced, or while the weights do not lie one above
    the other. ``Module.to`` and the like stack again by themselves.

    Args:
        layers: Two or more; their inner weights have one number of columns, dtype and device.
    """

    def __init__(self, layers: Sequence[Member]) -> None:
        self.weights = tuple(layer.inner.weight for layer in layers)
        self.whole: Tensor | None = None
        # What layers are still to take: the tensor, and by layer what must not change meanwhile and its part.
        self.held: tuple[Tensor, dict[int, tuple[tuple[object, ...], Tensor]]] | None = None
        self.number = next(_numbers)
        self._addresses: tuple[int, ...] = ()
        _stacks[self.number] = self
        self.gather()
        self.parts = tuple(Part(self, number, layer) for number, layer in enumerate(layers))
        for layer, part in zip(layers, self.parts, strict=True):
            layer.stack = part

    @torch.no_grad()
    def gather(self) -> None:
        """Give the weights one piece of memory, if they have not; nothing where their dtypes or devices differ."""
        if self.lies_together():
            return
        self.whole = None
        kinds = {(weight.dtype, weight.device, weight.shape[1:]) for weight in self.weights}
        if len(kinds) > 1 or any(weight.ndim != 2 or weight.is_meta for weight in self.weights):
            return
        memory = torch.cat(self.weights)
        for weight, part in zip(self.weights, torch.split(memory, [len(w) for w in self.weights]), strict=True):
            weight.data = part
        self.lies_together()

    def lies_together(self) -> bool:
        """Whether the weights lie one above the other; ``whole`` is then a view of all of them."""
        # While ``whole`` lives, nothing else can come to lie at the addresses.
        if self.whole is not None and self._addresses == tuple([weight.data_ptr() for weight in self.weights]):
            return True
        self.whole = None
        if not self._in_order():
            return False
        first = self.weights[0]
        rows = sum(len(weight) for weight in self.weights)
        self.whole = first.detach().as_strided((rows, first.shape[1]), (first.shape[1], 1))
        self._addresses = tuple(weight.data_ptr() for weight in self.weights)
        if first.device.type == "cuda":  # a CUDA graph then reads it where it is, as it does parameters
            import torch._dynamo

            torch._dynamo.mark_static_address(self.whole, guard=False)
        return True

    def _in_order(self) -> bool:
        first = self.weights[0]
        if any(weight.ndim != 2 or weight.is_meta for weight in self.weights):
            return False
        place, columns, storage = first.data_ptr(), first.shape[1], first.untyped_storage().data_ptr()
        for weight in self.weights:
            same = weight.untyped_storage().data_ptr() == storage and weight.dtype == first.dtype
            if not same or weight.data_ptr() != place or weight.stride() != (columns, 1):
                return False
            place += weight.numel() * weight.element_size()
        return True

    @torch.no_grad()
    def release(self) -> None:
        """Take the layers apart again: each weight in memory of its own, where it was a view."""
        together = self.lies_together()
        for part, weight in zip(self.parts, self.weights, strict=True):
            if part.layer.stack is part:
                part.layer.stack = None
            if together:
                weight.data = weight.data.clone()
        self.whole = self.held = None

    def take(self, number: int, x: Tensor) -> Tensor | None:
        """The part of a layer, by its place, of the product with ``x``; None where the layer has to compute alone."""
        held = self.held
        if held is not None and held[0] is x and number in held[1]:
            state, part = held[1].pop(number)
            if not held[1]:
                self.held = None
            if state == self._state(number, x):
                return part
        if not self._usable() or self.whole is None:
            self.held = None
            return None
        parts = stacked(x, self.whole, self.weights)
        # For those behind it alone: what one before it left is of an earlier forward, with another backward.
        left = {later: (self._state(later, x), parts[later]) for later in range(number + 1, len(parts))}
        self.held = (x, left) if left else None
        return parts[number]

    def _usable(self) -> bool:
        for part in self.parts:
            if not part.holds():
                return False
        # What is compiled asks once, while it is traced: a graph cannot read an address.
        return _lies_together(self.number) if torch.compiler.is_compiling() else self.lies_together()

    def _state(self, number: int, x: Tensor) -> tuple[object, ...]:
        """What must not change while a part waits to be taken: how it is differentiated, and what it was made of."""
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        if torch.compiler.is_compiling() or x.is_inference():
            return modes
        return (*modes, x._version, self.weights[number]._version)


def _lies_together(number: int) -> bool:
    stack = _stacks.get(number)
    return stack is not None and stack.lies_together()


# What torch.compiler.assume_constant_result does, without importing the compiler.
_lies_together._dynamo_marked_constant = True  # type: ignore[attr-defined]
