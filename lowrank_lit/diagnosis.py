"""Where a compression of a model loses what it loses, matrix by matrix: spectra, importance, predicted and measured
losses, and what head and tail of the weights compute.

Everything is taken of the dense model, which is left as it is; a plan says only where each matrix is cut. Statistics
are those of the dense model, so that what is predicted of a matrix is of the very cut that is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_lit.collection import Evidence, spectrum_of
from lowrank_lit.compress import settings_of
from lowrank_lit.cuts import Change, LossMeter
from lowrank_lit.errors import DataError, LowRankError
from lowrank_lit.evidence import predicts_nats, profiles_of, specs_of
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.head_tail import HeadTail, PartLoss, part_losses, part_outputs
from lowrank_lit.overview import kinds_of
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.settings import Settings
from lowrank_lit.spectrum import compute_spectrum, effective_rank, rank_for_energy, stable_rank
from lowrank_lit.streaming import POSITIONAL, evaluating, moved
from lowrank_lit.study import Study
from lowrank_lit.surgery import dense_weight

SAME = 1e-4
"""Nats per token by which head and tail together may differ from the dense model."""


@dataclass(frozen=True)
class SpectrumSummary:
    """A spectrum in five numbers, see :mod:`lowrank_lit.spectrum`.

    Attributes:
        effective_rank: exp of the entropy of the shares of the squared singular values.
        stable_rank: Sum of the squared singular values by the largest.
        rank_90: Least rank that keeps 90 % of the squared singular values.
        rank_95: The same of 95 %.
        rank_99: The same of 99 %.
    """

    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_95: int
    rank_99: int


@dataclass(frozen=True)
class MatrixDiagnosis:
    """One target matrix.

    Attributes:
        name: Dotted module name.
        kind: Projection, as :func:`lowrank_lit.overview.kinds_of` names it.
        block: Number of the block, if any.
        rows: Output features.
        columns: Input features.
        form: Of the plan.
        rank: Of the plan; min(rows, columns) where it stays dense.
        cosine: Mean cosine of the residual stream before and after the sub-block that the matrix belongs to; ``None``
            where it is not known. The module's importance is 1 less this.
        plain: Spectrum of the weight.
        metric: The same in the metric.
        kept_energy: Share of the squared singular values, in the metric, that the rank keeps.
        predicted: Rise of the loss that the statistics of the dense model predict for this cut alone, nats per token;
            ``None`` where the metric predicts none.
        measured: Loss with this matrix alone cut to its rank; ``None`` where the plan leaves it dense.
        parts: Outputs of head and tail; ``None`` where it is not split.
    """

    name: str
    kind: str
    block: int | None
    rows: int
    columns: int
    form: str
    rank: int
    cosine: float | None
    plain: SpectrumSummary
    metric: SpectrumSummary
    kept_energy: float
    predicted: float | None
    measured: Change | None
    parts: HeadTail | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        plan: Whose ranks.
        metric: Of the spectra and cuts.
        dense_loss: Of the dense model on the text, nats per token.
        targets: Tokens that losses are means over.
        matrices: In the order of the plan.
        losses: With ``head``, ``tail`` and ``both`` everywhere.
        rank_correlation: Spearman's, of predicted and measured losses over the matrices that are cut; ``None`` where
            there are fewer than three, or nothing is predicted.
        weighted_correlation: The same with predictions multiplied by the importance of the module.
        notes: Remarks for the reader.
    """

    plan: RankPlan
    metric: str
    dense_loss: float
    targets: int
    matrices: tuple[MatrixDiagnosis, ...]
    losses: Mapping[str, PartLoss]
    rank_correlation: float | None
    weighted_correlation: float | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain JSON types, the plan as its keep ratio and name."""
        return {
            "plan": {
                "keep_ratio": self.plan.keep_ratio,
                "requested_keep_ratio": self.plan.requested_keep_ratio,
                "allocator": self.plan.allocator,
                "metric": self.plan.metric,
                "predicted_nats": self.plan.predicted_nats,
            },
            "metric": self.metric,
            "dense_loss": self.dense_loss,
            "targets": self.targets,
            "rank_correlation": self.rank_correlation,
            "weighted_correlation": self.weighted_correlation,
            "losses": {part: dataclasses.asdict(loss) for part, loss in self.losses.items()},
            "matrices": [dataclasses.asdict(matrix) for matrix in self.matrices],
            "notes": list(self.notes),
        }


@torch.no_grad()
def diagnose(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    keep_ratio: float | None = None,
    plan: RankPlan | None = None,
    blocks: Tensor | None = None,
    head: float | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> Diagnosis:
    """Diagnose a compression of a causal language model, which is left as it is.

    Costs one calibration, two decompositions of every matrix, and a pass over ``blocks`` for every matrix that is cut
    and five more; without ``plan`` also what the plan costs. The weights of all heads and tails are in memory together.

    Args:
        model: The dense model.
        batches: Calibration batches, see :func:`lowrank_lit.compress`.
        keep_ratio: Budget of the plan, where none is given.
        plan: Ranks to diagnose; ``None`` makes the plan of ``keep_ratio`` and ``settings``.
        blocks: Token ids ``(n, length)`` that losses and outputs are measured on, as :func:`lowrank_lit.perplexity`
            takes them; ``None`` takes the calibration batches, which must then be of one length and without padding.
        head: Share of the full rank that is the head of every matrix, in (0, 1); ``None`` takes the plan's ranks, and
            splits no matrix that stays dense.
        device: Where to compute; ``None`` is where the model is.
        settings: Further ones of :func:`lowrank_lit.compress`. With a ``plan``, the metric is the plan's.

    Raises:
        LowRankError: If a setting is out of range, there is neither a plan nor a budget, or the text cannot be used.
        PlanError: If the plan does not fit the model.
    """
    chosen = _settings(keep_ratio, plan, settings)
    if head is not None and not 0 < head < 1:
        raise LowRankError(f"head={head:g} is outside (0, 1); it is the share of the full rank that is the head")
    with ExpertsApart(model):
        if plan is not None:
            plan.check(model)
        names = chosen.targets if plan is None else [matrix.name for matrix in plan.matrices]
        study = Study(model, batches, targets=names, device=device)
        own, evidence, notes = study.collection.first(replace(chosen, allocator="knapsack"))
        if plan is None:  # afterwards: it needs a part of these statistics
            plan = study.draft(chosen).plan
            notes = tuple(dict.fromkeys((*notes, *plan.notes)))
        with moved(model, device), evaluating(model):
            return _measured(study, own, evidence, plan, _text(study.batches, blocks), head, notes)


def _measured(
    study: Study,
    settings: Settings,
    evidence: Evidence,
    plan: RankPlan,
    text: Tensor,
    head: float | None,
    notes: tuple[str, ...],
) -> Diagnosis:
    """The figures, of the model where it is to run."""
    ranks = {matrix.name: matrix for matrix in plan.matrices}
    meter = LossMeter(study.model, text)
    found = _matrices(study, settings, evidence, ranks, meter)
    heads, counts = _heads(study, settings, evidence, ranks, head)
    parts = part_outputs(study.model, text, study.layers, heads, counts)
    losses = part_losses(meter, text, study.layers, heads)
    found = [replace(entry, parts=parts.get(entry.name)) for entry in found]
    off = abs(losses["both"].change.rise)
    if off > SAME:
        notes += (f"head and tail together differ from the dense model by {off:.1e} nats per token, by rounding",)
    return Diagnosis(
        plan,
        str(settings.metric),
        meter.dense_loss,
        meter.dense.numel(),
        tuple(found),
        losses,
        correlation_of(found),
        correlation_of(found, weighted=True),
        notes,
    )


def correlation_of(matrices: Sequence[MatrixDiagnosis], *, weighted: bool = False) -> float | None:
    """Rank correlation of predicted and measured rises of the loss, over the matrices that have both; ``None`` with
    fewer than three.

    Args:
        matrices: Of a diagnosis.
        weighted: Multiply predictions by the importance of the module.
    """
    pairs = [
        (entry.predicted * (1 - (entry.cosine or 0.0) if weighted else 1.0), entry.measured.rise)
        for entry in matrices
        if entry.predicted is not None and entry.measured is not None
    ]
    if len(pairs) < 3 or (weighted and any(entry.cosine is None for entry in matrices)):
        return None
    return spearman(*map(list, zip(*pairs, strict=True)))


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation; ties get their mean rank."""

    def ranks(values: Sequence[float]) -> Any:
        array = np.asarray(values)
        return np.array([(np.sum(array < value) + np.sum(array <= value) + 1) / 2 for value in array])

    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def summary_of(energy: Tensor) -> SpectrumSummary:
    """A spectrum in five numbers.

    Args:
        energy: Squared singular values ``(p,)``, largest first.
    """
    kept = [rank_for_energy(energy, share) for share in (0.90, 0.95, 0.99)]
    return SpectrumSummary(effective_rank(energy), stable_rank(energy), *kept)


