"""The memory and disk that are estimated before a run beside what the run uses, stage by stage, at three sizes.

Run from the repository's root (about five minutes on two CPU cores):

    python benchmarks/memory_estimate.py             # JSON, one line per case and size
    python benchmarks/memory_estimate.py --table     # the same as one Markdown table
    python benchmarks/memory_estimate.py --table --cases lora --width 256 --layers 4     # one case at one size

Protocol: Llamas of random weights, by default 4 blocks of width 256, 10 of 512 and 16 of 768 (5, 33 and 116 M
parameters; MLP 8/3 of the width, vocabulary 4096, tied), in float32, saved to a temporary folder; random token ids as
text (batches of 4 x 128). Each case is a process of its own: `lora` compresses to --keep with uniform ranks and makes
three steps with LoRA on the factors, `factors` trains the whole factors, `kd` refines block by block first and then
trains the factors towards the dense model in memory, `progressive` re-allocates ranks from whole factors. All write a
checkpoint after the last step and export at the end. The figures of memory are those of `MemoryReport`; a small fit of
the same kind has been made before in the process, so that libraries are loaded. Those of the disk are the sizes of the
files that a stage has left. The last line, on stderr, counts the rows of at least 32 MiB whose figures are no more than
15 % apart.

On a CPU allocations of 64 KiB and more are mapped, and unmapped when freed, so that the resident size follows the
tensors; without that the process keeps what it has freed, and uses more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _common import in_own_process
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng

from lowrank_lit.callbacks import (
    ExportOnFitEnd,
    FactorTuning,
    LowRankCompression,
    MemoryReport,
    RankPreservingLoRA,
    RankReallocation,
    Refinement,
)
from lowrank_lit.data import TextDataModule
from lowrank_lit.estimate import totals
from lowrank_lit.module import LowRankModule

CASES = ("lora", "factors", "kd", "progressive")
VOCABULARY = 4096
SIZES = ((256, 4), (512, 10), (768, 16))
"""Widths and numbers of blocks."""
WRITTEN = {
    "factor": "compressed",
    "reallocate": "reallocation",
    "refine": "refined",
    "recover": "checkpoints",
    "export": "model",
}
"""Folder that a stage writes to, below the run's."""
TOLERANCE = 0.15
LARGE = 32  # MiB; below that allocators' and interpreter's own are what is measured


class RandomText(TextDataModule):
    """Token ids without a tokenizer."""

    def __init__(self, batch_size: int, length: int, blocks: int) -> None:
        super().__init__(
            dict.fromkeys(("train", "calibration", "validation", "test"), "random"),
            "none",
            block_size=length,
            batch_size=batch_size,
            calibration_blocks=blocks,
            evaluation_blocks=blocks,
        )
        with isolate_rng():
            ids = torch.randint(3, VOCABULARY, (blocks, length), generator=torch.Generator().manual_seed(0))
        self._blocks = dict.fromkeys(self.sources, ids)

    @property
    def tokenizer(self) -> Any:
        """There is none."""
        return None


def callbacks(case: str, keep: float) -> list[pl.Callback]:
    """What the case does."""
    compression = LowRankCompression(keep, preset="unirank", allocator="uniform")  # a matrix left dense has no factors
    own: dict[str, list[pl.Callback]] = {
        "lora": [compression, RankPreservingLoRA(8)],
        "factors": [compression, FactorTuning()],
        "kd": [compression, Refinement(block_epochs=1)],
        "progressive": [RankReallocation(keep, end=2, every=1), FactorTuning()],
    }
    return [MemoryReport(), *own[case], ExportOnFitEnd()]


def fit(root: Path, case: str, width: int, layers: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run; gives the record of its memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(root / "dense")
    checkpoint = ModelCheckpoint(dirpath=root / "checkpoints", every_n_train_steps=3, save_top_k=1)
    chosen = [*callbacks(case, options.keep), checkpoint]
    trainer = pl.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_steps=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=root,
        callbacks=chosen,
    )
    module = LowRankModule(str(root / "dense"), loss="kd" if case == "kd" else "ce", optimizer="adamw")
    trainer.fit(module, RandomText(options.batch_size, options.length, options.blocks))
    memory = chosen[0]
    assert isinstance(memory, MemoryReport)
    stages: dict[str, Any] = memory.record()["stages"]
    for (stage, place), estimated in totals(memory.items).items():
        if place == "disk":
            used = sum(file.stat().st_size for file in (root / WRITTEN[stage]).rglob("*") if file.is_file())
            name = "compress" if stage == "factor" else stage
            stages.setdefault(name, {})["disk"] = {"estimated": estimated, "used": used}
    return stages


def measure(options: argparse.Namespace) -> None:
    """One case in this process, as JSON on the last line."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "small").mkdir()
        fit(Path(folder) / "small", options.case, 64, 2, options)
        width, layers = options.width[0], options.layers[0]
        stages = fit(Path(folder), options.case, width, layers, options)
    print(json.dumps({"case": options.case, "width": width, "layers": layers, "stages": stages}))


def ratios(entry: dict[str, Any]) -> list[tuple[float, float]]:
    """Estimated MiB and used / estimated of every row that has both, in the order of the table."""
    pairs = [pair for places in entry["stages"].values() for pair in places.values()]
    return [
        (p["estimated"] / 2**20, p["used"] / p["estimated"]) for p in pairs if p["estimated"] and p["used"] is not None
    ]


def rows(entry: dict[str, Any]) -> list[str]:
    """Lines of the Markdown table."""
    lines = []
    for stage, places in entry["stages"].items():
        for place, pair in places.items():
            sizes = [None if pair[key] is None else pair[key] / 2**20 for key in ("estimated", "used")]
            cells = ["–" if size is None else f"{size:.0f}" for size in sizes]
            ratio = "–" if sizes[0] is None or sizes[1] is None else f"{sizes[1] / sizes[0]:.2f}"
            size = f"{entry['layers']} x {entry['width']}"
            lines.append(f"| {size} | {entry['case']} | {stage} | {place} | {cells[0]} | {cells[1]} | {ratio} |")
    return lines


def main() -> None:
    """Run the cases at all sizes, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="this case alone, in this process")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--width", type=int, nargs="+", default=[width for width, _ in SIZES])
    parser.add_argument("--layers", type=int, nargs="+", default=[layers for _, layers in SIZES], help="one per width")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=16, help="blocks of text, for calibration and all else")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    options = parser.parse_args()
    if len(options.width) != len(options.layers):
        parser.error(f"--width names {len(options.width)} sizes and --layers {len(options.layers)}; give one of each")
    if options.case:
        measure(options)
        return
    if options.table:
        print("| blocks x width | run | stage | where | estimated, MiB | used, MiB | used / estimated |")
        print("|---|---|---|---|---|---|---|", flush=True)
    settings = {
        name: getattr(options, name) for name in ("batch_size", "length", "blocks", "keep", "accelerator", "threads")
    }
    found: list[tuple[float, float]] = []
    for width, layers in zip(options.width, options.layers, strict=True):
        for case in options.cases:
            line = in_own_process(__file__, case, {"width": width, "layers": layers, **settings})
            entry = json.loads(line)
            found += ratios(entry)
            print("\n".join(rows(entry)) if options.table else line, flush=True)
    large = [ratio for size, ratio in found if size >= LARGE]
    near = sum(abs(ratio - 1) <= TOLERANCE for ratio in large)
    print(f"within 15 %: {near} of {len(large)} rows of {LARGE} MiB and more", file=sys.stderr)


if __name__ == "__main__":
    main()
