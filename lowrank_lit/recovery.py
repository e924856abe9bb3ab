"""Rank-preserving recovery: LoRA on both factors of every factored layer, merged into the factors.

With adapters ``b1 a1`` on ``outer`` (out, r) and ``b2 a2`` on ``inner`` (r, in), scaled by s = alpha / l, a layer is

    W' = (outer + s b1 a1) (inner + s b2 a2)

so the merged factors have the shapes they had, rank(W') <= r, and there is nothing to truncate again. A LoRA on the
product has rank r + l instead; cutting it back to r loses most of a small update (see
:mod:`lowrank_lit.product_lora`). In pivot form the factors are the pivot rows (r, in) and the coefficients
(out - r, r), with the same effect. The adapters and their merge are PEFT's; here are the choice of layers, the bound on
the adapter rank, and the checks. (SVD-LLM, arXiv:2403.07378, adapts one factor after the other.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_lit.adapter_config import (
    DATA_DRIVEN,
    FACTORS,
    config_of,
    factors_of,
    find_pairs,
    is_quantised,
    join,
    resolve_targets,
    resolved_spec,
    rewrites_factors,
    unfit_for_quantised,
)
from lowrank_lit.errors import LowRankError, ModelError, reason_of
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.merging import MergeRecord, Trial, dequantised, merged, put, summary, try_merge
from lowrank_lit.unmerging import UnmergeRecord

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

DEFAULT_RANK = 8
_ADAPTER = "recovery"


@dataclass
class Adapters:
    """Handle on the adapters of one model, made by :func:`add_adapters`.

    Attributes:
        model: The adapted model.
        record: Settings and sizes as plain values; ``clamped`` maps a layer to its adapter rank where the layer's own
            rank forced a smaller one than asked for.
        settings: Arguments of :func:`add_adapters`, as plain values, that put adapters of the same names and shapes on
            the same model again; their weights come from a checkpoint then.
        merged: What :meth:`merge` did, None until then.
    """

    model: nn.Module
    record: dict[str, Any]
    settings: dict[str, Any]
    merged: MergeRecord | None = field(default=None, init=False)
    _tuner: BaseTuner = field(repr=False)
    _pairs: dict[str, FactoredLayer] = field(repr=False)
    _factors: dict[str, nn.Linear] = field(repr=False)
    _requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _originals: dict[str, Tensor] = field(repr=False)

    @property
    def rank(self) -> int:
        """Adapter rank that was asked for."""
        return int(self.record["r"])

    @property
    def trainable_parameters(self) -> int:
        """How many numbers the adapters have: the only ones that train."""
        return int(self.record["trainable_parameters"])

    def parameters(self, factor: str) -> list[nn.Parameter]:
        """The trainable parameters of the adapters on ``inner`` or on ``outer``."""
        layers = [getattr(pair, factor) for pair in self._pairs.values()]
        return [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]

    def merge(
        self,
        *,
        probe: Mapping[str, Tensor] | None = None,
        unmerge_record: Path | str | None = None,
        root: str = "",
    ) -> MergeRecord:
        """Add every adapter to its factor and remove it: the plain factored model again, with new values.

        Every pair passes its checks before anything is written, so a merge that raises leaves the adapters in place.
        Factors keep their dtype and their Parameter objects; every parameter gets its ``requires_grad`` back. Quantised
        factors become plain layers, with the dtype and the ``requires_grad`` that they had before they were quantised.

        Args:
            probe: Inputs (tokens, in_features) by layer name to measure the difference on; a layer that is not named is
                measured on 32 seeded normal tokens.
            unmerge_record: Folder to write what :func:`lowrank_lit.unmerging.unmerge` takes the merge back from.
            root: Name of the module in ``model`` that the record is of; it then speaks of names below that.

        Raises:
            ModelError: If the adapters are merged already, or a factor was replaced or is not whole on this process.
            NonFiniteError: If an adapter or a merged factor holds a NaN or infinity; the message names it.
            ExportError: If the record cannot be written.
        """
        if self.merged is not None:
            raise ModelError("the adapters are merged already; add new ones with add_adapters")
        self._check_factors()
        trials: dict[str, Trial] = {}
        record = None if unmerge_record is None else UnmergeRecord()
        for name, pair in self._pairs.items():
            trials[name] = try_merge(name, pair, (probe or {}).get(name), self._before(name))
            if record is not None:
                self._note(record, name, pair, root)
        if record is not None and unmerge_record is not None:
            record.save(Path(unmerge_record))
        quantised = sum(is_quantised(factor) for factor in self._factors.values())
        for name, pair in self._pairs.items():
            self._write(name, pair)
        self._tuner.unload()
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        self._check_factors(adapted=False)
        self.merged = summary(trials, self.record["factor_parameters"], _size(self._pairs), quantised)
        return self.merged

    @torch.no_grad()
    def _write(self, name: str, pair: FactoredLayer) -> None:
        """Give the factors of one pair their merged values, under the adapters, which are of no use any more."""
        with dequantised(pair) as plain, merged(name, pair):
            values = {factor: _base(getattr(pair, factor)).weight.data for factor in FACTORS}
        for factor, layer in plain.items():
            key = join(name, factor)
            layer.bias = self._factors[key].bias  # the same Parameter, for it was never quantised
            layer.train(pair.training)
            put(pair, factor, layer)
            self._factors[key] = layer
        for factor, value in values.items():
            _base(getattr(pair, factor)).weight.data = value

    @torch.no_grad()
    def _note(self, record: UnmergeRecord, name: str, pair: FactoredLayer, root: str) -> None:
        with dequantised(pair) as plain:
            before = {f: _base(getattr(pair, f)).weight.data for f in FACTORS} | self._before(name)
            with merged(name, pair):
                for factor in FACTORS:
                    key = join(name, factor)
                    layer: Any = getattr(pair, factor)
                    if hasattr(layer, "base_layer") or factor in plain:
                        known = key in self._originals
                        adapter = None if known else _sum_of(layer)
                        record.add(_below(root, key), before[factor], _base(layer).weight.data, adapter)

    def _before(self, name: str) -> dict[str, Tensor]:
        """Factors of a pair before there were adapters, where the method has rewritten them."""
        return {f: self._originals[key] for f in FACTORS if (key := join(name, f)) in self._originals}

    def _check_factors(self, *, adapted: bool = True) -> None:
        for name, layer in factors_of(self._pairs).items():
            found, original = _base(layer) if adapted else layer, self._factors[name]
            weight, shape = tuple(found.weight.shape), (original.out_features, original.in_features)
            if found is not original or (weight != shape and not is_quantised(original)):
                raise ModelError(
                    f"layer '{name}' is a {type(found).__name__} with a weight of shape {weight} instead of the factor "
                    f"{shape} that was adapted; leave layers alone until the merge, and merge where weights are whole"
                )


def add_adapters(
    model: nn.Module,
    *,
    rank: int | None = None,
    alpha: float = 16.0,
    dropout: float = 0.0,
    use_rslora: bool = False,
    config: PeftConfig | Mapping[str, Any] | None = None,
    factors: Sequence[str] = FACTORS,
    starts: Mapping[str, Tensor] | None = None,
) -> Adapters:
    """Put a LoRA on ``inner`` and ``outer`` of every factored layer of a model, in place, and freeze everything else.

    The output is unchanged until the adapters train. Adapters of float16, bfloat16 and 4-bit factors are float32. An
    adapter's rank is kept below the least side of its factor, which is the layer's rank r (out - r for the coefficients
    of a pivot form with fewer rows than that), and at 1 or more; its scale stays what was asked for, and the record's
    ``clamped`` says where that happened. A rank that was asked for and is below the rank of no factor is an error.

    Args:
        model: Any module that holds FactoredLinear or PivotLinear layers; it stays the object it is.
        rank: Adapter rank l, the same for both factors; None is 8, or less where no layer has more.
        alpha: The update is scaled by alpha / l.
        dropout: Probability of dropping an entry of an adapter's input in train mode.
        use_rslora: Scale by alpha / sqrt(l) instead (arXiv:2312.03732); better from l = 16 on.
        config: A PEFT configuration instead of the settings above, for another initialisation or method (DoRA, PiSSA,
            OLoRA, EVA, CorDA, MiSS), or its plain values ``{"class_path": "peft.LoraConfig", "init_args": {...}}``. Its
            ``target_modules`` may choose among the factors by their names in ``model``; None chooses all.
        factors: ``inner``, ``outer`` or both.
        starts: Where the adapters of EVA and CorDA start, from :func:`lowrank_lit.adapter_starts.adapter_starts`.

    Raises:
        LowRankError: If a setting is out of its range.
        ModelError: If there is nothing to adapt, the model has adapters already, a factor is shared, the configuration
            would train anything but adapters of factors or rewrite quantised ones, or PEFT refuses it.
    """
    if (rank is not None and rank < 1) or alpha <= 0 or not 0 <= dropout < 1:
        raise LowRankError(
            f"rank={rank}, alpha={alpha}, dropout={dropout}: give rank >= 1, alpha > 0, 0 <= dropout < 1"
        )
    pairs, layers = find_pairs(model)
    plain = {"rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora}
    settings = _own_config(config, plain)
    unasked = rank is None and config is None
    targets = resolve_targets(model, pairs, settings, factors=factors, starts=starts, clamp_all=unasked)
    _check_starts(settings, targets.chosen, layers, starts)
    again = plain if config is None else {"config": resolved_spec(config_of(config), targets)}
    record: dict[str, Any] = {"method": settings.peft_type.value}
    record |= {key: getattr(settings, key, None) for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    record |= {"clamped": targets.clamped, "pairs": len(pairs), "adapters": len(targets.chosen)}
    record["factor_parameters"] = sum(_numbers(pair) for pair in pairs.values())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    originals: dict[str, Tensor] = {}
    if rewrites_factors(settings):
        originals = {name: layers[name].weight.detach().clone() for name in targets.chosen}
    tuner = _inject(pairs, settings, {name: layers[name] for name in targets.chosen}, originals, starts or {}, flags)
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    record["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = {name: value.cpu() for name, value in originals.items() if not torch.equal(value, layers[name].weight)}
    return Adapters(model, record, {**again, "factors": list(factors)}, tuner, pairs, layers, flags, kept)


def factor_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters of a module in groups for an optimizer: ``inner``, ``outer`` and the others.

    Each group has the keys ``params`` and ``factor`` ("inner", "outer", or "" for parameters of no factor), so that
    the learning rate of one factor can be changed without a change of the optimizer. Empty groups are left out.
    """
    of: dict[int, str] = {}
    for pair in module.modules():
        for factor in FACTORS if isinstance(pair, FactoredLayer) else ():
            of |= {id(parameter): factor for parameter in getattr(pair, factor).parameters()}
    groups: dict[str, list[nn.Parameter]] = {"": [], "inner": [], "outer": []}
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[of.get(id(parameter), "")].append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items() if parameters]


