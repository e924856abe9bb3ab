"""A run that is killed goes on from its last checkpoint and ends with the weights of the run that was not."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_lit import cli
from lowrank_lit._checkpoints import newest_checkpoint, resolve_checkpoint
from lowrank_lit.callbacks.resume import AtomicCheckpointIO, ExactResume
from lowrank_lit.data import train_tokenizer
from lowrank_lit.errors import DataError, ExportError, RecipeError
from lowrank_lit.loader import ResumableLoader, shuffled_loader
from tests.disks import small_disk
from tests.tiny import tiny_model

# --- the order of the data -------------------------------------------------------------------------------------------


def rows(count: int) -> Tensor:
    return torch.arange(float(count))[:, None].expand(count, 3).contiguous()


def seen(loader: ResumableLoader, epoch: int = 0) -> list[list[int]]:
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [batch[:, 0].int().tolist() for batch in loader]


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    first = seen(shuffled_loader(rows(22), 4, seed=3), 1)
    torch.manual_seed(99)
    assert seen(shuffled_loader(rows(22), 4, seed=3), 1) == first
    orders = [seen(shuffled_loader(rows(22), 4, seed=seed), epoch) for seed in (3, 4, 5) for epoch in (0, 1, 2)]
    assert len({str(order) for order in orders}) == 9  # epoch 1 of a seed is not epoch 0 of the next
    assert all(len(order) == 5 and all(len(batch) == 4 for batch in order) for order in orders)


def test_the_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert seen(shuffled_loader(rows(9), 2)) == seen(shuffled_loader(rows(9), 2, seed=7))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert seen(shuffled_loader(rows(9), 2)) == seen(shuffled_loader(rows(9), 2, seed=0))


def test_processes_share_one_order() -> None:
    alone = seen(shuffled_loader(rows(16), 4, seed=1))
    parts = [seen(shuffled_loader(rows(16), 2, seed=1, replicas=2, rank=rank)) for rank in (0, 1)]
    together = [sorted(left + right) for left, right in zip(*parts, strict=True)]
    assert together == [sorted(batch) for batch in alone]


def test_reading_moves_no_global_random_state() -> None:
    before = torch.get_rng_state()
    seen(shuffled_loader(rows(9), 2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("taken", [0, 1, 4, 5])
def test_a_loader_goes_on_where_another_stopped(taken: int) -> None:
    whole = [*seen(shuffled_loader(rows(22), 4, seed=3)), *seen(shuffled_loader(rows(22), 4, seed=3), 1)]
    first = shuffled_loader(rows(22), 4, seed=3)
    iterator = iter(first)
    for _ in range(taken):
        next(iterator)
    state = first.state_dict()
    assert state == {"seed": 3, "epoch": 0, "batch": taken, "batch_size": 4, "samples": 22}
    second = shuffled_loader(rows(22), 4, seed=8)  # the state has the seed
    iterator = iter(second)  # nothing is read before the first batch is asked for
    second.load_state_dict(state)
    assert second.state_dict() == state
    rest = [batch[:, 0].int().tolist() for batch in iterator]
    assert rest + seen(second, 1) == whole[taken:]


def test_a_position_is_of_its_epoch() -> None:
    loader = shuffled_loader(rows(22), 4, seed=3)
    loader.load_state_dict({"seed": 3, "epoch": 0, "batch": 5, "batch_size": 4, "samples": 22})
    assert seen(loader, 1) == seen(shuffled_loader(rows(22), 4, seed=3), 1)


def test_a_position_counts_samples_where_the_batches_differ() -> None:
    loader = shuffled_loader(rows(22), 2, seed=3)
    loader.load_state_dict({"seed": 3, "epoch": 0, "batch": 2, "batch_size": 4, "samples": 22})
    assert seen(loader) == seen(shuffled_loader(rows(22), 2, seed=3))[4:]
    with pytest.raises(DataError, match=r"made with 30 training samples and not 22; resume with the data\.sources"):
        loader.load_state_dict({"seed": 3, "epoch": 0, "batch": 2, "batch_size": 4, "samples": 30})


def test_what_workers_have_read_ahead_is_not_taken() -> None:
    loader = shuffled_loader(rows(22), 4, seed=3)
    ahead = ResumableLoader(rows(22), 4, sampler=loader.sampler, drop_last=True, num_workers=1, prefetch_factor=2)
    iterator = iter(ahead)
    next(iterator)
    assert ahead.state_dict()["batch"] == 1
    iterator.close()  # type: ignore[attr-defined]


# --- a fit of a module of somebody else's ----------------------------------------------------------------------------


class Dropped(pl.LightningModule):
    """Dropout, an optimizer with a state, a schedule that asks for the length of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 1), nn.Dropout(0.5)
        self.batches: list[list[float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches.append(batch[:, 0].tolist())
        return self.layer(self.dropout(batch / 22)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.layer(batch)

    def configure_optimizers(self) -> Any:
        total = self.trainer.estimated_stepping_batches
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (total + 1))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> ResumableLoader:
        return shuffled_loader(rows(22), 4)  # five batches

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(rows(4), 2, generator=torch.Generator())


def fit(folder: Path, saving: dict[str, Any], path: Path | None = None, **settings: Any) -> Dropped:
    pl.seed_everything(1, verbose=False)
    checkpoints = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, **saving)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[ExactResume(), checkpoints],
        **settings,
    )
    module = Dropped()
    trainer.fit(module, ckpt_path=path, weights_only=True if path else None)
    return module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("saving", "settings"),
    [
        ({"every_n_train_steps": 1}, {"max_steps": 7}),
        ({"every_n_train_steps": 1}, {"max_epochs": 2}),  # Lightning forgets the loader's state here
        ({"every_n_train_steps": 1}, {"max_epochs": 2, "limit_train_batches": 3}),
        ({"every_n_train_steps": 1}, {"max_epochs": 2, "val_check_interval": 2}),
        ({"every_n_train_steps": 1}, {"max_epochs": 2, "accumulate_grad_batches": 2}),
        ({"every_n_epochs": 1}, {"max_epochs": 2}),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"max_epochs": 2}),
    ],
    ids=str,
)
def test_a_fit_goes_on_from_each_checkpoint(saving: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", saving, **settings)
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) >= 2
    for path in checkpoints:
        resumed = fit(tmp_path / path.stem, saving, path, **settings)
        assert resumed.batches == whole.batches[len(whole.batches) - len(resumed.batches) :]
        assert torch.equal(resumed.layer.weight, whole.layer.weight), path.stem
    assert not list((tmp_path / "whole").glob("*.part"))


