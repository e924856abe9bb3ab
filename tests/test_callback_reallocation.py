"""RankReallocation in real fits: masks move while shapes stay, and the fit ends with the plain smaller model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lowrank_lit.hub as hub
from lowrank_lit.callbacks.compression import LowRankCompression
from lowrank_lit.callbacks.export import ExportOnFitEnd
from lowrank_lit.callbacks.reallocation import RankReallocation, _counted
from lowrank_lit.callbacks.recovery import FactorTuning, RankPreservingLoRA
from lowrank_lit.callbacks.refinement import Refinement
from lowrank_lit.callbacks.report import RankReport
from lowrank_lit.errors import BudgetError, DataError, LowRankError, ModelError, PlanError
from lowrank_lit.masks import MaskedLinear
from lowrank_lit.overview import rank_cells
from lowrank_lit.plan import RankPlan
from lowrank_lit.surgery import check_applied, target_parameters
from tests.test_html import check
from tests.tiny import batches, tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*logging interval", "ignore:.*calibration tokens"
)
STEPS = 12
CALIBRATION = batches(n=2, structured=True)


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of tokens for twelve batches of two."""

    def __init__(self) -> None:
        drawn = batches(n=STEPS, structured=True, seed=1)
        self.rows = torch.cat([batch["input_ids"] for batch in drawn])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index]}


class Training(pl.LightningModule):
    """A tiny model with everything trained, built in ``configure_model``."""

    def __init__(self, family: str = "llama", *, explode_at: int = -1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.family = family
        self.explode_at = explode_at
        self.wanted = dtype
        self.model: Any = None
        self.shapes: list[list[torch.Size]] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_model(self.family, num_hidden_layers=1).to(self.wanted)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == self.explode_at:
            raise KeyError("the power went out")
        self.shapes.append([parameter.shape for parameter in self.parameters()])
        loss: Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Rows(), batch_size=2)


def reallocation(keep_ratio: float = 0.4, **settings: Any) -> RankReallocation:
    chosen = {"end": 8, "every": 2, "min_rank": 2, "batches": CALIBRATION, **settings}
    return RankReallocation(keep_ratio, **chosen)


def trainer(folder: Path, *callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    chosen: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**chosen, **settings})


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model(**batches(n=1, structured=True)[0]).logits
    return result


