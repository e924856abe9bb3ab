"""Rank-preserving recovery: LoRA on both factors of every factored layer, merged into the factors.

With adapters ``b1 a1`` on ``outer`` (out, r) and ``b2 a2`` on ``inner`` (r, in), scaled by s = alpha / l, a layer is

    W' = (outer + s b1 a1) (inner + s b2 a2)

so the merged factors have the shapes they had, rank(W') <= r, and there is nothing to truncate again. A LoRA on the
product has rank r + l instead; cutting it back to r loses most of a small update. In pivot form the factors are the
pivot rows (r, in) and the coefficients (out - r, r), with the same effect. The adapters and their merge are
PEFT's; here are the choice of layers, the bound on the adapter rank, and the checks. (SVD-LLM, arXiv:2403.07378, adapts
one factor after the other.)
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_lit.errors import LowRankError, ModelError, NonFiniteError
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.linalg import to_double

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

_ADAPTER = "recovery"
_FACTORS = ("inner", "outer")
_PROBE_TOKENS = 32
# With these PEFT trains or rewrites something that is not an adapter of a factor.
_FOREIGN = ("modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices", "lora_bias")


@dataclass(frozen=True)
class MergeRecord:
    """What a merge did; every pair kept its shapes and so its rank, or the merge would have raised.

    Differences are between an adapted pair and the merged one on a probe, both computed in float32 (float64 for float64
    factors): what storing the sums in the factors' dtype costs. Updates are ||W' - W||_F / ||W||_F of stored products.

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

    def to_dict(self) -> dict[str, Any]:
        """The record as plain numbers and strings, for JSON."""
        return asdict(self)


@dataclass
class Adapters:
    """Handle on the adapters of one model, made by :func:`add_adapters`.

    Attributes:
        model: The adapted model.
        record: Settings and sizes as plain values; ``clamped`` maps a layer to its adapter rank where the layer's own
            rank forced a smaller one than asked for.
        merged: What :meth:`merge` did, None until then.
    """

    model: nn.Module
    record: dict[str, Any]
    merged: MergeRecord | None = field(default=None, init=False)
    _tuner: BaseTuner = field(repr=False)
    _pairs: dict[str, FactoredLayer] = field(repr=False)
    _originals: dict[str, nn.Linear] = field(repr=False)
    _requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False)

    @property
    def rank(self) -> int:
        """Adapter rank that was asked for."""
        return int(self.record["r"])

    @property
    def trainable_parameters(self) -> int:
        """How many numbers the adapters have: the only ones that train."""
        return int(self.record["trainable_parameters"])

    def merge(self, *, probe: Mapping[str, Tensor] | None = None) -> MergeRecord:
        """Add every adapter to its factor and remove it: the plain factored model again, with new values.

        Every pair passes its checks before anything is written, so a merge that raises leaves the adapters in place.
        Factors keep their dtype and their Parameter objects; every parameter gets its ``requires_grad`` back.

        Args:
            probe: Inputs (tokens, in_features) by layer name to measure the difference on; a layer that is not named is
                measured on 32 seeded normal tokens.

        Raises:
            ModelError: If the adapters are merged already, or a factor was replaced or is not whole on this process.
            NonFiniteError: If an adapter or a merged factor holds a NaN or infinity; the message names it.
        """
        if self.merged is not None:
            raise ModelError("the adapters are merged already; add new ones with add_adapters")
        self._check_factors()
        trials = {name: _trial(name, pair, (probe or {}).get(name)) for name, pair in self._pairs.items()}
        self._tuner.merge_and_unload(safe_merge=True)
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        self._check_factors(adapted=False)
        self.merged = _summary(trials, self.record["factor_parameters"], _size(self._pairs))
        return self.merged

    def _check_factors(self, *, adapted: bool = True) -> None:
        for name, layer in _factors(self._pairs).items():
            found, original = getattr(layer, "base_layer", layer) if adapted else layer, self._originals[name]
            weight, shape = tuple(found.weight.shape), (original.out_features, original.in_features)
            if found is not original or weight != shape:
                raise ModelError(
                    f"layer '{name}' is a {type(found).__name__} with a weight of shape {weight} instead of the factor "
                    f"{shape} that was adapted; leave layers alone until the merge, and merge where weights are whole"
                )