# --- files -----------------------------------------------------------------------------------------------------------


def write(path: Path, **content: Any) -> Path:
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(64)}, "optimizer_states": [], **content}, path)
    return path


def killed_while_writing(path: str) -> None:
    """Write more than the system allows this process, which then kills it in the middle of the file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.zeros(100_000)}}, path)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**21) as disk:
        path = write(disk.folder / "last.ckpt")
        before = path.read_bytes()
        disk.fill(100_000)
        message = r"last\.ckpt' cannot be written \((No space|File too).*; free space"
        with pytest.raises(ExportError, match=message) as caught:
            write(path, more=torch.zeros(100_000))
        assert "\n" not in str(caught.value)
        assert path.read_bytes() == before
        assert {file.name for file in disk.folder.iterdir()} <= {"last.ckpt", "filler"}


def test_a_checkpoint_that_is_half_written_replaces_none(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    process = CONTEXT.Process(target=killed_while_writing, args=(str(path),))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGXFSZ
    assert (tmp_path / "last.ckpt.part").is_file()
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["w"], torch.ones(64))
    assert newest_checkpoint(trainer_in(tmp_path)) == path
    write(path, more=1)  # takes the half away
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_failed_write_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "last.ckpt")
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": lambda: None}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["optimizer_states"] == []


def trainer_in(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=folder, **{**quiet, **settings})


def test_last_is_the_newest_of_the_runs_own_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no checkpoint in '.*'; run the recipe without --ckpt_path"):
        newest_checkpoint(trainer_in(tmp_path))
    for age, name in enumerate(("checkpoints/a.ckpt", "logs/version_1/checkpoints/last.ckpt", "own/b.ckpt", "x/c.txt")):
        os.utime(write(tmp_path / name), (age, age))
    assert newest_checkpoint(trainer_in(tmp_path)).name == "last.ckpt"
    own = ModelCheckpoint(dirpath=tmp_path / "own")
    assert newest_checkpoint(trainer_in(tmp_path, callbacks=[own])).name == "b.ckpt"
    logger = CSVLogger(tmp_path / "logs", name="", version=1)
    assert newest_checkpoint(trainer_in(tmp_path / "empty", logger=logger)).name == "last.ckpt"
    for name in ("step=3.ckpt", "last.ckpt", "step=4.ckpt"):
        os.utime(write(tmp_path / "same" / name), (9, 9))
    assert newest_checkpoint(trainer_in(tmp_path / "same")).name == "last.ckpt"


def test_a_damaged_checkpoint_names_an_older_one(tmp_path: Path) -> None:
    for age, name in enumerate(("step=2.ckpt", "step=4.ckpt", "last.ckpt")):
        os.utime(write(tmp_path / "checkpoints" / name), (age, age))
    trainer, last = trainer_in(tmp_path), tmp_path / "checkpoints" / "last.ckpt"
    assert resolve_checkpoint(trainer, "last") == last
    content = last.read_bytes()
    for damaged in (content[: len(content) // 2], b""):
        last.write_bytes(damaged)
        with pytest.raises(ExportError, match=r"last\.ckpt' is damaged \(.+\); .*: --ckpt_path=.*step=4\.ckpt$"):
            resolve_checkpoint(trainer, "last")
    (tmp_path / "checkpoints" / "step=4.ckpt").write_bytes(b"PK")
    with pytest.raises(ExportError, match=r"step=2\.ckpt$"):
        resolve_checkpoint(trainer, str(last))
    with pytest.raises(RecipeError, match=r"checkpoint 'no\.ckpt' does not exist"):
        resolve_checkpoint(trainer, "no.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "weights.ckpt")
    with pytest.raises(ExportError, match=r"it holds no optimizer_states\); there is no other"):
        resolve_checkpoint(trainer, str(tmp_path / "weights.ckpt"))
    (tmp_path / "shards" / "x.ckpt").mkdir(parents=True)
    with pytest.raises(ExportError, match="DeepSpeed"):
        resolve_checkpoint(trainer, str(tmp_path / "shards" / "x.ckpt"))


# --- runs killed by SIGKILL ------------------------------------------------------------------------------------------

# Processes forked from one that has imported everything start in no time; it has computed nothing, so has no threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_resume", "lowrank_lit._stages", "peft"])
TEXT = "".join(f"the {n} small foxes of {n * 7 % 13} jump over {n * 5 % 11} lazy dogs\n" for n in range(60))
SAVE = {"save_last": True, "every_n_train_steps": 3, "save_top_k": 1}  # in the middle of an epoch, which has two


class KillAt(pl.Callback):
    """SIGKILL after a step, at a forward pass of the calibration, or when training is over."""

    def __init__(
        self, step: int | None = None, forward: int | None = None, after: str = ".", end: bool = False
    ) -> None:
        super().__init__()
        self.step, self.forward, self.after, self.end = step, forward, after, end
        self.passes = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.forward is not None:
            pl_module.configure_model()
            pl_module.model.model.layers[1].register_forward_pre_hook(self._count)  # type: ignore[union-attr]

    def _count(self, *_: Any) -> None:
        self.passes += Path(self.after).exists()
        if self.passes == self.forward:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.end:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Moment:
    """When a run is killed, and of which recipe.

    Attributes:
        kills: Arguments of :class:`KillAt`, for the first run, the one that resumes it, and so on.
        callbacks: What the recipe has between LowRankCompression and ExportOnFitEnd.
        checkpoint: Whether there is a checkpoint by then.
        settings: Of the recipe, by its section.
        taken: What the last run says that it takes from disk.
    """

    kills: list[dict[str, Any]]
    callbacks: list[dict[str, Any]] = field(default_factory=lambda: [_LORA])
    checkpoint: bool = True
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    taken: tuple[str, ...] = ("Compression taken from",)


_COMPRESSED = "out/compressed/record.json"
_LORA = {"class_path": "RankPreservingLoRA", "init_args": {"rank": 2, "dropout": 0.3}}
_REALLOCATION = {
    "class_path": "RankReallocation",
    "init_args": {"keep_ratio": 0.4, "end": 6, "every": 2, "min_rank": 4},
}
_REALLOCATED = [_REALLOCATION, {"class_path": "FactorTuning"}]
_WHOLE_FACTORS = ("Compression taken from", "Factors of the whole matrices taken from")
_REFINED = [{"class_path": "Refinement", "init_args": {"block_epochs": 1}}]
_DISTILLED = {
    "trainer": {"limit_val_batches": 1.0, "val_check_interval": 1},
    "model": {"loss": "kd", "teacher_cache": "out/teacher"},
}
_REFINED_FACTORS = ("Compression taken from", "Refined factors taken from")
MOMENTS = {
    "calibration": Moment([{"forward": 3}], checkpoint=False, taken=()),
    "recovery": Moment([{"step": 5}]),
    "after training": Moment([{"step": 5}, {"end": True}]),
    "calibration of a re-allocation": Moment([{"forward": 2, "after": _COMPRESSED}], _REALLOCATED, checkpoint=False),
    "after a re-allocation": Moment([{"step": 5}], _REALLOCATED, taken=_WHOLE_FACTORS),
    "after the last re-allocation": Moment([{"step": 5}, {"step": 8}], _REALLOCATED, taken=_WHOLE_FACTORS),
    "refinement of the blocks": Moment(
        [{"forward": 5, "after": _COMPRESSED}], _REFINED, checkpoint=False, settings=_DISTILLED
    ),
    "distillation": Moment([{"step": 5}], _REFINED, settings=_DISTILLED, taken=_REFINED_FACTORS),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer([TEXT], 300, folder / "model")
    tiny_model("llama", vocab_size=300).save_pretrained(folder / "model")
    return folder


def recipe(place: Path, moment: Moment, kill: dict[str, Any] | None = None) -> dict[str, Any]:
    compression = {"class_path": "LowRankCompression", "init_args": {"preset": "unirank", "min_rank": 4}}
    saving = {"class_path": "ModelCheckpoint", "init_args": SAVE}
    killer = [{"class_path": "tests.test_resume.KillAt", "init_args": kill}] if kill else []
    settings: dict[str, Any] = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": "out",
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 9,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "callbacks": [*killer, compression, *moment.callbacks, "ExportOnFitEnd", saving],
        },
        "model": {"model": str(place / "model"), "learning_rate": 0.01},
        "data": {
            "sources": dict.fromkeys(("train", "calibration", "validation", "test"), str(place / "text.txt")),
            "tokenizer": str(place / "model"),
            "block_size": 64,
            "batch_size": 4,
            "calibration_blocks": 8,
            "evaluation_blocks": 4,
        },
    }
    for section, own in moment.settings.items():
        settings[section].update(own)
    return settings


def start(folder: str, name: str, command: str, *options: str) -> None:
    """What the child process does."""
    os.chdir(folder)
    torch.set_num_threads(1)
    with open(f"{name}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.exit(cli.main([command, f"{name}.yaml", *options]))


def run(folder: Path, name: str, content: dict[str, Any], *options: str, command: str = "run") -> tuple[int, str]:
    """Exit code and output of ``lowrank-lit run``; the code is the negative signal where one has ended the process."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    process = CONTEXT.Process(target=start, args=(str(folder), name, command, *options))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, (folder / f"{name}.log").read_text()


