"""LowRankModule: its loss, schedule and optimizer, what it refuses to load, and checkpoints of a fit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_lit.callbacks import LowRankCompression, RankPreservingLoRA
from lowrank_lit.data import BlockDataset
from lowrank_lit.errors import ExportError, ModelError, NonFiniteError, PlanError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.module import LowRankModule, _schedule, load_checkpoint
from tests.tiny import VOCABULARY, batches, randomise, tiny_model

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
BLOCKS = torch.cat([batch["input_ids"] for batch in batches(n=8, structured=True)])


def loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(BlockDataset(BLOCKS), batch_size=4)


@pytest.fixture
def trainer_settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 3,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path / "root",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@torch.no_grad()
def logits(module: LowRankModule) -> Tensor:
    module.eval()
    result: Tensor = module(input_ids=BLOCKS[:2]).logits
    return result


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_loss_shifts_the_labels_once() -> None:
    module = LowRankModule(CONFIG, dtype="float64")
    module.configure_model()
    randomise(module.model)
    batch = next(iter(loader()))
    rows = torch.log_softmax(module(input_ids=batch["input_ids"]).logits, dim=-1)
    losses = [-rows[row, position, batch["input_ids"][row, position + 1]] for row in range(4) for position in range(15)]
    expected = torch.stack(losses).mean()
    loss = module.training_step(batch, 0)
    assert loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # 1e-7: transformers takes the loss in float32
    unshifted = nn.functional.cross_entropy(rows.flatten(0, 1), batch["input_ids"].flatten())
    assert abs(loss.item() - unshifted.item()) > 0.01


def test_the_logged_losses_of_a_fit(trainer_settings: dict[str, Any]) -> None:
    module = LowRankModule(CONFIG)
    trainer = pl.Trainer(**trainer_settings)
    trainer.fit(module, loader(), loader())
    assert trainer.global_step == 3
    assert math.isfinite(trainer.callback_metrics["train_loss"])
    with torch.no_grad():
        losses = [float(module(**batch).loss) for batch in loader()]
    (scores,) = trainer.validate(module, loader(), verbose=False)
    assert scores["val_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)  # 0


def test_schedule_values() -> None:
    assert [_schedule(step, 4, 104) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert _schedule(4, 4, 104) == 1.0
    assert _schedule(54, 4, 104) == pytest.approx(0.55, abs=1e-12)
    assert _schedule(29, 4, 104) == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)), abs=1e-12)
    assert _schedule(104, 4, 104) == pytest.approx(0.1, abs=1e-12)
    assert _schedule(500, 4, 104) == pytest.approx(0.1, abs=1e-12)  # a fit that goes on
    assert _schedule(0, 0, 10) == 1.0
    assert _schedule(10_000, 10, math.inf) == 1.0  # a fit without an end


class Rates(pl.Callback):
    """Learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.seen.append(optimizer.param_groups[0]["lr"])


def test_the_optimizer_follows_the_schedule_and_leaves_frozen_parameters_out(trainer_settings: dict[str, Any]) -> None:
    module, rates = LowRankModule(CONFIG, learning_rate=0.01, warmup_steps=2, weight_decay=0.3), Rates()
    module.configure_model()
    frozen = {name: p.clone() for name, p in module.named_parameters() if "mlp" in name}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    trainer = pl.Trainer(**{**trainer_settings, "max_steps": 4}, callbacks=[rates])
    trainer.fit(module, loader())
    assert rates.seen == pytest.approx([0.005, 0.01, 0.01, 0.0055], rel=1e-12)
    (group,) = trainer.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for n, p in module.named_parameters() if n not in frozen}
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.9, 0.95))
    parameters = dict(module.named_parameters())
    assert len(frozen) == 6
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())


def test_a_loss_that_is_not_finite_ends_the_fit(trainer_settings: dict[str, Any]) -> None:
    module = LowRankModule(CONFIG, learning_rate=0.5)
    module.configure_model()
    with torch.no_grad():
        module.model.model.norm.weight[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"loss is (nan|inf) at step 0; lower model.learning_rate \(now 0.5\)"):
        pl.Trainer(**trainer_settings).fit(module, loader())


