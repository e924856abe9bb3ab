"""Mapped tensors: what is read can be dropped, what was written stays."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lowrank_lit import paging
from lowrank_lit.errors import LowRankError
from lowrank_lit.memory import resident
from lowrank_lit.paging import Shelf, Workspace, give_back, release

linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are dropped on Linux alone")


def resident_files() -> int:
    """MiB of mapped files in memory."""
    found = re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def kept(tmp_path: Path, megabytes: int = 64) -> tuple[Tensor, Tensor]:
    value = torch.randn(megabytes * 2**18, generator=torch.Generator().manual_seed(0))
    return value, Workspace(tmp_path).keep({"value": value})["value"]


def test_what_is_kept_has_the_same_values_and_outlives_the_folder(tmp_path: Path) -> None:
    own = {"a": torch.randn(3, 5).T, "b": torch.arange(7), "c": torch.randn(4, dtype=torch.float64).bfloat16()}
    own["d"] = own["b"]  # shared memory
    workspace = Workspace(tmp_path / "new" / "folder")
    found = workspace.keep(own)
    assert workspace.keep({}) == {}
    workspace.close()
    assert not any((tmp_path / "new" / "folder").iterdir())
    for key, value in own.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


@linux
def test_pages_are_dropped_and_read_again(tmp_path: Path) -> None:
    value, mapped = kept(tmp_path)
    before = resident_files()
    assert torch.equal(mapped, value)
    assert resident_files() - before > 56
    assert release([mapped]) > 60 * 2**20
    assert resident_files() - before < 8
    assert torch.equal(mapped, value)


@linux
def test_a_mapping_that_was_written_to_stays(tmp_path: Path) -> None:
    value, mapped = kept(tmp_path, 8)
    mapped[12345] = 5.0
    value[12345] = 5.0
    assert release([mapped]) == 0
    assert torch.equal(mapped, value)


@linux
def test_weights_that_were_replaced_leave_memory(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from lowrank_lit.plan import MatrixPlan, RankPlan
    from lowrank_lit.surgery import apply_plan

    model = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024), nn.Linear(1024, 1024))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    before = resident_files()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
    last = model[2].weight.double().sum()
    assert sum(float(parameter.sum()) for parameter in model.parameters()) != 0.0  # read all of it
    assert resident_files() - before > 32
    matrices = (MatrixPlan("0", 4096, 1024, "factored", 8), MatrixPlan("1", 1024, 4096, "factored", 8))
    apply_plan(model, RankPlan(matrices, 0.1, "input", "uniform"))
    assert resident_files() - before < 12  # the last matrix keeps the mapping
    assert model[2].weight.double().sum() == last


@linux
def test_memory_of_small_tensors_goes_back() -> None:
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("it is glibc that keeps what was freed")
    small = [torch.ones(2048) for _ in range(8192)]
    fence = [torch.ones(2048) for _ in range(2)]  # the heap does not shrink below what is in use
    del small
    give_back()
    before = resident()
    assert before is not None
    small = [torch.ones(2048) for _ in range(8192)]
    last = small.pop()
    del small
    give_back()
    after = resident()
    assert after is not None
    assert after.now - before.now < 8 * 2**20  # of 64 MiB
    assert float(last.sum() + fence[0].sum()) == 4096


def test_ordinary_memory_stays() -> None:
    value = torch.randn(2**20)
    copy = value.clone()
    assert release([value, value[::2], torch.empty(5, device="meta"), torch.empty(0)]) == 0
    assert torch.equal(value, copy)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LowRankError, match=r"workspace='.*file' cannot be made .*; give a folder"):
        Workspace(tmp_path / "file")


@linux
def test_a_full_disk_is_named(tmp_path: Path) -> None:
    import resource

    workspace, value = Workspace(tmp_path), torch.zeros(2**20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        with pytest.raises(LowRankError, match=r"cannot take 4 MiB more after 0 MiB .*; free space"):
            workspace.keep({"value": value})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(workspace.folder.iterdir())


def test_a_workspace_is_refused_where_too_little_is_free(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.require(2**20)
    with pytest.raises(LowRankError, match=r"workspace='.*' has \d+ MiB free, and \d+ MiB at least .*; free space"):
        workspace.require(2**60)


@pytest.mark.parametrize("dtype", list(paging.DTYPES), ids=str)
def test_files_are_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    own = {"a": (100 * torch.rand(3, 5, generator=generator)).to(dtype).T, "b": torch.ones(7, dtype=torch.uint8)}
    own |= {"empty": torch.empty(0, 3), "number": torch.tensor(2.5, dtype=torch.float64), "again": own["a"]}
    paging.save_tensors(tmp_path / "file", own, {"key": "value"})
    with safe_open(tmp_path / "file", framework="pt") as opened:
        assert opened.metadata() == {"key": "value"}
        assert set(opened.keys()) == set(own)
        for key, value in own.items():
            found = opened.get_tensor(key)
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert torch.equal(found, value)


@linux
def test_states_beyond_the_budget_wait_on_the_disk(tmp_path: Path) -> None:
    states = [torch.full((2**18,), float(number)) for number in range(4)]  # 1 MiB each
    sizes = [state.nbytes for state in states]
    for budget, copies, in_memory in ((0, 1, 0), (2 * 2**20, 1, 2), (2 * 2**20, 2, 1), (2**30, 4, 4)):
        shelf = Shelf(Workspace(tmp_path, budget=budget), sizes, copies=copies)
        found = [shelf.put(number, state) for number, state in enumerate(states)]
        assert [own is state for own, state in zip(found, states, strict=True)] == [
            number < in_memory for number in range(4)
        ]
        for number, (own, state) in enumerate(zip(found, states, strict=True)):
            assert torch.equal(own, state)
            shelf.leave(number, own)
            assert torch.equal(own, state)
    shelf = Shelf(None, sizes)
    assert all(shelf.put(number, state) is state for number, state in enumerate(states))


@linux
def test_a_disk_that_takes_a_folder_and_no_more_is_refused_at_once(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(LowRankError, match=r"workspace='.*' cannot be made \(File too large\); give a folder"):
            Workspace(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


@linux
def test_pages_that_neighbours_share_are_dropped_unless_they_were_written_to(tmp_path: Path) -> None:
    own = {key: torch.randn(5001, generator=torch.Generator().manual_seed(7)) for key in "abc"}
    found = Workspace(tmp_path).keep(own)
    assert all(torch.equal(found[key], value) for key, value in own.items())
    assert release([found["b"]]) > found["b"].nbytes
    found["a"][-1] = 7.0  # on the page where b begins
    assert torch.equal(found["b"], own["b"])
    assert 0 < release([found["b"]]) < found["b"].nbytes
    assert float(found["a"][-1]) == 7.0
    assert torch.equal(found["b"], own["b"])
