"""Where text and rows come from: extracts of the package, the standard library, data sets of the hub, local files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_lit.corpus import embedded_text, python_documents
from lowrank_lit.errors import DataError, reason_of


@dataclass(frozen=True)
class Row:
    """One object of a table, and the place in its source that an error message names."""

    fields: dict[str, Any]
    place: str


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
        documents = _strings(_load_hub(rest, "text", column="text"), f"text 'hub:{rest}'")
    else:
        documents = _read_file(Path(source).expanduser())
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise DataError(f"text '{source}' is empty; give a source with at least one block of text")
    return documents


def read_rows(source: str) -> list[Row]:
    """Rows of one table, in order.

    Args:
        source: ``hub:NAME[:CONFIG]:SPLIT``, or a local file: ``.json`` (a list of objects), ``.jsonl`` (an object per
            line) or ``.parquet``.

    Raises:
        DataError: If the file is missing, empty or malformed (with the line), or the data set cannot be reached.
    """
    if source.startswith("hub:"):
        values = _load_hub(source.removeprefix("hub:"), "data set")
        rows = [Row(dict(value), f"row {number}") for number, value in enumerate(values, start=1)]
    else:
        rows = _read_table(Path(source).expanduser())
    if not rows:
        raise DataError(f"file '{source}' has no rows; give one with at least one object")
    return rows


def _read_file(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"text file '{path}' does not exist; give an existing .txt, .jsonl or .parquet file")
    if path.suffix == ".parquet":
        return _texts_of_parquet(path)
    text = _content(path, "text file")
    return _texts_of_lines(text, path) if path.suffix == ".jsonl" else [text]


def _content(path: Path, kind: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{kind} '{path}' cannot be read ({error}); give a readable UTF-8 file") from error


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


def _load_hub(spec: str, kind: str, column: str | None = None) -> list[Any]:
    """Rows of a data set, or the values of one column."""
    import datasets

    parts = spec.split(":")
    if len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"{kind} 'hub:{spec}' is malformed; write hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT")
    try:
        loaded = datasets.load_dataset(*parts[:-1], split=parts[-1])
        return list(loaded if column is None else loaded[column])
    except Exception as error:  # network, name, configuration and column errors have no common base in `datasets`
        raise DataError(
            f"{kind} 'hub:{spec}' cannot be loaded ({reason_of(error)}); check the name and the network, or give a file"
        ) from error


def _read_table(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"file '{path}' does not exist; give an existing .json, .jsonl or .parquet file")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            values = pyarrow.parquet.read_table(path).to_pylist()
        except Exception as error:  # pyarrow raises many kinds
            raise DataError(f"file '{path}' is no readable table ({reason_of(error)})") from error
        return [Row(value, f"row {number}") for number, value in enumerate(values, start=1)]
    text = _content(path, "file")
    numbered = _objects_of_lines(text, path) if path.suffix == ".jsonl" else _objects_of_list(text, path)
    rows = []
    for number, value in numbered:
        if not isinstance(value, dict):
            raise DataError(f"file '{path}', line {number}: a {type(value).__name__}; it must be a JSON object")
        rows.append(Row(value, f"line {number}"))
    return rows


def _objects_of_lines(text: str, path: Path) -> list[tuple[int, Any]]:
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataError(f"file '{path}', line {number}: not JSON ({error})") from error
    return values


def _objects_of_list(text: str, path: Path) -> list[tuple[int, Any]]:
    """The elements of a JSON list with the lines that they begin on, which ``json.loads`` would not tell."""
    separator = re.compile(r"[\s,]*")
    try:
        whole = json.loads(text)  # says what is wrong with a malformed file, and where
    except json.JSONDecodeError as error:
        raise DataError(f"file '{path}', line {error.lineno}: not JSON ({error.msg})") from error
    if not isinstance(whole, list):
        raise DataError(f"file '{path}' holds a {type(whole).__name__}; it must hold a list of objects")
    decoder, values, line, counted, position = json.JSONDecoder(), [], 1, 0, text.index("[") + 1
    for _ in whole:
        found = separator.match(text, position)
        assert found is not None  # the pattern matches nothing too
        line += text.count("\n", counted, found.end())
        counted = found.end()
        value, position = decoder.raw_decode(text, counted)
        values.append((line, value))
    return values
