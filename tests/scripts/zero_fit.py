"""Fits of a tiny compressed model, one after the other in the same processes; run by tests and by benchmarks/zero.py.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.scripts.zero_fit SPEC.json

SPEC.json is a list of fits, each a dictionary with ``folder`` and what else :func:`fit` takes; a single process needs
no launcher. Each process of a fit writes ``result-RANK.json`` into its folder: the loss of every step over the whole
batch, and what else was measured; where it fails, ``error-RANK.txt``.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from lowrank_lit._checkpoints import resolve_checkpoint
from lowrank_lit.callbacks import ExactResume, ExportOnFitEnd, FactorTuning, LowRankCompression, RankPreservingLoRA
from lowrank_lit.errors import LowRankError
from lowrank_lit.loader import shuffled_loader
from lowrank_lit.module import LowRankModule
from tests.tiny import batches, tiny_model

ROOT = Path(__file__).parents[2]
BATCH = 4
LENGTH = 12
RECOVERIES = ("lora", "qlora", "factors")
RATES = {"lora": 1e-2, "qlora": 3e-3, "factors": 1e-3}  # at 1e-2 qlora itself makes 1e-2 of a rounding of 1e-7


def save_model(folder: Path) -> None:
    """A llama of one layer, whose matrices are large enough for factors of rank 64."""
    model = tiny_model("llama", num_hidden_layers=1, hidden_size=256, intermediate_size=384, head_dim=64)
    model.save_pretrained(folder)


def save_mixture(folder: Path) -> None:
    """Experts of which no batch of a few tokens reaches all."""
    model = tiny_model("qwen3_moe", num_hidden_layers=1, num_experts=12, hidden_size=64, moe_intermediate_size=48)
    model.save_pretrained(folder)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens; each serves one step's batch once."""

    def __init__(self, count: int, seed: int) -> None:
        drawn = batches(n=1, batch=count, length=LENGTH, seed=seed, structured=True)
        self.rows = drawn[0]["input_ids"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Text(pl.LightningDataModule):
    """Rows whose global batches are the same for any number of processes."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _loader(self, rows: Rows) -> DataLoader[Any]:
        replicas, rank = self.trainer.world_size, self.trainer.global_rank  # type: ignore[union-attr]
        return shuffled_loader(rows, BATCH // replicas, replicas=replicas, rank=rank)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(Rows(self.steps * BATCH, seed=1))

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(Rows(2 * BATCH, seed=2))


class Losses(pl.Callback):
    """The loss and the seconds of every step; has an accident where it is told to, ``fill_at`` -1 is the end."""

    def __init__(self, kill_at: int | None, kill_rank: int, nan_at: int | None, fill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.kill_rank = kill_rank
        self.nan_at = nan_at
        self.fill_at = fill_at
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.started = time.perf_counter()
        if trainer.global_step == self.kill_at and trainer.global_rank == self.kill_rank:
            Path(trainer.default_root_dir, "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.global_step == self.fill_at:
            fill(trainer)
        if trainer.global_step == self.nan_at and trainer.global_rank == self.kill_rank:
            trained = next(p for p in trainer.lightning_module.parameters() if p.requires_grad)
            trained.register_hook(lambda gradient: gradient * float("nan"))

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, *args: Any) -> None:
        loss = outputs["loss"].detach().double().cpu().clone()
        self.seconds.append(time.perf_counter() - self.started)
        if trainer.world_size > 1:
            dist.all_reduce(loss)
        self.losses.append(float(loss) / trainer.world_size)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self.fill_at == -1:  # before the export
            fill(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validation.append(float(trainer.callback_metrics["val_loss"]))


def fill(trainer: pl.Trainer) -> None:
    """Take all but 200 kB of the disk that the run's folder is on."""
    if trainer.is_global_zero:
        root = trainer.default_root_dir
        Path(root, "filler").write_bytes(bytes(shutil.disk_usage(root).free - 200_000))


def recovery(kind: str) -> pl.Callback:
    """The callback of a way of recovery."""
    if kind == "factors":
        return FactorTuning()
    return RankPreservingLoRA(rank=4, quantize="nf4" if kind == "qlora" else None)


def strategy(stage: int, offload: str | None) -> Any:
    """Of the trainer; stage 0 is none of ZeRO."""
    if stage == 0:
        return "auto" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else "ddp"
    from lowrank_lit.strategies import LowRankDeepSpeed

    # Tiny matrices are to be split, too.
    split = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100_000}
    return LowRankDeepSpeed(
        stage, offload=offload, timeout=60, config={"zero_optimization": split if stage == 3 else {}}
    )


