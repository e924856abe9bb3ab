"""Progressive re-allocation against one-shot compression, with the same training steps; resumable.

Run from the repository's root:

    LOWRANK_LIT_REFERENCE=FOLDER python benchmarks/reallocation.py     # measure what is missing
    python benchmarks/reallocation.py --table                          # Markdown table of it

Arms: `one-shot` compresses to the target by a preset and trains. `progressive` starts from the dense model
(`--start 1`) or from a compression to a milder ratio (`--start 0.8`, for every target below it), and RankReallocation
takes it to the target within the first part of the same steps. Both train the factors whole and nothing else
(`--recovery lora`: LoRA of rank 8 on them), with AdamW, no weight decay, a warm-up of 20 steps and a cosine to a tenth,
on the same batches in the same order: the seed decides the order alone, and calibration is the same for all.

Perplexity as in benchmarks/RESULTS.md: the first 100 blocks of 256 tokens of the test text, float32 weights. Stored
parameters are at most the target in both arms. Excess is ln(perplexity) - ln(dense perplexity).
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from _common import Results, problems, read

from lowrank_lit import LowRankModule, TextDataModule, perplexity
from lowrank_lit.callbacks import LowRankCompression, RankPreservingLoRA
from lowrank_lit.callbacks.reallocation import RankReallocation
from lowrank_lit.callbacks.recovery import FactorTuning

MODELS = ("embedded", "wiki-llama-3m")


def cells(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Settings of every cell of one model."""
    common = {key: getattr(options, key) for key in ("steps", "learning_rate", "batch_size", "recovery", "preset")}
    for seed in map(int, options.seeds.split(",")):
        for keep in map(float, options.keep_ratios.split(",")):
            for arm in options.arms.split(","):
                cell = {"arm": arm, "seed": seed, "keep": keep, **common}
                if arm == "progressive":
                    start = 1.0 if options.start <= keep else options.start
                    cell |= {
                        "start": start,
                        **{key: getattr(options, key) for key in ("end", "every", "schedule", "decay")},
                    }
                yield cell


def callbacks_of(cell: dict[str, Any]) -> list[pl.Callback]:
    """The callbacks of one cell."""
    first = cell.get("start", cell["keep"])
    found: list[pl.Callback] = [LowRankCompression(first, preset=cell["preset"])] if first < 1 else []
    if cell["arm"] == "progressive":
        end = max(1, round(cell["end"] * cell["steps"]))
        found.append(
            RankReallocation(cell["keep"], end=end, every=cell["every"], schedule=cell["schedule"], decay=cell["decay"])
        )
    found.append(FactorTuning() if cell["recovery"] == "factors" else RankPreservingLoRA(8))
    return found


def run(name: str, folder: str, sources: dict[str, str], cell: dict[str, Any], work: Path) -> dict[str, Any]:
    """Figures of one cell. What compression and first factors cost is kept in ``work`` and paid once."""
    pl.seed_everything(cell["seed"])
    data = TextDataModule(sources, folder, batch_size=cell["batch_size"])
    module = LowRankModule(folder, learning_rate=cell["learning_rate"], warmup_steps=min(20, cell["steps"] // 5))
    callbacks = callbacks_of(cell)
    trainer = pl.Trainer(
        default_root_dir=work / f"{name}-{cell.get('start', cell['keep'])}",
        accelerator="cpu",
        devices=1,
        max_steps=cell["steps"],
        limit_val_batches=0,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {
        "perplexity": perplexity(module.model, data.evaluation("test")),
        "validation": perplexity(module.model, data.evaluation("validation")),
        "seconds": round(seconds, 1),
    }
    for callback in callbacks:
        if isinstance(callback, LowRankCompression) and callback.result is not None:
            found |= {"before": callback.result.record.get("perplexity"), "stored": callback.result.plan.keep_ratio}
        if isinstance(callback, RankReallocation) and callback.plan is not None:
            moves = {key: sum(entry[key] for entry in callback.history) for key in ("removed", "returned")}
            found |= {"stored": callback.plan.keep_ratio, **moves}
    return found


def dense_perplexity(folder: str, sources: dict[str, str]) -> float:
    """Of the model as it is."""
    module = LowRankModule(folder)
    module.configure_model()
    return perplexity(module.model.eval(), TextDataModule(sources, folder).evaluation("test"))


def table(entries: list[dict[str, Any]]) -> None:
    """A row per model, keep ratio, settings and start of progressive: both arms, seed by seed."""
    print(
        "| model | keep | preset | steps | rate | start | one-shot | one-shot + steps | progressive | ratio by seed |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    common = ("keep", "preset", "steps", "learning_rate", "batch_size", "recovery")
    arms: dict[tuple[Any, ...], dict[Any, dict[int, dict[str, Any]]]] = {}
    for entry in entries:
        cell = entry["cell"]
        group = arms.setdefault((entry["model"], *(cell[key] for key in common)), {})
        group.setdefault(cell.get("start"), {})[cell["seed"]] = entry  # None is the arm that starts at the target
    for (model, keep, preset, steps, rate, *_), starts in arms.items():
        plain = starts.pop(None, {})
        for start, found in starts.items():
            seeds = sorted(plain.keys() & found.keys())
            if not seeds:
                continue
            one, two = ([arm[seed]["perplexity"] for seed in seeds] for arm in (plain, found))
            before, dense = plain[seeds[0]]["before"]["compressed"], plain[seeds[0]]["dense"]
            shown = [f"{mean(arm):.2f} ({mean(map(math.log, arm)) - math.log(dense):.3f})" for arm in (one, two)]
            ratios = ", ".join(f"{b / a:.4f}" for a, b in zip(one, two, strict=True))
            row = (model, keep, preset, steps, rate, start, f"{before:.2f}", *shown, ratios)
            print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    """Measure the cells that the output does not hold yet, or print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/reallocation.jsonl", help="JSON lines; measured cells are kept")
    parser.add_argument("--work", default="runs/bench/reallocation", help="folder of compressions, kept between cells")
    parser.add_argument("--models", default="")
    parser.add_argument("--arms", default="one-shot,progressive")
    parser.add_argument("--keep-ratios", default="0.6,0.4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--recovery", choices=("factors", "lora"), default="factors")
    parser.add_argument("--preset", default="best", help="of the compressions, in both arms")
    parser.add_argument("--start", type=float, default=1.0, help="keep ratio that progressive starts from")
    parser.add_argument("--end", type=float, default=0.6, help="share of the steps after which the target is reached")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--schedule", default="cubic")
    parser.add_argument("--decay", type=float, default=0.98)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", nargs="*", help="print the table of these files (default: the output)")
    options = parser.parse_args()
    if options.table is not None:
        table(read(options.table or [options.output]))
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = Results(options.output)
    for name, folder, sources, _ in problems(MODELS, options.models):
        dense = None
        for cell in cells(options):
            key = json.dumps([name, cell], sort_keys=True)
            if key in results:
                continue
            dense = dense or dense_perplexity(folder, sources)
            figures = run(name, folder, sources, cell, Path(options.work))
            entry = {"key": key, "model": name, "cell": cell, "dense": dense, **figures}
            results.append(entry)
            print(name, cell, {part: figures[part] for part in ("perplexity", "validation", "seconds")}, flush=True)


if __name__ == "__main__":
    main()
