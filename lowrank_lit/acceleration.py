"""Making a factored model compute faster, or train in less memory, without changing what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.errors import ModelError, reason_of
from lowrank_lit.kernels import Chooser
from lowrank_lit.layers import FactoredLayer, FactoredLinear
from lowrank_lit.paging import release
from lowrank_lit.products import is_plain
from lowrank_lit.sharing import Sharing
from lowrank_lit.stacking import InnerStack
from lowrank_lit.streaming import evaluating, run_model


class Acceleration:
    """What :func:`accelerate` did to a model.

    Attributes:
        groups: Names of the layers that share a product, one tuple per product; empty with ``stack=False``.
        kernels: Names of the layers that use the kernel for some inputs.
        recomputing: Names of the layers that compute a product again in the backward.
    """

    def __init__(self, layers: Mapping[str, FactoredLayer]) -> None:
        self._layers = dict(layers)
        self._stacks: list[InnerStack] = []
        self.groups: tuple[tuple[str, ...], ...] = ()
        self.kernels: tuple[str, ...] = ()
        self.recomputing: tuple[str, ...] = ()

    def undo(self) -> None:
        """Make every layer compute as it did before; a second call does nothing."""
        for stack in self._stacks:
            stack.release()
        for layer in self._layers.values():
            layer.recompute = False
            if isinstance(layer, FactoredLinear):
                layer.kernel = None
        self._stacks.clear()
        self.groups = self.kernels = self.recomputing = ()

    def _stack(self, groups: list[list[str]]) -> None:
        for names in groups:
            layers = [self._layers[name] for name in names]
            before = [layer.inner.weight.data for layer in layers]
            self._stacks.append(InnerStack(layers))
            release(before)  # where they are mapped from a file
        self.groups = tuple(tuple(names) for names in groups)


def accelerate(
    model: nn.Module,
    *,
    stack: bool = True,
    kernels: bool = False,
    recompute: bool = False,
    inputs: Mapping[str, Any] | None = None,
) -> Acceleration:
    """Change how the factored layers of a model compute, in place; what they compute stays, up to the order of sums.

    Parameters keep their names and stay the objects they are, so that optimizers, checkpoints and ``save_pretrained``
    notice nothing. What an earlier call did is undone first. Copies of the model are without it.

    Call it once the weights are there and, if they are to move, where the model is to run; after merging adapters, call
    it again. What compiles the model compiles it afterwards.

    Args:
        model: Any module with factored layers.
        stack: Let the layers that are fed the same tensor (q, k and v; gate and up) take one product for their inner
            factors. One forward of ``model`` on ``inputs`` shows which they are. A layer that is handed another tensor
            at run time computes alone. Layers with adapters or in 4 bits are left as they are.
        kernels: On a CUDA device, let a layer use one Triton kernel for both its products where that is measured to be
            faster, which takes seconds per shape. Needs ``pip install "lowrank-lit[kernels]"``. No effect on a CPU.
        recompute: Keep the input alone for the backward, as a dense layer does, and compute its product with the inner
            factor again: activations of training take less memory and its steps longer. Such layers do not share a
            product while gradients are recorded.
        inputs: Keyword arguments of a forward for ``stack``, on the model's device, as small as it takes. None makes
            ``input_ids`` of two tokens for a model of transformers.

    Raises:
        ModelError: If the model has no factored layer, or does not run on the inputs.
        LowRankError: If ``kernels`` is asked for and Triton is missing.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactoredLayer)}
    if not layers:
        raise ModelError(f"{type(model).__name__} has no factored layer to accelerate; compress it first, or load one")
    chooser = Chooser() if kernels else None
    _undo_earlier(layers)
    done = Acceleration(layers)
    if stack:
        done._stack(_groups(model, layers, inputs))
    for layer in layers.values():
        layer.recompute = recompute
    done.recomputing = tuple(layers) if recompute else ()
    if chooser is not None:
        chosen = {
            name: chooser.kernel_for(layer) for name, layer in layers.items() if isinstance(layer, FactoredLinear)
        }
        for name, kernel in chosen.items():
            layer = layers[name]
            if isinstance(layer, FactoredLinear) and kernel is not None:
                layer.kernel = kernel
        done.kernels = tuple(name for name, kernel in chosen.items() if kernel is not None)
    return done


def _undo_earlier(layers: Mapping[str, FactoredLayer]) -> None:
    earlier = Acceleration(layers)
    stacks = {id(layer.stack.stack): layer.stack.stack for layer in layers.values() if layer.stack is not None}
    earlier._stacks = list(stacks.values())
    earlier.undo()


def _groups(model: nn.Module, layers: Mapping[str, FactoredLayer], inputs: Mapping[str, Any] | None) -> list[list[str]]:
    """Layers that can share a product, by name: fed the same tensor, with weights of one kind that no other holds."""
    fed = _fed_together(model, layers, _some_inputs(model) if inputs is None else inputs)
    holders: dict[int, int] = {}
    for layer in layers.values():
        holders[id(layer.inner.weight)] = holders.get(id(layer.inner.weight), 0) + 1
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, owner in fed.items():
        weight = layers[name].inner.weight
        if is_plain(layers[name].inner) and holders[id(weight)] == 1 and not weight.is_meta:
            groups.setdefault((owner, weight.dtype, weight.device), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _fed_together(
    model: nn.Module, layers: Mapping[str, FactoredLayer], inputs: Mapping[str, Any]
) -> dict[str, tuple[str, int]]:
    """By layer, the first of those that are fed its input, and the version of the tensor, for it may be written to."""
    sharing = Sharing()
    versions: dict[str, int] = {}

    def hook_of(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            if not args or not isinstance(args[0], Tensor):
                return
            x = args[0]
            versions.setdefault(name, 0 if x.is_inference() else x._version)
            if not sharing.meet(name, x):
                sharing.own(name, x)

        return hook

    handles = [layer.register_forward_pre_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            run_model(model, dict(inputs))
    except Exception as error:  # a forward of the user's own may raise anything
        raise ModelError(
            f"{type(model).__name__} does not run on inputs={sorted(inputs)} ({reason_of(error)}); give inputs, "
            "keyword arguments of a small forward on the model's device"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return {name: (owner, versions[name]) for name, owner in sharing.owners.items()}


def _some_inputs(model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return {"input_ids": ids, "decoder_input_ids": ids.clone()}
    return {"input_ids": ids}
