"""LoRA on the factors against LoRA on the product with truncation, at equal trainable parameters and steps; resumable.

Run from the repository's root:

    LOWRANK_LIT_REFERENCE=FOLDER python benchmarks/recovery.py    # measure what is missing
    python benchmarks/recovery.py --table                         # Markdown tables of it

Models: the embedded one; with LOWRANK_LIT_REFERENCE also wiki-llama-3m. Each is compressed by preset `best` (one draw
of calibration text) and recovered on training text in blocks of 256 tokens, 4 blocks a step, AdamW (0.9, 0.95) without
weight decay, gradients clipped to 1, 20 steps of warm-up and a cosine to a tenth of the peak.

Methods: `factors` adapts both factors together, `sequential` outer in the first half of the steps and inner in the
second; both with rank 8. `product` adapts the products with ranks by which it has at least as many trainable numbers;
it ends three times: `kept` with the rank r + l that it has then (stores more), and cut back to r, `plain` or `whitened`
with the second moment of the inputs on the calibration text. A seed draws the adapters and the order of the text.

Learning rates: all of --rates with the first seed; the one with the lowest validation perplexity, separately for every
ending, is run with the other seeds and reported. Perplexity: test text tokenised whole without special tokens,
non-overlapping blocks of 256 tokens from its start, the first 100 blocks, 255 targets each, float32, exp. Excess is
ln(perplexity) - ln(dense perplexity). Stored numbers are those of the whole model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _common import Results, problems

from lowrank_lit import LowRankModule, TextDataModule, add_adapters, compress, perplexity
from lowrank_lit.cache import load_compression, save_compression
from lowrank_lit.compress import fingerprint
from lowrank_lit.product_lora import add_product_adapters, product_ranks
from lowrank_lit.recovery import Adapters, pause
from lowrank_lit.settings import Settings
from lowrank_lit.surgery import count_parameters

KEEP_RATIOS = (0.6, 0.4)
RATES = (3e-3, 1e-2)
ENDINGS = {"factors": ("factors",), "sequential": ("sequential",), "product": ("kept", "plain", "whitened")}
MODELS = ("embedded", "wiki-llama-3m")


class Bench:
    """One model at one keep ratio: compressed once, recovered from there again and again."""

    def __init__(self, name: str, folder: str, sources: dict[str, str], keep: float, options: Any) -> None:
        self.data = TextDataModule(sources, folder, evaluation_blocks=options.blocks)
        module = LowRankModule(folder)
        module.configure_model()
        self.model = module.model.eval()
        self.options = options
        self.seeds = [int(seed) for seed in options.seeds.split(",")]
        self.text = self.data.blocks("train")
        # Learning rates are chosen by the validation text, for which fewer blocks do.
        self.blocks = {"validation": self.data.evaluation("validation")[:40], "test": self.data.evaluation("test")}
        self.dense = self.measure(self.model)
        calibration = self.data.calibration_batches()
        kept = Path(options.cache) / f"{name}-0-{options.preset}-{keep}"
        identity = fingerprint(self.model, calibration, Settings(keep, preset=options.preset))
        if load_compression(kept, self.model, identity) is None:
            made = compress(self.model, calibration, keep_ratio=keep, preset=options.preset)
            save_compression(kept, self.model, made)
        self.one_shot = self.measure(self.model)
        self.parameters = add_adapters(copy.deepcopy(self.model), rank=options.rank).trainable_parameters

    def measure(self, model: Any, *, choosing: bool = True) -> dict[str, float]:
        """Perplexity on the test text and, where something is chosen by it, on the validation text."""
        return {
            split: perplexity(model, blocks) for split, blocks in self.blocks.items() if choosing or split == "test"
        }

    def run(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """Figures of one training and of its endings."""
        started, choosing = time.perf_counter(), seed == self.seeds[0]
        torch.manual_seed(seed)
        model = copy.deepcopy(self.model)
        before = count_parameters(model)
        endings: dict[str, dict[str, float]] = {}
        stored: dict[str, int] = {}
        figures: dict[str, Any] = {}
        if method == "product":
            ranks = product_ranks(model, self.parameters)
            adapters: Any = add_product_adapters(model, rank=ranks, alpha=2 * mean(ranks.values()))
            self.train(model, rate, seed)
            endings["kept"], stored["kept"] = self.measure(model, choosing=choosing), count_parameters(model)
            for ending, metric in (("plain", "identity"), ("whitened", "input")):
                again = copy.deepcopy(adapters)  # with its model
                record = again.merge(metric=metric, batches=self.data.calibration_batches())
                endings[ending], stored[ending] = self.measure(again.model, choosing=choosing), record.parameters_after
                figures |= {f"lost_{ending}": record.median_loss, "update": record.median_update}
        else:
            adapters = add_adapters(model, rank=self.options.rank, alpha=2.0 * self.options.rank)
            self.train(model, rate, seed, adapters if method == "sequential" else None)
            merged = adapters.merge()
            endings[method], stored[method] = self.measure(model, choosing=choosing), count_parameters(model)
            figures |= {"update": merged.median_update, "merge_difference": merged.largest_relative_difference}
        return {
            "dense": self.dense,
            "one_shot": self.one_shot,
            "perplexity": endings,
            "trainable": adapters.trainable_parameters,
            "stored_before": before,
            "stored_after": stored,
            "figures": figures,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def train(self, model: Any, rate: float, seed: int, sequential: Adapters | None = None) -> None:
        """The same steps for every method; with ``sequential`` one factor is paused in each half of them."""
        steps, size = self.options.steps, self.options.batch_size
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: shape(step, min(20, steps // 4), steps))
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat(
            [torch.randperm(len(self.text), generator=generator) for _ in range(-(-steps * size // len(self.text)))]
        )
        model.train()
        for step in range(steps):
            ids = self.text[order[step * size : (step + 1) * size]]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            if sequential is not None:
                paused = "inner" if step < steps // 2 else "outer"
                pause(sequential.parameters(paused))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
        model.eval()


def shape(step: int, warmup: int, total: int) -> float:
    """Multiplier of the learning rate: linear warm-up, then a cosine to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def chosen_rates(entries: list[dict[str, Any]], seed: int) -> dict[tuple[str, float, str], float]:
    """The learning rate of every (model, keep ratio, ending) with the lowest validation perplexity at one seed."""
    best: dict[tuple[str, float, str], tuple[float, float]] = {}
    for entry in entries:
        for ending, values in entry["perplexity"].items() if entry["seed"] == seed else ():
            key = (entry["model"], entry["keep"], ending)
            best[key] = min(best.get(key, (math.inf, 0.0)), (values["validation"], entry["rate"]))
    return {key: rate for key, (_, rate) in best.items()}


