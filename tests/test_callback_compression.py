"""LowRankCompression in real fits: surgery before the optimizers, a kept compression, users' own modules, resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lowrank_lit.callbacks import ExportOnFitEnd, LowRankCompression, RankPreservingLoRA
from lowrank_lit.compress import compress
from lowrank_lit.corpus import embedded_text
from lowrank_lit.data import TextDataModule
from lowrank_lit.errors import BudgetError, DataError, ExportError, LowRankError, PlanError
from lowrank_lit.evaluation import perplexity
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.module import LowRankModule
from lowrank_lit.plan import RankPlan
from tests.tiny import tiny_model

KEEP = 0.6


@pytest.fixture
def trainer_settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 2,
        "limit_val_batches": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path / "root",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama", vocab_size=300).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., TextDataModule]:
    path = tmp_path / "text.txt"
    path.write_text(embedded_text("test")[:6000], encoding="utf-8")

    def make(**settings: Any) -> TextDataModule:
        sources = {split: str(path) for split in settings.pop("splits", ("train", "test"))}
        sizes = {"block_size": 32, "batch_size": 4, "calibration_blocks": 16, "evaluation_blocks": 6}
        return TextDataModule(sources, str(tokenizer_folder), **{**sizes, **settings})

    return make


class Forwards:
    """Counts what runs through the model of a module while a fit is set up."""

    def __init__(self, module: LowRankModule) -> None:
        module.configure_model()
        self.count = 0
        module.model.register_forward_pre_hook(self._see)

    def _see(self, *_: Any) -> None:
        self.count += 1


@torch.no_grad()
def logits(module: LowRankModule, data: TextDataModule) -> Tensor:
    result: Tensor = module.model(input_ids=data.blocks("train")[:2]).logits
    return result


def factored(module: nn.Module) -> dict[str, FactoredLinear]:
    return {name: child for name, child in module.named_modules() if isinstance(child, FactoredLinear)}


def make_callback(keep_ratio: float = KEEP, **settings: Any) -> LowRankCompression:
    return LowRankCompression(keep_ratio, **{"min_rank": 4, **settings})


def test_every_factor_is_in_the_optimizer_and_trains(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    module, data, callback = LowRankModule(str(folder), learning_rate=0.01), text(), make_callback()
    trainer = pl.Trainer(**trainer_settings, callbacks=[callback])
    trainer.fit(module, data)
    layers = factored(module)
    assert len(layers) >= 8  # of 14: by the budget others stay dense
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    assert len(own) == 2 * len(layers)
    assert own <= optimized
    assert optimized == {id(p) for p in module.parameters()}  # and no dense weight that was replaced

    again = LowRankModule(str(folder))
    again.configure_model()
    assert callback.result is not None
    result = compress(again.model, data.calibration_batches(), keep_ratio=KEEP, min_rank=4)
    assert result.plan == callback.result.plan
    trained, start = dict(module.named_parameters()), dict(again.named_parameters())
    assert trained.keys() == start.keys()
    assert not any(torch.equal(trained[name], value) for name, value in start.items())


def test_the_record_and_the_plan_file(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    module, data, callback = LowRankModule(str(folder)), text(), make_callback()
    trainer = pl.Trainer(**{**trainer_settings, "max_steps": 0}, callbacks=[callback])
    trainer.fit(module, data)
    assert callback.result is not None
    plan, record = callback.result.plan, callback.result.record
    assert RankPlan.load(Path(trainer.default_root_dir) / "plan.json") == plan
    assert plan.keep_ratio <= KEEP
    dense = LowRankModule(str(folder))
    dense.configure_model()
    sizes = {"dense": dense.model, "compressed": module.model}
    blocks = data.blocks("test")[:6]
    for key, model in sizes.items():
        assert record["perplexity"][key] == pytest.approx(perplexity(model, blocks, batch_size=4), rel=1e-6)
        # bfloat16 on disk, float32 in memory
        assert record["bytes"][key] == 2 * sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert record["perplexity"]["dense"] != record["perplexity"]["compressed"]
    assert record["seconds"]["evaluate"] > 0
    assert record["calibration"]["blocks"] == 16
    assert record["calibration"]["tokens"] == 16 * 32
    assert json.loads(json.dumps(record)) == record


def payload(folder: Path) -> int:
    """Bytes of the tensors in a folder's weight file: all of it but the header and its length (8 bytes)."""
    content = (folder / "model.safetensors").read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little")


