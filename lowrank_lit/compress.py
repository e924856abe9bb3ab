"""From a dense model to a factored one: calibrate, take spectra, allocate ranks, learn from the compressed model,
factor."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit._version import __version__
from lowrank_lit.allocation import (
    MatrixProfile,
    MatrixSpec,
    allocate,
    budget_of,
    component_order,
    predicted_loss,
    ranks_for_budget,
)
from lowrank_lit.allocation.unirank import unirank_scores
from lowrank_lit.calibration import Calibration, as_batches, calibrate, count_tokens, warn_if_short
from lowrank_lit.errors import DataError, GradientError, LowRankError
from lowrank_lit.evidence import (
    block_importance,
    component_changes,
    places_of,
    predicts_nats,
    profiles_of,
    specs_of,
)
from lowrank_lit.gradients import Loss, SampledTokenLoss, next_token_loss
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.linalg import require_finite
from lowrank_lit.metrics import moments_of
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.probes import divergences, loss_tables
from lowrank_lit.refit import anchored_refit, substituted
from lowrank_lit.selection import Judge
from lowrank_lit.settings import Settings
from lowrank_lit.spectrum import Spectrum, compute_spectrum
from lowrank_lit.statistics import BACKWARD_MOMENTS, LayerStatistics
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

PATHS = (2 / 3, 1.0)
"""Where on the straight line from the dense to the compressed weights later rounds take their statistics, in turn.

The divergence is the integral of its slope along the line. With curvature ``F(t)`` the slope is about ``t F(t)``, so
that the curvature counts with weight ``2 t``, whose one-point Gauss rule is ``t = 2/3``. The end, ``t = 1``, is where
the next plan will be, and better where the compression is mild."""

POWERS = (0.0, 0.5, 1.0)
"""Exponents of the modules' importance that ``select`` measures."""


@dataclass(frozen=True)
class CompressionResult:
    """What a compression did.

    Attributes:
        plan: Rank and form of every target matrix.
        record: Figures, ready for JSON: ``keep_ratio`` {requested, achieved, whole_model}, ``parameters``
            {targets_dense, targets, model_dense, model}, ``bytes`` {dense, compressed} of the whole model in memory,
            ``seconds`` {calibrate, decompose, allocate, feedback, factor}, ``passes`` {forward, backward} over the
            calibration text, ``calibration`` {tokens, blocks, hash, mode}, ``predicted`` {nats, perplexity_ratio},
            ``settings``, ``notes``.
    """

    plan: RankPlan
    record: dict[str, Any]


@dataclass
class Draft:
    """Everything up to the plan, and what it cost.

    Attributes:
        plan: The ranks.
        spectra: By layer name, in the metric of the plan; after an anchored refit its factors, with the singular values
            of the statistics before it.
        settings: As used, after fallbacks.
        seconds: By stage.
        passes: Forward and backward passes over the calibration text, of which probes may use a part only.
    """

    plan: RankPlan
    spectra: dict[str, Spectrum]
    settings: Settings
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Evidence:
    """One round: statistics of a model, spectra of the dense weights in them, and the components' first-order
    changes."""

    calibration: Calibration
    spectra: dict[str, Spectrum]
    first_order: dict[str, Tensor] | None
    curve_spectra: dict[str, Spectrum] | None = None  # where the ranks are taken from other curves than the factors


@dataclass(frozen=True)
class _Candidate:
    """Ranks, where they come from, and the measured divergence from the dense model where candidates are measured."""

    evidence: _Evidence
    profiles: list[MatrixProfile]
    ranks: list[int]
    divergence: float


