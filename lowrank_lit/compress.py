"""From a dense model to a factored one: calibrate, take spectra, allocate ranks, factor."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit._version import __version__
from lowrank_lit.allocation import MatrixSpec, allocate, check_keep_ratio, needs_importance
from lowrank_lit.calibration import Calibration, as_batches, calibrate, count_tokens, warn_if_short
from lowrank_lit.errors import BudgetError, LowRankError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.linalg import require_finite
from lowrank_lit.metrics import moments_of
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.spectrum import Spectrum, compute_spectrum
from lowrank_lit.streaming import Batch, moved
from lowrank_lit.surgery import (
    Target,
    bias_of,
    count_parameters,
    dense_weight,
    find_targets,
    replace_module,
    stored_bytes,
    target_parameters,
)

MIN_RANK = 8


@dataclass(frozen=True)
class CompressionResult:
    """What a compression did.

    Attributes:
        plan: Rank and form of every target matrix.
        record: Figures, ready for JSON: ``keep_ratio`` {requested, achieved, whole_model}, ``parameters``
            {targets_dense, targets, model_dense, model}, ``bytes`` {dense, compressed} of the whole model in memory,
            ``seconds`` {calibrate, allocate, factor}, ``calibration`` {tokens, blocks, hash, mode}, ``settings``,
            ``notes``.
    """

    plan: RankPlan
    record: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a compression; checked when made.

    Attributes:
        keep_ratio: Share of the target matrices' parameters to keep, in (0, 1].
        metric: In which norm components are large: ``identity`` or ``input``.
        allocator: How ranks are shared out: ``uniform`` or ``unirank``.
        targets: Shell patterns of layer names; ``None`` is every linear layer but the output embedding and tied ones.
        min_rank: Least rank of a matrix.
        damping: Relative damping of the second moments, in [0, 1].
    """

    keep_ratio: float
    metric: str = "input"
    allocator: str = "unirank"
    targets: Sequence[str] | None = None
    min_rank: int = MIN_RANK
    damping: float = 1e-4

    def __post_init__(self) -> None:
        check_keep_ratio(self.keep_ratio)
        moments_of(self.metric)
        needs_importance(self.allocator)
        if self.min_rank < 1:
            raise BudgetError(f"min_rank={self.min_rank} is below 1; a matrix keeps at least one component")
        if not 0 <= self.damping <= 1:
            raise LowRankError(
                f"damping={self.damping} is outside [0, 1]; it is a share of the mean variance, such as 1e-4"
            )


@dataclass
class _Draft:
    """Everything up to the plan, and the seconds it took."""

    targets: dict[str, Target]
    calibration: Calibration
    spectra: dict[str, Spectrum]
    plan: RankPlan
    seconds: dict[str, float] = field(default_factory=dict)


