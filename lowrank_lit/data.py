"""Text for causal language models: tokenizers, blocks, and the splits of one run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowrank_lit.errors import DataError, reason_of
from lowrank_lit.folders import hub_settings
from lowrank_lit.instructions import InstructionDataset, instruction_blocks, is_instructions, read_samples
from lowrank_lit.loader import ResumableLoader, shuffled_loader
from lowrank_lit.sources import read_documents

_SPLITS = ("train", "calibration", "validation", "test")
_JOIN = "\n\n"
# Where calibration begins in a training file without a calibration split of its own: far enough from the start that a
# model's first look at the file is not what it is calibrated on.
_CALIBRATION_START = 200_000


def load_tokenizer(path: str) -> Any:
    """Tokenizer of a folder or hub name, with the ids of its own ``tokenizer.json``.

    ``AutoTokenizer`` picks a class by the folder's model type, and that class may rebuild the pre-tokenizer and change
    the ids of a custom vocabulary without a word. Where the ids of a sample differ from those of ``tokenizer.json``,
    the plain fast tokenizer is loaded from that file instead.

    Raises:
        DataError: If there is no tokenizer at ``path``.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **hub_settings(str(path)))
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, ... by the part that is missing
        raise DataError(
            f"tokenizer '{path}' cannot be loaded ({reason_of(error)}); give a folder with tokenizer.json or a hub name"
        ) from error
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        sample = "def f(x):\n    return x  # naïve café, 3.14 apples.\n\nThe quick  brown fox."
        if (
            tokenizer(sample, add_special_tokens=False)["input_ids"]
            != Tokenizer.from_file(str(file)).encode(sample, add_special_tokens=False).ids
        ):
            # Special tokens come from the folder too: those of the class may lie outside of a custom vocabulary.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    return tokenizer


