"""Settings: presets, what overrides them, what is refused, and that each is part of a compression's identity."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lowrank_lit.allocation import ALLOCATORS
from lowrank_lit.compress import fingerprint, settings_of
from lowrank_lit.errors import BudgetError, LowRankError
from lowrank_lit.metrics import METRIC_MOMENTS
from lowrank_lit.settings import DEFAULT_PRESET, PRESETS, Settings
from tests.tiny import batches, tiny_model


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_what_is_open(preset: str) -> None:
    settings = Settings(0.5, preset=preset)
    assert {field: getattr(settings, field) for field in PRESETS[preset]} == PRESETS[preset]


def test_the_default_preset() -> None:
    assert Settings(0.5) == Settings(0.5, preset=DEFAULT_PRESET) == Settings(0.5, preset="best")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "given",
    [
        {"metric": "identity"},
        {"allocator": "uniform"},
        {"allocator": "knapsack", "select": False},
        {"feedback": "anchored", "rounds": 1},
        {"feedback": "recollect", "rounds": 5},
        {"damping": 0.25, "shrinkage": 0.5, "alpha": 1.0, "min_rank": 3, "quantum": 4, "labels": "text"},
    ],
)
def test_what_is_given_wins(preset: str, given: dict[str, Any]) -> None:
    settings = Settings(0.5, preset=preset, **given)
    assert {field: getattr(settings, field) for field in given} == given
    open_fields = PRESETS[preset].keys() - given.keys() - {"rounds", "select"}
    assert all(getattr(settings, field) == PRESETS[preset][field] for field in open_fields)


def test_rounds_follow_the_feedback_where_they_are_open() -> None:
    assert Settings(0.5, feedback="none").rounds == 1
    assert Settings(0.5, feedback="recollect").rounds == PRESETS["best"]["rounds"]
    assert Settings(0.5, preset="fast", feedback="recollect").rounds == 2
    assert Settings(0.5, preset="fast", feedback="anchored").rounds == 1


def test_candidates_are_for_the_knapsack() -> None:
    assert Settings(0.5).select
    assert not Settings(0.5, allocator="uniform").select
    assert not Settings(0.5, nested=True).select
    assert not Settings(0.5, preset="unirank", allocator="knapsack").select
    assert Settings(0.5, preset="unirank", allocator="knapsack", select=True).select


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"keep_ratio": 1.5}, BudgetError, r"keep_ratio=1\.5 is outside \(0, 1\].*such as 0\.6"),
        ({"keep_ratio": float("nan")}, BudgetError, "keep_ratio=nan"),
        ({"preset": "better"}, LowRankError, "preset='better' is unknown; choose one of best, fast, unirank"),
        ({"metric": "plain"}, LowRankError, "metric='plain' is unknown; choose one of identity"),
        ({"allocator": "greedy"}, LowRankError, "allocator='greedy' is unknown; choose one of uniform"),
        ({"feedback": "all"}, LowRankError, "feedback='all' is unknown; choose one of none, recollect, anchored"),
        ({"storage": "dense"}, LowRankError, "storage='dense' is unknown; choose one of factored, pivot"),
        ({"labels": "mine"}, LowRankError, "labels='mine' is unknown; choose one of model, text, none"),
        ({"importance_of": "layer"}, LowRankError, "importance_of='layer' is unknown; choose one of branch, block"),
        ({"min_rank": 0}, BudgetError, "min_rank=0 is no whole number of 1 or more"),
        ({"min_rank": 2.5}, BudgetError, r"min_rank=2\.5 is no whole number of 1 or more"),
        ({"quantum": -1}, BudgetError, "quantum=-1 is no whole number of 1 or more"),
        ({"rounds": 0}, BudgetError, "rounds=0 is no whole number of 1 or more"),
        ({"damping": 2}, LowRankError, r"damping=2 is outside \[0, 1\].*such as 1e-4"),
        ({"shrinkage": -0.1}, LowRankError, r"shrinkage=-0\.1 is outside \[0, 1\]"),
        ({"alpha": -1}, LowRankError, "alpha=-1 is not a number of at least 0"),
        ({"feedback": "none", "rounds": 2}, LowRankError, "rounds=2 needs feedback='recollect' or 'anchored'"),
        ({"feedback": "recollect", "rounds": 1}, LowRankError, "feedback='recollect' needs rounds=2 or more"),
        ({"labels": "none"}, LowRankError, "leaves no gradients for metric='two_sided'; choose metric='input'"),
        ({"select": True, "allocator": "uniform"}, LowRankError, "select=True needs allocator='knapsack'"),
        ({"select": True, "nested": True}, LowRankError, "select=True needs .* not nested; leave it out"),
        ({"nested": True, "storage": "pivot"}, LowRankError, "nested=True needs storage='factored'"),
        ({"nested": True, "allocator": "uniform"}, LowRankError, r"\(unirank, knapsack\), not 'uniform'"),
    ],
)
def test_what_is_refused_names_the_setting_and_the_remedy(
    given: dict[str, Any], error: type[LowRankError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Settings(**{"keep_ratio": 0.5, **given})
    assert "\n" not in str(caught.value)


def test_an_unknown_name_is_refused_by_what_was_meant() -> None:
    with pytest.raises(LowRankError, match="'min_ranks' is no setting of a compression; did you mean 'min_rank'"):
        settings_of(0.5, {"min_ranks": 4})
    with pytest.raises(LowRankError, match="'xyz' is no setting of a compression; known are keep_ratio, preset"):
        settings_of(0.5, {"xyz": 4})
    assert settings_of(0.5, {"preset": "fast"}) == Settings(0.5, preset="fast")


def test_resolved_settings_are_plain() -> None:
    settings = Settings(0.5, targets=("*.mlp.*", "*.self_attn.*"))
    resolved = settings.resolved()
    assert json.loads(json.dumps(resolved)) == resolved
    assert resolved["targets"] == ["*.mlp.*", "*.self_attn.*"]
    assert resolved["metric"] == "two_sided"
    assert Settings(**resolved) == Settings(0.5, targets=["*.mlp.*", "*.self_attn.*"])
    assert Settings(0.5, targets="*.mlp.*").resolved()["targets"] == ["*.mlp.*"]  # one pattern, not its letters


@pytest.mark.parametrize("metric", METRIC_MOMENTS)
@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_moments_are_those_of_the_metric_and_of_the_allocator(metric: str, allocator: str) -> None:
    expected = set(METRIC_MOMENTS[metric])
    if allocator == "zero_sum":
        expected.add("weight_gradient")
    if (metric, allocator) == ("input", "knapsack"):
        expected.add("gradient")  # whose size brings the metric's unit to nats
    assert Settings(0.5, metric=metric, allocator=allocator).moments == expected


def test_without_labels_there_are_moments_of_activations_alone() -> None:
    assert Settings(0.5, metric="input", labels="none").moments == {"input"}


def test_zero_sum_takes_the_labels_of_the_text() -> None:
    """The mean gradient for labels that the model draws itself is zero."""
    assert Settings(0.5, allocator="zero_sum").labels == "text"


def test_every_setting_is_part_of_the_fingerprint() -> None:
    model, data = tiny_model("llama", num_hidden_layers=1), batches(n=1)
    others: list[dict[str, Any]] = [
        {},
        {"keep_ratio": 0.6},
        {"preset": "fast"},
        {"metric": "input"},
        {"allocator": "uniform"},
        {"feedback": "recollect"},
        {"rounds": 2},
        {"select": False},
        {"storage": "pivot"},
        {"targets": ["*.mlp.*"]},
        {"min_rank": 4},
        {"quantum": 4},
        {"damping": 1e-3},
        {"shrinkage": 0.2},
        {"alpha": 0.4},
        {"labels": "text"},
        {"importance_of": "block"},
        {"cost_aware": True},
        {"nested": True},
    ]
    assert {name for other in others for name in other} == Settings.__dataclass_fields__.keys()
    seen = {fingerprint(model, data, Settings(**{"keep_ratio": 0.5, **other})) for other in others}
    assert len(seen) == len(others)
