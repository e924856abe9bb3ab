"""Refinement of the one-shot default on the calibration text: how much of the excess is left, resumable.

Run from the repository's root:

    LOWRANK_LIT_REFERENCE=FOLDER python benchmarks/refinement.py    # measure what is missing
    python benchmarks/refinement.py --table                         # Markdown table of it

Models: the embedded one and, with LOWRANK_LIT_REFERENCE, wiki-llama-3m; keep ratios 0.6 and 0.4.

Protocol: the one-shot model is preset ``best`` on 96 calibration blocks of 256 tokens. Refinement reads at most 500
blocks (128,000 tokens) of the calibration text, of which those 96 are the first; the embedded calibration text has 453.
First its factors are trained block by block towards the dense model's outputs, then as a whole by the loss ``kd``, the
divergence from the dense model's predictions, in batches of 8 blocks. Nothing but the factors is trained, stored
parameters stay equal. The state with the least loss on the first 100 blocks of the validation text is kept; settings
were tuned on that text, what is reported was measured once on the test text.

Perplexity as in benchmarks/grid.py: the first 100 blocks of 256 tokens of the test text, mean next-token loss over the
255 targets of each, float32, exp. Excess is ln(perplexity) - ln(dense perplexity); it is given relative to that of
one-shot ``unirank`` (input + unirank) on the same calibration draw. The other domain is WikiText-2's test text, for the
WikiText model TinyStories. Seed 0 calibrates on consecutive blocks, other seeds on blocks drawn at random; the seed is
also that of the order of the batches.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _common import Results, problems
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowrank_lit import LowRankModule, TextDataModule, compress, perplexity
from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.callbacks.refinement import Refinement
from lowrank_lit.compress import fingerprint
from lowrank_lit.data import BlockDataset
from lowrank_lit.settings import Settings

KEEP_RATIOS = (0.6, 0.4)
MODELS = ("embedded", "wiki-llama-3m")
ARMS: dict[str, dict[str, Any]] = {
    "blocks": {"block_epochs": 4, "epochs": 0},
    "kd": {"block_epochs": 0},
    "blocks + kd": {},
    "ce": {"block_epochs": 0, "loss": "ce"},
    "mixed": {"block_epochs": 0, "loss": "mixed"},
}
"""What the refinement consists of; the first three and the labels' losses to compare with."""


class Bench:
    """One model and one calibration draw: its texts, dense perplexities and kept one-shot models."""

    def __init__(
        self, name: str, folder: str, sources: dict[str, str], other: str | None, seed: int, options: Any
    ) -> None:
        self.folder, self.seed, self.cache = folder, seed, Path(options.cache)
        data = TextDataModule(sources, folder, calibration_blocks=500)
        rows = torch.cat([batch["input_ids"] for batch in data.calibration_batches(seed=seed)])
        self.name, self.rows = name, rows[: options.blocks]
        self.blocks = {"test": data.evaluation("test"), "validation": data.evaluation("validation")}
        if other is not None:
            self.blocks["other"] = TextDataModule({"test": other}, folder).evaluation("test")
        module = LowRankModule(folder)
        module.configure_model()
        self.dense = self.measure(module.model)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Perplexity on every text."""
        return {key: perplexity(model, blocks) for key, blocks in self.blocks.items()}

    def oneshot(self, module: LowRankModule, preset: str, keep: float) -> None:
        """Compress the module's model, or take the factors of an earlier run."""
        module.configure_model()
        calibration = [{"input_ids": batch} for batch in self.rows[:96].split(8)]
        folder = self.cache / f"{self.name}-{self.seed}-{preset}-{keep}"
        identity = fingerprint(module.model.eval(), calibration, Settings(keep, preset=preset))
        if load_compression(folder, module.model, identity) is None:
            save_compression(folder, module.model, compress(module.model, calibration, keep_ratio=keep, preset=preset))

    def refine(self, keep: float, arm: dict[str, Any], options: Any) -> dict[str, Any]:
        """Figures of one cell."""
        settings = {"loss": "kd", "epochs": options.epochs, "block_epochs": options.block_epochs, **arm}
        pl.seed_everything(self.seed)
        module = LowRankModule(
            self.folder,
            loss=settings["loss"],
            learning_rate=options.learning_rate,
            warmup_steps=options.warmup_steps,
        )
        self.oneshot(module, "best", keep)
        before, started = self.measure(module.model), time.perf_counter()
        refinement = Refinement(
            block_epochs=settings["block_epochs"],
            block_learning_rate=options.block_learning_rate,
            batches=[{"input_ids": batch} for batch in self.rows.split(8)],
        )
        with tempfile.TemporaryDirectory() as root:
            self.fit(module, refinement, settings["epochs"], root)
        seconds = time.perf_counter() - started
        values = self.measure(module.model)
        return {
            "oneshot": before,
            "refined": values,
            "steps": {"blocks": refinement.blocks.steps if refinement.blocks else 0, "best": refinement.record["step"]},
            "errors": refinement.blocks.errors if refinement.blocks else None,
            "seconds": round(seconds, 1),
            "tokens": self.rows.numel(),
            "settings": {**settings, "learning_rate": options.learning_rate},
        }

    def fit(self, module: LowRankModule, refinement: Refinement, epochs: int, root: str) -> None:
        """The fit as a user would write it, on the refinement's own text."""
        trainer = pl.Trainer(
            max_epochs=epochs if epochs else -1,
            max_steps=-1 if epochs else 0,
            callbacks=[refinement],
            accelerator="cpu",
            gradient_clip_val=1.0,
            num_sanity_val_steps=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=root,
        )
        trainer.fit(module, self.loader(self.rows, shuffle=True), self.loader(self.blocks["validation"]))

    def loader(self, rows: Tensor, *, shuffle: bool = False) -> DataLoader[dict[str, Tensor]]:
        """Batches of 8 blocks."""
        return DataLoader(BlockDataset(rows), batch_size=8, shuffle=shuffle)


