"""The text that every Python carries: the language reference and the standard library, split by document.

The embedded model is trained on it. Python versions differ in this text, so the calibration, validation and test
extracts that every figure rests on are committed files (``recipes/quickstart/text``); only the training split is read
from the running Python. A document belongs to a split by the hash of its name, so no version of Python ever trains on a
document of another split.
"""

from __future__ import annotations

import hashlib
import sysconfig
from importlib import resources
from pathlib import Path

from lowrank_lit.errors import DataError

# Share of the documents in each held-out split, in 1/1000; the rest is training text.
_SPLITS = (("test", 50), ("validation", 50), ("calibration", 110))
# Size of an extract in bytes, and the most characters it takes of one document, so that no single file decides a
# perplexity.
_EXTRACTS = {"test": (170_000, 12_000), "validation": (170_000, 12_000), "calibration": (600_000, 24_000)}
# A document that shares more than this of its passages (runs of so many lines) with other splits stays out of the
# extracts: tables of codecs and sections of the reference are repeated nearly word for word under other names.
_SHARED = 0.02
_PASSAGE_LINES = 4
# Not documentation, not idiomatic code, or not in every distribution of Python.
_SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "__pycache__",
    "lib2to3",
    "ensurepip",
    "turtledemo",
    "pydoc_data",
}


def split_of(name: str) -> str:
    """Split of the document ``name``: ``test``, ``validation``, ``calibration`` or ``train``; depends on the name
    alone."""
    draw = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 1000
    for split, share in _SPLITS:
        if draw < share:
            return split
        draw -= share
    return "train"


def python_documents(split: str) -> list[str]:
    """Documents of one split, read from the running Python: reference topics, and sources with their docstrings.

    Args:
        split: ``train``, ``calibration``, ``validation`` or ``test``.

    Raises:
        DataError: If there is no such split, or this Python carries no sources (some distributions strip them).
    """
    known = ("train", *(name for name, _ in _SPLITS))
    if split not in known:
        raise DataError(f"text 'stdlib:{split}': no such split; choose one of {', '.join(known)}")
    documents = {name: text for topic, text in _topics().items() if split_of(name := f"topics/{topic}") == split}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if any(part in _SKIPPED_FOLDERS or part.startswith("config-") for part in relative.parts):
            continue
        if split_of(relative.as_posix()) != split:
            continue
        try:
            documents[relative.as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a handful of files declare another encoding; none is worth decoding
            continue
    chosen = [text for _, text in sorted(documents.items()) if text.strip()]
    if not chosen:
        raise DataError(
            f"text 'stdlib:{split}': no document found under {library}; use a Python installed with its sources"
        )
    return chosen


def embedded_text(split: str) -> str:
    """The committed extract of a held-out split, the same for every user.

    Raises:
        DataError: If there is no extract of that name.
    """
    file = resources.files("lowrank_lit.recipes") / "quickstart" / "text" / f"{split}.txt"
    if not file.is_file():
        raise DataError(f"text 'embedded:{split}': no such extract; choose calibration, validation or test")
    return file.read_text(encoding="utf-8")


def write_extracts(folder: Path) -> dict[str, int]:
    """Write ``calibration.txt``, ``validation.txt`` and ``test.txt`` from the running Python; returns their sizes in
    bytes.

    Documents come in the order of their hash, each cut at a line end, until the split's size is reached. One that
    repeats the training text, or an extract written before it, is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    seen: set[int] = set().union(*(passages(text) for text in python_documents("train")))
    for split, (limit, document_limit) in _EXTRACTS.items():
        pieces: list[str] = []
        size = 0
        for text in sorted(python_documents(split), key=lambda text: hashlib.sha256(text.encode()).digest()):
            cut = text if len(text) <= document_limit else text[: text.rindex("\n", 0, document_limit) + 1]
            own = passages(cut)
            if size + len(cut.encode()) > limit or len(own & seen) > _SHARED * len(own):
                continue
            pieces.append(cut.strip("\n") + "\n")
            size += len(cut.encode())
        seen.update(*(passages(piece) for piece in pieces))
        (folder / f"{split}.txt").write_text("\n\n".join(pieces), encoding="utf-8")
        sizes[split] = (folder / f"{split}.txt").stat().st_size
    return sizes


def passages(text: str) -> set[int]:
    """Hashes of every run of four lines of a text, blank lines and indentation left out; good within one process."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    starts = range(max(1, len(lines) - _PASSAGE_LINES + 1)) if lines else range(0)
    return {hash(tuple(lines[start : start + _PASSAGE_LINES])) for start in starts}


def _topics() -> dict[str, str]:
    """The language reference that ``help()`` shows, by topic."""
    from pydoc_data.topics import topics  # half a megabyte of text: read only when it is asked for

    return dict(topics)