def compress(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    keep_ratio: float,
    metric: str = "input",
    allocator: str = "unirank",
    targets: Sequence[str] | None = None,
    min_rank: int = MIN_RANK,
    damping: float = 1e-4,
    device: torch.device | str | None = None,
) -> CompressionResult:
    """Factor the linear layers of ``model`` in place, within a budget of parameters.

    Each target weight ``W`` becomes ``outer inner`` of the rank that its allocator gave it, the best approximation of
    that rank in the metric; a matrix whose factors would store no less than the matrix itself stays dense. Nothing is
    replaced before everything has been computed, so an error leaves the model as it was.

    Args:
        model: Any module made of ``nn.Linear`` (or transformers' ``Conv1D``) layers.
        batches: Calibration batches: dictionaries of keyword arguments (``input_ids``, ``attention_mask``), or tensors
            for the first positional argument: token ids ``(batch, length)`` or features ``(batch, ..., columns)``.
        keep_ratio: Share of the target matrices' parameters to keep, in (0, 1].
        metric: In which norm components are large: ``identity`` or ``input`` (SVD-LLM).
        allocator: ``unirank`` (arXiv 2606.21847) or ``uniform``.
        targets: Shell patterns of layer names such as ``*.mlp.*``; ``None`` takes every linear layer but the output
            embedding and those whose weight is tied to another module.
        min_rank: Least rank of a matrix.
        damping: Relative damping of the second moments.
        device: Where to calibrate and factor, one block at a time; ``None`` is where the model is.

    Returns:
        The plan and the record.

    Raises:
        BudgetError: If the budget is outside (0, 1] or below the rank floor.
        ModelError: If a pattern matches nothing, or nothing can be factored.
        DataError: If the batches are malformed.
        NonFiniteError: If weights or activations are NaN or infinite; names the layer.
    """
    settings = Settings(keep_ratio, metric, allocator, targets, min_rank, damping)
    usable = as_batches(batches)
    before = (count_parameters(model), stored_bytes(model))
    draft = _draft(model, usable, settings, device)
    started = time.perf_counter()
    layers = {
        entry.name: _factored(draft.targets[entry.name], draft.spectra[entry.name], entry.rank)
        for entry in tqdm(draft.plan.matrices, desc="factoring", unit="matrix", disable=None, leave=False)
        if entry.form == "factored"
    }
    for name, layer in layers.items():
        replace_module(model, draft.targets[name], layer)
    if layers and hasattr(model, "save_pretrained"):
        from lowrank_lit.hub import attach  # transformers is there, for the model is one of its own

        attach(model, draft.plan)  # the model's own save_pretrained then writes the plan
    draft.seconds["factor"] += time.perf_counter() - started
    return CompressionResult(draft.plan, _record(model, draft, usable, settings, before))


