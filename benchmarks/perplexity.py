"""Perplexity of one-shot compression: metric x allocator x keep ratio on real models, as a Markdown table.

Run from the repository's root:

    python benchmarks/perplexity.py                # the embedded model
    LOWRANK_LIT_REFERENCE=FOLDER python benchmarks/perplexity.py    # and the reference models in FOLDER

Protocol: the text tokenised whole without special tokens, non-overlapping blocks of 256 tokens from the start of the
test file, the first 100 blocks, mean next-token loss over the 255 targets of each block, float32, exp. Calibration: 96
blocks of the same length from token 200,000 of the training file, or from the start of a calibration file of its own.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from _common import problems

from lowrank_lit import LowRankModule, TextDataModule, compress, perplexity

KEEP_RATIOS = (0.8, 0.6, 0.4)
CELLS = (("identity", "uniform"), ("identity", "unirank"), ("input", "uniform"), ("input", "unirank"))
TITLES = {
    "embedded": "embedded model, Python's documentation and library",
    "stories260K": "stories260K, TinyStories",
    "wiki-llama-3m": "wiki-llama-3m, WikiText-2",
}


def main() -> None:
    """Print one table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", help="test for reported figures, validation to tune on")
    parser.add_argument("--min-rank", type=int, default=None, help="rank floor; the package's default where left out")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, folder, sources, _ in problems(TITLES):
        data = TextDataModule(sources, folder)
        if not data.has(options.split) or (name, options.split) == ("stories260K", "validation"):  # one held-out file
            continue
        module = LowRankModule(folder)
        module.configure_model()
        blocks = data.evaluation(options.split)
        batches = data.calibration_batches()
        dense = perplexity(module.model, blocks)
        print(f"\n**{TITLES[name]}** ({options.split}, {len(blocks)} blocks; dense {dense:.2f})\n")
        print(
            "| metric | allocator | "
            + " | ".join(f"keep {ratio}" for ratio in KEEP_RATIOS)
            + " | achieved keep ratios | seconds |"
        )
        print("|---|---|" + "---|" * (len(KEEP_RATIOS) + 2), flush=True)
        for metric, allocator in CELLS:
            figures, achieved, started = [], [], time.perf_counter()
            for ratio in KEEP_RATIOS:
                model = copy.deepcopy(module.model)
                extra = {} if options.min_rank is None else {"min_rank": options.min_rank}
                result = compress(model, batches, keep_ratio=ratio, metric=metric, allocator=allocator, **extra)
                figures.append(f"{perplexity(model, blocks):.2f}")
                achieved.append(f"{result.plan.keep_ratio:.4f}")
            seconds = f"{time.perf_counter() - started:.0f}"
            print(
                f"| {metric} | {allocator} | " + " | ".join(figures) + f" | {' '.join(achieved)} | {seconds} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
