"""RankPreservingLoRA in real fits: adapters train, the fit ends with the plain factored model."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lowrank_lit
from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.export import ExportOnFitEnd
from lowrank_lit.callbacks.recovery import FactorTuning, RankPreservingLoRA
from lowrank_lit.errors import DataError, LowRankError, ModelError
from lowrank_lit.layers import FactoredLayer, FactoredLinear, PivotLinear
from lowrank_lit.module import LowRankModule, load_checkpoint
from lowrank_lit.recovery import factor_groups
from lowrank_lit.unmerging import unmerge
from tests.tiny import batches, tiny_model

DORA = {"class_path": "LoraConfig", "init_args": {"r": 4, "use_dora": True}}
EVA = {
    "class_path": "LoraConfig",
    "init_args": {"r": 4, "init_lora_weights": "eva", "eva_config": {"class_path": "EvaConfig"}},
}
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

    def __init__(
        self, *, factored: bool = True, explode_at: int = -1, rank: int = 8, pivot: bool = False, **sizes: int
    ) -> None:
        super().__init__()
        self.factored = factored
        self.rank = rank
        self.kind = PivotLinear if pivot else FactoredLinear
        self.sizes = sizes
        self.explode_at = explode_at
        self.losses: list[float] = []
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = tiny_model("llama", num_hidden_layers=1, **self.sizes)
        names = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        for name in names if self.factored else []:
            if name != "lm_head":
                parent, _, child = name.rpartition(".")
                weight = self.model.get_submodule(name).weight.detach()
                u, s, vt = torch.linalg.svd(weight, full_matrices=False)
                root, r = s[: self.rank].sqrt(), self.rank
                pair = self.kind.from_factors(u[:, :r] * root, root[:, None] * vt[:r], None)
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
    assert not trainer.optimizers[0].state, "the optimizer has let go of the adapters"
    assert not any(group["params"] for group in trainer.optimizers[0].param_groups)
    trainer.validate(module, verbose=False)  # the trainer goes on working with the merged module
    trainer.save_checkpoint(trainer_settings["default_root_dir"] / "after.ckpt")


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


class Steps(pl.Callback):
    """Which factors' adapters moved in each optimizer step."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        after = dict(pl_module.named_parameters())
        changed = [name for name, value in self.before.items() if not torch.equal(after[name], value)]
        self.moved.append({factor for name in changed for factor in ("inner", "outer") if f".{factor}." in name})


def test_a_sequential_fit_trains_outer_and_then_inner(trainer_settings: dict[str, Any]) -> None:
    module, steps = Training(), Steps()
    recovery = RankPreservingLoRA(rank=4, schedule="sequential")
    pl.Trainer(**{**trainer_settings, "max_epochs": 3}, callbacks=[steps, recovery]).fit(module)  # 6 steps
    assert steps.moved == [{"outer"}] * 3 + [{"inner"}] * 3
    assert module.losses[-1] < module.losses[1]
    assert recovery.record is not None
    assert recovery.record.smallest_update > 0
    assert not adapter_layers(module)


def test_a_sequential_fit_with_grouped_parameters_keeps_its_rates(trainer_settings: dict[str, Any]) -> None:
    class Grouped(Training):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(factor_groups(self), lr=5e-3)

    module, steps = Grouped(), Steps()
    recovery = RankPreservingLoRA(rank=4, schedule="sequential")
    trainer = pl.Trainer(**{**trainer_settings, "max_epochs": 2}, callbacks=[steps, recovery])
    trainer.fit(module)
    assert steps.moved == [{"outer"}] * 2 + [{"inner"}] * 2
    assert [group["factor"] for group in trainer.optimizers[0].param_groups] == ["inner", "outer"]


def test_a_sequential_fit_needs_an_end(trainer_settings: dict[str, Any]) -> None:
    settings = {**trainer_settings, "max_epochs": -1}
    trainer = pl.Trainer(**settings, callbacks=[RankPreservingLoRA(rank=4, schedule="sequential")])
    with pytest.raises(LowRankError, match=r"set trainer\.max_steps or max_epochs"):
        trainer.fit(Training())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "alternating"}, "schedule='alternating' is unknown"),
        ({"quantize": "int3"}, "quantize='int3' is unknown"),
        ({"quantize": "nf4", "quantize_factors": "up"}, "quantize_factors='up' is unknown"),
        ({"rank": 4, "config": {"class_path": "LoraConfig"}}, "config stands in for rank"),
        ({"config": {"class_path": "NoConfig"}}, "no configuration of PEFT"),
    ],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        RankPreservingLoRA(**settings)


