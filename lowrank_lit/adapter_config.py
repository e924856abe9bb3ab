"""Which factors a PEFT configuration adapts and with what rank, and configurations as plain values.

PEFT matches names by patterns and takes any rank. Here patterns become exact factors, ranks are bounded by the
factors', and a configuration that would train anything but adapters of factors is refused.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowrank_lit.errors import LowRankError, ModelError, reason_of
from lowrank_lit.layers import FactoredLayer

if TYPE_CHECKING:
    from peft import PeftConfig

FACTORS = ("inner", "outer")
DATA_DRIVEN = ("corda", "eva")
"""Initialisations that start from the second moments of the factors' inputs."""

# With these PEFT trains or rewrites something that is not an adapter of a factor.
_FOREIGN = ("modules_to_save", "target_parameters", "layer_replication", "trainable_token_indices", "lora_bias")


@dataclass(frozen=True)
class Targets:
    """The factors that are adapted.

    Attributes:
        chosen: Name in the host that PEFT is given, by name in the model.
        ranks: Adapter rank and alpha by name in the model; empty for methods without ranks by layer.
        clamped: Adapter rank by layer, where the layer's own rank forced a smaller one than asked for.
    """

    chosen: dict[str, str]
    ranks: dict[str, tuple[int, float]]
    clamped: dict[str, int]


def config_of(config: PeftConfig | Mapping[str, Any]) -> Any:
    """A PEFT configuration of one's own to change: a copy, or made from ``{"class_path": ..., "init_args": {...}}``.

    The class path is the name of a configuration in ``peft``, such as ``LoraConfig`` or ``peft.MissConfig``; arguments
    that are configurations themselves (``eva_config``) are given in the same way.

    Raises:
        ModelError: If the name is no configuration of PEFT, or PEFT refuses an argument.
    """
    if not isinstance(config, Mapping):
        return copy.deepcopy(config)
    import peft
    from peft.tuners import lora

    name = str(config.get("class_path", "")).removeprefix("peft.")
    kind: Any = getattr(peft, name, getattr(lora.config, name, None))  # those inside others are not all in peft
    if not (isinstance(kind, type) and is_dataclass(kind) and name.endswith("Config")):
        raise ModelError(f"config.class_path='{name}' is no configuration of PEFT; give one such as peft.LoraConfig")
    if unknown := set(config) - {"class_path", "init_args"}:
        raise ModelError(f"config has the unknown key '{min(unknown)}'; give class_path and init_args")
    arguments = {
        key: config_of(value) if isinstance(value, Mapping) and "class_path" in value else copy.deepcopy(value)
        for key, value in (config.get("init_args") or {}).items()
    }
    try:
        return kind(**arguments)
    except (TypeError, ValueError) as error:
        raise ModelError(f"config: {name} refuses its init_args ({reason_of(error)}); see PEFT's manual") from error