@pytest.mark.parametrize("storage", ["factored", "pivot"])
def test_recorded_bytes_are_those_of_the_files(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule], storage: str, tmp_path: Path
) -> None:
    """bfloat16 on disk, float32 in memory, and the indices of the pivot form int32 in both."""
    module, callback = LowRankModule(str(folder)), make_callback(storage=storage)
    callbacks = [callback, ExportOnFitEnd(str(tmp_path / "out"))]
    data = text(splits=("train",))
    pl.Trainer(**{**trainer_settings, "max_steps": 0}, callbacks=callbacks).fit(module, data)
    assert callback.result is not None
    plan, record = callback.result.plan, callback.result.record
    assert {matrix.form for matrix in plan.matrices} >= {storage}
    assert record["bytes"] == {"dense": payload(folder), "compressed": payload(tmp_path / "out")}
    indices = 4 * sum(matrix.rows for matrix in plan.matrices if matrix.form == "pivot")
    assert record["bytes"]["compressed"] == 2 * record["parameters"]["model"] + indices
    again = make_callback(storage=storage)  # taken from disk
    pl.Trainer(**{**trainer_settings, "max_steps": 0}, callbacks=[again]).fit(LowRankModule(str(folder)), data)
    assert again.result is not None
    assert (again.result.record["from_cache"], again.result.record["bytes"]) == (True, record["bytes"])


