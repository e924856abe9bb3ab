"""Plans for one model from one calibration text: ranks by the allocator, better ones by what the compressed model
shows, and the layers that follow a plan."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit import distributed
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
from lowrank_lit.collection import Collection, Costs, Evidence
from lowrank_lit.errors import DataError, GradientError, LowRankError, NonFiniteError
from lowrank_lit.evidence import block_importance, predicts_nats, profiles_of, specs_of
from lowrank_lit.gradients import Loss
from lowrank_lit.layers import LAYER_OF_FORM
from lowrank_lit.paging import Workspace, release
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.selection import Judge
from lowrank_lit.settings import Settings
from lowrank_lit.spectrum import Spectrum
from lowrank_lit.surgery import bias_of, dense_weight, replace_modules

PATHS = (2 / 3, 1.0)
"""Where on the straight line from the dense to the compressed weights later rounds take their statistics, in turn.

The divergence is the integral of its slope along the line. With curvature ``F(t)`` the slope is about ``t F(t)``, so
that the curvature counts with weight ``2 t``, whose one-point Gauss rule is ``t = 2/3``. The end, ``t = 1``, is where
the next plan will be, and better where the compression is mild."""

POWERS = (0.0, 0.5, 1.0)
"""Exponents of the modules' importance that ``select`` measures."""

GAIN = 0.97
"""Divergence after a refit, relative to the one before it, above which the refit is left out. The refit is fitted to
the sequences that measure it too, so that a gain of some per cent says nothing about others."""


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
class _Candidate:
    """Ranks, where they come from, and the measured divergence from the dense model where candidates are measured."""

    evidence: Evidence
    profiles: list[MatrixProfile]
    ranks: list[int]
    divergence: float


