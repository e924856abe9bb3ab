"""Experts of a mixture as layers of their own, so that each matrix of each expert is a target like any other.

transformers keeps the experts of a block as fused parameters of three dimensions, ``(experts, rows, columns)``, and
multiplies with them in one module. :class:`SeparateExperts` takes that module's place: one plain ``nn.Linear`` for each
expert and projection, whose weight is a view of the fused parameter until it is factored. What finds, calibrates,
factors, trains and quantises linear layers then needs to know nothing of experts. Routers are no part of it and stay
dense.

A model is separated for the time of a calibration (:class:`ExpertsApart`), and for good where a plan names a matrix of
its experts.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_lit.errors import ModelError

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
"""What a module keeps of its hooks, by the names that ``nn.Module`` gives them."""

Side = Literal["up", "down"]
"""Of an expert's matrix: ``up`` reads hidden states of the model, ``down`` writes them."""

_UP = {True: "gate_up_proj", False: "up_proj"}
_DOWN = "down_proj"

_routed: Tensor | None = None
"""Positions, in the flattened batch, of the tokens of the expert that is at work."""
_fed = 0
"""Tokens of that batch."""


def routed_mask(mask: Tensor | None) -> Tensor | None:
    """A mask ``(batch, length)`` for what the layer at work is fed: inside an expert that of its tokens alone."""
    return mask if mask is None or _routed is None else mask.reshape(-1)[_routed]


def tokens_around(mask: Tensor | None, own: int) -> int:
    """Real tokens of the batch of which the layer at work is fed ``own``: those, but inside an expert, which is given a
    part of them.

    Args:
        mask: ``(batch, length)`` or ``None``, of the batch.
        own: Real tokens that the layer is fed.
    """
    if _routed is None:
        return own
    return _fed if mask is None else int(mask.sum())


class Expert(nn.Module):
    """One expert: ``down(gate(gate_up(x)))``, or ``down(act(up(x)))`` without a gate.

    The children are named ``gate_up`` (or ``up``) and ``down``, not as the fused parameters are: transformers would
    take ``experts.0.down_proj.weight`` in a folder for a part of a fused one.
    """

    def __init__(self, up: nn.Module, down: nn.Module, *, gated: bool) -> None:
        super().__init__()
        self._first = "gate_up" if gated else "up"
        self.add_module(self._first, up)
        self.down = down

    def side(self, side: Side) -> nn.Module:
        """The layer on one side, factored or not."""
        return cast(nn.Module, getattr(self, self._first)) if side == "up" else self.down

    def forward(self, x: Tensor, rest: nn.Module) -> Tensor:
        """Map the expert's tokens ``(tokens, hidden)``.

        Args:
            x: What the router gave to this expert.
            rest: Of the fused module: its activation, its way of gating, its norm.
        """
        found: Any = rest
        activate = found._apply_gate if self._first == "gate_up" else found.act_fn
        result: Tensor = self.down(activate(self.side("up")(x)))
        return found.post_expert_norm(result) if getattr(found, "has_post_expert_norm", False) else result