def test_a_rank_that_no_layer_has_is_refused_before_the_training(trainer_settings: dict[str, Any]) -> None:
    with pytest.raises(LowRankError, match="adapter rank 8 is not below the rank of any factor"):
        pl.Trainer(**trainer_settings, callbacks=[RankPreservingLoRA(rank=8)]).fit(Training())


def test_a_merge_is_taken_back_from_its_record(trainer_settings: dict[str, Any], tmp_path: Path) -> None:
    module = Training()
    module.configure_model()
    plain = copy.deepcopy(module.model.state_dict())
    pl.Trainer(**trainer_settings, callbacks=[RankPreservingLoRA(rank=4)]).fit(module)
    name = "model.layers.0.mlp.up_proj.inner.weight"
    assert not torch.equal(module.model.state_dict()[name], plain[name])
    assert unmerge(module.model, tmp_path / "unmerge") == 2 * _PROJECTIONS
    assert all(torch.equal(value, plain[name]) for name, value in module.model.state_dict().items())


def test_a_record_that_cannot_be_written_costs_a_warning(trainer_settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "unmerge").write_text("no folder")
    module, recovery = Training(), RankPreservingLoRA(rank=4)
    with pytest.warns(UserWarning, match="record of the merge cannot be written"):
        pl.Trainer(**trainer_settings, callbacks=[recovery]).fit(module)
    assert recovery.record is not None
    assert not adapter_layers(module)


def test_pivot_layers_are_layers_too(trainer_settings: dict[str, Any]) -> None:
    module, recovery = Training(pivot=True), RankPreservingLoRA(rank=4)
    pl.Trainer(**trainer_settings, callbacks=[recovery]).fit(module)
    assert recovery.record is not None
    assert recovery.record.pairs == _PROJECTIONS


class Text(pl.LightningDataModule):
    """Calibration batches beside the training rows."""

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Rows(), batch_size=4)

    def calibration_batches(self) -> list[dict[str, Tensor]]:
        return batches(n=8)


def test_eva_starts_from_the_calibration_text_and_again_from_disk(
    trainer_settings: dict[str, Any], tmp_path: Path
) -> None:
    def fit() -> tuple[Training, RankPreservingLoRA]:
        torch.manual_seed(0)
        module, recovery = Training(factored=False), RankPreservingLoRA(config=EVA)
        compression = LowRankCompression(keep_ratio=0.7, preset="unirank")
        settings = {**trainer_settings, "max_epochs": 2}
        pl.Trainer(**settings, callbacks=[compression, recovery]).fit(module, datamodule=Text())
        return module, recovery

    module, recovery = fit()
    file = tmp_path / "compressed" / "adapter_starts.safetensors"
    assert file.is_file()
    written = file.stat().st_mtime_ns
    again, _ = fit()
    assert file.stat().st_mtime_ns == written
    assert again.losses == module.losses
    assert all(torch.equal(again.state_dict()[name], value) for name, value in module.state_dict().items())
    state = recovery.state_dict()["settings"]["config"]["init_args"]
    assert state["init_lora_weights"] is True
    assert len(set(state["rank_pattern"].values())) > 1  # ranks went where the variance is


def test_eva_without_a_text_is_refused(trainer_settings: dict[str, Any]) -> None:
    loaders = [DataLoader(TensorDataset(torch.ones(2, 4, dtype=torch.long))) for _ in range(2)]
    with pytest.raises(DataError, match="RankPreservingLoRA cannot tell which of several train dataloaders"):
        pl.Trainer(**trainer_settings, callbacks=[RankPreservingLoRA(config=EVA)]).fit(Training(), loaders)


@pytest.mark.parametrize("factors", ["both", "inner", "outer"])
def test_factor_tuning_trains_factors_alone(trainer_settings: dict[str, Any], factors: str) -> None:
    module, tuning = Training(), FactorTuning(factors)
    module.configure_model()
    module.model.lm_head.weight.requires_grad_(False)
    plain = copy.deepcopy(module.state_dict())
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    pl.Trainer(**{**trainer_settings, "max_epochs": 4}, callbacks=[tuning]).fit(module)
    chosen = ("inner", "outer") if factors == "both" else (factors,)
    for name, value in module.state_dict().items():
        assert torch.equal(value, plain[name]) != name.endswith(tuple(f"{f}.weight" for f in chosen)), name
    assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    trained = sum(value.numel() for name, value in plain.items() if name.endswith(tuple(f"{f}.weight" for f in chosen)))
    assert tuning.trainable_parameters == trained
    assert module.losses[-1] < module.losses[1] - 1
    assert all(module_.rank == 8 for module_ in module.modules() if isinstance(module_, FactoredLayer))


