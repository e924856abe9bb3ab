"""Compressions by several real processes: the same plan and factors as by one, and a clear end where one fails."""

from __future__ import annotations

import json
import multiprocessing
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_lit import distributed
from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.compress import compress, fingerprint
from lowrank_lit.gradients import SampledTokenLoss
from lowrank_lit.settings import Settings
from tests.scripts import compress_together
from tests.tiny import batches, tiny_model


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def run(out: Path, size: int, preset: str, kind: str = "", folder: Path | None = None) -> list[tuple[int | None, str]]:
    """Exit status and error of each process of a compression, at most a minute later."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.scripts.compress_together"])  # imports once for all of them
    port = free_port()
    arguments = [(rank, size, port, out, preset, kind, folder) for rank in range(size)]
    processes = [context.Process(target=compress_together.start, args=own) for own in arguments]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 60
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    errors = [out / f"{size}-{rank}.txt" for rank in range(size)]
    texts = [file.read_text() if file.exists() else "" for file in errors]
    return [(process.exitcode, text) for process, text in zip(processes, texts, strict=True)]


def result(out: Path, size: int, rank: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    found = json.loads((out / f"{size}-{rank}.json").read_text())
    return found, torch.load(out / f"{size}-{rank}.pt")


def succeed(out: Path, size: int, preset: str, folder: Path | None = None, kind: str = "") -> None:
    for status, error in run(out, size, preset, kind, folder):
        assert status == 0, error


def without_measurements(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan without the figures that differ by the order of sums."""
    rows = [{key: row[key] for key in ("name", "rows", "columns", "form", "rank")} for row in plan["matrices"]]
    figures = ("matrices", "predicted_nats", "kept_energy", "notes", "hash")
    return {**{key: value for key, value in plan.items() if key not in figures}, "matrices": rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "kind"), [("unirank", ""), ("fast", ""), ("best", ""), ("unirank", "experts"), ("fast", "experts")]
)
def test_any_number_of_processes_makes_the_same(preset: str, kind: str, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        succeed(tmp_path, size, preset, kind=kind)
    alone, weights = result(tmp_path, 1, 0)
    assert sum(entry["form"] == "factored" for entry in alone["plan"]["matrices"]) >= 4
    for size in (2, 4):
        first, own = result(tmp_path, size, 0)
        assert without_measurements(first["plan"]) == without_measurements(alone["plan"])
        assert first["plan"]["notes"] == alone["plan"]["notes"]
        assert first["tokens"] == alone["tokens"]
        assert weights.keys() == own.keys()
        for name, weight in weights.items():
            assert torch.linalg.norm(weight - own[name]) <= 1e-6 * torch.linalg.norm(weight), name
        for rank in range(1, size):
            other, others = result(tmp_path, size, rank)
            assert other == first
            assert all(torch.equal(others[name], weight) for name, weight in own.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("preset", ["unirank", "fast"])
def test_a_killed_process_ends_the_others(size: int, preset: str, tmp_path: Path) -> None:
    *others, last = run(tmp_path, size, preset, "killed")
    assert last == (-signal.SIGKILL, "")
    for status, error in others:
        assert status == 3
        assert "has lost another process of the job" in error


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["unirank", "fast"])
def test_an_error_of_one_process_is_raised_in_all(preset: str, tmp_path: Path) -> None:
    ends = run(tmp_path, 3, preset, "raising")
    assert {status for status, _ in ends} == {3}
    messages = {error for _, error in ends}
    assert len(messages) == 1
    where = r"at model\.layers\.1" if preset == "unirank" else "the logits"
    assert re.match(f"NonFiniteError: .*{where}", messages.pop())


@pytest.mark.slow
def test_another_error_is_quoted(tmp_path: Path) -> None:
    (first, told), (second, own) = run(tmp_path, 2, "unirank", "bug")
    assert (first, second) == (3, 3)
    assert own == "RuntimeError: out of something"
    assert told == "LowRankError: process 1 of the job failed (RuntimeError: out of something); see its own messages"


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["unirank", "best"])
def test_an_interrupted_run_goes_on_from_its_statistics(preset: str, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    succeed(tmp_path, 2, preset, folder, "unsaved")
    assert [file.name for file in folder.iterdir()] == ["calibration.safetensors"]
    before, weights = result(tmp_path, 2, 1)
    succeed(tmp_path, 2, preset, folder)
    after, again = result(tmp_path, 2, 1)
    assert after["plan"] == before["plan"]
    assert after["passes"]["forward"] == pytest.approx(before["passes"]["forward"] - 1)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert sorted(file.name for file in folder.iterdir()) == ["factors.safetensors", "plan.json", "record.json"]
    # And now from the factors; in one process as well as in two.
    for size in (2, 1):
        succeed(tmp_path, size, preset, folder)
        last, kept = result(tmp_path, size, size - 1)
        assert last["loaded"]
        assert last["plan"] == before["plan"]
        assert all(torch.equal(kept[name], weight) for name, weight in weights.items())


@pytest.mark.slow
def test_a_fit_compresses_once(tmp_path: Path) -> None:
    """Lightning's own processes: they compress together, and the next fit takes what process 0 has kept."""
    folder = tmp_path / "run"
    succeed(tmp_path, 2, "unirank", folder, "fit")
    first = [result(tmp_path, 2, rank) for rank in (0, 1)]
    assert first[0][0]["plan"] == first[1][0]["plan"]
    assert all(torch.equal(first[1][1][name], value) for name, value in first[0][1].items())
    assert not first[0][0]["record"].get("from_cache")
    assert not (folder / "compressed" / "calibration.safetensors").exists()
    succeed(tmp_path, 2, "unirank", folder, "fit")
    for rank in (0, 1):
        found, weights = result(tmp_path, 2, rank)
        assert found["record"]["from_cache"]
        assert found["plan"] == first[0][0]["plan"]
        assert all(torch.equal(weights[name], value) for name, value in first[0][1].items())
    (folder / "compressed" / "record.json").unlink()
    for status, error in run(tmp_path, 2, "no such preset", "fit", folder):
        assert status == 3
        assert "no such preset" in error


def test_draws_that_others_make_are_left_out() -> None:
    model, data = tiny_model("llama"), batches(n=4, padding=True)
    whole = SampledTokenLoss()
    losses = [float(whole(model, batch)) for batch in data]
    part = SampledTokenLoss()
    part.skip(2)
    assert float(part(model, data[2])) == losses[2]
    assert float(part(model, data[3])) == losses[3]
    assert float(SampledTokenLoss()(model, data[2])) != losses[2]


def test_work_is_shared_out_by_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert distributed.owners([3.0, 1.0, 2.0]) == [0, 0, 0]
    monkeypatch.setattr(distributed, "_team", distributed._Team(0, 3, None))
    assert distributed.owners([1.0] * 7) == [0, 1, 2, 0, 1, 2, 0]
    assert distributed.owners([5.0, 1.0, 1.0, 1.0, 2.0]) == [0, 2, 2, 1, 1]
    assert distributed.owners([4.0]) == [0]
    assert distributed.owners([]) == []


def test_nothing_is_shared_without_a_job() -> None:
    tensor = torch.ones(2)
    with distributed.cooperating(), distributed.together("nothing"):
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.gather("nothing", 3) == [3]
        assert distributed.add_up(tensor) is tensor
        assert distributed.handed_out("nothing", 0, {"a": tensor})["a"] is tensor


def test_factors_that_were_changed_are_not_taken(tmp_path: Path) -> None:
    model, data = tiny_model("llama"), batches(n=4, structured=True)
    made = compress(model, data, keep_ratio=0.6, preset="unirank", min_rank=4)
    for kind in ("tensor", "plan"):
        save_compression(tmp_path, model, made)
        if kind == "tensor":
            with safe_open(tmp_path / "factors.safetensors", framework="pt") as opened:
                tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118
            next(iter(tensors.values()))[0, 0] += 1
            save_file(tensors, tmp_path / "factors.safetensors", metadata)
        else:
            replace(made.plan, requested_keep_ratio=0.7).save(tmp_path / "plan.json")
        with pytest.warns(UserWarning, match=r"do not match the hash .*; calibrating again"):
            assert load_compression(tmp_path, tiny_model("llama"), made.plan.fingerprint) is None


def test_the_fingerprint_follows_what_the_weights_do_not_say() -> None:
    data, settings = batches(n=2), Settings(0.6)
    scaled = tiny_model("llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    moved = tiny_model("llama")
    moved.config._name_or_path = "elsewhere"
    found = [fingerprint(model, data, settings) for model in (tiny_model("llama"), scaled, moved)]
    assert found[0] == found[2] != found[1]


def test_damaged_statistics_are_collected_again(tmp_path: Path) -> None:
    data = batches(n=4, structured=True)
    options: dict[str, Any] = {"keep_ratio": 0.6, "preset": "fast", "min_rank": 4}
    first = compress(tiny_model("llama"), data, resume=tmp_path, **options)
    file = tmp_path / "calibration.safetensors"
    again = compress(tiny_model("llama"), data, resume=tmp_path, **options)
    assert again.plan == first.plan
    assert again.record["passes"]["backward"] == first.record["passes"]["backward"] - 1
    content = bytearray(file.read_bytes())
    content[-3] ^= 255
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="kept statistics .* cannot be read .*calibrating again"):
        third = compress(tiny_model("llama"), data, resume=tmp_path, **options)
    assert third.plan == first.plan
    assert third.record["passes"] == first.record["passes"]
