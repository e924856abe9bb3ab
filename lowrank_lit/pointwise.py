"""Convolutions of one position as linear layers, so that they are targets like any other.

A convolution whose kernel covers a single position multiplies the channels of every position by one matrix. Written as
an ``nn.Linear`` over the channels it is found, calibrated, factored and trained as one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from lowrank_lit.surgery import Target, names_by_module, replace_module


class PointwiseLinear(nn.Module):
    """A convolution with a kernel of one position: ``linear`` over the channels of every position.

    Args:
        convolution: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, as :func:`is_pointwise` accepts it. Its parameters
            are taken over: the weight as a view of it, in the same memory.

    Attributes:
        linear: An ``nn.Linear`` (out_channels, in_channels), or what it was factored into.
        stride: Of the convolution, one number for each dimension.
    """

    linear: nn.Module

    def __init__(self, convolution: nn.Module) -> None:
        super().__init__()
        source = cast(nn.Conv2d, convolution)
        weight = source.weight
        self.stride = tuple(source.stride)
        with torch.device("meta"):  # its own numbers would be drawn for nothing
            linear = nn.Linear(source.in_channels, source.out_channels, bias=source.bias is not None)
        linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=weight.requires_grad)
        if source.bias is not None:
            linear.bias = cast(nn.Parameter, source.bias)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (batch, in_channels, positions in 1 to 3 dimensions), or one without the batch."""
        dimensions = len(self.stride)
        for dimension, step in enumerate(self.stride, start=x.ndim - dimensions):
            if step > 1:
                x = x[(slice(None),) * dimension + (slice(None, None, step),)]
        channels = x.ndim - dimensions - 1
        result: Tensor = self.linear(x.movedim(channels, -1)).movedim(-1, channels)
        return result

    def extra_repr(self) -> str:
        """The stride, as ``print(model)`` shows it."""
        return f"stride={self.stride}"


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of one position: kernel 1, no padding, no groups, a plain weight."""
    return (
        type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        and set(cast(nn.Conv2d, module).kernel_size) == {1}
        and not any(cast(nn.Conv2d, module)._reversed_padding_repeated_twice)
        and cast(nn.Conv2d, module).groups == 1
        and module._parameters.get("weight") is not None
        and cast(Tensor, module.weight).is_floating_point()
    )


def pointwise_as_linear(model: nn.Module) -> list[str]:
    """Put a :class:`PointwiseLinear` in the place of every convolution of one position, so that it can be factored.

    Call it once the weights are loaded and before an optimizer is made; a module that is to load an export of the
    result (:func:`lowrank_lit.load_module`) calls it too. The matrix of a convolution ``name`` is ``name.linear``.

    Args:
        model: Changed in place; its outputs are the same up to the order of summation. Gradients that its convolutions
            hold are left behind.

    Returns:
        Dotted names of the convolutions, in the order of the model's modules; one that several parents share is one.
    """
    found = [
        Target(names[0], module, names[1:])
        for module, names in names_by_module(model).values()
        if names[0] and is_pointwise(module)
    ]
    for target in found:
        replace_module(model, target, PointwiseLinear(target.module))
    return [target.name for target in found]
