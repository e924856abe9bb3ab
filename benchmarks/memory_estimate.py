"""The memory that is estimated before a run beside what the run uses, stage by stage.

Run from the repository's root (about a minute on two CPU cores):

    python benchmarks/memory_estimate.py             # JSON, one line per case
    python benchmarks/memory_estimate.py --table     # the same as Markdown

Protocol: a Llama of random weights (33 M parameters: 10 blocks of width 512, MLP 1365, vocabulary 4096, tied), in
float32, saved to a temporary folder; random token ids as text (batches of 4 x 128). Each case is a process of its own:
`lora` compresses to --keep and makes three steps with LoRA on the factors, `factors` trains the whole factors, `kd`
refines block by block first and then trains the factors towards the dense model in memory, `progressive` re-allocates
ranks from whole factors. All export at the end. The figures are those of `MemoryReport`; a small fit of the same kind
has been made before in the process, so that libraries are loaded.

On a CPU allocations of 64 KiB and more are mapped, and unmapped when freed, so that the resident size follows the
tensors; without that the process keeps what it has freed, and uses more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from _common import in_own_process
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
from lowrank_lit.module import LowRankModule

CASES = ("lora", "factors", "kd", "progressive")
VOCABULARY = 4096


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
    compression = LowRankCompression(keep, preset="unirank")
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
    chosen = callbacks(case, options.keep)
    trainer = pl.Trainer(
        accelerator=options.accelerator,
        devices=1,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
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
    return memory.record()["stages"]  # type: ignore[no-any-return]


def measure(options: argparse.Namespace) -> None:
    """One case in this process, as JSON on the last line."""
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "small").mkdir()
        fit(Path(folder) / "small", options.case, 64, 2, options)
        stages = fit(Path(folder), options.case, options.width, options.layers, options)
    print(json.dumps({"case": options.case, "width": options.width, "layers": options.layers, "stages": stages}))


def rows(entry: dict[str, Any]) -> list[str]:
    """Lines of the Markdown table."""
    lines = []
    for stage, places in entry["stages"].items():
        for place, pair in places.items():
            sizes = [None if pair[key] is None else pair[key] / 2**20 for key in ("estimated", "used")]
            cells = ["–" if size is None else f"{size:.0f}" for size in sizes]
            ratio = "–" if sizes[0] is None or sizes[1] is None else f"{sizes[1] / sizes[0]:.2f}"
            lines.append(f"| {entry['case']} | {stage} | {place} | {cells[0]} | {cells[1]} | {ratio} |")
    return lines


def main() -> None:
    """Run the cases, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="this case alone, in this process")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=16, help="blocks of text, for calibration and all else")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print Markdown instead of JSON")
    options = parser.parse_args()
    if options.case:
        measure(options)
        return
    if options.table:
        print("| run | stage | where | estimated, MiB | used, MiB | used / estimated |\n|---|---|---|---|---|---|")
    names = ("width", "layers", "batch_size", "length", "blocks", "keep", "accelerator", "threads")
    settings = {name: getattr(options, name) for name in names}
    for case in options.cases:
        line = in_own_process(__file__, case, settings)
        print("\n".join(rows(json.loads(line))) if options.table else line, flush=True)


if __name__ == "__main__":
    main()
