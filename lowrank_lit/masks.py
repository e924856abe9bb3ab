"""Factored layers whose components can be switched off and on while a model trains.

A masked layer computes ``y = outer (m * (inner x)) + b`` with ``m`` in {0, 1}. Parameters keep their shapes whatever
the mask is, so optimizer states, DDP's buckets and DeepSpeed's partitions stay valid. A component that is off gets no
gradient and keeps its values, so that it can come back. At the end the model is cut to what is on, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit.allocation import MatrixSpec
from lowrank_lit.calibration import calibrate
from lowrank_lit.collector import Calibration
from lowrank_lit.errors import GradientError, ModelError, PlanError
from lowrank_lit.gradients import Loss, SampledTokenLoss
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.linalg import require_finite
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.reallocation import LatentSums
from lowrank_lit.spectrum import compute_spectrum
from lowrank_lit.streaming import Batch, moved
from lowrank_lit.surgery import Target, apply_plan, bias_of, dense_weight, replace_module, replace_modules


class MaskedLinear(FactoredLinear):
    """A factored layer some of whose components are switched off: ``y = outer (mask * (inner x)) + b``.

    The factors stay plain children, so that they take adapters and quantisation like any others; what these add passes
    through the mask too. ``mask`` (rank,), bool, is a persistent buffer.

    Args:
        layer: Its two factors, the modules themselves, become this layer's. All components are on.

    Attributes:
        sums: Where the latents and gradients of every training step are added, or None.
    """

    mask: Tensor
    sums: LatentSums | None

    def __init__(self, layer: FactoredLinear) -> None:
        bias, device = layer.bias is not None, layer.outer.weight.device
        super().__init__(layer.in_features, layer.out_features, layer.rank, bias=bias, device="meta")
        self.inner, self.outer = layer.inner, layer.outer
        self.register_buffer("mask", torch.ones(layer.rank, dtype=torch.bool, device=device))
        self.sums = None

    @property
    def kept(self) -> int:
        """How many components are on."""
        return int(self.mask.sum())

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the weight: outer (out_features, rank), with zeros for what is off, and inner."""
        return self.outer.weight * self.mask, self.inner.weight

    @property
    def weight(self) -> Tensor:
        """The product of the components that are on, (out_features, in_features)."""
        outer, inner = self.factors()
        return outer @ inner

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        latents = self.inner(x)
        masked = latents * self.mask
        if self.sums is not None:
            self.sums.observe(latents, masked)
        result: Tensor = self.outer(masked)
        return result


def factor_fully(
    model: nn.Module,
    batches: Sequence[Batch],
    names: Sequence[str],
    *,
    device: torch.device | str | None = None,
    loss: Loss | None = None,
) -> None:
    """Replace layers by factors of the whole matrices, whose components are those of the metric ``two_sided``.

    Nothing is cut: a dense matrix gets its full rank, a factored one keeps its own, and every product is the matrix, to
    rounding. The components are in the metric's order. Where there are no gradients the metric is ``input``.

    Args:
        model: Changed in place, once everything has been computed.
        batches: Calibration batches, from :func:`lowrank_lit.batches.as_batches`.
        names: Dotted names of linear or factored layers.
        device: Where to compute; ``None`` is where the model is.
        loss: Whose gradients are taken, as for :func:`lowrank_lit.compress`; ``None`` is that of next tokens.

    Raises:
        ModelError: If a layer is in pivot form or has adapters.
        DataError: If the batches do not reach a layer.
        NonFiniteError: If weights or moments are NaN or infinite; names the layer.
    """
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():
        _require_factorable(name, layer)
    found, metric = _moments(model, batches, layers, device, loss)
    new = {}
    for name, layer in tqdm(layers.items(), desc="factoring", unit="matrix", disable=None, leave=False):
        first = next(layer.parameters())
        home, trains = first.device, first.requires_grad
        with moved(layer, device), torch.no_grad():
            weight, bias = dense_weight(layer).detach(), bias_of(layer)
            rank = layer.rank if isinstance(layer, FactoredLinear) else min(weight.shape)
            spectrum = compute_spectrum(weight, found.statistics.get(name), metric=metric, name=name)
            outer, inner = spectrum.factors(weight, rank, nested=True)
            shift = None if bias is None else bias.detach()
            new[name] = FactoredLinear.from_factors(outer, inner, shift, dtype=weight.dtype, device=home)
        new[name].requires_grad_(trains)
    replace_modules(model, [(_target(model, name), layer) for name, layer in new.items()])


def _require_factorable(name: str, layer: nn.Module) -> None:
    if isinstance(layer, PivotLinear):
        raise ModelError(f"'{name}' is in pivot form, which has no components to mask; set storage='factored'")
    if any(hasattr(module, "base_layer") for module in layer.modules()):
        raise ModelError(f"'{name}' has adapters already; list RankReallocation before the callback that adds them")


