"""The dry run's report: what it counts for, by number of GPUs, and the configurations that the package carries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_lit import _dry_run
from lowrank_lit._dry_run import dry_run_report, gemm_rate, read_gpus, without_devices
from lowrank_lit._recipes import find_recipe, recipes_folder
from lowrank_lit._session import build
from lowrank_lit._settings import read_settings
from lowrank_lit.errors import ModelError, RecipeError

CARRIED = sorted(path.stem for path in (recipes_folder() / "configs").glob("*.json"))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A Llama that is small enough to be measured in no time."""
    fields = json.loads((recipes_folder() / "configs/llama-2-7b.json").read_text())
    file = tmp_path / "small.json"
    file.write_text(json.dumps({**fields, "num_hidden_layers": 8}))
    return file


def report(recipe: str, config: Path | str | None = None, *changes: tuple[str, str], **options: Any) -> str:
    path = find_recipe(recipe)
    overrides = [("trainer.accelerator", "cpu"), *changes]
    return dry_run_report(build(path, read_settings(path, overrides)), config and str(config), **options)


def squeezed(text: str) -> str:
    """Without what aligns the columns of tables."""
    return re.sub(" +", " ", text)


def test_every_configuration_is_known_by_a_name() -> None:
    assert sorted(_dry_run._CARRIED_CONFIGS.values()) == [f"{name}.json" for name in CARRIED]
    for name, file in _dry_run._CARRIED_CONFIGS.items():
        for given in (name, file, file.removesuffix(".json")):
            assert _dry_run._carried(given) == recipes_folder() / "configs" / file
    assert _dry_run._carried("nobody/nothing") is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3-70b", 70_553_706_496),
        ("qwen3-235b-a22b", 235_093_634_560),
    ],
)
def test_carried_configurations_have_their_published_size(name: str, parameters: int) -> None:
    from transformers import AutoModelForCausalLM

    file = recipes_folder() / "configs" / f"{name}.json"
    assert json.loads(file.read_text())["_source"].startswith("Public config.json of ")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_dry_run._read_config(file), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_device_can_be_asked_for_where_there_is_none(small: Path) -> None:
    host = report("llama7b_40pct_lora", small)
    assert "The device is cpu, which is the host." in host
    assert "calibrate host" in squeezed(host)
    assert "calibrate device" not in squeezed(host)
    assert "Memory of each GPU" not in host
    for options in ({"accelerator": "cuda"}, {"accelerator": "gpu"}, {"gpus": "1,4"}):
        device = report("llama7b_40pct_lora", small, **options)
        assert "The device is cuda." in device
        assert "calibrate device weights of one block" in squeezed(device)
        assert "Memory of each GPU" in device
    assert "4 GPUs" in device
    assert "64 GPUs" not in device
    assert "Memory of each GPU" not in report("llama7b_40pct_lora", small, accelerator="cpu")


def test_a_recipe_for_many_gpus_is_counted_anywhere(small: Path) -> None:
    path = find_recipe("llama7b_40pct_lora")
    settings = read_settings(
        path, [("trainer.accelerator", "cuda"), ("trainer.devices", "8"), ("trainer.num_nodes", "2")]
    )
    out = dry_run_report(build(path, without_devices(settings)), str(small), gpus="16")
    assert "16 GPUs" in out
    assert settings["trainer"]["devices"] == 8, "a copy was changed"


def test_ways_and_stages_are_told_apart(small: Path) -> None:
    out = report("llama7b_40pct_lora", small, gpus="1,8")
    memory = out[out.index("Memory of each GPU") :]
    for way in ("calibrate in memory", "calibrate streamed", "recover ZeRO 0", "recover ZeRO 3", "checkpoint ZeRO 0"):
        assert way in squeezed(memory)
    assert "checkpoint ZeRO 2" not in squeezed(memory), "its processes write their pieces each"
    assert "at most (the budget)" in out
    assert "the peak is the largest of them, device " in out
    assert "2 checkpoints that are kept" in out, "the newest and the last"
    assert out.count("8,000 batches in each process") == 1  # 2000 steps of 4
    assert "TFLOP/s" not in out, "no time without a measured rate"


