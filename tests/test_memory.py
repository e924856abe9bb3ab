"""What a watch counts, against allocations of known size."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from lowrank_lit import memory
from lowrank_lit.memory import Watch, resident, stage

MIB = 2**20
LINUX = pytest.mark.skipif(resident() is None, reason="resident memory is not told on this system")


def take(size: int) -> torch.Tensor:
    """Memory that is really there: every page is written to."""
    return torch.ones(size, dtype=torch.uint8)


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch("cpu", interval=0.005)
    made.start()
    yield made
    made.stop()


@LINUX
def test_resident_memory_is_told() -> None:
    before = resident()
    held = take(64 * MIB)
    after = resident()
    assert before is not None
    assert after is not None
    assert after.now - before.now == pytest.approx(held.nbytes, rel=0.05)
    assert after.largest >= after.now


def test_nothing_is_told_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for file in (tmp_path / "missing", tmp_path):
        monkeypatch.setattr(memory, "_STATUS", file)
        assert resident() is None
    (tmp_path / "status").write_text("Name:\tpython\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert resident() is None
    threads = threading.active_count()
    watch = Watch("cpu")
    watch.start()
    with stage("evaluate"):
        take(MIB)
    assert threading.active_count() == threads
    watch.stop()
    assert watch.used == {}


@LINUX
def test_each_stage_has_its_own_peak(watch: Watch) -> None:
    with stage("large"):
        held = take(192 * MIB)
        del held
    with stage("small"):  # a peak below the process's largest is seen by reading
        held = take(96 * MIB)
        time.sleep(0.05)
        del held
    with stage("none"):
        pass
    with stage("small"):
        take(32 * MIB)
    used = {name: size for (name, place), size in watch.used.items() if place == "host"}
    assert used["large"] == pytest.approx(192 * MIB, rel=0.05)
    assert used["small"] == pytest.approx(96 * MIB, rel=0.1)
    assert used["none"] < 8 * MIB


@LINUX
def test_the_inner_of_two_stages_counts(watch: Watch) -> None:
    with stage("outer"):
        kept = take(48 * MIB)  # beyond 32 MiB the C library never serves memory that it has kept
        with suppress(RuntimeError), stage("inner"):
            take(128 * MIB)
            raise RuntimeError
        time.sleep(0.03)
    assert watch.used["outer", "host"] == pytest.approx(kept.nbytes, rel=0.1)
    assert watch.used["inner", "host"] == pytest.approx(176 * MIB, rel=0.15)


def test_a_watch_ends() -> None:
    threads = threading.active_count()
    watch = Watch("cpu")
    watch.start()
    watch.enter("stage")
    watch.stop()
    watch.stop()
    seen = dict(watch.used)
    with stage("later"):
        watch.leave()
    assert threading.active_count() == threads
    assert watch.used == seen
    assert not memory._ON
