"""The sweep: its grid, one pass for all cells, what is kept and continued, and the table and the picture of it."""

from __future__ import annotations

import copy
import csv
import json
import math
import statistics
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit import compress, perplexity
from lowrank_lit._sweep import draws_of, grid_of, overlap, plot_sweep, write_tables
from lowrank_lit.compress import Study
from lowrank_lit.data import TextDataModule
from lowrank_lit.errors import LowRankError, NonFiniteError
from lowrank_lit.report import prediction
from lowrank_lit.settings import PRESETS, Settings
from lowrank_lit.sweep import CellStore, Grid, Row, Sweep, collect, preset_of
from tests.tiny import batches, tiny_model

COMMON = {"min_rank": 2}
SMALL = Grid([0.7, 0.5], ["input"], ["uniform", "unirank"], common=COMMON)


@pytest.fixture(autouse=True)
def _few_tokens_are_fine() -> None:
    warnings.filterwarnings("ignore", message="calibration has")


def blocks() -> Tensor:
    return torch.cat([batch["input_ids"] for batch in batches(n=2, seed=9, structured=True)])


def draws(count: int = 1) -> dict[int, list[dict[str, Tensor]]]:
    return {seed: batches(n=3, seed=seed, structured=True) for seed in range(count)}


def sweep_in(folder: Path, model: nn.Module | None = None, count: int = 1) -> Sweep:
    return Sweep(model or tiny_model("llama"), blocks(), draws(count), CellStore(folder / "cells.jsonl"), batch_size=4)


def lines(folder: Path) -> list[str]:
    return (folder / "cells.jsonl").read_text().splitlines()


# --- the grid ---


def test_the_default_grid_is_the_presets_axes() -> None:
    cells = grid_of().cells()
    assert len(cells) == (2 * 3 + 1) * 3
    assert {(cell.metric, cell.allocator) for cell in cells} == {
        (metric, allocator) for metric in ("input", "two_sided") for allocator in ("uniform", "unirank", "knapsack")
    }
    assert {cell.keep_ratio for cell in cells} == {0.8, 0.6, 0.4}
    assert [preset_of(cell) for cell in cells if cell.feedback != "none"] == ["best"] * 3
    assert not any(cell.select for cell in cells if preset_of(cell) != "best"), "closed form"


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"metric": ["input,two_sided", "identity"], "allocator": ["uniform"]}, 3 * 3),
        ({"metric": ["input"], "keep_ratio": ["0.5", "0.7,0.5"]}, 3 * 2),
        ({"preset": ["best,fast", "unirank"]}, 3 * 3),
        ({"preset": ["unirank"], "metric": ["input"], "allocator": ["unirank"]}, 3),  # one and the same
        ({"storage": ["factored,pivot"], "keep_ratio": ["0.5"]}, (2 * 3 + 1) * 2),
        ({"feedback": ["none,recollect,anchored"], "metric": ["input"], "allocator": ["unirank"]}, 3 * 3),
    ],
)
def test_axes_are_repeated_or_separated_by_commas(options: dict[str, list[str]], count: int) -> None:
    cells = grid_of(**options).cells()
    assert len(cells) == count
    assert len({str(cell.resolved()) for cell in cells}) == count


def test_feedback_gets_the_rounds_of_the_best_preset() -> None:
    cells = grid_of(feedback=["recollect"], metric=["two_sided"], allocator=["knapsack"]).cells()
    assert {cell.rounds for cell in cells} == {PRESETS["best"]["rounds"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": ["inpt"]}, "metric='inpt' is unknown; choose one of identity, input"),
        ({"allocator": ["uniform,knapsak"]}, "allocator='knapsak' is unknown; choose one of uniform"),
        ({"feedback": ["anchor"]}, "feedback='anchor' is unknown; choose one of none, recollect, anchored"),
        ({"storage": ["dense"]}, "storage='dense' is unknown; choose one of factored, pivot"),
        ({"preset": ["worst"]}, "preset='worst' is unknown; choose one of best, fast, unirank"),
        ({"keep_ratio": ["0.8;0.6"]}, "'0.8;0.6' is no number"),
        ({"keep_ratio": ["1.5"]}, "keep_ratio=1.5 is outside"),
        ({"metric": [","]}, "option '--metric' is empty"),
    ],
)
def test_unknown_names_list_the_choices(options: dict[str, list[str]], message: str) -> None:
    with pytest.raises(LowRankError) as caught:
        grid_of(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- measuring ---


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "unirank", "metric": "two_sided", "allocator": "knapsack"},
        {"preset": "unirank", "storage": "pivot"},
        {"preset": "best"},
    ],
)
def test_a_cell_is_what_compress_makes(settings: dict[str, Any], tmp_path: Path) -> None:
    axes = {"storages": [settings["storage"]]} if "storage" in settings else {}
    closed = {"metrics": ["two_sided"], "allocators": ["knapsack"]} if "metric" in settings else {}
    named = {} if closed else {"presets": [settings["preset"]]}
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    sweep = sweep_in(tmp_path, model)
    (row,) = sweep.run(Grid([0.6], common=COMMON, **axes, **closed, **named))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is as it was"
    assert row.dense_perplexity == pytest.approx(perplexity(model, blocks()), rel=1e-6)
    result = compress(model, draws()[0], keep_ratio=0.6, **settings, **COMMON)
    measured = perplexity(model, blocks())
    assert row.perplexity == pytest.approx(measured, rel=1e-3)  # measured: 1e-6
    assert abs(measured / row.dense_perplexity - 1) > 0.01, "or any cell would agree"
    record = result.record
    assert (row.achieved, row.whole_model) == (record["keep_ratio"]["achieved"], record["keep_ratio"]["whole_model"])
    assert row.bytes == record["bytes"]["compressed"]
    assert row.predicted == pytest.approx(result.plan.predicted_nats)
    assert row.excess == pytest.approx(math.log(measured) - math.log(row.dense_perplexity), abs=1e-3)


