"""Singular vectors of factored matrices against a dense SVD, planted intruders, and where an update lies."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.errors import ExportError, LowRankError, ModelError
from lowrank_lit.intruders import (
    SingularVectors,
    compare_models,
    count_intruders,
    intruder_dimensions,
    singular_vectors,
    suspicion,
    update_overlap,
)
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.linalg import factored_svd
from lowrank_lit.recovery import add_adapters
from lowrank_lit.unmerging import is_record, merge_again


def pair(rows: int = 40, columns: int = 60, rank: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors in float64, singular values well apart, in no particular gauge."""
    draw = torch.Generator().manual_seed(seed)
    outer, _ = torch.linalg.qr(torch.randn(rows, rank, generator=draw, dtype=torch.float64))
    inner, _ = torch.linalg.qr(torch.randn(columns, rank, generator=draw, dtype=torch.float64))
    mix = torch.randn(rank, rank, generator=draw, dtype=torch.float64) + 3 * torch.eye(rank, dtype=torch.float64)
    values = 2.0 ** -torch.arange(rank, dtype=torch.float64)
    return outer * values @ mix, torch.linalg.solve(mix, inner.mT)


def dense_vectors(weight: Tensor, rank: int) -> SingularVectors:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return SingularVectors(u[:, :rank], s[:rank], vh[:rank].mT)


def model_of(weight: Tensor) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data = weight.clone()
    return nn.Sequential(layer)


def factored(outer: Tensor, inner: Tensor) -> nn.Sequential:
    return nn.Sequential(FactoredLinear.from_factors(outer, inner, None))