def pause(parameters: Iterable[nn.Parameter]) -> None:
    """Let the next step of an optimizer pass parameters by, their state included: drop their gradients.

    Call it after the backward pass and before gradients are clipped. For optimizers that have taken the gradients by
    then, see :class:`Turns`.
    """
    for parameter in parameters:
        parameter.grad = None


class Turns:
    """:func:`pause` for DeepSpeed, which takes every gradient as soon as it is computed.

    Gradients of the paused factor are zero as they arise, so that the norm by which all are clipped is that of the
    others, and the optimizer's step leaves its groups out, so that neither values nor moments nor counted steps change.

    Args:
        optimizer: DeepSpeed's, round one with the groups of :func:`factor_groups`, or such a one itself.
        parameters: Those that train, by factor.

    Attributes:
        paused: ``inner``, ``outer``, or "" for neither. Set it before the backward pass.
    """

    def __init__(self, optimizer: Any, parameters: Mapping[str, Iterable[nn.Parameter]]) -> None:
        self.paused = ""
        self._left_out: list[tuple[dict[str, Any], list[Any]]] = []
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._handles = [inner.register_step_pre_hook(self._leave_out), inner.register_step_post_hook(self._put_back)]
        for factor, own in parameters.items():
            silence = partial(self._silence, factor)
            self._handles += [parameter.register_hook(silence) for parameter in own]  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Take the hooks away; nothing is paused any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _silence(self, factor: str, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if factor == self.paused else None

    def _leave_out(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # DeepSpeed steps one group at a time and may put parameters into it just before: what is there now counts.
        for group in optimizer.param_groups if self.paused else ():
            if group.get("factor") == self.paused:
                self._left_out.append((group, group["params"]))
                group["params"] = []

    def _put_back(self, *_: Any) -> None:
        for group, parameters in self._left_out:
            group["params"] = parameters
        self._left_out = []


def _own_config(config: PeftConfig | Mapping[str, Any] | None, plain: Mapping[str, Any]) -> Any:
    if config is not None:
        return config_of(config)
    from peft import LoraConfig

    lora: dict[str, Any] = {"lora_alpha": plain["alpha"], "lora_dropout": plain["dropout"]}  # alpha may be a fraction
    return LoraConfig(r=plain["rank"] or DEFAULT_RANK, use_rslora=plain["use_rslora"], **lora)


def _check_starts(
    config: Any, chosen: Iterable[str], layers: Mapping[str, nn.Linear], starts: Mapping[str, Tensor] | None
) -> None:
    kind = getattr(config, "init_lora_weights", None)
    if kind in DATA_DRIVEN and starts is None:
        raise ModelError(
            f"config.init_lora_weights='{kind}' starts from data; give starts=adapter_starts(model, config)"
        )
    for name in chosen:
        if is_quantised(layers[name]) and (why := unfit_for_quantised(config, layers[name].in_features)):
            raise ModelError(f"config: '{name}' is quantised, and {why}, or leave the factors unquantised")


def _inject(
    pairs: Mapping[str, FactoredLayer],
    config: Any,
    chosen: Mapping[str, nn.Linear],
    originals: Mapping[str, Tensor],
    starts: Mapping[str, Tensor],
    flags: Sequence[tuple[nn.Parameter, bool]],
) -> BaseTuner:
    """Let PEFT wrap the factors; they are as before if it refuses."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import cast_adapter_dtype

    # PEFT is given the pairs alone, not the model: nothing else can match, and nothing is written on the model itself.
    # It does not hear of 4-bit layers either: its layer for those could only merge by quantising again.
    host = nn.ModuleList(pairs.values())
    _lend_components(chosen, starts)
    try:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](host, config, _ADAPTER)
    except BaseException as error:  # an interrupt, too, is to leave a model that can be used
        for pair in pairs.values():
            for factor in FACTORS:
                setattr(pair, factor, _base(getattr(pair, factor)))
        for name, value in originals.items():
            chosen[name].weight.data = value
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        if isinstance(error, (TypeError, ValueError, RuntimeError)):
            raise ModelError(f"config: PEFT refuses it for these factors ({reason_of(error)})") from error
        raise
    finally:
        for layer in chosen.values():
            vars(layer).pop("eigens", None)
    cast_adapter_dtype(host, _ADAPTER)
    for name, layer in factors_of(pairs).items():
        if (start := starts.get(f"{name}.eva")) is not None:
            layer.lora_A[_ADAPTER].weight.data.copy_(start)
    for pair in pairs.values():
        pair.train(pair.training)  # PEFT's layers are born in train mode: dropout would act in a model in eval mode
    return tuner


def _lend_components(chosen: Mapping[str, nn.Linear], starts: Mapping[str, Tensor]) -> None:
    """Leave CorDA's components where PEFT looks for them, on the layer."""
    for name, layer in chosen.items():
        if f"{name}.corda_u" in starts:
            from peft.tuners.lora.corda import CordaEigens

            u, s, v = (starts[f"{name}.corda_{part}"].to(layer.weight.device, copy=True) for part in "usv")
            vars(layer)["eigens"] = CordaEigens(S_WC=s, U_WC=u, V_WC=v)


def _sum_of(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """``a``, ``b`` and the scale of an adapter that a merge adds; ``None`` where a merge does something else."""
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or _ADAPTER in layer.lora_variant:
        return None
    a, b = (part[_ADAPTER].get_parameter("weight").data for part in (layer.lora_A, layer.lora_B))
    return a, b, float(layer.scaling[_ADAPTER])


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _below(root: str, name: str) -> str:
    return name.removeprefix(f"{root}.") if root else name


def _size(pairs: Mapping[str, FactoredLayer]) -> int:
    return sum(parameter.numel() for pair in pairs.values() for parameter in pair.parameters())


def _numbers(pair: FactoredLayer) -> int:
    """Numbers that a pair stands for: packed ones count each."""
    factors: list[Any] = [getattr(pair, factor) for factor in FACTORS]
    packed: int = sum(f.weight.numel() - f.in_features * f.out_features for f in factors if is_quantised(f))
    return sum(parameter.numel() for parameter in pair.parameters()) - packed
