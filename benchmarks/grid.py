"""One-shot compression over a grid of metric, allocator, feedback and storage on real models, resumable.

Run from the repository's root:

    LOWRANK_LIT_REFERENCE=FOLDER python benchmarks/grid.py --bench runs/bench    # measure what is missing
    python benchmarks/grid.py --table                                            # Markdown tables of it

Models: the embedded one; with LOWRANK_LIT_REFERENCE also stories260K and wiki-llama-3m; with --bench FOLDER the two
that recipes/pretrain_tiny.yaml was given other architectures for (commands in benchmarks/RESULTS.md).

Protocol: the text tokenised whole without special tokens, non-overlapping blocks of 256 tokens from the start of the
file, the first 100 blocks, mean next-token loss over the 255 targets of each block, float32, exp. stories260K has one
held-out file: its even blocks are for tuning, its odd ones for reporting. Calibration: 96 blocks of the same length.
Excess is ln(perplexity) - ln(dense perplexity).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _common import EXTRACTS, Problem, Results, asked, available, read

from lowrank_lit import LowRankModule, TextDataModule, perplexity
from lowrank_lit.errors import LowRankError
from lowrank_lit.refit import substituted
from lowrank_lit.settings import Settings
from lowrank_lit.study import Study

KEEP_RATIOS = (0.8, 0.6, 0.4)
METRICS = ("identity", "activation_scale", "fisher_input", "fisher_two_sided", "corda", "input", "two_sided")
ALLOCATORS = ("uniform", "unirank", "effective_rank", "svd_llm_v2", "sensitivity", "zero_sum", "measured", "knapsack")
PLAIN = {"preset": "unirank", "feedback": "none", "rounds": 1, "select": False}


def cells(groups: list[str]) -> Iterator[dict[str, Any]]:
    """Settings of every cell of the named groups."""
    if "presets" in groups:
        yield from ({"preset": name} for name in ("unirank", "fast", "best"))
    if "metrics" in groups:
        for metric in METRICS:
            for allocator in ("uniform", "unirank", "knapsack"):
                yield {**PLAIN, "metric": metric, "allocator": allocator}
    if "allocators" in groups:
        for metric in ("input", "two_sided"):
            for allocator in ALLOCATORS:
                if allocator == "sensitivity":  # hundreds of forward passes: a group of its own
                    continue
                yield {**PLAIN, "metric": metric, "allocator": allocator}
    if "sensitivity" in groups:
        yield from ({**PLAIN, "metric": metric, "allocator": "sensitivity"} for metric in ("input", "two_sided"))
    if "feedback" in groups:
        yield {"preset": "best", "feedback": "none"}
        yield {"preset": "best", "feedback": "recollect"}
        yield {"preset": "best", "feedback": "anchored", "rounds": 1}
        yield {"preset": "best", "select": False}
        yield {"preset": "best", "storage": "pivot"}
        yield {"preset": "unirank", "storage": "pivot"}
        yield {"preset": "unirank", "feedback": "anchored", "rounds": 1}
    if {"top", "draws"} & set(groups):  # what the others are compared with: cheap, so at every draw and ratio
        yield {"preset": "unirank"}
        yield {"preset": "unirank", "storage": "pivot"}
    if "top" in groups:  # the five best of all, for further draws: --groups top --seeds 1,2
        yield {"preset": "best", "storage": "pivot"}
        yield {"preset": "best"}
        yield {"preset": "best", "select": False}
        yield {"preset": "best", "feedback": "anchored", "rounds": 1}
    if "variants" in groups:
        yield {**PLAIN, "metric": "input", "allocator": "unirank", "importance_of": "block"}
        yield {**PLAIN, "metric": "input", "allocator": "unirank", "cost_aware": True}
        yield {**PLAIN, "metric": "two_sided", "allocator": "knapsack", "labels": "text"}


def problems(bench: str | None, names: str) -> list[Problem]:
    """All models that are there, those of the folder ``bench`` too; with ``names`` no others."""
    found = list(available())
    if bench:
        other = found[0].other
        found += [
            Problem(f"{name}-bench", str(Path(bench, name, "model")), EXTRACTS, other) for name in ("neox", "qwen2")
        ]
    return [problem for problem in found if asked(problem.name, names)]


class Bench:
    """One model on one calibration draw: its study, blocks, and dense perplexities."""

    def __init__(
        self, name: str, folder: str, sources: dict[str, str], other: str | None, seed: int, split: str
    ) -> None:
        data = TextDataModule(sources, folder)
        module = LowRankModule(folder)
        module.configure_model()
        self.model = module.model.eval()
        self.study = Study(self.model, data.calibration_batches(seed=seed) if seed else data.calibration_batches())
        self.blocks = {split: data.evaluation(split)}
        if name == "stories260K":
            start = 0 if split == "validation" else 1
            self.blocks = {split: data.evaluation(split)[start::2]}
        if other is not None and split == "test":
            self.blocks["other"] = TextDataModule({"test": other}, folder).evaluation("test")
        self.dense = {key: perplexity(self.model, value) for key, value in self.blocks.items()}

    def run(self, settings: Settings, *, preset: bool) -> dict[str, Any]:
        """Figures of one cell; those of a whole preset on the other domain's text too."""
        started = time.perf_counter()
        draft = self.study.draft(settings)
        seconds = time.perf_counter() - started
        chosen = self.blocks if preset else {key: self.blocks[key] for key in self.blocks if key != "other"}
        with substituted(self.study.layers, self.study.weights(draft)):
            values = {key: perplexity(self.model, blocks) for key, blocks in chosen.items()}
        excess = {key: math.log(value) - math.log(self.dense[key]) for key, value in values.items()}
        return {
            "perplexity": values,
            "dense": self.dense,
            "excess": excess,
            "achieved": draft.plan.keep_ratio,
            "predicted": draft.plan.predicted_nats,
            "seconds": round(seconds, 2),
            "passes": draft.passes,
            "notes": list(draft.plan.notes),
        }


