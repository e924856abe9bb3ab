"""A compression whose intermediate results wait on a disk: the same, one block at a time."""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit import compress
from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.collector import Calibration
from lowrank_lit.errors import LowRankError, NonFiniteError
from lowrank_lit.gradients import SampledTokenLoss, next_token_loss
from lowrank_lit.hub import export, load
from lowrank_lit.paging import Workspace, release
from lowrank_lit.streaming import moved
from lowrank_lit.surgery import dense_weight, find_targets
from tests.disks import small_disk
from tests.tiny import batches, tiny_model

MOMENTS = [("input",), ("input", "gradient"), ("fisher",), ("input", "weight_gradient")]


def calibrated(model: Any, moments: tuple[str, ...], loss: Any, workspace: Workspace | None = None) -> Calibration:
    return calibrate(
        model,
        as_batches(batches(n=3)),
        {name: target.module for name, target in find_targets(model).items()},
        weight_of=dense_weight,
        moments=frozenset(moments),
        importance=True,
        loss=loss(),
        workspace=workspace,
    )


@pytest.mark.parametrize("loss", [SampledTokenLoss, lambda: next_token_loss], ids=["drawn", "text"])
@pytest.mark.parametrize("moments", MOMENTS, ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_statistics_are_those_of_the_whole_model(
    tmp_path: Path, family: str, moments: tuple[str, ...], loss: Any
) -> None:
    model = tiny_model(family)
    model.get_submodule(next(iter(find_targets(model)))).weight.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    own = calibrated(model, moments, loss)
    for budget in (0, 2**30):
        streamed = calibrated(model, moments, loss, Workspace(tmp_path, budget=budget))
        assert streamed.mode == "blocks"
        assert list(streamed.statistics) == list(own.statistics)
        assert streamed.importance == own.importance
        for name, entry in own.statistics.items():
            for field in fields(entry):
                value, other = getattr(entry, field.name), getattr(streamed.statistics[name], field.name)
                same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
                assert same, (name, field.name)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("settings", [{"preset": "unirank"}, {"preset": "fast"}, {"preset": "best"}], ids=str)
def test_the_compressed_model_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    own = tiny_model("llama")
    other = copy.deepcopy(own)
    result = compress(own, batches(n=4), keep_ratio=0.6, **settings)
    streamed = compress(other, batches(n=4), keep_ratio=0.6, workspace=tmp_path / "space", **settings)
    assert not any((tmp_path / "space").iterdir())
    assert streamed.plan == result.plan
    weights = other.state_dict()
    for key, value in own.state_dict().items():
        assert torch.equal(value, weights[key])
    with torch.no_grad():  # factors mapped from a file are weights like any others
        for parameter in other.parameters():
            parameter.mul_(1.0)
    export(other, streamed.plan, tmp_path / "model")
    (batch,) = batches(n=1)
    torch.testing.assert_close(load(tmp_path / "model")(**batch).logits, own(**batch).logits)


def test_weights_from_a_file_leave_memory_and_give_the_same_factors(tmp_path: Path) -> None:
    model = tiny_model("llama", hidden_size=256, intermediate_size=768)
    model.save_pretrained(tmp_path / "dense")
    mapped = type(model).from_pretrained(tmp_path / "dense", dtype="auto", attn_implementation="eager")
    kept = compress(mapped, batches(n=4), keep_ratio=0.6, preset="unirank", workspace=tmp_path)
    assert release(mapped.parameters()) > 0
    plain = compress(model, batches(n=4), keep_ratio=0.6, preset="unirank")
    assert [entry.rank for entry in kept.plan.matrices] == [entry.rank for entry in plain.plan.matrices]
    (batch,) = batches(n=1)  # memory of another alignment may round otherwise
    torch.testing.assert_close(mapped(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)


def test_hidden_states_that_are_not_finite_name_their_block(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"block 'model\.layers\.1'|'model\.layers\.\d"):
        calibrated(model, ("gradient",), SampledTokenLoss, Workspace(tmp_path))


def test_a_workspace_that_cannot_be_made_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(LowRankError, match=r"workspace='.*file' cannot be made"):
        compress(model, batches(n=4), keep_ratio=0.6, workspace=tmp_path / "file")
    assert not any("inner" in name for name, _ in model.named_modules())


def test_a_full_disk_stops_a_compression_that_spills(tmp_path: Path) -> None:
    """Nothing is left on the disk, and what was compressed is the model that it was."""
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with small_disk(tmp_path / "disk", 2**20) as disk:
        disk.fill(10_000)
        message = r"workspace='.*disk' cannot take .*; free space there, or give"
        with pytest.raises(LowRankError, match=message) as caught:
            compress(model, batches(n=4), keep_ratio=0.6, preset="fast", workspace=disk.folder)
        assert "\n" not in str(caught.value)
        assert [file.name for file in disk.folder.iterdir()] == ["filler"] * disk.mounted
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_was_moved_gets_its_own_memory_back() -> None:
    layer = nn.Linear(3, 3)
    parameter, address, values = layer.weight, layer.weight.data_ptr(), layer.weight.detach().clone()
    with moved(layer, "meta"):  # values are lost there, and are not needed
        assert layer.weight.is_meta
    assert layer.weight is parameter
    assert (layer.weight.data_ptr(), layer.weight.device.type) == (address, "cpu")
    assert torch.equal(layer.weight, values)
