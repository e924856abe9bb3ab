"""All benchmarks of speed by one command, and their tables in RESULTS.md: `make bench`, `make bench-smoke`.

    python benchmarks/bench.py            # measures; writes benchmarks/speed_*.json and the tables of RESULTS.md
    python benchmarks/bench.py --smoke    # tiny sizes, to see that everything runs; writes nothing

A table stands between ``<!-- bench: NAME -->`` and ``<!-- bench: end -->``; what is around it is written by hand.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "RESULTS.md"
SCRIPTS = {"compression": ("--out", "--from"), "inference": ("--output", "--output")}
"""Benchmarks, and how each is told which file of JSON to write, and, with ``--table``, which to read."""


def replaced(text: str, name: str, table: str) -> str:
    """The text with a new table between the marks of a name.

    Raises:
        ValueError: If the marks are not there exactly once.
    """
    pattern = re.compile(rf"(<!-- bench: {name} -->\n).*?(<!-- bench: end -->)", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(
            f"{RESULTS.name} has no single part between `<!-- bench: {name} -->` and `<!-- bench: end -->`"
        )
    return pattern.sub(lambda found: f"{found[1]}{table.strip()}\n{found[2]}", text)


def main() -> None:
    """Run the benchmarks one after the other: each on a quiet machine, as far as this script can see to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; writes nothing")
    parser.add_argument("--only", choices=list(SCRIPTS), nargs="+", default=list(SCRIPTS))
    options = parser.parse_args()
    for name in options.only:
        script = [sys.executable, str(HERE / f"{name}.py")]
        if options.smoke:
            subprocess.run([*script, "--smoke"], check=True)
            continue
        replaced(RESULTS.read_text(encoding="utf-8"), name, "")  # before minutes are spent
        (writes, reads), file = SCRIPTS[name], str(HERE / f"speed_{name}.json")
        subprocess.run([*script, writes, file], check=True)
        table = subprocess.run([*script, reads, file, "--table"], check=True, stdout=subprocess.PIPE, text=True).stdout
        RESULTS.write_text(replaced(RESULTS.read_text(encoding="utf-8"), name, table), encoding="utf-8")
        print(table)


if __name__ == "__main__":
    main()
