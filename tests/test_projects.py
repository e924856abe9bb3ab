"""The callbacks in projects that know nothing of them: any LightningModule, any loader, any training step."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler
from torchmetrics.classification import MulticlassAccuracy

from lowrank_lit.batches import CalibrationBatch, as_batches, given_batch, split_single
from lowrank_lit.calibration import calibrate
from lowrank_lit.callbacks import LowRankCompression, RankReallocation, RankReport
from lowrank_lit.callbacks._loaders import drawn_batches, spread
from lowrank_lit.callbacks._training_step import TrainingStepLoss
from lowrank_lit.compress import compress, fingerprint
from lowrank_lit.errors import DataError, LowRankError, ModelError
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.settings import Settings
from lowrank_lit.statistics import LayerStatistics
from lowrank_lit.surgery import dense_weight

WIDE, HIDDEN, CLASSES, ROWS = 12, 24, 3, 192


class Project(pl.LightningModule):
    """Everything that a training step may touch: batch norm, dropout, a metric, logging, lists and counters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDE, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.GELU(), nn.Dropout(0.5))
        self.head = nn.Linear(HIDDEN, CLASSES)
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[Tensor] = []
        self.steps = 0

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(features))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        features, labels = batch
        logits = self(features.flatten(1))
        loss = F.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("accuracy", self.accuracy)
        self.log_dict({"loss": loss, "rate": self.optimizers().param_groups[0]["lr"]})
        self.logger and self.logger.log_metrics({"direct": float(loss)})
        self.losses.append(loss.detach())
        self.seen += len(labels)
        self.steps += 1
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(rows: int = ROWS) -> TensorDataset:
    """Features ``(rows, 3, 4)`` with a decaying spectrum, which the training step flattens; rows sorted by class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) * CLASSES // rows
    x = torch.randn(rows, WIDE, generator=generator) * torch.logspace(0, -1, WIDE) + labels[:, None]
    return TensorDataset(x.unflatten(1, (3, 4)), labels)


class Data(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.rows = make_data()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows, batch_size=16, shuffle=True)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    def make(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        defaults = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "logger": False, "default_root_dir": tmp_path}
        return pl.Trainer(**{**quiet, **defaults, **settings}, callbacks=list(callbacks))

    return make


def compression(**settings: Any) -> LowRankCompression:
    return LowRankCompression(0.6, **{"min_rank": 1, "preset": "fast", **settings})


def ranks(callback: LowRankCompression) -> dict[str, int]:
    assert callback.result is not None
    return {matrix.name: matrix.rank for matrix in callback.result.plan.matrices}


def test_the_same_ranks_from_wherever_the_rows_come(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    class WithHook(Project):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(make_data(), batch_size=16, shuffle=True)

    loader = DataLoader(make_data(), batch_size=16, shuffle=True, num_workers=0)
    sources: list[tuple[pl.LightningModule, dict[str, Any]]] = [
        (Project(), {"datamodule": Data()}),
        (Project(), {"train_dataloaders": loader}),
        (WithHook(), {}),
    ]
    plans = []
    for number, (module, data) in enumerate(sources):
        torch.manual_seed(0)
        fresh = type(module)()
        callback = compression()
        make_trainer(callback, default_root_dir=tmp_path / str(number)).fit(fresh, **data)
        assert callback.result is not None
        plans.append(callback.result.plan)
        assert isinstance(fresh.body[0], FactoredLinear)
        assert callback.result.record["calibration"]["tokens"] >= 128
        assert any("training_step" in note for note in callback.result.plan.notes)
        assert callback.result.record["predicted"] is None  # of a loss in a unit of its own
    assert plans[0].matrices == plans[1].matrices == plans[2].matrices
    assert plans[0].fingerprint == plans[1].fingerprint
    torch.manual_seed(0)
    again = compression()
    make_trainer(again, default_root_dir=tmp_path / "0").fit(Project(), loader)  # the same rows, whatever was shuffled
    assert again.result is not None
    assert again.result.record["from_cache"]


class Watch(pl.Callback):
    """What training starts from."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.state = {
                "random": torch.get_rng_state(),
                "batch": batch[0].clone(),
                "seen": pl_module.seen.clone(),
                "mean": pl_module.body[1].running_mean.clone(),
                "variance": pl_module.body[1].running_var.clone(),
                "counted": pl_module.body[1].num_batches_tracked.clone(),
                "metric": pl_module.accuracy.tp.clone(),
            }
            self.plain = (
                list(pl_module.losses),
                pl_module.steps,
                [part.training for part in (pl_module, pl_module.body[1], pl_module.accuracy)],
                pl_module.accuracy._update_count,
                trainer.global_step,
                dict(trainer.logged_metrics),
                dict(trainer.callback_metrics),
                [name for name in ("log", "optimizers", "forward") if name in vars(pl_module)],
            )


