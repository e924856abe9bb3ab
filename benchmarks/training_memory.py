"""Peak memory of a training step: full fine-tuning, LoRA on the dense model, LoRA and QLoRA on its factors.

Run from the repository's root; the last case needs bitsandbytes:

    python benchmarks/training_memory.py             # measure what is missing
    python benchmarks/training_memory.py --table     # a Markdown table of it

Protocol: a Llama built from a configuration (--layers blocks of --width, hidden 2.6875 times that, vocabulary 4096,
tied), random weights in bfloat16. Factors have the rank that keeps --keep of each matrix, rounded to a multiple of 64.
Two steps on random tokens (one sequence of --length), so that the optimizer's state is there; every case is a process
of its own. `full` trains all weights in bfloat16 with AdamW (its moments are bfloat16 then: the least that full
fine-tuning can do); the others train float32 adapters of rank 8 on every linear layer of the blocks, on the dense
weights or on both factors; `qlora` has its factors in NF4 and AdamW with 8-bit moments, the others AdamW.

On a GPU the figure is the peak of what PyTorch's allocator holds during the steps. On a CPU it is the peak of the
process's resident memory during the steps minus that before the model was made, with a model of two small layers
trained before so that libraries are loaded; freed tensors go back to the system at once (Linux). `weights` is what the
model's parameters take, packed ones and their scales included.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from _common import Results, in_own_process, reset_peak, resident
from torch import nn

from lowrank_lit.adapter_config import is_quantised
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.optimizers import build_optimizer
from lowrank_lit.quantize import packed_bytes, quantize_factors
from lowrank_lit.recovery import add_adapters

CASES = {
    "full": "full fine-tuning",
    "lora": "LoRA on the dense model",
    "factors": "LoRA on factors",
    "qlora": "QLoRA on factors",
}
QUANTUM = 64


def build(width: int, layers: int, keep: float, case: str, device: str) -> nn.Module:
    """A Llama with random weights, made ready to train in the way of ``case``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    if case == "lora":
        import peft

        settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=[name.rpartition(".")[2] for name in names[:7]])
        return peft.get_peft_model(model, settings)
    if case != "full":
        for name in names:
            linear = model.get_submodule(name)
            rows, columns = linear.weight.shape
            rank = max(QUANTUM, round(keep * rows * columns / (rows + columns) / QUANTUM) * QUANTUM)
            factored = FactoredLinear(columns, rows, rank, bias=False, device=device, dtype=torch.bfloat16)
            model.set_submodule(name, factored)
        if case == "qlora":
            quantize_factors(model, gauge="none")  # random factors: no gauge is better than another
        add_adapters(model, rank=8)
    return model


def step_twice(model: nn.Module, length: int, case: str) -> None:
    """Two steps on one sequence of random tokens."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer("adamw8bit" if case == "qlora" else "adamw", parameters, learning_rate=1e-4)
    ids = torch.randint(3, 4096, (1, length), generator=torch.Generator().manual_seed(1)).to(parameters[0].device)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters, scales of packed ones included."""
    packed = {id(m.weight): packed_bytes(m) for m in model.modules() if isinstance(m, nn.Linear) and is_quantised(m)}
    return sum(packed.get(id(p), p.numel() * p.element_size()) for p in model.parameters())


def measure(options: argparse.Namespace) -> None:
    """Print one case's figures as JSON."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step_twice(build(64, 2, options.keep, options.case, device), 16, options.case)
    before = resident("now")
    model = build(options.width, options.layers, options.keep, options.case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    step_twice(model, options.length, options.case)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("largest") - before
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(json.dumps({"peak": peak, "weights": weight_bytes(model), "trained": trained, "device": device}))


def run(options: argparse.Namespace, results: Results) -> None:
    """One process per case."""
    fields = ("width", "layers", "length", "keep")
    for case in CASES:
        setting: dict[str, Any] = {name: getattr(options, name) for name in fields}
        key = json.dumps([case, setting])
        if key in results:
            continue
        line = in_own_process(__file__, case, {**setting, "threads": options.threads})
        entry = {"key": key, "case": case, **setting, **json.loads(line)}
        results.append(entry)
        print(entry, flush=True)


def tables(entries: list[dict[str, Any]]) -> None:
    """A table for each setting."""
    settings = dict.fromkeys(json.dumps(json.loads(entry["key"])[1]) for entry in entries)
    for setting in map(json.loads, settings):
        own = {e["case"]: e for e in entries if json.loads(e["key"])[1] == setting}
        print(f"\n**Width {setting['width']}, {setting['layers']} blocks, {setting['length']} tokens, ", end="")
        print(f"keep {setting['keep']}, {next(iter(own.values()))['device']}**\n")
        print("| training | weights, MiB | trained numbers | peak, MiB | against full fine-tuning |")
        print("|---|---|---|---|---|")
        for case, label in CASES.items():
            if entry := own.get(case):
                share = f"{entry['peak'] / own['full']['peak']:.3f}" if "full" in own else ""
                sizes = " | ".join(f"{entry[field] / 2**20:.0f}" for field in ("weights", "peak"))
                weights, peak = sizes.split(" | ")
                print(f"| {label} | {weights} | {entry['trained']:,} | {peak} | {share} |")


def main() -> None:
    """Measure the cases that the output does not hold yet, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/training_memory.jsonl", help="JSON lines; cases are kept")
    parser.add_argument("--case", choices=tuple(CASES), help="measure one case in this process and print it as JSON")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the tables of the output")
    options = parser.parse_args()
    if options.case:
        measure(options)
        return
    results = Results(options.output)
    if options.table:
        tables(results.entries)
        return
    run(options, results)


if __name__ == "__main__":
    main()