def test_factor_tuning_refuses_and_warns(trainer_settings: dict[str, Any]) -> None:
    with pytest.raises(LowRankError, match="factors='all' is unknown"):
        FactorTuning("all")
    with pytest.raises(ModelError, match="list LowRankCompression before FactorTuning"):
        pl.Trainer(**trainer_settings, callbacks=[FactorTuning()]).fit(Training(factored=False))
    with pytest.raises(ModelError, match="list one of them"):
        pl.Trainer(**trainer_settings, callbacks=[RankPreservingLoRA(rank=4), FactorTuning()]).fit(Training())

    class Decaying(Training):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)

    with pytest.warns(UserWarning, match="weight decay 0.1 on factors"):
        pl.Trainer(**trainer_settings, callbacks=[FactorTuning()]).fit(Decaying())


@pytest.mark.parametrize("which", ["both", "outer"])
def test_adapters_train_on_quantised_factors_and_merge_into_16_or_32_bits(
    trainer_settings: dict[str, Any], which: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    module = Training(rank=64, hidden_size=128, intermediate_size=192, head_dim=32)
    recovery = RankPreservingLoRA(rank=4, quantize="nf4", quantize_factors=which)
    watch = Watch()
    pl.Trainer(**{**trainer_settings, "max_epochs": 4}, callbacks=[watch, recovery]).fit(module)
    assert sum(module.losses[-2:]) < sum(module.losses[:2]) - 1
    assert watch.logits is not None
    assert (logits(module) - watch.logits).norm() / watch.logits.norm() < 1e-3
    assert recovery.record is not None
    assert recovery.record.dequantised == _PROJECTIONS * (2 if which == "both" else 1)
    for child in module.modules():
        if isinstance(child, FactoredLayer):
            assert type(child.inner) is type(child.outer) is nn.Linear
            assert child.inner.weight.dtype == child.outer.weight.dtype == torch.float32
    merged = copy.deepcopy(module.model.state_dict())
    assert unmerge(module.model, tmp_path / "unmerge") == 2 * _PROJECTIONS
    assert not torch.equal(
        module.model.state_dict()["model.layers.0.mlp.up_proj.inner.weight"],
        merged["model.layers.0.mlp.up_proj.inner.weight"],
    )


def test_a_rank_that_leaves_some_layers_smaller_adapters_is_told(
    trainer_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    class Uneven(Training):
        def configure_model(self) -> None:
            super().configure_model()
            if isinstance(mlp := self.model.model.layers[0].mlp, nn.Module) and mlp.up_proj.rank == 8:
                mlp.up_proj = FactoredLinear(32, 48, 3, bias=False)

    pl.Trainer(**trainer_settings, callbacks=[RankPreservingLoRA(rank=4)]).fit(Uneven())
    printed = capsys.readouterr().out
    assert "Adapter rank 4 is not below the rank of 1 of 7 layers" in printed
    assert "the least of rank 2 in 'model.model.layers.0.mlp.up_proj'" in printed


# ---- QLoRA, from the dense model to the export -----------------------------------------------------------------------

WIDE = {  # at keep 0.8 and ranks that are multiples of 64, some matrices stay dense
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


class Labelled(Text):
    """The same with labels, as LowRankModule trains on them; explodes where it is told to."""

    def __init__(self, explode_at: int = -1) -> None:
        super().__init__()
        self.explode_at = explode_at

    def train_dataloader(self) -> Any:
        def rows(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            ids = torch.stack([row["input_ids"] for row in batch])
            return {"input_ids": ids, "labels": ids}

        return DataLoader(Rows(), batch_size=2, collate_fn=rows)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer: Any = self.trainer
        if trainer.training and trainer.global_step == self.explode_at:
            raise KeyError("the power went out")
        return batch


def qlora(
    settings: dict[str, Any], folder: Path, *, explode_at: int = -1, path: Path | None = None, **recovery: Any
) -> tuple[LowRankModule, list[pl.Callback]]:
    """Compress, train adapters on NF4 factors, merge, export; with a checkpoint at every step."""
    pl.seed_everything(3 if path is None else 4, verbose=False)  # a resumed run has nothing of the seed
    module = LowRankModule(WIDE, learning_rate=3e-3, optimizer="adamw8bit")
    torch.manual_seed(0)
    module.configure_model()
    callbacks: list[pl.Callback] = [
        LowRankCompression(keep_ratio=0.8, preset="unirank", quantum=64, min_rank=64),
        RankPreservingLoRA(**{"rank": 4, "quantize": "nf4", **recovery}),
        ExportOnFitEnd(),
        ModelCheckpoint(folder / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1),
    ]
    whole = {**settings, "enable_checkpointing": True, "max_epochs": 2, "default_root_dir": folder}
    pl.Trainer(**whole, callbacks=callbacks).fit(module, datamodule=Labelled(explode_at), ckpt_path=path)
    return module, callbacks


def test_qlora_from_the_dense_model_to_the_export_and_resumed(
    trainer_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    module, callbacks = qlora(trainer_settings, tmp_path / "whole")
    printed = capsys.readouterr().out
    compression, recovery = callbacks[0], callbacks[1]
    assert isinstance(compression, LowRankCompression)
    assert isinstance(recovery, RankPreservingLoRA)
    assert compression.result is not None
    assert recovery.quantization is not None
    assert recovery.record is not None
    forms = [matrix.form for matrix in compression.result.plan.matrices]
    factored = forms.count("factored")
    assert 0 < factored < len(forms)  # some stay dense
    assert recovery.record.pairs == factored
    assert recovery.record.dequantised == len(recovery.quantization["quantized"]) == 2 * factored
    assert f"{2 * factored} factors in NF4" in printed
    others = len(forms) - factored + 1
    assert f"{others} other linear layers (matrices that the plan leaves dense, the output embedding)" in printed
    assert len(recovery.quantization["unquantized"]) == others

    exported = lowrank_lit.load(tmp_path / "whole" / "model")
    expected = module.model.state_dict()
    loaded = exported.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())

    saved = sorted((tmp_path / "whole" / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(saved) > 4
    with pytest.raises(KeyError, match="power"):
        qlora(trainer_settings, tmp_path / "again", explode_at=5)
    # The end of the first epoch: this loader has no position of its own.
    resumed, _ = qlora(trainer_settings, tmp_path / "again", path=tmp_path / "again" / "saved" / "step=4.ckpt")
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name

    plain = LowRankModule(WIDE)  # a checkpoint of the end of the training, read as a plain model
    load_checkpoint(plain, saved[-1])
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_a_checkpoint_of_other_adapters_is_refused(trainer_settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(KeyError, match="power"):
        qlora(trainer_settings, tmp_path, explode_at=1)
    path = tmp_path / "saved" / "step=1.ckpt"
    for recovery in ({"rank": 5}, {"config": DORA, "rank": None}):
        with pytest.raises(ModelError, match=r"its adapters or 4-bit factors are others.*the recipe that made it"):
            qlora(trainer_settings, tmp_path, path=path, **recovery)
    for recovery in ({"quantize": None}, {"quantize_factors": "outer"}):
        with pytest.raises(LowRankError, match="resume with the recipe that made it"):
            qlora(trainer_settings, tmp_path, path=path, **recovery)


@pytest.mark.parametrize(
    ("compression", "message"),
    [
        ({}, r"set LowRankCompression\.quantum=64 \(now 1\)"),
        ({"quantum": 32}, r"set LowRankCompression\.quantum=64 \(now 32\)"),
        ({"quantum": 64, "storage": "pivot"}, r"LowRankCompression\.storage='factored' \(now 'pivot'\)"),
    ],
)
def test_ranks_that_cannot_be_quantised_are_refused_before_the_calibration(
    trainer_settings: dict[str, Any], tmp_path: Path, compression: dict[str, Any], message: str
) -> None:
    pytest.importorskip("bitsandbytes")
    callbacks = [LowRankCompression(keep_ratio=0.6, **compression), RankPreservingLoRA(quantize="nf4")]
    with pytest.raises(LowRankError, match=message):
        pl.Trainer(**trainer_settings, callbacks=callbacks).fit(Training(factored=False), datamodule=Text())
    assert not (tmp_path / "compressed").exists()


def test_missing_bitsandbytes_is_told_before_the_calibration(
    trainer_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    callbacks = [LowRankCompression(keep_ratio=0.6, quantum=64), RankPreservingLoRA(quantize="nf4")]
    with pytest.raises(LowRankError, match=r"LoRA\.quantize='nf4' needs bitsandbytes .*lowrank-lit\[qlora\]"):
        pl.Trainer(**trainer_settings, callbacks=callbacks).fit(Training(factored=False), datamodule=Text())
    assert not (tmp_path / "compressed").exists()