@pytest.fixture(scope="module")
def uninterrupted(workplace: Path) -> Callable[[Moment], bytes]:
    """The exported weights of the run that nobody kills."""
    known: dict[str, bytes] = {}

    def weights(moment: Moment) -> bytes:
        key = str((moment.callbacks, moment.settings))
        if key not in known:
            folder = workplace / f"whole{len(known)}"
            code, output = run(folder, "whole", recipe(workplace, moment))
            assert code == 0, output
            known[key] = (folder / "out/model/model.safetensors").read_bytes()
        return known[key]

    return weights


@pytest.mark.parametrize("name", MOMENTS)
def test_a_killed_run_ends_with_the_same_weights(
    name: str, workplace: Path, uninterrupted: Callable[[Moment], bytes]
) -> None:
    moment, folder = MOMENTS[name], workplace / name.replace(" ", "_")
    for number, kill in enumerate(moment.kills):
        content = recipe(workplace, moment, kill)
        code, output = run(folder, f"killed{number}", content, *(["--ckpt_path=last"] if number else []))
        assert code == -signal.SIGKILL, output
    assert not (folder / "out/model").exists()
    # Killed when it was meant to be: not before what is taken from disk was there, nor after what is not.
    assert (folder / _COMPRESSED).exists() == bool(moment.taken)
    assert (folder / "out/reallocation/record.json").exists() == (moment.taken == _WHOLE_FACTORS)
    assert (folder / "out/refined/refinement.json").exists() == (moment.taken == _REFINED_FACTORS)
    content = recipe(workplace, moment)
    code, output = run(folder, "resumed", content, "--ckpt_path=last")
    if not moment.checkpoint:
        assert code == 2
        assert "no checkpoint in " in output
        code, output = run(folder, "again", content)
    assert code == 0, output
    assert all(text in output for text in moment.taken), output
    assert (folder / "out/model/model.safetensors").read_bytes() == uninterrupted(moment)


