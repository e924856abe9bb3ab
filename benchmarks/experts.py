"""What the rules for experts of a mixture are worth: one-shot perplexity with them and without, by length of the text.

Run from the repository's root, with a mixture that recipes/pretrain_tiny.yaml has trained (see benchmarks/RESULTS.md):

    python benchmarks/experts.py --model runs/bench/mixtral/model            # measure what is missing; resumable
    python benchmarks/experts.py --table

Protocol: perplexity on 100 blocks of 256 tokens of the embedded test text at --keep of all projections, experts
included, after one-shot compression on --tokens tokens of the embedded calibration text. Variants, each against the
rule that it leaves out:

- `rules`: as the package does it;
- `own statistics`: every expert's moments as they are, nothing pooled (experts that no token reached: the pool);
- `pool x N`: the pool counts like ``N d`` tokens, where the rules have ``d / 16``;
- `no frequency`: an expert counts like a matrix that all tokens go through;
- `mean frequency`: relative to the mean expert's.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from _common import EXTRACTS, Results

from lowrank_lit import collector, compress, pooling
from lowrank_lit.data import TextDataModule
from lowrank_lit.evaluation import perplexity
from lowrank_lit.statistics import LayerStatistics

POOLS = {"pool x 1": 1.0, "pool x 1/4": 1 / 4, "pool x 1/64": 1 / 64}
VARIANTS = ("rules", "own statistics", *POOLS, "no frequency", "mean frequency")
PRESETS = ("unirank", "fast")


@contextmanager
def variant(name: str) -> Iterator[None]:
    """The package with one rule changed."""
    weight, pool = pooling.pooled_weight, collector.pool_experts

    def frequencies(change: Callable[[float, float], float | None]) -> Any:
        def pooled(own: dict[str, LayerStatistics], *args: Any, **settings: Any) -> dict[str, LayerStatistics]:
            found = pool(own, *args, **settings)
            values = [entry.frequency or 0.0 for entry in found.values()]
            mean = sum(values) / len(values)
            return {key: replace(entry, frequency=change(entry.frequency or 0.0, mean)) for key, entry in found.items()}

        return pooled

    def nothing(size: int, tokens: int) -> float:
        return 0.0 if tokens else 1.0

    def like(size: int, tokens: int) -> float:
        return POOLS[name] * size / (POOLS[name] * size + tokens)

    try:
        if name == "own statistics":
            pooling.pooled_weight = nothing
        elif name in POOLS:
            pooling.pooled_weight = like
        elif name == "no frequency":
            collector.pool_experts = frequencies(lambda own, mean: 1.0)
        elif name == "mean frequency":
            collector.pool_experts = frequencies(lambda own, mean: own / mean)
        yield
    finally:
        pooling.pooled_weight, collector.pool_experts = weight, pool


def measure(options: argparse.Namespace, preset: str, name: str, keep: float, tokens: int) -> dict[str, Any]:
    """One cell."""
    from transformers import AutoModelForCausalLM

    data = TextDataModule({k: EXTRACTS[k] for k in ("calibration", "test")}, options.model, calibration_blocks=96)
    whole = torch.cat([batch["input_ids"] for batch in data.calibration_batches()])
    chosen = [{"input_ids": part} for part in whole[: max(1, tokens // whole.shape[1])].split(2)]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32").eval()
    dense = perplexity(model, data.evaluation("test"))
    with variant(name):
        result = compress(model, chosen, keep_ratio=keep, preset=preset)
    kept = [m.rank / min(m.rows, m.columns) for m in result.plan.matrices if ".experts." in m.name]
    others = [m.rank / min(m.rows, m.columns) for m in result.plan.matrices if ".experts." not in m.name]
    return {
        "dense": dense,
        "perplexity": perplexity(model, data.evaluation("test")),
        "achieved": result.plan.keep_ratio,
        "experts": sum(kept) / len(kept),
        "others": sum(others) / len(others),
    }


def show(entries: list[dict[str, Any]]) -> None:
    """Rows by preset, keep ratio and tokens; columns by variant."""
    rows = sorted({(e["preset"], e["keep"], e["tokens"]) for e in entries}, key=lambda row: (row[0], -row[1], row[2]))
    by = {(e["preset"], e["keep"], e["tokens"], e["variant"]): e for e in entries}
    print(f"| preset | keep | tokens | {' | '.join(VARIANTS)} |")
    print("|---|---|---|" + "---|" * len(VARIANTS))
    for row in rows:
        cells = [by.get((*row, name)) for name in VARIANTS]
        shown = ["" if e is None else f"{e['perplexity']:.2f}" for e in cells]
        print(f"| {row[0]} | {row[1]} | {row[2]} | {' | '.join(shown)} |")
    print(f"\ndense {entries[0]['dense']:.2f}")


def main() -> None:
    """Measure what the output lacks, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/bench/mixtral/model")
    parser.add_argument("--output", default="benchmarks/experts.jsonl")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.4])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 24576])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = Results(options.output)
    if options.table:
        show(results.entries)
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    for keep in options.keep:
        for tokens in options.tokens:
            for preset in options.presets:
                for name in options.variants:
                    key = f"{preset} {name} {keep} {tokens}"
                    if key not in results:
                        found = measure(options, preset, name, keep, tokens)
                        results.append(
                            {"key": key, "preset": preset, "variant": name, "keep": keep, "tokens": tokens, **found}
                        )
                        print(results.entries[-1], flush=True)


if __name__ == "__main__":
    main()