def label(settings: dict[str, Any]) -> str:
    """A cell's settings in a few words."""
    rest = {key: value for key, value in settings.items() if PLAIN.get(key, object()) != value}
    if settings.get("preset") in ("best", "fast", "unirank") and "metric" not in settings:
        name = settings["preset"]
        extra = [f"{key} {value}" for key, value in settings.items() if key != "preset"]
        return ", ".join([name, *extra])
    metric, allocator = rest.pop("metric"), rest.pop("allocator")
    return ", ".join([f"{metric} + {allocator}", *(f"{key} {value}" for key, value in rest.items())])


GROUPS = ("presets", "metrics", "allocators", "feedback", "variants", "sensitivity")


def ordered(entries: list[dict[str, Any]]) -> list[str]:
    """Labels of the measured cells, in the order of the groups."""
    rank = {label(cell): number for number, cell in enumerate(cells(list(GROUPS)))}
    return sorted(dict.fromkeys(label(entry["settings"]) for entry in entries), key=lambda name: rank.get(name, 999))


def tables(entries: list[dict[str, Any]]) -> None:
    """One Markdown table per model, of the first calibration draw, then what holds over all models and draws."""
    for model in dict.fromkeys(entry["model"] for entry in entries):
        own = [entry for entry in entries if entry["model"] == model and entry["seed"] == 0]
        good = [entry for entry in own if "excess" in entry]
        base = {entry["keep"]: entry["excess"]["test"] for entry in good if label(entry["settings"]) == "unirank"}
        ratios = sorted(base, reverse=True)
        dense = next(entry["dense"] for entry in good if "other" in entry["dense"] or len(good) == len(own))
        other = f"; other domain {dense['other']:.2f}" if "other" in dense else ""
        print(f"\n**{model}** (dense {dense['test']:.2f}{other})")
        print("\n| cell | " + " | ".join(f"keep {ratio}" for ratio in ratios) + " | excess / (input + unirank)", end="")
        print(" | other domain | seconds |\n|---|" + "---|" * (len(ratios) + 3))
        for name in ordered(own):
            cells_ = {entry["keep"]: entry for entry in own if label(entry["settings"]) == name}
            if any("error" in entry for entry in cells_.values()) or set(cells_) != set(ratios):
                shown = [cells_.get(ratio, {"error": ""}) for ratio in ratios]
                values = ["-" if "error" in entry else f"{entry['perplexity']['test']:.2f}" for entry in shown]
                print(f"| {name} | " + " | ".join(values) + " | | | |")
                continue
            values = " | ".join(f"{cells_[ratio]['perplexity']['test']:.2f}" for ratio in ratios)
            relative = " / ".join(f"{cells_[ratio]['excess']['test'] / base[ratio]:.2f}" for ratio in ratios)
            away = [cells_[ratio]["perplexity"].get("other") for ratio in ratios]
            shown = "" if None in away else " / ".join(f"{value:.1f}" for value in away)
            print(f"| {name} | {values} | {relative} | {shown} | {max(c['seconds'] for c in cells_.values()):.0f} |")
    means(entries)
    spread(entries)


