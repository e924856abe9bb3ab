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
from lowrank_lit._prediction import predicted_plan, show_prediction
from lowrank_lit._session import build
from lowrank_lit._sweep import common_of, draws_of, grid_of, overlap, plot_sweep, write_tables
from lowrank_lit.cli import main
from lowrank_lit.data import TextDataModule
from lowrank_lit.errors import LowRankError, NonFiniteError
from lowrank_lit.plan import RankPlan
from lowrank_lit.report import prediction
from lowrank_lit.settings import PRESETS, Settings
from lowrank_lit.study import Study
from lowrank_lit.surgery import stored_bytes
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
    assert len(study.collection._calibrations) == 1
    for cell in cells:
        assert study.draft(cell).passes["forward"] == 0, cell
    assert len(study.collection._calibrations) == 1
    other = Study(tiny_model("llama"), draws()[0])
    collect(other, [*cells, Settings(0.6, preset="unirank", allocator="zero_sum")])
    assert [labels for _, _, labels, _ in other.collection._calibrations] == ["model", "text"], (
        "zero_sum has labels of its own"
    )


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


def test_failed_cells_of_earlier_grids_are_told_apart(tmp_path: Path) -> None:
    sweep_in(tmp_path).run(Grid([0.6, 0.01], ["input"], ["uniform"], common=COMMON))
    grid = Grid([0.6], ["input"], ["uniform"], common=COMMON)
    rows = sweep_in(tmp_path).run(grid)
    assert [(row.settings["keep_ratio"], bool(row.error), grid.holds(row)) for row in rows] == [
        (0.6, False, True),
        (0.01, True, False),
    ]


