"""Nested exports: one folder, a model for every budget below its own."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, logging
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from lowrank_lit import hub
from lowrank_lit.errors import ExportError, PlanError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.plan import MatrixPlan, RankPlan, truncated_plan
from lowrank_lit.surgery import bias_of, dense_weight, find_targets, replace_module, target_parameters
from tests.test_surgery import output
from tests.tiny import tiny_model

FLOOR = 2
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    hub.register()
    logging.disable_progress_bar()


def components(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Outer (m, p) and inner (p, n) vectors of equal norm, component by component, and the singular values."""
    u, s, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return u * s.sqrt(), s.sqrt()[:, None] * vt, s


def nested_model(family: str = "llama", *, rank: int = 12, dense: int = 2) -> tuple[Any, RankPlan]:
    """A model in nested order, all at one rank but ``dense`` matrices; the order is that of all singular values."""
    model = tiny_model(family)
    matrices, scored = [], []
    for index, (name, target) in enumerate(find_targets(model).items()):
        outer, inner, s = components(dense_weight(target.module))
        if index < dense:
            matrices.append(MatrixPlan(name, target.rows, target.columns, "dense", len(s)))
            continue
        parts = outer[:, :rank], inner[:rank]
        layer = FactoredLinear.from_factors(*parts, bias_of(target.module), dtype=torch.float32)
        replace_module(model, target, layer)
        matrices.append(MatrixPlan(name, target.rows, target.columns, "factored", rank, kept_energy=0.5))
        scored += [(-float(s[i]), index) for i in range(FLOOR, rank)]
    order = tuple(index for _, index in sorted(scored))
    plan = RankPlan(tuple(matrices), 1.0, "identity", "global", "run", nested=True, order=order, predicted_nats=0.1)
    return model, replace(plan, requested_keep_ratio=plan.keep_ratio)


def cut(model: Any, plan: RankPlan) -> Any:
    """The factors of a model in memory cut to the ranks of a plan."""
    for matrix in plan.matrices:
        layer = model.get_submodule(matrix.name)
        if isinstance(layer, FactoredLinear):
            target = next(name for name, module in model.named_modules() if module is layer)
            outer, inner = layer.factors()
            new = FactoredLinear.from_factors(
                outer[:, : matrix.rank].detach(), inner[: matrix.rank].detach(), layer.bias
            )
            parent, _, child = target.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RankPlan]:
    path = tmp_path_factory.mktemp("nested") / "llama"
    model, plan = nested_model()
    hub.export(model, plan, path)
    return path, plan


@st.composite
def nested_plans(draw: st.DrawFn) -> RankPlan:
    matrices, pool = [], []
    quantum = draw(st.sampled_from([1, 1, 2, 3, 8]))
    for index in range(draw(st.integers(1, 5))):
        rows, columns = draw(st.integers(2, 30)), draw(st.integers(2, 30))
        if index and draw(st.booleans()):
            matrices.append(MatrixPlan(str(index), rows, columns, "dense", min(rows, columns)))
            continue
        most = min(rows, columns) // quantum
        if not most:
            matrices.append(MatrixPlan(str(index), rows, columns, "dense", min(rows, columns)))
            continue
        steps = draw(st.integers(1, most))
        matrices.append(MatrixPlan(str(index), rows, columns, "factored", quantum * steps))
        pool += [index] * draw(st.integers(0, steps - 1))
    order = tuple(index for index in draw(st.permutations(pool)) for _ in range(quantum))
    return RankPlan(tuple(matrices), 1.0, "two_sided", "knapsack", "f", nested=True, order=order, quantum=quantum)


