"""The text that Python carries: a split depends on a document's name alone, and the extracts share nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lowrank_lit import corpus
from lowrank_lit.corpus import embedded_text, passages, python_documents, split_of, write_extracts
from lowrank_lit.errors import DataError

_HELD_OUT = ("test", "validation", "calibration")


@pytest.fixture(scope="module")
def documents() -> dict[str, list[str]]:
    return {split: python_documents(split) for split in ("train", *_HELD_OUT)}


def test_a_split_is_a_fixed_function_of_the_name() -> None:
    """These names must never move: the embedded model was trained on those in ``train``."""
    assert {name: split_of(name) for name in ("argparse.py", "topics/assert", "wave.py", "json/decoder.py")} == {
        "argparse.py": "train",
        "topics/assert": "calibration",
        "wave.py": "test",
        "json/decoder.py": "train",
    }


def test_splits_have_their_shares() -> None:
    counts = Counter(split_of(f"document {number}") for number in range(20_000))
    shares = {split: count / 20_000 for split, count in counts.items()}
    # Standard deviation of a share: 0.003 at most. Measured: off by 0.003 at most.
    assert shares == pytest.approx({"train": 0.79, "calibration": 0.11, "validation": 0.05, "test": 0.05}, abs=0.01)


def test_every_document_is_in_one_split(documents: dict[str, list[str]]) -> None:
    assert sum(map(len, documents["train"])) > 3_000_000  # 9.6 million characters
    topics = Counter(corpus._topics().values())
    read = Counter(text for texts in documents.values() for text in texts)
    assert len(topics) > 50
    # A document that stands there under two names is the same text twice; none is there more often than it has names.
    assert all(read[text] == count for text, count in topics.items() if text.strip())
    for split in _HELD_OUT:
        assert len(documents[split]) >= 10
    assert all(text.strip() for texts in documents.values() for text in texts)


def test_the_extracts_are_small_and_long_enough() -> None:
    sizes = {split: len(embedded_text(split).encode()) for split in _HELD_OUT}
    assert sum(sizes.values()) <= 1_000_000
    assert min(sizes.values()) >= 150_000  # 100 blocks of 256 tokens at four bytes each, and half as much again


def test_the_extracts_repeat_neither_the_training_text_nor_each_other(documents: dict[str, list[str]]) -> None:
    seen = set().union(*(passages(text) for text in documents["train"]))
    assert len(seen) > 100_000
    for split in _HELD_OUT:
        own = passages(embedded_text(split))
        assert len(own) > 3000
        assert len(own & seen) / len(own) < 0.02, split  # 0.004 at most: licence headers; 0.14 with the codecs' tables
        seen |= own


def test_an_extract_is_text_of_its_own_split(documents: dict[str, list[str]]) -> None:
    """Other versions of Python have other text, but not another split for a name."""
    for split in _HELD_OUT:
        own = passages(embedded_text(split))
        there = set().union(*(passages(text) for text in documents[split]))
        assert len(own & there) / len(own) > 0.5, split  # 0.99 under Python 3.11


def test_passages_ignore_blank_lines_and_indentation() -> None:
    assert passages("a\nb\n\n  c\nd\n") == passages("a\n\tb\nc\n\n\nd")
    assert len(passages("a\nb\nc\nd\ne")) == 2
    assert len(passages("a\nb")) == 1
    assert passages("\n \n") == set()


@pytest.mark.parametrize("read", [embedded_text, python_documents])
def test_an_unknown_split_is_refused(read: object) -> None:
    assert callable(read)
    with pytest.raises(DataError, match=r"'(embedded|stdlib):elsewhere': no such .*; choose"):
        read("elsewhere")


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr(corpus, "_topics", dict)
    with pytest.raises(DataError, match=r"no document found under .*; use a Python installed with its sources"):
        python_documents("train")


@pytest.mark.slow
def test_write_extracts(tmp_path: Path) -> None:
    sizes = write_extracts(tmp_path / "text")
    assert sorted(sizes) == ["calibration", "test", "validation"]
    for split, size in sizes.items():
        assert (tmp_path / "text" / f"{split}.txt").stat().st_size == size
    assert 500_000 < sum(sizes.values()) <= 1_000_000
    assert len(passages((tmp_path / "text" / "test.txt").read_text())) > 3000
