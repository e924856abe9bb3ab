"""NF4 for the factors of a compressed model (QLoRA on factors), in the gauge that loses least, see
:mod:`lowrank_lit.gauge`.

A merge dequantises, adds the adapter and keeps 16 bits (:mod:`lowrank_lit.merging`). Quantised again, a factor gets
fresh noise of the size of a usual update: :func:`requantize_factors` measures what that costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.adapter_config import FACTORS, find_pairs, is_quantised, join
from lowrank_lit.errors import LowRankError, ModelError
from lowrank_lit.extras import load_bitsandbytes
from lowrank_lit.gauge import GAUGES, error_law, in_gauge, product_error, refit_outer
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.linalg import balance, require_finite, to_double

RANK_QUANTUM = 64
"""Quantised factors have ranks that are multiples of this: the rows of ``outer`` are then whole blocks."""
WHICH = {"both": FACTORS, "inner": ("inner",), "outer": ("outer",)}


@dataclass(frozen=True)
class _Quantised:
    """New factors of one layer: those in NF4, and values for the one that is not."""

    layers: dict[str, nn.Linear]
    values: dict[str, Tensor]
    figures: dict[str, Any]


def quantize_factors(
    model: nn.Module,
    *,
    which: str = "both",
    gauge: str = "rotated",
    double_quant: bool = True,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
    moments: Mapping[str, Tensor] | None = None,
    dense: Iterable[str] = (),
) -> dict[str, Any]:
    """Quantise the factors of every factored layer to NF4, in place, and freeze them.

    Call it before adapters and optimizers are made. Layers are replaced after all of them have been computed, so an
    error leaves the model as it was.

    Args:
        model: Holds FactoredLinear layers, whose ranks are multiples of 64.
        which: ``both`` factors, ``inner`` or ``outer``.
        gauge: ``rotated`` (balanced, then a random rotation), ``balanced``, or ``none`` (the factors as they are).
        double_quant: Store block scales in 8 bits: 4.13 bits per number instead of 4.5.
        compute_dtype: Of products with quantised factors; None is that of their inputs.
        seed: Of the rotation.
        moments: Second moments (in_features, in_features) of the inputs by layer name. A layer that has one gets
            ``outer`` fitted anew to its quantised ``inner``, to the least error of the outputs on these inputs.
        dense: Names of plain ``nn.Linear`` layers to quantise as well, as they are.

    Returns:
        The record, plain values: ``settings``; ``quantized``, the names of the quantised linear layers (with the
        settings, what :func:`apply_quantization` needs); ``layers``, by name: ``rank``, ``product_error`` ||W' -
        W||_F / ||W||_F, ``error_law`` (what it is in the gauge ``rotated``), and with moments ``output_error``, the
        same in the norm of the outputs; ``largest_product_error`` and its ``error_law``; ``parameters`` and ``bytes``
        that are quantised; ``bits_per_weight``, the bits of all factors, quantised or not, by the numbers of the
        matrices whose place they took; ``unquantized``, names of the linear layers that keep their type: the matrices
        that a plan leaves dense, the output embedding, and factors that were not chosen.

    Raises:
        LowRankError: If a setting is unknown, bitsandbytes is missing, or a rank is no multiple of 64.
        ModelError: If there is no factored layer, one is in pivot form, quantised or adapted, or a name of ``dense`` is
            no plain linear layer.
        NonFiniteError: If a factor holds a NaN or infinity.
    """
    if which not in WHICH or gauge not in GAUGES:
        raise LowRankError(
            f"which='{which}', gauge='{gauge}': choose which from {', '.join(WHICH)}, gauge from {', '.join(GAUGES)}"
        )
    load_bitsandbytes("quantisation to NF4")
    pairs = _pairs_to_quantise(model)
    plain = {name: _plain_linear(model, name) for name in dense}
    for name in plain:
        if name.rpartition(".")[0] in pairs:
            raise ModelError(f"dense: layer '{name}' is a factor; choose factors by which='inner' or 'outer'")
    storage = {"compute_dtype": compute_dtype, "double_quant": double_quant}
    found: dict[str, _Quantised] = {}
    for name, pair in pairs.items():
        moment = None if moments is None else moments.get(name)
        found[name] = _quantise_pair(name, pair, WHICH[which], gauge, seed, moment, storage)
    quantised = {join(name, factor): layer for name, new in found.items() for factor, layer in new.layers.items()}
    quantised |= {name: _from_weight(name, layer, layer.weight, storage) for name, layer in plain.items()}
    with torch.no_grad():
        for name, pair in pairs.items():
            for factor, value in found[name].values.items():
                getattr(pair, factor).weight.copy_(value)
    for name, layer in quantised.items():
        _put(model, name, layer)
    worst = max((new.figures for new in found.values()), key=lambda figures: figures["product_error"])
    return {
        "settings": {
            "which": which,
            "gauge": gauge,
            "double_quant": double_quant,
            "compute_dtype": None if compute_dtype is None else str(compute_dtype).removeprefix("torch."),
            "seed": seed,
        },
        "quantized": list(quantised),
        "layers": {name: new.figures for name, new in found.items()},
        "largest_product_error": worst["product_error"],
        "error_law": worst["error_law"],
        "parameters": sum(layer.in_features * layer.out_features for layer in quantised.values()),
        "bytes": sum(packed_bytes(layer) for layer in quantised.values()),
        "bits_per_weight": _bits_per_weight(pairs),
        "unquantized": [name for name, layer in model.named_modules() if _is_plain(layer)],
    }


def quantize_loaded(model: nn.Module, *, seed: int = 0) -> None:
    """Quantise the factors of a model that has just been loaded, as :func:`quantize_factors` does by default, each
    layer in its turn: no second copy of all factors is held. An error in the middle leaves a part of them quantised.

    The model is marked so that PEFT puts its layers for 4-bit bases round the factors.

    Raises:
        LowRankError: If bitsandbytes is missing, or a rank is no multiple of 64.
        ModelError: If there is no factored layer, or one is in pivot form.
        NonFiniteError: If a factor holds a NaN or infinity.
    """
    load_bitsandbytes("quantisation to NF4")
    storage = {"compute_dtype": None, "double_quant": True}
    for name, pair in _pairs_to_quantise(model).items():
        for factor, layer in _quantise_pair(name, pair, FACTORS, "rotated", seed, None, storage).layers.items():
            _put(model, join(name, factor), layer)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


def requantize_factors(model: nn.Module, loss: Callable[[nn.Module], float], **settings: Any) -> dict[str, Any]:
    """Quantise merged factors again, in place, and print what that costs.

    The noise is fresh, of relative size e = 0.092 in each factor: where an adapter moved a factor by less, most of what
    it learnt is lost.

    Args:
        model: With its adapters merged.
        loss: Mean loss of a model in nats per token on held-out text; called before and after.
        settings: Of :func:`quantize_factors`.

    Returns:
        The record of :func:`quantize_factors` with ``loss``: ``before``, ``after`` and ``increase``, in nats.

    Raises:
        LowRankError: As :func:`quantize_factors`.
    """
    before = loss(model)
    record = quantize_factors(model, **settings)
    after = loss(model)
    print(
        f"Quantised again to NF4: loss {before:.4f} -> {after:.4f} nats per token ({after - before:+.4f}); "
        f"{record['bits_per_weight']:.2f} bits per weight"
    )
    return {**record, "loss": {"before": before, "after": after, "increase": after - before}}


def apply_quantization(model: nn.Module, record: Mapping[str, Any]) -> None:
    """Put empty quantised layers where a record of :func:`quantize_factors` has them, to load a state dict into.

    Raises:
        LowRankError: If bitsandbytes is missing.
        ModelError: If a layer of the record is not in the model, or is no plain linear layer there.
    """
    load_bitsandbytes("a model with factors in NF4")
    from lowrank_lit.nf4 import NF4Linear

    settings = record["settings"]
    dtype = settings["compute_dtype"]
    compute_dtype = None if dtype is None else getattr(torch, dtype)
    for name, layer in {name: _plain_linear(model, name) for name in record["quantized"]}.items():
        new = NF4Linear.empty(layer, compute_dtype=compute_dtype, double_quant=settings["double_quant"])
        new.train(layer.training)
        _put(model, name, new)


@torch.no_grad()
def dequantize_linear(layer: nn.Module, dtype: torch.dtype | None = None) -> nn.Linear:
    """A plain linear layer with the numbers that a 4-bit one stands for, right on CPUs and GPUs and for every shape.

    Args:
        layer: bitsandbytes' ``Linear4bit`` (of any 4-bit type) or PEFT's layer round one; it is left as it is.
        dtype: Of the weight; None is the dtype that it had before it was quantised.

    Returns:
        A layer with the same bias Parameter and the mode of ``layer``; its weight trains if it did before it was
        quantised by this package, or was quantised elsewhere.

    Raises:
        ModelError: If the layer is not quantised, or repacked by bitsandbytes for inference.
    """
    quantised: Any = getattr(layer, "base_layer", layer)
    if not is_quantised(quantised):
        raise ModelError(f"{type(quantised).__name__} is not quantised; give a layer with a 4-bit weight")
    state = quantised.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            f"the weight of a {type(quantised).__name__} was repacked by bitsandbytes for inference on this CPU, which "
            "loses digits; load it again and dequantise before the first forward pass in eval mode"
        )
    from lowrank_lit.nf4 import dequantize

    weight = dequantize(quantised.weight, state, state.dtype if dtype is None else dtype)
    plain = _linear(weight, quantised.bias, quantised.training)
    plain.weight.requires_grad_(getattr(quantised, "trainable", True))
    return plain


def dequantize_model(model: nn.Module) -> int:
    """Make every 4-bit linear layer of a model a plain one, in place; returns how many there were."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_quantised(module)]
    for name in names:
        _put(model, name, dequantize_linear(model.get_submodule(name)))
    vars(model).pop("is_loaded_in_4bit", None)  # the mark of quantize_loaded
    return len(names)


