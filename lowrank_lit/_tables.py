"""Plain text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first a heading, as aligned columns; a column of numbers is aligned to the right.

    Examples:
        >>> print(table([["name", "size"], ["a", "1.5"], ["bcd", "10.0"]]))
        name  size
        a      1.5
        bcd   10.0
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [
        len(rows) > 1 and all(row[column][:1].isdigit() for row in rows[1:] if row[column])
        for column in range(len(rows[0]))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def gibibytes(count: int) -> str:
    """A number of bytes for people.

    Examples:
        >>> gibibytes(512), gibibytes(3 * 2**20), gibibytes(13 * 2**30)
        ('0.50 KiB', '3.00 MiB', '13.00 GiB')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 1024:.2f} KiB"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The same rows as a table of Markdown; all columns but the first are aligned to the right.

    Examples:
        >>> print(markdown([["name", "size"], ["a", "1.5"]]))
        | name | size |
        | --- | ---: |
        | a | 1.5 |
    """
    lines = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
