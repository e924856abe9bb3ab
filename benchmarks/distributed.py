"""Seconds of a compression by one and by several processes on one machine, and whether they make the same.

Run from the repository's root:

    python benchmarks/distributed.py [--table]

Protocol: a random Llama (``--layers`` blocks of width ``--width``, 4096 words), ``--sequences`` sequences of
``--length`` random tokens in batches of ``--batch_size``, float32 on the CPU, ``--threads`` threads in every process,
gloo over 127.0.0.1. The numbers of processes take turns, ``--repeats`` times, and the least time of the repeats is
reported; every stage ends in all processes together, so that it lasts as long as in the slowest. ``calibrate`` and
``decompose`` are the stages that the processes share; ``total`` is the whole compression with everything that each
process does by itself. ``distance`` is the greatest relative distance (Frobenius) of a compressed weight from that of
one process. Give as many cores as processes times threads, or the processes wait for each other.

``apart`` is what the machine allows: as many processes side by side that know nothing of one another, each with its
share of the sequences; their memory and caches are shared, so that even they are not as many times as fast.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_lit import compress, distributed
from lowrank_lit.layers import FactoredLayer

WORDS = 4096
STAGES = ("calibrate", "decompose", "total")


def build(options: argparse.Namespace) -> nn.Module:
    """A Llama with random weights, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=options.width,
        intermediate_size=options.width * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        max_position_embeddings=options.length,
    )
    return LlamaForCausalLM(config).eval()


def measure(options: argparse.Namespace) -> None:
    """One process of a run: writes its seconds, the plan and the compressed weights."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if size > 1:
        dist.init_process_group("gloo")
    model = build(options)
    ids = torch.randint(3, WORDS, (options.sequences, options.length), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part} for part in ids.split(options.batch_size)]
    with torch.no_grad():
        model(ids[:1])  # libraries are loaded
    with distributed.cooperating():
        distributed.gather("the start", None)
        started = time.perf_counter()
        result = compress(model, batches, keep_ratio=options.keep, preset=options.preset)
        seconds = {**result.record["seconds"], "total": time.perf_counter() - started}
    if rank == 0:
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FactoredLayer)}
        torch.save({name: layer.weight.detach() for name, layer in layers.items()}, options.out / f"{size}.pt")
        ranks = [[matrix.name, matrix.form, matrix.rank] for matrix in result.plan.matrices]
        found = {"seconds": {key: seconds[key] for key in STAGES}, "ranks": ranks}
        (options.out / f"{size}.json").write_text(json.dumps(found))
    if size > 1:
        dist.destroy_process_group()


def run(size: int, options: argparse.Namespace, out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One compression by ``size`` processes."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    names = ("preset", "width", "layers", "sequences", "length", "batch_size", "keep", "threads")
    own = [part for name in names for part in (f"--{name}", str(getattr(options, name)))]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--out", str(out), *own], env={**os.environ, **shared, "RANK": str(rank)}
        )
        for rank in range(size)
    ]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit(f"a process of {size} failed; see above")
    return json.loads((out / f"{size}.json").read_text()), torch.load(out / f"{size}.pt")


def apart(size: int, options: argparse.Namespace, out: Path) -> float:
    """Seconds of calibration in the slowest of ``size`` processes that each read a part of the text by themselves."""
    own = argparse.Namespace(**{**vars(options), "sequences": options.sequences // size})
    with ThreadPoolExecutor(size) as pool:
        folders = [out / f"apart-{number}" for number in range(size)]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        found = list(pool.map(lambda folder: run(1, own, folder)[0]["seconds"]["calibrate"], folders))
    return max(found)


def main() -> None:
    """Run all numbers of processes in turns, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of one process of a run
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="the first is the base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    options = parser.parse_args()
    if options.out:
        measure(options)
        return
    seconds: dict[int, dict[str, float]] = {}
    alone: dict[int, float] = {}
    results: dict[int, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for size in options.processes:
                found, weights = run(size, options, Path(folder))
                results[size] = found, weights
                best = seconds.setdefault(size, found["seconds"])
                seconds[size] = {key: min(best[key], found["seconds"][key]) for key in STAGES}
                if size > 1:
                    alone[size] = min(alone.get(size, math.inf), apart(size, options, Path(folder)))
    base = options.processes[0]
    if options.table:
        print("| processes | calibrate, s | decompose, s | total, s | calibrate, times | apart, times ", end="")
        print("| decompose, times | same plan | distance |\n|---|---|---|---|---|---|---|---|---|")
    for size in options.processes:
        (first, dense), (own, weights) = results[base], results[size]
        far = [float(torch.linalg.norm(weights[name] - dense[name]) / torch.linalg.norm(dense[name])) for name in dense]
        entry = {
            "processes": size,
            "seconds": seconds[size],
            "faster": {key: seconds[base][key] / seconds[size][key] for key in STAGES},
            "same_plan": first["ranks"] == own["ranks"],
            "distance": max(far, default=0.0),
            "apart": seconds[base]["calibrate"] / alone.get(size, seconds[base]["calibrate"]),
        }
        times = " | ".join(f"{seconds[size][key]:.1f}" for key in STAGES)
        faster, same = entry["faster"], "yes" if entry["same_plan"] else "no"
        line = f"| {size} | {times} | {faster['calibrate']:.2f} | {entry['apart']:.2f} | {faster['decompose']:.2f} "
        line += f"| {same} | {entry['distance']:.0e} |"
        print(line if options.table else json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
