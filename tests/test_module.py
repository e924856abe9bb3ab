"""LowRankModule: its loss, schedule and optimizer, what it refuses to load, and checkpoints of a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_lit.callbacks import FactorTuning, LowRankCompression, RankPreservingLoRA, RankReallocation, Refinement
from lowrank_lit.compress import compress
from lowrank_lit.data import BlockDataset
from lowrank_lit.errors import ExportError, LowRankError, ModelError, NonFiniteError, PlanError
from lowrank_lit.hub import export, load
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.module import LowRankModule, _schedule, load_checkpoint
from lowrank_lit.surgery import check_applied
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
    with pytest.raises(
        NonFiniteError, match=r"loss is (nan|inf) at step 0; no checkpoint .*; lower model.learning_rate \(now 0.5\)"
    ):
        pl.Trainer(**trainer_settings).fit(module, loader())


class Poison(pl.Callback):
    """Breaks the run at step 2: a weight becomes infinite, or a gradient does."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.before: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 2:
            parameter = pl_module.get_parameter("model.model.norm.weight")
            if self.what == "gradient":
                parameter.register_hook(lambda gradient: gradient * math.inf)
                self.before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            else:
                with torch.no_grad():
                    parameter[0] = math.inf


@pytest.mark.parametrize(("what", "said"), [("weight", "the training loss"), ("gradient", "the norm of the gradients")])
def test_the_error_names_the_step_and_the_last_good_checkpoint(
    what: str, said: str, trainer_settings: dict[str, Any], tmp_path: Path
) -> None:
    module, poison = LowRankModule(CONFIG, learning_rate=0.01), Poison(what)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(**{**trainer_settings, "enable_checkpointing": True}, callbacks=[saving, poison])
    with pytest.raises(
        NonFiniteError, match=rf"{said} is (nan|inf) at step 2; the last good checkpoint is '.*step=2"
    ) as e:
        trainer.fit(module, loader())
    assert "lower model.learning_rate (now 0.01)" in str(e.value)
    stored = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in stored.values())
    if what == "gradient":  # the step was not taken
        assert all(torch.equal(value, poison.before[name]) for name, value in module.state_dict().items())


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


def test_the_bad_one_of_several_weight_files_is_named(folder: Path, tmp_path: Path) -> None:
    module = LowRankModule(str(folder))
    module.configure_model()
    module.model.save_pretrained(tmp_path / "shards", max_shard_size="20kB")
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 2
    content = files[1].read_bytes()
    for length in (None, 0, len(content) - 1):
        files[1].unlink() if length is None else files[1].write_bytes(content[:length])
        with pytest.raises(
            ModelError, match=rf"cannot be loaded \('.*{files[1].name}' is missing, truncated"
        ) as caught:
            LowRankModule(str(tmp_path / "shards")).configure_model()
        assert "\n" not in str(caught.value)


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


def distilled(folder: Path, **settings: Any) -> LowRankModule:
    """A module with a teacher, whose own model has been compressed."""
    module = LowRankModule(str(folder), **{"loss": "kd", **settings})
    module.configure_model()
    compress(module.model, [BLOCKS], keep_ratio=0.5, preset="unirank", min_rank=2)
    return module


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_distillation_compares_with_the_dense_model(folder: Path) -> None:
    module = distilled(folder)
    batch = next(iter(loader()))
    with torch.no_grad():
        p = torch.log_softmax(tiny_model("llama")(input_ids=batch["input_ids"]).logits[:, :-1].double(), -1)
        q = torch.log_softmax(module(input_ids=batch["input_ids"]).logits[:, :-1].double(), -1)
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        own = float(module(**batch).loss)
    loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # 1e-7
    assert loss.requires_grad
    without = module.training_step({"input_ids": batch["input_ids"]}, 0)  # no label enters it
    assert without.item() == pytest.approx(expected, rel=1e-5)

    mixed = distilled(folder, loss="mixed", kd_weight=0.25)
    assert mixed.training_step(batch, 0).item() == pytest.approx(0.25 * expected + 0.75 * own, rel=1e-5)
    warm = distilled(folder, temperature=2.0).training_step(batch, 0).item()
    p, q = torch.log_softmax(p / 2, -1), torch.log_softmax(q / 2, -1)
    assert warm == pytest.approx(4 * float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)