def test_a_configuration_gives_random_weights_of_the_global_seed() -> None:
    def build(seed: int) -> LowRankModule:
        torch.manual_seed(seed)
        module = LowRankModule({**CONFIG, "dtype": "bfloat16"})
        module.configure_model()
        return module

    one, same, other = build(1), build(1), build(2)
    assert torch.equal(logits(one), logits(same))
    assert not torch.equal(logits(one), logits(other))
    assert one.storage_dtype == torch.bfloat16
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    model = one.model
    one.configure_model()
    assert one.model is model


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_folder_gives_its_weights_in_the_dtype(dtype: str, folder: Path) -> None:
    module = LowRankModule(str(folder), dtype=dtype)
    module.configure_model()
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    assert module.storage_dtype == torch.float32
    expected = dict(tiny_model("llama").named_parameters())
    for name, parameter in module.model.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def check_refusal(module: LowRankModule, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        module.configure_model()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert module.model is None


def test_a_missing_folder(tmp_path: Path) -> None:
    check_refusal(LowRankModule(str(tmp_path / "none")), "model '.*none' cannot be loaded .*; give a folder")
    check_refusal(LowRankModule(str(tmp_path)), "model '.*' cannot be loaded .*; give a folder with config.json")


@pytest.mark.parametrize("length", [0, 7, 5000])
def test_truncated_weights(length: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    content = file.read_bytes()
    assert len(content) > 5000
    file.write_bytes(content[:length])
    check_refusal(LowRankModule(str(folder)), "the weights of model '.*' cannot be loaded .*; check that the folder")


def test_missing_and_incomplete_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    check_refusal(LowRankModule(str(folder)), r"lack 1 tensors, first 'model.layers.1.mlp.up_proj.weight'; check that")
    file.unlink()
    check_refusal(LowRankModule(str(folder)), "the weights of model '.*' cannot be loaded")


@pytest.mark.parametrize("config", [{"model_type": "none-such"}, {"hidden_size": 32}, {**CONFIG, "hidden_size": "x"}])
def test_a_configuration_that_is_none(config: dict[str, Any]) -> None:
    check_refusal(LowRankModule(config), "cannot be loaded .*; give model_type and its fields")


def test_an_unknown_dtype() -> None:
    with pytest.raises(ModelError, match=r"model\.dtype='int8' is unknown; choose one of float32, bfloat16"):
        LowRankModule(CONFIG, dtype="int8")


def fit(settings: dict[str, Any], folder: Path, checkpoints: Path, **extra: Any) -> LowRankModule:
    """Three steps of recovery of a compressed model, with a checkpoint after every step."""
    module = LowRankModule(str(folder), learning_rate=0.01)
    callbacks = [
        LowRankCompression(0.6, min_rank=4, batches=[BLOCKS]),
        *([RankPreservingLoRA(rank=2)] if extra.pop("recovery", True) else []),
        ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1, **extra),
    ]
    pl.Trainer(**{**settings, "enable_checkpointing": True}, callbacks=callbacks).fit(module, loader())
    return module


@pytest.mark.parametrize("recovery", [True, False])
def test_a_checkpoint_becomes_the_merged_factored_model(
    recovery: bool, trainer_settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    final = fit(trainer_settings, folder, tmp_path / "ckpt", recovery=recovery)
    stored = torch.load(tmp_path / "ckpt" / "step=3.ckpt", weights_only=True)["state_dict"]
    assert any(".lora_" in key for key in stored) == recovery

    loaded = LowRankModule(str(folder))
    load_checkpoint(loaded, tmp_path / "ckpt" / "step=3.ckpt")
    factored = [module for module in loaded.modules() if isinstance(module, FactoredLinear)]
    assert len(factored) >= 10
    assert all(type(child) is nn.Linear for module in factored for child in module.children())
    assert list(loaded.state_dict()) == list(final.state_dict())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(loaded), logits(final))
    assert loaded.plan is not None
    loaded.plan.check(loaded.model)
    assert sum(matrix.form == "factored" for matrix in loaded.plan.matrices) == len(factored)

    earlier = LowRankModule(str(folder))
    load_checkpoint(earlier, tmp_path / "ckpt" / "step=1.ckpt")
    assert (logits(earlier) - logits(final)).abs().max() > 1e-3  # 0.05: a checkpoint is of its own step


def test_a_checkpoint_written_after_the_merge(trainer_settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    final = fit(trainer_settings, folder, tmp_path / "ckpt")
    merged = tmp_path / "merged.ckpt"
    state = torch.load(tmp_path / "ckpt" / "step=3.ckpt", weights_only=True)
    torch.save({**state, "state_dict": final.state_dict()}, merged)
    loaded = LowRankModule(str(folder))
    load_checkpoint(loaded, merged)
    assert torch.equal(logits(loaded), logits(final))


def test_a_checkpoint_of_a_dense_fit(trainer_settings: dict[str, Any], tmp_path: Path) -> None:
    module = LowRankModule(CONFIG, learning_rate=0.01)
    saving = ModelCheckpoint(tmp_path, filename="dense", every_n_train_steps=3)
    pl.Trainer(**{**trainer_settings, "enable_checkpointing": True}, callbacks=[saving]).fit(module, loader())
    loaded = LowRankModule(CONFIG)
    load_checkpoint(loaded, tmp_path / "dense.ckpt")
    assert loaded.plan is None
    assert torch.equal(logits(loaded), logits(module))


def test_checkpoints_that_cannot_be_read(trainer_settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    fit({**trainer_settings, "max_steps": 1}, folder, tmp_path / "ckpt")
    whole = (tmp_path / "ckpt" / "step=1.ckpt").read_bytes()
    bad = tmp_path / "bad.ckpt"
    contents = {"missing": None, "empty": b"", "half": whole[: len(whole) // 2], "cut": whole[:-100], "text": b"text"}
    for kind, content in contents.items():
        bad.unlink(missing_ok=True)
        if content is not None:
            bad.write_bytes(content)
        module = LowRankModule(str(folder))
        with pytest.raises(
            ExportError, match=r"bad\.ckpt' cannot be read .*; give a file of ModelCheckpoint"
        ) as caught:
            load_checkpoint(module, bad)
        assert "\n" not in str(caught.value), kind
        assert module.model is None, kind  # nothing was touched
    for content in (torch.zeros(3), {"weights": {}}):
        torch.save(content, bad)
        with pytest.raises(ExportError, match="cannot be read"):
            load_checkpoint(LowRankModule(str(folder)), bad)


def test_checkpoints_that_do_not_fit(trainer_settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    fit({**trainer_settings, "max_steps": 1}, folder, tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "step=1.ckpt"
    with pytest.raises(PlanError, match=r"the plan does not fit the model in .* first: "):
        load_checkpoint(LowRankModule({**CONFIG, "hidden_size": 64}), path)
    with pytest.raises(ExportError, match=r"does not fit model '.*' \(.*\); give the recipe") as caught:
        load_checkpoint(LowRankModule({**CONFIG, "vocab_size": 80}), path)
    assert "\n" not in str(caught.value)
    state = torch.load(path, weights_only=True)
    del state["callbacks"]["RankPreservingLoRA"]
    torch.save(state, path)
    with pytest.raises(ExportError, match="holds adapters of another kind"):
        load_checkpoint(LowRankModule(str(folder)), path)