@pytest.mark.parametrize("own_generator", [False, True])
def test_training_starts_as_without_a_calibration(make_trainer: Callable[..., pl.Trainer], own_generator: bool) -> None:
    starts = []
    for callbacks in ([], [compression()]):
        pl.seed_everything(3, verbose=False)
        generator = torch.Generator().manual_seed(5) if own_generator else None
        loader = DataLoader(make_data(), batch_size=16, shuffle=True, generator=generator)
        watch = Watch()
        make_trainer(*callbacks, watch).fit(Project(), loader)
        starts.append(watch)
    without, after = starts
    assert without.plain == after.plain
    assert without.plain[:2] == ([], 0)
    for name, value in without.state.items():
        assert torch.equal(value, after.state[name]), name


def test_nothing_is_logged(make_trainer: Callable[..., pl.Trainer], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)

    class Stop(pl.Callback):
        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            assert trainer.loggers == [logger]
            assert not logger.experiment.metrics
            assert not trainer.logged_metrics

    trainer = make_trainer(compression(), Stop(), logger=logger, log_every_n_steps=1)
    trainer.fit(Project(), DataLoader(make_data(), batch_size=16))
    assert set(trainer.logged_metrics) == {"accuracy", "loss", "rate"}


def collect(module: nn.Module, data: Any, loss: Any) -> dict[str, LayerStatistics]:
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    moments = frozenset({"input", "gradient"})
    found = calibrate(module, data, layers, weight_of=dense_weight, moments=moments, importance=False, loss=loss)
    return found.statistics


def test_gradients_of_the_training_step_are_those_of_its_loss(make_trainer: Callable[..., pl.Trainer]) -> None:
    module = Project().double()
    module.body[1].running_mean.normal_()
    x, labels = make_data(96).tensors
    x = x.double()
    rows = [[x[:40], labels[:40]], [x[40:], labels[40:]]]  # of unequal sizes: a mean has to be weighted
    trainer = make_trainer()
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer._data_connector.attach_data(module, train_dataloaders=rows)
    data = [CalibrationBatch({"": batch[0].flatten(1)}, batch) for batch in rows]

    def explicit(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0].flatten(1)), batch[1], reduction="sum")

    through, direct = collect(module, data, TrainingStepLoss(trainer, module)), collect(module, data, explicit)
    assert through.keys() == direct.keys() == {"body.0", "head"}
    for name, entry in direct.items():
        for key in ("input_moment", "output_moment", "gradient_moment", "pulled_moment"):
            expected = getattr(entry, key)
            if expected is not None:
                torch.testing.assert_close(getattr(through[name], key), expected, rtol=1e-10, atol=0)

    # By hand: the logits' gradient is probability minus label, row by row.
    module.eval()
    gradient = module(x.flatten(1)).softmax(-1) - F.one_hot(labels, CLASSES)
    torch.testing.assert_close(
        through["head"].gradient_moment, (gradient.mT @ gradient / len(x)).detach(), rtol=1e-10, atol=1e-14
    )