class SeparateExperts(nn.Module):
    """The experts of one block, each an :class:`Expert` under its number, in the place of a fused module.

    Computes what the fused module does (transformers' ``eager`` form), expert by expert. Where all are dense it is that
    map to the last bit; factored experts may each have a rank of their own.

    Args:
        fused: A module of transformers' experts interface; it is left as it is.

    Attributes:
        count: Number of experts.
        rest: ``fused`` without its matrices: the activation, the way of gating, the norm.
    """

    rest: nn.Module

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        source: Any = fused
        up, down = (getattr(source, name) for name in (_UP[bool(source.has_gate)], _DOWN))
        self.count = int(up.shape[0])
        biases = [getattr(source, f"{name}_bias", None) for name in (_UP[bool(source.has_gate)], _DOWN)]
        for name, parameter in fused._parameters.items():
            if name.removesuffix("_bias") not in (_UP[True], _UP[False], _DOWN):
                self.register_parameter(name, parameter)
        for name, buffer in fused._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in fused._non_persistent_buffers_set)
        for name, module in fused._modules.items():
            self.add_module(name, module)
        # No child: transformers initialises modules by their class, and would look for the matrices in this one. What
        # it holds is registered here, and follows wherever this module is moved.
        rest = copy.copy(fused)
        rest._parameters, rest._buffers, rest._modules = self._parameters, self._buffers, dict(fused._modules)
        self.__dict__["rest"] = rest
        for number in range(self.count):
            layers = [
                _linear(weight, bias, number, transposed=bool(source.is_transposed))
                for weight, bias in zip((up, down), biases, strict=True)
            ]
            self.add_module(str(number), Expert(*layers, gated=bool(source.has_gate)))
        self.train(fused.training)
        for attribute in HOOKS:  # a user's, and their handles
            setattr(self, attribute, getattr(fused, attribute))

    def expert(self, number: int) -> Expert:
        """One of them."""
        return cast(Expert, self._modules[str(number)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted.

        Args:
            hidden_states: ``(tokens, hidden)``.
            top_k_index: Experts of every token ``(tokens, k)``; a number beyond the last expert is none.
            top_k_weights: Their weights ``(tokens, k)``.
        """
        global _routed, _fed
        result = torch.zeros_like(hidden_states)
        for number in self._at_work(top_k_index):
            tokens, places = torch.where(top_k_index == number)
            _routed, _fed = tokens, len(hidden_states)
            try:
                own = self.expert(number)(hidden_states[tokens], self.rest)
            finally:
                _routed = None
            own = own * top_k_weights[tokens, places, None]
            result.index_add_(0, tokens, own.to(result.dtype))
        return result

    def train(self, mode: bool = True) -> Self:
        """As of any module; what is left of the fused one follows."""
        self.rest.train(mode)
        return super().train(mode)

    def _at_work(self, chosen: Tensor) -> list[int]:
        """Experts to call: those that have tokens. In training, and where a job has several processes, all: DDP waits
        for a gradient of every parameter, and ZeRO-3 gathers weights in all processes in one order."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self.training or several:
            return list(range(self.count))
        return [number for number in torch.unique(chosen.detach()).tolist() if number < self.count]

    def extra_repr(self) -> str:
        """Number of experts, as ``print(model)`` shows it."""
        return f"experts={self.count}"


def _linear(weight: Tensor, bias: Tensor | None, number: int, *, transposed: bool) -> nn.Linear:
    """An ``nn.Linear`` whose weight is one expert's part of a fused parameter; on the meta device one of its own."""
    own = weight.detach()[number]
    own = own.mT if transposed else own
    layer = nn.Linear(own.shape[1], own.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    if weight.is_meta:
        return layer.requires_grad_(weight.requires_grad)
    layer.weight = nn.Parameter(own, requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach()[number], requires_grad=bias.requires_grad)
    return layer


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts as fused parameters in the form of transformers' experts interface."""
    gated = getattr(module, "has_gate", None)
    if gated is None or not hasattr(module, "is_transposed"):
        return False
    parts = [module._parameters.get(name) for name in (_UP[bool(gated)], _DOWN)]
    return all(part is not None and part.ndim == 3 and part.is_floating_point() for part in parts)


def separate_experts(model: nn.Module, names: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Put :class:`SeparateExperts` in the places of fused modules.

    Args:
        model: Changed in place; its outputs are the same.
        names: Of matrices; modules that hold none of them are left alone. ``None`` separates all.

    Returns:
        The fused modules by dotted name.
    """
    found = {name: module for name, module in model.named_modules() if is_fused(module)}
    taken = {
        name: module
        for name, module in found.items()
        if names is None or any(matrix.startswith(f"{name}.") for matrix in names)
    }
    for name, module in taken.items():
        _put(model, name, SeparateExperts(module))
    return taken


def fuse_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Put fused modules back in the places of :class:`SeparateExperts`, with copies of their weights.

    Args:
        model: Changed in place; its outputs are the same. Every matrix of its experts is a plain ``nn.Linear``.

    Returns:
        The separate experts by dotted name.

    Raises:
        ModelError: If an expert's matrix is factored; the model is then unchanged.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, SeparateExperts)}
    fused = {name: _fused(name, module) for name, module in found.items()}
    for name, module in fused.items():
        _put(model, name, module)
    return dict(found)


def _fused(name: str, experts: SeparateExperts) -> nn.Module:
    source: Any = experts.rest
    fused = copy.copy(experts.rest)
    fused._parameters, fused._modules = dict(fused._parameters), dict(fused._modules)
    fused._buffers = dict(fused._buffers)
    sides: tuple[tuple[Side, str], ...] = (("up", _UP[bool(source.has_gate)]), ("down", _DOWN))
    for side, matrix in sides:
        layers = [experts.expert(number).side(side) for number in range(experts.count)]
        if not all(isinstance(layer, nn.Linear) for layer in layers):
            raise ModelError(
                f"'{name}' has factored experts, which cannot be fused; make them dense with to_dense first"
            )
        weights = [cast(Tensor, layer.weight) for layer in layers]
        whole = torch.stack([weight.detach().mT if source.is_transposed else weight.detach() for weight in weights])
        trains = any(weight.requires_grad for weight in weights)
        fused._parameters[matrix] = nn.Parameter(whole, requires_grad=trains)
        if layers[0].bias is not None:
            bias = torch.stack([cast(Tensor, layer.bias).detach() for layer in layers])
            fused._parameters[f"{matrix}_bias"] = nn.Parameter(bias, requires_grad=trains)
    for attribute in HOOKS:  # a user's, and their handles
        setattr(fused, attribute, getattr(experts, attribute))
    return fused.train(experts.training)


class ExpertsApart:
    """Experts as layers of their own for the time of a context; at its end the fused modules are back in their places,
    but for those that :meth:`keep` names. After an error all are.

    Args:
        model: Anything; what is no module is left to others to refuse.
        names: See :func:`separate_experts`.
    """

    def __init__(self, model: nn.Module, names: Collection[str] | None = None) -> None:
        self._model, self._names = model, names
        self._fused: dict[str, nn.Module] = {}
        self._kept: set[str] = set()

    def __enter__(self) -> Self:
        if isinstance(self._model, nn.Module):
            self._fused = separate_experts(self._model, self._names)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, module in self._fused.items():
            if error is not None or name not in self._kept:
                _put(self._model, name, module)

    @contextmanager
    def undone(self) -> Iterator[None]:
        """The model as it was before, for the time of the context."""
        apart = {name: self._model.get_submodule(name) for name in self._fused}
        for name, module in self._fused.items():
            _put(self._model, name, module)
        try:
            yield
        finally:
            for name, module in apart.items():
                _put(self._model, name, module)

    def keep(self, names: Collection[str], *, mapped: bool = False) -> None:
        """Leave the experts apart that hold one of the matrices ``names``.

        Args:
            names: Of matrices, as of a plan.
            mapped: Whether weights are mapped from files. Others that stayed dense get memory of their own, so that
                that of the fused parameter can go.
        """
        for name in self._fused:
            if any(matrix.startswith(f"{name}.") for matrix in names):
                self._kept.add(name)
                module = self._model.get_submodule(name)
                if not mapped and isinstance(module, SeparateExperts):
                    _detach(module)


def _detach(experts: SeparateExperts) -> None:
    """Give matrices that stayed views, beside others that did not, memory of their own."""
    for side in ("up", "down"):
        layers = [experts.expert(number).side(side) for number in range(experts.count)]
        dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
        for layer in dense if len(dense) < len(layers) else ():
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)


def sides_of(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[str, Side]]:
    """Of every layer that is an expert's: the dotted name of its experts, and its side; other layers have no entry."""
    found: dict[int, tuple[str, Side]] = {}
    sides: tuple[Side, Side] = ("up", "down")
    for name, module in model.named_modules():
        if isinstance(module, SeparateExperts):
            for number in range(module.count):
                found |= {id(module.expert(number).side(side)): (name, side) for side in sides}
    return {name: found[id(layer)] for name, layer in layers.items() if id(layer) in found}


def routers_of(model: nn.Module) -> set[int]:
    """Ids of linear layers beside the experts of a block, separate or fused, that have an output for each expert: a
    router stays dense, for it decides who works and has hardly any parameters."""
    found = set()
    for module in model.modules():
        counts = {
            child.count if isinstance(child, SeparateExperts) else int(cast(Tensor, getattr(child, _DOWN)).shape[0])
            for child in module.children()
            if isinstance(child, SeparateExperts) or is_fused(child)
        }
        if counts:
            found |= {
                id(child)
                for child in module.children()
                if isinstance(child, nn.Linear) and child.out_features in counts
            }
    return found


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