def test_one_pass_serves_all_cells() -> None:
    cells = grid_of(metric=["identity,input,two_sided,fisher_input"], keep_ratio=["0.6"]).cells()
    study = Study(tiny_model("llama"), draws()[0])
    collect(study, cells)
    assert len(study._calibrations) == 1
    for cell in cells:
        assert study.draft(cell).passes["forward"] == 0, cell
    assert len(study._calibrations) == 1
    other = Study(tiny_model("llama"), draws()[0])
    collect(other, [*cells, Settings(0.6, preset="unirank", allocator="zero_sum")])
    assert [labels for _, _, labels, _ in other._calibrations] == ["model", "text"], "zero_sum has labels of its own"


def test_draws_give_a_spread(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path, count=3)
    rows = sweep.run(SMALL)
    entries = [json.loads(line) for line in lines(tmp_path)]
    assert len(entries) == 4 * 3
    assert sweep.calibration_seconds.keys() == {0, 1, 2}
    for row in rows:
        own = [entry["perplexity"] for entry in entries if entry["settings"] == row.settings]
        assert row.seeds == (0, 1, 2)
        assert row.perplexity == pytest.approx(statistics.fmean(own))
        assert row.spread == pytest.approx(statistics.stdev(own))
        assert 0 < row.spread < row.perplexity / 2
    assert [(row.label, row.settings["keep_ratio"]) for row in rows] == [
        (label, ratio) for label in ("input + uniform", "preset unirank") for ratio in (0.7, 0.5)
    ]


# --- what is kept ---


def test_a_second_run_measures_what_is_missing(tmp_path: Path) -> None:
    first = sweep_in(tmp_path)
    few = first.run(Grid([0.7], ["input"], ["uniform"], common=COMMON))
    assert (len(few), len(lines(tmp_path))) == (1, 1)
    more = sweep_in(tmp_path)
    rows = more.run(SMALL)
    assert (len(rows), len(lines(tmp_path))) == (4, 4)
    assert rows[0] == few[0]
    again = sweep_in(tmp_path)
    seen: list[dict[str, Any]] = []
    assert again.run(SMALL, seen.append) == rows
    assert (len(seen), len(lines(tmp_path)), again.calibration_seconds) == (4, 4, {})
    assert again.run(Grid([0.7], ["input"], ["uniform"], common=COMMON)) == rows, "rows of earlier grids stay"
    assert len(again.run(Grid([0.7], ["input"], ["uniform"], common={"min_rank": 4}))) == 1, "other settings do not"


def test_interrupted_and_continued_is_the_same_as_in_one_go(tmp_path: Path) -> None:
    def stop(entry: dict[str, Any]) -> None:
        if entry["settings"]["allocator"] == "unirank":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep_in(tmp_path / "a", count=2).run(SMALL, stop)
    assert len(lines(tmp_path / "a")) == 3
    file = tmp_path / "a" / "cells.jsonl"
    file.write_text(file.read_text()[:-40])  # killed in the middle of a line
    rows = sweep_in(tmp_path / "a", count=2).run(SMALL)
    whole = sweep_in(tmp_path / "b", count=2).run(SMALL)
    assert [(row.settings, row.perplexity, row.spread) for row in rows] == [
        (row.settings, row.perplexity, row.spread) for row in whole
    ]
    assert len(lines(tmp_path / "a")) == 8 + 1, "the torn line stays, and is skipped"


def test_another_model_or_text_is_measured_anew(tmp_path: Path) -> None:
    grid = Grid([0.6], ["identity"], ["uniform"], common=COMMON)
    (row,) = sweep_in(tmp_path).run(grid)
    (other,) = sweep_in(tmp_path, tiny_model("llama", seed=1)).run(grid)
    assert other.perplexity != row.perplexity
    text = Sweep(tiny_model("llama"), blocks()[:2], draws(), CellStore(tmp_path / "cells.jsonl"))
    (third,) = text.run(grid)
    drawn = Sweep(tiny_model("llama"), blocks(), {0: batches(seed=5)}, CellStore(tmp_path / "cells.jsonl"))
    drawn.run(grid)
    assert third.dense_perplexity != row.dense_perplexity
    assert len(lines(tmp_path)) == 4


