"""Products of a factored layer that do better than two layers in a row: several at once, or with less kept for the
backward.

The backward of y = B (A x) needs x for the gradient of A and A x for that of B, where that of a dense W needs x alone.
:func:`recomputed` keeps x alone and computes A x again, one more product of six.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is no more than its weight and bias, so that its product may be computed without calling it.

    It is not where something listens to it or has replaced it (PEFT, bitsandbytes, a hook), nor where its weight is not
    all there (DeepSpeed's ZeRO 3, FSDP).
    """
    if (
        type(layer) is not nn.Linear
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__  # accelerate's hooks
    ):
        return False
    # Not by attribute, which takes as long as a small product's launch.
    weight = layer._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.shape == (layer.out_features, layer.in_features)


def stacked(x: Tensor, whole: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``x W_i^T`` of several weights (r_i, columns) in one product with ``whole`` (sum r_i, columns).

    Args:
        x: Inputs (..., columns).
        whole: The weights one above the other, in the same memory.
        weights: The weights themselves, which get the gradients.

    Returns:
        Views (..., r_i) of one result.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
        parts: tuple[Tensor, ...] = _Stacked.apply(_as_computed(x), whole, *weights)  # type: ignore[no-untyped-call]
        return parts
    # Views all the same; without the bookkeeping for derivatives, which takes as long as a small product.
    sizes = [len(weight) for weight in weights]
    return tuple(torch.unsafe_split_with_sizes(functional.linear(x, whole), sizes, dim=-1))


def recomputed(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``z = x inner^T`` and ``z outer^T + bias``, of which x alone is kept for the backward.

    Args:
        x: Inputs (..., columns).
        inner: (rank, columns).
        outer: (rows, rank).
        bias: (rows,), or None.
    """
    pair: tuple[Tensor, Tensor] = _Recomputed.apply(_as_computed(x), inner, outer, bias)  # type: ignore[no-untyped-call]
    return pair


def reordered(values: Tensor, positions: Tensor) -> Tensor:
    """``values[..., positions]`` for a permutation.

    Args:
        values: (..., m).
        positions: A permutation (m,), int32 or int64.
    """
    if torch.is_grad_enabled() and values.requires_grad:
        result: Tensor = _Reordered.apply(values, positions)  # type: ignore[no-untyped-call]
        return result
    return _taken(values, positions)


def _taken(values: Tensor, positions: Tensor) -> Tensor:
    # As a matrix: on a CPU, index_select along the last of three dimensions takes ten times as long.
    return _flat(values).index_select(1, positions).view(values.shape)


def _as_computed(x: Tensor) -> Tensor:
    """``x`` in the dtype of the products: under autocast its lower one, which is then what is kept."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Reordered(torch.autograd.Function):
    """See :func:`reordered`. The derivative of a permutation is its inverse; that of ``index_select`` adds up, which
    takes ten times as long on a CPU and is in no fixed order on a GPU."""

    @staticmethod
    def forward(values: Tensor, positions: Tensor) -> Tensor:
        return _taken(values, positions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        places = torch.arange(len(positions), device=positions.device)
        return reordered(gradient, torch.empty_like(places).scatter_(0, positions.long(), places)), None


class _Stacked(torch.autograd.Function):
    """See :func:`stacked`. The gradients of the inputs add up in one tensor, and no weight is copied."""

    @staticmethod
    def forward(x: Tensor, whole: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return torch.split(functional.linear(x, whole), [len(weight) for weight in weights], dim=-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(inputs[0], *inputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        of_x: Tensor | None = None
        of_weights: list[Tensor | None] = []
        for number, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            given = None if gradient is None else _flat(gradient)
            if given is not None and ctx.needs_input_grad[0]:
                cast = weight.to(given.dtype)
                of_x = given @ cast if of_x is None else torch.addmm(of_x, given, cast)
            needed = given is not None and ctx.needs_input_grad[2 + number]
            of_weights.append(given.T @ _flat(x) if needed and given is not None else None)
        return (None if of_x is None else of_x.view(x.shape), None, *of_weights)


class _Recomputed(torch.autograd.Function):
    """See :func:`recomputed`."""

    @staticmethod
    def forward(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        z = functional.linear(x, inner)
        return z, functional.linear(z, outer, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_z: Tensor | None, of_y: Tensor | None) -> tuple[Tensor | None, ...]:
        x, inner, outer = ctx.saved_tensors
        flat, needed = _flat(x), ctx.needs_input_grad
        total = None if of_z is None else _flat(of_z)
        of_outer = of_bias = None
        if of_y is not None:
            given = _flat(of_y)
            back = outer.to(given.dtype)
            total = given @ back if total is None else torch.addmm(total, given, back)
            if needed[2]:
                of_outer = given.T @ functional.linear(flat, inner.to(flat.dtype))
            if needed[3]:
                of_bias = given.sum(0)
        of_x = of_inner = None
        if total is not None:
            of_x = (total @ inner.to(total.dtype)).view(x.shape) if needed[0] else None
            of_inner = total.T @ flat if needed[1] else None
        return of_x, of_inner, of_outer, of_bias
