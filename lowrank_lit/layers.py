"""Layers that hold a factored weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_lit.errors import ModelError, NonFiniteError


class FactoredLinear(nn.Module):
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
        if not 1 <= rank <= min(in_features, out_features):
            raise ModelError(
                f"rank={rank} does not fit a weight of shape ({out_features}, {in_features}); "
                f"choose a rank from 1 to {min(in_features, out_features)}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.inner = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.outer = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

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
    ) -> FactoredLinear:
        """A layer to load weights into: every number is NaN, so that one which was not loaded shows.

        Draws no random numbers.

        Args:
            in_features: Columns of W.
            out_features: Rows of W.
            rank: Columns of ``outer``.
            bias: Whether ``outer`` has a bias.
            device: Of both factors; "meta" allocates nothing.
            dtype: Of both factors.

        Raises:
            ModelError: If the rank is outside 1..min(in_features, out_features).
        """
        layer = cls(in_features, out_features, rank, bias=bias, device="meta", dtype=dtype)
        target = torch.get_default_device() if device is None else torch.device(device)
        if target.type != "meta":
            layer.to_empty(device=target)
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.fill_(float("nan"))
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
    ) -> FactoredLinear:
        """Build a layer from factors; values are copied and every parameter requires a gradient.

        Args:
            outer: Left factor (out_features, rank).
            inner: Right factor (rank, in_features).
            bias: Bias (out_features,), or None.
            dtype: Of the stored factors; None keeps that of ``outer``.
            device: Of the stored factors; None keeps that of ``outer``.

        Raises:
            ModelError: If the shapes do not belong together.
            NonFiniteError: If a number is NaN or infinite, or becomes infinite in ``dtype``.
        """
        if outer.ndim != 2 or inner.ndim != 2 or outer.shape[1] != inner.shape[0]:
            raise ModelError(
                f"factors of shapes {tuple(outer.shape)} and {tuple(inner.shape)} do not multiply; "
                "give outer (out, rank) and inner (rank, in)"
            )
        if bias is not None and bias.shape != outer.shape[:1]:
            raise ModelError(
                f"a bias of shape {tuple(bias.shape)} does not fit outer {tuple(outer.shape)}; give (out,)"
            )
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
            layer.outer.weight.copy_(_checked(outer, "outer", dtype))
            layer.inner.weight.copy_(_checked(inner, "inner", dtype))
            if bias is not None:
                layer.outer.bias.copy_(_checked(bias, "bias", dtype))
        return layer

    @property
    def weight(self) -> Tensor:
        """The product outer inner, (out_features, in_features); computed at every access, in the factors' dtype.

        Unmerged adapters on the factors are not part of it.
        """
        return self.outer.weight @ self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``outer``, (out_features,), or None."""
        return self.outer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        result: Tensor = self.outer(self.inner(x))
        return result

    def extra_repr(self) -> str:
        """Sizes, as ``print(model)`` shows them."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.outer.bias is not None}"
        )


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