def spec_of(config: Any) -> dict[str, Any]:
    """A configuration as plain values that :func:`config_of` takes; what is left at its default is left out."""
    arguments = {}
    for field in fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.init and value != default:
            arguments[field.name] = _plain(value)
    return {"class_path": type(config).__name__, "init_args": arguments}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return spec_of(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def resolved_spec(config: Any, targets: Targets) -> dict[str, Any]:
    """The plain values that make adapters of the same names and shapes again, on the same model.

    Only names and shapes: weights come from a checkpoint, so initialisations that compute them are left out.
    """
    spec = spec_of(config)
    arguments = spec["init_args"]
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern", "corda_config", "eva_config"):
        arguments.pop(setting, None)
    arguments["target_modules"] = _either(targets.chosen)
    if targets.ranks:
        arguments["rank_pattern"] = {re.escape(name): rank for name, (rank, _) in targets.ranks.items()}
    if targets.ranks and hasattr(config, "alpha_pattern"):
        arguments["alpha_pattern"] = {re.escape(name): alpha for name, (_, alpha) in targets.ranks.items()}
    if isinstance(arguments.get("init_lora_weights"), str) and arguments["init_lora_weights"] != "mica":
        arguments["init_lora_weights"] = True  # mica also freezes one of the adapter's matrices
    return spec


def rewrites_factors(config: Any) -> bool:
    """Whether PEFT changes the factors when it adds the adapters, as PiSSA, OLoRA and CorDA do."""
    method: str = config.peft_type.value
    if method == "LORA":
        start: Any = config.init_lora_weights
        plain: bool = isinstance(start, bool) or start in ("gaussian", "eva", "orthogonal", "mica")
        return not plain or getattr(config, "kasa_config", None) is not None
    return method != "MISS"  # of the rest we do not know


def unfit_for_quantised(config: Any, columns: int) -> str | None:
    """Why a configuration's adapters cannot go on a 4-bit factor (rows, columns); ``None`` where they can.

    PEFT is not told that a factor is packed. LoRA that starts at no change never looks at it; DoRA does, by
    bitsandbytes' own dequantisation, which on a CPU is wrong for rows that are not whole blocks of 64.
    """
    start: Any = getattr(config, "init_lora_weights", None)
    plain = isinstance(start, bool) or start in ("gaussian", "eva")
    if config.peft_type.value != "LORA" or not plain or rewrites_factors(config):
        name = start if isinstance(start, str) else type(config).__name__.removesuffix("Config")
        return f"{name} reads or rewrites factors; choose LoRA, with EVA's or a plain start"
    if getattr(config, "use_dora", False) and columns % 64:
        return f"use_dora needs rows that are multiples of 64, and these have {columns}; leave it out"
    return None


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes' 4-bit ones, whose weight is packed."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


def join(name: str, factor: str) -> str:
    """Name of a factor in the model, which may itself be a factored layer."""
    return f"{name}.{factor}" if name else factor


def factors_of(pairs: Mapping[str, FactoredLayer]) -> dict[str, Any]:
    """Both children of every pair, by their names in the model: a linear layer or PEFT's layer round one."""
    return {join(name, factor): getattr(pair, factor) for name, pair in pairs.items() for factor in FACTORS}


def find_pairs(model: nn.Module) -> tuple[dict[str, FactoredLayer], dict[str, nn.Linear]]:
    """The factored layers by name, each once, and their factors, checked to be ones an adapter can be merged into.

    Raises:
        ModelError: If there is none, or a factor has an adapter, is shared, or holds numbers of an unknown kind.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    pairs = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    if not pairs:
        raise ModelError(f"the {type(model).__name__} has no factored layer to adapt; compress it first")
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    factors = factors_of(pairs)
    holders = Counter(id(factor) for factor in factors.values())
    for name, factor in factors.items():
        kind = type(factor).__name__
        if isinstance(factor, BaseTunerLayer):
            raise ModelError(f"layer '{name}' has an adapter already; merge it before adding another")
        readable = isinstance(factor, nn.Linear) and (factor.weight.is_floating_point() or is_quantised(factor))
        if not readable:
            raise ModelError(f"layer '{name}' is a {kind} without real weights; dequantise it before adding adapters")
        if holders[id(factor)] > 1 or any(owners[id(p)] > 1 for p in factor.parameters()):
            raise ModelError(f"layer '{name}' is shared, so an adapter would change two layers; untie it first")
    return pairs, factors


def resolve_targets(
    model: nn.Module,
    pairs: Mapping[str, FactoredLayer],
    config: Any,
    *,
    factors: Sequence[str] = FACTORS,
    starts: Mapping[str, Tensor] | None = None,
    clamp_all: bool = False,
) -> Targets:
    """Turn the patterns of a configuration into exact factors and ranks, in place.

    Args:
        model: Whose names the configuration speaks of.
        pairs: Of :func:`find_pairs`.
        config: A copy of one's own; it then speaks of names in ``nn.ModuleList(pairs.values())``.
        factors: Which children of a pair to adapt.
        starts: Of :func:`lowrank_lit.adapter_starts.adapter_starts`; these tell the ranks.
        clamp_all: Allow a rank that is below the rank of no factor, because nobody asked for it.

    Raises:
        LowRankError: If the adapter rank is below the rank of no factor.
        ModelError: If nothing is adapted, or the configuration would train anything but adapters of factors.
    """
    if not factors or set(factors) - set(FACTORS):
        raise LowRankError(f"factors={list(factors)} are not factors; choose inner, outer or both")
    for setting in _FOREIGN:
        if value := getattr(config, setting, None):
            raise ModelError(f"config.{setting}={value!r} reaches beyond the factors; leave it unset")
    if config.peft_type.value == "ADALORA":
        raise ModelError("config=AdaLoraConfig moves ranks by calls that no callback makes; give a LoraConfig")
    if not hasattr(config, "target_modules"):
        raise ModelError(f"config={type(config).__name__} adapts no layers; give a LoraConfig or one of its kind")
    if getattr(config, "bias", "none") != "none":
        raise ModelError(f"config.bias={config.bias!r} trains biases, which no adapter holds; set it to 'none'")
    chosen = _choose(model, pairs, config, factors)
    layers = factors_of(pairs)
    ranks, clamped = _resolve_ranks({name: layers[name] for name in chosen}, config, starts or {}, clamp_all)
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, setting):
            setattr(config, setting, None)  # taken into account above; they speak of names in the model
    config.target_modules = _either(chosen.values())
    if ranks:
        config.rank_pattern = {re.escape(chosen[name]): rank for name, (rank, _) in ranks.items()}
    if ranks and hasattr(config, "alpha_pattern"):
        config.alpha_pattern = {re.escape(chosen[name]): alpha for name, (_, alpha) in ranks.items()}
    return Targets(chosen, ranks, clamped)


def _choose(
    model: nn.Module, pairs: Mapping[str, FactoredLayer], config: Any, factors: Sequence[str]
) -> dict[str, str]:
    from peft.tuners.tuners_utils import check_target_module_exists

    known = {join(name, factor): f"{i}.{factor}" for i, name in enumerate(pairs) for factor in FACTORS}
    chosen = {name: host for name, host in known.items() if name.rpartition(".")[2] in factors}
    asked = config.target_modules
    if asked is None or asked == "all-linear":
        return chosen
    matched = [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]
    foreign = [name for name in matched if name not in known]
    found = [name for name in matched if name in chosen]
    if foreign or not found:
        what = f"matches '{foreign[0]}', which is no factor" if foreign else "matches no layer"
        raise ModelError(f"config.target_modules={asked!r} {what}; choose factors, such as '{next(iter(chosen))}'")
    return {name: chosen[name] for name in found}


def _resolve_ranks(
    factors: Mapping[str, nn.Linear], config: Any, starts: Mapping[str, Tensor], clamp_all: bool
) -> tuple[dict[str, tuple[int, float]], dict[str, int]]:
    """Rank and alpha of each adapter, its rank below the factor's and its scale as asked; and what was clamped."""
    if not hasattr(config, "rank_pattern"):
        return {}, {}
    from peft.utils.other import get_pattern_key

    asked_ranks, asked_alphas = config.rank_pattern or {}, getattr(config, "alpha_pattern", None) or {}
    default_alpha = getattr(config, "lora_alpha", 1.0)
    power = 0.5 if getattr(config, "use_rslora", False) else 1.0
    ranks: dict[str, tuple[int, float]] = {}
    clamped: dict[str, int] = {}
    too_large = []
    for name, factor in factors.items():
        layer = name.rpartition(".")[0]
        rank = asked_ranks.get(get_pattern_key(list(asked_ranks), name), config.r)
        alpha = asked_alphas.get(get_pattern_key(list(asked_alphas), name), default_alpha)
        least = min(factor.in_features, factor.out_features)
        most = max(1, least - 1)
        if rank >= least:
            too_large.append((rank, least))
        if rank > most:
            clamped[layer] = min(most, clamped.get(layer, most))
            alpha, rank = alpha * (most / rank) ** power, most
        if (start := starts.get(f"{name}.eva")) is not None:
            scales = getattr(config.eva_config, "adjust_scaling_factors", True)
            alpha, rank = alpha * (len(start) / rank) ** power if scales else alpha, len(start)
        ranks[name] = (rank, alpha)
    if len(too_large) == len(factors) and not clamp_all:
        rank, least = max(too_large, key=lambda pair: pair[1])
        remedy = f"choose {least - 1} or less, or train" if least > 1 else "train"
        raise LowRankError(
            f"adapter rank {rank} is not below the rank of any factor, of which the largest is {least}; {remedy} the "
            "whole factors with FactorTuning"
        )
    return ranks, clamped


def _either(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)
