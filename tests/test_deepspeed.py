"""ZeRO in real processes on the CPU: two of them learn what one does, and a killed job goes on where it was."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("deepspeed")
pytest.importorskip("bitsandbytes")

from lowrank_lit.cli import main
from lowrank_lit.hub import load
from tests.disks import small_disk
from tests.scripts.zero_fit import LENGTH, RECOVERIES, save_mixture, save_model, start
from tests.tiny import batches, tiny_model

pytestmark = pytest.mark.slow
STEPS = 10
SAVED: dict[str, Any] = {"validate_every": 4, "save_every": 5, "export": True}
TOLERANCE = 1e-3
"""Greatest relative difference of a loss; what is seen is 1e-7."""


def result(folder: Path, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"result-{rank}.json").read_text())
    return found


def difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other) > 0
    return max(abs(a - b) / max(abs(a), 1e-9) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    save_model(folder / "model")
    return folder


def fits(work: Path, name: str, *settings: dict[str, Any]) -> list[dict[str, Any]]:
    common = {"model": str(work / "model"), "steps": STEPS}
    return [{"folder": str(work / f"{name}-{s.get('stage', 0)}-{s['kind']}"), **common, **s} for s in settings]


@pytest.fixture(scope="module")
def one(work: Path) -> Path:
    """The same fits in one process without DeepSpeed."""
    made = fits(work, "one", *({"kind": kind, **SAVED} for kind in RECOVERIES))
    assert start(work / "job-one", made, 1) == 0, (work / "job-one" / "job.log").read_text()[-4000:]
    return work


@pytest.fixture(scope="module")
def whole(one: Path) -> Path:
    """Stages 1 and 2 in two processes."""
    made = fits(
        one,
        "two",
        {"kind": "lora", "stage": 1, **SAVED},
        {"kind": "qlora", "stage": 2, **SAVED},
        {"kind": "factors", "stage": 2, **SAVED, "offload": "optimizer"},
    )
    made += fits(one, "nan", {"kind": "lora", "stage": 2, "save_every": 1, "nan_at": 2, "fails": True})
    assert start(one / "job-whole", made, 2) == 0, (one / "job-whole" / "job.log").read_text()[-4000:]
    return one


@pytest.fixture(scope="module")
def split(one: Path) -> Path:
    """Stage 3 in two processes."""
    made = fits(
        one,
        "two",
        {"kind": "lora", "stage": 3, **SAVED, "offload": "all"},
        {"kind": "qlora", "stage": 3, **SAVED},
        {"kind": "factors", "stage": 3, **SAVED},
    )
    made += fits(one, "nan", {"kind": "lora", "stage": 3, "save_every": 1, "nan_at": 2, "fails": True})
    assert start(one / "job-split", made, 2) == 0, (one / "job-split" / "job.log").read_text()[-4000:]
    return one


def same_as_one(work: Path, stage: int, kind: str) -> None:
    alone, together = result(work / f"one-0-{kind}"), result(work / f"two-{stage}-{kind}")
    assert len(together["losses"]) == STEPS
    assert alone["losses"][-1] < 0.95 * alone["losses"][0]  # it learns something
    # A validation of the sanity check comes before, and others between, the steps.
    assert difference(alone["losses"], together["losses"]) < TOLERANCE
    assert difference(alone["validation"], together["validation"]) < TOLERANCE
    for rank in range(2):
        ended = result(work / f"two-{stage}-{kind}", rank)
        assert ended["rank"] == rank
        assert ended["split"] == 0
        assert ended["trains"] == alone["trains"]
        assert ended["plain"] == alone["plain"]
        assert "peft" not in ended["plain"]
        torch.testing.assert_close(torch.tensor(ended["logits"]), torch.tensor(alone["logits"]), rtol=0, atol=1e-2)
    if kind != "factors":
        merged = together["merge"]
        assert merged["factor_parameters_after"] == merged["factor_parameters_before"]  # the rank is kept
        assert merged["largest_relative_difference"] < 1e-5
    exported, reference = (load(work / f"{name}-{kind}" / "model") for name in (f"two-{stage}", "one-0"))
    batch = batches(n=1, length=LENGTH, seed=3)[0]
    with torch.no_grad():
        torch.testing.assert_close(exported(**batch).logits, reference(**batch).logits, rtol=0, atol=1e-2)


@pytest.mark.parametrize(("stage", "kind"), [(1, "lora"), (2, "qlora"), (2, "factors")])
def test_stages_1_and_2_are_one_process(whole: Path, stage: int, kind: str) -> None:
    same_as_one(whole, stage, kind)


@pytest.mark.parametrize("kind", RECOVERIES)
def test_stage_3_is_one_process(split: Path, kind: str) -> None:
    """Weights, packed 4-bit ones too, are split and whole again when the fit ends; so are those kept on the host."""
    same_as_one(split, 3, kind)


def convert(checkpoint: Path, model: Path, output: Path) -> dict[str, torch.Tensor]:
    assert main(["convert", str(checkpoint), "--model", str(model), "--output", str(output)]) == 0
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize(
    ("stage", "kind"), [(0, "qlora"), (1, "lora"), (2, "qlora"), (3, "lora"), (3, "qlora"), (3, "factors")]
)
def test_a_checkpoint_converts_to_what_the_fit_exports(
    whole: Path, split: Path, tmp_path: Path, stage: int, kind: str
) -> None:
    made = whole / f"{'two' if stage else 'one'}-{stage}-{kind}"
    converted = convert(made / "checkpoints" / "last.ckpt", whole / "model", tmp_path / "model")
    exported = load_file(made / "model" / "model.safetensors")
    assert converted.keys() == exported.keys()
    for name, weight in exported.items():
        assert torch.equal(converted[name], weight), name
    assert (tmp_path / "model" / "config.json").read_text() == (made / "model" / "config.json").read_text()


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_or_truncated_part_is_named(
    whole: Path, split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: int
) -> None:
    kind, states = ("qlora", "") if stage == 2 else ("lora", "zero_pp_rank_0_")
    path = tmp_path / "last.ckpt"
    shutil.copytree(whole / f"two-{stage}-{kind}" / "checkpoints" / "last.ckpt", path)
    for name in ("zero_pp_rank_1_mp_rank_00_optim_states.pt", f"{states}mp_rank_00_model_states.pt"):
        file = path / "checkpoint" / name
        content = file.read_bytes()
        for length, message in ((None, "is missing"), (len(content) - 1000, "(is truncated|cannot be read)")):
            file.unlink() if length is None else file.write_bytes(content[:length])
            output = ["--model", str(whole / "model"), "--output", str(tmp_path / "model")]
            assert main(["convert", str(path), *output]) == 2
            error = capsys.readouterr().err
            assert re.search(f"{name}' {message}", error)
            assert error.count("\n") == 1
            assert not (tmp_path / "model").exists()
        file.write_bytes(content)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("stage", "kind"), [(1, "lora"), (2, "qlora"), (3, "lora")])
def test_a_checkpoint_of_other_processes_or_stage_is_refused(
    whole: Path, split: Path, tmp_path: Path, stage: int, kind: str
) -> None:
    """By the command before anything is computed, and by a program's own fit when it is to be loaded."""
    source = whole / f"two-{stage}-{kind}"
    made = []
    for number, resume in enumerate((True, str(tmp_path / "0" / "checkpoints" / "last.ckpt"))):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("result-*", "model"))
        settings = {"kind": kind, "save_every": 5, "steps": STEPS, "model": str(whole / "model"), "fails": True}
        made.append({"folder": str(folder), **settings, "stage": stage, "resume": resume})
    before = [snapshot(Path(fit["folder"])) for fit in made]
    assert start(tmp_path / "job-one", made, 1) == 0, (tmp_path / "job-one" / "job.log").read_text()[-4000:]
    for fit, files in zip(made, before, strict=True):
        found = snapshot(Path(fit["folder"]))
        error = found.pop("error-0.txt").decode()
        assert "was written by 2 processes, and this run has 1: resume with trainer.devices" in error
        assert "\n" not in error
        assert found == files
    other = [{**fit, "stage": 2 if stage == 3 else 3} for fit in made]
    assert start(tmp_path / "job-two", other, 2) == 0, (tmp_path / "job-two" / "job.log").read_text()[-4000:]
    for fit in made:
        for rank in range(2):
            error = (Path(fit["folder"]) / f"error-{rank}.txt").read_text()
            assert f"was written in ZeRO stage {'3' if stage == 3 else '1 or 2'}, and this run has stage" in error


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(work: Path, tmp_path: Path, stage: int) -> None:
    """Every process ends with the same line, nothing is left of the new one, and from the old one the fit goes on."""
    common = {"kind": "lora", "stage": stage, "steps": 6, "save_every": 2, "model": str(work / "model")}
    with small_disk(tmp_path / "disk", 40 * 2**20) as disk:
        if not disk.mounted:
            pytest.skip("needs a small disk, which root may mount")
        folder = disk.folder / "run"
        assert start(tmp_path / "whole", [{**common, "folder": str(tmp_path / "reference")}], 2) == 0
        full = [{**common, "folder": str(folder), "fill_at": 3, "fails": True}]
        assert start(tmp_path / "full", full, 2) == 0, (tmp_path / "full" / "job.log").read_text()[-4000:]
        messages = [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]
        assert messages[0] == messages[1]
        assert "last.ckpt' cannot be written (process" in messages[0]
        assert "\n" not in messages[0]
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["last.ckpt"]
        (folder / "filler").unlink()
        resumed = [{**common, "folder": str(folder), "resume": True}]
        assert start(tmp_path / "resumed", resumed, 2) == 0, (tmp_path / "resumed" / "job.log").read_text()[-4000:]
        assert difference(result(tmp_path / "reference")["losses"][2:], result(folder)["losses"]) < 1e-6


