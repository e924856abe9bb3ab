"""Kernels in Triton. Imports it: import this module inside the function that needs it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RANKS = 16
"""Components that one program computes."""
COLUMNS = 128
"""Inputs, or outputs, that it reads at a time."""


@triton.jit  # type: ignore[untyped-decorator]
def _two_products(  # type: ignore[no-untyped-def]
    x, inner, outer, total, batch, columns, rows, rank,
    BATCH: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    components = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    tokens = tl.arange(0, BATCH)
    valid, seen = components < rank, tokens < batch
    z = tl.zeros((BATCH, RANKS), tl.float32)
    for start in range(0, columns, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        inside = place < columns
        values = tl.load(x + tokens[:, None] * columns + place[None, :], seen[:, None] & inside[None, :], 0.0)
        weight = tl.load(inner + components[:, None] * columns + place[None, :], valid[:, None] & inside[None, :], 0.0)
        z += tl.sum(values.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :], axis=2)
    z = z.to(x.dtype.element_ty).to(tl.float32)  # as the first of two layers would hand it on
    for start in range(0, rows, COLUMNS):
        place = start + tl.arange(0, COLUMNS)
        inside = place < rows
        weight = tl.load(outer + place[:, None] * rank + components[None, :], inside[:, None] & valid[None, :], 0.0)
        part = tl.sum(z[:, None, :] * weight.to(tl.float32)[None, :, :], axis=2)
        tl.atomic_add(total + tokens[:, None] * rows + place[None, :], part, seen[:, None] & inside[None, :])


def two_products(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor | None) -> Tensor:
    """See :func:`lowrank_lit.kernels.two_products`; ``x`` (tokens, columns), all contiguous."""
    (tokens, columns), (rows, rank) = x.shape, outer.shape
    shape = (tokens, rows)
    total = torch.zeros(shape, dtype=torch.float32, device=x.device)
    if bias is not None:
        total += bias
    _two_products[(triton.cdiv(rank, RANKS),)](
        x, inner, outer, total, tokens, columns, rows, rank,
        BATCH=triton.next_power_of_2(tokens), RANKS=RANKS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return total.to(x.dtype)
