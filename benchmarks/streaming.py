"""Peak memory of a compression against the depth of the model: with a workspace, in memory, and of loading alone.

Run from the repository's root:

    python benchmarks/streaming.py             # measure what is missing, a few minutes on two cores
    python benchmarks/streaming.py --preset best --width 384 --threads 1     # the same of the default preset
    python benchmarks/streaming.py --table     # Markdown tables of it
    python benchmarks/streaming.py --plot benchmarks/streaming.png
    python benchmarks/streaming.py --billion   # 1.26 billion parameters: compress and export, half an hour

Protocol: Llamas of random weights in bfloat16, written to --folder in shards, of --width (MLP 8/3 of it, vocabulary
8192, head and embedding apart) and 4 to 32 blocks. Each case is a process of its own that loads the folder with
``from_pretrained(dtype="auto")`` and then

- `load`: reads every weight once, by a forward of one sequence;
- `in memory`: compresses to keep 0.6 (preset `unirank` with --metric; another --preset as it is), 16 calibration
  sequences of 256 random tokens;
- `workspace`: the same with ``compress(..., workspace=...)``, then exports.

Peak is the largest resident size of the process (VmHWM), mapped files included, above what it was once the libraries
were loaded and the model was mapped; with --preset before and after the export. ``--billion``: 22 blocks of width 2048
(MLP 5632, vocabulary 32000), 64 sequences of 256 tokens (16k), metric `input`, with a workspace, one process of
--threads threads.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

WAYS = ("load", "in memory", "workspace")
DEPTHS = (4, 8, 16, 32)


def build(folder: Path, width: int, depth: int, vocabulary: int) -> None:
    """Write a model in shards of 200 MB, unless it is there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return
    hidden = -(-width * 8 // 3 // 64) * 64 if width != 2048 else 5632
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200MB")


def peak() -> float:
    """Largest resident size of this process so far, MiB."""
    return resident("VmHWM")


def resident(key: str = "VmRSS") -> float:
    """A figure of this process, MiB."""
    found = re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def run(folder: Path, way: str, sequences: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Figures of one case, in this process."""
    from transformers import AutoModelForCausalLM

    import lowrank_lit
    from lowrank_lit.hub import export

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    generator = torch.Generator().manual_seed(0)
    words = model.config.vocab_size
    batches = [{"input_ids": torch.randint(words, (2, 256), generator=generator)} for _ in range(sequences // 2)]
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
    before, started = resident(), time.perf_counter()
    found: dict[str, Any] = {}
    if way == "load":
        with torch.no_grad():
            model(batches[0]["input_ids"][:1])
    else:
        with tempfile.TemporaryDirectory(dir=folder.parent) as space:
            given = {"workspace": space} if way == "workspace" else {}
            result = lowrank_lit.compress(model, batches, keep_ratio=0.6, **settings, **given)
            found = {"keep": result.plan.keep_ratio, "stages": result.record["seconds"], "compressed": peak() - before}
            if way == "workspace":
                export(model, result.plan, Path(space) / "model")
    return {**found, "peak": peak() - before, "seconds": time.perf_counter() - started}


def table(entries: list[dict[str, Any]]) -> None:
    """A row per depth, and the run of a billion parameters."""
    layered = [entry for entry in entries if "depth" in entry]
    for preset, width in sorted({(entry["preset"], entry["width"]) for entry in layered if "preset" in entry}):
        of_preset([entry for entry in layered if (entry.get("preset"), entry["width"]) == (preset, width)])
    entries = [entry for entry in entries if "preset" not in entry]
    if not entries:
        return
    small = {(entry["depth"], entry["way"], entry["metric"]): entry for entry in entries if "depth" in entry}
    print("| blocks | weights, MiB | load | in memory, input | workspace | in memory, two_sided | workspace |")
    print("|---|---|---|---|---|---|---|")
    for depth in DEPTHS:
        cells = [("load", "input"), *((way, metric) for metric in ("input", "two_sided") for way in WAYS[1:])]
        row = [small.get((depth, *cell)) for cell in cells]
        shown = " | ".join("" if entry is None else f"{entry['peak']:.0f}" for entry in row)
        size = next((entry["weights"] for entry in row if entry), 0.0)
        print(f"| {depth} | {size:.0f} | {shown} |")
    for entry in entries:
        if "depth" not in entry:
            stages = ", ".join(f"{key} {value:.0f} s" for key, value in entry["stages"].items())
            size = f"{entry['parameters'] / 1e9:.2f} billion parameters, {entry['weights']:.0f} MiB"
            spent = f"{entry['seconds'] / 60:.1f} min in all ({stages}), keep {entry['keep']:.4f}"
            print(f"\n{size}: peak {entry['peak']:.0f} MiB, {spent}")


def of_preset(entries: list[dict[str, Any]]) -> None:
    """A row per depth of a preset."""
    print(f"Preset `{entries[0]['preset']}`, width {entries[0]['width']}\n")
    print("| blocks | weights, MiB | load | in memory | workspace | and export | minutes, in memory | workspace |")
    print("|---|---|---|---|---|---|---|---|")
    for depth in sorted({entry["depth"] for entry in entries}):
        own = {entry["way"]: entry for entry in entries if entry["depth"] == depth}
        cells = [
            (way, key) for way, key in (("load", "peak"), ("in memory", "compressed"), ("workspace", "compressed"))
        ]
        shown = [f"{own[way][key]:.0f}" if way in own else "" for way, key in (*cells, ("workspace", "peak"))]
        spent = [f"{own[way]['seconds'] / 60:.1f}" if way in own else "" for way in WAYS[1:]]
        print(f"| {depth} | {next(iter(own.values()))['weights']:.0f} | {' | '.join([*shown, *spent])} |")
    print()


def plot(entries: list[dict[str, Any]], file: str) -> None:
    """Peak against depth, a line for every way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        if "depth" in entry and "preset" not in entry:
            metric = "" if entry["way"] == "load" else f", {entry['metric']}"
            lines.setdefault(f"{entry['way']}{metric}", []).append((entry["depth"], entry["peak"]))
    for label, points in lines.items():
        style = ":" if label == "load" else "--" if label.startswith("in memory") else "-"
        axes.plot(*zip(*sorted(points), strict=True), style, marker="o", label=label)
    axes.set(xlabel="blocks", ylabel="peak memory, MiB", xscale="log", yscale="log", xticks=DEPTHS)
    axes.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=150)


def measure(options: argparse.Namespace, folder: Path, way: str, metric: str, sequences: int) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--case", way, "--folder", str(folder), "--metric", metric]
    command += ["--sequences", str(sequences), "--threads", str(options.threads)]
    command += [] if options.preset is None else ["--preset", options.preset]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2**20
    asked = {"metric": metric} if options.preset is None else {"preset": options.preset}
    return {"way": way, **asked, "weights": weights, **found}


def main() -> None:
    """Measure what the output does not hold yet, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/streaming.jsonl", help="JSON lines; measured cells are kept")
    parser.add_argument("--folder", default="runs/bench/streaming", help="of the models")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)))
    parser.add_argument("--metric", default="input,two_sided")
    parser.add_argument("--preset", help="measure this preset, with its own metric")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--billion", action="store_true")
    parser.add_argument("--case", choices=WAYS, help="this case alone, in this process")
    parser.add_argument("--table", action="store_true", help="print the table of the output")
    parser.add_argument("--plot", metavar="FILE", help="draw the output instead")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    output, folder = Path(options.output), Path(options.folder)
    if options.case:
        unirank = {"preset": "unirank", "metric": options.metric}
        settings = unirank if options.preset is None else {"preset": options.preset}
        print(json.dumps(run(folder, options.case, options.sequences, settings)))
        return
    known = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.is_file() else []
    if options.table:
        table(known)
        return
    if options.plot:
        plot(known, options.plot)
        return
    folder.mkdir(parents=True, exist_ok=True)

    def add(entry: dict[str, Any]) -> None:
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        print(entry, flush=True)

    if options.billion:
        place = folder / "billion"
        subprocess.run([sys.executable, "-c", _build_command(place, 2048, 22, 32000)], check=True)
        entry = measure(options, place, "workspace", "input", 64)
        parameters = entry["weights"] * 2**20 / 2
        add({"parameters": parameters, "threads": options.threads, **entry})
        shutil.rmtree(place)
        return
    done = {
        (entry.get("depth"), entry["way"], entry.get("preset") or entry["metric"], entry.get("width"))
        for entry in known
    }
    for depth in map(int, options.depths.split(",")):
        place = folder / f"{options.width}-{depth}"
        subprocess.run([sys.executable, "-c", _build_command(place, options.width, depth, 8192)], check=True)
        metrics = options.metric.split(",")
        for metric in metrics if options.preset is None else metrics[:1]:
            for way in WAYS:
                wanted = (depth, way, options.preset or metric, options.width)
                if wanted not in done and (way != "load" or metric == metrics[0]):
                    add(
                        {
                            "depth": depth,
                            "width": options.width,
                            **measure(options, place, way, metric, options.sequences),
                        }
                    )
        shutil.rmtree(place)


def _build_command(folder: Path, width: int, depth: int, vocabulary: int) -> str:
    """Code that builds a model, for a process whose memory goes with it."""
    here = str(Path(__file__).parent)
    return (
        f"import sys; sys.path.insert(0, {here!r}); from pathlib import Path; import streaming; "
        f"streaming.build(Path({str(folder)!r}), {width}, {depth}, {vocabulary})"
    )


if __name__ == "__main__":
    main()