def excess(values: dict[str, float], dense: dict[str, float]) -> dict[str, float]:
    """ln(perplexity) - ln(dense perplexity) on every text."""
    return {key: math.log(value / dense[key]) for key, value in values.items()}


def table(entries: list[dict[str, Any]]) -> None:
    """One row per model, keep ratio and arm: perplexities, excess relative to input + unirank, the other domain."""
    print("| model | keep | what | seed | one-shot | refined | excess / (input + unirank) | other domain | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    for entry in entries:
        base = excess(entry["unirank"], entry["dense"])["test"]
        before, after = (excess(entry[key], entry["dense"])["test"] / base for key in ("oneshot", "refined"))
        away = ""
        if "other" in entry["refined"]:
            one, two = entry["oneshot"]["other"], entry["refined"]["other"]
            away = f"{one:.1f} -> {two:.1f} ({100 * (two / one - 1):+.1f} %)"
        print(
            f"| {entry['model']} | {entry['keep']} | {entry['arm']} | {entry['seed']} | "
            f"{entry['oneshot']['test']:.2f} | {entry['refined']['test']:.2f} | {before:.2f} -> {after:.2f} | "
            f"{away} | {entry['seconds']:.0f} |"
        )


def main() -> None:
    """Measure the cells that the output does not hold yet, or print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/refinement.jsonl", help="JSON lines; measured cells are kept")
    parser.add_argument("--cache", default="runs/bench/oneshot", help="folder for the one-shot models")
    parser.add_argument("--models", default="")
    parser.add_argument("--arms", default="blocks + kd")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--keep-ratios", default=",".join(map(str, KEEP_RATIOS)))
    parser.add_argument("--blocks", type=int, default=500, help="calibration blocks of 256 tokens that are refined on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--block-epochs", type=int, default=2)
    parser.add_argument("--block-learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the table of the output")
    options = parser.parse_args()
    results = Results(options.output)
    if options.table:
        table(results.entries)
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    varied = ("blocks", "epochs", "learning_rate", "warmup_steps", "block_epochs", "block_learning_rate")
    for problem in problems(MODELS, options.models):
        for seed in map(int, options.seeds.split(",")):
            bench: Bench | None = None
            for keep in map(float, options.keep_ratios.split(",")):
                for arm in options.arms.split(","):
                    key = json.dumps([problem[0], seed, keep, arm, {name: getattr(options, name) for name in varied}])
                    if key in results:
                        continue
                    bench = bench or Bench(*problem, seed, options)
                    plain = LowRankModule(bench.folder)
                    bench.oneshot(plain, "unirank", keep)
                    entry = {"key": key, "model": problem[0], "seed": seed, "keep": keep, "arm": arm}
                    entry |= {"dense": bench.dense, "unirank": bench.measure(plain.model)}
                    entry |= bench.refine(keep, ARMS[arm], options)
                    results.append(entry)
                    table([entry])


if __name__ == "__main__":
    main()
