"""Every supported family x what transformers, PEFT and torch do with a model, as a Markdown table.

    python benchmarks/families.py [--families Llama,T5] [--cells compress,load] [--debug]

Tiny models with random weights, on the CPU. A cell says "works", or the reason why not; the cells are the tests of
tests/test_families.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import logging

from tests.families import CELLS, FAMILIES, WORKS, Workbench, adapts


def measured(bench: Workbench, name: str, cell: str, *, debug: bool) -> str:
    """What a cell says."""
    try:
        return CELLS[cell](bench, name)
    except Exception as error:
        if debug:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"FAILS: {lines[-1][:160]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--debug", action="store_true", help="stop with a traceback at the first cell that fails")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cells = asked.cells.split(",")
    failed = 0
    print(f"| family | {' | '.join(cells)} |\n|{'---|' * (len(cells) + 1)}")
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(Path(folder))
        names = asked.families.split(",")
        adapted = adapts(bench, names) if "PEFT" in cells else {}  # one process for all
        for name in names:
            row = [adapted[name] if c == "PEFT" else measured(bench, name, c, debug=asked.debug) for c in cells]
            failed += sum(not text.startswith(WORKS) for text in row)
            print(f"| {name} | {' | '.join(row)} |", flush=True)
    print(f"\n{failed} of {len(cells) * len(asked.families.split(','))} cells do not work.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
