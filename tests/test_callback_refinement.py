"""Refinement in real fits: blocks first, only factors train, the best state stays, resume, what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_lit.callbacks import LowRankCompression, RankPreservingLoRA
from lowrank_lit.callbacks.refinement import Refinement
from lowrank_lit.data import BlockDataset
from lowrank_lit.errors import DataError, ModelError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.module import LowRankModule
from tests.tiny import batches, tiny_model

BLOCKS = torch.cat([batch["input_ids"] for batch in batches(n=16, structured=True)])
ONE_WORD = torch.full_like(BLOCKS, int(torch.bincount(BLOCKS.flatten()).argmin()))
"""A text that has nothing to teach about any other."""
TEXT = [{"input_ids": block} for block in BLOCKS.split(8)]


def loader(blocks: Tensor = BLOCKS, **settings: Any) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(BlockDataset(blocks), batch_size=8, **settings)


def own_predictions(folder: Path) -> DataLoader[dict[str, Tensor]]:
    """What the dense model itself would write, so that every change of it does harm."""
    module = LowRankModule(str(folder))
    with torch.no_grad():
        said = module.load_teacher()(input_ids=BLOCKS).logits.argmax(-1)
    labels = torch.cat([BLOCKS[:, :1], said[:, :-1]], 1)
    return DataLoader([{"input_ids": a, "labels": b} for a, b in zip(BLOCKS, labels, strict=True)], batch_size=8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def trainer(root: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    fixed: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 3,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "num_sanity_val_steps": -1,
        "default_root_dir": root,
    }
    compression = LowRankCompression(0.5, preset="unirank", min_rank=2, batches=TEXT)
    return pl.Trainer(**{**fixed, **settings}, callbacks=[compression, *callbacks])


class Losses(pl.Callback):
    """The metric after every validation, and the factors with it."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.states: list[list[Tensor]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.values.append(float(trainer.callback_metrics["val_loss"]))
        self.states.append([factor.detach().clone() for factor in factors(pl_module)])


def factors(module: nn.Module) -> list[Tensor]:
    layers = [layer for layer in module.modules() if isinstance(layer, FactoredLinear)]
    return [factor for layer in layers for factor in layer.factors()]


def others(module: nn.Module) -> dict[str, Tensor]:
    chosen = {id(factor) for factor in factors(module)}
    return {name: value for name, value in module.named_parameters() if id(value) not in chosen}


