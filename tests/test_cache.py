"""A kept compression: the same factors come back, and whatever is wrong with the folder costs a warning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.compress import CompressionResult, compress, fingerprint
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.settings import Settings
from tests.disks import small_disk
from tests.test_surgery import factorise
from tests.tiny import batches, tiny_model

BATCHES = batches(n=8, structured=True)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(**BATCHES[0]).logits
    return result


def make(family: str = "qwen2", keep_ratio: float = 0.6, preset: str = "unirank") -> tuple[Any, CompressionResult]:
    """A compressed model; qwen2 has biases on some layers."""
    model = tiny_model(family)
    return model, compress(model, BATCHES, keep_ratio=keep_ratio, preset=preset, min_rank=4)


def is_dense(model: Any) -> bool:
    return not any(isinstance(module, FactoredLinear) for module in model.modules())


@pytest.mark.parametrize("preset", ["unirank", "best"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_comes_back_to_the_last_bit(family: str, preset: str, tmp_path: Path) -> None:
    model, result = make(family, preset=preset)
    save_compression(tmp_path / "kept" / "here", model, result)
    assert sorted(file.name for file in (tmp_path / "kept" / "here").iterdir()) == [
        "factors.safetensors",
        "plan.json",
        "record.json",
    ]
    again = tiny_model(family)
    dense = logits(again)
    loaded = load_compression(tmp_path / "kept" / "here", again, result.plan.fingerprint)
    assert loaded is not None
    assert loaded.plan == result.plan
    assert loaded.record == json.loads(json.dumps(result.record))
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), dense)
    factored = sum(entry.form == "factored" for entry in result.plan.matrices)
    assert sum(isinstance(module, FactoredLinear) for module in again.modules()) == factored >= 4
    assert all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_pivot_form_comes_back_to_the_last_bit(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    plan = replace(factorise(model, rank=9, form="pivot"), fingerprint="0123")
    save_compression(tmp_path, model, CompressionResult(plan, {"notes": []}))
    again = tiny_model(family)
    loaded = load_compression(tmp_path, again, "0123")
    assert loaded is not None
    assert loaded.plan == plan
    assert torch.equal(logits(again), logits(model))
    assert sum(isinstance(module, PivotLinear) for module in again.modules()) == len(plan.matrices)
    tensors = load_file(tmp_path / "factors.safetensors")
    del tensors[f"{plan.matrices[0].name}.positions"]
    save_file(tensors, tmp_path / "factors.safetensors")
    with pytest.warns(UserWarning, match="do not fit their plan"):
        assert load_compression(tmp_path, tiny_model(family), "0123") is None


def test_frozen_layers_stay_frozen(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    model.requires_grad_(False)
    model.model.layers[1].mlp.requires_grad_(True)
    result = compress(model, BATCHES, keep_ratio=0.6, min_rank=4)
    save_compression(tmp_path, model, result)
    again = tiny_model("qwen2")
    again.requires_grad_(False)
    again.model.layers[1].mlp.requires_grad_(True)
    assert load_compression(tmp_path, again, result.plan.fingerprint) is not None
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(flags.values()) == {True, False}
    assert {name: p.requires_grad for name, p in again.named_parameters()} == flags


@pytest.mark.filterwarnings("error")
def test_another_fingerprint_is_not_taken(tmp_path: Path) -> None:
    model, result = make()
    save_compression(tmp_path, model, result)
    again = tiny_model("qwen2")
    before = logits(again)
    assert load_compression(tmp_path, again, "0" * 32) is None
    assert load_compression(tmp_path / "none", again, result.plan.fingerprint) is None
    assert is_dense(again)
    assert torch.equal(logits(again), before)


def test_the_fingerprint_follows_weights_batches_and_settings() -> None:
    model = tiny_model("qwen2")
    seen = {
        fingerprint(model, BATCHES, Settings(0.6)),
        fingerprint(model, BATCHES, Settings(0.7)),
        fingerprint(model, BATCHES, Settings(0.6, metric="identity")),
        fingerprint(model, BATCHES, Settings(0.6, targets=["*.mlp.*"])),
        fingerprint(model, BATCHES[1:], Settings(0.6)),
        fingerprint(model.double(), BATCHES, Settings(0.6)),
        fingerprint(tiny_model("qwen2", seed=1), BATCHES, Settings(0.6)),
    }
    assert len(seen) == 7
    assert fingerprint(tiny_model("qwen2"), BATCHES, Settings(0.6)) in seen


def spoil(folder: Path, kind: str) -> None:
    factors, record = folder / "factors.safetensors", folder / "record.json"
    if kind == "truncated factors":
        factors.write_bytes(factors.read_bytes()[:-1000])
    elif kind == "empty factors":
        factors.write_bytes(b"")
    elif kind == "truncated record":
        record.write_text(record.read_text()[:-10])
    elif kind == "truncated plan":
        (folder / "plan.json").write_text((folder / "plan.json").read_text()[:-100])
    else:
        tensors = load_file(factors)
        name = next(name for name in tensors if name.endswith("q_proj.outer.bias"))
        if kind == "no bias":
            del tensors[name]
        elif kind == "foreign tensor":
            tensors["lm_head.weight"] = tensors[name].clone()
        else:
            weight = name.replace("bias", "weight")
            tensors[weight] = tensors[weight][:, :-1].contiguous()
        save_file(tensors, factors)


@pytest.mark.parametrize(
    "kind",
    [
        "truncated factors",
        "empty factors",
        "truncated record",
        "truncated plan",
        "no bias",
        "foreign tensor",
        "other rank",
    ],
)
def test_a_spoilt_file_costs_a_warning(kind: str, tmp_path: Path) -> None:
    model, result = make()
    save_compression(tmp_path, model, result)
    spoil(tmp_path, kind)
    again = tiny_model("qwen2")
    with pytest.warns(UserWarning, match="(cannot be read|do not fit their plan).*calibrating again"):
        assert load_compression(tmp_path, again, result.plan.fingerprint) is None
    assert is_dense(again)
    save_compression(tmp_path, model, result)  # what a run does after calibrating again
    assert load_compression(tmp_path, again, result.plan.fingerprint) is not None


@pytest.mark.parametrize("name", ["plan.json", "factors.safetensors", "record.json"])
@pytest.mark.filterwarnings("error")
def test_a_missing_file_makes_it_none(name: str, tmp_path: Path) -> None:
    model, result = make()
    save_compression(tmp_path, model, result)
    (tmp_path / name).unlink()
    assert load_compression(tmp_path, tiny_model("qwen2"), result.plan.fingerprint) is None


def test_a_file_in_place_of_the_folder_costs_a_warning(tmp_path: Path) -> None:
    model, result = make()
    before = logits(model)
    (tmp_path / "kept").write_text("in the way")
    with pytest.warns(UserWarning, match="could not be kept in '.*kept' .*; a second run will calibrate again"):
        save_compression(tmp_path / "kept", model, result)
    assert (tmp_path / "kept").read_text() == "in the way"
    assert torch.equal(logits(model), before)
    assert load_compression(tmp_path / "kept", tiny_model("qwen2"), result.plan.fingerprint) is None


@pytest.mark.parametrize("name", ["factors.safetensors", "plan.json", "record.json"])
def test_a_file_that_cannot_be_written_leaves_nothing_that_is_taken(name: str, tmp_path: Path) -> None:
    """A folder in a file's place cannot be overwritten; on a full disk the write fails at the same point."""
    model, result = make()
    old, other = make(keep_ratio=0.8)
    save_compression(tmp_path, old, other)
    (tmp_path / name).unlink()
    (tmp_path / name / "in the way").mkdir(parents=True)
    with pytest.warns(UserWarning, match="could not be kept"):
        save_compression(tmp_path, model, result)
    for identity in (result.plan.fingerprint, other.plan.fingerprint):
        assert load_compression(tmp_path, tiny_model("qwen2"), identity) is None
    assert not list(tmp_path.glob("*.new*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_a_warning(tmp_path: Path) -> None:
    model, result = make()
    (tmp_path / "record.json.new").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="could not be kept in .*[Nn]o space"):
        save_compression(tmp_path, model, result)
    assert load_compression(tmp_path, tiny_model("qwen2"), result.plan.fingerprint) is None


def test_a_full_disk_leaves_the_earlier_compression(tmp_path: Path) -> None:
    """Whatever it is that no longer fits: the factors, or what is written after them."""
    first, old = make(keep_ratio=0.8)
    second, new = make(keep_ratio=0.6)
    with small_disk(tmp_path / "disk", 2**21) as disk:
        folder = disk.folder / "compressed"
        save_compression(folder, first, old)
        kept = {file.name: file.read_bytes() for file in folder.iterdir()}
        disk.fill(20_000)
        assert len(kept["factors.safetensors"]) > 20_000
        with pytest.warns(UserWarning, match=r"could not be kept in .* a second run will calibrate again"):
            save_compression(folder, second, new)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == kept
        again = tiny_model("qwen2")
        assert load_compression(folder, again, new.plan.fingerprint) is None
        assert load_compression(folder, again, old.plan.fingerprint) is not None
        assert torch.equal(logits(again), logits(first))


def test_statistics_on_a_full_disk_cost_a_warning(tmp_path: Path) -> None:
    options: dict[str, Any] = {"keep_ratio": 0.6, "preset": "fast", "min_rank": 4}
    expected = compress(tiny_model("llama"), BATCHES, **options)
    with small_disk(tmp_path / "disk", 2**21) as disk:
        disk.fill(4_000)
        with pytest.warns(UserWarning, match=r"statistics could not be kept in .*a run that is interrupted will"):
            made = compress(tiny_model("llama"), BATCHES, resume=disk.folder, **options)
        assert [file.name for file in disk.folder.iterdir()] == ["filler"] * disk.mounted
    assert made.plan == expected.plan


def test_a_new_compression_replaces_the_old(tmp_path: Path) -> None:
    first, old = make(keep_ratio=0.8)
    second, new = make(keep_ratio=0.5)
    save_compression(tmp_path, first, old)
    save_compression(tmp_path, second, new)
    model = tiny_model("qwen2")
    assert load_compression(tmp_path, model, old.plan.fingerprint) is None
    assert load_compression(tmp_path, model, new.plan.fingerprint) is not None
    assert torch.equal(logits(model), logits(second))