def test_what_does_not_converge_is_a_failed_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The eigenvalue solver fails the first time, with an error of torch's own."""
    solve, failed = torch.linalg.eigh, []

    def eigh(matrix: Tensor, **options: Any) -> Any:
        if not failed:
            failed.append(True)
            torch.linalg.cholesky(-torch.eye(2))
        return solve(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    bad, good = sweep_in(tmp_path).run(Grid([0.6], ["input", "identity"], ["uniform"], common=COMMON))
    assert "not positive-definite" in bad.error
    assert "\n" not in bad.error
    assert good.perplexity is not None


@pytest.mark.parametrize("storage", ["factored", "pivot"])
def test_bytes_follow_the_storage_type(tmp_path: Path, storage: str) -> None:
    grid, store = Grid([0.6], ["input"], ["uniform"], storages=[storage], common=COMMON), tmp_path / "cells.jsonl"
    (row,) = sweep_in(tmp_path).run(grid)
    half = Sweep(tiny_model("llama"), blocks(), draws(), CellStore(store), dtype=torch.bfloat16)
    (other,) = half.run(grid)
    assert len(lines(tmp_path)) == 1, "nothing is measured again"
    model = tiny_model("llama")
    compress(model, draws()[0], keep_ratio=0.6, preset="unirank", allocator="uniform", storage=storage, **COMMON)
    assert (row.bytes, other.bytes) == (stored_bytes(model), stored_bytes(model, torch.bfloat16))


def test_rows_say_how_many_draws_they_have(tmp_path: Path) -> None:
    sweep_in(tmp_path).run(Grid([0.7], ["input"], ["uniform"], common=COMMON))
    few, many = sweep_in(tmp_path, count=2).run(Grid([0.5], ["input"], ["uniform"], common=COMMON))
    assert (few.seeds, few.spread) == ((0,), None)
    assert many.seeds == (0, 1)
    assert many.spread is not None


def test_bad_weights_stop_the_sweep(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        sweep_in(tmp_path, model).run(SMALL)


# --- the recipe's settings ---


@pytest.mark.parametrize(("labels", "kept"), [({}, "model"), ({"labels": "none"}, "none")])
def test_the_recipes_allocator_does_not_choose_the_labels_of_all(
    tmp_path: Path, labels: dict[str, str], kept: str
) -> None:
    compression = {"keep_ratio": 0.6, "preset": "unirank", "allocator": "zero_sum", "min_rank": 3, **labels}
    entry = {"class_path": "lowrank_lit.callbacks.LowRankCompression", "init_args": compression}
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "callbacks": [entry]}
    settings = {
        "trainer": {**trainer, "enable_checkpointing": False, "default_root_dir": str(tmp_path)},
        "model": {"model": "nowhere"},
        "data": {"sources": {"train": "nowhere.txt"}, "tokenizer": "nowhere"},
    }
    cli = build(Path("recipe.yaml"), settings)
    common = common_of(cli, Path("recipe.yaml"))
    assert (common["labels"], common["min_rank"]) == (kept, 3)
    (cell,) = Grid([0.6], ["input"], ["zero_sum"], common=common).cells()
    assert cell.labels == "text", "a cell of its own keeps them"


@pytest.fixture
def recipe(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A recipe for the default preset with one batch of calibration text, which is too little for a refit."""
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "model")
    entry = {"class_path": "lowrank_lit.callbacks.LowRankCompression", "init_args": {"keep_ratio": 0.6, "min_rank": 2}}
    content = {
        "trainer": {
            "default_root_dir": str(tmp_path / "out"),
            **{"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False},
            "callbacks": [entry],
        },
        "model": {"model": str(tmp_path / "model")},
        "data": {
            "sources": {"calibration": "embedded:validation", "test": "embedded:test"},
            "tokenizer": str(tokenizer_folder),
            **{"block_size": 32, "batch_size": 4, "calibration_blocks": 1, "evaluation_blocks": 4},
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    return tmp_path / "recipe.yaml"


def test_commands_tell_fallbacks_and_fail_for_their_own_cells(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ["--metric=input", "--allocator=uniform", "--feedback=anchored", "--seeds=1"]
    assert main(["sweep", str(recipe), *axes, "--keep-ratio=0.6,0.001"]) == 1
    assert "failed: input + uniform, anchored, keep ratio 0.001" in capsys.readouterr().out
    assert main(["sweep", str(recipe), *axes, "--keep-ratio=0.6"]) == 0
    assert "failed:" not in capsys.readouterr().out
    text = (tmp_path / "out/sweep/sweep.md").read_text()
    assert "feedback='anchored' was left out" in text
    assert "measure candidate plans (select true); rows of a metric and an allocator by name do not" in text
    assert "Common settings: targets all; min_rank 2; quantum 1; damping" in text
    assert "labels model" in text
    assert main(["plan", str(recipe)]) == 0
    out = capsys.readouterr().out.splitlines()
    notes = RankPlan.load(tmp_path / "out/plan.json").notes
    assert any("was left out" in note for note in notes)
    assert [line.removeprefix("note: ") for line in out if line.startswith("note: ")] == list(notes)


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
    known = {"seeds": (0, 1), **known, **changes}
    return Row({**settings, "storage": "factored", "keep_ratio": keep}, "", metric, dense_perplexity=10.0, **known)


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
    assert "| 1.50 | 2 |  |" in text, "draws and no notes"
    assert "second sentence" in text
    assert "Failed: input + uniform, keep ratio 0.4: too small" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 4


def test_notes_and_draws_stand_in_the_tables(tmp_path: Path) -> None:
    told = [f"anchored refit: {count} of 12 blocks fitted, mean beta {beta}" for count, beta in ((3, 0.5), (11, 0.25))]
    rows = [
        row("input+uniform", 0.6, 12.0, notes=("no gradients: loss of 'layers.1' is NaN", told[0])),
        row("input+uniform", 0.4, 14.0, notes=(told[1],), seeds=(1,), spread=None),
        row("corda+uniform", 0.4, 14.0, notes=("no gradients: loss of 'layers.2' is NaN",)),
    ]
    paths = write_tables(tmp_path, rows, "protocol")
    found = list(csv.DictReader(paths[0].open()))
    assert [(line["draws"], line["seeds"]) for line in found] == [("2", "0 1"), ("1", "1"), ("2", "0 1")]
    assert found[0]["notes"] == f"no gradients: loss of 'layers.1' is NaN | {told[0]}", "in full"
    text = paths[1].read_text()
    ends = [[cell.strip() for cell in line.split("|")][-3:-1] for line in text.splitlines() if line.startswith("|")]
    assert [ends[0], *ends[2:]] == [["draws", "notes"], ["2", "1 2"], ["1", "2"], ["2", "3"]]
    assert "note 2: anchored refit: 3 to 11 of 12 blocks fitted, mean beta 0.25 to 0.5\n" in text
    assert "note 3: no gradients: loss of 'layers.2' is NaN\n" in text, "a number in a name is no figure"


def test_a_fallback_is_told_in_its_row(tmp_path: Path) -> None:
    alone = {0: batches(n=1, batch=1, structured=True)}
    grid = Grid([0.6], ["input"], ["uniform"], ["none", "anchored"], common=COMMON)
    plain, anchored = Sweep(tiny_model("llama"), blocks(), alone, CellStore(tmp_path / "cells.jsonl")).run(grid)
    assert any("anchored' was left out" in note for note in anchored.notes)
    assert not any("anchored" in note for note in plain.notes)
    text = write_tables(tmp_path, [plain, anchored], "protocol")[1].read_text()
    (number,) = [line.split()[1][0] for line in text.splitlines() if line.startswith("note") and "left out" in line]
    marked = [line.split("|")[-2].split() for line in text.splitlines() if line.startswith("| input")]
    assert [number in marks for marks in marked] == [False, True]


def test_picture_leaves_out_what_is_infinite(tmp_path: Path) -> None:
    rows = [row(f"{name}+uniform", keep, 20 / keep) for name in ("input", "two_sided") for keep in (0.4, 0.8)]
    plot_sweep(rows, tmp_path / "a.png", title="t")
    plot_sweep([*rows, row("corda+uniform", 0.4, math.inf, spread=None)], tmp_path / "b.png", title="t")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    plot_sweep(rows[:3], tmp_path / "c.png", title="t")
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    plot_sweep([], tmp_path / "empty.png", title="t")


@pytest.mark.parametrize(("feedback", "basis"), [("none", "of the dense model"), ("recollect", "of the round that")])
def test_a_plans_prediction_names_its_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], feedback: str, basis: str
) -> None:
    settings = Settings(0.6, metric="two_sided", allocator="knapsack", feedback=feedback, select=False, **COMMON)
    planned = predicted_plan(tiny_model("llama"), draws()[0], settings)
    on_the_line = dict(planned.points)[0.6] == pytest.approx(planned.plan.predicted_nats, rel=1e-6)
    assert on_the_line == (feedback == "none")
    show_prediction(planned, tmp_path)
    out = capsys.readouterr().out
    assert f"for the plan above (statistics {basis}" in out
    assert ("The two figures for the recipe's keep ratio are of different plans" in out) == (not on_the_line)
    assert f"{planned.plan.predicted_nats:.4f} nats" in out
    found = json.loads((tmp_path / "prediction.json").read_text())
    assert found["statistics"] == "statistics of the dense model"
    assert found["plan"]["statistics"].startswith(f"statistics {basis}")
    assert (tmp_path / "prediction.png").stat().st_size > 5_000


def test_predicted_beside_measured() -> None:
    found = prediction({"nats": 0.1, "perplexity_ratio": math.exp(0.1)}, {"dense": 10.0, "compressed": 12.0})
    assert found is not None
    assert found["measured_nats"] == pytest.approx(math.log(1.2))
    assert "estimate" in found["kind"]
    assert prediction(None, {"dense": 10.0, "compressed": 12.0}) is None
    unmeasured = prediction({"nats": 0.1, "perplexity_ratio": 1.1}, {})
    assert unmeasured is not None
    assert unmeasured["measured_nats"] is None
