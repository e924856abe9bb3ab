"""Text for causal language models: sources, tokenizers, packed blocks, and the splits of one run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lowrank_lit.corpus import embedded_text, python_documents
from lowrank_lit.errors import DataError, reason_of

_SPLITS = ("train", "calibration", "validation", "test")
_JOIN = "\n\n"
# Where calibration begins in a training file without a calibration split of its own: far enough from the start that a
# model's first look at the file is not what it is calibrated on.
_CALIBRATION_START = 200_000


def read_documents(source: str) -> list[str]:
    """Documents of one text source.

    Args:
        source: ``embedded:test`` (an extract that the package carries: calibration, validation, test), ``stdlib:train``
            (the running Python's own text), ``hub:NAME[:CONFIG]:SPLIT`` (column ``text`` of a data set of the hub or of
            a folder, read by ``datasets``), or a local file: ``.jsonl`` (field ``text``), ``.parquet`` (column
            ``text``), anything else is plain text and one document.

    Raises:
        DataError: If the file is missing, empty or malformed, or the data set cannot be reached. A text that is null in
            a table counts as empty.
    """
    kind, _, rest = source.partition(":")
    if kind == "embedded":
        documents = [embedded_text(rest)]
    elif kind == "stdlib":
        documents = python_documents(rest)
    elif kind == "hub":
        documents = _read_hub(rest)
    else:
        documents = _read_file(Path(source).expanduser())
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"text '{source}' is empty; give a source with at least one block of text")
    return documents


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"text file '{path}' does not exist; give an existing .txt, .jsonl or .parquet file")
    try:
        if path.suffix == ".parquet":
            return _texts_of_parquet(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"text file '{path}' cannot be read ({error}); give a readable UTF-8 file") from error
    return _texts_of_lines(text, path) if path.suffix == ".jsonl" else [text]


def _texts_of_lines(text: str, path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also cuts at U+2028, legal inside a string
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f"text file '{path}', line {number}: not a JSON object with a field 'text' ({error})"
            ) from error
        if not isinstance(document, str):
            raise DataError(
                f"text file '{path}', line {number}: 'text' is a {type(document).__name__}; it must be a string"
            )
        documents.append(document)
    return documents


def _texts_of_parquet(path: Path) -> list[str]:
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except Exception as error:  # pyarrow raises many kinds; each means that this file gives no column 'text'
        raise DataError(f"text file '{path}': no readable column 'text' ({reason_of(error)})") from error
    return _strings(values, f"text file '{path}'")


def _strings(values: Iterable[Any], source: str) -> list[str]:
    """The texts of a table's column; a null is an empty text."""
    texts = ["" if value is None else value for value in values]
    for value in texts:
        if not isinstance(value, str):
            raise DataError(f"{source}: column 'text' holds a {type(value).__name__}; it must hold strings")
    return texts


def _read_hub(spec: str) -> list[str]:
    import datasets

    parts = spec.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"text 'hub:{spec}' is malformed; write hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    try:
        values = list(datasets.load_dataset(*parts[:-1], split=parts[-1])["text"])
    except Exception as error:  # network, name, configuration and column errors have no common base in `datasets`
        raise DataError(
            f"text 'hub:{spec}' cannot be loaded ({reason_of(error)}); check the name and the network, or give a file"
        ) from error
    return _strings(values, f"text 'hub:{spec}'")


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
        tokenizer = AutoTokenizer.from_pretrained(path)
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
            :func:`read_documents`. Without ``calibration``, calibration blocks are cut from ``train``, starting at its
            token 200,000; without ``validation`` nothing is validated while training.
        tokenizer: Folder or hub name of the tokenizer.
        block_size: Tokens per block.
        batch_size: Blocks per batch, for training and for every evaluation.
        calibration_blocks: Blocks that the statistics are collected on.
        calibration_seed: 0 takes consecutive blocks; any other seed draws the blocks at random.
        evaluation_blocks: Blocks from the start of ``validation`` and ``test`` that a perplexity is measured on.
        vocab_size: Train a byte-level BPE tokenizer of this size on ``train`` and save it to the folder ``tokenizer``,
            where that folder has none yet; ``None`` only loads.

    Raises:
        DataError: For a missing or empty source, a text shorter than one block, or an unknown split.
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
    ) -> None:
        super().__init__()
        unknown = sorted(set(sources) - set(_SPLITS))
        if unknown:
            raise DataError(f"data.sources has unknown splits {unknown}; allowed are {', '.join(_SPLITS)}")
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
        self._tokenizer: Any = None
        self._blocks: dict[str, Tensor] = {}

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
        for split in self.sources:
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

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Shuffled training blocks; an incomplete last batch is left out, unless it is the only one."""
        blocks = self.blocks("train")
        return DataLoader(BlockDataset(blocks), self.batch_size, shuffle=True, drop_last=len(blocks) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[Any]:
        """Validation blocks in order, or nothing where no validation text was given."""
        return (
            DataLoader(BlockDataset(self.evaluation("validation")), self.batch_size) if self.has("validation") else []
        )

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
        try:
            return read_documents(self.sources[split])
        except DataError as error:
            raise DataError(f"data.sources.{split}: {error}") from error