def test_a_failing_cell_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    grid = Grid([0.6, 0.01], ["input"], ["uniform"], common=COMMON)
    good, bad = sweep_in(tmp_path).run(grid)
    assert good.perplexity is not None
    assert not good.error
    assert bad.perplexity is None
    assert "keep_ratio=0.01" in bad.error
    assert json.loads(lines(tmp_path)[1])["error"] == bad.error
    sweep_in(tmp_path).run(grid)
    assert len(lines(tmp_path)) == 3, "a failed cell is tried again"


def test_bad_weights_stop_the_sweep(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        sweep_in(tmp_path, model).run(SMALL)


# --- draws, table, picture ---


def test_draws_of_a_datamodule(tokenizer_folder: Path) -> None:
    sizes = {"block_size": 32, "batch_size": 4, "calibration_blocks": 6}
    sources = {"calibration": "embedded:validation", "test": "embedded:test"}
    data = TextDataModule(sources, str(tokenizer_folder), **sizes)
    found = draws_of(data, 3)
    assert list(found) == [0, 1, 2]
    joined = {seed: torch.cat([batch["input_ids"] for batch in draw]) for seed, draw in found.items()}
    assert torch.equal(joined[0], data.blocks("calibration")[:6])
    assert all(rows.shape == (6, 32) for rows in joined.values())
    assert not torch.equal(joined[1], joined[2])
    seeded = TextDataModule(sources, str(tokenizer_folder), calibration_seed=1, **sizes)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in seeded.calibration_batches()]), joined[1])
    assert list(draws_of(seeded, 3)) == [1, 2, 3], "no draw twice"
    share = overlap(found)
    assert share is not None
    assert 0 <= share < 0.5
    assert overlap({0: found[0], 1: found[0]}) == 1
    assert overlap({0: found[0]}) is None


def row(label: str, keep: float, value: float | None, **changes: Any) -> Row:
    metric, allocator = label.split("+")
    settings = {"metric": metric, "allocator": allocator, "feedback": "none", "rounds": 1, "select": False}
    figures: dict[str, Any] = {"achieved": keep - 0.001, "whole_model": keep, "bytes": int(1e6 * keep), "seconds": 1.5}
    known = {} if value is None else {**figures, "perplexity": value, "spread": 0.1 * value, "excess": 0.2}
    return Row({**settings, "storage": "factored", "keep_ratio": keep}, "", metric, (0, 1), 10.0, **(known | changes))


def test_table_and_csv_hold_every_figure(tmp_path: Path) -> None:
    rows = [row("input+uniform", 0.6, 1 / 3 + 12), row("input+uniform", 0.4, None, error="too small | really")]
    paths = write_tables(tmp_path, rows, "first sentence\nsecond sentence")
    assert [path.name for path in paths] == ["sweep.csv", "sweep.md"]
    first, second = csv.DictReader(paths[0].open())
    assert float(first["perplexity"]) == 1 / 3 + 12, "in full"
    assert (first["metric"], first["allocator"], first["keep_ratio"]) == ("input", "uniform", "0.6")
    assert (first["achieved_keep_ratio"], first["bytes"], first["seeds"]) == ("0.599", "600000", "0 1")
    assert (second["perplexity"], second["error"]) == ("", "too small | really")
    text = paths[1].read_text()
    assert "| 12.333 ± 1.2 |" in text
    assert "second sentence" in text
    assert "Failed: input + uniform, keep ratio 0.4: too small" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 4


def test_picture_leaves_out_what_is_infinite(tmp_path: Path) -> None:
    rows = [row(f"{name}+uniform", keep, 20 / keep) for name in ("input", "two_sided") for keep in (0.4, 0.8)]
    plot_sweep(rows, tmp_path / "a.png", title="t")
    plot_sweep([*rows, row("corda+uniform", 0.4, math.inf, spread=None)], tmp_path / "b.png", title="t")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plot_sweep(rows[:3], tmp_path / "c.png", title="t")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    plot_sweep([], tmp_path / "empty.png", title="t")


def test_predicted_beside_measured() -> None:
    found = prediction({"nats": 0.1, "perplexity_ratio": math.exp(0.1)}, {"dense": 10.0, "compressed": 12.0})
    assert found is not None
    assert found["measured_nats"] == pytest.approx(math.log(1.2))
    assert "estimate" in found["kind"]
    assert prediction(None, {"dense": 10.0, "compressed": 12.0}) is None
    unmeasured = prediction({"nats": 0.1, "perplexity_ratio": 1.1}, {})
    assert unmeasured is not None
    assert unmeasured["measured_nats"] is None