def add_adapters(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    use_rslora: bool = False,
    config: PeftConfig | None = None,
) -> Adapters:
    """Put a LoRA on ``inner`` and ``outer`` of every factored layer of a model, in place, and freeze everything else.

    The output is unchanged until the adapters train. Adapters of float16 and bfloat16 factors are float32. An adapter's
    rank is kept below the least side of its factor, which is the layer's rank r (out - r for the coefficients of a
    pivot form with fewer rows than that), and at 1 or more; its scale stays what was asked for.

    Args:
        model: Any module that holds FactoredLinear or PivotLinear layers; it stays the object it is.
        rank: Adapter rank l, the same for both factors.
        alpha: The update is scaled by alpha / l.
        dropout: Probability of dropping an entry of an adapter's input in train mode.
        use_rslora: Scale by alpha / sqrt(l) instead (arXiv:2312.03732); better from l = 16 on.
        config: A PEFT configuration instead of the settings above, for another initialisation or method. Its
            ``target_modules`` may choose among the factors by their names in ``model``; None chooses all.

    Raises:
        LowRankError: If a setting is out of its range.
        ModelError: If there is nothing to adapt, the model has adapters already, a factor is shared or quantised, or
            the configuration would train anything but adapters of factors.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise LowRankError(
            f"rank={rank}, alpha={alpha}, dropout={dropout}: give rank >= 1, alpha > 0, 0 <= dropout < 1"
        )
    from peft import LoraConfig

    pairs, originals = _find_pairs(model)
    # A copy of Any type: each PEFT method has settings of its own, and those below are looked for before they are used.
    settings: Any = copy.deepcopy(config)
    if settings is None:
        plain: dict[str, Any] = {"lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": use_rslora}
        settings = LoraConfig(r=rank, **plain)
    chosen = _resolve_targets(model, pairs, settings)
    record: dict[str, Any] = {"method": settings.peft_type.value}
    record |= {key: getattr(settings, key, None) for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    record |= {"clamped": _resolve_ranks(originals, chosen, settings), "pairs": len(pairs), "adapters": len(chosen)}
    record["factor_parameters"] = _size(pairs)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tuner = _inject(pairs, settings)
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    record["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Adapters(model, record, tuner, pairs, originals, flags)


def _inject(pairs: Mapping[str, FactoredLayer], config: Any) -> BaseTuner:
    """Let PEFT wrap the factors; they are as before if it refuses."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype

    # PEFT is given the pairs alone, not the model: nothing else can match, and nothing is written on the model itself.
    host = nn.ModuleList(pairs.values())
    try:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](host, config, _ADAPTER)
    except Exception:
        for pair in pairs.values():
            for factor in _FACTORS:
                setattr(pair, factor, getattr(getattr(pair, factor), "base_layer", getattr(pair, factor)))
        raise
    cast_adapter_dtype(host, _ADAPTER)
    for pair in pairs.values():
        pair.train(pair.training)  # PEFT's layers are born in train mode: dropout would act in a model in eval mode
    return tuner


def _join(name: str, factor: str) -> str:
    return f"{name}.{factor}" if name else factor  # the model may itself be a factored layer


def _factors(pairs: Mapping[str, FactoredLayer]) -> dict[str, Any]:
    """Both children of every pair, by their names in the model: nn.Linear or PEFT's layer round one."""
    return {_join(name, factor): getattr(pair, factor) for name, pair in pairs.items() for factor in _FACTORS}


def _size(pairs: Mapping[str, FactoredLayer]) -> int:
    return sum(parameter.numel() for pair in pairs.values() for parameter in pair.parameters())


def _find_pairs(model: nn.Module) -> tuple[dict[str, FactoredLayer], dict[str, nn.Linear]]:
    """The factored layers by name, each once, and their factors, checked to be ones an adapter can be merged into."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    pairs = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    if not pairs:
        raise ModelError(f"the {type(model).__name__} has no factored layer to adapt; compress it first")
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    factors = _factors(pairs)
    holders = Counter(id(factor) for factor in factors.values())
    for name, factor in factors.items():
        kind = type(factor).__name__
        if isinstance(factor, BaseTunerLayer):
            raise ModelError(f"layer '{name}' has an adapter already; merge it before adding another")
        if not isinstance(factor, nn.Linear) or not factor.weight.is_floating_point():
            raise ModelError(f"layer '{name}' is a {kind} without real weights; dequantise it before adding adapters")
        if holders[id(factor)] > 1 or any(owners[id(p)] > 1 for p in factor.parameters()):
            raise ModelError(f"layer '{name}' is shared, so an adapter would change two layers; untie it first")
    return pairs, factors


def _resolve_targets(model: nn.Module, pairs: Mapping[str, FactoredLayer], config: Any) -> dict[str, str]:
    """Resolve a configuration's targets to exact factors, in place; returns {name in the model: name in the host}."""
    from peft.tuners.tuners_utils import check_target_module_exists

    for setting in _FOREIGN:
        if value := getattr(config, setting, None):
            raise ModelError(f"config.{setting}={value!r} reaches beyond the factors; leave it unset")
    if not hasattr(config, "target_modules"):
        raise ModelError(f"config={type(config).__name__} adapts no layers; give a LoraConfig or one of its kind")
    if getattr(config, "bias", "none") != "none":
        raise ModelError(f"config.bias={config.bias!r} trains biases, which no adapter holds; set it to 'none'")
    chosen = {_join(name, factor): f"{i}.{factor}" for i, name in enumerate(pairs) for factor in _FACTORS}
    asked = config.target_modules
    if asked is not None and asked != "all-linear":
        matched = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
        foreign = [name for name in matched if name not in chosen]
        if foreign or not matched:
            found = f"matches '{foreign[0]}', which is no factor" if foreign else "matches no layer"
            raise ModelError(f"config.target_modules={asked!r} {found}; choose factors, such as '{next(iter(chosen))}'")
        chosen = {name: chosen[name] for name in matched}
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, setting):
            setattr(config, setting, None)  # taken into account above; they speak of names in the model
    config.target_modules = "|".join(name.replace(".", r"\.") for name in chosen.values())
    return chosen