def _settings(keep_ratio: float | None, plan: RankPlan | None, settings: Mapping[str, Any]) -> Settings:
    if plan is None:
        if keep_ratio is None:
            raise LowRankError("diagnose needs ranks: give keep_ratio, such as 0.6, or a plan")
        return settings_of(keep_ratio, settings)
    own = {**settings, "metric": plan.metric, "storage": plan.storage}
    if "targets" in settings:
        raise LowRankError("targets are those of the plan; leave targets out")
    return settings_of(plan.requested_keep_ratio, own)


def _text(batches: Sequence[Mapping[str, Tensor]], blocks: Tensor | None) -> Tensor:
    if blocks is not None:
        return blocks
    ids = [batch.get("input_ids", batch.get(POSITIONAL, torch.empty(0))) for batch in batches]
    masked = any("attention_mask" in batch and not bool(batch["attention_mask"].all()) for batch in batches)
    if masked or any(entry.ndim != 2 or entry.shape[1] != ids[0].shape[1] for entry in ids):
        raise DataError("calibration batches of several lengths or with padding measure no loss; give blocks")
    return torch.cat(ids)


def _matrices(
    study: Study, settings: Settings, evidence: Evidence, ranks: Mapping[str, MatrixPlan], meter: LossMeter
) -> list[MatrixDiagnosis]:
    metric, calibration = str(settings.metric), evidence.calibration
    specs = {spec.name: spec for spec in specs_of(study.targets, settings)}
    nats: dict[str, Any] = {}
    if predicts_nats(metric, calibration.statistics):
        profiles = profiles_of(
            list(specs.values()), evidence.spectra, calibration, study.collection.places, metric=metric, power=0.0
        )
        nats = {profile.spec.name: profile.nats for profile in profiles}
    kinds, found = kinds_of(ranks), []
    for name, entry in tqdm(ranks.items(), desc="measuring", unit="matrix", disable=None, leave=False):
        spectrum, weight = evidence.spectra[name], dense_weight(study.layers[name])
        cut = None if entry.form == "dense" else _cut(study, settings, evidence, name, entry.rank)
        losses = None if cut is None else meter.with_weights(study.layers, {name: cut})
        importance = calibration.importance.get(name)
        found.append(
            MatrixDiagnosis(
                name,
                *kinds[name],
                entry.rows,
                entry.columns,
                entry.form,
                entry.rank,
                None if importance is None else 1 - importance,
                summary_of(compute_spectrum(weight, None, metric="identity", name=name).energy()),
                summary_of(spectrum.energy()),
                spectrum.kept_energy(entry.rank),
                None if name not in nats else float(nats[name][entry.rank if cut is not None else -1]),
                None if losses is None else meter.change(losses),
            )
        )
    return found


def _cut(study: Study, settings: Settings, evidence: Evidence, name: str, rank: int) -> Tensor:
    """The truncated weight in the layer's dtype; more components than a plan keeps are computed again."""
    weight, spectrum = dense_weight(study.layers[name]), evidence.spectra[name]
    if rank > spectrum.left.shape[1]:
        spectrum = spectrum_of(settings, name, weight, evidence.calibration.statistics.get(name))
    return spectrum.truncated(weight, rank).to(weight)


def _heads(
    study: Study, settings: Settings, evidence: Evidence, ranks: Mapping[str, MatrixPlan], head: float | None
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Weights of the heads, and their components, of the matrices that are split."""
    counts = {
        name: entry.rank if head is None else max(1, int(head * min(entry.rows, entry.columns)))
        for name, entry in ranks.items()
        if (entry.form != "dense" if head is None else min(entry.rows, entry.columns) > 1)
    }
    if not counts:
        raise LowRankError("the plan leaves every matrix dense, so there is nothing to diagnose; lower keep_ratio")
    return {name: _cut(study, settings, evidence, name, count) for name, count in counts.items()}, counts
