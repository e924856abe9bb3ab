"""Which layers are fed the same tensor, found by watching what a forward hands to each of them."""

from __future__ import annotations

from torch import Tensor


class Sharing:
    """Layers that are fed the same tensor one after the other; the first of them that is called owns it.

    Tensors are compared with ``is``: two that are merely equal are two.

    Attributes:
        owners: By layer name, the name of the layer whose tensor it was fed when it was first called; its own name
            where the tensor was a new one.
    """

    def __init__(self) -> None:
        self.owners: dict[str, str] = {}
        self._last: tuple[Tensor, str] | None = None

    def meet(self, name: str, x: Tensor) -> bool:
        """Note that a layer is fed ``x``; is that the tensor that was owned last?"""
        last, owner = self._last if self._last is not None else (None, name)
        self.owners.setdefault(name, owner if last is x else name)
        return last is x

    def own(self, name: str, x: Tensor) -> None:
        """Make ``name`` the owner of ``x`` for the layers that are called next."""
        self._last = (x, name)

    def forget(self) -> None:
        """Let the last tensor go, at the end of a forward."""
        self._last = None
