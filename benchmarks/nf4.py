"""NF4 factors: the product's error by gauge on real matrices, and QLoRA on factors from end to end; resumable.

Run from the repository's root; needs bitsandbytes:

    LOWRANK_LIT_REFERENCE=FOLDER python benchmarks/nf4.py    # measure what is missing
    python benchmarks/nf4.py --table                         # Markdown tables of it

Matrices: c_attn (2304 x 768) and c_proj (768 x 768) of the first four layers of GPT-2 small, from
`models/gpt2-124m-attention` of the reference folder. Each is cut by an SVD to a rank; both factors are quantised to NF4
with double quantisation, with all singular values in `outer`, balanced, or balanced and rotated. The error is ||W' -
W||_F / ||W||_F against the cut matrix W, the law sqrt(2) 0.092 ||W||_* / (sqrt(r) ||W||_F).

End to end: a Llama (2 blocks of width 512, hidden 1024, 8 heads, vocabulary 4096, tied) trained from scratch on the
running Python's own text for --pretrain steps (kept in --folder), compressed to --keep by preset `fast` with ranks that
are multiples of 64, and recovered on the training text. All weights are rounded to bfloat16 before recovery, and
what is merged is rounded after it; products are float32, because few CPUs have bfloat16 arithmetic. `bf16` trains LoRA
of rank 8 on the factors with AdamW; every other case has its factors in NF4 and AdamW with 8-bit moments. Blocks of
256 tokens, 8 a step, learning rate --rate, 10 steps of warm-up and a cosine to a tenth, gradients clipped to 1. A seed
draws the adapters, the rotation and the order of the text. Perplexity: embedded test text, non-overlapping blocks of
256 tokens, the first 100, float32. `re-quantised` is the merged model with its factors in NF4 again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _common import Results
from safetensors import safe_open
from torch import Tensor, nn

from lowrank_lit import LowRankModule, TextDataModule, add_adapters, compress, perplexity
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.optimizers import build_optimizer
from lowrank_lit.quantize import quantize_factors, requantize_factors

RANKS = (128, 256, 384, 512)
GAUGES = {"sigma in outer": "none", "balanced": "balanced", "balanced + rotation": "rotated"}
CASES: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "NF4, rotated": {},
    "NF4, balanced": {"gauge": "balanced"},
    "NF4, outer alone": {"which": "outer"},
    "NF4, inner alone": {"which": "inner"},
}
REPEATED = ("bf16", "NF4, rotated")  # the others are run with the first seed only
CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def matrices() -> Iterator[tuple[str, Tensor]]:
    """Name and weight (out, in), float64, of every matrix of the reference folder."""
    folder = os.environ.get("LOWRANK_LIT_REFERENCE")
    if not folder:
        print("LOWRANK_LIT_REFERENCE is unset: no real matrices")
        return
    for file in sorted(Path(folder, "models", "gpt2-124m-attention").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name.removeprefix("transformer.").removesuffix(".weight"), tensors.get_tensor(name).double().T


def gauge_entries(done: Results) -> Iterator[dict[str, Any]]:
    """Errors of every matrix, rank and gauge that is not done."""
    for name, weight in matrices():
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        for rank in RANKS:
            for label, gauge in GAUGES.items():
                key = json.dumps(["gauge", name, rank, label])
                if key in done:
                    continue
                outer, inner = left[:, :rank] * values[:rank], right[:rank]
                model = nn.Sequential(FactoredLinear.from_factors(outer, inner, None, dtype=torch.float32))
                (figures,) = quantize_factors(model, gauge=gauge)["layers"].values()
                yield {"key": key, "kind": "gauge", "matrix": name, "rank": rank, "gauge": label, **figures}


def wide_model(options: argparse.Namespace) -> tuple[nn.Module, TextDataModule]:
    """The dense model, trained on the first call and kept, and its text."""
    import lightning.pytorch as pl

    folder = Path(options.folder)
    sources = {"train": "stdlib:train"} | {s: f"embedded:{s}" for s in ("calibration", "validation", "test")}
    data = TextDataModule(sources, str(folder / "model"), batch_size=8, vocab_size=CONFIG["vocab_size"])
    if not (folder / "model" / "config.json").is_file():
        pl.seed_everything(0)
        module = LowRankModule(CONFIG, learning_rate=1e-3, warmup_steps=20)
        silent: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = pl.Trainer(max_steps=options.pretrain, gradient_clip_val=1.0, limit_val_batches=0, **silent)
        trainer.fit(module, datamodule=data)
        module.model.save_pretrained(folder / "model")
    module = LowRankModule(str(folder / "model"))
    module.configure_model()
    return module.model.eval(), data


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """The model with every number rounded to bfloat16 and held in float32."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.copy_(parameter.bfloat16())
    return model