def train_tokenizer(documents: list[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it as a folder that ``AutoTokenizer`` loads.

    Args:
        documents: Texts to train on.
        vocab_size: Number of tokens, with the 256 bytes and one ``<|endoftext|>`` (start, end and padding).
        folder: Written: ``tokenizer.json`` and ``tokenizer_config.json``.
    """
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        documents, vocab_size=vocab_size, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False
    )
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        trainer.save(file.name)
        PreTrainedTokenizerFast(tokenizer_file=file.name, **special).save_pretrained(folder)


def tokenize_blocks(documents: list[str], tokenizer: Any, block_size: int) -> Tensor:
    """Token ids of all documents, joined and cut into blocks; the rest that fills no block is left out.

    No special tokens are added. Documents after the first are preceded by an empty line.

    Returns:
        LongTensor ``(blocks, block_size)``; ``blocks`` may be 0.
    """
    texts = [text if index == 0 else _JOIN + text for index, text in enumerate(documents)]
    # One very long text is what the protocol asks for, so the tokenizer's warning about the model's length does not
    # apply.
    ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    flat = torch.tensor([token for document in ids for token in document], dtype=torch.long)
    return flat[: len(flat) // block_size * block_size].view(-1, block_size)


class BlockDataset(Dataset[dict[str, Tensor]]):
    """Blocks of token ids as samples ``{"input_ids", "labels"}``, both LongTensor ``(block_size,)``; the model shifts
    the labels."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


class TextDataModule(pl.LightningDataModule):
    """Text as blocks of tokens: training, calibration, validation and test.

    Args:
        sources: Text source of each split: ``train``, ``calibration``, ``validation``, ``test``; forms as in
            :func:`lowrank_lit.sources.read_documents`. ``train`` may also hold instructions, ``alpaca:TABLE`` or
            ``chat:TABLE`` (:func:`lowrank_lit.instructions.read_samples`), of which the responses alone are learnt.
            Without ``calibration``, calibration blocks are cut from ``train``, starting at its token 200,000; without
            ``validation`` nothing is validated while training.
        tokenizer: Folder or hub name of the tokenizer.
        block_size: Tokens per block.
        batch_size: Blocks per batch, for training and for every evaluation.
        calibration_blocks: Blocks that the statistics are collected on.
        calibration_seed: 0 takes consecutive blocks; any other seed draws the blocks at random.
        evaluation_blocks: Blocks from the start of ``validation`` and ``test`` that a perplexity is measured on.
        vocab_size: Train a byte-level BPE tokenizer of this size on ``train`` and save it to the folder ``tokenizer``,
            where that folder has none yet; ``None`` only loads.
        packing: Of instructions: several samples per block, kept apart in the attention (by position ids, which every
            model of transformers takes that has rotary or learnt positions), instead of one that is padded.

    The order of training blocks is a function of the seed of ``seed_everything`` and of the epoch alone, and the loader
    has a state: a run that goes on from a checkpoint sees the blocks that it would have seen.

    Raises:
        DataError: For a missing or empty source, a text shorter than one block, an unknown split, or a callback that
            monitors a validation which does not take place.
    """

    def __init__(
        self,
        sources: dict[str, str],
        tokenizer: str,
        *,
        block_size: int = 256,
        batch_size: int = 8,
        calibration_blocks: int = 96,
        calibration_seed: int = 0,
        evaluation_blocks: int = 100,
        vocab_size: int | None = None,
        packing: bool = True,
    ) -> None:
        super().__init__()
        unknown = sorted(set(sources) - set(_SPLITS))
        if unknown:
            raise DataError(f"data.sources has unknown splits {unknown}; allowed are {', '.join(_SPLITS)}")
        for split in set(sources) - {"train"}:
            if is_instructions(sources[split]):
                raise DataError(
                    f"data.sources.{split}='{sources[split]}' holds instructions, which only train takes; give a text"
                )
        for name, value, least in (
            ("block_size", block_size, 2),
            ("batch_size", batch_size, 1),
            ("calibration_blocks", calibration_blocks, 1),
            ("evaluation_blocks", evaluation_blocks, 1),
            ("vocab_size", vocab_size, 257),
        ):
            if value is not None and value < least:
                raise DataError(f"data.{name}={value} is too small; give at least {least}")
        self.sources = dict(sources)
        self.tokenizer_path = tokenizer
        self.block_size = block_size
        self.batch_size = batch_size
        self.calibration_blocks = calibration_blocks
        self.calibration_seed = calibration_seed
        self.evaluation_blocks = evaluation_blocks
        self.vocab_size = vocab_size
        self.packing = packing
        self._tokenizer: Any = None
        self._blocks: dict[str, Tensor] = {}
        self._instructions: InstructionDataset | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            try:
                self._tokenizer = load_tokenizer(self.tokenizer_path)
            except DataError as error:
                raise DataError(f"data.tokenizer: {error}") from error
        return self._tokenizer

    def prepare_data(self) -> None:
        """Train the tokenizer where one is asked for and there is none yet (runs on one process of a machine)."""
        folder = Path(self.tokenizer_path)
        if self.vocab_size is not None and not (folder / "tokenizer.json").is_file():
            train_tokenizer(self._documents("train"), self.vocab_size, folder)

    def setup(self, stage: str | None = None) -> None:
        """Read and check every source, so that a bad one is found before anything is computed."""
        if stage == "fit" and self.trainer is not None:
            _check_monitors(self.trainer, self.has("validation"))
        for split in self.sources:
            if split == "train":
                self.training_data()
            else:
                self.blocks(split)

    def blocks(self, split: str) -> Tensor:
        """All blocks of a split, LongTensor ``(blocks, block_size)``."""
        if split not in self._blocks:
            blocks = tokenize_blocks(self._documents(split), self.tokenizer, self.block_size)
            if len(blocks) == 0:
                raise DataError(
                    f"data.sources.{split}='{self.sources[split]}' is shorter than one block of {self.block_size} "
                    "tokens; give a longer text or a smaller data.block_size"
                )
            self._blocks[split] = blocks
        return self._blocks[split]

    def training_data(self) -> Dataset[dict[str, Tensor]]:
        """Samples of ``train``: blocks of text, or of instructions."""
        if not is_instructions(self.sources.get("train", "")):
            return BlockDataset(self.blocks("train"))
        if self._instructions is None:
            try:
                samples = read_samples(self.sources["train"], self.tokenizer)
                padding = self.tokenizer.pad_token_id
                padding = (self.tokenizer.eos_token_id or 0) if padding is None else padding
                self._instructions = instruction_blocks(samples, self.block_size, padding, packing=self.packing)
            except DataError as error:
                raise DataError(f"data.sources.train: {error}") from error
        return self._instructions

    def calibration_batches(self, seed: int | None = None) -> list[dict[str, Tensor]]:
        """Batches ``{"input_ids"}`` of LongTensor ``(batch_size, block_size)`` to collect statistics on.

        Args:
            seed: In place of ``calibration_seed``, to see how much a result depends on the draw.
        """
        seed = self.calibration_seed if seed is None else seed
        if "calibration" in self.sources:
            blocks = self.blocks("calibration")
        else:
            train = self.blocks("train")
            start = min(_CALIBRATION_START // self.block_size, max(0, len(train) - self.calibration_blocks))
            blocks = train[start:] if seed == 0 else train
        if seed != 0:
            order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
            blocks = blocks[order]
        return [{"input_ids": batch} for batch in torch.split(blocks[: self.calibration_blocks], self.batch_size)]

    def evaluation(self, split: str = "test") -> Tensor:
        """The blocks that a perplexity is measured on: the first ``evaluation_blocks`` of ``split``."""
        return self.blocks(split)[: self.evaluation_blocks]

    def has(self, split: str) -> bool:
        """Whether a source was given for ``split``."""
        return split in self.sources

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training blocks of this process; an incomplete last batch is left out, unless it is the only one."""
        trainer = self.trainer
        replicas, rank = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        return shuffled_loader(self.training_data(), self.batch_size, replicas=replicas, rank=rank)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Validation blocks in order, or nothing where no validation text was given."""
        if not self.has("validation"):
            return []
        # A generator of its own: a validation then moves no random state that training depends on.
        blocks = BlockDataset(self.evaluation("validation"))
        return DataLoader(blocks, self.batch_size, generator=torch.Generator())

    def describe(self) -> Mapping[str, Any]:
        """The protocol in a form that a record can hold."""
        return {
            "sources": self.sources,
            "tokenizer": self.tokenizer_path,
            "block_size": self.block_size,
            "calibration_blocks": sum(len(batch["input_ids"]) for batch in self.calibration_batches()),
            "calibration_seed": self.calibration_seed,
        }

    def _documents(self, split: str) -> list[str]:
        if split not in self.sources:
            raise DataError(f"data.sources has no '{split}'; add a text source for it")
        if is_instructions(self.sources[split]):
            raise DataError(
                f"data.sources.{split}='{self.sources[split]}' holds instructions and no text; "
                "give data.sources.calibration to calibrate on, and a tokenizer that exists"
            )
        try:
            return read_documents(self.sources[split])
        except DataError as error:
            raise DataError(f"data.sources.{split}: {error}") from error


def _check_monitors(trainer: pl.Trainer, has_text: bool) -> None:
    """Refuse a callback that waits for a validation which never comes; Lightning would say so after an epoch."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor.startswith("val_") and not (has_text and trainer.limit_val_batches):
            reason = "trainer.limit_val_batches is 0" if has_text else "data.sources has no 'validation'"
            raise DataError(
                f"{type(callback).__name__} monitors '{monitor}', but the validation set is empty: {reason}; "
                "give a validation text and trainer.limit_val_batches=1.0, or monitor something else"
            )