def test_without_a_test_text_nothing_is_measured(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    callback = make_callback()
    trainer = pl.Trainer(**{**trainer_settings, "max_steps": 0}, callbacks=[callback])
    trainer.fit(LowRankModule(str(folder)), text(splits=("train",)))
    assert callback.result is not None
    assert callback.result.record["perplexity"] == {"dense": None, "compressed": None}


def test_a_second_run_takes_the_kept_compression(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    data, results, states, counts = text(), [], [], []
    for keep_ratio in (KEEP, KEEP, 0.8):
        module, callback = LowRankModule(str(folder)), make_callback(keep_ratio)
        forwards = Forwards(module)
        pl.Trainer(**{**trainer_settings, "max_steps": 0}, callbacks=[callback]).fit(module, data)
        counts.append(forwards.count)
        results.append(callback.result)
        states.append(logits(module, data))
    assert counts[0] > 0
    assert counts[1] == 0
    assert counts[2] > 0
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    first, second, third = results
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.plan == second.plan
    assert second.record == json.loads(json.dumps(first.record)) | {"from_cache": True}
    assert third.plan.fingerprint != first.plan.fingerprint


def test_training_is_the_same_whether_computed_or_taken(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    weights = []
    for _ in range(2):
        pl.seed_everything(3, verbose=False)
        module = LowRankModule(str(folder), learning_rate=0.01)
        pl.Trainer(**trainer_settings, callbacks=[make_callback(), RankPreservingLoRA(rank=2)]).fit(module, text())
        weights.append(module.state_dict())
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_truncated_kept_file_is_computed_again(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    data, settings = text(), {**trainer_settings, "max_steps": 0}
    first = LowRankModule(str(folder))
    pl.Trainer(**settings, callbacks=[make_callback()]).fit(first, data)
    file = trainer_settings["default_root_dir"] / "compressed" / "factors.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    second = LowRankModule(str(folder))
    forwards = Forwards(second)
    with pytest.warns(UserWarning, match="cannot be read .*; calibrating again"):
        pl.Trainer(**settings, callbacks=[make_callback()]).fit(second, data)
    assert forwards.count > 0
    assert torch.equal(logits(first, data), logits(second, data))
    assert file.read_bytes() == whole


def test_a_place_that_cannot_be_written_costs_warnings(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    root = trainer_settings["default_root_dir"]
    (root / "plan.json" / "in the way").mkdir(parents=True)
    (root / "compressed").write_text("in the way")
    module, callback = LowRankModule(str(folder)), make_callback()
    with pytest.warns(UserWarning, match="cannot be written|could not be kept") as caught:
        pl.Trainer(**trainer_settings, callbacks=[callback]).fit(module, text())
    messages = [str(warning.message) for warning in caught]
    assert any("could not be kept in" in message for message in messages)
    assert any("plan file '" in message and "cannot be written" in message for message in messages)
    assert callback.result is not None
    assert len(factored(module)) >= 8


def test_the_export_folder_is_looked_at_before_anything_is_computed(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    module = LowRankModule(str(folder))
    forwards = Forwards(module)
    callbacks = [make_callback(), ExportOnFitEnd(str(tmp_path / "taken"))]
    with pytest.raises(ExportError, match="taken"):
        pl.Trainer(**trainer_settings, callbacks=callbacks).fit(module, text())
    assert forwards.count == 0
    assert not factored(module)


def test_no_batches_and_data_that_are_read_once(trainer_settings: dict[str, Any], folder: Path) -> None:
    module = LowRankModule(str(folder))
    loader = DataLoader(TensorDataset(torch.zeros(4, 8, dtype=torch.long)))
    with pytest.raises(DataError, match=r"cannot calibrate on a generator.*; pass batches=\[\.\.\.\] to the callback"):
        pl.Trainer(**trainer_settings, callbacks=[make_callback()]).fit(module, (batch for batch in loader))
    assert not factored(module)


def test_bad_settings_are_refused_at_once() -> None:
    with pytest.raises(BudgetError, match=r"keep_ratio=1\.5"):
        LowRankCompression(1.5)
    with pytest.raises(ValueError, match="allocator"):
        LowRankCompression(0.5, allocator="none such")
    settings = LowRankCompression(0.5, targets=["*.mlp.*"]).settings()
    assert (settings["keep_ratio"], settings["targets"], settings["metric"]) == (0.5, ["*.mlp.*"], "two_sided")


def test_only_a_fit_compresses(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    module, callback = LowRankModule(str(folder)), make_callback()
    data = text(splits=("train", "validation"))
    pl.Trainer(**{**trainer_settings, "limit_val_batches": 1}, callbacks=[callback]).validate(
        module, data, verbose=False
    )
    assert callback.result is None
    assert not factored(module)


def test_one_callback_compresses_each_model_once(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule]
) -> None:
    callback, first, second = make_callback(), LowRankModule(str(folder)), LowRankModule(str(folder))
    pl.Trainer(**trainer_settings, callbacks=[callback]).fit(first, text())
    layers = factored(first)
    pl.Trainer(**trainer_settings, callbacks=[callback]).fit(first, text())
    assert factored(first) == layers  # the same objects
    pl.Trainer(**trainer_settings, callbacks=[callback]).fit(second, text())
    assert factored(second).keys() == layers.keys()


class OwnModule(pl.LightningModule):
    """What a user may have: a plain network as an attribute, and a forward of one positional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 5))

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.net(features)
        return result

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def features() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 24, generator=generator) * torch.logspace(0, -2, 24)
    return TensorDataset(x, torch.randint(0, 5, (96,), generator=generator))


@pytest.mark.parametrize("form", ["tensors", "tuples", "keywords"])
def test_a_users_own_module(form: str, trainer_settings: dict[str, Any]) -> None:
    loader = DataLoader(features(), batch_size=16)
    batches: list[Any] = list(loader)
    if form != "tuples":
        batches = [x if form == "tensors" else {"features": x} for x, _ in batches]
    module = OwnModule()
    callback = make_callback(0.5, min_rank=1, allocator="uniform", batches=batches)
    trainer = pl.Trainer(**trainer_settings, callbacks=[callback])
    trainer.fit(module, loader)
    layers = factored(module)
    assert {"net.0", "net.2"} <= layers.keys()
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in module.parameters()}
    assert callback.result is not None
    record = callback.result.record
    assert record["calibration"]["tokens"] == 96  # vectors, not numbers
    assert record["perplexity"] == {"dense": None, "compressed": None}
    assert record["keep_ratio"]["achieved"] <= 0.5


def test_every_form_of_batch_gives_the_same_factors() -> None:
    loader = DataLoader(features(), batch_size=16)
    outputs = []
    x = features().tensors[0]
    for batches in ([x for x, _ in loader], list(loader), [{"features": x} for x, _ in loader]):
        torch.manual_seed(0)
        module = OwnModule()
        before = module(x).detach()
        compress(module, batches, keep_ratio=0.5, min_rank=1, allocator="uniform")
        outputs.append(module(x).detach())
        error = float((outputs[-1] - before).norm() / before.norm())
        assert 1e-6 < error < 0.2  # 0.02: the features have a decaying spectrum
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def interrupted(
    settings: dict[str, Any], folder: Path, data: TextDataModule, checkpoints: Path, **extra: Any
) -> tuple[LowRankModule, LowRankCompression]:
    """A fit with a checkpoint after every step; ``ckpt_path`` resumes."""
    module, ckpt_path = LowRankModule(str(folder), learning_rate=0.01), extra.pop("ckpt_path", None)
    callback = make_callback(**extra)
    saving = ModelCheckpoint(checkpoints, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [callback, RankPreservingLoRA(rank=2), saving]
    trainer = pl.Trainer(**{**settings, "enable_checkpointing": True}, callbacks=callbacks)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, callback


def test_a_resumed_fit_equals_an_uninterrupted_one(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    data = text(batch_size=512)
    assert len(data.blocks("train")) < 512  # one batch an epoch, so that the order of the blocks hardly matters
    settings = {**trainer_settings, "max_steps": 4}
    whole, _ = interrupted(settings, folder, data, tmp_path / "ckpt")
    path = str(tmp_path / "ckpt" / "step=2.ckpt")
    resumed, callback = interrupted(settings, folder, data, tmp_path / "other", ckpt_path=path)
    assert sorted(file.name for file in (tmp_path / "other").iterdir()) == ["step=3.ckpt", "step=4.ckpt"]
    expected = whole.state_dict()
    change = max(float((value - expected[name]).abs().max()) for name, value in resumed.state_dict().items())
    assert change < 1e-6  # 4e-8: blocks are summed in another order
    assert callback._guard is None
    assert not resumed.model._load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_ratio": 0.4}, "'model.layers.*: the checkpoint belongs to another plan"),
        ({"damping": 1e-3}, "^the checkpoint belongs to another plan"),
    ],
)
def test_a_checkpoint_of_another_plan_is_refused(
    change: dict[str, float],
    message: str,
    trainer_settings: dict[str, Any],
    folder: Path,
    text: Callable[..., TextDataModule],
    tmp_path: Path,
) -> None:
    uniform = {"allocator": "uniform"}  # ranks of the other damping are then the same, and only the fingerprint differs
    interrupted(trainer_settings, folder, text(), tmp_path / "ckpt", **uniform)
    path = str(tmp_path / "ckpt" / "step=2.ckpt")
    with pytest.raises(PlanError, match=message) as caught:
        interrupted(trainer_settings, folder, text(), tmp_path / "ckpt", ckpt_path=path, **uniform, **change)
    assert "resume with the recipe that made it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_workspace_gives_the_same_model(
    trainer_settings: dict[str, Any],
    folder: Path,
    text: Callable[..., TextDataModule],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    modules = {}
    for workspace in (None, "relative/space"):
        settings = {**trainer_settings, "max_steps": 0, "default_root_dir": tmp_path / f"run-{workspace is None}"}
        modules[workspace] = LowRankModule(str(folder), dtype="bfloat16")
        callback = make_callback(preset="fast", workspace=workspace)
        pl.Trainer(**settings, callbacks=[callback, ExportOnFitEnd()]).fit(modules[workspace], text())
    plain, streamed = (module.model.state_dict() for module in modules.values())
    assert plain.keys() == streamed.keys()
    assert all(torch.equal(plain[name], value) for name, value in streamed.items())
    space = tmp_path / "relative" / "space"
    assert space.is_dir()
    assert not any(space.iterdir())


def test_a_bad_workspace_is_refused_before_anything_is_computed(
    trainer_settings: dict[str, Any], folder: Path, text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    module = LowRankModule(str(folder))
    forwards = Forwards(module)
    callback = make_callback(workspace=str(tmp_path / "file"))
    with pytest.raises(LowRankError, match=r"^workspace='.*file' cannot be made \(.*\); give a folder on a disk"):
        pl.Trainer(**trainer_settings, callbacks=[callback]).fit(module, text())
    assert forwards.count == 0
    assert not factored(module)
