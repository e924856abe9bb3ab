"""How long a compression takes: beside the forward pass and the products that it cannot do without, beside the
textbook's route to the same factors, and against tokens, width and depth.

    python benchmarks/compression.py --out compression.json --table
    python benchmarks/compression.py --smoke

Random Llamas and moments. Writes JSON with the machine, and per measurement the median, the fastest, the slowest and
the number of rounds. Compared routes take turns in one process. ``--table`` prints the Markdown of RESULTS.md from the
file that it has written, or from one that is there (``--table --from compression.json``).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _roofline import DTYPES, Timing, bandwidth, gemm_rate, interleaved, machine, ratio
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_lit.collection
import lowrank_lit.linalg
import lowrank_lit.residual
import lowrank_lit.spectrum
import lowrank_lit.study
from lowrank_lit import compress
from lowrank_lit.linalg import add_gram, damp
from lowrank_lit.metrics import DAMPING
from lowrank_lit.spectrum import compute_spectrum
from lowrank_lit.statistics import LayerStatistics, MomentSum
from lowrank_lit.study import Study

KEEP = 0.6
EASY = {"preset": "unirank", "keep_ratio": KEEP}
"""The preset that needs no gradients: metric ``input``, ranks by energy and module importance."""
PARTS = ("factoring", "whole", "bfloat16", "asvd", "growth")
_PAIRS = (("float32", "ours"), ("float64", "ours"), ("float32", "ours float32"))
STAGES = ("forward", "gram", "importance", "eigen", "spectrum", "allocation", "surgery", "other")


@dataclass(frozen=True)
class Size:
    """A random Llama and its calibration text."""

    width: int = 1024
    inside: int = 2752
    blocks: int = 4
    sequences: int = 64
    length: int = 512
    batch: int = 8
    heads: int = 16

    @property
    def tokens(self) -> int:
        """Of the calibration text."""
        return self.sequences * self.length

    def model(self, dtype: torch.dtype) -> LlamaForCausalLM:
        """With a small vocabulary: the embedding and the head are no part of what is measured."""
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inside,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            vocab_size=1024,
            max_position_embeddings=self.length,
        )
        return LlamaForCausalLM(config).to(dtype).eval()

    def batches(self) -> list[dict[str, Tensor]]:
        """Random words."""
        ids = torch.randint(0, 1024, (self.sequences, self.length), generator=torch.Generator().manual_seed(1))
        return [{"input_ids": part} for part in ids.split(self.batch)]

    def block_flops(self) -> float:
        """Of a block's forward per token: its matrices, and attention over all places, masked ones too."""
        return 2.0 * (4 * self.width**2 + 3 * self.width * self.inside) + 4.0 * self.length * self.width


# What a compression cannot do without


