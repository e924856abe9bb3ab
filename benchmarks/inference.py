"""How fast factored models read, write and train, against dense ones and against what the machine could do.

``python benchmarks/inference.py`` measures and writes ``benchmarks/inference.json``; ``--table`` prints it for
RESULTS.md; ``--smoke`` runs everything once at small sizes. Layers are those of Llama blocks of one width with random
weights, as many as it takes for the weights to be larger than the caches. All forms of one keep ratio and the dense
layers take turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _roofline import DTYPES, gemm_rate, interleaved, machine, ratio, read_bandwidth
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_lit
from lowrank_lit.acceleration import accelerate
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.surgery import find_targets, replace_module, stored_bytes

OUTPUT = Path(__file__).with_name("inference.json")
FORMS = ("factored", "stacked", "pivot", "pivot stacked")
PROMPT = 128


def normed(x: Tensor) -> Tensor:
    """``x`` of unit size: through a row of random layers it would shrink until it is no normal number any more, and
    products of those take many times as long."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Linears(nn.Module):
    """The linear layers of a Llama block, and no more between them than joins them."""

    def __init__(self, width: int, **where: Any) -> None:
        super().__init__()
        inside = round(width * 2.6875 / 64) * 64  # 11008 of 4096
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(width, width, bias=False, **where))
        for name in ("gate", "up"):
            setattr(self, name, nn.Linear(width, inside, bias=False, **where))
        self.down = nn.Linear(inside, width, bias=False, **where)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        x = normed(x)
        y = normed(self.o(self.q(x).add_(self.k(x)).add_(self.v(x))))
        result: Tensor = self.down(self.gate(y).mul_(self.up(y)))
        return result


class Blocks(nn.Sequential):
    """Blocks one behind the other; ``x`` is the name that ``accelerate`` gives the input by."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return super().forward(x)


def rank_for(rows: int, columns: int, keep: float, pivot: bool, quantum: int) -> int:
    """The largest multiple of ``quantum`` at which a form holds no more than ``keep`` of a matrix."""
    total = rows + columns
    if not pivot:
        exact = keep * rows * columns / total
    else:
        exact = (total - (total**2 - 4 * keep * rows * columns) ** 0.5) / 2
    return max(quantum, int(exact + 1e-9) // quantum * quantum)


def reformed(model: nn.Module, form: str, keep: float, quantum: int) -> nn.Module:
    """A copy of a dense model with every linear layer in a form, with random factors of the size of its weights."""
    model = copy.deepcopy(model)
    for target in find_targets(model).values():
        pivot = form.startswith("pivot")
        kind = PivotLinear if pivot else FactoredLinear
        rank = rank_for(target.rows, target.columns, keep, pivot, quantum)
        weight = target.module.weight
        layer = kind(target.columns, target.rows, rank, bias=False, device=weight.device, dtype=weight.dtype)
        if isinstance(layer, PivotLinear) and not weight.is_meta:
            layer.positions.copy_(torch.randperm(target.rows))
        replace_module(model, target, layer)
    return model


def blocks(
    width: int, count: int, dtype: torch.dtype, form: str = "dense", keep: float = 1.0, quantum: int = 1
) -> Blocks:
    """Blocks in a form, filled with numbers of the size of weights: one piece of noise serves all, for it is fast."""
    with torch.device("meta"):
        model: nn.Module = Blocks(*(Linears(width, dtype=dtype) for _ in range(count)))
        if form != "dense":
            model = reformed(model, form, keep, quantum)
    model.to_empty(device="cpu")
    with torch.no_grad():
        noise = torch.randn(max(parameter.numel() for parameter in model.parameters())).to(dtype)
        for parameter in model.parameters():
            torch.mul(noise[: parameter.numel()].view_as(parameter), parameter.shape[-1] ** -0.5, out=parameter)
        for buffer in model.buffers():
            buffer.copy_(torch.randperm(len(buffer)))
    return model  # type: ignore[return-value]


def stacked(model: nn.Module, form: str, inputs: dict[str, Tensor]) -> nn.Module:
    """The same with its products joined, where the form says so."""
    if form.endswith("stacked"):
        assert accelerate(model, inputs=inputs).groups
    return model


def numbers(model: nn.Module) -> int:
    """Of the weights that a token is multiplied with: floating-point operations are twice as many."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)