def test_the_fit_ends_with_the_best_state_and_only_factors_trained(folder: Path, tmp_path: Path) -> None:
    module = LowRankModule(str(folder), loss="kd", learning_rate=0.02)
    refinement, losses = Refinement(block_epochs=2, batches=TEXT), Losses()
    trainer(tmp_path / "root", refinement, losses).fit(module, loader(), loader(BLOCKS.flip(1)))
    assert refinement.blocks is not None
    assert all(after < before for before, after in refinement.blocks.errors.values())
    assert len(losses.values) == 4  # the sanity check is of the state before the first step
    best = min(range(4), key=lambda index: losses.values[index])
    assert refinement.record == {"best": losses.values[best], "step": 4 * best}
    assert all(torch.equal(a, b) for a, b in zip(factors(module), losses.states[best], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(factors(module), losses.states[best - 1], strict=True))

    expected = dict(LowRankModule(str(folder)).named_parameters()) or dict(module.load_teacher().named_parameters())
    rest = others(module.model)
    assert len(rest) == 6  # the embedding and five norms
    assert all(torch.equal(value, expected[name]) for name, value in rest.items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_fit_that_only_harms_ends_where_it_started(folder: Path, tmp_path: Path) -> None:
    module = LowRankModule(str(folder), loss="ce", learning_rate=0.02)
    refinement, losses = Refinement(block_epochs=0, batches=TEXT), Losses()
    trainer(tmp_path / "root", refinement, losses, max_epochs=1).fit(module, loader(ONE_WORD), own_predictions(folder))
    assert losses.values[1] > losses.values[0] + 0.1
    assert refinement.record["step"] == 0
    assert refinement.blocks is None
    assert all(torch.equal(a, b) for a, b in zip(factors(module), losses.states[0], strict=True))


def test_distillation_comes_closer_to_the_dense_model(folder: Path, tmp_path: Path) -> None:
    def fit(epochs: int) -> Tensor:
        module = LowRankModule(str(folder), loss="kd", learning_rate=0.01)
        refinement = Refinement(block_epochs=1, batches=TEXT)
        run = trainer(tmp_path / str(epochs), refinement, max_epochs=epochs, num_sanity_val_steps=2)
        run.fit(module, loader(), loader())
        with torch.no_grad():
            p, q = (torch.log_softmax(m(input_ids=BLOCKS).logits, -1) for m in (module.load_teacher(), module.model))
        return (p.exp() * (p - q)).sum(-1).mean()

    one, ten = fit(1), fit(10)
    assert ten < 0.8 * one


def test_a_second_run_takes_the_refined_factors_from_disk(folder: Path, tmp_path: Path, capsys: Any) -> None:
    def fit(**settings: Any) -> LowRankModule:
        module = LowRankModule(str(folder), loss="kd", learning_rate=0.01)
        refinement = Refinement(batches=TEXT, **{"block_epochs": 1, **settings})
        torch.manual_seed(7)
        trainer(tmp_path / "root", refinement, max_epochs=1).fit(module, loader(shuffle=True), loader())
        return module

    first = fit()
    assert "taken from" not in capsys.readouterr().out
    second = fit()
    assert "Refined factors taken from" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(factors(first), factors(second), strict=True))
    fit(block_learning_rate=2e-3)
    assert "Refined factors taken" not in capsys.readouterr().out


def test_a_run_that_is_resumed_ends_with_the_same_best_state(folder: Path, tmp_path: Path) -> None:
    def parts() -> tuple[LowRankModule, Refinement, ModelCheckpoint]:
        saving = ModelCheckpoint(tmp_path / "ckpt", filename="{epoch}", save_top_k=-1, every_n_epochs=1)
        return (
            LowRankModule(str(folder), loss="kd", learning_rate=0.05),
            Refinement(block_epochs=1, batches=TEXT),
            saving,
        )

    whole, refinement, saving = parts()
    trainer(tmp_path / "root", refinement, saving).fit(whole, loader(), loader(BLOCKS.flip(1)))
    stored = torch.load(tmp_path / "ckpt" / "epoch=0.ckpt", weights_only=True)["callbacks"]["Refinement"]
    assert stored["record"]["step"] in (0, 4)
    assert len(stored["best"]) == len(factors(whole))

    again, resumed, saving = parts()
    run = trainer(tmp_path / "root", resumed, saving)
    run.fit(again, loader(), loader(BLOCKS.flip(1)), ckpt_path=tmp_path / "ckpt" / "epoch=0.ckpt", weights_only=True)
    assert resumed.record == refinement.record
    assert all(torch.equal(a, b) for a, b in zip(factors(again), factors(whole), strict=True))


def test_early_stopping_and_accumulation_are_lightnings(folder: Path, tmp_path: Path) -> None:
    module = LowRankModule(str(folder), loss="ce", learning_rate=0.02)
    stopping = EarlyStopping("val_loss", patience=1, check_on_train_epoch_end=False)
    refinement = Refinement(block_epochs=0, batches=TEXT)
    run = trainer(tmp_path / "root", refinement, stopping, max_epochs=50, accumulate_grad_batches=2)
    run.fit(module, loader(ONE_WORD), own_predictions(folder))
    assert run.global_step < 20
    assert run.global_step % 2 == 0


def test_adapters_take_its_place_in_the_fit(folder: Path, tmp_path: Path) -> None:
    """Listed before RankPreservingLoRA it refines the blocks, and keeps the adapters that were best."""
    module = LowRankModule(str(folder), loss="kd", learning_rate=0.01)
    refinement, adapters = Refinement(block_epochs=1, batches=TEXT), RankPreservingLoRA(rank=1)
    trainer(tmp_path / "root", refinement, adapters, max_epochs=2).fit(module, loader(), loader())
    assert refinement.record["best"] is not None
    assert adapters.record is not None
    assert not any("lora" in name for name, _ in module.named_parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_adapters_have_to_come_after_it(folder: Path, tmp_path: Path) -> None:
    """Listed first they would be frozen, and the factors below them train."""
    adapters, refinement = RankPreservingLoRA(rank=1), Refinement(block_epochs=0, batches=TEXT)
    with pytest.raises(ModelError, match="list it before RankPreservingLoRA"):
        trainer(tmp_path, adapters, refinement).fit(LowRankModule(str(folder)), loader(), loader())


class Broken(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise KeyError("the power went out")


def test_a_second_fit_trains_the_adapters_that_the_first_left(folder: Path, tmp_path: Path) -> None:
    module = LowRankModule(str(folder), learning_rate=0.01)
    run = trainer(tmp_path, Refinement(block_epochs=0, batches=TEXT), RankPreservingLoRA(rank=1), Broken())
    with pytest.raises(KeyError, match="power"):
        run.fit(module, loader(), loader())
    callbacks: list[pl.Callback] = [c for c in run.callbacks if not isinstance(c, Broken)]  # type: ignore[attr-defined]
    for callback in callbacks:
        callback.setup(run, module, "fit")
    assert {name.split(".")[-3] for name, value in module.named_parameters() if value.requires_grad} == {
        "lora_A",
        "lora_B",
    }


class Plain(pl.LightningModule):
    """A module that is not ours and names no teacher."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def configure_model(self) -> None:
        pass

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("score", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def test_another_module_with_a_teacher_and_a_metric_of_its_own(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    module = Plain(copy.deepcopy(dense))
    refinement = Refinement(block_epochs=1, batches=TEXT, teacher=dense, monitor="score")
    trainer(tmp_path, refinement, max_epochs=1).fit(module, loader(), loader())
    assert refinement.record["best"] is not None
    with pytest.raises(ModelError, match=r"Plain names no dense model: pass Refinement\(teacher=\.\.\.\)"):
        trainer(tmp_path / "2", Refinement(batches=TEXT)).fit(Plain(copy.deepcopy(dense)), loader(), loader())
    with pytest.raises(DataError, match=r"logs no 'val_loss' \(metrics: score\); set monitor"):
        trainer(tmp_path / "3", Refinement(block_epochs=0)).fit(Plain(copy.deepcopy(dense)), loader(), loader())


def test_what_a_refinement_refuses(folder: Path, tmp_path: Path) -> None:
    def fit(refinement: Refinement, val: Any = None, **settings: Any) -> LowRankModule:
        module = LowRankModule(str(folder), loss="kd")
        trainer(tmp_path / "root", refinement, **settings).fit(module, loader(), val)
        return module

    with pytest.raises(DataError, match=r"Refinement keeps the state .* the validation set is empty; give data"):
        fit(Refinement(block_epochs=0))
    with pytest.raises(DataError, match="validation set is empty"):
        fit(Refinement(block_epochs=0), loader(), limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"no validation in 2 steps: the last state stays; lower trainer\.val_check"):
        fit(Refinement(block_epochs=0), loader(), max_epochs=-1, max_steps=2, num_sanity_val_steps=0)
    with pytest.raises(DataError, match="Refinement cannot tell which of several train dataloaders"):
        trainer(tmp_path / "root", Refinement()).fit(
            LowRankModule(str(folder), loss="kd"), [loader(), loader()], loader()
        )
    run = pl.Trainer(callbacks=[Refinement(batches=TEXT)], accelerator="cpu", logger=False)
    with pytest.raises(ModelError, match="has no factored layer when Refinement is set up; list LowRankCompression"):
        run.fit(LowRankModule(str(folder)), loader(), loader())


def test_a_compression_without_training_keeps_the_refined_blocks(folder: Path, tmp_path: Path) -> None:
    module, refinement = LowRankModule(str(folder)), Refinement(block_epochs=1, batches=TEXT)
    trainer(tmp_path, refinement, max_epochs=-1, max_steps=0, num_sanity_val_steps=0).fit(module, loader(), loader())
    assert refinement.blocks is not None
    assert all(parameter.requires_grad for parameter in module.parameters())