def tables(entries: list[dict[str, Any]]) -> None:
    """One Markdown table per model and keep ratio."""
    first = min(entry["seed"] for entry in entries)
    rates = chosen_rates(entries, first)
    for model, keep in dict.fromkeys((entry["model"], entry["keep"]) for entry in entries):
        own = [entry for entry in entries if (entry["model"], entry["keep"]) == (model, keep)]
        dense, start = own[0]["dense"]["test"], own[0]["one_shot"]["test"]
        gap = math.log(start / dense)
        print(f"\n**{model}, keep {keep}** (dense {dense:.3f}, one-shot {start:.3f}, {own[0]['steps']} steps)\n")
        print("| method | rate | seeds | perplexity | excess / one-shot | trainable | stored before | after |")
        print("|---|---|---|---|---|---|---|---|")
        by_seed: dict[str, dict[int, float]] = {}
        for method, endings in ENDINGS.items():
            for ending in endings:
                rate = rates.get((model, keep, ending))
                runs = {e["seed"]: e for e in own if e["method"] == method and e["rate"] == rate}
                if not runs:
                    continue
                values = by_seed[ending] = {seed: e["perplexity"][ending]["test"] for seed, e in runs.items()}
                spread = f" +- {stdev(values.values()):.3f}" if len(values) > 1 else ""
                excess = mean(math.log(value / dense) for value in values.values()) / gap
                one = next(iter(runs.values()))
                name = method if ending == method else f"{method}, {ending}"
                print(
                    f"| {name} | {rate:g} | {len(values)} | {mean(values.values()):.3f}{spread} | {excess:.3f} | "
                    f"{one['trainable']:,} | {one['stored_before']:,} | {one['stored_after'][ending]:,} |"
                )
        cut = [by_seed[ending] for ending in ("plain", "whitened") if ending in by_seed]
        if "factors" in by_seed and cut:
            lower = {s: all(v < other[s] for other in cut if s in other) for s, v in by_seed["factors"].items()}
            print(f"\nfactors ends lower than both truncated ones in {sum(lower.values())} of {len(lower)} seeds.")


def main() -> None:
    """Measure the cells that the output does not hold yet, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/recovery.jsonl", help="JSON lines; measured cells are kept")
    parser.add_argument("--models", default="")
    parser.add_argument("--methods", default=",".join(ENDINGS))
    parser.add_argument("--keep-ratios", default=",".join(map(str, KEEP_RATIOS)))
    parser.add_argument("--rates", default=",".join(map(str, RATES)))
    parser.add_argument("--seeds", default="0,1,2", help="the first one chooses the learning rates")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters on factors")
    parser.add_argument("--blocks", type=int, default=100, help="for perplexity")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--cache", default="runs/bench/oneshot", help="folder for the one-shot models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print tables of the output")
    options = parser.parse_args()
    results = Results(options.output)
    if options.table:
        tables(results.entries)
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    seeds, rates = [int(seed) for seed in options.seeds.split(",")], [float(rate) for rate in options.rates.split(",")]
    protocol = [options.steps, options.batch_size, options.rank, options.blocks, options.preset]
    for name, folder, sources, _ in problems(MODELS, options.models):
        for keep in map(float, options.keep_ratios.split(",")):
            bench: Bench | None = None
            for seed in seeds:
                for method in options.methods.split(","):
                    best = chosen_rates(results.entries, seeds[0])
                    wanted = rates if seed == seeds[0] else sorted({best[name, keep, e] for e in ENDINGS[method]})
                    for rate in wanted:
                        key = json.dumps([name, keep, method, rate, seed, protocol])
                        if key in results:
                            continue
                        bench = bench or Bench(name, folder, sources, keep, options)
                        entry = {"key": key, "model": name, "keep": keep, "method": method, "rate": rate, "seed": seed}
                        entry |= {"steps": options.steps, **bench.run(method, rate, seed)}
                        results.append(entry)
                        shown = {ending: round(values["test"], 3) for ending, values in entry["perplexity"].items()}
                        print(name, keep, method, rate, seed, shown, f"{entry['seconds']}s", flush=True)


if __name__ == "__main__":
    main()