class Study:
    """Statistics of one model on one calibration text, from which any number of plans are made.

    Statistics, spectra and measured tables are kept, so that plans that share them cost no second pass. The model is
    left as it is by everything but :meth:`apply`.

    Args:
        model: Any module made of ``nn.Linear`` (or transformers' ``Conv1D``) layers.
        batches: Calibration batches, see :func:`compress`.
        targets: Shell patterns of layer names, or ``None``.
        device: Where to compute; ``None`` is where the model is.

    Raises:
        ModelError: If a pattern matches nothing, or nothing can be factored.
        DataError: If the batches are malformed.
        NonFiniteError: If a weight is NaN or infinite; names the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        *,
        targets: Sequence[str] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.model = model
        self.batches = as_batches(batches)
        self.targets: dict[str, Target] = find_targets(model, targets)
        self.device = device
        self.layers = {name: target.module for name, target in self.targets.items()}
        self.places = places_of(model, list(self.targets))
        require_finite_weights(model)
        self._calibrations: list[tuple[frozenset[str], bool, str, Calibration]] = []
        self._evidence: dict[tuple[Any, ...], _Evidence] = {}
        self._kept_judge: Judge | None = None
        self.mode = "none"
        self._measured: dict[tuple[Any, ...], Any] = {}
        self._seconds: dict[str, float] = {}
        self._passes: dict[str, float] = {}

    @torch.inference_mode(False)  # what comes out is trained, and statistics need gradients
    @torch.no_grad()
    def draft(self, settings: Settings) -> Draft:
        """Plan and spectra by ``settings``, ready to be applied.

        Raises:
            BudgetError: If the budget cannot be met.
            GradientError: If ``zero_sum`` or ``sensitivity`` is asked for, and there is no next-token loss.
            NonFiniteError: If activations are NaN or infinite; names the layer.
        """
        self._seconds, self._passes = {}, {"forward": 0.0, "backward": 0.0}
        specs = specs_of(self.targets, settings)
        budget_of(specs, settings.keep_ratio)  # before the hours of calibration, not after them
        settings, evidence, notes = self._first(settings)
        first = evidence
        judge, more = self._judge(settings)
        notes += more
        choices = [(evidence, power) for power in _powers(judge, 1)]
        best = self._best(settings, specs, choices, judge, None)
        for number in range(2, int(settings.rounds or 1) + 1):
            compressed = self._weights(specs, best.evidence.spectra, best.ranks)
            evidence = self._recollected(settings, compressed, PATHS[number % len(PATHS)])
            if not evidence.calibration.importance:  # not measured again where it only weights the curves
                known = replace(evidence.calibration, importance=first.calibration.importance)
                evidence = replace(evidence, calibration=known)
            choices = [(evidence, power) for power in _powers(judge, number)]
            if judge is not None:  # two noisy estimates of the same curves have less noise together
                choices.append((_averaged(evidence, first), 0.5))
            best = self._best(settings, specs, choices, judge, best)
        evidence, ranks = best.evidence, best.ranks
        spectra: dict[str, Spectrum] = evidence.spectra
        if settings.feedback == "anchored":
            spectra, more = self._anchored(settings, specs, best, judge)
            notes += more
        used = "importance" in settings.needs
        plan = RankPlan(
            tuple(
                _entry(profile.spec, rank, evidence.spectra[profile.spec.name], profile.importance if used else None)
                for profile, rank in zip(best.profiles, ranks, strict=True)
            ),
            settings.keep_ratio,
            str(settings.metric),
            str(settings.allocator),
            notes=notes,
            preset=settings.preset,
            feedback=str(settings.feedback),
            storage=settings.storage,
            predicted_nats=self._predicted(settings, specs, evidence, ranks),
            nested=settings.nested,
            order=self._order(settings, best.profiles, ranks) if settings.nested else (),
        )
        return Draft(plan, spectra, settings, dict(self._seconds), dict(self._passes))

    @torch.inference_mode(False)
    @torch.no_grad()
    def curve(self, settings: Settings, keep_ratios: Sequence[float]) -> list[tuple[float, float]]:
        """Predicted rise of the loss at several budgets from one round of statistics: ``(keep_ratio, nats)``.

        Budgets below the rank floor are left out.

        Raises:
            LowRankError: If the metric predicts no loss in nats per token (``two_sided`` and ``input`` do).
        """
        settings, evidence, _ = self._first(replace(settings, allocator="knapsack"))
        if not predicts_nats(str(settings.metric), evidence.calibration.statistics):
            raise LowRankError(
                f"metric='{settings.metric}' predicts no loss in nats; choose two_sided, or a model with a next-token "
                "loss"
            )
        specs = specs_of(self.targets, settings)
        least = sum(spec.cost(int(spec.levels()[0])) for spec in specs) / sum(spec.dense_cost for spec in specs)
        weighted = self.profiles(settings, specs, evidence, 1.0)
        points = []
        for ratio in keep_ratios:
            if ratio >= least:
                ranks = self._ranks(replace(settings, keep_ratio=ratio), weighted)
                points.append((ratio, self._predicted(settings, specs, evidence, ranks) or 0.0))
        return points

    def weights(self, draft: Draft) -> dict[str, Tensor]:
        """The compressed weight ``(rows, columns)`` of every layer that the draft factors, in the layer's dtype."""
        specs = specs_of(self.targets, draft.settings)
        return self._weights(specs, draft.spectra, [entry.rank for entry in draft.plan.matrices])

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, draft: Draft) -> None:
        """Put the draft's layers into the model. Nothing is replaced before everything has been computed."""
        started = time.perf_counter()
        layers = {
            entry.name: self._layer(entry, draft)
            for entry in tqdm(draft.plan.matrices, desc="factoring", unit="matrix", disable=None, leave=False)
            if entry.form != "dense"
        }
        for name, layer in layers.items():
            replace_module(self.model, self.targets[name], layer)
        draft.seconds["factor"] = time.perf_counter() - started

    def profiles(
        self, settings: Settings, specs: Sequence[MatrixSpec], evidence: _Evidence, power: float
    ) -> list[MatrixProfile]:
        """What the allocator of ``settings`` may know of every matrix; measures what has to be measured."""
        calibration = evidence.calibration
        if settings.importance_of == "block" and calibration.importance:
            calibration = replace(calibration, importance=block_importance(calibration.importance, self.places))
        tables = probes = None
        if "table" in settings.needs:
            tables = self._measure(settings, "table", specs, evidence)
        if "probe" in settings.needs:
            probes = self._measure(settings, "probe", specs, evidence)
        return profiles_of(
            specs,
            evidence.curve_spectra or evidence.spectra,
            calibration,
            self.places,
            metric=str(settings.metric),
            power=power,
            first_order=evidence.first_order,
            tables=tables,
            probes=probes,
        )

    def _first(self, settings: Settings) -> tuple[Settings, _Evidence, tuple[str, ...]]:
        """Statistics of the dense model, or of its activations alone where there are no gradients."""
        try:
            evidence = self._dense_evidence(settings)
        except GradientError as error:
            reason = str(error).rpartition(";")[0]  # without the remedy
            if "first_order" in settings.needs:
                raise GradientError(
                    f"allocator='{settings.allocator}' needs gradients, but {reason}; choose another allocator, such "
                    "as knapsack"
                ) from error
            note = f"no gradients: {reason}; metric='input' is used instead of '{settings.metric}'"
            metric = settings.metric if not _backward(moments_of(str(settings.metric))) else "input"
            if metric == settings.metric:
                note = f"no gradients: {reason}; ranks are shared out by energy x module importance"
            settings = replace(settings, metric=metric, labels="none")
            evidence = self._dense_evidence(settings)
            return settings, evidence, (note, *self._notes(evidence))
        return settings, evidence, self._notes(evidence)

    def _notes(self, evidence: _Evidence) -> tuple[str, ...]:
        notes = evidence.calibration.notes
        if evidence.calibration.statistics:
            widest = max(self.targets.values(), key=lambda target: target.columns)
            notes += warn_if_short(evidence.calibration.tokens, widest.columns, widest.name)
        return notes

    def _dense_evidence(self, settings: Settings) -> _Evidence:
        first_order = "first_order" in settings.needs
        key = (*_identity(settings), first_order)
        calibration = self.collect(settings.moments, importance=_wants_importance(settings), labels=settings.labels)
        if key not in self._evidence:
            self._evidence[key] = self._decompose(settings, calibration)
        found = self._evidence[key]
        return replace(found, calibration=calibration)

    def collect(self, moments: frozenset[str], *, importance: bool, labels: str) -> Calibration:
        """Statistics of the dense model; a later plan that needs a part of them takes it from here."""
        for had, watched, drawn, calibration in self._calibrations:
            if moments <= had and (watched or not importance) and (drawn == labels or not _backward(moments)):
                return calibration
        found = self._calibrate(moments, importance, labels, self.layers, None)
        self._calibrations.append((moments, importance, labels, found))
        return found

    def _calibrate(
        self,
        moments: frozenset[str],
        importance: bool,
        labels: str,
        layers: Mapping[str, nn.Module],
        originals: Mapping[int, Tensor] | None,
    ) -> Calibration:
        started = time.perf_counter()
        loss: Loss = SampledTokenLoss() if labels == "model" else next_token_loss
        found = calibrate(
            self.model,
            self.batches,
            layers,
            weight_of=dense_weight if originals is None else lambda layer: originals[id(layer)].to(_place(layer)),
            moments=moments,
            importance=importance,
            device=self.device,
            loss=loss,
        )
        if originals is None:
            self.mode = found.mode
        self._count("forward", 1 if moments or importance else 0)
        self._count("backward", 1 if _backward(moments) else 0)
        self._spend("calibrate" if originals is None else "feedback", started)
        return found

    def _recollected(self, settings: Settings, weights: Mapping[str, Tensor], path: float) -> _Evidence:
        """Statistics on the way to the compressed model, for spectra of the dense weights."""
        originals = {id(layer): dense_weight(layer).detach() for layer in self.layers.values()}
        between = {
            name: torch.lerp(originals[id(self.layers[name])].to(weight), weight, path)
            for name, weight in weights.items()
        }
        with substituted(self.layers, between):
            calibration = self._calibrate(
                settings.moments, "importance" in settings.needs, settings.labels, self.layers, originals
            )
        found = self._decompose(settings, calibration)
        # A refit replaces the inputs' moments, and nothing else needs them any more.
        lean = {
            name: replace(entry, input_moment=None, output_moment=None)
            for name, entry in calibration.statistics.items()
        }
        return replace(found, calibration=replace(calibration, statistics=lean))

    def _decompose(self, settings: Settings, calibration: Calibration) -> _Evidence:
        started = time.perf_counter()
        spectra: dict[str, Spectrum] = {}
        changes: dict[str, Tensor] = {}
        kept = {spec.name: spec.break_even for spec in specs_of(self.targets, settings)}
        for name, target in tqdm(self.targets.items(), desc="decomposing", unit="matrix", disable=None, leave=False):
            with moved(target.module, self.device), torch.no_grad():
                weight = dense_weight(target.module)
                statistics = calibration.statistics.get(name)
                spectrum = self._spectrum(settings, name, weight, statistics)
                gradient = None if statistics is None else statistics.weight_gradient
                if "first_order" in settings.needs and gradient is not None:
                    changes[name] = component_changes(spectrum, weight, gradient).cpu()
            spectra[name] = _waiting(spectrum, weight, kept[name])
        self._spend("decompose", started)
        return _Evidence(calibration, spectra, changes or None)

    def _spectrum(self, settings: Settings, name: str, weight: Tensor, statistics: LayerStatistics | None) -> Spectrum:
        return compute_spectrum(
            weight,
            statistics,
            metric=str(settings.metric),
            name=name,
            damping=settings.damping,
            shrinkage=settings.shrinkage,
            alpha=settings.alpha,
        )

    def _ranks(self, settings: Settings, profiles: Sequence[MatrixProfile]) -> list[int]:
        started = time.perf_counter()
        if settings.nested:
            order = _full_order(settings, profiles)
            ranks = ranks_for_budget(order, [profile.spec for profile in profiles], settings.keep_ratio)
        else:
            ranks = allocate(
                profiles,
                allocator=str(settings.allocator),
                keep_ratio=settings.keep_ratio,
                cost_aware=settings.cost_aware,
            )
        self._spend("allocate", started)
        return ranks

    def _judge(self, settings: Settings) -> tuple[Judge | None, tuple[str, ...]]:
        if not settings.select:
            return None, ()
        started = time.perf_counter()
        if self._kept_judge is None:
            try:
                self._kept_judge = Judge(self.model, self.batches, self.layers, self.device)
            except DataError as error:
                return None, (f"no candidates were measured: {str(error).rpartition(';')[0]}",)
            self._count("forward", self._kept_judge.passes)
        self._spend("select", started)
        return self._kept_judge, ()

    def _best(
        self,
        settings: Settings,
        specs: Sequence[MatrixSpec],
        choices: Sequence[tuple[_Evidence, float]],
        judge: Judge | None,
        before: _Candidate | None,
    ) -> _Candidate:
        """The candidate of least measured divergence; without a judge the first choice."""
        best = before if judge is not None else None
        seen = [] if best is None else [(id(best.evidence.spectra), best.ranks)]
        for evidence, power in choices:
            profiles = self.profiles(settings, specs, evidence, power)
            ranks = self._ranks(settings, profiles)
            if judge is None:
                return _Candidate(evidence, profiles, ranks, 0.0)
            if (id(evidence.spectra), ranks) in seen:
                continue
            seen.append((id(evidence.spectra), ranks))
            value = self._judged(judge, specs, evidence.spectra, ranks)
            if best is None or value < best.divergence:
                best = _Candidate(evidence, profiles, ranks, value)
        assert best is not None
        return best

    def _judged(
        self, judge: Judge, specs: Sequence[MatrixSpec], spectra: Mapping[str, Spectrum], ranks: Sequence[int]
    ) -> float:
        started, before = time.perf_counter(), judge.passes
        value = judge.divergence(self._weights(specs, spectra, ranks))
        self._count("forward", judge.passes - before)
        self._spend("select", started)
        return value

    def _order(self, settings: Settings, profiles: Sequence[MatrixProfile], ranks: Sequence[int]) -> tuple[int, ...]:
        order = _full_order(settings, profiles)
        floors = [int(profile.spec.levels()[0]) for profile in profiles]
        length = sum(rank - floor for rank, floor in zip(ranks, floors, strict=True))
        return tuple(matrix for matrix, _ in order[:length])

    def _predicted(
        self, settings: Settings, specs: Sequence[MatrixSpec], evidence: _Evidence, ranks: Sequence[int]
    ) -> float | None:
        if not predicts_nats(str(settings.metric), evidence.calibration.statistics):
            return None
        plain = profiles_of(
            specs, evidence.spectra, evidence.calibration, self.places, metric=str(settings.metric), power=0.0
        )
        return predicted_loss(plain, ranks)

    @torch.no_grad()
    def _weights(
        self, specs: Sequence[MatrixSpec], spectra: Mapping[str, Spectrum], ranks: Sequence[int]
    ) -> dict[str, Tensor]:
        found = {}
        for spec, rank in zip(specs, ranks, strict=True):
            if rank < spec.break_even:
                own = dense_weight(self.layers[spec.name])
                # All matrices at once, as many bytes as the model has: computed in float64, kept in its dtype.
                found[spec.name] = _truncated(spectra[spec.name], self._near(own), rank).to(own)
        return found

    def _near(self, weight: Tensor) -> Tensor:
        return weight if self.device is None else weight.to(self.device)

    def _anchored(
        self, settings: Settings, specs: Sequence[MatrixSpec], best: _Candidate, judge: Judge | None
    ) -> tuple[dict[str, Spectrum], tuple[str, ...]]:
        started = time.perf_counter()
        evidence, ranks = best.evidence, best.ranks
        rank_of = {spec.name: rank for spec, rank in zip(specs, ranks, strict=True)}
        statistics = evidence.calibration.statistics
        if not statistics:  # a metric without moments: the refit brings the inputs' own
            statistics = {name: LayerStatistics(tokens=0) for name in self.layers}

        def fit(name: str, target: Tensor, own: LayerStatistics) -> tuple[Tensor, Tensor]:
            return self._spectrum(settings, name, target, own).factors(target, rank_of[name], nested=True)

        found = anchored_refit(
            self.model,
            self.batches,
            self.layers,
            self._weights(specs, evidence.spectra, ranks),
            statistics,
            fit,
            device=self.device,
        )
        if found is None:
            note = "feedback='anchored' was left out: the blocks are no chain, or there are fewer than two batches"
            return evidence.spectra, (note,)
        spectra = dict(evidence.spectra)
        for name, (outer, inner) in found.factors.items():
            spectra[name] = Spectrum(spectra[name].singular_values, outer, inner)
        kept = sum(beta is None for beta in found.betas.values())
        chosen = [beta for beta in found.betas.values() if beta is not None]
        note = (
            f"anchored refit: {len(chosen)} of {len(found.betas)} blocks fitted, mean beta "
            f"{sum(chosen) / len(chosen):.2f}"
            if chosen
            else f"anchored refit: no block of {kept} gained by it"
        )
        self._count("forward", found.passes)
        self._spend("feedback", started)
        if judge is not None and chosen and self._judged(judge, specs, spectra, ranks) > best.divergence:
            return evidence.spectra, ("anchored refit: left out, the model is better without it",)
        return spectra, (note,)

    def _measure(self, settings: Settings, kind: str, specs: Sequence[MatrixSpec], evidence: _Evidence) -> Any:
        key = (kind, *_identity(settings))
        if key not in self._measured:
            started = time.perf_counter()

            def cut(name: str, rank: int) -> Tensor:
                return _truncated(evidence.spectra[name], dense_weight(self.layers[name]), rank)

            measure = loss_tables if kind == "table" else divergences
            values, passes = measure(self.model, self.batches, self.layers, specs, cut, device=self.device)
            self._measured[key] = values
            self._count("forward", passes)
            self._spend("measure", started)
        return self._measured[key]

    def _layer(self, entry: MatrixPlan, draft: Draft) -> nn.Module:
        """The layer that takes the target's place: same device, dtype and bias."""
        module = self.targets[entry.name].module
        weight = dense_weight(module).detach()
        outer, inner = draft.spectra[entry.name].factors(self._near(weight), entry.rank, nested=draft.plan.nested)
        bias = bias_of(module)
        kind = PivotLinear if entry.form == "pivot" else FactoredLinear
        layer = kind.from_factors(
            outer, inner, None if bias is None else bias.detach(), dtype=weight.dtype, device=weight.device
        )
        return layer.requires_grad_(next(module.parameters()).requires_grad)

    def _spend(self, stage: str, started: float) -> None:
        self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - started

    def _count(self, kind: str, passes: float) -> None:
        self._passes[kind] = self._passes.get(kind, 0.0) + passes


