"""A compression whose intermediate results wait on a disk: the same, one block at a time."""

from __future__ import annotations

import copy
import math
import mmap
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_lit import compress, paging, plan_ranks
from lowrank_lit._prediction import predicted_plan
from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.callbacks.export import round_weights
from lowrank_lit.collector import Calibration
from lowrank_lit.compress import settings_of
from lowrank_lit.errors import LowRankError, NonFiniteError
from lowrank_lit.evidence import specs_of
from lowrank_lit.gradients import SampledTokenLoss, next_token_loss
from lowrank_lit.hub import export, load
from lowrank_lit.paging import Workspace, release
from lowrank_lit.selection import Judge
from lowrank_lit.streaming import moved
from lowrank_lit.study import Study
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
    with small_disk(tmp_path / "disk", 2**24) as disk:
        filled: list[int] = []

        def fill(*_: object) -> None:
            if not filled:
                disk.fill(10_000)
                filled.append(1)

        model.model.layers[1].register_forward_pre_hook(fill)  # the room that the start looks for was there
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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_measured_candidates_and_refits_are_those_in_memory(tmp_path: Path, family: str) -> None:
    """Statistics, candidates and the refit go through the disk, hidden states included."""
    own = tiny_model(family)
    other = copy.deepcopy(own)
    settings = settings_of(0.6, {"preset": "best"})
    text = batches(n=10, batch=4, padding=True, structured=True)
    space = Workspace(tmp_path, budget=0)
    study, streamed = Study(own, text), Study(other, text, workspace=space)
    draft, again = study.draft(settings), streamed.draft(settings)
    assert again.plan == draft.plan
    same(study.weights(draft), streamed.weights(again))
    fitted = []
    for each in (study, streamed):  # by itself, for a draft leaves a refit out where it is no gain
        specs, evidence = specs_of(each.targets, settings), each.collection.dense(settings)
        spectra, note = each.collection.refitted(settings, specs, evidence, [8] * len(specs))
        assert spectra is not None, note
        parts = {name: (spectrum.left, spectrum.inner) for name, spectrum in spectra.items()}
        fitted.append({name: outer @ inner for name, (outer, inner) in parts.items() if inner is not None})
    same(*fitted)
    assert not any(space.folder.iterdir())


def same(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    assert weights.keys() == others.keys() != set()
    for name, weight in weights.items():
        assert float((others[name] - weight).norm() / weight.norm()) <= 1e-5, name


def test_predictions_wait_in_the_workspace(tmp_path: Path) -> None:
    model, text = tiny_model("gpt2"), as_batches(batches(n=6, padding=True))
    layers = {name: target.module for name, target in find_targets(model).items()}
    weights = {name: 0.9 * dense_weight(layer).detach() for name, layer in layers.items()}
    plain, space = Judge(model, text, layers), Workspace(tmp_path, budget=0)
    streamed = Judge(model, text, layers, None, space)
    assert space.bytes >= sum(2 * 96 * batch["input_ids"].numel() for batch in text[5:])
    for candidate in ({}, weights):
        assert streamed.divergence(candidate) == plain.divergence(candidate)
    assert streamed.divergence(weights) > 1e-3
    assert streamed.divergence({name: torch.full_like(value, 1e38) for name, value in weights.items()}) == math.inf
    assert not any(space.folder.iterdir())
    alone = nn.Sequential(nn.Embedding(96, 8), nn.Linear(8, 96))  # no chain of blocks: it runs whole
    judge = Judge(alone, as_batches([batch["input_ids"] for batch in text]), {"1": alone[1]}, None, space)
    assert judge.divergence({}) == pytest.approx(0, abs=1e-5)


def test_an_error_leaves_no_files(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(NonFiniteError):
        compress(model, batches(n=4), keep_ratio=0.6, workspace=tmp_path)
    assert not any(tmp_path.iterdir())
    assert model.state_dict().keys() == before.keys()


def test_a_planned_recipe_is_the_same(tmp_path: Path) -> None:
    model, text, settings = tiny_model("llama"), batches(n=4), settings_of(0.6, {"preset": "fast"})
    plain = predicted_plan(model, text, settings)
    assert plain.points
    assert predicted_plan(model, text, settings, workspace=tmp_path) == plain
    ranks = plan_ranks(model, text, keep_ratio=0.6, preset="fast", workspace=tmp_path)
    assert ranks.matrices == plain.plan.matrices
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="pages are dropped on Linux alone")
def test_an_export_of_mapped_weights_leaves_nothing_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", hidden_size=512, intermediate_size=1536, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "dense")
    mapped = type(model).from_pretrained(tmp_path / "dense", dtype="auto", attn_implementation="eager")
    round_weights(mapped, torch.float32)  # the type that they have: nothing is written to
    read = [parameter for parameter in mapped.parameters() if parameter.nbytes >= 2**16]
    release(read)
    states: list[int] = []

    def watched(*given: Any) -> None:
        states.append(resident(read))
        paging.save_tensors(*given)
        states.append(resident(read))

    monkeypatch.setattr("lowrank_lit.weights.save_tensors", watched)
    export(mapped, None, tmp_path / "model")
    assert len(states) == 2
    around = 2**17 * len(read)  # the kernel maps some pages around the one that is read, 64 KiB with it
    assert sum(parameter.nbytes for parameter in read) > 10 * around
    assert max(states) < around
    again = load(tmp_path / "model").state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert resident([*mapped.parameters()]) < around < resident([*model.parameters()])  # by the same account


def resident(tensors: list[Any]) -> int:
    """Bytes of tensors in memory, by the kernel's account of their pages."""
    found = 0
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        for tensor in tensors:
            first, last = tensor.data_ptr() // mmap.PAGESIZE, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
            pages.seek(8 * first)
            entries = np.frombuffer(pages.read(8 * (last - first)), dtype=np.uint64)
            found += int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE
    return found