@settings(deadline=None, max_examples=100)
@given(plan=nested_plans(), data=st.data())
def test_truncation_is_the_longest_beginning_within_the_budget(plan: RankPlan, data: st.DataObject) -> None:
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    count = Counter(plan.order)
    floors = [m.parameters - count[i] * (m.rows + m.columns) for i, m in enumerate(plan.matrices)]
    least = sum(floors) / plan.dense_parameters
    most = min(1.0, plan.keep_ratio)
    if least > most:
        return
    keep_ratio = data.draw(st.floats(least, most))
    smaller = truncated_plan(plan, keep_ratio)
    assert smaller.parameters <= math.floor(keep_ratio * plan.dense_parameters + 1e-9) or smaller is plan
    assert smaller.order == plan.order[: len(smaller.order)]
    kept = Counter(smaller.order)
    for index, (before, after) in enumerate(zip(plan.matrices, smaller.matrices, strict=True)):
        assert (before.name, before.form) == (after.name, after.form)
        assert before.rank - after.rank == count[index] - kept[index]
        assert after.form == "dense" or after.rank % plan.quantum == 0
    assert smaller.quantum == plan.quantum
    if len(smaller.order) < len(plan.order):
        following = plan.matrices[plan.order[len(smaller.order)]]
        needed = smaller.parameters + plan.quantum * (following.rows + following.columns)
        assert needed > keep_ratio * plan.dense_parameters
        assert smaller.requested_keep_ratio == keep_ratio
        assert smaller.fingerprint != plan.fingerprint
    # Nested: a smaller budget gives nowhere a larger rank, and in two steps what it gives in one.
    half = data.draw(st.floats(least, keep_ratio))
    ranks = [matrix.rank for matrix in truncated_plan(plan, half).matrices]
    assert all(rank <= matrix.rank for rank, matrix in zip(ranks, smaller.matrices, strict=True))
    if half < smaller.keep_ratio:
        assert [matrix.rank for matrix in truncated_plan(smaller, half).matrices] == ranks


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("share", [0.95, 0.7])
def test_a_part_of_an_export_is_the_model_of_cut_factors(family: str, share: float, tmp_path: Path) -> None:
    model, plan = nested_model(family)
    hub.export(model, plan, tmp_path / "out")
    keep_ratio = share * plan.keep_ratio
    smaller = truncated_plan(plan, keep_ratio)
    assert len({matrix.rank for matrix in smaller.matrices}) > 2
    loaded = hub.load(tmp_path / "out", keep_ratio=keep_ratio, attn_implementation="eager")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert target_parameters(loaded, smaller) == smaller.parameters
    whole = output(model)
    assert torch.equal(output(loaded), output(cut(model, smaller)))
    assert not torch.equal(output(loaded), whole)
    assert loaded.config.quantization_config.rank_plan() == smaller
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    # Saved again, both ways, and cut further from there.
    hub.export(loaded, smaller, tmp_path / "smaller")
    loaded.save_pretrained(tmp_path / "plain")
    for folder in ("smaller", "plain"):
        again = hub.load(tmp_path / folder, attn_implementation="eager")
        assert torch.equal(output(again), output(loaded))
        least = hub.load(tmp_path / folder, keep_ratio=0.9 * smaller.keep_ratio, attn_implementation="eager")
        direct = hub.load(tmp_path / "out", keep_ratio=0.9 * smaller.keep_ratio, attn_implementation="eager")
        assert torch.equal(output(least), output(direct))
    with pytest.raises(ExportError, match="export of another run"):
        hub.export(loaded, smaller, tmp_path / "out")  # the part does not replace the whole


def test_settings_of_from_pretrained(exported: tuple[Path, RankPlan]) -> None:
    path, plan = exported
    keep_ratio = 0.8 * plan.keep_ratio
    model = hub.load(path, keep_ratio=keep_ratio, attn_implementation="eager")
    low = hub.load(path, keep_ratio=keep_ratio, dtype=torch.bfloat16, device_map="cpu")
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}
    assert low.config._attn_implementation == "sdpa"
    by_class = hub.load(path, keep_ratio=keep_ratio, auto_class=LlamaForCausalLM, attn_implementation="eager")
    assert torch.equal(output(by_class), output(model))
    base = hub.load(path, keep_ratio=keep_ratio, auto_class=AutoModel, attn_implementation="eager")
    assert torch.equal(output(base), output(model.base_model))
    same, report = hub.load(path, keep_ratio=keep_ratio, output_loading_info=True)
    assert not any(report.values())
    assert same.name_or_path == str(path)
    made = same.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 2
    assert same.generation_config.to_dict() == AutoModelForCausalLM.from_pretrained(path).generation_config.to_dict()


def test_nothing_else_of_the_factors_is_needed(exported: tuple[Path, RankPlan], tmp_path: Path) -> None:
    """Spoilt components beyond the cut do not matter."""
    path, plan = exported
    smaller = truncated_plan(plan, 0.8 * plan.keep_ratio)
    expected = hub.load(path, keep_ratio=0.8 * plan.keep_ratio, attn_implementation="eager")
    folder = tmp_path / "copy"
    folder.mkdir()
    for item in path.iterdir():
        (folder / item.name).write_bytes(item.read_bytes())
    weights = load_file(folder / WEIGHTS)
    for matrix in smaller.matrices:
        if matrix.form == "factored":
            weights[f"{matrix.name}.inner.weight"][matrix.rank :] = float("nan")
            weights[f"{matrix.name}.outer.weight"][:, matrix.rank :] = float("nan")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    loaded = hub.load(folder, keep_ratio=0.8 * plan.keep_ratio, attn_implementation="eager")
    assert torch.equal(output(loaded), output(expected))
    name = f"{plan.matrices[-1].name}.outer.weight"
    for change, message in (
        (lambda: weights.update({name: weights[name][:, :1].clone()}), rf"'{name}' in '.*' has 1 components"),
        (lambda: weights.pop(name), rf"'{name}' is in no weight file"),
    ):
        change()
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ExportError, match=message):
            hub.load(folder, keep_ratio=0.8 * plan.keep_ratio)


