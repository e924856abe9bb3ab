"""What the benchmarks share: models with their texts, results that a later run adds to, cases in own processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lowrank_lit import memory

EMBEDDED = Path(__file__).parent.parent / "recipes" / "quickstart" / "model"
EXTRACTS = {split: f"embedded:{split}" for split in ("calibration", "validation", "test")}
"""Text sources of the embedded model and of those that are trained on its text."""


class Problem(NamedTuple):
    """A model's name and folder, its text source by split, and the text of another domain where there is one."""

    name: str
    folder: str
    sources: dict[str, str]
    other: str | None


def available() -> Iterator[Problem]:
    """The embedded model and, with LOWRANK_LIT_REFERENCE, those of that folder."""
    folder = os.environ.get("LOWRANK_LIT_REFERENCE")
    models, text = Path(folder or "", "models"), Path(folder or "", "text")
    splits = (("train", "train"), ("validation", "valid"), ("test", "test"))
    wiki = {split: str(text / "wikitext2" / f"wiki.{name}.txt") for split, name in splits}
    trained = EXTRACTS | {"train": EXTRACTS["calibration"]}
    yield Problem("embedded", str(EMBEDDED), trained, wiki["test"] if folder else None)
    if folder:
        held_out = str(text / "tinystories" / "valid_1000.txt")
        stories = {"train": str(text / "tinystories" / "train_head_2MiB.txt"), "test": held_out, "validation": held_out}
        yield Problem("stories260K", str(models / "stories260K"), stories, wiki["test"])
        yield Problem("wiki-llama-3m", str(models / "wiki-llama-3m"), wiki, held_out)


def problems(known: Collection[str], names: str = "") -> list[Problem]:
    """Those of ``known`` that are there; with ``names``, separated by commas, no others."""
    return [problem for problem in available() if problem.name in known and asked(problem.name, names)]


def asked(name: str, names: str) -> bool:
    """Whether ``name`` is one of ``names``, separated by commas; without any, all are."""
    chosen = [part for part in names.split(",") if part]
    return not chosen or name in chosen


def read(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Entries of files of JSON lines, one file after the other."""
    return [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]


class Results:
    """Entries of a file of JSON lines, each with a ``key`` by which a later run knows that it is measured."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.entries = read([self.path]) if self.path.is_file() else []
        self._keys = {entry["key"] for entry in self.entries}

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry to the file at once; what others have added meanwhile stays there."""
        self.entries.append(entry)
        self._keys.add(entry["key"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def in_own_process(script: str, case: str, settings: dict[str, Any]) -> str:
    """The last line that ``script --case CASE`` prints, with the settings as flags."""
    # Allocations of 64 KiB and more are mapped, and unmapped when freed: the resident size follows the tensors.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, script, "--case", case, *flags]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout.splitlines()[-1]


def resident(figure: Literal["now", "largest"]) -> int:
    """This process's resident memory in bytes: now, or its peak since :func:`reset_peak`."""
    value: int = getattr(memory.resident(), figure, 0)
    if not value:
        raise RuntimeError("/proc/self/status does not tell the resident memory; run on Linux")
    return value


def reset_peak() -> None:
    """Let the peak of the resident memory begin anew."""
    Path("/proc/self/clear_refs").write_text("5")