def test_the_teacher_is_no_part_of_the_module(folder: Path, trainer_settings: dict[str, Any]) -> None:
    module, plain = distilled(folder, learning_rate=0.01), LowRankModule(str(folder))
    plain.configure_model()
    names = [name for name, _ in module.named_parameters()]
    pl.Trainer(**{**trainer_settings, "max_steps": 10}).fit(module, loader(), loader())
    assert module.teacher is not None
    assert module.teacher.loaded
    assert [name for name, _ in module.named_parameters()] == names
    assert not any("teacher" in name for name in module.state_dict())
    teacher = module.load_teacher()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    expected = dict(plain.model.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in teacher.named_parameters())
    assert plain.teacher is None  # the loss is the text's


def test_loading_the_teacher_draws_no_random_numbers(folder: Path) -> None:
    module = LowRankModule(str(folder), loss="kd")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    module.load_teacher()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("top_k", [None, 8])
def test_predictions_on_disk_spare_the_teacher(top_k: int | None, folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"teacher_cache": str(tmp_path / "predictions"), "teacher_top_k": top_k}
    first, second, other = distilled(folder, **settings), distilled(folder, **settings), distilled(folder)
    batch = next(iter(loader()))
    losses = [module.training_step(batch, 0).item() for module in (first, second, other)]
    assert [module.teacher is not None and module.teacher.loaded for module in (first, second, other)] == [
        True,
        False,
        True,
    ]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5) if top_k is None else losses[0] < losses[2]


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_a_teacher_of_its_own(folder: Path, tmp_path: Path) -> None:
    tiny_model("llama", seed=3).save_pretrained(tmp_path / "teacher")
    module = LowRankModule(str(folder), loss="kd", teacher=str(tmp_path / "teacher"))
    module.configure_model()
    batch = next(iter(loader()))
    assert module.training_step(batch, 0).item() > 0.1  # the dense model itself would be at 0
    with pytest.raises(ModelError, match=r"a model of random weights has nothing to teach: give model\.teacher=FOLDER"):
        LowRankModule(CONFIG, loss="kd").configure_model()
    module = LowRankModule(CONFIG, loss="kd", teacher=str(tmp_path / "teacher"))
    module.configure_model()
    assert module.training_step(batch, 0).item() > 0.1
    with pytest.raises(ModelError, match="cannot be loaded"):
        LowRankModule(str(folder), loss="kd", teacher=str(tmp_path / "none")).load_teacher()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, r"model\.loss='mse' is unknown; choose one of ce, kd, mixed"),
        ({"loss": "mixed", "kd_weight": 1.5}, r"model\.kd_weight=1\.5 is no share"),
        ({"loss": "kd", "temperature": 0.0}, r"model\.temperature=0\.0 is no temperature"),
        ({"loss": "kd", "teacher_top_k": 0}, r"model\.teacher_top_k=0 needs at least 1"),
        ({"loss": "kd", "teacher_top_k": 8, "temperature": 2.0}, r"teacher_top_k=8 needs .* \(now 2\.0\)"),
        ({"teacher_cache": "folder"}, r"model\.loss='ce' has no teacher; choose 'kd' or 'mixed'"),
        ({"optimizer": "adamm"}, r"optimizer='adamm' is unknown; did you mean 'adamw'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LowRankError, match=message):
        LowRankModule(CONFIG, **settings)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_gradient_checkpointing_changes_no_number(folder: Path) -> None:
    """Also where the embeddings are frozen, as they are in every recovery."""
    gradients = []
    for checkpointing in (False, True):
        module = distilled(folder, gradient_checkpointing=checkpointing)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        layers = [layer for layer in module.modules() if isinstance(layer, FactoredLinear)]
        for layer in layers:
            layer.requires_grad_(True)
        module.train()
        assert module.model.is_gradient_checkpointing == checkpointing
        module.training_step(next(iter(loader())), 0).backward()
        gradients.append([parameter.grad for layer in layers for parameter in layer.parameters()])
    assert len(gradients[0]) >= 20
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def fit(settings: dict[str, Any], folder: Path, checkpoints: Path, **extra: Any) -> LowRankModule:
    """Three steps of recovery of a compressed model, with a checkpoint after every step."""
    module = LowRankModule(str(folder), learning_rate=0.01)
    recovery = extra.pop("recovery", True)
    callbacks = [
        LowRankCompression(**{"keep_ratio": 0.6, "min_rank": 4, "batches": [BLOCKS], **extra.pop("compression", {})}),
        *(recovery if isinstance(recovery, list) else [RankPreservingLoRA(rank=2)] if recovery else []),
        ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1, **extra),
    ]
    validation = loader() if "limit_val_batches" in settings else None
    pl.Trainer(**{**settings, "enable_checkpointing": True}, callbacks=callbacks).fit(module, loader(), validation)
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