def compress(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    keep_ratio: float,
    device: torch.device | str | None = None,
    **settings: Any,
) -> CompressionResult:
    """Factor the linear layers of ``model`` in place, within a budget of parameters.

    Each target weight ``W`` becomes two factors (or pivot rows and coefficients) of the rank that the allocator gave
    it, the best approximation of that rank in the metric; a matrix whose factors would store no less than the matrix
    itself stays dense. Nothing is replaced before everything has been computed, so an error leaves the model as it was.

    Args:
        model: Any module made of ``nn.Linear`` (or transformers' ``Conv1D``) layers.
        batches: Calibration batches: dictionaries of keyword arguments (``input_ids``, ``attention_mask``), or tensors
            for the first positional argument: token ids ``(batch, length)`` or features ``(batch, ..., columns)``.
        keep_ratio: Share of the target matrices' parameters to keep, in (0, 1].
        device: Where to calibrate and factor; ``None`` is where the model is. Statistics of activations alone take one
            block at a time there, those of gradients the whole model.
        settings: Further fields of :class:`lowrank_lit.settings.Settings`: ``preset`` (``best``, ``fast``,
            ``unirank``), or ``metric``, ``allocator``, ``feedback``, ``rounds``, ``select``, ``storage``, ``targets``,
            ``min_rank``, ``quantum``, ``damping``, ``shrinkage``, ``alpha``, ``labels``, ``importance_of``,
            ``cost_aware``, ``nested``.

    Returns:
        The plan and the record.

    Raises:
        BudgetError: If the budget is outside (0, 1] or below the rank floor.
        LowRankError: If a setting is unknown or out of range.
        ModelError: If a pattern matches nothing, or nothing can be factored.
        DataError: If the batches are malformed.
        NonFiniteError: If weights or activations are NaN or infinite; names the layer.
    """
    chosen = settings_of(keep_ratio, settings)
    study = Study(model, batches, targets=chosen.targets, device=device)
    identity = fingerprint(model, study.batches, chosen)
    before = (count_parameters(model), stored_bytes(model))
    draft = study.draft(chosen)
    draft.plan = replace(draft.plan, fingerprint=identity)
    study.apply(draft)
    if hasattr(model, "save_pretrained") and any(entry.form != "dense" for entry in draft.plan.matrices):
        from lowrank_lit.hub import attach  # transformers is there, for the model is one of its own

        attach(model, draft.plan)  # the model's own save_pretrained then writes the plan
    return CompressionResult(draft.plan, _record(study, draft, before))


