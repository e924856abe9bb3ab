"""Where adapters start from: EVA's and CorDA's directions, from the second moments of what the factors see.

The inner factor sees the layer's input x, with ``R = E[x x^T]``; the outer one sees ``z = inner x``, with
``E[z z^T] = inner R inner^T``, so one moment of a layer serves both of its factors. EVA (arXiv:2410.07170) starts an
adapter's ``a`` at the leading eigenvectors of the moment and ``b`` at zero; CorDA (arXiv:2406.05223) takes components
of the factor in the norm ``||D R||`` out of it and trains them. PEFT computes both from activations of its own passes,
in float32 and with an explicit inverse; here they come from sums in float64 that a compression has collected already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_lit.adapter_config import (
    DATA_DRIVEN,
    FACTORS,
    config_of,
    find_pairs,
    is_quantised,
    join,
    resolve_targets,
)
from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.linalg import damp, require_finite, symmetric_eigen, to_double
from lowrank_lit.statistics import LayerStatistics

if TYPE_CHECKING:
    from peft import PeftConfig

_CORDA_DAMPING = 0.01  # relative to the mean variance, as CorDA and PEFT start
_MOMENT_BYTES = 4 << 30  # of the moments that one pass collects


def starts_from_data(config: PeftConfig | Mapping[str, Any] | None) -> bool:
    """Whether a configuration's adapters start from the inputs' moments, so that they need :func:`adapter_starts`."""
    return config is not None and getattr(config_of(config), "init_lora_weights", None) in DATA_DRIVEN


def adapter_starts(
    model: nn.Module,
    config: PeftConfig | Mapping[str, Any],
    *,
    statistics: Mapping[str, LayerStatistics] | None = None,
    batches: Sequence[Any] | None = None,
    factors: Sequence[str] = FACTORS,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Start values for :func:`lowrank_lit.recovery.add_adapters` with ``init_lora_weights`` "eva" or "corda".

    A layer's moment ``R`` is taken from its ``statistics``, where a compression kept it (``input_moment``: layers with
    no more columns than rows, or all of them by the moment ``input_full``). For layers without one the factored model
    reads ``batches`` once, forward only, so that ``R`` is that of the inputs it has now; the moments of a pass take
    4 GiB at most, wider models are read more than once. Where there are no batches either, that is an error: an adapter
    never starts from a guess.

    EVA shares out the adapters' ranks by the share of variance that a direction explains in its layer, up to
    ``eva_config.rho`` times the rank asked for and at least 1 each, with the sum kept. Moments are about zero, not
    about the mean. ``whiten`` divides the directions by the roots of their variances. CorDA damps ``R`` by 1 % of its
    mean variance.

    Args:
        model: Holds the factored layers, without adapters.
        config: A LoraConfig, or its plain values; left as it is.
        statistics: By layer name in ``model``.
        batches: Calibration batches, see :func:`lowrank_lit.compress`.
        factors: Which children of a pair are adapted.
        device: Where to collect; ``None`` is where the model is.

    Returns:
        By name of the factor with the suffix ``.eva`` (l, in), or ``.corda_u`` (out, l), ``.corda_s`` (l,) and
        ``.corda_v`` (in, l); float32 on the CPU.

    Raises:
        LowRankError: If a moment is missing and there are no batches, or the adapter rank is too large.
        ModelError: If the configuration starts from no data, or reaches beyond the factors.
        NonFiniteError: If a moment is NaN or infinite; names the layer.
    """
    settings = config_of(config)
    kind = getattr(settings, "init_lora_weights", None)
    if kind not in DATA_DRIVEN:
        raise ModelError(f"config.init_lora_weights={kind!r} starts from no data; choose {' or '.join(DATA_DRIVEN)}")
    pairs, layers = find_pairs(model)
    targets = resolve_targets(model, pairs, settings, factors=factors)
    wanted = {name: pair for name, pair in pairs.items() if any(join(name, f) in targets.chosen for f in FACTORS)}
    moments = input_moments(model, wanted, statistics or {}, batches, device=device)
    starts: dict[str, Tensor] = {}
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for name, pair in wanted.items():
        for factor, moment in _seen(pair, moments[name]).items():
            key = join(name, factor)
            if key not in targets.ranks:
                continue
            if kind == "eva":
                bases[key] = symmetric_eigen(moment)
            else:
                method = settings.corda_config.corda_method
                parts = corda_components(_weight(getattr(pair, factor)), moment, targets.ranks[key][0], method)
                for part, value in zip("usv", parts, strict=True):
                    starts[f"{key}.corda_{part}"] = value.float().cpu().contiguous()
    if kind == "eva":
        starts = _eva_starts(bases, {name: rank for name, (rank, _) in targets.ranks.items()}, layers, settings)
    return starts


