"""Merging the adapters of one factored layer, measured and taken back to the last bit, or for good.

The merge itself is PEFT's, in float32 or better: a sum in bfloat16 would round twice. A factor that bitsandbytes holds
in 4 bits is dequantised first, the adapter is added to what it was trained on, and the sum stays in 16 bits: quantised
again, most of a small update would be lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.adapter_config import FACTORS, is_quantised, join
from lowrank_lit.errors import NonFiniteError
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.linalg import to_double

_PROBE_TOKENS = 32


@dataclass(frozen=True)
class MergeRecord:
    """What a merge did; every pair kept its shapes and so its rank, or the merge would have raised.

    Differences are between an adapted pair and the merged one on a probe, both computed in float32 (float64 for float64
    factors): what storing the sums in the factors' dtype costs. Updates are ||W' - W||_F / ||W||_F of stored products,
    ``W`` as it was before there were adapters, dequantised where it was quantised.

    Attributes:
        pairs: Factored layers that were merged.
        factor_parameters_before: Numbers in the factors and their biases before there were adapters.
        factor_parameters_after: The same after the merge.
        largest_output_difference: Largest absolute difference of an output entry, in the unit of that output.
        largest_relative_difference: Largest ||difference||_F / ||adapted output||_F of a pair.
        worst_pair: Name of the pair with the largest relative difference.
        smallest_update: Smallest update of a pair.
        median_update: Median over the pairs; below 0.01 a merge into bfloat16 rounds a good part of the update away.
        largest_update: Largest update of a pair.
        dequantised: Factors that were quantised, and are not any more.
    """

    pairs: int
    factor_parameters_before: int
    factor_parameters_after: int
    largest_output_difference: float
    largest_relative_difference: float
    worst_pair: str
    smallest_update: float
    median_update: float
    largest_update: float
    dequantised: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The record as plain numbers and strings, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """A merge of one pair that was measured and taken back: largest difference, relative difference, update."""

    difference: float
    relative: float
    update: float


def summary(trials: Mapping[str, Trial], before: int, after: int, dequantised: int) -> MergeRecord:
    """The figures of all pairs in one record; ``before`` and ``after`` count the numbers in the factors."""
    updates = sorted(trial.update for trial in trials.values())
    worst = max(trials, key=lambda name: trials[name].relative)
    return MergeRecord(
        pairs=len(trials),
        factor_parameters_before=before,
        factor_parameters_after=after,
        largest_output_difference=max(trial.difference for trial in trials.values()),
        largest_relative_difference=trials[worst].relative,
        worst_pair=worst,
        smallest_update=updates[0],
        median_update=updates[len(updates) // 2],
        largest_update=updates[-1],
        dequantised=dequantised,
    )


@torch.no_grad()
def try_merge(name: str, pair: FactoredLayer, probe: Tensor | None, originals: Mapping[str, Tensor]) -> Trial:
    """Merge one pair, measure, and take the merge back to the last bit.

    Args:
        name: Of the pair, for errors.
        pair: With adapters on its factors.
        probe: Inputs (tokens, in_features), or ``None`` for 32 seeded normal tokens.
        originals: Weights of factors before there were adapters, by ``inner`` and ``outer``, where the method has
            changed them.

    Raises:
        NonFiniteError: If an adapter or a merged factor holds a NaN or infinity; the message names it.
    """
    for key, parameter in pair.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise NonFiniteError(f"layer '{join(name, key)}' holds a NaN or infinity; lower the learning rate")
    if probe is None:
        probe = torch.randn(_PROBE_TOKENS, pair.in_features, generator=torch.Generator().manual_seed(0))
    with torch.autocast(pair.inner.weight.device.type, enabled=False), _in_eval_mode(pair), dequantised(pair):
        with _in_float32(pair):
            inputs = probe.to(_linear(pair.inner).weight)
            adapted: Tensor = pair.forward(inputs)
            before = _values(pair, originals)
        with merged(name, pair), _in_float32(pair):
            update = _product_update(before, _values(pair, {}))
            difference: Tensor = pair.forward(inputs) - adapted
    relative = float(difference.norm() / adapted.norm()) if difference.any() else 0.0
    return Trial(float(difference.abs().max()), relative, update)


@contextmanager
def dequantised(pair: FactoredLayer) -> Iterator[dict[str, nn.Linear]]:
    """Hold every quantised factor of a pair as a plain linear layer; yields these by ``inner`` and ``outer``."""
    plain: dict[str, nn.Linear] = {}
    with ExitStack() as restore:
        for factor in FACTORS:
            quantised = _linear(getattr(pair, factor))
            if is_quantised(quantised):
                from lowrank_lit.quantize import dequantize_linear

                plain[factor] = dequantize_linear(quantised)
                put(pair, factor, plain[factor])
                restore.callback(put, pair, factor, quantised)
        yield plain


@contextmanager
def merged(name: str, pair: FactoredLayer) -> Iterator[None]:
    """Merge the adapters of one dequantised pair by PEFT, and restore the factors on leaving.

    The kept tensors are left alone: whoever wants the merged values takes ``weight.data`` of the factors.

    Raises:
        NonFiniteError: If a merged factor is not finite, or does not fit the factor's dtype.
    """
    layers = {factor: layer for factor in FACTORS if hasattr(layer := getattr(pair, factor), "base_layer")}
    try:
        with _values_kept(pair):
            for factor, layer in layers.items():
                weight = layer.base_layer.weight
                dtype, key = weight.dtype, join(name, factor)
                try:
                    with _in_float32(layer, keep=weight):
                        layer.merge(safe_merge=True)  # writes a new tensor, so that the kept one has its old values
                except ValueError as error:
                    raise NonFiniteError(f"layer '{key}' is not finite merged; lower the learning rate") from error
                weight.data = weight.data.to(dtype)
                if not torch.isfinite(weight.data).all():
                    raise NonFiniteError(f"layer '{key}' is not finite merged into {dtype}; merge in float32")
            yield
    finally:
        for layer in layers.values():
            layer.merged_adapters.clear()


def put(pair: FactoredLayer, factor: str, layer: nn.Module) -> None:
    """Put a linear layer in the place of another, under the adapter where there is one."""
    current = getattr(pair, factor)
    if hasattr(current, "base_layer"):
        current.base_layer = layer
    else:
        setattr(pair, factor, layer)


def _linear(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _values(pair: FactoredLayer, originals: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The factors (outer, inner) of the weight, apart from the parameters, which are given other values later."""
    with _values_kept(pair):
        for factor, value in originals.items():
            weight = _linear(getattr(pair, factor)).weight
            weight.data = value.to(weight)
        outer, inner = pair.factors()
        return outer.data, inner.data