class Watch(pl.Callback):
    """Sees masks after every step, and the masked model when training ends."""

    def __init__(self) -> None:
        self.masks: list[dict[str, Tensor]] = []
        self.logits: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        layers = {n: m for n, m in pl_module.named_modules() if isinstance(m, MaskedLinear)}
        self.masks.append({name: layer.mask.clone() for name, layer in layers.items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module: Any = pl_module
        self.logits = logits(module.model)


def test_fit_ends_with_the_plain_smaller_model(tmp_path: Path) -> None:
    module, callback, watch = Training(), reallocation(), Watch()
    fitted = trainer(tmp_path, callback, watch)
    fitted.fit(module)
    held = [parameter for group in fitted.optimizers[0].param_groups for parameter in group["params"]]
    own = set(map(id, module.parameters()))
    assert held, "embeddings and norms train too, and stay"
    assert {*map(id, held), *map(id, fitted.optimizers[0].state)} <= own, "the optimizer has let go of what was cut"
    assert all(shapes == module.shapes[0] for shapes in module.shapes), "shapes changed during the fit"
    assert [entry["step"] for entry in callback.history] == [2, 4, 6, 8]
    stored = [entry["stored"] for entry in callback.history]
    assert stored == sorted(stored, reverse=True)
    assert stored[-1] <= 0.4 < stored[0]
    # The last mask has been there for four steps, and is what the model was cut to.
    assert all(torch.equal(watch.masks[-1][name], mask) for name, mask in watch.masks[8].items())
    assert callback.plan is not None
    check_applied(module.model, callback.plan)
    assert not any(isinstance(layer, MaskedLinear) for layer in module.modules())
    assert target_parameters(module.model, callback.plan) == callback.plan.parameters
    assert 0.35 < callback.plan.keep_ratio <= 0.4
    for entry in callback.plan.matrices:
        kept = int(watch.masks[-1][f"model.{entry.name}"].sum())
        assert entry.rank == kept or entry.form == "dense"
    assert watch.logits is not None
    torch.testing.assert_close(logits(module.model), watch.logits, rtol=0, atol=1e-5)  # 5e-7 measured


def test_linear_schedule_and_a_policy_of_ones_own(tmp_path: Path) -> None:
    class Late(RankReallocation):
        def should_reallocate(self, trainer: pl.Trainer, step: int) -> bool:
            return step in (3, 5)

    callback = Late(0.4, end=8, schedule="linear", min_rank=2, batches=CALIBRATION)
    trainer(tmp_path, callback).fit(Training())
    steps = [(entry["step"], round(entry["keep_ratio"], 6)) for entry in callback.history]
    # The way from 1.0 to 0.4 in 8 steps; and the target at the end of it, whatever the policy says.
    assert steps == [(3, 0.775), (5, 0.625), (8, 0.4)]
    assert callback.plan is not None
    assert callback.plan.keep_ratio <= 0.4


def test_a_fit_that_stops_early_still_ends_within_the_budget(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    callback = reallocation()
    trainer(tmp_path, callback, Stop()).fit(Training())
    assert [entry["step"] for entry in callback.history] == [2, 3]
    assert callback.plan is not None
    assert callback.plan.keep_ratio <= 0.4


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_the_end_is_by_default_at_60_percent_of_the_run(family: str, tmp_path: Path) -> None:
    """And the matrices of gpt2 that end dense are Conv1D again."""
    module, callback = Training(family), reallocation(0.9, end=None, every=3)
    trainer(tmp_path, callback, max_steps=-1, max_epochs=1).fit(module)
    assert [entry["step"] for entry in callback.history] == [3, 6, 7]
    assert callback.plan is not None
    check_applied(module.model, callback.plan)
    assert "dense" in {entry.form for entry in callback.plan.matrices}


def test_from_a_compressed_model_to_an_export(tmp_path: Path) -> None:
    module = Training()
    compression = LowRankCompression(0.8, preset="unirank", min_rank=2, batches=CALIBRATION)
    callback = reallocation(batches=None)
    watch, report = Watch(), RankReport()
    trainer(tmp_path, compression, callback, watch, ExportOnFitEnd(), report).fit(module)
    assert callback.history[0]["keep_ratio"] < 0.8
    assert watch.logits is not None
    assert callback.plan is not None
    assert compression.result is not None
    assert compression.result.plan == callback.plan == RankPlan.from_dict(callback.plan.to_dict())
    assert callback.plan.allocator == "progressive"
    model: Any = hub.load(tmp_path / "model").eval()
    torch.testing.assert_close(logits(model), watch.logits, rtol=0, atol=1e-5)
    assert model.config.quantization_config.rank_plan() == callback.plan
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["complete"]
    assert record["keep_ratio"]["requested"] == 0.4
    assert record["keep_ratio"]["achieved"] == callback.plan.keep_ratio
    parameters = sum(parameter.numel() for parameter in module.model.parameters())
    assert record["parameters"]["model"] == parameters
    assert record["bytes"]["compressed"] == 4 * parameters
    assert record["reallocation"] == callback.history
    assert record["ranks"] == rank_cells(callback.plan), "those of the model at the end"
    assert len(record["spectra"]) == len(record["ranks"]), "those of the compression, under the new cuts"
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "reallocation[0].keep_ratio" in page.text


def test_experts_are_cut_with_the_rest(tmp_path: Path) -> None:
    """From a dense mixture: experts come apart, and count by the tokens that they get."""
    own, module = reallocation(0.6), Training("qwen3_moe")
    fit = trainer(tmp_path, own)
    fit.fit(module)
    plan = own.plan
    assert plan is not None
    assert sum(".experts." in matrix.name for matrix in plan.matrices) == 12
    check_applied(module.model, plan)
    assert target_parameters(module.model, plan) == plan.parameters <= 0.6 * plan.dense_parameters
    assert torch.isfinite(logits(module.model)).all()


def test_adapters_train_and_are_merged_before_the_cut(tmp_path: Path) -> None:
    module, callback, lora, watch = Training(), reallocation(), RankPreservingLoRA(rank=2), Watch()
    trainer(tmp_path, callback, lora, ExportOnFitEnd(), watch).fit(module)
    assert lora.record is not None
    assert lora.record.largest_update > 0
    assert callback.plan is not None
    check_applied(module.model, callback.plan)
    assert not any("lora" in name for name, _ in module.named_parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert watch.logits is not None  # it stands after the recovery: of the merged model
    torch.testing.assert_close(logits(module.model), watch.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(hub.load(tmp_path / "model").eval()), watch.logits, rtol=0, atol=1e-5)


class ByStep(Training):
    """Takes its batch by the number of the step: where a plain dataloader stands is not part of a checkpoint."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        first = 2 * self.global_step % len(Rows())
        return super().training_step({"input_ids": Rows().rows[first : first + 2]}, batch_idx)


class Capture(pl.Callback):
    """Weights, masks and the callback's plan after the fit, to compare two fits."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights = copy.deepcopy(pl_module.state_dict())


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_fit_ends_with_the_same_weights_without_calibrating_again(
    adapters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path, *, explode_at: int = -1, resume: Path | None = None) -> tuple[Capture, RankReallocation]:
        pl.seed_everything(0)
        callback, capture = reallocation(), Capture()
        checkpoint = ModelCheckpoint(dirpath=folder / "steps", every_n_train_steps=5, save_top_k=-1)
        recovery = [RankPreservingLoRA(rank=2)] if adapters else []
        run = trainer(folder, callback, *recovery, capture, checkpoint)
        run.fit(ByStep(explode_at=explode_at), ckpt_path=resume, weights_only=True)
        return capture, callback

    whole, through = fit(tmp_path / "whole")
    with pytest.raises(KeyError, match="the power went out"):
        fit(tmp_path / "cut", explode_at=7)
    written = (tmp_path / "cut" / "reallocation" / "factors.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("lowrank_lit.callbacks.reallocation.factor_fully", None)  # calibrating again would call it
    (last,) = (tmp_path / "cut" / "steps").glob("*step=5*")
    again, resumed = fit(tmp_path / "cut", resume=last)
    assert (tmp_path / "cut" / "reallocation" / "factors.safetensors").stat().st_mtime_ns == written
    assert resumed.history == through.history
    assert resumed.plan == through.plan
    assert again.weights.keys() == whole.weights.keys()
    assert all(torch.equal(value, whole.weights[name]) for name, value in again.weights.items())


def test_a_checkpoint_of_another_target_is_refused(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "steps", every_n_train_steps=5, save_top_k=-1)
    trainer(tmp_path, reallocation(), checkpoint).fit(Training())
    last = next((tmp_path / "steps").glob("*step=5*"))
    with pytest.raises(PlanError, match=r"on its way to keep_ratio=0\.4"):
        trainer(tmp_path, reallocation(0.5)).fit(Training(), ckpt_path=last, weights_only=True)


def test_a_checkpoint_of_another_model_is_refused_and_its_factors_stay(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "steps", every_n_train_steps=5, save_top_k=-1)
    trainer(tmp_path, reallocation(), checkpoint).fit(Training())
    kept = (tmp_path / "reallocation" / "factors.safetensors").read_bytes()
    last = next((tmp_path / "steps").glob("*step=5*"))
    run, other = trainer(tmp_path, reallocation(batches=CALIBRATION[:1])), Training()
    run.ckpt_path = str(last)  # as the command does, so that nothing is computed first
    with pytest.raises(PlanError, match="began from another model or calibration text; resume with the recipe"):
        run.fit(other, weights_only=True)
    assert other.shapes == []
    assert (tmp_path / "reallocation" / "factors.safetensors").read_bytes() == kept


def test_what_a_loss_counts() -> None:
    """Of eight tokens two are padding; the loss is the mean of the three that are learnt."""
    ids = torch.arange(8).reshape(2, 4)
    assert _counted({"input_ids": ids}) == (None, 6 / 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    labels = torch.where(torch.tensor([[0, 0, 1, 1], [0, 1, 0, 0]]) > 0, ids, -100)
    found, share = _counted({"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert found is not None
    assert torch.equal(found, mask.bool())
    assert share == 3 / 6
    assert _counted(ids) == (None, 1.0)


class Validated(Training):
    """Logs a loss that rises with every validation, so that the first state is always the best."""

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.global_step))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Rows(), batch_size=24)


def test_a_refinement_chooses_among_the_states_after_the_last_move(tmp_path: Path) -> None:
    """What was best before had other components."""
    refinement = Refinement(block_epochs=0, batches=CALIBRATION)
    run = trainer(tmp_path, reallocation(), refinement, val_check_interval=1)
    run.fit(Validated())
    assert refinement.record == {"best": 8.0, "step": 8}


def test_a_fit_that_died_goes_on_from_its_masks(tmp_path: Path) -> None:
    module, callback = Training(explode_at=5), reallocation()
    with pytest.raises(KeyError, match="the power went out"):
        trainer(tmp_path, callback).fit(module)
    layers = [layer for layer in module.modules() if isinstance(layer, MaskedLinear)]
    assert layers
    assert all(layer.sums is None for layer in layers), "nothing watches a model that is not trained"
    module.explode_at = -1
    trainer(tmp_path, callback).fit(module)
    assert not any(isinstance(layer, MaskedLinear) for layer in module.modules())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"end": STEPS + 1}, f"end={STEPS + 1} lies outside of the run, which has {STEPS} steps"),
        ({"begin": 8}, "begin=8, end=8"),
        ({"begin": -1}, "begin=-1"),
        ({"every": 0}, "every=0"),
        ({"schedule": "sudden"}, "schedule='sudden'"),
        ({"keep_ratio": 0.001}, "keep_ratio=0.001 allows"),
        ({"keep_ratio": 1.0}, "is no less than the 1.0000"),
        ({"targets": ["*.nowhere"]}, "targets pattern"),
    ],
)
def test_bad_settings_are_refused_before_the_fit(settings: dict[str, Any], named: str, tmp_path: Path) -> None:
    module = Training()
    with pytest.raises(LowRankError, match=named):
        trainer(tmp_path, reallocation(**settings)).fit(module)
    assert module.shapes == [], "a step was made"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"end": STEPS + 1}, f"end={STEPS + 1} lies outside of the run"),
        ({"keep_ratio": 0.8}, r"keep_ratio=0\.8 of RankReallocation is no less than the 0\.6000"),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_compression(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    compression = LowRankCompression(0.6, preset="unirank", min_rank=2, batches=CALIBRATION)
    module = Training()
    with pytest.raises(LowRankError, match=named):
        trainer(tmp_path, compression, reallocation(**settings), FactorTuning()).fit(module)
    assert compression.result is None
    assert not (tmp_path / "compressed").exists()


def test_bad_settings_are_refused_at_once() -> None:
    with pytest.raises(BudgetError, match=r"keep_ratio=1\.5"):
        RankReallocation(1.5)
    with pytest.raises(LowRankError, match=r"decay=1\.0"):
        RankReallocation(0.4, decay=1.0)


def test_callbacks_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="list it after RankReallocation"):
        trainer(tmp_path, ExportOnFitEnd(), reallocation()).fit(Training())
    compression = LowRankCompression(0.8, preset="unirank", min_rank=2, batches=CALIBRATION)
    with pytest.raises(ModelError, match="list LowRankCompression before it"):
        trainer(tmp_path, reallocation(), compression).fit(Training())
    with pytest.raises(ModelError, match="list RankReallocation before"):
        trainer(tmp_path, compression, RankPreservingLoRA(rank=2), reallocation()).fit(Training())
    pivots = LowRankCompression(0.8, preset="unirank", min_rank=2, storage="pivot", batches=CALIBRATION)
    with pytest.raises(ModelError, match="storage='factored'"):
        trainer(tmp_path, pivots, reallocation()).fit(Training())
    with pytest.raises(DataError, match="several train dataloaders"):
        trainer(tmp_path, reallocation(batches=None)).fit(Training(), [DataLoader(Rows()), DataLoader(Rows())])
    with pytest.raises(ModelError, match=r"quantize='nf4' rotates the components"):
        trainer(tmp_path, reallocation(), RankPreservingLoRA(rank=2, quantize="nf4")).fit(Training())