def plain_forward(model: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> None:
    """Every block on every token; the head, which a calibration does not run, left out."""
    with torch.no_grad():
        for batch in batches:
            model.model(**batch, use_cache=False)


def gram_floor(size: Size) -> Callable[[], None]:
    """The Gram products of one block: inputs of attention, of its output projection and of the two that widen, and
    outputs of the one that narrows, all ``width`` wide; float32, half of each product, the sums in float64."""
    tokens = torch.randn(size.batch * size.length, size.width)
    total = torch.zeros(size.width, size.width, dtype=torch.float64)

    def run() -> None:
        for _ in range(4 * size.sequences // size.batch):
            add_gram(total, tokens)

    return run


def eigen_floor(size: Size) -> Callable[[], None]:
    """The eigendecompositions of one block, one per matrix, all ``width`` wide, in float64."""
    moment = random_moment(size.width)

    def run() -> None:
        for _ in range(7):
            torch.linalg.eigh(moment)

    return run


def random_moment(size: int, seed: int = 0) -> Tensor:
    """A second moment of correlated channels whose variances fall by four orders of magnitude, float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator) / math.sqrt(size)
    total = MomentSum(size)
    total.add(torch.randn(2 * size, size, generator=generator) * torch.logspace(0, -2, size) @ mixing)
    return damp(total.mean(), DAMPING)  # the textbook's Cholesky decomposition fails without


class Clock:
    """Time by stage; a stage inside another counts for itself alone."""

    now: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = Clock.now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = Clock.now() - started
                self.seconds[stage] = self.seconds.get(stage, 0.0) + spent - self._inside.pop()
                self._inside[-1] += spent

        return timed


@contextmanager
def staged() -> Iterator[Clock]:
    """Times of what a compression does in this context, by stage."""
    clock = Clock()
    parts = (
        (MomentSum, "add", "gram"),
        (lowrank_lit.residual, "cosine_distance", "importance"),
        (torch.linalg, "eigh", "eigen"),
        (lowrank_lit.collection, "compute_spectrum", "spectrum"),
        (lowrank_lit.study, "allocate", "allocation"),
        (Study, "apply", "surgery"),
    )
    with ExitStack() as stack:
        for owner, name, stage in parts:
            stack.enter_context(patch.object(owner, name, clock.around(stage, getattr(owner, name))))
        yield clock


def stages_of(model: LlamaForCausalLM, batches: list[dict[str, Tensor]], forward: float) -> dict[str, float]:
    """Seconds of one compression by stage; ``forward`` is what a plain forward pass takes, ``other`` the rest: the
    capture of the blocks' arguments, checks, hashes, hooks."""
    with staged() as clock:
        started = Clock.now()
        compress(model, batches, **EASY)
        total = Clock.now() - started
    found = {stage: clock.seconds.get(stage, 0.0) for stage in STAGES}
    found["forward"] = forward
    found["other"] = total - sum(found.values())
    return found | {"total": total}


def whole(size: Size, dtype: str, rounds: int) -> dict[str, Any]:
    """A compression against one forward pass and the floor."""
    model, batches = size.model(DTYPES[dtype]), size.batches()

    def compressed() -> Any:
        return compress(copy.deepcopy(model), batches, **EASY)

    times = interleaved(
        {
            "forward": lambda: plain_forward(model, batches),
            "compress": compressed,
            "gram": gram_floor(size),
            "eigen": eigen_floor(size),
        },
        rounds=rounds,
        warmup=0,
        clock=Clock.now,
    )
    floors = [
        forward + size.blocks * (gram + eigen)
        for forward, gram, eigen in zip(
            times["forward"].seconds, times["gram"].seconds, times["eigen"].seconds, strict=True
        )
    ]
    rate = gemm_rate(dtype, (size.batch * size.length, size.width, size.width), clock=Clock.now)
    return {
        "size": vars(size),
        "dtype": dtype,
        "tokens": size.tokens,
        "times": {name: value.summary() for name, value in times.items()},
        "floor": Timing(tuple(floors)).summary(),
        "ratio_to_floor": ratio(times["compress"], Timing(tuple(floors))).summary(),
        "ratio_to_forward": ratio(times["compress"], times["forward"]).summary(),
        "roofline_forward_seconds": size.tokens * size.blocks * size.block_flops() / rate,
        "stages": stages_of(copy.deepcopy(model), batches, times["forward"].median),
    }


# Factors from a weight and a moment


def textbook(weight: Tensor, root: Tensor, inverse: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors by SVD-LLM's route: the SVD of ``W S`` in the dtype of the weight, the root undone by its inverse."""
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    half = s[:rank].sqrt()
    return u[:, :rank] * half, (half[:, None] * vh[:rank]) @ inverse


def roots(moment: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The Cholesky root of a moment, taken in float64, and its inverse, both in ``dtype``."""
    root = torch.linalg.cholesky(moment).to(dtype)
    eye = torch.eye(len(root), dtype=dtype)
    return root, torch.linalg.solve_triangular(root, eye, upper=False)


def ours(weight: Tensor, statistics: LayerStatistics, rank: int) -> tuple[Tensor, Tensor]:
    """Factors as a compression makes them: a spectrum with the vectors below the break-even, stored in float32."""
    rows, columns = weight.shape
    components = math.ceil(rows * columns / (rows + columns))
    spectrum = compute_spectrum(weight, statistics, metric="input", name="w", components=components)
    return spectrum.to("cpu", torch.float32, components=components).factors(weight, rank)


def ours_in_float32(weight: Tensor, statistics: LayerStatistics, rank: int) -> tuple[Tensor, Tensor]:
    """The same with nothing in float64, as on a device that has none."""
    with ExitStack() as stack:
        for module in (lowrank_lit.linalg, lowrank_lit.spectrum):
            stack.enter_context(patch.object(module, "to_double", Tensor.float))
        return ours(weight, statistics, rank)


def matrix(rows: int, columns: int, seed: int) -> tuple[Tensor, LayerStatistics]:
    """A random weight, with the statistics that a calibration keeps of it on the smaller side."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / math.sqrt(columns)
    return weight, statistics_of(weight, random_moment(columns, seed))


def statistics_of(weight: Tensor, moment: Tensor) -> LayerStatistics:
    """What a calibration keeps: the inputs' moment, or where that is the larger one the outputs'."""
    energy = float(moment.trace())
    if weight.shape[0] >= weight.shape[1]:
        return LayerStatistics(1, energy, input_moment=moment)
    double = weight.double()
    return LayerStatistics(1, energy, output_moment=double @ moment @ double.mT)


def rank_of(rows: int, columns: int) -> int:
    """At the keep ratio."""
    return int(KEEP * rows * columns / (rows + columns))


def factoring(rows: int, columns: int, rounds: int, *, double: bool = True) -> dict[str, Any]:
    """One matrix by the routes, each from weight and moment to factors."""
    weight, known = matrix(rows, columns, 0)
    moment, rank = random_moment(columns), rank_of(rows, columns)

    def by_book(dtype: torch.dtype) -> Callable[[], object]:
        return lambda: textbook(weight.to(dtype), *roots(moment, dtype), rank)

    routes: dict[str, Callable[[], object]] = {
        "ours": lambda: ours(weight, known, rank),
        "ours float32": lambda: ours_in_float32(weight, known, rank),
        "eigen": lambda: torch.linalg.eigh(small),
        "textbook float32": by_book(torch.float32),
    }
    small = random_moment(min(rows, columns))
    if double:
        routes["textbook float64"] = by_book(torch.float64)
    times = interleaved(routes, rounds=rounds, warmup=0 if rows * columns > 5e6 else 1, clock=Clock.now)
    return {"shape": [rows, columns], "rank": rank, **_against(times)}


def block_factoring(size: Size, rounds: int) -> dict[str, Any]:
    """All matrices of a block by the routes; moments shared by those with one input, roots taken once per moment."""
    width, inside = size.width, size.inside
    shapes = {"attention": [(width, width)] * 3, "output": [(width, width)], "up": [(inside, width)] * 2}
    shapes["down"] = [(width, inside)]
    moments = {name: random_moment(found[0][1], number) for number, (name, found) in enumerate(shapes.items())}
    weights = {name: [torch.randn(*shape) / math.sqrt(shape[1]) for shape in found] for name, found in shapes.items()}
    known = {name: [statistics_of(weight, moments[name]) for weight in found] for name, found in weights.items()}

    def by_book(dtype: torch.dtype) -> None:
        for name, moment in moments.items():
            pair = roots(moment, dtype)
            for weight in weights[name]:
                textbook(weight.to(dtype), *pair, rank_of(*weight.shape))

    def by_us(route: Callable[..., object]) -> None:
        for name, found in known.items():
            for weight, entry in zip(weights[name], found, strict=True):
                route(weight, entry, rank_of(*weight.shape))

    times = interleaved(
        {
            "ours": lambda: by_us(ours),
            "ours float32": lambda: by_us(ours_in_float32),
            "eigen": eigen_floor(size),
            "textbook float32": lambda: by_book(torch.float32),
            "textbook float64": lambda: by_book(torch.float64),
        },
        rounds=rounds,
        warmup=0,
        clock=Clock.now,
    )
    return {"shape": "block", "size": vars(size), **_against(times)}


def _against(times: dict[str, Timing]) -> dict[str, Any]:
    return {
        "times": {name: value.summary() for name, value in times.items()},
        "ratios": {
            f"{name} / {own}": ratio(times[name], times[own]).summary()
            for own in ("ours", "ours float32")
            for name in times
            if name.startswith("textbook")
        },
    }


def asvd(size: Size) -> dict[str, Any]:
    """ASVD's route, a perplexity of every matrix at every ratio, against the preset, on the same model and text."""
    model, batches = size.model(torch.float32), size.batches()
    found: dict[str, Any] = {"size": vars(size)}
    routes = {"preset": EASY, "asvd": {"keep_ratio": KEEP, "preset": "unirank", "metric": "activation_scale"}}
    routes["asvd"]["allocator"] = "sensitivity"
    for name, settings in routes.items():
        started = Clock.now()
        result = compress(copy.deepcopy(model), batches, **settings)
        found[name] = {"seconds": Clock.now() - started, "forward_passes": result.record["passes"]["forward"]}
    return found


# Growth


def growth(sizes: dict[str, list[Size]], rounds: int) -> dict[str, Any]:
    """Seconds of a compression and of its stages against one size at a time, and the exponents of power laws."""
    found: dict[str, Any] = {}
    for along, points in sizes.items():
        axis = {"tokens": "tokens", "width": "width", "depth": "blocks"}[along]
        rows = []
        for size in points:
            model, batches = size.model(torch.float32), size.batches()
            runs = []
            for _ in range(rounds):
                started = Clock.now()
                plain_forward(model, batches)
                runs.append(stages_of(copy.deepcopy(model), batches, Clock.now() - started))
            medians = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
            rows.append({along: getattr(size, axis)} | medians)
        chosen = ("total", "forward", "gram", "eigen", "spectrum", "surgery")
        found[along] = {
            "rows": rows,
            "exponents": {name: exponent([row[along] for row in rows], [row[name] for row in rows]) for name in chosen},
        }
    return found


def exponent(sizes: list[float], seconds: list[float]) -> float | None:
    """Slope of the least-squares line through the logarithms; ``None`` where a time is not above zero."""
    if min(seconds) <= 0:
        return None
    x, y = [math.log(value) for value in sizes], [math.log(value) for value in seconds]
    return statistics.linear_regression(x, y).slope


# The command


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    about, after, rates = result["machine"], result["machine_after"], result["rates"]
    flops = ", ".join(f"{name} {value / 1e9:.0f}" for name, value in rates["gemm_flops"].items())
    lines = [
        f"{about['processor']}, {about['threads']} threads, {result['clock']}, load {about['load'][0]} before and "
        f"{after['load'][0]} after, torch {about['torch']}. Products of 1024: {flops} GFLOP/s; copies "
        f"{rates['copy_bytes'] / 1e9:.0f} GB/s.",
    ]
    rows_of = {"whole": _whole, "bfloat16": _whole, "factoring": _factoring, "asvd": _asvd, "growth": _growth}
    for part, rows in rows_of.items():
        if part in result:
            lines += ["", *rows(result[part])]
    return "\n".join(lines)


def _whole(entries: list[dict[str, Any]]) -> Iterator[str]:
    yield "| model, tokens | forward, s | its roofline, s | compress, s | compress / forward | compress / floor |"
    yield "|---|---|---|---|---|---|"
    for entry in entries:
        times, size = entry["times"], entry["size"]
        cells = [
            f"{size['blocks']} x {size['width']}, {entry['dtype']}, {entry['tokens']}",
            _median(times["forward"]),
            f"{entry['roofline_forward_seconds']:.1f}",
            _median(times["compress"]),
            _spread(entry["ratio_to_forward"]),
            _spread(entry["ratio_to_floor"]),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"| seconds | {' | '.join(STAGES)} |"
    yield "|---" * (len(STAGES) + 1) + "|"
    for entry in entries:
        yield f"| {entry['dtype']} | " + " | ".join(f"{entry['stages'][stage]:.2f}" for stage in STAGES) + " |"


def _factoring(entries: list[dict[str, Any]]) -> Iterator[str]:
    names = ("ours", "ours float32", "eigen", "textbook float32", "textbook float64")
    pairs = [f"textbook {kind} / {own}" for kind, own in _PAIRS]
    yield f"| seconds | {' | '.join(names)} | {' | '.join(pairs)} |"
    yield "|---" * (len(names) + len(pairs) + 1) + "|"
    for entry in entries:
        times, ratios = entry["times"], entry["ratios"]
        shape = entry["shape"] if isinstance(entry["shape"], str) else " x ".join(map(str, entry["shape"]))
        cells = [shape, *(_median(times[name]) if name in times else "" for name in names)]
        cells += [_spread(ratios[pair]) if pair in ratios else "" for pair in pairs]
        yield f"| {' | '.join(cells)} |"


def _asvd(entry: dict[str, Any]) -> Iterator[str]:
    book, preset, size = (entry[name] for name in ("asvd", "preset", "size"))
    yield (
        f"ASVD's route on {size['blocks']} blocks of width {size['width']}, {size['sequences']} x {size['length']} "
        f"tokens: {book['seconds']:.1f} s and {book['forward_passes']:.0f} forward passes; the preset's "
        f"{preset['seconds']:.1f} s and {preset['forward_passes']:.0f}: {book['seconds'] / preset['seconds']:.0f} x."
    )


def _growth(found: dict[str, Any]) -> Iterator[str]:
    names = list(next(iter(found.values()))["exponents"])
    yield f"| exponent along | points | {' | '.join(names)} |"
    yield "|---" * (len(names) + 2) + "|"
    for along, entry in found.items():
        points = ", ".join(str(row[along]) for row in entry["rows"])
        powers = ("" if value is None else f"{value:.2f}" for value in entry["exponents"].values())
        yield f"| {along} | {points} | {' | '.join(powers)} |"


def _median(times: dict[str, float]) -> str:
    return f"{times['median']:.3g}"


def _spread(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['least']:.2f} to {values['largest']:.2f})"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The parts that were asked for."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    smoke, rounds = options.smoke, 1 if options.smoke else options.rounds
    tiny = Size(64, 160, 2, 8, 64, 4, 4)
    size = tiny if smoke else Size(sequences=options.sequences)
    small = tiny if smoke else Size(512, 1376, 2, 8, 512, 4, 8)
    kinds = ("float64", "float32", "bfloat16")
    result: dict[str, Any] = {
        "machine": machine(),
        "clock": "wall clock" if Clock.now is time.perf_counter else "processor time",
        "smoke": smoke,
        "rates": {
            "gemm_flops": {name: gemm_rate(name, 128 if smoke else 1024, clock=Clock.now) for name in kinds},
            "copy_bytes": bandwidth(16 if smoke else 256, clock=Clock.now),
        },
    }
    if "factoring" in options.parts:
        shapes = [(64, 64), (160, 64), (64, 160)] if smoke else [(1024, 1024), (2752, 1024), (1024, 2752)]
        result["factoring"] = [factoring(*shape, rounds) for shape in shapes]
        if not smoke:
            result["factoring"].append(factoring(2048, 5504, 1, double=False))
        result["factoring"].append(block_factoring(size, rounds))
    if "whole" in options.parts:
        result["whole"] = [whole(size, "float32", rounds)]
    if "bfloat16" in options.parts:
        half = Size(**{**vars(size), "sequences": size.sequences // 4})  # slow where bfloat16 is emulated
        result["bfloat16"] = [whole(half, "bfloat16", 1)]
    if "asvd" in options.parts:
        result["asvd"] = asvd(tiny if smoke else Size(256, 688, 2, 16, 256, 4, 4))
    if "growth" in options.parts:
        wide = [64, 128] if smoke else [256, 512, 1024]
        counts, depths = ((4, 8), (2, 3)) if smoke else ((4, 8, 16, 32), (2, 4, 8))
        result["growth"] = growth(
            {
                "tokens": [Size(**{**vars(small), "sequences": count}) for count in counts],
                "width": [Size(**{**vars(small), "width": w, "inside": w * 43 // 16, "heads": w // 16}) for w in wide],
                "depth": [Size(**{**vars(small), "blocks": count}) for count in depths],
            },
            1,
        )
    result["machine_after"] = machine()
    return result


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine, with --threads 1")
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, of the calibration of a whole model")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--out", default="runs/compression.json", help="file to write")
    parser.add_argument("--table", action="store_true", help="print Markdown")
    parser.add_argument(
        "--from", dest="source", default="", help="with --table: a file that is there, nothing measured"
    )
    options = parser.parse_args()
    if options.source:
        result = json.loads(Path(options.source).read_text(encoding="utf-8"))
    else:
        if options.processor_time:
            Clock.now = staticmethod(time.process_time)
        result = measure(options)
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result) if options.table else json.dumps(result))


if __name__ == "__main__":
    main()
