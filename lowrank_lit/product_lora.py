"""The baseline of rank-preserving recovery: LoRA on the product of the factors, merged and truncated again.

An adapter beside a factored layer, ``W' = outer inner + s b a``, has rank r + l. To store no more than before, it is
cut back to r by a truncated SVD, plain or in the metric of the inputs, and loses on the way what part of the update
lies outside the best r directions: for a small generic update the share ``sqrt((1 - r/m) (1 - r/n))`` of its norm.
:mod:`lowrank_lit.recovery` has nothing to cut back; this module is here to be compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.layers import FactoredLayer, FactoredLinear
from lowrank_lit.linalg import to_double
from lowrank_lit.metrics import moments_of
from lowrank_lit.spectrum import compute_spectrum
from lowrank_lit.statistics import LayerStatistics
from lowrank_lit.surgery import count_parameters


class AdaptedProduct(nn.Module):
    """A frozen factored layer with an adapter beside it: ``y = outer (inner x) + scale b (a x)``, plus the bias.

    ``a`` (l, in) starts as ``nn.Linear`` does, ``b`` (out, l) at zero; both are float32 or better.

    Args:
        base: The factored layer.
        rank: Adapter rank l.
        scale: Of the update.
    """

    def __init__(self, base: FactoredLinear, rank: int, scale: float) -> None:
        super().__init__()
        weight = base.inner.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.base = base
        self.scale = scale
        self.a = nn.Linear(base.in_features, rank, bias=False, device=weight.device, dtype=dtype)
        self.b = nn.Linear(rank, base.out_features, bias=False, device=weight.device, dtype=dtype)
        nn.init.zeros_(self.b.weight)

    @property
    def weight(self) -> Tensor:
        """``W'`` (out, in), float64."""
        base: Tensor = to_double(self.base.outer.weight) @ to_double(self.base.inner.weight)
        update: Tensor = to_double(self.b.weight) @ to_double(self.a.weight)
        return base + self.scale * update

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (..., in_features) to (..., out_features)."""
        result: Tensor = self.base(x)
        update: Tensor = self.scale * self.b(self.a(x.to(self.a.weight.dtype)))
        return result + update.to(result.dtype)


@dataclass(frozen=True)
class TruncationRecord:
    """What merging and truncating again did.

    Attributes:
        pairs: Factored layers.
        parameters_before: Numbers of the whole model before there were adapters.
        parameters_after: The same afterwards.
        median_update: Median over the layers of ``||W' - W||_F / ||W||_F``, before the truncation.
        median_loss: Median of the lost share of the update, ``||W' - W'_r||_F / ||W' - W||_F``; 0 without an update.
        largest_loss: The largest.
    """

    pairs: int
    parameters_before: int
    parameters_after: int
    median_update: float
    median_loss: float
    largest_loss: float


@dataclass
class ProductAdapters:
    """Handle on the adapters of one model, made by :func:`add_product_adapters`.

    Attributes:
        model: The adapted model.
        trainable_parameters: How many numbers the adapters have: the only ones that train.
    """

    model: nn.Module
    trainable_parameters: int
    _layers: dict[str, AdaptedProduct] = field(repr=False)
    _requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _parameters_before: int = field(repr=False)

    @torch.no_grad()
    def merge(self, *, metric: str = "identity", batches: Sequence[Any] | None = None) -> TruncationRecord:
        """Merge every adapter into its product, truncate to the rank that the layer had, and remove the adapter.

        Args:
            metric: In which the truncation is the best one: ``identity`` is a plain SVD, ``input`` whitens with the
                second moment of the layer's inputs in the adapted model.
            batches: Calibration batches for a metric that needs statistics, see :func:`lowrank_lit.compress`.

        Raises:
            LowRankError: If the metric is unknown, or needs batches.
            ModelError: If the adapters are merged already.
            NonFiniteError: If a weight or a moment is NaN or infinite; names the layer.
        """
        if not self._layers:
            raise ModelError("the adapters are merged already; add new ones with add_product_adapters")
        statistics = self._statistics(metric, batches)
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        losses, updates = [], []
        for name, layer in self._layers.items():
            weight, rank = layer.weight, layer.base.rank
            spectrum = compute_spectrum(weight, statistics.get(name), metric=metric, name=name)
            outer, inner = factors[name] = spectrum.factors(weight, rank)
            old = to_double(layer.base.outer.weight) @ to_double(layer.base.inner.weight)
            update = float((weight - old).norm())
            updates.append(update / float(old.norm()) if update > 0 else 0.0)
            losses.append(float((weight - outer @ inner).norm()) / update if update > 0 else 0.0)
        for name, layer in self._layers.items():
            layer.base.outer.weight.copy_(factors[name][0])
            layer.base.inner.weight.copy_(factors[name][1])
            _replace(self.model, name, layer.base)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        pairs, self._layers = len(self._layers), {}
        return TruncationRecord(
            pairs,
            self._parameters_before,
            count_parameters(self.model),
            sorted(updates)[pairs // 2],
            sorted(losses)[pairs // 2],
            max(losses),
        )

    def _statistics(self, metric: str, batches: Sequence[Any] | None) -> dict[str, LayerStatistics]:
        moments = moments_of(metric)
        if not moments:
            return {}
        if batches is None:
            raise LowRankError(f"metric='{metric}' needs statistics; give batches, or choose metric='identity'")
        layers: dict[str, nn.Module] = dict(self._layers)

        def weight_of(layer: Any) -> Tensor:
            weight: Tensor = layer.weight
            return weight.to(layer.a.weight.dtype)

        found = calibrate(
            self.model, as_batches(batches), layers, weight_of=weight_of, moments=moments, importance=False
        )
        return dict(found.statistics)


def add_product_adapters(
    model: nn.Module, *, rank: int | Mapping[str, int] = 8, alpha: float = 16.0, use_rslora: bool = False
) -> ProductAdapters:
    """Put a LoRA on the product of every factored layer of a model, in place, and freeze everything else.

    Args:
        model: Holds FactoredLinear layers, each in one place.
        rank: Adapter rank l, for all layers or by layer name.
        alpha: The update is scaled by alpha / l.
        use_rslora: Scale by alpha / sqrt(l) instead.

    Raises:
        LowRankError: If a rank is below 1.
        ModelError: If there is no factored layer, or one is in pivot form.
    """
    pairs = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    pivot = [name for name, pair in pairs.items() if not isinstance(pair, FactoredLinear)]
    if not pairs or pivot or "" in pairs:
        what = f"'{pivot[0]}' is in pivot form" if pivot else "no factored layer lies inside the model"
        raise ModelError(f"no adapters on products: {what}; compress the model with storage='factored'")
    ranks = {name: rank if isinstance(rank, int) else rank[name] for name in pairs}
    if min(ranks.values()) < 1:
        raise LowRankError(f"rank={min(ranks.values())} is too small; give 1 or more")
    before = count_parameters(model)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    layers: dict[str, AdaptedProduct] = {}
    for name, pair in pairs.items():
        assert isinstance(pair, FactoredLinear)
        own = ranks[name]
        layers[name] = AdaptedProduct(pair, own, alpha / (math.sqrt(own) if use_rslora else own)).train(pair.training)
        _replace(model, name, layers[name])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return ProductAdapters(model, trained, layers, flags, before)


def product_ranks(model: nn.Module, parameters: int) -> dict[str, int]:
    """Adapter ranks by layer, as even as can be, whose adapters on the products have at least ``parameters`` numbers.

    Every layer gets the same rank, and the first ones in the model one more, until the sum is reached.
    """
    sizes = {
        name: module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, FactoredLayer)
    }
    if not sizes:
        raise ModelError(f"the {type(model).__name__} has no factored layer; compress it first")
    ranks = dict.fromkeys(sizes, max(1, parameters // sum(sizes.values())))
    missing = parameters - sum(ranks[name] * size for name, size in sizes.items())
    for name, size in sizes.items():
        if missing <= 0:
            break
        ranks[name] += 1
        missing -= size
    return ranks


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
