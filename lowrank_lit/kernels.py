"""Both products of a factored layer in one kernel, for the few tokens of a decode step.

y = B (A x) with A (r, n) and B (m, r): every program of the kernel takes some of the r components, reads their rows of
A and their columns of B once, and adds its share to y; what stands between the two products stays in registers. Shares
are added up in float32 in no fixed order.

Whether that beats two products depends on shape, dtype and device, so it is measured, and two products stay what is
used wherever it does not. The kernel is for CUDA.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

from lowrank_lit.extras import load_triton
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.products import is_plain

TOKENS = (1, 2, 4, 8)
"""Numbers of tokens that are measured; more are never given to the kernel."""
_ROUNDS = 20


def two_products(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x inner^T outer^T + bias`` in one kernel; equal to two products up to the order of sums, without a derivative.

    Args:
        x: Inputs (..., columns), of no more than ``max(TOKENS)`` tokens.
        inner: (rank, columns), contiguous.
        outer: (rows, rank), contiguous.
        bias: (rows,), or None.

    Raises:
        LowRankError: If Triton is missing.
    """
    load_triton("two_products")
    from lowrank_lit import _triton

    flat = x.reshape(-1, x.shape[-1]).contiguous()
    return _triton.two_products(flat, inner, outer, bias).view(*x.shape[:-1], outer.shape[0])


class Chooser:
    """Decides for every shape, once, up to how many tokens the kernel is faster, by measurement on the device."""

    def __init__(self) -> None:
        load_triton("kernels=True")
        self._limits: dict[tuple[object, ...], int] = {}

    def kernel_for(self, layer: FactoredLinear) -> Callable[[FactoredLinear, Tensor], Tensor | None] | None:
        """What the layer's ``kernel`` is to be: None where two products are the faster, or the layer is on no GPU."""
        inner, outer = layer.inner, layer.outer
        if not (is_plain(inner) and is_plain(outer)) or inner.weight.device.type != "cuda":
            return None
        key = (outer.weight.shape, inner.weight.shape, inner.weight.dtype, outer.bias is None, inner.weight.device)
        if key not in self._limits:
            self._limits[key] = most_tokens(_measure(inner.weight, outer.weight, outer.bias))
        limit = self._limits[key]
        return None if limit == 0 else _Kernel(limit)


class _Kernel:
    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __call__(self, layer: FactoredLinear, x: Tensor) -> Tensor | None:
        few = x.numel() <= self.limit * layer.in_features
        if not few or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or x.device.type != "cuda":
            return None
        if not (is_plain(layer.inner) and is_plain(layer.outer)):
            return None
        return two_products(x, layer.inner.weight, layer.outer.weight, layer.outer.bias)


def most_tokens(times: Mapping[int, tuple[float, float]]) -> int:
    """Up to how many tokens the kernel is the faster, without a gap below; 0 where it is not for a single one.

    Args:
        times: By the number of tokens: seconds of the kernel and of two products.
    """
    limit = 0
    for tokens, (kernel, plain) in sorted(times.items()):
        if kernel >= plain:
            break
        limit = tokens
    return limit


@torch.no_grad()
def _measure(inner: Tensor, outer: Tensor, bias: Tensor | None) -> dict[int, tuple[float, float]]:
    """Seconds of the kernel and of two products by the number of tokens: medians of turns."""

    def plain(x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, inner), outer, bias)

    def kernel(x: Tensor) -> Tensor:
        return two_products(x, inner, outer, bias)

    found = {}
    for tokens in TOKENS:
        x = torch.ones(tokens, inner.shape[1], dtype=inner.dtype, device=inner.device)
        for route in (kernel, plain):  # compiles, and warms up
            route(x)
        pairs = [(_seconds(kernel, x), _seconds(plain, x)) for _ in range(_ROUNDS)]
        found[tokens] = (statistics.median(own for own, _ in pairs), statistics.median(two for _, two in pairs))
    return found


def _seconds(route: Callable[[Tensor], Tensor], x: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    route(x)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
