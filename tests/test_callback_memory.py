"""MemoryReport in real fits: what it says before, what it measures, in which projects."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_lit import memory
from lowrank_lit.callbacks import (
    ExportOnFitEnd,
    FactorTuning,
    LowRankCompression,
    RankPreservingLoRA,
    RankReallocation,
    RankReport,
    Refinement,
)
from lowrank_lit.callbacks._run_shape import measure_config, run_shape
from lowrank_lit.callbacks.memory import MemoryReport
from lowrank_lit.corpus import embedded_text
from lowrank_lit.data import BlockDataset, TextDataModule
from lowrank_lit.estimate import estimate, measured_peaks, on_host, totals
from lowrank_lit.memory import resident
from lowrank_lit.module import LowRankModule
from tests.tiny import batches, tiny_model

BLOCKS = torch.cat([batch["input_ids"] for batch in batches(n=8)])
TEXT = [{"input_ids": block} for block in BLOCKS.split(4)]
LINUX = pytest.mark.skipif(resident() is None, reason="resident memory is not told on this system")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def text(tokenizer_folder: Path, tmp_path: Path) -> TextDataModule:
    (tmp_path / "text.txt").write_text(embedded_text("test")[:6000], encoding="utf-8")
    sizes = {"block_size": 32, "batch_size": 4, "calibration_blocks": 16, "evaluation_blocks": 6}
    sources = dict.fromkeys(("train", "calibration", "validation", "test"), str(tmp_path / "text.txt"))
    return TextDataModule(sources, str(tokenizer_folder), **sizes)  # type: ignore[arg-type]


def make_trainer(root: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    fixed: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
    }
    return pl.Trainer(**{**fixed, **settings}, callbacks=list(callbacks))


def compression(**settings: Any) -> LowRankCompression:
    return LowRankCompression(0.6, **{"min_rank": 4, "preset": "unirank", **settings})


@LINUX
def test_a_whole_run_is_estimated_and_measured(
    folder: Path, text: TextDataModule, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, report = LowRankModule(str(folder)), MemoryReport()
    callbacks = [report, compression(), Refinement(block_epochs=1), ExportOnFitEnd(), RankReport()]
    trainer = make_trainer(tmp_path, *callbacks)
    threads = threading.active_count()
    trainer.fit(module, text)
    assert threading.active_count() <= threads + 1, "no reader is left (a progress bar may keep its own thread)"
    assert not memory._ON
    out = capsys.readouterr().out
    before, after = out.index("Memory, estimated (the device is the host)"), out.index("Memory, estimated and used")
    assert before < after
    assert out.index("Low-rank compression") < after, "with the last evaluation in it"
    stages = json.loads((tmp_path / "record.json").read_text())["memory"]["stages"]
    assert list(stages) == ["compress", "refine", "recover", "evaluate", "export"]
    expected = measured_peaks(report.items)
    for stage, places in stages.items():
        assert list(places) == ["host"]
        assert places["host"]["estimated"] == expected[stage, "host"] > 0
        assert places["host"]["used"] >= 0
        assert stage in out[after:]
    assert stages["recover"]["host"]["used"] > 0
    # A second run takes the compression from the disk: there is nothing to measure of it.
    again = MemoryReport()
    make_trainer(tmp_path, again, compression(), RankPreservingLoRA(2)).fit(LowRankModule(str(folder)), text)
    assert again.record()["stages"]["compress"]["host"]["used"] is None
    assert "not measured" in capsys.readouterr().out


def test_run_is_the_same_with_the_report(folder: Path, text: TextDataModule, tmp_path: Path) -> None:
    weights = []
    for number, first in enumerate(([], [MemoryReport()])):
        pl.seed_everything(1, verbose=False)
        module = LowRankModule(str(folder), learning_rate=0.01)
        trainer = make_trainer(tmp_path / str(number), *first, compression(), RankPreservingLoRA(2, dropout=0.1))
        trainer.fit(module, text)
        weights.append(module.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def stages_of(trainer: pl.Trainer, module: LowRankModule, data: Any) -> dict[str, dict[str, int]]:
    """Items by stage."""
    size = measure_config(tiny_model("llama", vocab_size=300).config)
    shape = run_shape(trainer, module, data, weights=torch.float32, stored=torch.float32)
    found: dict[str, dict[str, int]] = {}
    for item in estimate(size, shape):
        found.setdefault(item.stage, {})[item.what] = item.bytes
    return found


def test_recovery_is_read_from_the_callbacks(folder: Path, text: TextDataModule, tmp_path: Path) -> None:
    plain = LowRankModule(str(folder))
    adapters = stages_of(make_trainer(tmp_path, compression(), RankPreservingLoRA(4)), plain, text)
    assert any("LoRA of rank 4" in what for what in adapters["recover"])
    tuned = stages_of(make_trainer(tmp_path, compression(), FactorTuning("inner")), plain, text)
    whole = stages_of(make_trainer(tmp_path, compression(), FactorTuning()), plain, text)
    gradients = "factors that train: gradients"
    assert 0 < tuned["recover"][gradients] < whole["recover"][gradients]
    every = stages_of(make_trainer(tmp_path, compression()), plain, text)
    assert every["recover"]["the whole model: gradients"] > whole["recover"][gradients]
    config = {"class_path": "peft.LoraConfig", "init_args": {"r": 3}}
    passed = stages_of(make_trainer(tmp_path, compression(), RankPreservingLoRA(config=config)), plain, text)
    assert any("LoRA of rank 3" in what for what in passed["recover"])
    assert "recover" not in stages_of(make_trainer(tmp_path, compression(), max_steps=0), plain, text)
    teacher = LowRankModule(
        str(folder), loss="mixed", optimizer="adamw", teacher_cache="cache", gradient_checkpointing=True
    )
    refined = stages_of(make_trainer(tmp_path, compression(), Refinement()), teacher, text)
    assert refined["refine"]
    assert refined["recover"]["predictions of the teacher, at most"] == 2 * 4 * 32 * 4 * 300
    assert refined["recover"]["factors that train: best state so far"] == whole["recover"][gradients]
    assert any("block by block" in what for what in refined["recover"])
    assert "refine" not in stages_of(make_trainer(tmp_path, compression(), Refinement(block_epochs=0)), teacher, text)
    progressive = stages_of(make_trainer(tmp_path, RankReallocation(0.4), FactorTuning()), plain, text)
    assert list(progressive) == ["reallocate", "mask", "recover", "evaluate", "export"]
    reported = stages_of(make_trainer(tmp_path, compression(), FactorTuning(), RankReport()), plain, text)
    assert reported.keys() - whole.keys() == {"report"}
    assert progressive["recover"][gradients] > whole["recover"][gradients]


def test_quantised_factors_are_read_from_the_callback(folder: Path, text: TextDataModule, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain = LowRankModule(str(folder), optimizer="paged_adamw8bit")
    lora = RankPreservingLoRA(4, quantize="nf4", quantize_factors="outer")
    found = stages_of(make_trainer(tmp_path, compression(), lora), plain, text)["recover"]
    assert "weights of the compressed model, outer factors in NF4" in found
    assert any("pages that the driver moves" in what for what in found)


class Classifier(pl.LightningModule):
    """What is no language model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def pictures() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(torch.randn(16, 12), torch.randint(0, 3, (16,))), batch_size=4)