def _eva_starts(
    bases: Mapping[str, tuple[Tensor, Tensor]], ranks: Mapping[str, int], layers: Mapping[str, Any], config: Any
) -> dict[str, Tensor]:
    tiny = torch.finfo(torch.float32).tiny  # a layer that saw nothing explains nothing
    shares = {name: values / values.sum().clamp_min(tiny) for name, (values, _) in bases.items()}
    most = {}
    for name, rank in ranks.items():
        least = min(layers[name].in_features, layers[name].out_features)
        most[name] = max(1, min(least - 1, int(rank * config.eva_config.rho)))
    starts = {}
    for name, rank in eva_ranks(shares, ranks, most).items():
        values, vectors = bases[name]
        rows = vectors[:, :rank].mT
        if config.eva_config.whiten:
            rows = rows / values[:rank, None].clamp_min(1e-12 * float(values[0])).sqrt()
        starts[f"{name}.eva"] = rows.float().cpu().contiguous()
    return starts


def input_moments(
    model: nn.Module,
    pairs: Mapping[str, FactoredLayer],
    statistics: Mapping[str, LayerStatistics],
    batches: Sequence[Any] | None,
    *,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """``R = E[x x^T]`` (in, in) of every layer, float64: from ``statistics``, else from a pass over ``batches``.

    Raises:
        LowRankError: If a moment is in neither.
        NonFiniteError: If one is NaN or infinite; names the layer.
    """
    found: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        known = statistics.get(name)
        if known is not None and known.input_moment is not None and len(known.input_moment) == pair.in_features:
            found[name] = known.input_moment
    missing = {name: pair for name, pair in pairs.items() if name not in found}
    if missing and batches is None:
        raise LowRankError(
            f"adapters that start from data need the second moment of the inputs of layer '{next(iter(missing))}', and "
            f"{len(missing)} layers have none; give batches, or statistics with the moment input_full"
        )
    for group in _groups(missing):
        calibration = calibrate(
            model,
            as_batches(batches or []),
            group,
            weight_of=_refused,
            moments=frozenset({"input_full"}),
            importance=False,
            device=device,
        )
        for name, own in calibration.statistics.items():
            assert own.input_moment is not None
            found[name] = own.input_moment
    for name, moment in found.items():
        require_finite(moment, f"the second moment of the inputs of layer '{name}'")
    return found


def eva_ranks(shares: Mapping[str, Tensor], ranks: Mapping[str, int], most: Mapping[str, int]) -> dict[str, int]:
    """Share out the sum of ``ranks`` by explained variance: one each, then the largest shares first.

    Args:
        shares: Share of the variance of each direction, largest first, by factor.
        ranks: Rank asked for, by factor.
        most: Largest rank that a factor may get.
    """
    counts = dict.fromkeys(ranks, 1)
    pool = [(-float(share[i]), i, name) for name, share in shares.items() for i in range(1, most[name])]
    for _, _, name in sorted(pool)[: sum(ranks.values()) - len(ranks)]:
        counts[name] += 1
    return counts


def corda_components(weight: Tensor, moment: Tensor, rank: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """``rank`` components ``U S V^T`` of a weight in CorDA's norm, float64.

    With the damped moment ``C`` of mean variance 1, ``W C = U S X^T`` and ``V = C^-1 X``, so that all components
    together give ``W`` back.

    Args:
        weight: ``(out, in)``.
        moment: ``(in, in)``.
        rank: 1 to min(out, in).
        method: ``ipm`` takes the largest components, ``kpm`` the smallest.
    """
    moment = to_double(moment).to(weight.device)
    scale = float(moment.diagonal().mean())
    damped = damp(moment / scale if scale > 0 else torch.eye(len(moment), dtype=moment.dtype), _CORDA_DAMPING)
    u, s, xh = torch.linalg.svd(to_double(weight) @ damped, full_matrices=False)
    kept = slice(None, rank) if method == "ipm" else slice(len(s) - rank, None)
    root = torch.linalg.cholesky(damped)
    return u[:, kept], s[kept], torch.cholesky_solve(xh[kept].mT.contiguous(), root)


def _seen(pair: FactoredLayer, moment: Tensor) -> dict[str, Tensor]:
    """Second moment of what each factor sees, float64."""
    inner = to_double(_weight(pair.inner))
    moment = to_double(moment).to(inner.device)
    return {"inner": moment, "outer": inner @ moment @ inner.mT}


def _weight(layer: Any) -> Tensor:
    if is_quantised(layer):
        from lowrank_lit.quantize import dequantize_linear

        layer = dequantize_linear(layer)
    weight: Tensor = layer.weight
    return weight.detach()


def _groups(pairs: Mapping[str, FactoredLayer]) -> list[dict[str, nn.Module]]:
    """Layers in order, in groups whose moments fit in memory; a layer may stand alone."""
    groups: list[dict[str, nn.Module]] = []
    left = 0
    for name, pair in pairs.items():
        size = 8 * pair.in_features**2
        if not groups or size > left:
            groups.append({})
            left = _MOMENT_BYTES
        groups[-1][name] = pair
        left -= size
    return groups


def _refused(layer: nn.Module) -> Tensor:
    raise AssertionError(f"no moment of the outputs of a {type(layer).__name__} was asked for")