def test_remarks(small: Path) -> None:
    lora = report("llama7b_40pct_lora", small)
    assert "Hint: activations are" in lora
    assert "--model.gradient_checkpointing=true" in lora
    less = report("llama7b_40pct_lora", small, ("model.gradient_checkpointing", "true"))
    assert "Hint" not in less
    pages = report("llama7b_40pct_lora", small, ("model.optimizer", "paged_adamw"))
    assert "memory that the driver moves" in pages
    assert "memory that the driver moves" not in lora
    kept = [("ModelCheckpoint.save_last", "false"), ("ModelCheckpoint.save_top_k", "-1")]
    assert "8 checkpoints that are kept" in report("llama7b_40pct_lora", small, *kept)  # 2000 steps, one every 250
    none = [("trainer.enable_checkpointing", "false")]
    assert "checkpoint" not in report("quickstart", None, *none).split("recover  ")[-1]


def test_a_re_allocation_shows_its_schedule() -> None:
    out = report("progressive")
    assert "the budget falls from 0.5 (what the compression keeps, at most) of the target parameters to 0.4" in out
    assert "cubic, from step 0 to 60, every 5 steps (0.442 at 15, 0.413 at 30, 0.402 at 45)" in out


def test_a_rate_is_measured_before_a_time_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gemm_rate("cpu", torch.float32, seconds=0.0) > 1e6
    monkeypatch.setattr(_dry_run, "_RATE_SECONDS", 0.01)
    out = report("quickstart", measure_rate=True)
    assert "Times are at the rates just measured" in out
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="no GPU here to measure"):
            report("quickstart", measure_rate=True, accelerator="cuda")


def test_options_that_say_nothing() -> None:
    assert read_gpus("64,1,8,8") == (1, 8, 64)
    for text in ("", "none", "0", "1,-2", "1;2"):
        with pytest.raises(RecipeError, match="--gpus"):
            read_gpus(text)
    with pytest.raises(RecipeError, match="--accelerator"):
        report("quickstart", accelerator="abacus")
    with pytest.raises(ModelError, match="cannot be read"):
        report("quickstart", "nowhere.json")


def test_experts_are_counted(tmp_path: Path) -> None:
    fields = json.loads((recipes_folder() / "configs/qwen3-235b-a22b.json").read_text())
    file = tmp_path / "experts.json"
    file.write_text(json.dumps({**fields, "num_hidden_layers": 2}))
    every = report("llama7b_40pct_lora", file)
    count = 2 * 128 * (3072 * 4096 + 4096 * 1536)
    assert f"Experts: {count:,} parameters in 4 fused tensors, 8 of 128 at work for a token" in every
    assert "512 matrices of them are targets" in every
    assert "Target matrices (520)" in every
    assert "Layers that share an input could not be found" not in every


def test_a_workspace_is_counted(small: Path) -> None:
    changes = [("LowRankCompression.preset", "best"), ("LowRankCompression.workspace", "/scratch")]
    whole = report("llama7b_40pct_lora", small, changes[0])
    streamed = report("llama7b_40pct_lora", small, *changes)
    assert "forward and backward passes of the whole model" in whole
    assert "forward and backward passes, one block at a time" in streamed
    for line in ("weights of one block", "hidden states before and after one block", "inputs of all blocks"):
        assert line not in whole
        assert line in streamed
    by_gpus = {
        text.partition("Memory of each GPU")[2]
        for text in (
            report("llama7b_40pct_lora", small, changes[0], accelerator="cuda"),
            report("llama7b_40pct_lora", small, *changes, accelerator="cuda"),
        )
    }
    assert len(by_gpus) == 1  # both ways are shown there, whichever the recipe takes
