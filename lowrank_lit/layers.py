"""Layers that hold a factored weight: two factors, or rows of the product and the coefficients of the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor, nn

from lowrank_lit.errors import ModelError, NonFiniteError
from lowrank_lit.pivot import pivot_factors
from lowrank_lit.products import is_plain, recomputed, reordered
from lowrank_lit.stacking import Part


class _TwoParts(nn.Module):
    """What both layers share: sizes, two plain ``nn.Linear`` children, and the ways to make one.

    ``bias`` is the subclass's own: a property of the one, a parameter of the other.

    What :func:`lowrank_lit.accelerate` sets, which changes how a layer computes and not what; copies and pickles of a
    layer are without it:

    Attributes:
        stack: Its place in a group whose inner factors are one product, or None.
        recompute: Whether ``inner x`` is computed again in the backward instead of being kept for it.
    """

    stack: Part | None = None
    recompute: bool = False

    in_features: int
    out_features: int
    rank: int
    inner: nn.Linear
    outer: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        greatest, what = self._greatest_rank(in_features, out_features)
        if not 1 <= rank <= greatest:
            raise ModelError(
                f"rank={rank} does not fit {what} of shape ({out_features}, {in_features}); "
                f"choose a rank from 1 to {greatest}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.inner = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self._add_outer(bias, device, dtype)

    @staticmethod
    def _greatest_rank(in_features: int, out_features: int) -> tuple[int, str]:
        """The rank that the form has at most, and how an error calls the form."""
        raise NotImplementedError

    def _add_outer(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Make ``outer``, the bias, and what else the form has."""
        raise NotImplementedError

    def _store(self, outer: Tensor, inner: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        """Copy the factors (out_features, rank) and (rank, in_features) into an empty layer, checked."""
        raise NotImplementedError

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer to load weights into: every number is NaN and every index -1, so that one which was not loaded shows.

        Draws no random numbers.

        Args:
            in_features: Columns of W.
            out_features: Rows of W.
            rank: As of the class.
            bias: Whether there is a bias.
            device: Of everything; "meta" allocates nothing.
            dtype: Of the parameters.

        Raises:
            ModelError: If the rank is out of the class's range.
        """
        layer = cls(in_features, out_features, rank, bias=bias, device="meta", dtype=dtype)
        _fill_with_nan(layer, device)
        return layer

    @classmethod
    def from_factors(
        cls,
        outer: Tensor,
        inner: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Build a layer from two factors of its weight; values are copied and every parameter requires a gradient.

        The pivot form finds its rows and coefficients in float64.

        Args:
            outer: Left factor (out_features, rank); in pivot form rank < out_features.
            inner: Right factor (rank, in_features).
            bias: Bias (out_features,), or None.
            dtype: Of the stored numbers; None keeps that of ``outer``.
            device: Of the stored numbers; None keeps that of ``outer``.

        Raises:
            ModelError: If the shapes do not belong together, the rank is out of range, or a coefficient of the pivot
                form is too large.
            NonFiniteError: If a number is NaN or infinite, or becomes infinite in ``dtype``.
        """
        _check_shapes(outer, inner, bias)
        dtype = outer.dtype if dtype is None else dtype
        layer = cls.empty(
            inner.shape[1],
            outer.shape[0],
            outer.shape[1],
            bias=bias is not None,
            device=outer.device if device is None else device,
            dtype=dtype,
        )
        with torch.no_grad():
            layer._store(outer, inner, bias, dtype)
        return layer

    def _inner(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x) if self.stack is None else self.stack.product(self, x)
        return result

    def _recomputes(self) -> bool:
        """Whether this forward would keep ``inner x`` for its backward, and is not to."""
        return (
            self.recompute
            and torch.is_grad_enabled()
            and is_plain(self.inner)
            and is_plain(self.outer)
            and self.outer.weight.requires_grad
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Of nn.Module, behind to(), float() and others: parameters may have new memory after it.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.stack is not None:
            self.stack.stack.gather()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("stack", "recompute", "kernel")}

    def extra_repr(self) -> str:
        """Sizes, as ``print(model)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class FactoredLinear(_TwoParts):
    """A linear map whose weight is the product of two factors: y = outer (inner x) + b, with W ~ outer inner.

    Both factors are plain ``nn.Linear`` children, so that PEFT, bitsandbytes, DeepSpeed and ``torch.compile`` meet
    nothing special: ``inner`` (rank, in_features) without a bias, ``outer`` (out_features, rank) with the bias. The
    weights of a new layer are random, as those of ``nn.Linear`` are; :meth:`from_factors` and :meth:`empty` make the
    other kinds.

    Args:
        in_features: Columns of W.
        out_features: Rows of W.
        rank: Columns of ``outer``, 1 or more. A rank that saves nothing, r (m + n) >= m n, is allowed.
        bias: Whether ``outer`` has a bias of shape (out_features,).
        device: Of both factors.
        dtype: Of both factors.

    Raises:
        ModelError: If the rank is outside 1..min(in_features, out_features).
    """

    kernel: Callable[[FactoredLinear, Tensor], Tensor | None] | None = None
    """Set by :func:`lowrank_lit.accelerate`: both products at once, or None where it does not serve these inputs."""

    @staticmethod
    def _greatest_rank(in_features: int, out_features: int) -> tuple[int, str]:
        return min(in_features, out_features), "a weight"

    def _add_outer(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.outer = nn.Linear(self.rank, self.out_features, bias=bias, device=device, dtype=dtype)

    def _store(self, outer: Tensor, inner: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.outer.weight.copy_(_checked(outer, "outer", dtype))
        self.inner.weight.copy_(_checked(inner, "inner", dtype))
        if bias is not None:
            self.outer.bias.copy_(_checked(bias, "bias", dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the weight: outer (out_features, rank) and inner (rank, in_features), the parameters
        themselves; without unmerged adapters."""
        return self.outer.weight, self.inner.weight

    @property
    def weight(self) -> Tensor:
        """The product outer inner, (out_features, in_features); computed at every access, in the factors' dtype.

        Unmerged adapters on the factors are not part of it. Factors in 4 bits are dequantised for it.
        """
        return _plain(self.outer) @ _plain(self.inner)

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``outer``, (out_features,), or None."""
        return self.outer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        if self.kernel is not None and (fused := self.kernel(self, x)) is not None:
            return fused
        if self._recomputes():
            return recomputed(x, self.inner.weight, self.outer.weight, self.outer.bias)[1]
        result: Tensor = self.outer(self._inner(x))
        return result


class PivotLinear(_TwoParts):
    """A linear map of rank k whose weight is k of its own rows and the coefficients of the others (arXiv:2501.19090).

    With the pivot rows P (rank, in_features) and coefficients E (out_features - rank, rank): z = P x, the outputs of
    the pivot rows are z, those of the other rows E z. That is k (m + n - k) numbers for an (m, n) weight, k^2 fewer
    than two factors and the same map. Both parts are plain ``nn.Linear`` children without a bias, ``inner`` (P) and
    ``outer`` (E), so that an adapter on either leaves the rank as it is. The bias belongs to the layer.

    ``positions`` (out_features,), int32, a persistent buffer, says where each output stands in (z, E z). These m
    indices are no parameters: they count in bytes only.

    Args:
        in_features: Columns n of W.
        out_features: Rows m of W.
        rank: Pivot rows k.
        bias: Whether there is a bias of shape (out_features,).
        device: Of everything.
        dtype: Of the parameters.

    Raises:
        ModelError: If the rank is outside 1..min(in_features, out_features - 1).
    """

    positions: Tensor
    bias: nn.Parameter | None

    @staticmethod
    def _greatest_rank(in_features: int, out_features: int) -> tuple[int, str]:
        return min(in_features, out_features - 1), "the pivot form of a weight"

    def _add_outer(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        rows = self.out_features
        self.outer = nn.Linear(self.rank, rows - self.rank, bias=False, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(torch.zeros(rows, device=device, dtype=dtype)) if bias else None)
        self.register_buffer("positions", torch.arange(rows, dtype=torch.int32, device=device))

    def _store(self, outer: Tensor, inner: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        found = pivot_factors(_checked(outer, "outer", outer.dtype), _checked(inner, "inner", inner.dtype))
        self.inner.weight.copy_(_checked(found.pivots, "pivots", dtype))
        self.outer.weight.copy_(_checked(found.coefficients, "coefficients", dtype))
        self.positions.copy_(found.positions)
        if self.bias is not None and bias is not None:
            self.bias.copy_(_checked(bias, "bias", dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Factors of the weight: (I; E) in the order of the outputs (out_features, rank), and the pivot rows
        (rank, in_features); without unmerged adapters."""
        coefficients = self.outer.weight
        unit = torch.eye(self.rank, dtype=coefficients.dtype, device=coefficients.device)
        return torch.cat([unit, coefficients])[self.positions], self.inner.weight

    @property
    def weight(self) -> Tensor:
        """The weight (out_features, in_features); computed at every access, in the dtype of its parts.

        Unmerged adapters are not part of it.
        """
        pivots = self.inner.weight
        return torch.cat([pivots, self.outer.weight @ pivots])[self.positions]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        if self._recomputes():
            parts = recomputed(x, self.inner.weight, self.outer.weight)
        else:
            pivots = self._inner(x)
            parts = pivots, self.outer(pivots)
        result = reordered(torch.cat(parts, dim=-1), self.positions)
        return result if self.bias is None else result + self.bias


FactoredLayer: TypeAlias = FactoredLinear | PivotLinear
"""Any layer of this package, for ``isinstance`` and annotations."""

LAYER_OF_FORM: dict[str, type[FactoredLinear] | type[PivotLinear]] = {"factored": FactoredLinear, "pivot": PivotLinear}
"""The layer that holds a matrix, by the form that the plan gives it; a dense matrix has none."""


def _plain(layer: nn.Linear) -> Tensor:
    """The weight of a factor, dequantised where it is packed: some models ask a layer for its weight's dtype."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    from lowrank_lit.nf4 import dequantize

    return dequantize(layer.weight, state, state.dtype)


def _check_shapes(outer: Tensor, inner: Tensor, bias: Tensor | None) -> None:
    if outer.ndim != 2 or inner.ndim != 2 or outer.shape[1] != inner.shape[0]:
        raise ModelError(
            f"factors of shapes {tuple(outer.shape)} and {tuple(inner.shape)} do not multiply; "
            "give outer (out, rank) and inner (rank, in)"
        )
    if bias is not None and bias.shape != outer.shape[:1]:
        raise ModelError(f"a bias of shape {tuple(bias.shape)} does not fit outer {tuple(outer.shape)}; give (out,)")


def _fill_with_nan(layer: nn.Module, device: torch.device | str | None) -> None:
    """Give a layer on the meta device memory: NaN, and -1 for indices."""
    target = torch.get_default_device() if device is None else torch.device(device)
    if target.type == "meta":
        return
    layer.to_empty(device=target)
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1)


def _checked(values: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """``values`` cast to ``dtype``, refused where a number is not finite before or after."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"factor {what} has a NaN or infinite entry; check the statistics it was computed from")
    cast = values.to(dtype)
    if not bool(torch.isfinite(cast).all()):
        raise NonFiniteError(
            f"factor {what} reaches {float(values.abs().max()):.3g}, more than {dtype} holds "
            f"({torch.finfo(dtype).max:.3g}); balance the factors or use a wider dtype"
        )
    return cast