def settings_of(keep_ratio: float, settings: Mapping[str, Any]) -> Settings:
    """Settings from keyword arguments, with an unknown name refused by what was probably meant.

    Raises:
        LowRankError: If a name or value is no setting.
    """
    known = Settings.__dataclass_fields__
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"
            raise LowRankError(f"'{name}' is no setting of a compression{meant}")
    return Settings(keep_ratio, **settings)


def plan_ranks(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    keep_ratio: float,
    device: torch.device | str | None = None,
    **settings: Any,
) -> RankPlan:
    """The plan that :func:`compress` would follow, with the model left as it is; arguments and errors as there."""
    chosen = settings_of(keep_ratio, settings)
    study = Study(model, batches, targets=chosen.targets, device=device)
    return replace(study.draft(chosen).plan, fingerprint=fingerprint(model, study.batches, chosen))


def require_finite_weights(model: nn.Module) -> None:
    """Check every parameter of a model before anything is computed from them.

    Raises:
        NonFiniteError: Naming the first layer with a NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            require_finite(parameter.detach(), f"the weight of layer '{name.removesuffix('.weight')}'")


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


def _wants_importance(settings: Settings) -> bool:
    """Whether the allocator uses it: by itself, or to weight curves."""
    return bool(settings.needs & {"importance", "nats"})


def _identity(settings: Settings) -> tuple[Any, ...]:
    """Settings that spectra depend on, and how much of them is kept."""
    return (
        settings.metric,
        settings.damping,
        settings.shrinkage,
        settings.alpha,
        settings.labels,
        settings.storage,
    )


def _backward(moments: frozenset[str]) -> frozenset[str]:
    return moments & BACKWARD_MOMENTS


def _place(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _waiting(spectrum: Spectrum, weight: Tensor, components: int) -> Spectrum:
    """The vectors of all matrices wait for the allocation together: in the weight's precision, float32 at least, and
    those that a rank below the break-even may keep."""
    return spectrum.to("cpu", torch.promote_types(weight.dtype, torch.float32), components=components)


def _truncated(spectrum: Spectrum, weight: Tensor, rank: int) -> Tensor:
    """``W_k``, on the weight's device, float64."""
    outer, inner = spectrum.factors(weight, rank, nested=True)  # the cheap gauge: the product is the same
    return outer @ inner