def _resolve_ranks(factors: Mapping[str, nn.Linear], chosen: Mapping[str, str], config: Any) -> dict[str, int]:
    """Bound each adapter's rank by its factor's, its scale unchanged, in place; returns {layer: its least rank}."""
    if not hasattr(config, "rank_pattern"):
        return {}
    from peft.utils.other import get_pattern_key

    has_alpha = hasattr(config, "alpha_pattern")
    asked_ranks, asked_alphas = config.rank_pattern, config.alpha_pattern if has_alpha else {}
    default_alpha = config.lora_alpha if has_alpha else 1.0
    power = 0.5 if getattr(config, "use_rslora", False) else 1.0
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    clamped: dict[str, int] = {}
    for name, host_name in chosen.items():
        layer = name.rpartition(".")[0]
        rank = asked_ranks.get(get_pattern_key(list(asked_ranks), name), config.r)
        alpha = asked_alphas.get(get_pattern_key(list(asked_alphas), name), default_alpha)
        most = max(1, min(factors[name].weight.shape) - 1)
        if rank > most:
            clamped[layer] = min(most, clamped.get(layer, most))
            alpha, rank = alpha * (most / rank) ** power, most
        key = host_name.replace(".", r"\.")
        ranks |= {key: rank} if rank != config.r else {}
        alphas |= {key: alpha} if alpha != default_alpha else {}
    config.rank_pattern = ranks
    if has_alpha:
        config.alpha_pattern = alphas
    return clamped


def _summary(trials: Mapping[str, tuple[float, float, float]], before: int, after: int) -> MergeRecord:
    differences, relatives, updates = (sorted(column) for column in zip(*trials.values(), strict=True))
    return MergeRecord(
        pairs=len(trials),
        factor_parameters_before=before,
        factor_parameters_after=after,
        largest_output_difference=differences[-1],
        largest_relative_difference=relatives[-1],
        worst_pair=max(trials, key=lambda name: trials[name][1]),
        smallest_update=updates[0],
        median_update=updates[len(updates) // 2],
        largest_update=updates[-1],
    )


@torch.no_grad()
def _trial(name: str, pair: FactoredLayer, probe: Tensor | None) -> tuple[float, float, float]:
    """Merge one pair, measure, and take the merge back to the last bit: difference, relative difference, update."""
    for key, parameter in pair.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NonFiniteError(f"layer '{_join(name, key)}' holds a NaN or infinity; lower the learning rate")
    if probe is None:
        probe = torch.randn(_PROBE_TOKENS, pair.in_features, generator=torch.Generator().manual_seed(0))
    with torch.autocast(pair.inner.weight.device.type, enabled=False), _in_eval_mode(pair):
        with _in_float32(pair):
            before = _values(pair)
            inputs = probe.to(before[0])
            adapted: Tensor = pair.forward(inputs)
        with _merged(name, pair), _in_float32(pair):
            update = _product_update(before, _values(pair))
            difference: Tensor = pair.forward(inputs) - adapted
    relative = float(difference.norm() / adapted.norm()) if difference.any() else 0.0
    return float(difference.abs().max()), relative, update


def _values(pair: FactoredLayer) -> tuple[Tensor, Tensor]:
    """The factors (outer, inner) of the weight, apart from the parameters, which are given other values later."""
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
def _merged(name: str, pair: FactoredLayer) -> Iterator[None]:
    """Merge the adapters of one pair by PEFT, and restore the factors on leaving."""
    layers = {key: layer for key, layer in _factors({name: pair}).items() if hasattr(layer, "base_layer")}
    try:
        with _values_kept(pair):
            for key, layer in layers.items():
                try:
                    layer.merge(safe_merge=True)  # writes a new tensor, so that the kept one has its old values
                except ValueError as error:
                    kind = layer.base_layer.weight.dtype
                    raise NonFiniteError(f"layer '{key}' is not finite merged into {kind}; merge in float32") from error
            yield
    finally:
        for layer in layers.values():
            layer.merged_adapters.clear()


@contextmanager
def _in_float32(pair: FactoredLayer) -> Iterator[None]:
    """Hold every parameter of a pair in float32 or better."""
    with _values_kept(pair):
        for parameter in pair.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        yield


@contextmanager
def _values_kept(module: nn.Module) -> Iterator[None]:
    """Give every parameter back the tensor it had."""
    kept = [(parameter, parameter.data) for parameter in module.parameters()]
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