class Study:
    """Statistics of one model on one calibration text, from which any number of plans are made.

    Statistics, spectra and measured tables are kept, so that plans that share them cost no second pass. The model is
    left as it is by everything but :meth:`apply`.

    Args:
        model: Any module made of ``nn.Linear`` (or transformers' ``Conv1D``) layers.
        batches: Calibration batches, see :func:`lowrank_lit.compress`.
        targets: Shell patterns of layer names, or ``None``.
        device: Where to compute; ``None`` is where the model is.
        workspace: Where what waits is kept, factors included; ``None`` is in memory.
        loss: Whose gradients are taken, see :func:`lowrank_lit.compress`; ``None`` is that of next tokens.

    Attributes:
        collection: What is known of the model.

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
        workspace: Workspace | None = None,
        loss: Loss | None = None,
    ) -> None:
        self.collection = Collection(model, batches, targets, device, workspace, loss)
        self.workspace = workspace
        self.model = model
        self.batches = self.collection.batches
        self.targets = self.collection.targets
        self.layers = self.collection.layers
        self.device = device
        self._kept_judge: Judge | None = None

    @torch.inference_mode(False)  # what comes out is trained, and statistics need gradients
    @torch.no_grad()
    def draft(self, settings: Settings) -> Draft:
        """Plan and spectra by ``settings``, ready to be applied.

        Raises:
            BudgetError: If the budget cannot be met.
            GradientError: If ``zero_sum`` or ``sensitivity`` is asked for, and there is no next-token loss.
            NonFiniteError: If activations are NaN or infinite; names the layer.
        """
        costs = self.collection.costs = Costs()
        specs = specs_of(self.targets, settings)
        budget_of(specs, settings.keep_ratio)  # before the hours of calibration, not after them
        if self.workspace is not None:  # the vectors of all components that a plan may keep wait for it together
            self.workspace.require(sum(4 * spec.rows * spec.break_even for spec in specs))
        settings, first, notes = self.collection.first(settings)
        judge, more = self._judge() if settings.select else (None, ())
        notes += more
        choices = [(first, power) for power in (POWERS if judge else (1.0,))]
        best = self._best(settings, specs, choices, judge, None)
        for number in range(2, int(settings.rounds or 1) + 1):
            compressed = self.collection.weights(specs, best.evidence.spectra, best.ranks)
            try:
                evidence = self.collection.recollected(settings, compressed, PATHS[number % len(PATHS)])
            except (GradientError, NonFiniteError) as error:  # of the compressed model: the plan so far is sound
                notes += (f"round {number} was left out: {error}",)
                break
            if not evidence.calibration.importance:  # not measured again where it only weights the curves
                known = replace(evidence.calibration, importance=first.calibration.importance)
                evidence = replace(evidence, calibration=known)
            # Statistics of a compressed model need less of the importance.
            choices = [(evidence, power) for power in (POWERS if judge else (0.5,))]
            if judge is not None:  # two noisy estimates of the same curves have less noise together
                choices.append((_averaged(evidence, first), 0.5))
            best = self._best(settings, specs, choices, judge, best)
        spectra = best.evidence.spectra
        if settings.feedback == "anchored":
            spectra, note = self._anchored(settings, specs, best, judge)
            notes += (note,)
        plan = self._plan(settings, specs, best, notes)
        return Draft(plan, spectra, settings, dict(costs.seconds), dict(costs.passes))

    @torch.inference_mode(False)
    @torch.no_grad()
    def curve(self, settings: Settings, keep_ratios: Sequence[float]) -> list[tuple[float, float]]:
        """Predicted rise of the loss at several budgets from one round of statistics: ``(keep_ratio, nats)``.

        Budgets below the rank floor are left out.

        Raises:
            LowRankError: If the metric predicts no loss in nats per token (``two_sided`` and ``input`` do).
        """
        settings, evidence, _ = self.collection.first(replace(settings, allocator="knapsack"))
        if self.collection.loss is not None:
            raise LowRankError("a loss of your own predicts nothing in nats per token; leave loss out")
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
        return self.collection.weights(specs, draft.spectra, [entry.rank for entry in draft.plan.matrices])

    @torch.inference_mode(False)
    @torch.no_grad()
    def apply(self, draft: Draft) -> None:
        """Put the draft's layers into the model. Nothing is replaced before everything has been computed.

        Processes that cooperate make a share of the layers each, and hand them out: the factors are the same in all."""
        started = time.perf_counter()
        entries = [entry for entry in draft.plan.matrices if entry.form != "dense"]
        makers = distributed.owners([float(entry.rank) ** 2 * (entry.rows + entry.columns) for entry in entries])
        layers: dict[str, nn.Module] = {}
        with distributed.together("factoring"):
            for entry, maker in zip(
                tqdm(entries, desc="factoring", unit="matrix", disable=None, leave=False), makers, strict=True
            ):
                if maker == distributed.rank():
                    layers[entry.name] = self._layer(entry, draft)
        for entry, maker in zip(entries, makers, strict=True):
            made = layers.get(entry.name)
            state = distributed.handed_out("factoring", maker, None if made is None else made.state_dict())
            with distributed.together("factoring"):
                if made is None:
                    layers[entry.name] = self._received(entry, state)
        replace_modules(self.model, [(self.targets[name], layer) for name, layer in layers.items()])
        draft.seconds["factor"] = time.perf_counter() - started

    def profiles(
        self, settings: Settings, specs: Sequence[MatrixSpec], evidence: Evidence, power: float
    ) -> list[MatrixProfile]:
        """What the allocator of ``settings`` may know of every matrix; measures what has to be measured."""
        calibration, places = evidence.calibration, self.collection.places
        if settings.importance_of == "block" and calibration.importance:
            calibration = replace(calibration, importance=block_importance(calibration.importance, places))
        tables = probes = None
        if "table" in settings.needs:
            tables = self.collection.measured(settings, "table", specs, evidence)
        if "probe" in settings.needs:
            probes = self.collection.measured(settings, "probe", specs, evidence)
        return profiles_of(
            specs,
            evidence.curve_spectra or evidence.spectra,
            calibration,
            places,
            metric=str(settings.metric),
            power=power,
            first_order=evidence.first_order,
            tables=tables,
            probes=probes,
        )

    def _plan(
        self, settings: Settings, specs: Sequence[MatrixSpec], best: _Candidate, notes: tuple[str, ...]
    ) -> RankPlan:
        spectra, used = best.evidence.spectra, "importance" in settings.needs
        matrices = tuple(
            _entry(profile.spec, rank, spectra[profile.spec.name], profile.importance if used else None)
            for profile, rank in zip(best.profiles, best.ranks, strict=True)
        )
        order: tuple[int, ...] = ()
        if settings.nested:
            kept = sum(best.ranks) - sum(int(spec.levels()[0]) for spec in specs)  # beyond the floors
            order = tuple(matrix for matrix, _ in _full_order(settings, best.profiles)[:kept])
        return RankPlan(
            matrices,
            settings.keep_ratio,
            str(settings.metric),
            str(settings.allocator),
            notes=notes,
            preset=settings.preset,
            feedback=str(settings.feedback),
            storage=settings.storage,
            predicted_nats=self._predicted(settings, specs, best.evidence, best.ranks),
            nested=settings.nested,
            quantum=settings.quantum,
            order=order,
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
        self.collection.costs.spend("allocate", started)
        return distributed.agreed("the allocation", ranks)

    def _judge(self) -> tuple[Judge | None, tuple[str, ...]]:
        """Who measures candidates, if anyone can, and notes."""
        started, costs = time.perf_counter(), self.collection.costs
        if self._kept_judge is None:
            if reason := self.collection.refused:
                return None, (f"no candidates were measured: the model's forward does not run ({reason})",)
            try:
                self._kept_judge = Judge(self.model, self.batches, self.layers, self.device, self.workspace)
            except DataError as error:
                return None, (f"no candidates were measured: {str(error).rpartition(';')[0]}",)
            costs.passes["forward"] += self._kept_judge.passes
        costs.spend("select", started)
        return self._kept_judge, ()

    def _best(
        self,
        settings: Settings,
        specs: Sequence[MatrixSpec],
        choices: Sequence[tuple[Evidence, float]],
        judge: Judge | None,
        before: _Candidate | None,
    ) -> _Candidate:
        """The candidate of least measured divergence; without a judge the first choice.

        Args:
            settings: Of the plan.
            specs: The matrices.
            choices: Evidence, and the exponent of the modules' importance.
            judge: Who measures.
            before: The best of the rounds before.
        """
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
        value = judge.divergence(self.collection.weights(specs, spectra, ranks))
        self.collection.costs.passes["forward"] += judge.passes - before
        self.collection.costs.spend("select", started)
        return value

    def _anchored(
        self, settings: Settings, specs: Sequence[MatrixSpec], best: _Candidate, judge: Judge | None
    ) -> tuple[dict[str, Spectrum], str]:
        """Spectra after a refit, or as they were where it is no gain, and a note."""
        own = best.evidence.spectra
        try:
            spectra, note = self.collection.refitted(settings, specs, best.evidence, best.ranks)
        except NonFiniteError as error:  # of the compressed model: the plan so far is sound
            return own, f"anchored refit: left out: {error}"
        if spectra is None:
            return own, note
        guard = judge or self._judge()[0]
        if guard is not None:
            before = best.divergence if judge else self._judged(guard, specs, own, best.ranks)
            after = self._judged(guard, specs, spectra, best.ranks)
            if not after <= GAIN * before:
                change = after / before - 1 if before else 0.0
                return own, f"anchored refit: left out, for it changes the measured divergence by {change:+.1%} only"
        return spectra, note

    def _predicted(
        self, settings: Settings, specs: Sequence[MatrixSpec], evidence: Evidence, ranks: Sequence[int]
    ) -> float | None:
        """Rise of the loss in nats per token; ``None`` where the metric predicts none, or the loss, which is the
        caller's, may have any unit."""
        metric, calibration = str(settings.metric), evidence.calibration
        if self.collection.loss is not None or not predicts_nats(metric, calibration.statistics):
            return None
        plain = profiles_of(specs, evidence.spectra, calibration, self.collection.places, metric=metric, power=0.0)
        return predicted_loss(plain, ranks)

    def _received(self, entry: MatrixPlan, state: Mapping[str, Tensor]) -> nn.Module:
        """The layer that another process has made."""
        module = self.layers[entry.name]
        weight, bias = dense_weight(module), bias_of(module) is not None
        layer = LAYER_OF_FORM[entry.form].empty(
            entry.columns, entry.rows, entry.rank, bias=bias, device=weight.device, dtype=weight.dtype
        )
        if self.workspace is not None:
            layer.load_state_dict(self.workspace.keep(state), assign=True)
        else:
            layer.load_state_dict(dict(state))
        return layer.requires_grad_(next(module.parameters()).requires_grad)

    def _layer(self, entry: MatrixPlan, draft: Draft) -> nn.Module:
        """The layer that takes the target's place: same device, dtype and bias."""
        module = self.layers[entry.name]
        weight = dense_weight(module).detach()
        outer, inner = draft.spectra[entry.name].factors(weight.to(self.device), entry.rank, nested=draft.plan.nested)
        bias = bias_of(module)
        layer = LAYER_OF_FORM[entry.form].from_factors(
            outer, inner, None if bias is None else bias.detach(), dtype=weight.dtype, device=weight.device
        )
        if self.workspace is not None:
            kept = self.workspace.keep(layer.state_dict())
            layer.load_state_dict(kept, assign=True)
            release([*kept.values(), *module.parameters(), *draft.spectra[entry.name].tensors().values()])
        return layer.requires_grad_(next(module.parameters()).requires_grad)