def train(model: nn.Module, blocks: Tensor, options: argparse.Namespace, optimizer: str, seed: int) -> None:
    """Train what requires a gradient on blocks (n, length) in a random order."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stepper = build_optimizer(optimizer, parameters, learning_rate=options.rate)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    model.train()
    for step, chosen in enumerate(order[: 8 * options.steps].split(8)):
        factor = (step + 1) / 10 if step < 10 else 0.1 + 0.45 * (1 + math.cos(math.pi * step / options.steps))
        for group in stepper.param_groups:
            group["lr"] = options.rate * factor
        stepper.zero_grad()
        model(input_ids=blocks[chosen], labels=blocks[chosen], use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        stepper.step()
    model.eval()


def recover(
    start: nn.Module, case: dict[str, Any] | None, blocks: Tensor, test: Tensor, options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """Perplexities of one case: as quantised, recovered, merged, quantised again."""
    model = copy.deepcopy(start)
    found: dict[str, Any] = {}
    if case is not None:
        record = quantize_factors(model, seed=seed, **case)
        found |= {"product_error": record["largest_product_error"], "bits": 8 * record["bytes"] / record["parameters"]}
    found["start"] = perplexity(model, test)
    torch.manual_seed(seed)
    adapters = add_adapters(model, rank=8)
    started = time.perf_counter()
    train(model, blocks, options, "adamw" if case is None else "adamw8bit", seed)
    found["seconds"] = round(time.perf_counter() - started, 1)
    found["recovered"] = perplexity(model, test)
    merged = adapters.merge()
    found |= {"merged": perplexity(rounded(model), test), "update": merged.median_update}
    if case is not None:
        again = requantize_factors(model, lambda each: math.log(perplexity(each, test)), seed=seed + 1, **case)
        found["requantised"] = math.exp(again["loss"]["after"])
    return found


def wide_entries(done: Results, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every case and seed of the end-to-end run that is not done."""
    wanted = [
        (case, seed, json.dumps(["wide", case, seed, options.steps, options.pretrain, options.rate, options.keep]))
        for seed in range(options.seeds)
        for case in CASES
        if seed == 0 or case in REPEATED
    ]
    if all(key in done for *_, key in wanted):
        return
    model, data = wide_model(options)
    test, blocks = data.evaluation("test"), data.blocks("train")
    dense = perplexity(model, test)
    result = compress(
        model, data.calibration_batches(), keep_ratio=options.keep, preset="fast", quantum=64, min_rank=64
    )
    oneshot = perplexity(rounded(model), test)
    common = {"kind": "wide", "dense": dense, "oneshot": oneshot, "keep": result.plan.keep_ratio}
    for case, seed, key in wanted:
        if key not in done:
            figures = recover(model, CASES[case], blocks, test, options, seed)
            yield {"key": key, "case": case, "seed": seed, **common, **figures}


def gauge_table(entries: list[dict[str, Any]]) -> None:
    """Mean error over the matrices of a kind by rank and gauge, beside the law."""
    print("\n**Relative error of the product, both factors in NF4 (mean over the layers)**\n")
    print("| matrices | rank | " + " | ".join(GAUGES) + " | law | rotated / law, least to greatest |")
    print("|---|---|" + "---|" * (len(GAUGES) + 2))
    for kind in ("c_attn", "c_proj"):
        for rank in RANKS:
            own = [e for e in entries if e["matrix"].endswith(kind) and e["rank"] == rank]
            if not own:
                continue
            errors = {label: mean(e["product_error"] for e in own if e["gauge"] == label) for label in GAUGES}
            rotated = [e for e in own if e["gauge"] == "balanced + rotation"]
            law = mean(e["error_law"] for e in rotated)
            shares = sorted(e["product_error"] / e["error_law"] for e in rotated)
            shown = " | ".join(f"{value:.4f}" for value in (*errors.values(), law))
            print(f"| {len(rotated)} x {kind} | {rank} | {shown} | {shares[0]:.3f} to {shares[-1]:.3f} |")


def wide_table(entries: list[dict[str, Any]]) -> None:
    """Perplexities by case, mean over the seeds, and the two ratios that were to be met."""
    first = entries[0]
    print(f"\n**Wide model: dense {first['dense']:.2f}, keep {first['keep']:.3f} one-shot {first['oneshot']:.2f}**\n")
    print(
        "| factors | seeds | bits | before recovery | recovered | merged | merged / unmerged - 1 | / bf16 LoRA - 1 ",
        end="",
    )
    print("| re-quantised |\n|---|---|---|---|---|---|---|---|---|")
    base = {e["seed"]: e["merged"] for e in entries if e["case"] == "bf16"}
    for case in CASES:
        own = [e for e in entries if e["case"] == case]
        if not own:
            continue
        start, recovered, merged = (mean(e[field] for e in own) for field in ("start", "recovered", "merged"))
        kept = max((e["merged"] / e["recovered"] - 1 for e in own), key=abs)
        behind = max(e["merged"] / base[e["seed"]] - 1 for e in own)
        bits = f"{own[0]['bits']:.2f}" if "bits" in own[0] else "16"
        again = f"{mean(e['requantised'] for e in own):.2f}" if "requantised" in own[0] else ""
        print(f"| {case} | {len(own)} | {bits} | {start:.2f} | {recovered:.2f} | {merged:.2f} ", end="")
        print(f"| {100 * kept:+.3f} % | {100 * behind:+.2f} % | {again} |")


def main() -> None:
    """Measure what the output does not hold yet, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/nf4.jsonl", help="JSON lines; what is measured is kept")
    parser.add_argument("--parts", default="gauge,wide")
    parser.add_argument("--folder", default="runs/bench/wide", help="of the trained model")
    parser.add_argument("--pretrain", type=int, default=400, help="steps of training the dense model")
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=150, help="of recovery")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of the adapters")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the tables of the output")
    options = parser.parse_args()
    results = Results(options.output)
    if options.table:
        for kind, show in (("gauge", gauge_table), ("wide", wide_table)):
            if own := [entry for entry in results.entries if entry["kind"] == kind]:
                show(own)
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    parts = {"gauge": gauge_entries(results), "wide": wide_entries(results, options)}
    for part in options.parts.split(","):
        for entry in parts[part]:
            results.append(entry)
            print({key: value for key, value in entry.items() if key != "key"}, flush=True)


if __name__ == "__main__":
    main()
