"""Text to blocks: every form of source, every kind of bad input, and the protocol of calibration and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lightning.pytorch as pl
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from tokenizers import Tokenizer
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lowrank_lit.corpus import embedded_text
from lowrank_lit.data import TextDataModule, load_tokenizer, tokenize_blocks, train_tokenizer
from lowrank_lit.errors import DataError
from lowrank_lit.sources import read_documents

BLOCK = 32
TEXT = embedded_text("validation")[30_000:50_000]


@pytest.fixture
def make(tokenizer_folder: Path) -> Callable[..., TextDataModule]:
    def build(**settings: Any) -> TextDataModule:
        return TextDataModule(**{"tokenizer": str(tokenizer_folder), "block_size": BLOCK, **settings})

    return build


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def write(path: Path, content: bytes | None) -> str:
    if content is not None:
        path.write_bytes(content)
    return str(path)


def table(path: Path, **columns: list[Any]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def line(text: Any) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


_BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "missing": (lambda folder: str(folder / "none.txt"), "'.*none.txt' does not exist; give an existing"),
    "a folder": (str, "does not exist"),
    "no name": (lambda folder: "", "does not exist"),
    "empty": (lambda folder: write(folder / "a.txt", b""), "'.*a.txt' is empty; give"),
    "blank": (lambda folder: write(folder / "a.txt", b" \n\n"), "is empty"),
    "short": (lambda folder: write(folder / "a.txt", b"One."), "shorter than one block of 32 tokens; give a longer"),
    "not text": (lambda folder: write(folder / "a.txt", b"\xff\xfe\x00"), "cannot be read .*; give a readable UTF-8"),
    "cut line": (lambda folder: write(folder / "a.jsonl", line("a") + b'\n{"text": "b\n' + line("c")), "line 3: not a"),
    "no field": (lambda folder: write(folder / "a.jsonl", line("a") + b'{"body": "b"}\n'), "line 2: .*'text'"),
    "no object": (lambda folder: write(folder / "a.jsonl", b"[1]\n"), "line 1: not a JSON object"),
    "number": (lambda folder: write(folder / "a.jsonl", line("a") + line(3)), "line 2: 'text' is a int; it must be"),
    "null": (lambda folder: write(folder / "a.jsonl", line(None)), "line 1: 'text' is a NoneType"),
    "no column": (lambda folder: table(folder / "a.parquet", body=["a"]), "no readable column 'text' "),
    "no strings": (lambda folder: table(folder / "a.parquet", text=[1, 2]), "column 'text' holds a int"),
    "no parquet": (lambda folder: write(folder / "a.parquet", b"text"), "no readable column 'text' "),
    "all null": (lambda folder: table(folder / "a.parquet", text=pyarrow.nulls(3, pyarrow.string())), "is empty"),
    "no extract": (lambda folder: "embedded:train", "'embedded:train': no such extract; choose"),
    "no split": (lambda folder: "stdlib:all", "'stdlib:all': no such split; choose"),
    "hub name alone": (lambda folder: "hub:wikitext", "'hub:wikitext' is malformed; write hub:NAME:SPLIT"),
    "hub four parts": (lambda folder: "hub:a:b:c:d", "is malformed; write hub:NAME:SPLIT"),
    "hub no split": (lambda folder: "hub:a:", "is malformed; write hub:NAME:SPLIT"),
}


@pytest.mark.parametrize("kind", _BAD)
def test_bad_text_is_one_line_that_names_the_setting(
    kind: str, make: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    source, message = _BAD[kind]
    module = make(sources={"train": source(tmp_path)})
    with pytest.raises(DataError, match=message) as caught:
        module.setup("fit")
    assert str(caught.value).startswith("data.sources.train")
    assert "\n" not in str(caught.value)


def test_the_split_with_the_bad_text_is_named(make: Callable[..., TextDataModule], text_file: str) -> None:
    module = make(sources={"train": text_file, "validation": text_file + "x"})
    with pytest.raises(DataError, match=r"^data\.sources\.validation: .*does not exist"):
        module.setup("fit")


def test_hub_without_network(make: Callable[..., TextDataModule], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the libraries' own switch
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    module = make(sources={"test": "hub:nobody/has-this:default:test"})
    with pytest.raises(DataError, match=r"cannot be loaded .*; check the name and the network, or") as caught:
        module.setup("test")
    assert str(caught.value).startswith("data.sources.test: text 'hub:nobody/has-this:default:test'")
    assert "\n" not in str(caught.value)


def test_hub_reads_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(line("one") + line("") + line(None) + line("two"))
    assert read_documents(f"hub:{folder}:train") == ["one", "two"]
    (folder / "train.jsonl").write_text('{"body": "one"}\n')
    with pytest.raises(DataError, match="cannot be loaded"):
        read_documents(f"hub:{folder}:train")


def test_a_folder_without_a_tokenizer(tmp_path: Path, text_file: str) -> None:
    for folder in (tmp_path / "none", tmp_path):
        module = TextDataModule({"train": text_file}, str(folder))
        with pytest.raises(DataError, match=r"cannot be loaded \(.*\); give a folder with tokenizer.json") as caught:
            module.setup("fit")
        assert str(caught.value).startswith(f"data.tokenizer: tokenizer '{folder}'")
        assert "\n" not in str(caught.value)


def test_splits_that_are_not_there(make: Callable[..., TextDataModule], text_file: str) -> None:
    with pytest.raises(DataError, match=r"data\.sources has unknown splits \['dev'\]; allowed are train, calibration"):
        make(sources={"train": text_file, "dev": text_file})
    module = make(sources={"test": text_file})
    assert module.has("test")
    assert not module.has("train")
    for use in (module.train_dataloader, module.calibration_batches, lambda: module.evaluation("validation")):
        with pytest.raises(DataError, match=r"data\.sources has no '(train|validation)'; add a text source"):
            use()


@pytest.mark.parametrize(
    ("name", "value"),
    [("block_size", 1), ("batch_size", 0), ("calibration_blocks", 0), ("evaluation_blocks", -5), ("vocab_size", 256)],
)
def test_sizes_that_are_too_small(name: str, value: int, make: Callable[..., TextDataModule]) -> None:
    with pytest.raises(DataError, match=rf"data\.{name}={value} is too small; give at least "):
        make(sources={}, **{name: value})


def test_every_form_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    # U+2028 and U+0085 end a line for str.splitlines, and may stand in a JSON string as they are.
    documents = ["Uno.\nDos.", "na\u2028ïve \x85 café", "three"]
    lines = "".join(json.dumps({"text": text, "id": 1}, ensure_ascii=False) + "\n\n" for text in [*documents, " "])
    assert read_documents(write(tmp_path / "a.jsonl", lines.encode())) == documents
    assert read_documents(table(tmp_path / "a.parquet", text=[*documents, None, ""], id=[1] * 5)) == documents
    assert read_documents(write(tmp_path / "a.txt", documents[0].encode())) == documents[:1]
    assert read_documents(write(tmp_path / "a.md", documents[1].encode())) == [documents[1]]


def test_embedded_and_stdlib_sources() -> None:
    assert read_documents("embedded:test") == [embedded_text("test")]
    assert len(read_documents("stdlib:test")) >= 10


def test_blocks_are_the_plain_concatenation_without_special_tokens(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    documents = [TEXT[:700], TEXT[700:1500], TEXT[1500:2500]]
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    pieces = [documents[0], *("\n\n" + text for text in documents[1:])]
    ids = [token for piece in pieces for token in raw.encode(piece).ids]
    blocks = tokenize_blocks(documents, tokenizer, BLOCK)
    assert blocks.dtype == torch.long
    assert blocks.shape == (len(ids) // BLOCK, BLOCK)
    assert len(blocks) > 20
    assert blocks.flatten().tolist() == ids[: len(blocks) * BLOCK]
    assert tokenizer.eos_token_id not in blocks
    joined = "\n\n".join(documents)
    assert joined.startswith(tokenizer.decode(blocks.flatten())[:-1])  # a cut may fall inside a character
    assert tokenize_blocks(["one"], tokenizer, BLOCK).shape == (0, BLOCK)


def test_ids_are_those_of_tokenizer_json(tokenizer_folder: Path) -> None:
    raw = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert len(tokenizer) == 300
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == raw.encode(TEXT).ids


def test_a_class_that_changes_the_ids_is_not_used(tokenizer_folder: Path, tmp_path: Path) -> None:
    """For model_type qwen2, AutoTokenizer rebuilds the pre-tokenizer of whatever vocabulary lies in the folder."""
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": 300}))
    raw = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids
    automatic = AutoTokenizer.from_pretrained(str(tmp_path))
    assert automatic(TEXT, add_special_tokens=False)["input_ids"] != raw  # or this test says nothing
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == raw
    assert len(tokenizer) == 300
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(raw) == TEXT


def test_calibration_begins_at_token_200_000_of_train(make: Callable[..., TextDataModule], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(embedded_text("calibration")[:400_000] + TEXT, encoding="utf-8")
    module = make(sources={"train": str(tmp_path / "long.txt")}, calibration_blocks=10, batch_size=4)
    train = module.blocks("train")
    assert len(train) * BLOCK > 210_000
    batches = module.calibration_batches()
    assert [batch["input_ids"].shape for batch in batches] == [(4, BLOCK), (4, BLOCK), (2, BLOCK)]
    assert all(list(batch) == ["input_ids"] for batch in batches)
    start = 200_000 // BLOCK
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), train[start : start + 10])


def test_calibration_from_a_short_train_takes_its_end(make: Callable[..., TextDataModule], text_file: str) -> None:
    module = make(sources={"train": text_file}, calibration_blocks=10)
    train = module.blocks("train")
    assert 100 < len(train) < 1000
    assert torch.equal(torch.cat([batch["input_ids"] for batch in module.calibration_batches()]), train[-10:])
    everything = make(sources={"train": text_file}, calibration_blocks=10_000)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in everything.calibration_batches()]), train)
    assert everything.describe()["calibration_blocks"] == len(train)


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_other_seeds_draw_blocks_at_random(split: str, make: Callable[..., TextDataModule], text_file: str) -> None:
    def draw(seed: int, count: int = 20) -> list[list[int]]:
        torch.manual_seed(seed + count)  # the draw is independent of the global state
        module = make(sources={split: text_file}, calibration_blocks=count, calibration_seed=seed)
        return [row for batch in module.calibration_batches() for row in batch["input_ids"].tolist()]

    blocks = make(sources={split: text_file}).blocks(split).tolist()
    first, other = draw(5), draw(6)
    assert first == draw(5)
    assert first != other
    everything = draw(5, len(blocks))
    assert everything[:20] == first
    assert sorted(everything) == sorted(blocks)  # without replacement
    positions = [blocks.index(row) for row in first]
    assert positions != sorted(positions)
    assert max(positions) - min(positions) > len(blocks) // 2


def test_a_calibration_split_is_taken_from_its_start(make: Callable[..., TextDataModule], text_file: str) -> None:
    module = make(sources={"train": "embedded:test", "calibration": text_file}, calibration_blocks=6)
    taken = torch.cat([batch["input_ids"] for batch in module.calibration_batches()])
    assert torch.equal(taken, module.blocks("calibration")[:6])
    assert module.describe() == {
        "sources": {"train": "embedded:test", "calibration": text_file},
        "tokenizer": module.tokenizer_path,
        "block_size": BLOCK,
        "calibration_blocks": 6,
        "calibration_seed": 0,
    }


def test_evaluation_and_loaders(make: Callable[..., TextDataModule], text_file: str) -> None:
    module = make(sources={"train": text_file, "validation": text_file}, batch_size=8, evaluation_blocks=12)
    blocks = module.blocks("train")
    assert torch.equal(module.evaluation("validation"), blocks[:12])
    validation = module.val_dataloader()
    assert isinstance(validation, DataLoader)
    batches = list(validation)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), blocks[:12])
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
    train = list(module.train_dataloader())
    assert len(train) == len(blocks) // 8
    assert {batch["input_ids"].shape for batch in train} == {(8, BLOCK)}
    drawn = torch.cat([batch["input_ids"] for batch in train])
    assert not torch.equal(drawn, blocks[: len(drawn)])
    known = {tuple(row) for row in blocks.tolist()}
    assert all(tuple(row) in known for row in drawn.tolist())


def test_training_order_is_that_of_the_seed(
    make: Callable[..., TextDataModule], text_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def order(seed: int) -> list[Any]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        torch.manual_seed(seed + 40)  # which the order does not depend on
        return [batch["input_ids"].tolist() for batch in make(sources={"train": text_file}).train_dataloader()]

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("callback", [EarlyStopping(monitor="val_loss"), ModelCheckpoint(monitor="val_perplexity")])
def test_an_empty_validation_set_that_something_waits_for_is_refused(
    callback: pl.Callback, make: Callable[..., TextDataModule], text_file: str
) -> None:
    settings: dict[str, Any] = {"logger": False, "accelerator": "cpu", "callbacks": [callback]}
    for sources, limit, reason in (
        ({"train": text_file}, None, r"empty: data\.sources has no 'validation'; give a validation text"),
        ({"train": text_file, "validation": text_file}, 0, r"empty: trainer\.limit_val_batches is 0; give"),
    ):
        module = make(sources=sources)
        module.trainer = pl.Trainer(limit_val_batches=limit, **settings)
        with pytest.raises(DataError, match=f"^{type(callback).__name__} monitors 'val_[a-z]+', .*{reason}"):
            module.setup("fit")
        module.setup("test")
    module = make(sources={"train": text_file, "validation": text_file})
    module.trainer = pl.Trainer(**settings)
    module.setup("fit")


def test_a_last_batch_that_is_the_only_one_is_kept(make: Callable[..., TextDataModule], text_file: str) -> None:
    module = make(sources={"train": text_file}, batch_size=5000)
    (batch,) = module.train_dataloader()
    assert len(batch["input_ids"]) == len(module.blocks("train"))
    assert module.val_dataloader() == []


def test_prepare_data_trains_a_tokenizer_once(tmp_path: Path, text_file: str) -> None:
    folder = tmp_path / "tokenizer"
    module = TextDataModule({"train": text_file}, str(folder), block_size=BLOCK, vocab_size=290)
    module.prepare_data()
    written = (folder / "tokenizer.json").read_bytes()
    module.setup("fit")
    assert len(module.tokenizer) == 290
    assert module.tokenizer.decode(module.blocks("train").flatten()).startswith(TEXT[:5000])
    other = TextDataModule({"train": "embedded:test"}, str(folder), vocab_size=400)
    other.prepare_data()
    assert (folder / "tokenizer.json").read_bytes() == written
    loaded = AutoTokenizer.from_pretrained(str(folder))
    assert loaded.bos_token == loaded.eos_token == loaded.pad_token == "<|endoftext|>"
    assert loaded(TEXT, add_special_tokens=False)["input_ids"] == module.tokenizer(TEXT)["input_ids"]


def test_prepare_data_without_a_training_text(tmp_path: Path, text_file: str) -> None:
    module = TextDataModule({"test": text_file}, str(tmp_path / "tokenizer"), vocab_size=300)
    with pytest.raises(DataError, match=r"data\.sources has no 'train'"):
        module.prepare_data()
    missing = TextDataModule({"train": str(tmp_path / "no.txt")}, str(tmp_path / "tokenizer"), vocab_size=300)
    with pytest.raises(DataError, match=r"^data\.sources\.train: .*does not exist"):
        missing.prepare_data()
    assert not (tmp_path / "tokenizer").exists()


def test_train_tokenizer_keeps_every_character(tmp_path: Path) -> None:
    train_tokenizer(["aaa bbb aaa bbb"] * 5, 260, tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "naïve 漢字 🙂\t\x00\r\n  end "
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
