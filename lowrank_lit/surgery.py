"""Finding the linear layers of a model, replacing them in place, and counting what is stored.

Everything here works on names and identities of modules and parameters; no architecture is known by name. An
``nn.Linear`` keeps its weight as (out, in), the ``Conv1D`` of transformers (GPT-2) as (in, out); :func:`dense_weight`
gives (out, in) for both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowrank_lit.errors import ModelError, NonFiniteError
from lowrank_lit.experts import HOOKS, ExpertsApart, routers_of
from lowrank_lit.layers import LAYER_OF_FORM, FactoredLayer
from lowrank_lit.paging import release
from lowrank_lit.plan import RankPlan

_HEADS = frozenset({"score", "classifier"})
_PACKED = frozenset({"Linear4bit", "Linear8bitLt"})  # of bitsandbytes


@dataclass(frozen=True)
class Target:
    """A linear layer that can be factored."""

    name: str
    """Its first dotted name in ``model.named_modules()``."""
    module: nn.Module
    """The ``nn.Linear`` or ``Conv1D`` itself."""
    aliases: tuple[str, ...] = ()
    """Its other names, where several parents share the object."""

    @property
    def rows(self) -> int:
        """Output features m."""
        return dense_weight(self.module).shape[0]

    @property
    def columns(self) -> int:
        """Input features n."""
        return dense_weight(self.module).shape[1]


def find_targets(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, Target]:
    """Find the layers to factor, by their first name, in the order of the model's modules.

    A layer object that several parents share is one target. A weight that another module holds as well (a tied
    embedding) is none: factoring one holder would untie them. Nor is the router of a mixture of experts; the experts
    are, where they are layers of their own (:mod:`lowrank_lit.experts`).

    Args:
        model: Any module.
        patterns: Shell globs on dotted names, such as ``*.self_attn.*``, each of which must match a linear layer. None
            takes every linear layer except the output embedding, tied weights and classification heads (a part of the
            name is ``score`` or ``classifier``).

    Raises:
        ModelError: If a pattern matches no linear layer or a tied one, or no layer is left.
    """
    if isinstance(patterns, str):
        patterns = [patterns]
    names = names_by_module(model)
    linear = [Target(own[0], module, own[1:]) for module, own in names.values() if _is_linear(module)]
    routers = routers_of(model)
    linear = [
        target for target in linear if id(target.module) not in routers and not _inside_factored(model, target.name)
    ]
    holders = _weight_holders(model)
    if patterns is None:
        output = _output_embedding(model)
        chosen = [
            target
            for target in linear
            if target.module is not output
            and len(holders[id(target.module.weight)]) == 1
            and not _HEADS.intersection(target.name.split("."))
        ]
    else:
        chosen = _select(linear, patterns, holders)
    if not chosen:
        raise ModelError(
            f"{type(model).__name__} has no linear layer to factor among {len(linear)} linear layers; "
            f"{_remedy(model, bool(linear))}"
        )
    return {target.name: target for target in chosen}


def _remedy(model: nn.Module, linear: bool) -> str:
    """What to do with a model that has nothing to factor."""
    packed = {type(module).__name__ for module in model.modules()} & _PACKED
    if packed:
        return f"its {packed.pop()} layers hold packed weights: compress the model before it is quantised"
    if any(isinstance(module, FactoredLayer) for module in model.modules()):
        return "a model that is factored already is compressed again from its dense original"
    if linear:
        return "the output embedding, tied weights and classifiers stay dense unless targets names them"
    return (
        "nn.Linear and Conv1D are factored, convolutions of kernel 1 once lowrank_lit.pointwise_as_linear(model) has "
        "made them linear, others are not; layers have to be made before setup"
    )


def dense_weight(module: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer: a view of the parameter, or the product of a factored layer.

    Raises:
        ModelError: If the module is no linear layer.
    """
    if isinstance(module, FactoredLayer):
        return module.weight
    if not _is_linear(module):
        raise ModelError(f"{type(module).__name__} is no linear layer; give an nn.Linear, a Conv1D or a factored layer")
    weight = cast(Tensor, module.weight)
    return weight.T if _is_conv1d(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias (out,) of a linear layer, or None."""
    return cast("Tensor | None", getattr(module, "bias", None))


def replace_module(model: nn.Module, target: Target, new: nn.Module) -> None:
    """Put ``new`` where the target's module is, under all its names.

    The training flag and the hooks that were registered on the old module move over; the hooks' handles still remove
    them.

    Raises:
        ModelError: If the model holds something else under one of the names.
    """
    for name in (target.name, *target.aliases):
        if _get_submodule(model, name) is not target.module:
            raise ModelError(f"'{name}' is no longer the layer that was found; find the targets again before replacing")
    new.train(target.module.training)
    new._is_full_backward_hook = target.module._is_full_backward_hook
    for attribute in HOOKS:
        # The handles of the user's hooks point at these dictionaries, so the dictionaries themselves move.
        hooks = getattr(target.module, attribute)
        hooks.update(getattr(new, attribute))
        setattr(new, attribute, hooks)
    for name in (target.name, *target.aliases):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)


def replace_modules(model: nn.Module, pairs: Iterable[tuple[Target, nn.Module]]) -> None:
    """:func:`replace_module` for each pair; of weights that are mapped from a file, those replaced leave memory.

    A mapping lasts as long as its last tensor: an embedding that stays would keep the pages of the whole file.
    """
    chosen = list(pairs)
    release(parameter for target, _ in chosen for parameter in target.module.parameters())
    for target, new in chosen:
        replace_module(model, target, new)


def apply_plan(model: nn.Module, plan: RankPlan) -> None:
    """Give the model the plan's layout, to load factored weights into it.

    Every matrix that the plan factors becomes a ``FactoredLinear`` or ``PivotLinear`` of its rank, on the same device
    and in the same dtype, with NaN for weights; one that has this form already is left as it is. Fused experts that it
    names become layers of their own.

    Raises:
        PlanError: If the plan does not fit the model; the model is then unchanged.
    """
    every = [matrix.name for matrix in plan.matrices]
    with ExpertsApart(model, every) as apart:
        plan.check(model)
        names = names_by_module(model)
        replaced: list[tuple[Target, nn.Module]] = []
        for matrix in plan.matrices:
            module = model.get_submodule(matrix.name)
            if matrix.form == "dense" or isinstance(module, FactoredLayer):
                continue
            weight, (_, own) = cast(Tensor, module.weight), names[id(module)]
            new = LAYER_OF_FORM[matrix.form].empty(
                matrix.columns,
                matrix.rows,
                matrix.rank,
                bias=bias_of(module) is not None,
                device=weight.device,
                dtype=weight.dtype,
            )
            replaced.append((Target(own[0], module, own[1:]), new))
        replace_modules(model, replaced)
        apart.keep(every)


def check_applied(model: nn.Module, plan: RankPlan) -> None:
    """Check that the model not only fits the plan but is factored by it.

    Raises:
        PlanError: If the plan does not fit the model.
        ModelError: If a matrix is dense in the model and factored in the plan.
    """
    plan.check(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    factored = [matrix.name for matrix in plan.matrices if matrix.form != "dense"]
    pending = [name for name in factored if not isinstance(modules[name], FactoredLayer)]
    if pending:
        raise ModelError(
            f"'{pending[0]}' is still dense in the model and factored in the plan "
            f"({len(pending)} of {len(factored)} are); compress the model with this plan first"
        )


def to_dense(model: nn.Module, names: Sequence[str] | None = None) -> None:
    """Replace factored layers by an ``nn.Linear`` that holds the product, taken in float32 or better.

    Args:
        model: Any module.
        names: Dotted names of factored layers; None takes every one there is.

    Raises:
        ModelError: If a name is no factored layer.
        NonFiniteError: If a product is not finite in the factors' dtype.
    """
    found = {
        name: Target(own[0], module, own[1:])
        for module, own in names_by_module(model).values()
        if isinstance(module, FactoredLayer)
        for name in own
    }
    chosen = list(found) if names is None else list(names)
    for name in chosen:
        if name not in found:
            raise ModelError(f"'{name}' is no factored layer; nearest: {_nearest(name, list(found))}")
    for target in {id(found[name].module): found[name] for name in chosen}.values():
        replace_module(model, target, _product(target.name, cast(FactoredLayer, target.module)))


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model's parameters, each storage counted once: a tied embedding and head are one matrix."""
    return sum(tensor.numel() for tensor in _unique(model.parameters()))


def stored_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of the model's parameters and persistent buffers, each storage counted once.

    Args:
        model: Any module.
        dtype: Type that floating-point numbers are stored in, as an export casts them; None takes theirs in memory.
            Indices, such as those of the pivot form, keep their own.
    """
    # A state dict lists what is persistent; its detached tensors share their storages with the model's.
    persistent = set(model.state_dict())
    tensors: list[Tensor] = list(model.parameters())
    tensors += [buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in persistent]
    return sum(
        tensor.numel() * (dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in _unique(tensors)
    )


def target_parameters(model: nn.Module, plan: RankPlan) -> int:
    """Numbers that the model really holds for the plan's matrices, biases not counted, each storage counted once.

    Equal to ``plan.parameters`` for a model that is factored by the plan.

    Raises:
        PlanError: If the plan does not fit the model.
    """
    plan.check(model)
    weights: list[Tensor] = []
    for matrix in plan.matrices:
        module = model.get_submodule(matrix.name)
        if isinstance(module, FactoredLayer):
            weights += [module.outer.weight, module.inner.weight]
        else:
            weights.append(cast(Tensor, module.weight))
    return sum(tensor.numel() for tensor in _unique(weights))


def _unique(tensors: Iterator[Any] | Sequence[Tensor]) -> list[Tensor]:
    """One tensor for each piece of memory, the largest; tensors on the meta device have none and count by identity."""
    found: dict[tuple[object, ...], Tensor] = {}
    for tensor in tensors:
        key = ("meta", id(tensor)) if tensor.is_meta or not tensor.numel() else (str(tensor.device), tensor.data_ptr())
        if key not in found or tensor.numel() > found[key].numel():
            found[key] = tensor
    return list(found.values())


def _product(name: str, layer: FactoredLayer) -> nn.Linear:
    (outer, inner), bias = layer.factors(), layer.bias
    dtype = torch.promote_types(outer.dtype, torch.float32)
    with torch.no_grad():
        weight = (outer.to(dtype) @ inner.to(dtype)).to(outer.dtype)
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(
            f"the product of the factors of '{name}' is not finite in {outer.dtype}; use a wider dtype"
        )
    dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta", dtype=outer.dtype)
    dense.weight = nn.Parameter(weight, requires_grad=any(part.requires_grad for part in layer.parameters()))
    if bias is not None:
        dense.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return dense


def _is_conv1d(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None and weight.ndim == 2


def _is_linear(module: nn.Module) -> bool:
    """Whether the layer computes x W^T + b with a plain weight of its own.

    Subclasses with another forward, packed or parametrised weights are not, nor is the projection inside
    ``nn.MultiheadAttention``, whose weight is read past its forward.
    """
    if _is_conv1d(module):
        return True
    weight = module._parameters.get("weight")
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
        and weight is not None
        and weight.shape == (module.out_features, module.in_features)
        and weight.is_floating_point()
    )


def names_by_module(model: nn.Module) -> dict[int, tuple[nn.Module, tuple[str, ...]]]:
    """Every module by its id, with all its dotted names in order."""
    found: dict[int, tuple[nn.Module, tuple[str, ...]]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        _, names = found.get(id(module), (module, ()))
        found[id(module)] = (module, (*names, name))
    return found


def _weight_holders(model: nn.Module) -> dict[int, list[str]]:
    """First names of the modules that hold a parameter, by the parameter's id."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in {id(value): value for value in module._parameters.values() if value is not None}:
            holders.setdefault(parameter, []).append(name)
    return holders


def _get_submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _inside_factored(model: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(
        isinstance(model.get_submodule(".".join(parents[:depth])), FactoredLayer) for depth in range(len(parents) + 1)
    )


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return cast("nn.Module | None", getter()) if callable(getter) else None
    except NotImplementedError:  # what transformers raises for a model that does not say
        return None


def _select(linear: list[Target], patterns: Sequence[str], holders: dict[int, list[str]]) -> list[Target]:
    """The targets that a pattern matches, in the order given by ``linear``."""
    chosen: set[int] = set()
    for pattern in patterns:
        matched = [t for t in linear if any(fnmatchcase(name, pattern) for name in (t.name, *t.aliases))]
        if not matched:
            everything = [name for target in linear for name in (target.name, *target.aliases)]
            raise ModelError(
                f"targets pattern '{pattern}' matches no linear layer; nearest: {_nearest(pattern, everything)}"
            )
        for target in matched:
            others = [name for name in holders[id(target.module.weight)] if name != target.name]
            if others:
                raise ModelError(
                    f"targets pattern '{pattern}' matches '{target.name}', whose weight is tied to '{others[0]}'; "
                    "leave it out, or untie the weights first"
                )
        chosen.update(id(target.module) for target in matched)
    return [target for target in linear if id(target.module) in chosen]


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """Up to three names that look like a pattern, for an error message."""
    plain = wanted.replace("*", "")
    ends = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = difflib.get_close_matches(plain, names, n=3, cutoff=0.3)
    close += [ends[end] for end in difflib.get_close_matches(plain.split(".")[-1], ends, n=3, cutoff=0.4)]
    return ", ".join(dict.fromkeys(close)) or ", ".join(names[:3]) or "there is none"
