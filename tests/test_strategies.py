"""The settings of the DeepSpeed strategy, and what reads its checkpoints; no process is started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lowrank_lit._checkpoints import damage, find_shards, gather_shards, require_shards, resolve_checkpoint
from lowrank_lit._session import build
from lowrank_lit.callbacks.export import refuse_sharded
from lowrank_lit.cli import main
from lowrank_lit.errors import ExportError, LowRankError, ModelError
from lowrank_lit.strategies import LowRankDeepSpeed

needs_deepspeed = pytest.mark.skipif("not __import__('importlib').util.find_spec('deepspeed')", reason="no deepspeed")


@pytest.fixture(autouse=True)
def no_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LowRankDeepSpeed.DEEPSPEED_ENV_VAR, raising=False)


def test_a_missing_deepspeed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        LowRankError, match=r"LowRankDeepSpeed needs DeepSpeed .* pip install 'lowrank-lit\[deepspeed\]'"
    ):
        LowRankDeepSpeed()


@needs_deepspeed
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": 0}, r"stage=0 is out of range; choose 1, 2 or 3, or strategy=ddp"),
        ({"stage": 4}, "stage=4 is out of range"),
        ({"offload": "nvme"}, "offload='nvme' is unknown; choose one of none, optimizer, all"),
        ({"stage": 2, "offload": "all"}, "stage 2 does not split them; set stage=3"),
        ({"timeout": 0.0}, "timeout=0.0 is out of range"),
        ({"stage": 3, "config": {"zero_optimization": {"stage": 2}}}, "contradict each other"),
        ({"offload": "none", "config": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}}, "contradict"),
        ({"offload": "optimizer", "config": {"zero_optimization": {"offload_optimizer": {}}}}, "contradict"),
        ({"config": {"optimizer": {"type": "Adam"}}}, "would replace what the module trains with.* model.optimizer"),
        ({"config": "absent.json"}, "config='absent.json' cannot be read"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        LowRankDeepSpeed(**settings)


@needs_deepspeed
def test_what_a_configuration_leaves_open_is_filled_in(tmp_path: Path) -> None:
    raw = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}, "gradient_clipping": 0.5}
    (tmp_path / "zero.json").write_text(json.dumps(raw))
    for given in (raw, tmp_path / "zero.json", str(tmp_path / "zero.json")):
        strategy = LowRankDeepSpeed(config=given, offload="all")
        assert isinstance(strategy.config, dict)
        zero = strategy.config["zero_optimization"]
        assert (strategy.stage, zero["reduce_bucket_size"], strategy.config["gradient_clipping"]) == (3, 7, 0.5)
        assert zero["offload_optimizer"] == zero["offload_param"] == {"device": "cpu"}
        assert strategy.zero_stage_3
    assert raw["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 7}  # the caller's own is left alone
    assert LowRankDeepSpeed().stage == 2
    assert LowRankDeepSpeed(1, offload="none").config["zero_optimization"].get("offload_optimizer") is None  # type: ignore[index]


@needs_deepspeed
def test_a_recipe_names_it_by_its_class(tmp_path: Path) -> None:
    def settings(**arguments: Any) -> dict[str, Any]:
        strategy = {"class_path": "lowrank_lit.strategies.LowRankDeepSpeed", "init_args": arguments}
        return {
            "trainer": {"strategy": strategy, "accelerator": "cpu", "devices": 2, "default_root_dir": str(tmp_path)},
            "model": {"model": {"model_type": "llama"}},
            "data": {"sources": {"calibration": "embedded:calibration"}, "tokenizer": "absent"},
        }

    strategy = build(tmp_path / "x.yaml", settings(stage=3, offload="optimizer", timeout=60)).trainer.strategy
    assert isinstance(strategy, LowRankDeepSpeed)
    assert (strategy.stage, strategy.parallel_devices) == (3, [torch.device("cpu")] * 2)
    assert build(tmp_path / "x.yaml", settings(config={"zero_optimization": {"stage": 1}})).trainer.strategy.stage == 1  # type: ignore[attr-defined]
    with pytest.raises(LowRankError, match="stage=5 is out of range"):
        build(tmp_path / "x.yaml", settings(stage=5))


@needs_deepspeed
def test_only_what_needs_whole_weights_during_the_fit_is_refused(tmp_path: Path) -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    def trainer(strategy: Any) -> pl.Trainer:
        return pl.Trainer(accelerator="cpu", devices=1, strategy=strategy, default_root_dir=tmp_path, logger=False)

    whole = trainer(LowRankDeepSpeed(3))
    refuse_sharded(whole, "ExportOnFitEnd", at_end=True)
    with pytest.raises(ModelError, match="Refinement needs them whole; use DDP or DeepSpeed ZeRO stage 1 or 2"):
        refuse_sharded(whole, "Refinement")
    refuse_sharded(trainer(LowRankDeepSpeed(2)), "Refinement")
    for strategy in (DeepSpeedStrategy(stage=3), FSDPStrategy()):
        other: Any = SimpleNamespace(strategy=strategy)  # on a CPU Lightning makes no trainer of FSDP
        with pytest.raises(ModelError, match=r"use DDP or lowrank_lit\.strategies\.LowRankDeepSpeed"):
            refuse_sharded(other, "ExportOnFitEnd", at_end=True)


# --- folders of parts ------------------------------------------------------------------------------------------------


def write_parts(path: Path, *, stage: int, processes: int = 2, kind: str = "") -> Path:
    """A folder laid out like DeepSpeed's."""
    folder = path / "checkpoint"
    folder.mkdir(parents=True)
    states = {"module": {"weight": torch.ones(2)}, "dp_world_size": processes, "callbacks": {}}
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(processes)]
    for name in names if stage == 3 else ["mp_rank_00_model_states.pt"]:
        torch.save(states, folder / name)
    for rank in range(processes):
        torch.save({}, folder / f"{kind}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (path / "latest").write_text("checkpoint")
    return path


@pytest.mark.parametrize(("stage", "kind"), [(2, ""), (2, "bf16_"), (3, ""), (3, "bf16_")])
def test_every_part_of_a_checkpoint_is_counted(tmp_path: Path, stage: int, kind: str) -> None:
    path = write_parts(tmp_path / "last.ckpt", stage=stage, processes=3, kind=kind)
    shards = find_shards(path)
    assert (shards.processes, shards.stage) == (3, stage)
    assert damage(path) is None
    for file in sorted((path / "checkpoint").iterdir()):
        content = file.read_bytes()
        file.unlink()
        assert file.name in (damage(path) or "")
        for length in (len(content) - 1, len(content) // 2, 0):
            file.write_bytes(content[:length])
            assert file.name in (damage(path) or "")
            with pytest.raises(ExportError, match=rf"last\.ckpt' cannot be resumed from: .*{file.name}"):
                require_shards(path, processes=3, stage=stage)
        file.write_bytes(content)
    (path / "latest").unlink()
    assert damage(path) == "a folder without DeepSpeed's file 'latest'"


def test_a_folder_of_other_processes_says_what_to_do(tmp_path: Path) -> None:
    path = write_parts(tmp_path / "checkpoints" / "last.ckpt", stage=3)
    require_shards(path, processes=2, stage=3)
    remedy = (
        r"resume with trainer.devices times trainer.num_nodes = 2; `lowrank-lit convert .*last\.ckpt` makes a model"
    )
    with pytest.raises(ExportError, match=rf"written by 2 processes, and this run has 4: {remedy}"):
        require_shards(path, processes=4, stage=3)
    with pytest.raises(ExportError, match="written in ZeRO stage 3, and this run has stage 2: resume with the stage"):
        require_shards(path, processes=2, stage=2)
    trainer = pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, logger=False)
    with pytest.raises(ExportError, match="is DeepSpeed's, resume with the strategy that wrote it"):
        resolve_checkpoint(trainer, "last")


@needs_deepspeed
def test_last_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    write_parts(tmp_path / "checkpoints" / "last.ckpt", stage=3)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, strategy=LowRankDeepSpeed(3), default_root_dir=tmp_path, logger=False
    )
    with pytest.raises(ExportError, match="written by 2 processes, and this run has 1"):
        resolve_checkpoint(trainer, "last")
    file = tmp_path / "checkpoints" / "plain.ckpt"
    torch.save({"state_dict": {}, "optimizer_states": []}, file)
    with pytest.raises(ExportError, match=r"plain\.ckpt' is a file, and DeepSpeed resumes from its own folders"):
        resolve_checkpoint(trainer, str(file))


def test_stages_1_and_2_are_gathered_without_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    gathered = gather_shards(write_parts(tmp_path / "two.ckpt", stage=2))
    assert gathered["state_dict"]["weight"].tolist() == [1, 1]
    with pytest.raises(LowRankError, match=r"stage 3 .* needs DeepSpeed .*lowrank-lit\[deepspeed\]"):
        gather_shards(write_parts(tmp_path / "three.ckpt", stage=3))


def test_convert_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_parts(tmp_path / "last.ckpt", stage=2)
    (path / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    output = ["--model", "absent", "--output", str(tmp_path / "model")]
    for arguments, message in (
        (["convert", str(path), *output], "zero_pp_rank_1_mp_rank_00_optim_states.pt' is missing, 1 of 2 parts are"),
        (["convert", str(tmp_path / "no.ckpt"), *output], "no.ckpt' does not exist"),
        (["convert", str(path)], "lowrank-lit convert: the following arguments are required: --model, --output"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
