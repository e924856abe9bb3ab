"""Measurements with one matrix cut, against the same done by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit.allocation import MatrixSpec
from lowrank_lit.errors import DataError, GradientError
from lowrank_lit.evidence import specs_of
from lowrank_lit.probes import divergences, loss_tables
from lowrank_lit.settings import Settings
from lowrank_lit.surgery import dense_weight, find_targets
from tests.tiny import batches, tiny_model

RATIOS = (0.25, 0.6)


class Case:
    """A model with one layer of a block as its targets, and cuts by the plain SVD."""

    def __init__(self, family: str = "llama", storage: str = "factored", **settings: Any) -> None:
        self.model: Any = tiny_model(family, **settings)
        targets = find_targets(self.model, ["*.0.*mlp*"])
        self.layers = {name: target.module for name, target in targets.items()}
        self.specs = specs_of(targets, Settings(0.5, storage=storage, min_rank=1))
        self.ranks: dict[str, list[int]] = {}

    def cut(self, name: str, rank: int) -> Tensor:
        self.ranks.setdefault(name, []).append(rank)
        u, s, vh = torch.linalg.svd(dense_weight(self.layers[name]).detach().double(), full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ vh[:rank]

    def with_cut(self, name: str, rank: int) -> Any:
        """A copy of the model with one matrix cut."""
        model = copy.deepcopy(self.model)
        parameter = model.get_submodule(name).weight
        weight = self.cut(name, rank).float()
        parameter.data = weight if parameter.shape == weight.shape and "c_" not in name else weight.T.contiguous()
        return model


@torch.no_grad()
def mean_loss(model: Any, data: list[dict[str, Tensor]]) -> float:
    """Cross-entropy per pair of real neighbours."""
    total, count = 0.0, 0
    for batch in data:
        logits, mask = model(**batch).logits.double(), batch["attention_mask"].bool()
        real = mask[:, 1:] & mask[:, :-1]
        total += float(F.cross_entropy(logits[:, :-1][real], batch["input_ids"][:, 1:][real], reduction="sum"))
        count += int(real.sum())
    return total / count


@torch.no_grad()
def mean_divergence(model: Any, other: Any, data: list[dict[str, Tensor]]) -> float:
    """KL(model || other) per real token."""
    total, count = 0.0, 0
    for batch in data:
        p, q = (m(**batch).logits.double().log_softmax(-1) for m in (model, other))
        mask = batch["attention_mask"].bool()
        total += float((p.exp() * (p - q)).sum(-1)[mask].sum())
        count += int(mask.sum())
    return total / count


def test_loss_tables() -> None:
    case, data = Case(), batches(n=3, padding=True)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    tables, passes = loss_tables(case.model, data, case.layers, case.specs, case.cut, ratios=RATIOS)
    asked = case.ranks.copy()
    dense = mean_loss(case.model, data)
    assert list(tables) == list(case.layers)
    for spec in case.specs:
        assert asked[spec.name] == [int(ratio * 32 * 48 / 80) for ratio in RATIOS]
        assert list(tables[spec.name]) == [*RATIOS, 1.0]
        assert tables[spec.name][1.0] == pytest.approx(dense, rel=1e-6)
        for ratio, rank in zip(RATIOS, list(asked[spec.name]), strict=True):
            expected = mean_loss(case.with_cut(spec.name, rank), data)
            assert tables[spec.name][ratio] == pytest.approx(expected, rel=1e-6)
    assert passes == 2 * len(case.specs) + 1
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())


@pytest.mark.parametrize("storage", ["factored", "pivot"])
@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_ratio_means_the_largest_rank_that_it_pays_for(storage: str, ratio: float) -> None:
    case = Case(storage=storage)
    spec = case.specs[0]
    tables, _ = loss_tables(case.model, batches(n=1), case.layers, [spec], case.cut, ratios=[ratio], sequences=1)
    affordable = [rank for rank in range(1, spec.break_even) if spec.cost(rank) <= ratio * spec.dense_cost]
    assert case.ranks.get(spec.name, []) == affordable[-1:]
    assert (ratio in tables[spec.name]) == bool(affordable)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_divergences(family: str) -> None:
    case, data = Case(family), batches(n=3, padding=True)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    found, passes = divergences(case.model, data, case.layers, case.specs, case.cut)
    for spec in case.specs:
        rank, value = found[spec.name]
        assert rank == round(0.1 * spec.break_even) == 2
        expected = mean_divergence(case.model, case.with_cut(spec.name, rank), data)
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert value > 1e-4
    assert passes == len(case.specs) + 1
    assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())


def test_a_probe_has_at_least_rank_one() -> None:
    case = Case()
    spec = MatrixSpec(case.specs[0].name, 3, 3)
    found, _ = divergences(case.model, batches(n=1), case.layers, [spec], lambda name, rank: case.cut(name, 1))
    assert found[spec.name][0] == 1


def test_only_the_first_sequences_are_measured() -> None:
    case, data = Case(), batches(n=4, batch=3)
    part = [data[0], {key: value[:2] for key, value in data[1].items()}]
    tables, passes = loss_tables(case.model, data, case.layers, case.specs[:1], case.cut, ratios=[0.5], sequences=5)
    assert passes == pytest.approx(2 * 5 / 12)
    assert tables[case.specs[0].name][1.0] == pytest.approx(mean_loss(case.model, part), rel=1e-6)
    found, passes = divergences(case.model, data, case.layers, case.specs[:1], case.cut, sequences=5)
    assert passes == pytest.approx(2 * 5 / 12)
    rank, value = found[case.specs[0].name]
    assert value == pytest.approx(mean_divergence(case.model, case.with_cut(case.specs[0].name, rank), part), rel=1e-3)


def test_token_ids_as_a_plain_tensor() -> None:
    case, data = Case(), batches(n=2)
    named, _ = loss_tables(case.model, data, case.layers, case.specs[:1], case.cut, ratios=[0.5])
    plain = [{"": batch["input_ids"]} for batch in data]
    found, _ = loss_tables(case.model, plain, case.layers, case.specs[:1], case.cut, ratios=[0.5])
    assert found[case.specs[0].name] == pytest.approx(named[case.specs[0].name], rel=1e-6)


def test_the_model_comes_back_where_a_cut_fails() -> None:
    case = Case()
    case.model.model.layers[0].train()
    before = {key: value.clone() for key, value in case.model.state_dict().items()}

    def cut(name: str, rank: int) -> Tensor:
        if name == list(case.layers)[1]:
            raise RuntimeError("no memory")
        return case.cut(name, rank)

    for measure in (loss_tables, divergences):
        with pytest.raises(RuntimeError, match="no memory"):
            measure(case.model, batches(n=1), case.layers, case.specs, cut)
        assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
        assert case.model.model.layers[0].training
        assert not case.model.model.layers[1].training


def test_models_without_predictions() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    layers = {"0": model[0]}
    specs, data = [MatrixSpec("0", 5, 6)], [{"": torch.randn(4, 6)}]

    def cut(name: str, rank: int) -> Tensor:
        return torch.zeros(5, 6)

    with pytest.raises(GradientError, match=r"allocator='sensitivity' measures next-token losses, but .*; choose"):
        loss_tables(model, data, layers, specs, cut)
    with pytest.raises(DataError, match=r"needs logits .*, which Sequential does not give; choose preset='unirank'"):
        divergences(model, data, layers, specs, cut)
    bert: Any = tiny_model("bert")
    with pytest.raises(GradientError, match="BertModel gives no logits"):
        loss_tables(bert, batches(n=1), {}, [], cut)


def test_a_cut_that_changes_nothing_costs_nothing() -> None:
    case, data = Case(), batches(n=2)

    def cut(name: str, rank: int) -> Tensor:
        return dense_weight(case.layers[name]).detach().clone()

    found, _ = divergences(case.model, data, case.layers, case.specs, cut)
    assert all(0 <= value < 1e-6 for _, value in found.values())
    tables, _ = loss_tables(case.model, data, case.layers, case.specs, cut, ratios=[0.5])
    assert all(math.isclose(table[0.5], table[1.0]) for table in tables.values())


def test_predictions_that_are_not_finite_are_no_good_ones() -> None:
    case = Case()
    spec = case.specs[0]

    def cut(name: str, rank: int) -> Tensor:
        return torch.full((spec.rows, spec.columns), 1e38)

    found, _ = divergences(case.model, batches(n=1), case.layers, [spec], cut)
    assert found[spec.name][1] == math.inf