def nf4_bytes(parameters: int, *, double_quant: bool = True) -> int:
    """Bytes of a matrix of this many numbers in NF4: half a byte each, and a scale per block of 64; the estimate."""
    blocks = -(-parameters // 64)
    scales = blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks
    return -(-parameters // 2) + scales


def packed_bytes(layer: nn.Linear) -> int:
    """Bytes that a 4-bit layer's weight really takes, its scales and code tables included."""
    weight: Any = layer.weight
    state = weight.quant_state
    tensors = [weight, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pairs_to_quantise(model: nn.Module) -> dict[str, FactoredLinear]:
    """The factored layers by name, checked before anything is computed."""
    pairs, factors = find_pairs(model)
    found: dict[str, FactoredLinear] = {}
    for name, pair in pairs.items():
        if isinstance(pair, PivotLinear):
            raise ModelError(
                f"layer '{name}' is in pivot form, whose rows are fixed and cannot be rotated; NF4 needs two factors: "
                "set LowRankCompression.storage='factored'"
            )
        found[name] = pair
    for name, factor in factors.items():
        if is_quantised(factor):
            raise ModelError(f"layer '{name}' is quantised already; merge or dequantise it first")
    require_quantum({name: pair.rank for name, pair in found.items()})
    return found


def require_quantum(ranks: Mapping[str, int]) -> None:
    """Refuse ranks that NF4 factors cannot have.

    Args:
        ranks: By the name of the layer.

    Raises:
        LowRankError: If one is no multiple of 64.
    """
    wrong = {name: rank for name, rank in ranks.items() if rank % RANK_QUANTUM}
    if wrong:
        name, rank = next(iter(wrong.items()))
        raise LowRankError(
            f"layer '{name}' has rank {rank}, which is no multiple of {RANK_QUANTUM} ({len(wrong)} of {len(ranks)} "
            f"layers): for NF4 factors set LowRankCompression.quantum={RANK_QUANTUM}"
        )


@torch.no_grad()
def _quantise_pair(
    name: str,
    pair: FactoredLinear,
    which: tuple[str, ...],
    gauge: str,
    seed: int,
    moment: Tensor | None,
    storage: Mapping[str, Any],
) -> _Quantised:
    before = {factor: to_double(getattr(pair, factor).weight) for factor in FACTORS}
    for factor, value in before.items():
        require_finite(value, f"layer '{join(name, factor)}'")
    spread = balance(before["outer"], before["inner"])
    exact = in_gauge(gauge, before, spread, seed)
    fitted = moment is not None and "inner" in which
    metric = None if moment is None else to_double(moment).to(spread[0])
    values, after = dict(exact), dict[str, Tensor]()
    layers: dict[str, nn.Linear] = {}
    for factor in FACTORS:  # inner first: outer may be fitted to what has become of it
        if factor == "outer" and fitted and metric is not None:
            values["outer"] = refit_outer(exact["outer"], exact["inner"], after["inner"], metric)
        current: nn.Linear = getattr(pair, factor)
        if factor in which:
            layers[factor] = _from_weight(join(name, factor), current, values[factor], storage)
            after[factor] = to_double(dequantize_linear(layers[factor], torch.float32).weight)
        else:
            after[factor] = to_double(values[factor].to(current.weight.dtype))
        require_finite(after[factor], f"layer '{join(name, factor)}' in {current.weight.dtype}")
    figures = {
        "rank": pair.rank,
        "product_error": product_error(exact, after),
        "error_law": error_law(spread[0].square().sum(dim=0), quantised=len(which)),
    }
    if metric is not None:
        figures["output_error"] = product_error(exact, after, metric)
    changed = {"inner": gauge != "none", "outer": gauge != "none" or fitted}
    kept = {f: values[f].to(getattr(pair, f).weight.dtype) for f in FACTORS if f not in which and changed[f]}
    return _Quantised(layers, kept, figures)


def _from_weight(name: str, layer: nn.Linear, weight: Tensor, storage: Mapping[str, Any]) -> nn.Linear:
    """The layer in NF4 with other values for its weight."""
    from lowrank_lit.nf4 import NF4Linear

    values = weight.detach().to(torch.float32)
    require_finite(values, f"layer '{name}'")
    new = NF4Linear.from_weight(values, layer.bias, dtype=layer.weight.dtype, **storage)
    new.train(layer.training)
    new.trainable = layer.weight.requires_grad
    return new


def _linear(weight: Tensor, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    layer.bias = bias  # type: ignore[assignment]
    return layer.train(training)


def _plain_linear(model: nn.Module, name: str) -> nn.Linear:
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Linear) or is_quantised(layer) or not layer.weight.is_floating_point():
        what = "is not in the model" if layer is None else f"is a {type(layer).__name__}, no plain linear layer"
        raise ModelError(f"layer '{name}' {what}; only such layers can be quantised")
    if sum(layer.weight is p for module in model.modules() for p in module.parameters(recurse=False)) > 1:
        raise ModelError(f"layer '{name}' shares its weight with another, which cannot be quantised; leave it out")
    return layer


def _bits_per_weight(pairs: Mapping[str, FactoredLinear]) -> float:
    """Bits of the factors by the numbers of the matrices that they stand for."""
    factors: list[Any] = [getattr(pair, factor) for pair in pairs.values() for factor in FACTORS]
    stored = sum(packed_bytes(f) if is_quantised(f) else f.weight.numel() * f.weight.element_size() for f in factors)
    return 8 * stored / sum(pair.in_features * pair.out_features for pair in pairs.values())


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and not is_quantised(layer)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