def _powers(judge: Judge | None, number: int) -> tuple[float, ...]:
    """Exponents of the importance to try in a round; statistics of a compressed model need less of it."""
    if judge is not None:
        return POWERS
    return (1.0,) if number == 1 else (0.5,)


def _averaged(evidence: _Evidence, first: _Evidence) -> _Evidence:
    """``evidence`` with curves that are the geometric mean of its own and the first round's."""
    curves = {
        name: replace(spectrum, singular_values=(spectrum.singular_values * first.spectra[name].singular_values).sqrt())
        for name, spectrum in evidence.spectra.items()
    }
    return replace(evidence, curve_spectra=curves)


def _full_order(settings: Settings, profiles: Sequence[MatrixProfile]) -> list[tuple[int, int]]:
    specs = [profile.spec for profile in profiles]
    if settings.allocator == "unirank":
        scores = [unirank_scores(profile.energy, profile.importance) for profile in profiles]
        return component_order(specs, scores, per_parameter=settings.cost_aware)
    return component_order(specs, [-np.diff(_curve_of(profile)) for profile in profiles], per_parameter=True)


def _curve_of(profile: MatrixProfile) -> Any:
    assert profile.nats is not None
    return profile.nats


def _entry(spec: MatrixSpec, rank: int, spectrum: Spectrum, importance: float | None) -> MatrixPlan:
    dense = rank >= spec.break_even
    kept = spec.full_rank if dense else rank
    form = "dense" if dense else spec.storage
    return MatrixPlan(spec.name, spec.rows, spec.columns, form, kept, importance, spectrum.kept_energy(kept))


def _record(study: Study, draft: Draft, before: tuple[int, int]) -> dict[str, Any]:
    plan, model = draft.plan, study.model
    stored = target_parameters(model, plan)
    if stored != plan.parameters:
        raise AssertionError(f"the model stores {stored} target parameters, the plan says {plan.parameters}")
    parameters = count_parameters(model)
    nats = plan.predicted_nats
    return {
        "keep_ratio": {
            "requested": plan.requested_keep_ratio,
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
        "passes": draft.passes,
        "calibration": {
            "tokens": sum(count_tokens(batch) for batch in study.batches),
            "blocks": sum(len(next(iter(batch.values()))) for batch in study.batches),
            "hash": batches_hash(study.batches),
            "mode": study.mode,
        },
        "predicted": None if nats is None else {"nats": nats, "perplexity_ratio": math.exp(min(nats, 700.0))},
        "settings": draft.settings.resolved(),
        "notes": list(plan.notes),
    }