def fit(
    folder: Path,
    model: str,
    *,
    stage: int = 0,
    offload: str | None = None,
    kind: str = "lora",
    steps: int = 10,
    validate_every: int | None = None,
    save_every: int | None = None,
    resume: bool | str = False,
    kill_at: int | None = None,
    kill_rank: int = 1,
    export: bool = False,
    schedule: str | None = None,
    optimizer: str = "adamw",
    precision: str = "32-true",
    nan_at: int | None = None,
    fill_at: int | None = None,
    compresses: bool = True,
    quantum: int = 64,
    processes: int | None = None,
) -> None:
    """One fit; ``processes`` are started by Lightning where no launcher has. ``{rank}`` in ``model`` is the rank."""
    model = model.format(rank=os.environ.get("RANK", "0"))
    pl.seed_everything(0, verbose=False)
    watch = Losses(kill_at, kill_rank, nan_at, fill_at)
    tuning: Any = recovery(kind)
    if schedule is not None:
        tuning.schedule = schedule
    compression = LowRankCompression(
        0.5, metric="identity", allocator="uniform", quantum=quantum, batches=batches(n=2, length=LENGTH)
    )
    callbacks: list[Any] = [*([compression] if compresses else []), tuning, watch]
    if export:
        callbacks.append(ExportOnFitEnd())
    if save_every is not None:
        callbacks.append(
            pl.callbacks.ModelCheckpoint(
                dirpath=folder / "checkpoints", save_last=True, every_n_train_steps=save_every, save_top_k=0
            )
        )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy=strategy(stage, offload),
        max_steps=steps,
        default_root_dir=folder,
        callbacks=[*callbacks, ExactResume()],
        logger=False,
        enable_checkpointing=save_every is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=validate_every,
        limit_val_batches=None if validate_every else 0,
        gradient_clip_val=1.0,
        precision=precision,  # type: ignore[arg-type]
    )
    module = LowRankModule(model, learning_rate=RATES[kind], optimizer=optimizer, warmup_steps=2)
    if isinstance(resume, str):  # as a program gives it to Trainer.fit, with no check before
        trainer.ckpt_path = resume
    elif resume:
        trainer.ckpt_path = str(resolve_checkpoint(trainer, "last"))
    trainer.fit(module, datamodule=Text(steps))
    with torch.no_grad():
        logits = copy.deepcopy(module.model).eval()(**batches(n=1, length=LENGTH, seed=3)[0]).logits.double()
    found: dict[str, Any] = {
        "losses": watch.losses,
        "validation": watch.validation,
        "seconds": watch.seconds,
        "logits": logits.reshape(-1)[:512].tolist(),
        "plain": sorted({type(child).__module__.partition(".")[0] for child in module.modules()}),
        "trains": sum(parameter.requires_grad for parameter in module.parameters()),
        "split": sum(hasattr(parameter, "ds_id") for parameter in module.parameters()),
        "rank": trainer.global_rank,
    }
    if getattr(tuning, "record", None) is not None:
        found["merge"] = tuning.record.to_dict()
    (folder / f"result-{trainer.global_rank}.json").write_text(json.dumps(found))


def start(
    folder: Path, fits: list[dict[str, Any]], processes: int, *, launcher: bool = True, timeout: float = 280
) -> int:
    """Run fits in one job of its own processes; returns its exit status and leaves what it prints in ``job.log``."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "job.json"
    spec.write_text(json.dumps(fits))
    command = [sys.executable, "-m", "tests.scripts.zero_fit", str(spec)]
    if processes > 1 and launcher:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = [f"--nproc-per-node={processes}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command[1:2] = ["-m", "torch.distributed.run", *launch, "-m"]
    known = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in known} | {"OMP_NUM_THREADS": "1"}
    with (folder / "job.log").open("w") as log:
        job = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=timeout)
    return job.returncode


def write_error(path: Path, text: str) -> None:
    """Write what a process has ended with; on a full disk once another process has cleared up behind itself."""
    until = time.monotonic() + 60
    while True:
        try:
            path.write_text(text)
            return
        except OSError as error:
            if error.errno != errno.ENOSPC or time.monotonic() > until:
                raise
            time.sleep(0.1)


def main(path: str) -> None:
    """Run the fits of a file."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for settings in json.loads(Path(path).read_text()):
        folder, fails = Path(settings.pop("folder")), settings.pop("fails", False)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fit(folder, **settings)
        except LowRankError as error:
            write_error(folder / f"error-{os.environ.get('RANK', '0')}.txt", str(error))
            if not fails:  # as it is to
                raise


if __name__ == "__main__":
    main(sys.argv[1])
