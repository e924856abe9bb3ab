"""The record of a merge: exact to the last bit, small, and only for the model that was merged."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_lit.errors import ExportError, ModelError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.recovery import add_adapters
from lowrank_lit.unmerging import UnmergeRecord, unmerge


def merged_model(folder: Path, dtype: torch.dtype, size: float = 0.02) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model with merged adapters, and its state before there were any."""
    torch.manual_seed(0)
    model = nn.Sequential(FactoredLinear(64, 96, 24), nn.ReLU(), FactoredLinear(96, 48, 16)).to(dtype)
    plain = copy.deepcopy(model.state_dict())
    adapters = add_adapters(model, rank=4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    record = adapters.merge(unmerge_record=folder)
    assert record.smallest_update > 1e-3
    return model, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [0.002, 0.02, 0.5])
def test_unmerging_gives_every_bit_back(dtype: torch.dtype, size: float, tmp_path: Path) -> None:
    model, plain = merged_model(tmp_path, dtype, size)
    assert not torch.equal(model.state_dict()["0.inner.weight"], plain["0.inner.weight"])
    assert unmerge(model, tmp_path) == 4
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())


def test_the_record_of_a_small_update_is_smaller_than_the_factors(tmp_path: Path) -> None:
    folder = tmp_path / "record"
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(512, 512, generator=generator).bfloat16()
    a, b = 0.1 * torch.randn(4, 512, generator=generator), 0.1 * torch.randn(512, 4, generator=generator)
    record = UnmergeRecord()
    record.add("x", before, (before.double() + b.double() @ a.double()).bfloat16(), (a, b, 1.0))
    assert record.entries["x"]["kind"] == "sum"
    record.save(folder)
    stored = sum(file.stat().st_size for file in folder.iterdir())
    assert stored < 0.3 * before.numel() * 2  # an update of 2 %: corrections and adapter


def test_a_sum_with_many_corrections_keeps_the_factor() -> None:
    record = UnmergeRecord()
    before = torch.zeros(8, 8)  # every bit of it is lost
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    record.add("x", before, before + b @ a, (a, b, 1.0))
    assert record.entries["x"]["kind"] == "values"
    assert set(record.tensors) == {"x.values"}


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    model, _ = merged_model(tmp_path, torch.float32)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].outer.weight[0, 0] += 1e-6
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ModelError, match=r"factor '2\.outer' has other values than .* trained further, or rounded"):
        unmerge(other, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(ModelError, match=r"bfloat16 .* in its dtype"):
        unmerge(copy.deepcopy(model).bfloat16(), tmp_path)
    with pytest.raises(ModelError, match=r"no factor '0\.inner'"):
        unmerge(nn.Sequential(nn.Linear(64, 96)), tmp_path)
    unmerge(model, tmp_path)
    with pytest.raises(ModelError, match=r"is what it was before the merge: .* is taken back"):
        unmerge(model, tmp_path)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    model, _ = merged_model(tmp_path, torch.float32)
    with pytest.raises(ExportError, match="no readable record"):
        unmerge(model, tmp_path / "nowhere")
    record = json.loads((tmp_path / "unmerge.json").read_text())
    (tmp_path / "unmerge.json").write_text(json.dumps({**record, "format": 2}))
    with pytest.raises(ExportError, match="has format 2; this version reads 1"):
        unmerge(model, tmp_path)
    (tmp_path / "unmerge.json").write_text(json.dumps(record))
    tensors = load_file(tmp_path / "unmerge.safetensors")
    tensors["0.inner.a"][0, 0] += 1
    save_file(tensors, tmp_path / "unmerge.safetensors")
    with pytest.raises(ExportError, match="not those of their record"):
        unmerge(model, tmp_path)


def test_a_record_that_cannot_be_written_leaves_the_adapters(tmp_path: Path) -> None:
    model = nn.Sequential(FactoredLinear(8, 8, 4))
    adapters = add_adapters(model, rank=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        adapters.merge(unmerge_record=tmp_path / "file")
    assert adapters.merged is None
    assert hasattr(model[0].inner, "base_layer")
    adapters.merge(unmerge_record=tmp_path / "record", root="0")
    assert set(json.loads((tmp_path / "record" / "unmerge.json").read_text())["factors"]) == {"inner", "outer"}