def test_compressed_to_the_target_already_is_refused(tmp_path: Path) -> None:
    compression = LowRankCompression(0.4, preset="unirank", min_rank=2, batches=CALIBRATION)
    with pytest.raises(BudgetError, match="compress less before"):
        trainer(tmp_path, compression, reallocation(0.4)).fit(Training())


def test_gradient_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = reallocation(end=4)
    trainer(tmp_path, callback, max_steps=6, accumulate_grad_batches=2).fit(Training())
    assert [entry["step"] for entry in callback.history] == [2, 4]


SCRIPT = """
import os, sys
from pathlib import Path
import torch
import lightning.pytorch as pl
from tests.test_callback_reallocation import Training, Watch, reallocation

folder = Path(sys.argv[1])
torch.set_num_threads(1)
pl.seed_everything(0)
module, callback, watch = Training(), reallocation(), Watch()
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_steps=6, max_epochs=4, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[callback, watch],
)
callback.end = 4
trainer.fit(module)
torch.save(
    {"masks": watch.masks, "weights": module.state_dict(), "history": callback.history},
    folder / f"rank{trainer.global_rank}.pt",
)
"""


@pytest.mark.slow
def test_every_process_moves_the_same_mask(tmp_path: Path) -> None:
    """DDP on two gloo processes, each with its own half of the rows."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["history"] == second["history"]
    assert [entry["step"] for entry in first["history"]] == [2, 4]
    assert len(first["masks"]) == len(second["masks"]) == 6
    for ours, theirs in zip(first["masks"], second["masks"], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(mask, theirs[name]) for name, mask in ours.items())
    assert any(not bool(mask.all()) for mask in first["masks"][-1].values())
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
