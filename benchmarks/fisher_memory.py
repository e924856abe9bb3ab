"""Peak memory of Fisher statistics, and Fisher weights of a quantised model against those of its original.

Run from the repository's root; the last table needs bitsandbytes:

    python benchmarks/fisher_memory.py

Protocol of the memory tables: a Llama built from a configuration, random weights, float32, CPU; every row is a process
of its own that goes over the same sequences, one at a time. Bytes are the peak of the process's resident memory during
the pass minus the resident memory before it (a first pass over a short sequence has come before both, so that
libraries are loaded); freed tensors go back to the system at once. Linux only.

- inference: forwards without gradients.
- activations: forward and backward with all weights frozen, the least that any gradient statistic needs.
- fisher: this package's moment ``fisher``, row and column sums by hooks on inputs and output gradients.
- gradients: ``loss.backward()`` with the target weights requiring a gradient; sums are taken of ``.grad``, which is
  dropped after each sequence.
- full Fisher: as before, with the squared gradient of every weight kept in float32.

Last table: cosine between the Fisher weights (the row sums, the column sums) that a bfloat16 and an NF4 copy of the
embedded model give on the same calibration text, the least over the layers of each kind.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import defaultdict
from typing import Any

import torch
from _common import EMBEDDED, in_own_process, reset_peak, resident
from torch import Tensor, nn

from lowrank_lit import LowRankModule, TextDataModule
from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.gradients import frozen, next_token_loss, start_graph
from lowrank_lit.surgery import dense_weight, find_targets

CASES = ("inference", "activations", "fisher", "gradients", "full Fisher")
FISHER = frozenset({"fisher"})


def build(options: argparse.Namespace) -> nn.Module:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=options.width,
        intermediate_size=options.inner,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def collect(model: nn.Module, layers: dict[str, nn.Module], batches: list[dict[str, Tensor]], case: str) -> None:
    """One pass over the batches in the way of ``case``."""
    if case == "fisher":
        calibrate(model, batches, layers, weight_of=dense_weight, moments=FISHER, importance=False)
        return
    model.requires_grad_(False)
    sums: dict[str, Tensor | tuple[Tensor, Tensor]] = {}
    for batch in batches:
        if case == "inference":
            with torch.no_grad():
                next_token_loss(model, batch)
        elif case == "activations":
            first = next(iter(layers.values()))
            with frozen(model):
                hook = first.register_forward_hook(lambda _module, _args, output: start_graph(output))
                next_token_loss(model, batch).backward()
                hook.remove()
        else:
            for layer in layers.values():
                layer.requires_grad_(True)
            next_token_loss(model, batch).backward()
            for name, layer in layers.items():
                squared = layer.weight.grad.square_()
                if case == "full Fisher":
                    sums[name] = sums[name] + squared if name in sums else squared
                else:
                    old = sums.get(name, (0.0, 0.0))
                    sums[name] = (old[0] + squared.sum(1), old[1] + squared.sum(0))
                layer.weight.grad = None


def measure(options: argparse.Namespace) -> None:
    """Print one case's figures as JSON."""
    torch.set_num_threads(options.threads)
    model = build(options)
    layers = {name: target.module for name, target in find_targets(model).items()}
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 4096, (options.sequences, 1, options.length[0]), generator=generator)
    collect(model, layers, as_batches([{"input_ids": ids[0, :, :16]}]), options.case)
    before = resident("now")
    reset_peak()
    collect(model, layers, as_batches([{"input_ids": row} for row in ids]), options.case)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    targets = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers.values())
    print(json.dumps({"weights": weights, "targets": targets, "peak": resident("largest") - before}))


def memory_table(options: argparse.Namespace, length: int) -> None:
    """One process per case."""
    figures: dict[str, dict[str, int]] = {}
    settings = {name: getattr(options, name) for name in ("width", "inner", "layers", "sequences", "threads")}
    for case in CASES:
        figures[case] = json.loads(in_own_process(__file__, case, {**settings, "length": length}))
    weights, targets = (figures["fisher"][name] / 2**20 for name in ("weights", "targets"))
    print(
        f"\n**Llama, {options.layers} blocks of width {options.width}, {options.sequences} sequences of "
        f"{length} tokens, float32: {weights:.0f} MiB of weights, {targets:.0f} MiB of them in targets**\n"
    )
    print(
        "| statistics | peak above the weights, MiB | with the weights, MiB | against `gradients` "
        "| against `full Fisher` |"
    )
    print("|---|---|---|---|---|")
    stored, squared = (weights + figures[case]["peak"] / 2**20 for case in ("gradients", "full Fisher"))
    for case, values in figures.items():
        peak = values["peak"] / 2**20
        shares = " | ".join(f"{100 * ((weights + peak) / reference - 1):+.0f} %" for reference in (stored, squared))
        print(f"| {case} | {peak:.0f} | {weights + peak:.0f} | {shares} |", flush=True)


def in_four_bits(model: nn.Module) -> nn.Module:
    """A copy with the target layers in NF4, computing in float32.

    On a CPU bitsandbytes dequantises wrongly, without an error, where the last dimension is no multiple of 64.
    """
    import bitsandbytes

    copied = copy.deepcopy(model)
    for name, target in find_targets(copied).items():
        weight, bias = target.module.weight.data, target.module.bias
        if weight.shape[1] % 64:
            raise ValueError(f"layer '{name}' has {weight.shape[1]} columns, no multiple of 64")
        layer: Any = bitsandbytes.nn.Linear4bit(
            *reversed(weight.shape), bias=bias is not None, quant_type="nf4", compute_dtype=torch.float32
        )
        layer.weight = bitsandbytes.nn.Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4")
        if bias is not None:
            layer.bias = bias
        copied.set_submodule(name, layer.to("cpu"))
    return copied


def four_bit_table(options: argparse.Namespace) -> None:
    """Cosines of the Fisher weights of two copies of the embedded model."""
    module = LowRankModule(str(EMBEDDED))
    module.configure_model()
    data = TextDataModule({"calibration": "embedded:calibration"}, str(EMBEDDED))
    batches = as_batches(data.calibration_batches())[: options.batches]
    model = module.model.float()
    names = list(find_targets(model))
    copies = (copy.deepcopy(model).bfloat16(), in_four_bits(model))
    exact, noisy = (
        calibrate(
            network,
            batches,
            {name: network.get_submodule(name) for name in names},
            weight_of=dense_weight,
            moments=FISHER,
            importance=False,
        )
        for network in copies
    )
    least: dict[str, list[list[float]]] = defaultdict(lambda: [[], []])
    for name in names:
        for index, field in enumerate(("fisher_rows", "fisher_columns")):
            pair = [getattr(found.statistics[name], field) for found in (exact, noisy)]
            least[name.rpartition(".")[2]][index].append(float(torch.cosine_similarity(*pair, dim=0)))
    print(f"\n**Embedded model, bfloat16 against NF4, {exact.tokens} tokens**\n")
    print("| layers | least cosine, row weights | least cosine, column weights |")
    print("|---|---|---|")
    for kind, (rows, columns) in least.items():
        print(f"| {len(rows)} x {kind} | {min(rows):.4f} | {min(columns):.4f} |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="measure one case in this process and print it as JSON")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--inner", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=3)
    parser.add_argument("--length", type=int, nargs="+", default=[128, 256], help="a table for each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, default=None, help="of calibration text in the last table")
    options = parser.parse_args()
    if options.case:
        measure(options)
        return
    for length in options.length:
        memory_table(options, length)
    four_bit_table(options)


if __name__ == "__main__":
    main()