def require_finite_weights(model: nn.Module) -> None:
    """Check every parameter of a model before anything is computed from them.

    Raises:
        NonFiniteError: Naming the first layer with a NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            require_finite(parameter.detach(), f"the weight of layer '{name.removesuffix('.weight')}'")


def plan_ranks(
    model: nn.Module, batches: Sequence[Any], *, device: torch.device | str | None = None, **settings: Any
) -> RankPlan:
    """The plan that :func:`compress` would follow, with the model left as it is; arguments and errors as there."""
    return _draft(model, as_batches(batches), Settings(**settings), device).plan


def fingerprint(model: nn.Module, batches: Sequence[Any], settings: Settings) -> str:
    """Identity of a compression: hash of the model's weights, the calibration tokens, the settings and the version.

    Two compressions with the same fingerprint give the same result.
    """
    digest = hashlib.sha256(f"{__version__} {settings}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_raw(tensor))
    digest.update(batches_hash(as_batches(batches)).encode())
    return digest.hexdigest()[:32]


def batches_hash(batches: Sequence[Batch]) -> str:
    """SHA-256 of the calibration batches, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(json.dumps([key, list(value.shape)]).encode())
            digest.update(_raw(value))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> Any:
    """The bytes of a tensor, without a copy where it lies on the CPU in one piece."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()


def _draft(model: nn.Module, batches: Sequence[Batch], settings: Settings, device: torch.device | str | None) -> _Draft:
    found = find_targets(model, settings.targets)
    specs = [_spec(target, settings.min_rank) for target in found.values()]
    _check_floor(specs, settings.keep_ratio)
    require_finite_weights(model)
    identity = fingerprint(model, batches, settings)
    started = time.perf_counter()
    calibration = calibrate(
        model,
        batches,
        {name: target.module for name, target in found.items()},
        weight_of=dense_weight,
        moments=moments_of(settings.metric),
        importance=needs_importance(settings.allocator),
        device=device,
    )
    notes = calibration.notes
    if calibration.statistics:
        widest = max(specs, key=lambda spec: spec.columns)
        notes += warn_if_short(calibration.tokens, widest.columns, widest.name)
    calibrated = time.perf_counter()
    spectra = _spectra(found, calibration, settings, device)
    decomposed = time.perf_counter()
    energies = [spectra[spec.name].energy().cpu().double().numpy() for spec in specs]
    ranks = allocate(
        specs, energies, allocator=settings.allocator, keep_ratio=settings.keep_ratio, importance=calibration.importance
    )
    entries = tuple(
        _entry(spec, rank, spectra[spec.name], calibration.importance.get(spec.name))
        for spec, rank in zip(specs, ranks, strict=True)
    )
    plan = RankPlan(entries, settings.keep_ratio, settings.metric, settings.allocator, identity, notes)
    seconds = {
        "calibrate": calibrated - started,
        "factor": decomposed - calibrated,
        "allocate": time.perf_counter() - decomposed,
    }
    return _Draft(found, calibration, spectra, plan, seconds)


def _spec(target: Target, min_rank: int) -> MatrixSpec:
    return MatrixSpec(target.name, target.rows, target.columns, min(min_rank, target.rows, target.columns))


def _check_floor(specs: Sequence[MatrixSpec], keep_ratio: float) -> None:
    """Refuse a budget below the rank floor before the hours of calibration, not after them."""
    least = sum(spec.cost(spec.floor) for spec in specs)
    dense = sum(spec.dense_cost for spec in specs)
    if least > keep_ratio * dense:
        raise BudgetError(
            f"keep_ratio={keep_ratio} allows {int(keep_ratio * dense)} parameters, but the rank floor "
            f"(min_rank={specs[0].floor}) alone needs {least}; raise keep_ratio to at least {least / dense:.4f} "
            "or lower min_rank"
        )


def _spectra(
    found: Mapping[str, Target], calibration: Calibration, settings: Settings, device: torch.device | str | None
) -> dict[str, Spectrum]:
    spectra = {}
    for name, target in tqdm(found.items(), desc="decomposing", unit="matrix", disable=None, leave=False):
        with moved(target.module, device), torch.no_grad():
            weight = dense_weight(target.module)
            spectrum = compute_spectrum(
                weight, calibration.statistics.get(name), metric=settings.metric, name=name, damping=settings.damping
            )
        # The vectors of all matrices wait for the allocation together: in the weight's precision, float32 at least.
        wait = torch.float64 if weight.dtype == torch.float64 else torch.float32
        spectra[name] = Spectrum(spectrum.singular_values.cpu(), spectrum.left.to("cpu", wait))
    return spectra


def _entry(spec: MatrixSpec, rank: int, spectrum: Spectrum, importance: float | None) -> MatrixPlan:
    dense = rank >= spec.break_even
    kept = min(spec.rows, spec.columns) if dense else rank
    return MatrixPlan(
        spec.name,
        spec.rows,
        spec.columns,
        "dense" if dense else "factored",
        kept,
        importance,
        spectrum.kept_energy(kept),
    )


def _factored(target: Target, spectrum: Spectrum, rank: int) -> FactoredLinear:
    """The layer that takes the target's place: same device, dtype and bias."""
    weight = dense_weight(target.module).detach()
    outer, inner = spectrum.factors(weight, rank)
    bias = bias_of(target.module)
    layer = FactoredLinear.from_factors(
        outer, inner, None if bias is None else bias.detach(), dtype=weight.dtype, device=weight.device
    )
    return layer.requires_grad_(next(target.module.parameters()).requires_grad)


def _record(
    model: nn.Module, draft: _Draft, batches: Sequence[Batch], settings: Settings, before: tuple[int, int]
) -> dict[str, Any]:
    plan = draft.plan
    stored = target_parameters(model, plan)
    if stored != plan.parameters:
        raise AssertionError(f"the model stores {stored} target parameters, the plan says {plan.parameters}")
    parameters = count_parameters(model)
    return {
        "keep_ratio": {
            "requested": settings.keep_ratio,
            "achieved": plan.keep_ratio,
            "whole_model": parameters / before[0],
        },
        "parameters": {
            "targets_dense": plan.dense_parameters,
            "targets": stored,
            "model_dense": before[0],
            "model": parameters,
        },
        "bytes": {"dense": before[1], "compressed": stored_bytes(model)},
        "seconds": draft.seconds,
        "calibration": {
            "tokens": sum(count_tokens(batch) for batch in batches),
            "blocks": sum(len(next(iter(batch.values()))) for batch in batches),
            "hash": batches_hash(batches),
            "mode": draft.calibration.mode,
        },
        "settings": {
            "metric": settings.metric,
            "allocator": settings.allocator,
            "targets": None if settings.targets is None else list(settings.targets),
            "min_rank": settings.min_rank,
            "damping": settings.damping,
        },
        "notes": list(plan.notes),
    }