def test_any_lightning_project(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = MemoryReport()
    settings = {"batches": [torch.randn(8, 12)], "metric": "input", "allocator": "uniform", "min_rank": 1}
    make_trainer(tmp_path, report, compression(**settings)).fit(Classifier(), pictures())
    out = capsys.readouterr().out
    sums = totals(report.items)
    assert list(sums) == [("recover", "host")], "all that is known of it"
    assert 0 < sums["recover", "host"] < 4 * 4 * (12 * 20 + 20 + 60 + 3)  # less than the dense model's
    assert "recover" in out[: out.index("Memory, estimated and used")]
    if resident() is not None:
        stages = report.record()["stages"]
        assert stages["compress"]["host"]["estimated"] is None
        assert stages["compress"]["host"]["used"] is not None
    report = MemoryReport()
    make_trainer(tmp_path, report).fit(Classifier(), pictures())
    assert totals(report.items)["recover", "host"] == 4 * 4 * (12 * 20 + 20 + 60 + 3)


def test_batches_of_unknown_training(folder: Path, tmp_path: Path) -> None:
    report = MemoryReport()
    module = LowRankModule(str(folder))
    loader = DataLoader(BlockDataset(BLOCKS), batch_size=4)
    make_trainer(tmp_path, report, compression(batches=TEXT), RankPreservingLoRA(2)).fit(module, loader)
    rows = {(item.stage, item.what): item.bytes for item in report.items}
    assert rows["calibrate", "hidden states of the calibration text"] == BLOCKS.numel() * 32 * 4
    assert not any("backward" in what or "logits" in what for stage, what in rows if stage == "recover")
    # The compressed model is trained on: it is no dense model any more.
    report = MemoryReport()
    make_trainer(tmp_path, report).fit(module, loader)
    assert {item.stage for item in report.items} == {"recover"}
    parameters = sum(parameter.numel() for parameter in module.parameters())
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    assert totals(report.items)["recover", "host"] == 4 * 4 * parameters + buffers


def test_failure_ends_the_watch(folder: Path, tmp_path: Path) -> None:
    report = MemoryReport()
    with pytest.raises(Exception, match="nothing"):
        make_trainer(tmp_path, report, compression(batches=TEXT, targets=["*.nothing"])).fit(
            LowRankModule(str(folder)), DataLoader(BlockDataset(BLOCKS), batch_size=4)
        )
    assert not memory._ON
    assert report.items == []


def test_reallocation_is_measured(folder: Path, text: TextDataModule, tmp_path: Path) -> None:
    report = MemoryReport()
    reallocation = RankReallocation(0.5, end=2, every=1, min_rank=2)
    make_trainer(tmp_path, report, reallocation, FactorTuning(), max_steps=3).fit(LowRankModule(str(folder)), text)
    stages = report.record()["stages"]
    assert list(stages)[:2] == ["reallocate", "recover"]
    assert on_host(report.items) == report.items
    if resident() is not None:
        assert stages["reallocate"]["host"]["used"] is not None