def test_a_missing_norm_is_no_less_an_error(exported: tuple[Path, RankPlan], tmp_path: Path) -> None:
    path, plan = exported
    for item in path.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    weights = load_file(tmp_path / WEIGHTS)
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"tensor 'model\.norm\.weight' is missing in"):
        hub.load(tmp_path, keep_ratio=0.8 * plan.keep_ratio)


def test_all_of_it(exported: tuple[Path, RankPlan]) -> None:
    path, plan = exported
    whole = hub.load(path, attn_implementation="eager")
    assert torch.equal(output(hub.load(path, keep_ratio=plan.keep_ratio, attn_implementation="eager")), output(whole))
    assert whole.config.quantization_config.rank_plan() == plan


def test_budgets_that_the_export_does_not_have(exported: tuple[Path, RankPlan], tmp_path: Path) -> None:
    path, plan = exported
    asked = plan.requested_keep_ratio
    with pytest.raises(
        PlanError, match=rf"is more than the plan holds \({plan.keep_ratio:.4f}, made for keep_ratio={asked}\)"
    ):
        hub.load(path, keep_ratio=0.99)
    with pytest.raises(
        PlanError, match=r"floors and dense matrices of the plan alone need \d+; choose at least 0\."
    ) as e:
        hub.load(path, keep_ratio=0.05)
    least = float(str(e.value).split()[-1])
    assert hub.load(path, keep_ratio=least + 1e-4) is not None
    for bad in (0.0, -1, 1.5, math.nan):
        with pytest.raises(PlanError, match=r"must lie in \(0, 1\]"):
            hub.load(path, keep_ratio=bad)
    model, _ = nested_model()
    hub.export(model, replace(plan, nested=False, order=()), tmp_path / "flat")
    with pytest.raises(PlanError, match=r"needs a nested plan, and this one is not; compress again with nested=True"):
        hub.load(tmp_path / "flat", keep_ratio=0.3)
    hub.export(tiny_model("llama"), None, tmp_path / "dense")
    with pytest.raises(ExportError, match=r"holds a dense model, which keep_ratio=0\.3 cannot cut"):
        hub.load(tmp_path / "dense", keep_ratio=0.3)


A, B = MatrixPlan("a", 6, 4, "factored", 3), MatrixPlan("b", 3, 5, "dense", 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nested": False, "order": (0,)}, "order is given for a plan that is not nested"),
        ({"order": (2,)}, "order names matrix 2 of 2"),
        ({"order": (-1,)}, "order names matrix -1 of 2"),
        ({"order": ("a",)}, "order names matrix 'a' of 2"),
        ({"order": (1,)}, r"order has 1 components of matrix 'b' \(dense, rank 3\)"),
        ({"order": (0, 0, 0)}, r"order has 3 components of matrix 'a' \(factored, rank 3\)"),
        ({"matrices": (replace(A, form="pivot"), B)}, "matrix 'a' is in pivot form in a nested plan"),
        ({"quantum": 2}, r"rank=3 of matrix 'a' is no multiple of quantum=2"),
        ({"quantum": 3}, r"order does not name each matrix quantum=3 times in a row"),
        ({"quantum": 0}, r"quantum=0 must be a whole number of 1 or more"),
    ],
)
def test_orders_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    plan = RankPlan((A, B), 0.9, "input", "uniform", nested=True, order=(0, 0))
    with pytest.raises(PlanError, match=message):
        replace(plan, **changes)


def test_a_long_order_stays_small() -> None:
    """As many components as a model of 7 billion parameters has, in less than a megabyte of text."""
    matrices = tuple(MatrixPlan(f"m{i}", 4096, 4096, "factored", 2001) for i in range(224))
    draws = torch.randint(224, (600_000,), generator=torch.Generator().manual_seed(0)).tolist()
    seen: Counter[int] = Counter()
    order = []
    for index in itertools.islice(draws, 448_000):
        if seen[index] < 2000:
            seen[index] += 1
            order.append(index)
    plan = RankPlan(matrices, 0.9, "two_sided", "knapsack", nested=True, order=tuple(order))
    assert len(order) > 400_000
    text = json.dumps(plan.to_dict())
    assert len(text) < 1_000_000
    assert RankPlan.from_dict(json.loads(text)) == plan
