"""One process of a compression by several: what the tests of distributed compression start.

It writes ``SIZE-RANK.json`` (plan and record) and ``SIZE-RANK.pt`` (the compressed weights).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_lit import distributed
from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.callbacks import LowRankCompression
from lowrank_lit.compress import compress, fingerprint
from lowrank_lit.gradients import next_token_loss
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.settings import Settings
from tests.tiny import batches, tiny_model


def text() -> list[dict[str, Tensor]]:
    """Ragged, and no multiple of two or four."""
    return batches(n=7, batch=3, length=24, structured=True, padding=True)


def accident(kind: str, model: nn.Module, rank: int) -> None:
    """What happens to the last process in the middle of its work."""
    if rank != dist.get_world_size() - 1:
        return
    if kind == "killed":
        layer: Any = model.get_submodule("model.layers.1.mlp")
        layer.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    elif kind == "raising":
        layer = model.get_submodule("model.layers.1.self_attn.q_proj")

        def spoil(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (args[0] * float("nan"),)

        layer.register_forward_pre_hook(spoil)
    elif kind == "bug":
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of something")))


def main(out: Path, preset: str, kind: str, folder: Path | None) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        dist.init_process_group("gloo")
        dist.barrier()  # all are connected before one of them may die
    model, data = tiny_model("qwen3_moe" if kind == "experts" else "llama"), text()
    if kind in ("killed", "raising", "bug"):
        accident(kind, model, rank)
    options = {"preset": preset, "min_rank": 4}
    with distributed.cooperating():
        identity = fingerprint(model, data, Settings(0.6, **options))
        result = None if folder is None else load_compression(folder, model, identity)
        loaded = result is not None
        if result is None:
            result = compress(model, data, keep_ratio=0.6, resume=folder, **options)
            if folder is not None and rank == 0 and kind != "unsaved":
                save_compression(folder, model, result)
    weights = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, FactoredLayer)}
    torch.save({name: value.detach() for name, value in weights.items()}, out / f"{size}-{rank}.pt")
    found = {
        "plan": result.plan.to_dict(),
        "passes": result.record["passes"],
        "loaded": loaded,
        "record": result.record,
        "tokens": result.record["calibration"]["tokens"],
    }
    (out / f"{size}-{rank}.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


class Plain(pl.LightningModule):
    """A language model in a module of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model("llama")

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return next_token_loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(out: Path, preset: str, folder: Path) -> None:
    """Two steps of Lightning's data-parallel training of a compressed model."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    callback = LowRankCompression(0.6, preset=preset, min_rank=4, batches=text())
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=size,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=folder,
    )
    module = Plain()
    trainer.fit(module, DataLoader(text(), batch_size=None))
    assert callback.result is not None
    found = {"plan": callback.result.plan.to_dict(), "record": callback.result.record}
    (out / f"{size}-{rank}.json").write_text(json.dumps(found))
    torch.save(module.model.state_dict(), out / f"{size}-{rank}.pt")


def start(rank: int, size: int, port: int, out: Path, preset: str, kind: str, folder: Path | None) -> None:
    """Target of a process. What it raises is the end of it, with a line in ``SIZE-RANK.txt`` and the exit status 3."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}  # as Lightning has them
    try:
        if kind == "fit":
            assert folder is not None
            fit(out, preset, folder)
        else:
            main(out, preset, kind, folder)
    except Exception as error:
        (out / f"{size}-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        sys.exit(3)
