"""What the presets and a sweep cost, as multiples of one forward and backward pass over the calibration text.

    python benchmarks/cost.py

A random Llama of 4 blocks of width 512 (1376 inside, 8 heads, 4096 words), 64 sequences of 512 tokens in batches of 8.
One pass: forward and backward of the next-token loss with gradients of all weights, as a training step without the
optimizer. Timed in one process, one after the other.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowrank_lit import compress
from lowrank_lit.settings import Settings
from lowrank_lit.study import Study

CLOSED = ("uniform", "unirank", "effective_rank", "svd_llm_v2", "zero_sum", "knapsack")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512,
            intermediate_size=1376,
            num_hidden_layers=4,
            num_attention_heads=8,
            vocab_size=4096,
            max_position_embeddings=512,
        )
    ).eval()
    ids = torch.randint(0, 4096, (64, 512))
    batches = [{"input_ids": part} for part in ids.split(8)]

    def passes() -> float:
        started = time.perf_counter()
        for batch in batches:
            model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    base = [passes()]
    rows = []
    for preset in ("unirank", "fast", "best"):
        started = time.perf_counter()
        result = compress(copy.deepcopy(model), batches, keep_ratio=0.6, preset=preset)
        stages = ", ".join(f"{key} {value:.1f}" for key, value in result.record["seconds"].items())
        rows.append((f"preset {preset}", time.perf_counter() - started, stages))
    base.append(passes())
    study = Study(model, batches)
    started = time.perf_counter()
    plain = {"preset": "unirank", "metric": "input", "labels": "text"}
    cells = [Settings(ratio, allocator=name, **plain) for name in CLOSED for ratio in (0.8, 0.6, 0.4)]
    study.collection.calibration(frozenset().union(*(cell.moments for cell in cells)), importance=True, labels="text")
    for cell in cells:
        study.weights(study.draft(cell))
    rows.append((f"sweep of {len(CLOSED)} allocators x 3 ratios, metric input", time.perf_counter() - started, ""))
    started = time.perf_counter()
    compress(copy.deepcopy(model), batches, keep_ratio=0.6, **plain, allocator="knapsack")
    rows.append(("one compression, input + knapsack", time.perf_counter() - started, ""))
    base.append(passes())
    unit = sorted(base)[1]
    print(f"\none forward and backward: {unit:.1f} s ({', '.join(f'{value:.1f}' for value in base)})\n")
    print("| what | seconds | passes | stages, s |\n|---|---|---|---|")
    for name, seconds, stages in rows:
        print(f"| {name} | {seconds:.1f} | {seconds / unit:.2f} | {stages} |")


if __name__ == "__main__":
    main()
