"""Records, the table and the picture: what is written is what was measured, or nothing."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lowrank_lit.errors import ExportError, LowRankError, NonFiniteError
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.report import (
    RECORD_VERSION,
    assemble,
    data_hash,
    plot_prediction,
    plot_ranks,
    read_record,
    recovery_note,
    summary_table,
    versions,
    write_record,
)

_SHAPES = {"self_attn.q_proj": (48, 48), "self_attn.k_proj": (16, 48), "mlp.up_proj": (96, 48)}


def llama_plan(layers: int = 3, *, dense: bool = True) -> RankPlan:
    """Ranks from 2 to 13 by layer; the last layer's k_proj stays dense."""
    matrices = [
        MatrixPlan(f"model.layers.{layer}.{name}", rows, columns, "factored", 2 + layer % 12)
        for layer in range(layers)
        for name, (rows, columns) in _SHAPES.items()
    ]
    if dense:
        matrices[-2] = MatrixPlan(f"model.layers.{layers - 1}.self_attn.k_proj", 16, 48, "dense", 16)
    return RankPlan(tuple(matrices), 0.6, "input", "unirank", "abc")


def figures(**changes: Any) -> dict[str, Any]:
    """What the stages of a run give, with known numbers."""
    parts: dict[str, Any] = {
        "keep_ratio": {"requested": 0.6, "achieved": 0.598, "whole_model": 0.75},
        "parameters": {"targets_dense": 1_000_000, "targets": 598_000, "model_dense": 1_600_000, "model": 1_198_000},
        "bytes": {"dense": 3_200_000, "compressed": 2_396_000},
        "perplexity": {"dense": 20.0, "compressed": 30.0, "recovered": 25.0, "protocol": "4 blocks"},
        "seconds": dict(
            zip(("calibrate", "allocate", "factor", "recover", "evaluate", "total"), range(1, 7), strict=True)
        ),
        "peak_memory_bytes": 512_000_000,
        "matrices": {"targets": 21, "factored": 20},
        "complete": True,
    }
    return parts | changes


def shown(record: dict[str, Any], width: int = 140) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(record))
    return console.export_text()


def test_parts_are_merged_section_by_section() -> None:
    record = assemble(
        {"perplexity": {"dense": 3.0}, "notes": ["a"]}, {"perplexity": {"recovered": 4.0}, "notes": ["b"]}
    )
    assert record["perplexity"] == {"dense": 3.0, "compressed": None, "recovered": 4.0, "protocol": None}
    assert record["notes"] == ["b"]
    assert record["record_version"] == RECORD_VERSION
    assert record["complete"] is False
    assert record["seconds"].keys() == {"calibrate", "allocate", "factor", "recover", "evaluate", "total"}
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    with pytest.raises(LowRankError, match=r"record\.seconds=3"):
        assemble({"seconds": 3})


def test_assembling_leaves_the_parts_alone() -> None:
    part = {"seconds": {"total": 1.0}}
    assemble(part, {"seconds": {"total": 2.0}})
    assert part == {"seconds": {"total": 1.0}}


def test_record_survives_the_file(tmp_path: Path) -> None:
    record = assemble(figures(perplexity={"dense": 0.1 + 0.2, "compressed": math.inf}))
    path = tmp_path / "new" / "record.json"
    write_record(path, record)
    assert read_record(path) == record
    assert [item.name for item in path.parent.iterdir()] == ["record.json"]
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail)["perplexity"]["compressed"] == "Infinity"
    assert float("Infinity") == math.inf


def test_values_of_any_type_are_written(tmp_path: Path) -> None:
    config = {"a": Path("x/y"), "b": torch.bfloat16, "c": (1, torch.tensor(2.5)), 3: {4}, "d": [-math.inf], "e": True}
    write_record(tmp_path / "r.json", assemble({"config": config}))
    found = read_record(tmp_path / "r.json")["config"]
    assert found == {"a": "x/y", "b": "torch.bfloat16", "c": [1, 2.5], "3": [4], "d": ["-Infinity"], "e": True}


