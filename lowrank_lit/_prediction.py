"""The plan of a recipe, and what is predicted for other keep ratios, from the same statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank_lit._tables import table
from lowrank_lit.allocation import budget_of
from lowrank_lit.compress import fingerprint, working_in
from lowrank_lit.errors import GradientError
from lowrank_lit.evidence import specs_of
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.plan import RankPlan
from lowrank_lit.report import plot_prediction, write_text
from lowrank_lit.settings import Settings
from lowrank_lit.study import Study

RATIOS = tuple(round(0.3 + 0.05 * step, 2) for step in range(14))
"""Keep ratios of the curve, 0.30 to 0.95; the table has every second one."""


@dataclass(frozen=True)
class PredictedPlan:
    """A plan and the curve around it.

    Attributes:
        plan: Of the settings.
        metric: That the curve is of.
        points: ``(keep_ratio, predicted nats per token)``; empty where nothing can be predicted.
        reason: Why not.
        basis: What the plan's own prediction rests on, in words; the curve always rests on the dense model.
    """

    plan: RankPlan
    metric: str
    points: tuple[tuple[float, float], ...] = ()
    reason: str = ""
    basis: str = "statistics of the dense model"


def predicted_plan(
    model: nn.Module,
    batches: Sequence[Any],
    settings: Settings,
    *,
    device: torch.device | str | None = None,
    workspace: str | Path | None = None,
) -> PredictedPlan:
    """Plan and curve from one calibration pass; the model is left as it is.

    Raises:
        LowRankError: As :func:`lowrank_lit.plan_ranks`.
    """
    with working_in(workspace, model) as space, ExpertsApart(model) as apart:
        study = Study(model, batches, targets=settings.targets, device=device, workspace=space)
        return _predicted(study, settings, apart)


def _predicted(study: Study, settings: Settings, apart: ExpertsApart) -> PredictedPlan:
    reason = _no_prediction(settings)
    if not reason:
        budget_of(specs_of(study.targets, settings), settings.keep_ratio)  # before the pass, as the draft would
        try:  # everything at once: the curve needs the importance, which the plan's own allocator may not
            study.collection.calibration(settings.moments, importance=True, labels=settings.labels)
        except GradientError as error:
            reason = f"no gradients: {error}"
    plan = study.draft(settings).plan
    with apart.undone():
        plan = replace(plan, fingerprint=fingerprint(study.model, study.batches, settings))
    if reason:
        return PredictedPlan(plan, plan.metric, reason=reason)
    points = study.curve(settings, sorted({*RATIOS, settings.keep_ratio}))
    planned = PredictedPlan(plan, str(settings.metric), tuple(points))
    # A later round looks at a compressed model: another prediction than the curve's, for the same budget.
    return planned if settings.rounds == 1 else replace(planned, basis="statistics of the round that chose it")


def _no_prediction(settings: Settings) -> str:
    if settings.metric == "two_sided" or (settings.metric == "input" and "gradient" in settings.moments):
        return ""
    if settings.metric == "input":
        return (
            f"metric='input' with allocator='{settings.allocator}' collects no gradients, and nothing else has the "
            "unit of the loss; choose allocator=knapsack or metric=two_sided"
        )
    return f"metric='{settings.metric}' has no unit of loss per token; choose metric=two_sided"


def show_prediction(planned: PredictedPlan, folder: Path) -> list[Path]:
    """Print the curve as a table, and write ``prediction.json`` and ``prediction.png``; returns what was written.

    Raises:
        ExportError: If a file cannot be written.
    """
    if planned.reason:
        print(f"No prediction of the loss: {planned.reason}.")
        return []
    own = planned.plan.requested_keep_ratio
    rows = [["keep ratio", "predicted nats", "perplexity x", ""]]
    for ratio, nats in planned.points:
        if ratio == own or ratio in RATIOS[::2] or ratio == RATIOS[-1]:
            mark = "<- the recipe's ratio" if ratio == own else ""
            rows.append([f"{ratio:g}", f"{nats:.4f}", f"{_factor(nats):.4f}", mark])
    print()
    print("Predicted rise of the loss per token (an estimate: statistics of the dense model, knapsack ranks)")
    print(table(rows))
    if planned.plan.predicted_nats is not None:
        nats = planned.plan.predicted_nats
        basis = f"{planned.basis}, {planned.plan.allocator} ranks"
        print(f"Predicted for the plan above ({basis}): {nats:.4f} nats, perplexity x {_factor(nats):.4f}.")
        if not math.isclose(dict(planned.points).get(own, nats), nats, rel_tol=1e-3):
            print(
                "The two figures for the recipe's keep ratio are of different plans: the curve's of knapsack ranks "
                "from the dense model's statistics, the last one of the ranks that are listed."
            )
    content = {
        "kind": "estimate from second moments of the calibration text",
        "metric": planned.metric,
        "allocator": "knapsack",
        "statistics": "statistics of the dense model",
        "points": [_point(ratio, nats) for ratio, nats in planned.points],
        "plan": {
            "keep_ratio": own,
            "nats": planned.plan.predicted_nats,
            "allocator": planned.plan.allocator,
            "statistics": planned.basis,
        },
    }
    written = [folder / "prediction.json", folder / "prediction.png"]
    write_text(written[0], json.dumps(content, indent=2) + "\n")
    plot_prediction(planned.points, written[1], keep_ratio=own, nats=planned.plan.predicted_nats, basis=planned.basis)
    return written


def _point(ratio: float, nats: float) -> dict[str, float]:
    return {"keep_ratio": ratio, "nats": nats, "perplexity_factor": _factor(nats)}


def _factor(nats: float) -> float:
    return math.exp(min(nats, 700.0))