def test_an_export_on_a_full_disk_ends_every_process(work: Path, tmp_path: Path) -> None:
    """The recovery is not lost with it: its checkpoint is there."""
    common = {"kind": "lora", "stage": 3, "steps": 4, "save_every": 2, "model": str(work / "model"), "export": True}
    with small_disk(tmp_path / "disk", 40 * 2**20) as disk:
        if not disk.mounted:
            pytest.skip("needs a small disk, which root may mount")
        folder = disk.folder / "run"
        made = [{**common, "folder": str(folder), "fill_at": -1, "fails": True}]
        assert start(tmp_path / "full", made, 2) == 0, (tmp_path / "full" / "job.log").read_text()[-4000:]
        messages = [(folder / f"error-{rank}.txt").read_text() for rank in range(2)]
        assert messages[0] == messages[1]
        assert re.search(r"path='.*model' cannot be written \(.*No space .*\); free space", messages[0])
        left = sorted(file.name for file in folder.iterdir())
        assert left == ["checkpoints", "compressed", "error-0.txt", "error-1.txt", "filler", "plan.json", "unmerge"]
        checkpoint = folder / "checkpoints" / "last.ckpt"
        assert convert(checkpoint, work / "model", tmp_path / "model")


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_shard_that_one_process_cannot_read_ends_all(work: Path, tmp_path: Path, damage: str) -> None:
    for rank in range(2):
        tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / f"dense-{rank}", max_shard_size="20kB")
    bad = sorted((tmp_path / "dense-1").glob("model-*.safetensors"))[1]
    bad.unlink() if damage == "missing" else bad.write_bytes(bad.read_bytes()[:-1])
    settings = {"kind": "lora", "stage": 3, "steps": 1, "model": str(tmp_path / "dense-{rank}"), "fails": True}
    made = [{"folder": str(tmp_path / "run"), **settings}]
    assert start(tmp_path / "job", made, 2) == 0, (tmp_path / "job" / "job.log").read_text()[-4000:]
    messages = [(tmp_path / "run" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert f"{bad}' is missing, truncated" in messages[0]
    assert "check that the folder is complete" in messages[0]


def test_stage_3_without_a_compression(one: Path, tmp_path: Path) -> None:
    """An export is trained on as in one process, and recovery of a dense model is refused in every process."""
    settings = {"compresses": False, "steps": STEPS, "model": str(one / "one-0-lora" / "model"), "export": True}
    kinds = ("factors", "lora")
    alone = [{"folder": str(tmp_path / f"one-{kind}"), "kind": kind, **settings} for kind in kinds]
    assert start(tmp_path / "job-one", alone, 1) == 0, (tmp_path / "job-one" / "job.log").read_text()[-4000:]
    made = [{"folder": str(tmp_path / f"two-{kind}"), "kind": kind, "stage": 3, **settings} for kind in kinds]
    dense = {**settings, "model": str(one / "model"), "stage": 3, "fails": True}
    made += [{"folder": str(tmp_path / f"dense-{kind}"), "kind": kind, **dense} for kind in kinds]
    assert start(tmp_path / "job-two", made, 2) == 0, (tmp_path / "job-two" / "job.log").read_text()[-4000:]
    batch = batches(n=1, length=LENGTH, seed=3)[0]
    for kind in kinds:
        own, other = tmp_path / f"one-{kind}", tmp_path / f"two-{kind}"
        assert difference(result(own)["losses"], result(other)["losses"]) < TOLERANCE
        with torch.no_grad():
            expected, found = (load(folder / "model")(**batch).logits for folder in (own, other))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
        for rank in range(2):
            error = (tmp_path / f"dense-{kind}" / f"error-{rank}.txt").read_text()
            assert "has no factored layer when" in error
            assert "list LowRankCompression before" in error


@pytest.mark.parametrize("stage", [2, 3])
def test_a_gradient_that_is_not_finite_stops_every_process(whole: Path, split: Path, stage: int) -> None:
    """Of one process alone: before the step, so that the weights and the last checkpoint are good."""
    for rank in range(2):
        error = (whole / f"nan-{stage}-lora" / f"error-{rank}.txt").read_text()
        assert error.startswith("a gradient is NaN or infinite at step 2; the last good checkpoint is ")


def test_a_sequential_schedule_is_one_process(work: Path) -> None:
    """Norms count the factor that moves alone, and the other's moments begin when its turn comes; after a resume too.

    What is seen is 5e-6, where losses fall from 105 to 13; with a rate of zero for the paused factor it was 0.2.
    """
    common: dict[str, Any] = {"steps": 20, "schedule": "sequential"}
    alone = [{**common, "kind": kind} for kind in ("lora", "qlora")]
    fails: dict[str, Any] = {**common, "kind": "lora", "save_every": 5, "nan_at": 7, "fails": True}
    together = [{**common, "kind": "lora", "stage": stage} for stage in (1, 2, 3)]
    together += [{**common, "kind": "qlora", "stage": 2, "offload": "optimizer"}]
    made = fits(work, "turns", *together)
    for stage in (2, 3):
        (stopped,) = fits(work, "stopped", {**fails, "stage": stage})
        made += [stopped, {**stopped, "nan_at": None, "fails": False, "resume": True}]
    for name, own, processes in (("turns-one", fits(work, "turns", *alone), 1), ("turns-two", made, 2)):
        assert start(work / name, own, processes) == 0, (work / name / "job.log").read_text()[-4000:]
    reference = result(work / "turns-0-lora")["losses"]
    assert reference[-1] < 0.5 * reference[0]
    for stage in (1, 2, 3):
        assert difference(reference, result(work / f"turns-{stage}-lora")["losses"]) < TOLERANCE
    for stage in (2, 3):
        assert difference(reference[5:], result(work / f"stopped-{stage}-lora")["losses"]) < TOLERANCE
    quantised = (result(work / f"turns-{stage}-qlora")["losses"] for stage in (0, 2))
    assert difference(*quantised) < TOLERANCE


def test_experts_train_in_several_processes(work: Path) -> None:
    """Processes send tokens to different experts; every one gathers all weights and has a gradient for all."""
    save_mixture(work / "mixture")
    settings = {"kind": "lora", "model": str(work / "mixture"), "quantum": 1, "export": True}
    alone = fits(work, "experts", settings)
    job = work / "job-experts"
    assert start(job, alone, 1) == 0, (job / "job.log").read_text()[-4000:]
    together = fits(work, "experts", *({**settings, "stage": stage} for stage in (2, 3)))
    assert start(job, together, 2) == 0, (job / "job.log").read_text()[-4000:]
    expected = result(work / "experts-0-lora")["losses"]
    for stage in (2, 3):
        assert difference(expected, result(work / f"experts-{stage}-lora")["losses"]) < TOLERANCE
        assert (work / f"experts-{stage}-lora" / "model" / "model.safetensors").is_file()


def test_a_killed_job_ends_and_goes_on(split: Path) -> None:
    """One process of two gets SIGKILL: the other ends by itself, and a resumed job ends as one that never stopped."""
    settings = {"kind": "qlora", "stage": 3, "validate_every": 4, "save_every": 5}
    made = fits(split, "killed", settings)
    folder = Path(made[0]["folder"])
    status = start(split / "job-killed", [{**made[0], "kill_at": 7, "processes": 2}], 2, launcher=False)
    assert status != 0
    assert time.time() - float((folder / "killed").read_text()) < 60
    assert start(split / "job-resumed", [{**made[0], "resume": True}], 2) == 0
    resumed, reference = result(folder), result(split / "two-3-qlora")
    assert difference(resumed["losses"], reference["losses"][5:]) < 1e-6
    assert difference(resumed["logits"], reference["logits"]) < 1e-4