def _product_update(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> float:
    """||outer' inner' - outer inner||_F / ||outer inner||_F of (outer, inner) pairs, without an (out, in) product."""
    (outer, inner), (new_outer, new_inner) = map(to_double, before), map(to_double, after)
    # The difference is (outer' - outer) inner' + outer (inner' - inner): nothing large cancels in it.
    left = torch.cat([new_outer - outer, outer], dim=1)
    right = torch.cat([new_inner, new_inner - inner], dim=0)
    size, change = _product_norm(outer, inner), _product_norm(left, right)
    return change / size if size > 0 else math.inf if change > 0 else 0.0


def _product_norm(left: Tensor, right: Tensor) -> float:
    """||left right||_F = sqrt(sum((left^T left) * (right right^T)))."""
    return math.sqrt(max(0.0, float(((left.T @ left) * (right @ right.T)).sum())))


@contextmanager
def _in_float32(module: nn.Module, *, keep: nn.Parameter | None = None) -> Iterator[None]:
    """Hold every parameter of a module in float32 or better; ``keep`` keeps what it was given meanwhile."""
    with _values_kept(module, keep):
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        yield


@contextmanager
def _values_kept(module: nn.Module, but: nn.Parameter | None = None) -> Iterator[None]:
    """Give every parameter back the tensor it had."""
    kept = [(parameter, parameter.data) for parameter in module.parameters() if parameter is not but]
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and each of its modules back as it was."""
    training = [child for child in module.modules() if child.training]
    try:
        module.eval()
        yield
    finally:
        for child in training:
            child.training = True