class Machine:
    """Measured rates, per dtype, and the floors that follow from them."""

    def __init__(self, rounds: int, mebibytes: int, size: int) -> None:
        self.rounds, self.size = rounds, size
        self.read = read_bandwidth(mebibytes, rounds=rounds)
        self.rates: dict[str, float] = {}

    def floor(self, model: nn.Module, tokens: int, dtype: str) -> float:
        """Seconds below which no forward can be: operations at the rate of a large product, or bytes of the weights."""
        if dtype not in self.rates:
            self.rates[dtype] = gemm_rate(dtype, self.size, rounds=self.rounds)
        return max(2 * numbers(model) * tokens / self.rates[dtype], stored_bytes(model) / self.read)


def compare(
    models: dict[str, nn.Module], x: Tensor, limits: Machine, options: argparse.Namespace, **what: Any
) -> list[dict[str, Any]]:
    """Rows of one comparison; the first of the models is the dense one."""

    def route(model: nn.Module) -> Callable[[], object]:
        return lambda: model(x)

    with torch.no_grad():
        times = interleaved({name: route(model) for name, model in models.items()}, rounds=options.rounds)
    tokens = x.shape[0] * x.shape[1]
    dense, rows = next(iter(models)), []
    for name, model in models.items():
        rows.append(
            {
                **what,
                "tokens": tokens,
                "form": name,
                "numbers": numbers(model),
                "floor": limits.floor(model, tokens, what["dtype"]),
                "ideal": numbers(models[dense]) / numbers(model),
                **times[name].summary(),
                "speedup": ratio(times[dense], times[name]).summary(),
            }
        )
    return rows