class Seen(pl.Callback):
    """Logits of the model after each step, as it runs in the fit."""

    def __init__(self) -> None:
        self.logits: dict[int, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.logits[trainer.global_step] = logits(pl_module)  # type: ignore[arg-type]
        pl_module.train()


def lora(**arguments: Any) -> RankPreservingLoRA:
    return RankPreservingLoRA(config={"class_path": "peft.LoraConfig", "init_args": {"r": 2, **arguments}})


def reallocation(**settings: Any) -> RankReallocation:
    return RankReallocation(
        0.3, **{"end": 3, "every": 1, "min_rank": 2, "batches": [BLOCKS[:4], BLOCKS[4:]], **settings}
    )


RECOVERIES: dict[str, Callable[[], list[pl.Callback]]] = {
    "DoRA": lambda: [lora(use_dora=True)],
    "PiSSA": lambda: [lora(init_lora_weights="pissa")],
    "EVA": lambda: [lora(init_lora_weights="eva")],
    "CorDA": lambda: [lora(init_lora_weights="corda")],
    "MiSS": lambda: [RankPreservingLoRA(config={"class_path": "peft.MissConfig", "init_args": {"r": 2}})],
    "masks": lambda: [reallocation(), FactorTuning()],
    "masks and adapters": lambda: [reallocation(), RankPreservingLoRA(rank=2)],
    "masks that are all on": lambda: [reallocation(begin=2)],
    "refinement": lambda: [Refinement(block_epochs=0, batches=[BLOCKS[:4], BLOCKS[4:]])],
}


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_a_checkpoint_from_the_middle_of_a_recovery_becomes_a_plain_model(
    recovery: str, trainer_settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    """Step 2 of 3: as it ran there, to the rounding of a merge."""
    seen = Seen()
    settings = {**trainer_settings, "limit_val_batches": 1.0}
    compression = {"keep_ratio": 0.6, "preset": "unirank"}
    fit(settings, folder, tmp_path / "ckpt", recovery=[*RECOVERIES[recovery](), seen], compression=compression)
    loaded = LowRankModule(str(folder))
    load_checkpoint(loaded, tmp_path / "ckpt" / "step=2.ckpt")
    torch.testing.assert_close(logits(loaded), seen.logits[2], rtol=0, atol=1e-5)
    assert (seen.logits[2] - seen.logits[3]).abs().max() > 1e-3
    factored = [layer for layer in loaded.modules() if isinstance(layer, FactoredLinear)]
    assert all(type(layer) is FactoredLinear for layer in factored)
    assert all(type(child) is nn.Linear for layer in factored for child in layer.children())
    assert loaded.plan is not None
    export(loaded.model, loaded.plan, tmp_path / "exported")
    again: Any = load(tmp_path / "exported").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=BLOCKS[:2]).logits, logits(loaded), rtol=0, atol=1e-6)


def test_masks_of_a_dense_model_come_back_from_a_checkpoint(
    trainer_settings: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    module, seen = LowRankModule(str(folder), learning_rate=0.01), Seen()
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = pl.Trainer(**{**trainer_settings, "enable_checkpointing": True}, callbacks=[reallocation(), seen, saving])
    trainer.fit(module, loader())
    loaded = LowRankModule(str(folder))
    load_checkpoint(loaded, tmp_path / "step=2.ckpt")
    torch.testing.assert_close(logits(loaded), seen.logits[2], rtol=0, atol=1e-5)
    assert loaded.plan is not None
    check_applied(loaded.model, loaded.plan)
    trainer.save_checkpoint(tmp_path / "cut.ckpt")  # of the model that was cut, which no other callback has a plan of
    load_checkpoint(cut := LowRankModule(str(folder)), tmp_path / "cut.ckpt")
    assert torch.equal(logits(cut), logits(module))
    assert cut.plan == module.plan


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
            ExportError, match=r"bad\.ckpt' cannot be read .*; give a file, or a whole folder, of ModelCheckpoint"
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