def _moments(
    model: nn.Module,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    device: torch.device | str | None,
    loss: Loss | None,
) -> tuple[Calibration, str]:
    """Statistics for the metric ``two_sided``, or for ``input`` where there is no loss to differentiate."""
    settings: dict[str, Any] = {"weight_of": dense_weight, "importance": False, "device": device}
    try:
        both = frozenset({"input", "gradient"})
        chosen = loss or SampledTokenLoss()
        return calibrate(model, batches, layers, moments=both, loss=chosen, **settings), "two_sided"
    except GradientError:
        return calibrate(model, batches, layers, moments=frozenset({"input"}), loss=loss, **settings), "input"


@dataclass
class MaskedModel:
    """The masked layers of one model, made by :func:`mask_layers`.

    Attributes:
        model: The model that they stand in.
        layers: By name; empty after :meth:`shrink`.
        specs: Cost of each, in the same order.
        sums: What was seen of each, by name.
    """

    model: nn.Module
    layers: dict[str, MaskedLinear]
    specs: list[MatrixSpec]
    sums: dict[str, LatentSums]
    _dense: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def stored(self) -> int:
        """Numbers that the matrices would take if the model were cut now."""
        return sum(spec.cost(layer.kept) for spec, layer in zip(self.specs, self.layers.values(), strict=True))

    @property
    def keep_ratio(self) -> float:
        """:attr:`stored` / original numbers."""
        return self.stored / sum(spec.dense_cost for spec in self.specs)

    def scores(self) -> list[Tensor]:
        """What each component of each matrix is worth, in nats per token."""
        return [self.sums[name].nats(name) for name in self.layers]

    def move(self, masks: Sequence[Tensor]) -> dict[str, int]:
        """Give every layer its mask ``(rank,)``; says how many components were ``removed`` and have ``returned``."""
        removed = returned = 0
        for layer, mask in zip(self.layers.values(), masks, strict=True):
            new = mask.to(layer.mask.device)
            removed += int((layer.mask & ~new).sum())
            returned += int((new & ~layer.mask).sum())
            layer.mask.copy_(new)
        return {"removed": removed, "returned": returned}

    def watch(self) -> None:
        """Have every layer add to its sums, which move to its device."""
        for name, layer in self.layers.items():
            self.sums[name].to(layer.mask.device)
            layer.sums = self.sums[name]

    def unwatch(self) -> None:
        """Have no layer add to its sums any more."""
        for layer in self.layers.values():
            layer.sums = None

    @torch.no_grad()
    def shrink(self) -> tuple[MatrixPlan, ...]:
        """Take what is off out of the model: plain factored layers, and dense ones where two factors store no less.

        The outputs stay what they are, to rounding.

        Returns:
            Form and rank of every matrix.

        Raises:
            ModelError: If a factor has an adapter or is quantised; nothing is cut then.
            NonFiniteError: If a weight is NaN or infinite; names the layer.
        """
        for name, layer in self.layers.items():
            _require_whole(name, layer)
        entries = []
        for (name, layer), spec in zip(self.layers.items(), self.specs, strict=True):
            dense = layer.kept >= spec.break_even
            rank = spec.full_rank if dense else layer.kept
            entries.append(MatrixPlan(name, spec.rows, spec.columns, "dense" if dense else "factored", rank))
            new = _dense_again(name, layer, self._dense.get(name)) if dense else _cut(layer)
            replace_module(self.model, _target(self.model, name), new)
        self.layers = {}
        return tuple(entries)


def mask_layers(
    model: nn.Module,
    names: Sequence[str],
    *,
    min_rank: int,
    quantum: int = 1,
    dense: Mapping[str, nn.Module] | None = None,
) -> MaskedModel:
    """Give factored layers of a model a mask each, with every component on.

    Args:
        model: Changed in place; the factors stay the modules and parameters that they are.
        names: Dotted names of the layers.
        min_rank: Least rank of a matrix.
        quantum: Ranks are multiples of this, or the matrix is dense.
        dense: By name, layers that were replaced by factors and that a matrix returns to where it ends dense. Their
            weights are let go. Where there is none, it ends as an ``nn.Linear``.
    """
    layers, specs = {}, []
    for name in names:
        target = _target(model, name)
        layer = target.module
        if not isinstance(layer, FactoredLinear):
            raise ModelError(f"'{name}' is a {type(layer).__name__}; only factored layers are masked, factor it first")
        layers[name] = MaskedLinear(layer)
        floor = min(min_rank, layer.rank)
        specs.append(MatrixSpec(name, layer.out_features, layer.in_features, floor, quantum=quantum))
        replace_module(model, target, layers[name])
    kept = dict(dense or {})
    for module in kept.values():
        module.to("meta")
    return MaskedModel(model, layers, specs, {name: LatentSums.zeros(layers[name].rank) for name in layers}, kept)