@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (60, 40)])
def test_thin_svd_is_the_dense_one(rows: int, columns: int) -> None:
    outer, inner = pair(rows, columns)
    u, s, v = factored_svd(outer, inner)
    dense = dense_vectors(outer @ inner, 12)
    assert torch.allclose(s, dense.values, rtol=1e-10, atol=0)  # measured: 3e-13
    for own, other in ((u, dense.left), (v, dense.right)):
        cosines = (own * other).sum(0).abs()
        assert float((1 - cosines).max()) < 1e-10  # measured: 4e-15
        assert torch.allclose(own.mT @ own, torch.eye(12, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("form", [FactoredLinear, PivotLinear])
@pytest.mark.parametrize(("rows", "columns"), [(40, 60), (60, 40)])
def test_thin_factors_count_what_a_dense_svd_counts(form: type[FactoredLinear], rows: int, columns: int) -> None:
    outer, inner = pair(rows, columns)
    base = outer @ inner + 0.05 * torch.randn(rows, columns, dtype=torch.float64)
    vectors = singular_vectors(form.from_factors(outer, inner, None))
    dense = dense_vectors(outer @ inner, 12)
    full = dense_vectors(base, min(rows, columns))
    for threshold in (0.3, 0.5, 0.9, 0.99):
        own = count_intruders(vectors, singular_vectors(model_of(base)[0]), threshold=threshold)
        expected = count_intruders(dense, full, threshold=threshold)
        assert own.least == pytest.approx(expected.least, abs=1e-8)  # measured: 2e-11
        assert (own.left, own.right, own.left_all, own.right_all, own.rank) == (
            *(expected.left, expected.right, expected.left_all, expected.right_all, expected.rank),
        )
    assert 0 < count_intruders(dense, full, threshold=0.9).left_all < 12, "or any two would agree"


def test_a_planted_intruder_is_found() -> None:
    """A large component along directions that are spread over all singular vectors of the base."""
    torch.manual_seed(1)
    base = torch.randn(40, 60, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    outer, inner = u[:, :12] * s[:12], vh[:12]
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(20)
    left, right = u @ (signs / 40**0.5), vh.mT @ (signs / 40**0.5)  # cosine 0.158 with each of them
    planted = factored(torch.cat([outer, 5 * s[0] * left[:, None]], 1), torch.cat([inner, right[None]]))
    found = intruder_dimensions(model_of(base), planted)["0"]
    assert (found.looked_at, found.rank) == (10, 13)
    assert found.left == found.right == 1
    assert found.least < 0.25
    (entry,) = compare_models(model_of(base), factored(outer, inner), planted).values()
    assert (entry.compressed.left, entry.compressed.left_all, entry.recovered) == (0, 0, found)
    assert entry.since is not None
    assert entry.since.left == 1


@pytest.mark.parametrize("scale", [1.0, 0.1, -3.0])
def test_a_scaled_copy_has_none(scale: float) -> None:
    torch.manual_seed(1)
    base = torch.randn(40, 60, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(base, full_matrices=False)
    copied = intruder_dimensions(model_of(base), factored(scale * u * s, vh), threshold=0.999)["0"]
    assert (copied.left_all, copied.right_all, copied.rank) == (0, 0, 40)
    assert copied.least == pytest.approx(1, abs=1e-9)


def test_components_that_are_zero_have_no_direction() -> None:
    outer, inner = pair()
    outer = torch.cat([outer, torch.zeros(40, 3, dtype=torch.float64)], 1)
    inner = torch.cat([inner, torch.randn(3, 60, dtype=torch.float64)])
    found = intruder_dimensions(model_of(outer @ inner), factored(outer, inner), top=50)["0"]
    assert (found.looked_at, found.rank, found.left_all) == (12, 12, 0)


def test_overlap_against_dense_projections() -> None:
    outer, inner = pair()
    torch.manual_seed(2)
    new = (outer + 0.1 * torch.randn(40, 12, dtype=torch.float64), inner + 0.1 * torch.randn(12, 60).double())
    change = new[0] @ new[1] - outer @ inner
    head = dense_vectors(outer @ inner, 5)
    found = update_overlap((outer, inner), new, components=5)
    assert found is not None
    left, right = head.left @ head.left.mT, head.right @ head.right.mT
    energy = change.square().sum()
    outside = (torch.eye(40) - left) @ change @ (torch.eye(60) - right)
    assert found.left == pytest.approx(float((left @ change).square().sum() / energy), rel=1e-8)
    assert found.right == pytest.approx(float((change @ right).square().sum() / energy), rel=1e-8)
    assert found.neither == pytest.approx(float(outside.square().sum() / energy), rel=1e-6)
    assert found.relative == pytest.approx(float(change.norm() / (outer @ inner).norm()), rel=1e-8)
    assert (found.components, found.left_chance, found.right_chance) == (5, 5 / 40, 5 / 60)
    assert update_overlap((outer, inner), (2 * outer, inner / 2)) is None, "another gauge is no update"


def test_an_update_of_one_factor_stays_in_the_others_space() -> None:
    outer, inner = pair()
    of_inner = update_overlap((outer, inner), (outer, inner + torch.randn(12, 60, dtype=torch.float64)))
    of_outer = update_overlap((outer, inner), (outer + torch.randn(40, 12, dtype=torch.float64), inner))
    assert of_inner is not None
    assert of_outer is not None
    assert of_inner.left == pytest.approx(1)
    assert of_outer.right == pytest.approx(1)
    assert max(of_inner.right, of_outer.left) < 0.6
    assert max(of_inner.neither, of_outer.neither) < 1e-12


def merged(folder: Path, size: float) -> tuple[nn.Module, nn.Module]:
    """A compressed model, and the same with merged adapters, whose record is in the folder."""
    torch.manual_seed(0)
    compressed = nn.Sequential(FactoredLinear(64, 96, 24), nn.ReLU(), PivotLinear(96, 48, 16))
    recovered = copy.deepcopy(compressed)
    adapters = add_adapters(recovered, rank=4)
    with torch.no_grad():
        for parameter in recovered.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    adapters.merge(unmerge_record=folder)
    return compressed, recovered


def test_the_record_of_a_merge_gives_the_recovered_model(tmp_path: Path) -> None:
    compressed, recovered = merged(tmp_path / "a", 0.002)
    again = copy.deepcopy(compressed).double()
    assert is_record(tmp_path / "a")
    assert merge_again(again, tmp_path / "a") == 4
    for name, value in recovered.state_dict().items():
        own, before = again.state_dict()[name].double(), compressed.state_dict()[name].double()
        assert torch.allclose(own, value.double(), rtol=0, atol=1e-7), name  # measured: 1.5e-8
        assert "weight" not in name or float((own - before).abs().max()) > 1e-5
    with pytest.raises(ModelError, match=r"has no factor '0.inner' of shape \[24, 64\].*this model's recovery"):
        merge_again(nn.Sequential(FactoredLinear(64, 96, 9)), tmp_path / "a")
    with pytest.raises(ExportError, match="holds no readable record"):
        merge_again(again, tmp_path / "nowhere")
    merged(tmp_path / "b", 0.5)  # rounding then loses much, and the record keeps factors
    with pytest.raises(ExportError, match=r"keeps factor '.*' itself and not its adapter; give the folder of the"):
        merge_again(again, tmp_path / "b")


def test_what_does_not_belong_together_is_refused() -> None:
    outer, inner = pair()
    base, compressed = model_of(outer @ inner), factored(outer, inner)
    with pytest.raises(ModelError, match="matrix '0' is 40 x 60 in the compressed model, 60 x 40 there; give folders"):
        compare_models(base, compressed, factored(*pair(60, 40)))
    with pytest.raises(ModelError, match=r"base model is none of the compressed one's.*no such linear layer"):
        compare_models(nn.Sequential(nn.Sequential(nn.Linear(60, 40))), compressed)
    with pytest.raises(ModelError, match="has no factored matrix; give an export of a compression"):
        compare_models(base, base)
    with pytest.raises(LowRankError, match=r"threshold=0 is outside \(0, 1\]"):
        intruder_dimensions(base, compressed, threshold=0.0)
    with pytest.raises(LowRankError, match="top=0 is too small"):
        intruder_dimensions(base, compressed, top=0)
    other = compare_models(base, compressed, factored(*pair(seed=5)))
    assert "may be the recovery of another compression" in suspicion(other)
    assert not suspicion(compare_models(base, compressed, factored(1.1 * outer, inner)))
