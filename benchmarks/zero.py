"""DeepSpeed's ZeRO on two processes against one process: loss curves, seconds a step, a killed and resumed job.

Run from the repository's root; needs DeepSpeed and bitsandbytes, but no GPU:

    python benchmarks/zero.py            # measure what is missing; resumable
    python benchmarks/zero.py --table    # Markdown tables of it

Model: a Llama of one layer with random weights (hidden size 256, intermediate 384, 4 heads of 64, vocabulary 96),
compressed to keep ratio 0.5 with the metric `identity` and ranks of 64. Recoveries: `lora` of rank 4 on both factors,
`qlora` the same with factors in NF4, `factors` all numbers of the factors. AdamW, 2 warm-up steps, gradients clipped to
1, 4 rows of 12 tokens a step in all processes together, a validation in the middle. Every process has one thread; both
runs have the same global batches. The difference is the greatest of |loss - loss of one process| / loss of one process
over the steps; the seconds are the median over the steps, with what else the machine does. Losses are of random tokens:
the curves are to be compared, not to be admired.

`killed`: one of two processes under stage 3 gets SIGKILL at 70 % of the steps; seconds until the job has ended by
itself, its exit status, and the greatest difference of the steps after the resume from those of the job that was not
killed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.scripts.zero_fit import RECOVERIES, save_model, start  # noqa: E402

STAGES = (1, 2, 3)


def results(folder: Path) -> dict[str, Any]:
    """What the first process of a fit measured."""
    found: dict[str, Any] = json.loads((folder / "result-0.json").read_text())
    return found


def difference(one: list[float], other: list[float]) -> float:
    """Greatest relative difference of a loss."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


class Bench:
    """Fits of one number of steps in one folder."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.steps = options.steps
        self.kinds = options.kinds.split(",")
        self.folder = (Path(options.folder) / f"{options.steps}-steps").resolve()
        self.common = {"model": str(self.folder / "model"), "steps": self.steps, "validate_every": self.steps // 2}
        self.every = max(1, self.steps // 5)

    def fit(self, name: str, **settings: Any) -> dict[str, Any]:
        """Settings of a fit for the job."""
        return {"folder": str(self.folder / name), **self.common, **settings}

    def run(self, name: str, fits: list[dict[str, Any]], processes: int) -> None:
        """One job, unless all its results are there."""
        if all(Path(fit["folder"], "result-0.json").is_file() for fit in fits):
            return
        if not (self.folder / "model").is_dir():
            save_model(self.folder / "model")
        if status := start(self.folder / f"job-{name}", fits, processes, timeout=7200):
            log = (self.folder / f"job-{name}" / "job.log").read_text()
            raise SystemExit(f"the job {name} ended with status {status}:\n{log[-3000:]}")

    def curves(self, done: set[str]) -> Iterator[dict[str, Any]]:
        """Every stage and recovery that is not done."""
        for kind in self.kinds:
            keys = {stage: json.dumps(["curve", kind, stage, self.steps]) for stage in STAGES}
            if all(key in done for key in keys.values()):
                continue
            self.run(f"one-{kind}", [self.fit(f"one-{kind}", kind=kind)], 1)
            alone = results(self.folder / f"one-{kind}")
            stages = [
                self.fit(f"stage-{stage}-{kind}", kind=kind, stage=stage, save_every=self.every) for stage in keys
            ]
            self.run(f"two-{kind}", stages, 2)
            for stage, key in keys.items():
                together = results(self.folder / f"stage-{stage}-{kind}")
                if key in done:
                    continue
                yield {
                    "key": key,
                    "part": "curve",
                    "kind": kind,
                    "stage": stage,
                    "steps": self.steps,
                    "first": alone["losses"][0],
                    "last": alone["losses"][-1],
                    "difference": difference(alone["losses"], together["losses"]),
                    "validation": difference(alone["validation"], together["validation"]),
                    "seconds": median(together["seconds"]),
                    "seconds_one": median(alone["seconds"]),
                }

    def killed(self, done: set[str]) -> Iterator[dict[str, Any]]:
        """A job of which one process is killed, and its resumption; of every recovery."""
        for kind in self.kinds:
            key = json.dumps(["killed", kind, self.steps])
            if key in done:
                continue
            whole = self.fit(f"stage-3-{kind}", kind=kind, stage=3, save_every=self.every)
            self.run(f"stage-3-{kind}", [whole], 2)
            killed = {**whole, "folder": str(self.folder / f"killed-{kind}")}
            at = self.steps * 7 // 10
            job = self.folder / f"job-killed-{kind}"
            status = start(job, [{**killed, "kill_at": at, "processes": 2}], 2, launcher=False, timeout=7200)
            seconds = time.time() - float(Path(killed["folder"], "killed").read_text())
            self.run(f"resumed-{kind}", [{**killed, "resume": True}], 2)
            resumed, reference = results(Path(killed["folder"])), results(Path(whole["folder"]))
            count = len(resumed["losses"])
            yield {
                "key": key,
                "part": "killed",
                "kind": kind,
                "steps": self.steps,
                "killed_at": at,
                "status": status,
                "seconds": seconds,
                "resumed_at": self.steps - count,
                "difference": difference(reference["losses"][-count:], resumed["losses"]),
            }


def show(entries: list[dict[str, Any]]) -> None:
    """Tables of both parts."""
    curves = [entry for entry in entries if entry["part"] == "curve"]
    if curves:
        print("\n**Two processes of ZeRO against one process**\n")
        print("| recovery | stage | steps | loss, first to last | greatest difference | of the validation ", end="")
        print("| seconds a step, two processes | one process |\n|---|---|---|---|---|---|---|---|")
    for e in sorted(curves, key=lambda entry: (entry["steps"], RECOVERIES.index(entry["kind"]), entry["stage"])):
        print(f"| {e['kind']} | {e['stage']} | {e['steps']} | {e['first']:.2f} to {e['last']:.2f} ", end="")
        print(f"| {e['difference']:.1e} | {e['validation']:.1e} | {e['seconds']:.3f} | {e['seconds_one']:.3f} |")
    killed = [entry for entry in entries if entry["part"] == "killed"]
    if killed:
        print("\n**One of two processes killed, stage 3**\n")
        print("| recovery | killed at step | job ended after | exit status | resumed at step | greatest difference |")
        print("|---|---|---|---|---|---|")
    for e in killed:
        print(f"| {e['kind']} | {e['killed_at']} of {e['steps']} | {e['seconds']:.0f} s | {e['status']} ", end="")
        print(f"| {e['resumed_at']} | {e['difference']:.1e} |")


def main() -> None:
    """Measure what the output does not hold yet, or print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/zero.jsonl", help="JSON lines; what is measured is kept")
    parser.add_argument("--folder", default="runs/bench/zero", help="of the fits")
    parser.add_argument("--parts", default="curves,killed")
    parser.add_argument("--kinds", default=",".join(RECOVERIES), help="ways of recovery")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--table", action="store_true", help="print the tables of the output")
    options = parser.parse_args()
    output = Path(options.output)
    entries = [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []
    if options.table:
        show(entries)
        return
    done = {entry["key"] for entry in entries}
    output.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for part in options.parts.split(","):
        for entry in getattr(bench, part)(done):
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            print({key: value for key, value in entry.items() if key != "key"}, flush=True)


if __name__ == "__main__":
    main()
