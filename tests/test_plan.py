"""The rank plan: counting, validation, JSON, and the comparison with a model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lowrank_lit.errors import ExportError, PlanError
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.plan import FORMAT_VERSION, MatrixPlan, RankPlan
from tests.tiny import tiny_model


@st.composite
def matrix_plans(draw: st.DrawFn, name: str) -> MatrixPlan:
    rows, columns = draw(st.integers(2, 50)), draw(st.integers(1, 50))
    form = draw(st.sampled_from(["factored", "dense", "pivot"]))
    return MatrixPlan(
        name,
        rows,
        columns,
        form,
        draw(st.integers(1, min(rows - (form == "pivot"), columns))),
        draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        draw(st.none() | st.floats(0, 1)),
    )


@st.composite
def plans(draw: st.DrawFn) -> RankPlan:
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True))
    return RankPlan(
        tuple(draw(matrix_plans(name)) for name in names),
        draw(st.floats(0.01, 1.0)),
        "input",
        "unirank",
        draw(st.text("0123456789abcdef", max_size=8)),
        tuple(draw(st.lists(st.text(max_size=9), max_size=2))),
        preset=draw(st.sampled_from(["", "best"])),
        feedback=draw(st.sampled_from(["none", "anchored"])),
        storage=draw(st.sampled_from(["factored", "pivot"])),
        predicted_nats=draw(st.none() | st.floats(0, 9)),
    )


def plan_of(*matrices: MatrixPlan, **changes: Any) -> RankPlan:
    return replace(RankPlan(matrices, 0.5, "input", "uniform"), **changes)


A = MatrixPlan("a", 6, 4, "factored", 2, importance=0.5, kept_energy=0.9)
B = MatrixPlan("b", 3, 5, "dense", 3)
P = MatrixPlan("a", 6, 4, "pivot", 2)


def test_counting() -> None:
    plan = plan_of(A, B)
    assert (A.parameters, A.dense_parameters) == (2 * (6 + 4), 24)
    assert (B.parameters, B.dense_parameters) == (15, 15)
    assert (plan.parameters, plan.dense_parameters) == (35, 39)
    assert plan.keep_ratio == 35 / 39


def test_the_pivot_form_saves_the_square_of_the_rank_and_costs_the_matrix_at_full_rank() -> None:
    assert P.parameters == A.parameters - 2**2 == 2 * (6 + 4 - 2)
    assert replace(P, rank=4).parameters == P.dense_parameters == 24


def test_a_rank_that_saves_nothing_is_counted_as_it_is() -> None:
    assert MatrixPlan("a", 6, 4, "factored", 4).parameters == 40  # more than the 24 of the matrix


@settings(deadline=None, max_examples=60)
@given(plan=plans())
def test_dictionary_and_json_round_trip(plan: RankPlan) -> None:
    values = json.loads(json.dumps(plan.to_dict()))
    assert values["format_version"] == FORMAT_VERSION == 2
    again = RankPlan.from_dict(values)
    assert again == plan
    assert again.digest() == plan.digest()


def test_a_file_of_version_1_is_read() -> None:
    """What release 0.1 wrote, to the letter."""
    values = {
        "format_version": 1,
        "matrices": [
            {
                "name": "a",
                "rows": 6,
                "columns": 4,
                "form": "factored",
                "rank": 2,
                "importance": 0.5,
                "kept_energy": 0.9,
            },
            {"name": "b", "rows": 3, "columns": 5, "form": "dense", "rank": 3, "importance": None, "kept_energy": None},
        ],
        "requested_keep_ratio": 0.5,
        "metric": "input",
        "allocator": "uniform",
        "fingerprint": "ab",
        "notes": ["first"],
    }
    plan = RankPlan.from_dict(values)
    assert plan == plan_of(A, B, fingerprint="ab", notes=("first",))
    assert (plan.preset, plan.feedback, plan.storage, plan.predicted_nats) == ("", "none", "factored", None)
    assert (plan.nested, plan.order, plan.quantum) == (False, (), 1)


def test_digest_depends_on_content() -> None:
    digests = {plan_of(A, B).digest(), plan_of(B, A).digest(), plan_of(A, B, fingerprint="x").digest()}
    assert len(digests) == 3
    assert all(len(digest) == 64 for digest in digests)


def test_file_round_trip(tmp_path: Path) -> None:
    plan = plan_of(A, B, fingerprint="ab", notes=("first", "second"))
    path = tmp_path / "new" / "plan.json"
    plan.save(path)
    plan.save(path)  # replaces
    assert RankPlan.load(path) == plan
    assert [item.name for item in path.parent.iterdir()] == ["plan.json"]


def test_save_failure_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match=r"plan file '.*' cannot be written \(.*\); free space"):
        plan_of(A).save(tmp_path / "file" / "plan.json")
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(ExportError) as caught:
        plan_of(A).save(tmp_path / "plan.json")
    assert "\n" not in str(caught.value)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "plan.json"]


@pytest.mark.parametrize("content", ["", "{", '{"format_version": 1', "[]", "null", "\x00", '{"format_version": 1}'])
def test_garbled_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PlanError, match=r"plan\.json"):
        RankPlan.load(path)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_of(A, B).save(path)
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError, match=r"plan\.json"):
            RankPlan.load(path)
    path.write_bytes(whole)
    assert RankPlan.load(path) == plan_of(A, B)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"nowhere\.json' cannot be read"):
        RankPlan.load(tmp_path / "nowhere.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(PlanError, match=r"plan\.json' is truncated or no JSON"):
        RankPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name=''"),
        ({"name": 3}, "name=3"),
        ({"rows": 0}, "rows=0"),
        ({"columns": 4.0}, "columns=4.0"),
        ({"rank": True}, "rank=True"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 5}, "rank=5 of matrix 'a' is more than a matrix of 6 x 4"),
        ({"form": "sparse"}, "form='sparse'"),
        ({"form": "pivot", "rows": 4, "rank": 4}, "rank=4 of matrix 'a' leaves no row .* below 4"),
        ({"importance": math.nan}, "importance=nan"),
        ({"kept_energy": math.inf}, "kept_energy=inf"),
        ({"kept_energy": "1"}, "kept_energy='1'"),
    ],
)
def test_bad_matrix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        replace(A, **changes)
    values = plan_of(A, B).to_dict()
    values["matrices"][0].update(changes)
    with pytest.raises(PlanError, match=message):
        RankPlan.from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrices": []}, "no matrices"),
        ({"matrices": None}, "must be lists"),
        ({"matrices": [3]}, "entry 0 of matrices is a int"),
        ({"requested_keep_ratio": 0}, "requested_keep_ratio=0"),
        ({"requested_keep_ratio": 1.01}, "requested_keep_ratio=1.01"),
        ({"requested_keep_ratio": math.nan}, "requested_keep_ratio=nan"),
        ({"requested_keep_ratio": "0.5"}, "requested_keep_ratio='0.5'"),
        ({"metric": None}, "metric=None"),
        ({"notes": "abc"}, "must be lists"),
        ({"notes": [1]}, "notes="),
        ({"surplus": 1}, "unknown key 'surplus'"),
        ({"format_version": None}, "format_version=None"),
        ({"format_version": 3}, "format_version=3 .* newer than this release reads \\(2\\); upgrade"),
        ({"preset": None}, "preset=None"),
        ({"storage": 1}, "storage=1"),
        ({"predicted_nats": math.nan}, "predicted_nats=nan"),
        ({"nested": "yes"}, "nested='yes'"),
        ({"quantum": "2"}, "quantum='2'"),
        ({"order": "%%"}, "order of the plan is garbled"),
        ({"order": [0]}, "order of the plan is garbled"),
        ({"order": "eJw="}, "order of the plan is garbled"),
    ],
)
def test_bad_plan(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        RankPlan.from_dict({**plan_of(A, B).to_dict(), **changes})


@pytest.mark.parametrize("key", ["matrices", "requested_keep_ratio", "metric", "allocator", "format_version"])
def test_missing_key(key: str) -> None:
    values = plan_of(A, B).to_dict()
    del values[key]
    with pytest.raises(PlanError):
        RankPlan.from_dict(values)


def test_duplicate_names() -> None:
    with pytest.raises(PlanError, match="matrix 'a' stands in the plan twice"):
        plan_of(A, B, replace(A, rank=1))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a: nn.Module = nn.Linear(4, 6)
        self.b = nn.Linear(5, 3)
        self.norm = nn.LayerNorm(4)


def test_check_accepts_dense_and_factored() -> None:
    model, plan = Small(), plan_of(A, B)
    plan.check(model)
    model.a = FactoredLinear(4, 6, 2)
    plan.check(model)


def test_check_reads_conv1d_the_right_way_round() -> None:
    model = tiny_model("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    layer = model.get_submodule(name)
    columns, rows = layer.weight.shape
    assert rows != columns
    plan_of(MatrixPlan(name, rows, columns, "factored", 3)).check(model)
    with pytest.raises(PlanError, match=f"{rows} x {columns} in the model and {columns} x {rows} in the plan"):
        plan_of(MatrixPlan(name, columns, rows, "factored", 3)).check(model)


def test_check_of_a_pivot_form() -> None:
    model, plan = Small(), plan_of(P, B)
    plan.check(model)
    model.a = PivotLinear(4, 6, 2)
    plan.check(model)
    with pytest.raises(PlanError, match="'a' is in pivot form at rank 2 in the model and factored in the plan"):
        plan_of(A, B).check(model)
    with pytest.raises(PlanError, match="'a' has rank 2 in the model and 3 in the plan"):
        plan_of(replace(P, rank=3), B).check(model)
    model.a = FactoredLinear(4, 6, 2)
    with pytest.raises(PlanError, match="'a' is factored at rank 2 in the model and in pivot form in the plan"):
        plan.check(model)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(A, name="c"), "in 1 of 2 matrices, first: 'c' is not in the model"),
        (replace(A, name="norm"), "'norm' is a LayerNorm, not a linear layer"),
        (replace(A, rows=7), "'a' is 6 x 4 in the model and 7 x 4 in the plan"),
    ],
)
def test_check_names_the_first_misfit(wrong: MatrixPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(wrong, B).check(Small())


def test_check_of_a_factored_model() -> None:
    model = Small()
    model.a = FactoredLinear(4, 6, 3)
    with pytest.raises(PlanError, match="'a' has rank 3 in the model and 2 in the plan"):
        plan_of(A, B).check(model)
    with pytest.raises(PlanError, match="'a' is factored at rank 3 in the model and dense in the plan"):
        plan_of(replace(A, form="dense"), B).check(model)
    with pytest.raises(PlanError, match="in 2 of 2 matrices, first: 'a'"):
        plan_of(A, replace(B, rows=9)).check(model)