def test_a_checkpoint_of_another_plan_is_refused_and_nothing_is_lost(workplace: Path) -> None:
    folder, moment = workplace / "other", MOMENTS["recovery"]
    code, output = run(folder, "killed", recipe(workplace, moment, {"step": 5}))
    assert code == -signal.SIGKILL, output
    kept = (folder / "out/compressed/factors.safetensors").read_bytes()
    code, output = run(
        folder, "other", recipe(workplace, moment), "--ckpt_path=last", "--LowRankCompression.keep_ratio=0.7"
    )
    assert code == 2
    assert output.rstrip().endswith("resume with the recipe that made it")
    assert (folder / "out/compressed/factors.safetensors").read_bytes() == kept


def test_a_compression_alone_leaves_every_recovery_out(workplace: Path) -> None:
    lora = {"class_path": "RankPreservingLoRA", "init_args": {"rank": 2}}
    moment = Moment([], [_REALLOCATION, *_REFINED, {"class_path": "FactorTuning"}, lora], settings=_DISTILLED)
    folder = workplace / "alone"
    code, output = run(folder, "alone", recipe(workplace, moment), command="compress")
    assert code == 0, output
    assert (folder / "out/model/model.safetensors").is_file()
    assert not any((folder / "out" / name).exists() for name in ("reallocation", "refined", "unmerge", "teacher"))


@pytest.mark.slow
def test_the_command_itself_survives_kills_at_any_moment(
    workplace: Path, uninterrupted: Callable[[Moment], bytes]
) -> None:
    """A process of its own, killed by another after a while that grows until it is long enough."""
    folder, moment = workplace / "any", MOMENTS["recovery"]
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(recipe(workplace, moment)))
    limit, kills = 4.0, 0
    while True:
        options = ["--ckpt_path=last"] if list((folder / "out").glob("checkpoints/*.ckpt")) else []
        command = [sys.executable, "-m", "lowrank_lit", "run", "run.yaml", *options]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
            assert process.returncode == 0, output
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills, limit = kills + 1, limit * 1.15
    assert kills
    assert (folder / "out/model/model.safetensors").read_bytes() == uninterrupted(moment)