def relative(entries: list[dict[str, Any]]) -> dict[tuple[str, float], dict[tuple[str, int], float]]:
    """Excess relative to input + unirank of the same draw (else the first), by cell and ratio, by model and draw."""
    good = [entry for entry in entries if "excess" in entry]
    base = {
        (entry["model"], entry["keep"], entry["seed"]): entry["excess"]["test"]
        for entry in good
        if label(entry["settings"]) == "unirank"
    }
    found: dict[tuple[str, float], dict[tuple[str, int], float]] = {}
    for entry in good:
        place = entry["model"], entry["keep"]
        value = entry["excess"]["test"] / base.get((*place, entry["seed"]), base[*place, 0])
        found.setdefault((label(entry["settings"]), entry["keep"]), {})[entry["model"], entry["seed"]] = value
    return found


def means(entries: list[dict[str, Any]]) -> None:
    """Mean over the models, first draw, of the cells that were measured on all of them."""
    found, models = relative(entries), {entry["model"] for entry in entries}
    ratios = sorted({entry["keep"] for entry in entries}, reverse=True)
    rows = []
    for name in ordered(entries):
        values = [[found.get((name, ratio), {}).get((model, 0)) for model in models] for ratio in ratios]
        if all(value is not None for column in values for value in column):
            rows.append((name, [sum(map(float, column)) / len(column) for column in values]))
    rows.sort(key=lambda row: sum(row[1]))
    print(f"\n**Mean over the {len(models)} models**, excess / (input + unirank), best cells first\n")
    print(
        "| cell | " + " | ".join(f"keep {ratio}" for ratio in ratios) + " | mean |\n|---|" + "---|" * (len(ratios) + 1)
    )
    for name, values in rows:
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in (*values, sum(values) / len(values))) + " |")


def spread(entries: list[dict[str, Any]]) -> None:
    """Smallest to largest over the calibration draws, of the cells that have several."""
    found = relative(entries)
    ratios = sorted({entry["keep"] for entry in entries}, reverse=True)
    models = list(dict.fromkeys(entry["model"] for entry in entries))
    print("\n**Calibration draws**, excess / (input + unirank of the same draw), smallest to largest\n")
    print("| model | cell | draws | " + " | ".join(f"keep {ratio}" for ratio in ratios) + " |\n|---|---|---|", end="")
    print("---|" * len(ratios))
    for model in models:
        for name in ordered(entries):
            drawn = [[v for (m, _), v in found.get((name, ratio), {}).items() if m == model] for ratio in ratios]
            if max(map(len, drawn)) > 1:
                shown = " | ".join(f"{min(v):.2f} to {max(v):.2f}" if len(v) > 1 else "" for v in drawn)
                print(f"| {model} | {name} | {max(map(len, drawn))} | {shown} |")


def main() -> None:
    """Measure the cells that the output does not hold yet, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/grid.jsonl", help="JSON lines; measured cells are kept")
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--models", default="")
    parser.add_argument("--bench", default=None, help="folder of the models trained for this benchmark")
    parser.add_argument("--split", default="test", help="test for reported figures, validation to tune on")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--keep-ratios", default=",".join(map(str, KEEP_RATIOS)))
    parser.add_argument("--extra", default="{}", help="further settings for every cell, as JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", nargs="*", help="print tables of these files (default: the output)")
    options = parser.parse_args()
    if options.table is not None:
        tables(read(options.table or [options.output]))
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    results = Results(options.output)
    wanted = list({json.dumps(cell, sort_keys=True): cell for cell in cells(options.groups.split(","))}.values())
    for name, folder, sources, other in problems(options.bench, options.models):
        for seed in map(int, options.seeds.split(",")):
            bench: Bench | None = None
            for cell in wanted:
                for ratio in map(float, options.keep_ratios.split(",")):
                    settings = {**cell, **json.loads(options.extra)}
                    key = json.dumps([name, seed, options.split, ratio, settings], sort_keys=True)
                    if key in results:
                        continue
                    bench = bench or Bench(name, folder, sources, other, seed, options.split)
                    entry = {"key": key, "model": name, "seed": seed, "split": options.split, "keep": ratio}
                    try:
                        entry |= {
                            "settings": settings,
                            **bench.run(Settings(ratio, **settings), preset=len(settings) == 1),
                        }
                    except LowRankError as error:
                        entry |= {"settings": settings, "error": str(error)}
                    results.append(entry)
                    shown = entry.get("error") or f"{entry['excess']} {entry['seconds']}s {entry['notes']}"
                    print(name, seed, ratio, settings, shown, flush=True)


if __name__ == "__main__":
    main()