def masked_layout(model: nn.Module, ranks: Mapping[str, int], *, min_rank: int, quantum: int = 1) -> MaskedModel:
    """Give a model the layers that weights of a masked one are loaded into.

    Args:
        model: Changed in place. What is dense in it becomes factors of NaN; factored layers of the rank stay.
        ranks: Of the factors, by layer name.
        min_rank: As of :func:`mask_layers`.
        quantum: As of :func:`mask_layers`.

    Raises:
        PlanError: If a name or rank does not fit the model; it is unchanged then.
    """
    before = {name: _submodule(model, name) for name in ranks}
    apply_plan(model, whole_plan(model, ranks))
    dense = {name: layer for name, layer in before.items() if not isinstance(layer, FactoredLinear)}
    return mask_layers(model, list(ranks), min_rank=min_rank, quantum=quantum, dense=dense)


def whole_plan(model: nn.Module, ranks: Mapping[str, int], *, fingerprint: str = "") -> RankPlan:
    """A plan with every layer factored at its rank in ``ranks``, though that may store more than the matrix does.

    Raises:
        PlanError: If the model has no linear layer of a name, or none of such a rank.
    """
    matrices = []
    for name, rank in ranks.items():
        layer: Any = _submodule(model, name)
        factored = isinstance(layer, FactoredLinear)
        rows, columns = (layer.out_features, layer.in_features) if factored else dense_weight(layer).shape
        matrices.append(MatrixPlan(name, rows, columns, "factored", rank))
    return RankPlan(tuple(matrices), 1.0, "two_sided", "none", fingerprint=fingerprint)


def plan_of_cut(
    matrices: tuple[MatrixPlan, ...], keep_ratio: float, before: RankPlan | None, history: Sequence[Mapping[str, Any]]
) -> RankPlan:
    """The plan of a model that masks were cut out of.

    Args:
        matrices: What :meth:`MaskedModel.shrink` gave.
        keep_ratio: That was asked for.
        before: Plan of the model before it was masked, ``None`` of a dense one.
        history: One entry per re-allocation, with its ``step``.
    """
    moved = f"{len(history)} times in training, to step {history[-1]['step']}" if history else "0 times in training"
    note = f"ranks re-allocated {moved}"
    return RankPlan(
        matrices,
        keep_ratio,
        "two_sided",
        "progressive",
        fingerprint="" if before is None else before.fingerprint,
        notes=(note,) if before is None else (*before.notes, note),
        preset="" if before is None else before.preset,
        feedback="none" if before is None else before.feedback,
    )


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(
            f"'{name}' is masked in the checkpoint and not in the model; give the model it is of"
        ) from error


def _cut(layer: MaskedLinear) -> FactoredLinear:
    """The components that are on, with the values that they have."""
    on = layer.mask.nonzero().squeeze(1)
    outer, inner, bias = layer.outer.weight, layer.inner.weight, layer.bias
    new = FactoredLinear.from_factors(outer[:, on], inner[on], None if bias is None else bias.detach())
    new.outer.requires_grad_(outer.requires_grad)
    new.inner.requires_grad_(inner.requires_grad)
    return new


def _dense_again(name: str, layer: MaskedLinear, home: nn.Module | None) -> Any:
    """The layer that was there first, or an ``nn.Linear``, with the product, taken in float32 or better."""
    (outer, inner), bias = layer.factors(), layer.bias
    wide = torch.promote_types(outer.dtype, torch.float32)
    product = (outer.to(wide) @ inner.to(wide)).to(outer.dtype)
    require_finite(product, f"the weight of layer '{name}' after the fit")
    new: Any = home
    if home is None:
        new = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
    if not isinstance(new, nn.Linear):  # transformers' Conv1D stores (in, out)
        product = product.T.contiguous()
    trains = any(part.requires_grad for part in layer.parameters())
    new.weight = nn.Parameter(product, requires_grad=trains)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=trains)
    return new


def _require_whole(name: str, layer: MaskedLinear) -> None:
    for key, factor in (("inner", layer.inner), ("outer", layer.outer)):
        if hasattr(factor, "base_layer"):
            raise ModelError(f"'{name}.{key}' still has an adapter; merge it before the masked components are cut off")
        weight = factor.weight
        if not weight.is_floating_point() or weight.shape != (factor.out_features, factor.in_features):
            raise ModelError(
                f"'{name}.{key}' is quantised or not whole on this process ({weight.dtype}, {tuple(weight.shape)}); "
                "dequantise it before the masked components are cut off, and keep weights whole (DDP, ZeRO 1 or 2)"
            )
        require_finite(weight, f"the weight of layer '{name}.{key}' after the fit")


def _target(model: nn.Module, name: str) -> Target:
    """A layer with all its names, where several parents share it."""
    module = model.get_submodule(name)
    names = [own for own, other in model.named_modules(remove_duplicate=False) if other is module]
    return Target(name, module, tuple(own for own in names if own != name))
