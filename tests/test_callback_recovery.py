"""RankPreservingLoRA in real fits: adapters train, the fit ends with the plain factored model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lowrank_lit.callbacks.recovery import RankPreservingLoRA
from lowrank_lit.errors import ModelError
from lowrank_lit.layers import FactoredLinear
from tests.tiny import batches, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*logging interval")
_PROJECTIONS = 7


class Rows(Dataset[dict[str, Tensor]]):
    """Four batches of tokens, one row at a time."""

    def __init__(self) -> None:
        drawn = batches(n=4)
        self.rows = torch.cat([batch["input_ids"] for batch in drawn])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


class Training(pl.LightningModule):
    """A one-layer llama, built in ``configure_model`` and factored there by a truncated SVD unless told not to."""

    def __init__(self, *, factored: bool = True, explode_at: int = -1) -> None:
        super().__init__()
        self.factored = factored
        self.explode_at = explode_at
        self.losses: list[float] = []
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = tiny_model("llama", num_hidden_layers=1)
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        for name in names if self.factored else []:
            if name != "lm_head":
                parent, _, child = name.rpartition(".")
                weight = self.model.get_submodule(name).weight.detach()
                u, s, vt = torch.linalg.svd(weight, full_matrices=False)
                pair = FactoredLinear.from_factors(u[:, :8] * s[:8].sqrt(), s[:8].sqrt()[:, None] * vt[:8], None)
                setattr(self.model.get_submodule(parent), child, pair)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.explode_at:
            raise KeyError("the power went out")
        loss: Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch, labels=batch["input_ids"]).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Rows(), batch_size=4)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Rows(), batch_size=4)


class Watch(pl.Callback):
    """Stands before the recovery in ``on_train_end``: sees the adapted model the moment before the merge."""

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self.optimized: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ids = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
        self.optimized = [name for name, p in pl_module.named_parameters() if id(p) in ids]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.logits = logits(pl_module)


@torch.no_grad()
def logits(module: Any) -> Tensor:
    result: Tensor = module.model(**batches(n=1)[0]).logits
    return result


def adapter_layers(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, BaseTunerLayer)]


@pytest.fixture
def trainer_settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }


def test_a_fit_trains_adapters_and_ends_with_the_plain_factored_model(trainer_settings: dict[str, Any]) -> None:
    module = Training()
    module.configure_model()
    plain = copy.deepcopy(module.state_dict())
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    watch, recovery = Watch(), RankPreservingLoRA(rank=4, alpha=8.0)
    trainer = pl.Trainer(**{**trainer_settings, "max_epochs": 8}, callbacks=[watch, recovery])
    trainer.fit(module)

    assert len(watch.optimized) == 4 * _PROJECTIONS
    assert all("lora_" in name for name in watch.optimized)
    assert sum(module.losses[-2:]) < sum(module.losses[:2]) - 5  # 26.9 -> 16.4
    assert watch.logits is not None
    assert (logits(module) - watch.logits).abs().max() < 1e-4  # 7e-6
    assert not adapter_layers(module)
    after = module.state_dict()
    assert list(after) == list(plain)
    for name, value in after.items():
        assert value.shape == plain[name].shape, name
        is_factor = name.endswith(("inner.weight", "outer.weight"))
        assert torch.equal(value, plain[name]) != is_factor, name
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert recovery.record is not None
    assert recovery.adapters is not None
    assert recovery.record is recovery.adapters.merged
    assert recovery.record.pairs == _PROJECTIONS
    assert recovery.record.factor_parameters_before == recovery.record.factor_parameters_after
    assert recovery.record.largest_output_difference < 1e-5  # 1e-6
    trainer.validate(module, verbose=False)  # the trainer goes on working with the merged module


def test_a_second_fit_recovers_further(trainer_settings: dict[str, Any]) -> None:
    module, recovery = Training(), RankPreservingLoRA(rank=4)
    pl.Trainer(**trainer_settings, callbacks=[recovery]).fit(module)
    first, middle = recovery.record, copy.deepcopy(module.state_dict())
    pl.Trainer(**trainer_settings, callbacks=[recovery]).fit(module)
    assert first is not None
    assert recovery.record is not None
    assert recovery.record is not first
    assert recovery.record.smallest_update > 0
    after = module.state_dict()
    assert list(after) == list(middle)
    assert not torch.equal(
        after["model.model.layers.0.mlp.up_proj.inner.weight"], middle["model.model.layers.0.mlp.up_proj.inner.weight"]
    )
    assert module.losses[-1] < module.losses[1]  # 12.8 -> 12.0: both are of the second batch


def test_a_fit_without_a_step_merges_nothing_into_the_factors(trainer_settings: dict[str, Any]) -> None:
    module, recovery, watch = Training(), RankPreservingLoRA(), Watch()
    module.configure_model()
    plain = copy.deepcopy(module.state_dict())
    pl.Trainer(**trainer_settings, max_steps=0, callbacks=[watch, recovery]).fit(module)
    assert watch.logits is None  # there was no on_train_end
    assert recovery.record is not None
    assert recovery.record.largest_update == 0
    after = module.state_dict()
    assert list(after) == list(plain)
    assert all(torch.equal(after[name], plain[name]) for name in plain)


def test_only_a_fit_adds_adapters(trainer_settings: dict[str, Any]) -> None:
    module, recovery = Training(), RankPreservingLoRA()
    pl.Trainer(**trainer_settings, callbacks=[recovery]).validate(module, verbose=False)
    assert recovery.adapters is None
    assert not adapter_layers(module)


def test_a_model_that_is_not_compressed_is_refused(trainer_settings: dict[str, Any]) -> None:
    trainer = pl.Trainer(**trainer_settings, callbacks=[RankPreservingLoRA()])
    with pytest.raises(ModelError, match="list LowRankCompression before RankPreservingLoRA"):
        trainer.fit(Training(factored=False))


def test_an_exception_leaves_the_adapters_and_the_next_fit_trains_them_on(trainer_settings: dict[str, Any]) -> None:
    module, recovery = Training(explode_at=1), RankPreservingLoRA(rank=4)
    with pytest.raises(KeyError, match="power"):
        pl.Trainer(**trainer_settings, callbacks=[recovery]).fit(module)
    assert len(adapter_layers(module)) == 2 * _PROJECTIONS
    adapters, moved = recovery.adapters, [p for n, p in module.named_parameters() if "lora_B" in n and bool(p.any())]
    assert len(moved) == 2 * _PROJECTIONS  # one step was made
    module.explode_at = -1
    pl.Trainer(**trainer_settings, callbacks=[recovery]).fit(module)
    assert recovery.adapters is adapters
    assert recovery.record is not None
    assert not adapter_layers(module)


def test_a_resumed_fit_equals_an_uninterrupted_one(trainer_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**trainer_settings, "max_epochs": 3, "enable_checkpointing": True}

    def fit(explode_at: int, seed: int, checkpoint: str | None = None) -> Training:
        torch.manual_seed(seed)  # the adapters start from random numbers, which the checkpoint must bring back
        module = Training(explode_at=explode_at)
        saving = ModelCheckpoint(tmp_path, filename="step", save_last=True)
        trainer = pl.Trainer(**settings, callbacks=[RankPreservingLoRA(rank=4), saving])
        trainer.fit(module, ckpt_path=checkpoint)
        return module

    whole = fit(-1, seed=1)
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    with pytest.raises(KeyError, match="power"):
        fit(3, seed=1)
    resumed = fit(-1, seed=2, checkpoint=str(tmp_path / "last.ckpt"))
    assert len(resumed.losses) == 4  # epochs 2 and 3
    assert resumed.losses == whole.losses[2:]
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_the_last_checkpoint_of_a_training_end_holds_the_merged_model(
    trainer_settings: dict[str, Any], tmp_path: Path
) -> None:
    module = Training()
    # Nothing is due before the end of training, so that save_last writes there: after the merge.
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1000)
    settings = {**trainer_settings, "enable_checkpointing": True}
    pl.Trainer(**settings, callbacks=[RankPreservingLoRA(), saving]).fit(module)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(saved) == list(module.state_dict())
    assert all(torch.equal(saved[name], value) for name, value in module.state_dict().items())


def test_bfloat16_mixed_precision(trainer_settings: dict[str, Any]) -> None:
    module, watch, recovery = Training(), Watch(), RankPreservingLoRA(rank=4)
    pl.Trainer(**trainer_settings, precision="bf16-mixed", callbacks=[watch, recovery]).fit(module)
    assert watch.logits is not None
    assert (logits(module) - watch.logits).abs().max() < 1e-4  # 3e-6: the merge is outside autocast
    assert recovery.record is not None
    assert recovery.record.smallest_update > 0
