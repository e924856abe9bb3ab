"""A linear layer with its weight in NF4, guarded against what bitsandbytes gets wrong on a CPU.

NF4 (arXiv:2305.14314) stores blocks of 64 numbers as their largest absolute value and 4-bit indices into the quantiles
of a normal distribution; with double quantisation the block scales are stored in 8 bits. The format and its kernels are
bitsandbytes'; its layer is not used as it is (version 0.50.2), because on a CPU

- with AVX-512, a weight whose rows have a length that is a multiple of 16 but not of 64 is dequantised to wrong numbers
  without an error (relative error 0.2 to 0.26 instead of 0.09), forward and backward;
- with AVX-512-BF16, the first forward pass in eval mode repacks the weight in place, and train mode does not take that
  back: from then on the layer multiplies by an operator without a derivative, with block scales that have lost digits.
  A number of outputs that is no multiple of 32 raises.

Here a CPU dequantises to a plain matrix, read in rows of 64 that every kernel gets right, and nothing is repacked.
Third, bitsandbytes' layer casts the bias in place to the dtype of the computation, and cannot load what it saves.

Imports bitsandbytes: import this module inside the function that needs it.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any, Self

import torch
from bitsandbytes.autograd._functions import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn

BLOCK = 64
"""Numbers that share a scale."""
_KERNELS = (torch.float32, torch.bfloat16, torch.float16)


class NF4Linear(Linear4bit):
    """y = x W^T + b with W (out_features, in_features) frozen in NF4; made by :meth:`from_weight` or :meth:`empty`.

    It computes as an ``nn.Linear`` with the dequantised weight would: in ``compute_dtype``, or in the dtype of the
    input where that is None (autocast's, under autocast), and the result has the dtype of the input. Gradients flow to
    the input and the bias. On a GPU this is bitsandbytes' kernel where rows are multiples of 64, else the dequantised
    matrix is multiplied. The state dict has bitsandbytes' keys, all tensors, and loads into a layer of the same shape.
    """

    weight: Any  # Params4bit, with its quant_state
    bias: Any  # None or a Parameter
    compute_dtype: torch.dtype | None
    trainable: bool = True  # what the weight is when it is dequantised again

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        double_quant: bool = True,
    ) -> Self:
        """Quantise a weight.

        Args:
            weight: (out_features, in_features), finite, on the device where the layer is to be.
            bias: Of the layer, the parameter itself.
            dtype: What the weight is dequantised to; None is its own.
            compute_dtype: Of products; None is that of the input.
            double_quant: Store the scales of the blocks in 8 bits.
        """
        layer = cls(  # on the meta device: allocates nothing and draws no random numbers
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type="nf4",
            device="meta",
        )
        packed, state = quantize_4bit(
            weight.detach().contiguous(), blocksize=BLOCK, compress_statistics=double_quant, quant_type="nf4"
        )
        state.dtype = weight.dtype if dtype is None else dtype
        layer.weight = Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK,
            compress_statistics=double_quant,
            quant_type="nf4",
            bnb_quantized=True,
        )
        layer.bias = bias
        return layer

    @classmethod
    def empty(
        cls,
        like: nn.Linear,
        *,
        compute_dtype: torch.dtype | None = None,
        double_quant: bool = True,
    ) -> Self:
        """A layer of zeros with the shape, dtype, device and bias of ``like``, to load a state dict into."""
        layer = cls.from_weight(
            torch.zeros(like.out_features, like.in_features, device=like.weight.device),
            like.bias,
            dtype=like.weight.dtype,
            compute_dtype=compute_dtype,
            double_quant=double_quant,
        )
        layer.trainable = like.weight.requires_grad
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else self.compute_dtype or x.dtype
        state = self.weight.quant_state
        if kind == "cuda" and self.in_features % BLOCK == 0:
            result: Tensor = matmul_4bit(x.to(dtype), self.weight.t(), quant_state=state)
        else:
            result = _Product.apply(x.to(dtype), self.weight, state)  # type: ignore[no-untyped-call]
        result = result if autocast else result.to(x.dtype)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def extra_repr(self) -> str:
        """Sizes, as ``print(model)`` shows them."""
        return f"{super().extra_repr()}, nf4"

    def _load_from_state_dict(
        self, state_dict: MutableMapping[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        start = f"{prefix}weight."
        parts = {key.removeprefix(start): state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
        if parts:
            state = QuantState.from_dict(parts, device=self.weight.device)
            if state.shape != self.weight.quant_state.shape or state.quant_type != "nf4":
                lists[2].append(f"{prefix}weight is {state.quant_type} of shape {tuple(state.shape)}")
                return
            self.weight.quant_state = state
        elif f"{prefix}weight" in state_dict:
            lists[2].append(f"{prefix}weight is not quantised in what is loaded, but is in the model")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)


class _Product(torch.autograd.Function):
    """x W^T with W dequantised in each direction anew, so that none stays in memory between the two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, state: QuantState) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.state = state
        return nn.functional.linear(x, dequantize(packed, state, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradient @ dequantize(packed, ctx.state, gradient.dtype), None, None


def dequantize(packed: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The matrix that a packed 4-bit weight stands for, right on every device and for every shape.

    Args:
        packed: Two numbers to a byte, in any storage dtype.
        state: What bitsandbytes keeps beside them.
        dtype: Of the result; the numbers are computed in float32.
    """
    count, block = state.shape.numel(), state.blocksize
    values = packed.detach().as_subclass(Tensor).reshape(-1).view(torch.uint8)
    blocks = -(-count // block)
    # Blocks run on over the ends of rows. As rows of one block each they are a shape that no kernel gets wrong.
    values = nn.functional.pad(values, (0, blocks * block // 2 - len(values)))
    aligned = copy.copy(state)
    aligned.shape = torch.Size((blocks, block))
    aligned.dtype = dtype if dtype in _KERNELS else torch.float32  # of other types a CPU gives memory as it finds it
    whole: Tensor = dequantize_4bit(values, aligned)
    return whole.reshape(-1)[:count].reshape(state.shape).to(dtype)