def test_a_loss_of_ones_own_without_lightning(tmp_path: Path) -> None:
    """Metric `two_sided` on a classifier: the weighted error that it minimises is less than the metric `input`'s."""
    x, labels = make_data().tensors
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(WIDE, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CLASSES))
    optimizer = torch.optim.Adam(body.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(body(x), labels).backward()
        optimizer.step()
    body.zero_grad()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        assert isinstance(batch, tuple)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    data = [(x[part::4], labels[part::4]) for part in range(4)]
    settings = {"keep_ratio": 0.4, "min_rank": 1, "targets": ["1"], "preset": "fast"}
    rises = {}
    for metric in ("two_sided", "input"):
        copied = nn.Sequential(nn.Flatten(), nn.Linear(WIDE, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, CLASSES))
        copied.load_state_dict(body.state_dict())
        result = compress(copied, data, loss=loss, metric=metric, allocator="uniform", **settings)
        assert any("loss" in note for note in result.plan.notes) == (metric == "two_sided")
        with torch.no_grad():
            rises[metric] = float(F.cross_entropy(copied(x), labels) - F.cross_entropy(body(x), labels))
    assert rises["two_sided"] < rises["input"]
    chosen = Settings(0.5)
    other = [(rows, classes.flip(0)) for rows, classes in data]
    seen = {
        fingerprint(body, data, chosen),
        fingerprint(body, data, chosen, loss),
        fingerprint(body, other, chosen, loss),
    }
    assert len(seen) == 3
    assert fingerprint(body, other, chosen) in seen  # without a loss no target counts


class NoForward(pl.LightningModule):
    """The encoder and decoder of Lightning's own introduction: a training step and no forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 6))
        self.decoder = nn.Sequential(nn.Linear(6, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDE))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)
        return F.mse_loss(self.decoder(self.encoder(x)), x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Mapped(Project):
    """A forward of the whole batch, under keys of the project's own."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["image"].flatten(1))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self(batch), batch["kind"])


class Named(Mapped):
    """A forward of several arguments, one of them of one dimension, and no step number."""

    def forward(self, image: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        return Project.forward(self, image.flatten(1) * weight[:, None])

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return F.cross_entropy(self(image=batch["image"], weight=batch["weight"]), batch["kind"])


class Rows(Dataset[dict[str, Any]]):
    def __init__(self) -> None:
        self.x, self.labels = make_data().tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"id": f"row {row}", "kind": self.labels[row], "image": self.x[row], "weight": torch.tensor(1.0)}


@pytest.mark.parametrize("kind", [NoForward, Mapped, Named])
@pytest.mark.parametrize("preset", ["best", "unirank"])
def test_any_module(kind: type[pl.LightningModule], preset: str, make_trainer: Callable[..., pl.Trainer]) -> None:
    torch.manual_seed(0)
    module, callback = kind(), compression(preset=preset)
    rows: Dataset[Any] = make_data() if kind is NoForward else Rows()
    make_trainer(callback, RankReport()).fit(module, DataLoader(rows, batch_size=16, shuffle=True))
    assert any(isinstance(part, FactoredLinear) for part in module.modules())
    assert callback.result is not None
    assert callback.result.plan.metric == ("two_sided" if preset == "best" else "input")
    assert callback.result.plan.keep_ratio <= 0.6


class ByHand(Project):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        loss = F.cross_entropy(self(batch[0].flatten(1)), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


class Broken(Project):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        loss = F.cross_entropy(self(batch[0].flatten(1)), batch[1])
        return loss * self.trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(ByHand, "ByHand optimises by hand"), (Broken, r"training_step of Broken does not run .*IndexError")],
)
def test_a_step_that_gives_no_loss_leaves_the_inputs(
    kind: type[Project], reason: str, make_trainer: Callable[..., pl.Trainer]
) -> None:
    module, callback = kind(), compression()
    make_trainer(callback).fit(module, DataLoader(make_data(), batch_size=16))
    assert isinstance(module.body[0], FactoredLinear)
    assert callback.result is not None
    assert callback.result.plan.metric == "input"
    (note,) = [note for note in callback.result.plan.notes if note.startswith("no gradients")]
    assert re.search(f"{reason}.*; metric='input' is used instead of 'two_sided'", note)