def _averaged(evidence: Evidence, first: Evidence) -> Evidence:
    """``evidence`` with curves that are the geometric mean of its own and the first round's."""
    curves = {
        name: replace(spectrum, singular_values=(spectrum.singular_values * first.spectra[name].singular_values).sqrt())
        for name, spectrum in evidence.spectra.items()
    }
    return replace(evidence, curve_spectra=curves)


def _full_order(settings: Settings, profiles: Sequence[MatrixProfile]) -> list[tuple[int, int]]:
    """All components of all matrices in the order in which a nested plan takes them up."""
    specs = [profile.spec for profile in profiles]
    if settings.allocator == "unirank":
        scores = [unirank_scores(profile.energy, profile.importance) for profile in profiles]
        return component_order(specs, scores, per_parameter=settings.cost_aware)
    gains = [-np.diff(profile.nats) for profile in profiles if profile.nats is not None]
    return component_order(specs, gains, per_parameter=True)


def _entry(spec: MatrixSpec, rank: int, spectrum: Spectrum, importance: float | None) -> MatrixPlan:
    dense = rank >= spec.break_even
    kept = spec.full_rank if dense else rank
    form = "dense" if dense else spec.storage
    return MatrixPlan(spec.name, spec.rows, spec.columns, form, kept, importance, spectrum.kept_energy(kept))