def layers_rows(options: argparse.Namespace, limits: Machine) -> list[dict[str, Any]]:
    """Prefill and decode of linear layers alone."""
    rows = []
    for dtype in options.dtypes:
        for width in options.widths:
            one = blocks(width, 1, DTYPES[dtype])
            count = max(1, -(-options.mebibytes * 2**20 // stored_bytes(one)))
            few = max(1, min(count, options.prefill_numbers // numbers(one)))
            dense = blocks(width, count, DTYPES[dtype])
            probe = torch.randn(1, 1, width).to(DTYPES[dtype])
            for keep in options.keeps:
                models: dict[str, nn.Module] = {"dense": dense}
                for form in FORMS:
                    model = blocks(width, count, DTYPES[dtype], form, keep, options.quantum)
                    models[form] = stacked(model, form, {"x": probe})
                heads = {name: Blocks(*list(model)[:few]) for name, model in models.items()}  # type: ignore[call-overload]
                what = {"width": width, "dtype": dtype, "keep": keep}
                for batch in options.batches:
                    x = torch.randn(batch, 1, width).to(DTYPES[dtype])
                    # With more tokens it is arithmetic that takes the time, and fewer layers tell as much.
                    chosen, layers = (models, count) if batch < 16 else (heads, few)
                    rows += compare(chosen, x, limits, options, kind="decode", layers=layers, **what)
                x = torch.randn(1, PROMPT, width).to(DTYPES[dtype])
                rows += compare(heads, x, limits, options, kind="prefill", layers=few, **what)
                print(dtype, width, keep, flush=True)
    return rows


def llama(width: int, layers: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=width,
        intermediate_size=round(width * 2.6875 / 64) * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def model_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and decode of whole models, KV cache included."""
    rows = []
    ids = torch.randint(0, 2048, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    for width, layers in options.models:
        dense = llama(width, layers)
        for keep in options.keeps:
            models: dict[str, nn.Module] = {"dense": dense}
            for form in FORMS:
                models[form] = stacked(reformed(dense, form, keep, options.quantum), form, {"input_ids": ids[:, :2]})
            for kind in ("prefill", "decode"):

                def route(model: Any, kind: str = kind) -> Callable[[], object]:
                    if kind == "prefill":
                        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)
                    cache = model(input_ids=ids[:, :16], use_cache=True).past_key_values

                    def step() -> None:
                        for number in range(4):
                            model(input_ids=ids[:, number : number + 1], past_key_values=cache, use_cache=True)
                        cache.crop(-4)

                    return step

                with torch.no_grad():
                    routes = {name: route(model) for name, model in models.items()}
                    times = interleaved(routes, rounds=options.rounds)
                for name, timing in times.items():
                    rows.append(
                        {
                            "kind": f"model {kind}",
                            "width": width,
                            "layers": layers,
                            "dtype": "float32",
                            "keep": keep,
                            "form": name,
                            "tokens": PROMPT if kind == "prefill" else 4,
                            "ideal": numbers(dense) / numbers(models[name]),
                            **timing.summary(),
                            "speedup": ratio(times["dense"], timing).summary(),
                        }
                    )
        print("model", width, flush=True)
    return rows


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of activations that a forward keeps for its backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sum(kept.values())


class Trained(Linears):
    """As :class:`Linears`, without writing to what the backward needs."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        x = normed(x)
        y = normed(self.o(self.q(x) + self.k(x) + self.v(x)))
        result: Tensor = self.down(self.gate(y) * self.up(y))
        return result


def training_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A forward and a backward of linear layers, with gradients of all weights, and what is kept between the two."""
    rows = []
    width = options.training_width
    dense = Blocks(Trained(width), Trained(width))
    x = torch.randn(1, options.training_tokens, width)
    for keep in options.keeps:
        models: dict[str, nn.Module] = {"dense": dense}
        for form in (*FORMS, "factored recompute", "pivot recompute"):
            models[form] = stacked(reformed(dense, form, keep, options.quantum), form, {"x": x[:, :1]})
            if form.endswith("recompute"):
                accelerate(models[form], stack=False, recompute=True)

        def route(model: nn.Module) -> Callable[[], object]:
            def step() -> None:
                model.zero_grad()
                model(x).square().mean().backward()

            return step

        times = interleaved({name: route(model) for name, model in models.items()}, rounds=options.rounds)
        for name, timing in times.items():
            rows.append(
                {
                    "kind": "training",
                    "width": width,
                    "layers": 2,
                    "dtype": "float32",
                    "keep": keep,
                    "form": name,
                    "tokens": x.shape[1],
                    "ideal": numbers(dense) / numbers(models[name]),
                    "activations": kept_bytes(models[name], x),
                    **timing.summary(),
                    "speedup": ratio(times["dense"], timing).summary(),
                }
            )
    return rows


def memory_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory of loading a saved model, joining its products and generating, each in a process of its own."""
    rows = []
    width, layers = options.memory_model
    with tempfile.TemporaryDirectory() as folder:
        dense = llama(width, layers)
        dense.save_pretrained(f"{folder}/dense")
        batch = {"input_ids": torch.arange(64)[None]}
        settings: dict[str, Any] = {"metric": "identity", "allocator": "uniform", "quantum": options.quantum}
        plan = lowrank_lit.compress(dense, [batch], keep_ratio=0.6, **settings).plan
        lowrank_lit.export(dense, plan, f"{folder}/factored")
        del dense
        for form in ("stacked",) if options.smoke else ("dense", "factored", "stacked"):
            path = f"{folder}/{'dense' if form == 'dense' else 'factored'}"
            command = [sys.executable, __file__, "--memory-case", form, path, "--threads", str(options.threads)]
            ran = subprocess.run(command, capture_output=True, text=True, check=True)
            entry = json.loads(ran.stdout.splitlines()[-1])
            rows.append({"kind": "memory", "width": width, "layers": layers, "dtype": "float32", **entry})
    return rows


def memory_case(form: str, path: str) -> dict[str, Any]:
    """In a process of its own: bytes above what was in use before the model."""
    from lowrank_lit.memory import Watch, stage
    from lowrank_lit.paging import give_back

    ids = torch.arange(16)[None]
    with torch.no_grad():  # imports and first allocations are not the model's
        llama(64, 1)(input_ids=ids)
    give_back()
    watch = Watch(torch.device("cpu"))
    watch.start()
    with stage("all"):
        model = lowrank_lit.load(path).eval()
        if form == "stacked":
            accelerate(model)
        with torch.no_grad():
            model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    watch.stop()
    return {"form": form, "stored": stored_bytes(model), "peak": watch.used[("all", "host")]}


def table(found: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    limits = found["machine"]
    rates = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name}" for name, value in found["rates"].items())
    lines = [
        f"{limits['processor']}, {found['threads']} thread(s), {found['clock']}, torch {limits['torch']}, "
        f"load {limits['load'][0]}; products of {found['size']}: {rates}; reading {found['read'] / 1e9:.1f} GB/s. "
        "No GPU measured.",
    ]
    for kind, title in (
        ("prefill", f"Linear layers, {PROMPT} tokens at once"),
        ("decode", "Linear layers, one token of each sequence"),
        ("model prefill", f"Whole model, {PROMPT} tokens at once"),
        ("model decode", "Whole model, one token after the other, with a KV cache"),
        ("training", "Forward and backward of linear layers"),
    ):
        rows = [row for row in found["rows"] if row["kind"] == kind]
        if rows:
            lines += ["", f"{title}; times as fast as dense (least to largest):", "", *_speeds(rows)]
    rows = [row for row in found["rows"] if row["kind"] == "memory"]
    if rows:
        lines += [
            "",
            "Loading and generating, MiB:",
            "",
            "| form | weights | peak | peak / weights |",
            "|---|---|---|---|",
        ]
        for row in rows:
            sizes = f"{row['stored'] / 2**20:.0f} | {row['peak'] / 2**20:.0f} | {row['peak'] / row['stored']:.2f}"
            lines.append(f"| {row['form']} | {sizes} |")
    return "\n".join(lines)


def _speeds(rows: list[dict[str, Any]]) -> list[str]:
    forms = list(dict.fromkeys(row["form"] for row in rows if row["form"] != "dense"))
    lines = [
        "| dtype | width | keep | tokens | dense, ms | dense / floor | numbers, dense / factored | "
        f"{' | '.join(forms)} |",
        "|---" * (7 + len(forms)) + "|",
    ]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["width"], row["keep"], row["tokens"]), {})[row["form"]] = row
    for (dtype, width, keep, tokens), entries in groups.items():
        dense = entries["dense"]
        floor = f"{dense['median'] / dense['floor']:.2f}" if "floor" in dense else "-"
        cells = []
        for form in forms:
            speed = entries[form]["speedup"]
            cell = f"{speed['median']:.2f} ({speed['least']:.2f}-{speed['largest']:.2f})"
            if "activations" in dense:
                cell += f", {entries[form]['activations'] / dense['activations']:.2f} x bytes kept"
            cells.append(cell)
        ideal = f"{entries['factored']['ideal']:.2f}"
        head = f"{dtype} | {width} | {keep} | {tokens} | {dense['median'] * 1e3:.2f} | {floor} | {ideal}"
        lines.append(f"| {head} | {' | '.join(cells)} |")
    return lines


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="print the tables of the output")
    parser.add_argument("--smoke", action="store_true", help="everything once, at small sizes; writes nothing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="count the processor time of the thread, for a machine that others use as well; with one thread",
    )
    parser.add_argument("--quantum", type=int, default=8, help="ranks are multiples of it")
    parser.add_argument("--mebibytes", type=int, default=512, help="of the dense weights that decoding reads")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--only", nargs="+", default=["layers", "models", "training", "memory"])
    parser.add_argument("--memory-case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.prefill_numbers, options.models, options.memory_model = 40_000_000, [(512, 8), (1024, 8)], (1024, 8)
    options.training_width, options.training_tokens, options.size = 1024, 256, 1024
    if options.smoke:
        options.rounds, options.mebibytes, options.widths, options.keeps = 1, 1, [64], [0.6]
        options.batches, options.prefill_numbers, options.models = [1, 8], 10_000, [(64, 1)]
        options.memory_model, options.training_width, options.training_tokens, options.size = (128, 1), 64, 16, 128
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.processor_time:
        time.perf_counter = time.thread_time
    if options.memory_case:
        print(json.dumps(memory_case(*options.memory_case)))
        return
    if options.table and not options.smoke:
        print(table(json.loads(options.output.read_text(encoding="utf-8"))))
        return
    limits = Machine(options.rounds, options.mebibytes, options.size)
    rows = []
    if "layers" in options.only:
        rows += layers_rows(options, limits)
    if "models" in options.only:
        rows += model_rows(options)
    if "training" in options.only:
        rows += training_rows(options)
    if "memory" in options.only:
        rows += memory_rows(options)
    found = {
        "machine": machine(),
        "threads": options.threads,
        "clock": "processor time" if options.processor_time else "wall clock",
        "size": options.size,
        "read": limits.read,
        "rates": limits.rates,
        "rows": rows,
    }
    if not options.smoke:
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