def test_one_line_errors(make_trainer: Callable[..., pl.Trainer]) -> None:
    class Convolutions(Project):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Identity()

    class Late(Project):
        def setup(self, stage: str) -> None:
            self.rows = make_data()

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(self.rows)

    class Neither(NoForward):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            raise KeyError("no such thing")

    class Once(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return self

        def __next__(self) -> Tensor:
            return torch.zeros(WIDE)

    loader = DataLoader(make_data(), batch_size=16)
    cases: list[tuple[type[pl.LightningModule], Any, type[LowRankError], str]] = [
        (Convolutions, loader, ModelError, "no linear layer to factor among 0 linear layers; .*pointwise_as_linear"),
        (
            Late,
            None,
            DataError,
            r"Late\.train_dataloader\(\) fails .* before setup\(\); pass batches=.*LightningDataMod",
        ),
        (Neither, loader, ModelError, "Neither does not run .* training_step of Neither does not run"),
        (Project, [loader, loader], DataError, "which of several train dataloaders"),
        (Project, DataLoader(Once(), batch_size=4), DataError, "Once can be read once only"),
    ]
    for kind, data, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            make_trainer(compression()).fit(kind(), data)
        assert "\n" not in str(caught.value)


def test_rows_are_spread_over_the_data_and_the_loader_is_left_alone() -> None:
    assert all(sorted(spread(size)) == list(range(size)) for size in (1, 2, 7, 192, 1000))
    sorted_rows = make_data()
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(sorted_rows, batch_size=16, shuffle=True, generator=generator)
    before, first = generator.get_state(), next(drawn_batches(loader, "Test"))
    assert torch.equal(generator.get_state(), before)
    assert all(3 <= int(count) <= 8 for count in torch.bincount(first[1]))  # 5 or 6 of each of the three classes
    weights = torch.tensor([1.0, 0.0]).repeat(ROWS // 2)
    sampler = WeightedRandomSampler(weights.tolist(), ROWS, generator=generator)
    own = DataLoader(sorted_rows, batch_size=16, sampler=sampler)
    drawn = next(drawn_batches(own, "Test"))
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(next(iter(own))[0], drawn[0])  # what the project's own sampler is about to give
    bare = DataLoader(make_data(10), batch_size=None)
    assert [len(batch[0]) for batch in drawn_batches(bare, "Test")] == [3] * 10  # a row is a batch: (3, 4)


def test_batches_become_what_the_forward_takes() -> None:
    class Two(nn.Module):
        def forward(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
            return ids * mask * scale

    x, mask, y = torch.randn(4, 5), torch.ones(4, 5), torch.arange(4)
    (batch,) = as_batches([(x, mask, y)], Two())
    assert list(batch) == ["ids", "mask"]
    assert given_batch(batch)[2] is y
    (batch,) = as_batches([{"y": y, "mask": mask, "ids": x, "name": "four"}], Two())
    assert set(batch) == {"ids", "mask"}
    (batch,) = as_batches([{"target": torch.randn(4, 2), "index": y, "image": x}], nn.Linear(5, 2))
    assert next(iter(batch.values())) is x
    assert as_batches([batch], Two()) == [batch]  # taken as it is
    with pytest.raises(DataError, match="has index, of which the forward of Linear takes none"):
        as_batches([{"index": y}], nn.Linear(5, 2))
    parts = split_single(as_batches([(x, y)]), whole=True)
    assert [len(given_batch(part)[1]) for part in parts] == [1, 1, 1, 1]
    whole = as_batches([(x, y, "name")])
    assert split_single(whole, whole=True) is whole


def test_reallocation_in_a_project(make_trainer: Callable[..., pl.Trainer]) -> None:
    module, callback = Project(), RankReallocation(0.5, every=1, end=4, min_rank=1)
    make_trainer(callback, max_steps=6).fit(module, DataLoader(make_data(), batch_size=16, shuffle=True))
    assert callback.plan is not None
    assert callback.plan.keep_ratio <= 0.5
    assert isinstance(module.body[0], FactoredLinear)


CLI = """
from lightning.pytorch.cli import LightningCLI
from tests.test_projects import Data, Project
cli = LightningCLI(Project, Data)
print(type(cli.model.body[0]).__name__)
"""


@pytest.mark.slow
def test_the_callback_by_class_path_in_a_cli_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "trainer:\n  accelerator: cpu\n  max_steps: 1\n  logger: false\n  enable_checkpointing: false\n"
        f"  default_root_dir: {tmp_path}\n"
        "  callbacks:\n    - class_path: lowrank_lit.callbacks.LowRankCompression\n"
        "      init_args: {keep_ratio: 0.6, preset: fast, min_rank: 1}\n"
    )
    command = [sys.executable, "-c", CLI, "fit", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "FactoredLinear"
    assert (tmp_path / "compressed" / "plan.json").exists()