@pytest.mark.parametrize("value", [math.nan, torch.tensor(math.nan)])
def test_nan_is_refused_by_name_and_the_old_file_stays(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "record.json"
    write_record(path, assemble(figures()))
    with pytest.raises(NonFiniteError, match=r"record\.config\.x\[1\] is NaN"):
        write_record(path, assemble(figures(config={"x": [0.0, value]})))
    assert read_record(path) == assemble(figures())


def test_a_recovery_that_made_the_model_worse_is_said_with_both_figures() -> None:
    def values(one_shot: float | None, recovered: float | None) -> dict[str, Any]:
        return assemble(
            figures(perplexity={"dense": 20.0, "compressed": one_shot, "recovered": recovered, "protocol": "x"})
        )

    for one_shot, recovered in ((30.0, 25.0), (30.0, 30.0), (30.0, None), (None, None), (math.inf, 25.0)):
        assert recovery_note(values(one_shot, recovered)) is None
    note = recovery_note(values(30.0, 31.25)) or ""
    for part in ("perplexity 31.25 after it, 30 one-shot", "lower learning_rate", "more text"):
        assert part in note
    assert "30.0000001 after it, 30 one-shot" in (recovery_note(values(30.0, 30.0000001)) or "")
    assert "perplexity inf after it" in (recovery_note(values(30.0, math.inf)) or "")
    worse = values(30.0, 31.25) | {"reallocation": [{"step": 1, "keep_ratio": 0.5}]}
    assert recovery_note(worse) is None, "another budget"
    assert "which made it worse" in shown(values(30.0, 31.25))
    assert "worse" not in shown(assemble(figures()))


def test_the_table_tells_which_weights_were_dense() -> None:
    text = shown(assemble(figures(weights_hash="0123456789abcdef" * 4)))
    (row,) = [line for line in text.splitlines() if "dense weights" in line]
    assert row.split()[2] == "0123456789ab"
    assert "dense weights" not in shown(assemble(figures())), "a record of an older release"


def test_missing_keys_are_named(tmp_path: Path) -> None:
    record = assemble(figures())
    del record["perplexity"]["recovered"]
    with pytest.raises(LowRankError, match=r"'perplexity\.recovered'"):
        write_record(tmp_path / "r.json", record)
    assert not list(tmp_path.iterdir())


def test_unwritable_and_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        write_record(tmp_path / "file" / "record.json", assemble(figures()))
    with pytest.raises(ExportError, match="cannot be written"):
        plot_ranks(llama_plan(), tmp_path / "file" / "ranks.png")
    for name, text in (("cut.json", '{"record_version": 1, "per'), ("list.json", "[]"), ("other.json", "{}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(LowRankError, match=name):
            read_record(tmp_path / name)
    (tmp_path / "new.json").write_text(json.dumps(assemble(figures()) | {"record_version": RECORD_VERSION + 1}))
    with pytest.raises(LowRankError, match="upgrade"):
        read_record(tmp_path / "new.json")


def test_data_hash_is_a_hash_of_the_values() -> None:
    tokens = torch.arange(6).view(2, 3)
    assert data_hash([tokens]) == hashlib.sha256(b"torch.int64 (2, 3)\n" + tokens.numpy().tobytes()).hexdigest()
    assert data_hash([tokens]) == data_hash([tokens.t().contiguous().t()])  # the same values in another memory order
    changed = tokens.clone()
    changed[1, 2] += 1
    different = [[changed], [tokens.view(3, 2)], [tokens.int()], [tokens, tokens], list(tokens), []]
    assert len({data_hash(tensors) for tensors in [[tokens], *different]}) == len(different) + 1
    assert len(data_hash([torch.tensor(1.5, dtype=torch.bfloat16)])) == 64


def test_versions_are_of_what_is_installed() -> None:
    found = versions()
    assert {"python", "lowrank-lit", "torch", "numpy"} <= found.keys()
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert "bitsandbytes-that-does-not-exist" not in found


def test_table_holds_every_figure() -> None:
    lines = {line.strip().split("  ")[0]: line for line in shown(assemble(figures()), 160).splitlines()}
    for row, numbers in {
        "targets": ("1,000,000", "598,000", "0.5980", "21 target matrices, 20 of them factored", "0.6000"),
        "model": ("1,600,000", "1,198,000", "0.7500"),
        "MB": ("3.200", "2.396", "0.7488"),
        "perplexity, one-shot": ("20", "30", "1.500", "4 blocks"),
        "perplexity, recovered": ("20", "25", "1.250", "after training"),
        "seconds, calibrate": ("1.0",),
        "seconds, total": ("6.0",),
        "peak memory, MB": ("512.0",),
    }.items():
        for number in numbers:
            assert number in lines[row], (row, number)
    assert "unfinished" not in "".join(lines)


def test_table_of_an_unfinished_run_and_of_infinities() -> None:
    text = shown(assemble(figures(complete=False, perplexity={"dense": 20.0, "compressed": math.inf, "protocol": "x"})))
    assert "unfinished run" in text
    assert "no training step was made" in text
    assert "inf" in text
    empty = shown(assemble())
    assert "not measured" in empty
    assert "None" not in text + empty
    assert "nan" not in text + empty


def test_table_fits_a_terminal_of_80_columns() -> None:
    lines = shown(assemble(figures()), width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("598,000" in line for line in lines)
    assert not any("…" in line for line in lines)


def pixels(path: Path) -> torch.Tensor:
    """Red, green and blue of a picture, uint8 (height, width, 3)."""
    from matplotlib.image import imread

    return (torch.tensor(imread(path))[..., :3] * 255).round().to(torch.uint8)


def has_colour(picture: torch.Tensor, red: int, green: int, blue: int) -> int:
    return int((picture == torch.tensor([red, green, blue], dtype=torch.uint8)).all(dim=-1).sum())


@pytest.mark.parametrize("layers", [1, 2, 12, 80])
def test_picture_grows_with_the_model(tmp_path: Path, layers: int) -> None:
    plot_ranks(llama_plan(layers), tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    height, width, _ = pixels(tmp_path / "ranks.png").shape
    assert 300 <= height <= 500
    assert width == {1: 960, 2: 960, 12: 1218, 80: 3600}[layers]
    assert [item.name for item in tmp_path.iterdir()] == ["ranks.png"]


def test_colour_is_the_share_of_the_full_rank(tmp_path: Path) -> None:
    """The largest share is the yellow end of viridis, half of it the middle; grey stands for dense alone."""
    from matplotlib import colormaps

    def plan(*matrices: MatrixPlan) -> torch.Tensor:
        plot_ranks(RankPlan(matrices, 0.5, "input", "uniform"), tmp_path / "ranks.png")
        return pixels(tmp_path / "ranks.png")

    big = 20_000  # pixels of a cell at least; the bar at the side has a narrow band of every colour
    yellow, middle = ([int(255 * c + 0.5) for c in colormaps["viridis"](x)[:3]] for x in (1.0, 0.5))
    grey = (0xEE, 0xEE, 0xEE)
    first = MatrixPlan("layers.0.fc", 40, 100, "factored", 20)
    both = plan(first, MatrixPlan("layers.1.fc", 40, 100, "factored", 10))
    assert has_colour(both, *yellow) > big
    assert has_colour(both, *middle) > big
    assert has_colour(both, *grey) < 500  # smooth edges of letters
    one = plan(first, MatrixPlan("layers.1.fc", 40, 100, "dense", 40))
    assert has_colour(one, *yellow) > big
    assert has_colour(one, *middle) < big / 10
    assert has_colour(one, *grey) > big / 4


@pytest.mark.parametrize(
    "names",
    [
        ("fc1", "fc2"),
        ("0", "2"),
        ("layer", "0"),
        ("encoder.0.fc", "decoder.0.fc", "head"),
        ("model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.experts.1.w1"),
    ],
)
def test_names_of_every_kind_get_a_cell_each(tmp_path: Path, names: tuple[str, ...]) -> None:
    from lowrank_lit.report import _grid

    plan = RankPlan(tuple(MatrixPlan(n, 8, 8, "factored", 2) for n in names), 0.5, "input", "uniform")
    cells, columns, rows = _grid(plan)
    assert sorted(matrix.name for matrix in cells.values()) == sorted(names)
    assert len(set(rows)) == len(rows)
    assert all(0 <= column < len(columns) and 0 <= row < len(rows) for column, row in cells)
    plot_ranks(plan, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 5_000


def test_the_pivot_form_is_named_and_framed(tmp_path: Path) -> None:
    record = assemble(figures(matrices={"targets": 21, "factored": 20, "pivot": 12}))
    assert "20 of them factored (12 in pivot form)" in " ".join(shown(record).split())
    assert "pivot" not in shown(assemble(figures()))
    pixels = []
    for form in ("factored", "pivot"):
        matrix = MatrixPlan("layers.0.fc", 8, 8, form, 4)  # type: ignore[arg-type]
        plot_ranks(RankPlan((matrix,), 1.0, "input", "uniform"), tmp_path / f"{form}.png")
        pixels.append((tmp_path / f"{form}.png").read_bytes())
    assert pixels[0] != pixels[1]


def test_a_prediction_off_the_line_is_marked_where_it_is(tmp_path: Path) -> None:
    """The mark of a plan with other statistics than the line's has its own height and its own label."""
    points, found = [(0.4, 0.8), (0.6, 0.3), (0.8, 0.1)], {}
    for name, nats, basis in (("on", 0.3, "a"), ("off", 0.7, "a"), ("told", 0.7, "statistics of the last round")):
        plot_prediction(points, tmp_path / f"{name}.png", keep_ratio=0.6, nats=nats, basis=basis)
        found[name] = pixels(tmp_path / f"{name}.png")
    assert not torch.equal(found["on"], found["off"])
    assert has_colour(found["told"], 0xB3, 0x47, 0x00) > has_colour(found["off"], 0xB3, 0x47, 0x00), "a longer label"
    plot_prediction(points, tmp_path / "none.png", keep_ratio=0.6, nats=None)
    assert has_colour(pixels(tmp_path / "none.png"), 0xB3, 0x47, 0x00) == 0


def test_all_dense_plan_and_no_pyplot(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    plan = RankPlan((MatrixPlan("layers.0.fc", 8, 8, "dense", 8),), 1.0, "input", "uniform")
    plot_ranks(plan, tmp_path / "ranks.png")
    assert has_colour(pixels(tmp_path / "ranks.png"), 0xEE, 0xEE, 0xEE) > 5_000
    assert ("matplotlib.pyplot" in sys.modules) == before
