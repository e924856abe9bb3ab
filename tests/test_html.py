"""The page of a record: well formed, complete, of one piece, and silent about what was not measured."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_lit.cli import main
from lowrank_lit.errors import ExportError, LowRankError
from lowrank_lit.html import page_of_folder, render, write_page
from lowrank_lit.overview import rank_cells, spectrum_cells
from lowrank_lit.pictures import cut_of, loss_figure, panels_of, save_figure, spectra_figure
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.report import assemble, read_record, summary_rows, write_record
from lowrank_lit.spectrum import Spectrum
from lowrank_lit.svg import Line, line_chart, linear_ticks, log_ticks

HOSTILE = "layers.0.a<b>&\"c'</script><script>alert(1)</script>"
VOID = {"meta", "wbr", "br", "hr", "img", "input", "link", "line", "circle", "polyline"}


class Page(HTMLParser):
    """Reads a page and fails on what is not well formed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.figures: list[str] = []  # without the listings: a configuration has nulls of its own
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID, tag
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)
        if not {"style", "pre"} & set(self.open):
            self.figures.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def plan(blocks: int = 3, extra: tuple[MatrixPlan, ...] = ()) -> RankPlan:
    shapes = {"self_attn.q_proj": (48, 48), "mlp.up_proj": (96, 48)}
    matrices = [
        MatrixPlan(f"model.layers.{block}.{name}", *shape, "factored", 3 + block % 20, kept_energy=0.9)
        for block in range(blocks)
        for name, shape in shapes.items()
    ]
    matrices.append(MatrixPlan(f"model.layers.{blocks - 1}.self_attn.k_proj", 16, 48, "dense", 16))
    return RankPlan((*matrices, *extra), 0.6, "input", "unirank", "abc")


def spectra(made: RankPlan) -> dict[str, Spectrum]:
    def one(index: int, matrix: MatrixPlan) -> Spectrum:
        full = min(matrix.rows, matrix.columns)
        values = torch.linspace(0, -4 - index % 3, full, dtype=torch.float64).exp()
        return Spectrum(values, torch.zeros(1, 1))

    return {matrix.name: one(index, matrix) for index, matrix in enumerate(made.matrices)}


def curve(values: list[float], *, skipped: int = 0) -> dict[str, Any]:
    return {"steps": list(range(1, len(values) + 1)), "values": values, "mean_over": 1, "skipped": skipped}


def record(made: RankPlan | None = None, **changes: Any) -> dict[str, Any]:
    """A run in which every stage took place, with numbers that are all different."""
    made = made or plan()
    parts: dict[str, Any] = {
        "complete": True,
        "keep_ratio": {"requested": 0.61, "achieved": 0.5987, "whole_model": 0.7512},
        "parameters": {"targets_dense": 1_000_001, "targets": 598_002, "model_dense": 1_600_003, "model": 1_198_004},
        "bytes": {"dense": 3_200_000, "compressed": 2_396_000},
        "perplexity": {"dense": 20.25, "compressed": 30.75, "recovered": 25.5, "protocol": "4 blocks of 33 tokens"},
        "predicted": {
            "nats": 0.3712,
            "perplexity_ratio": 1.449,
            "measured_nats": math.log(30.75 / 20.25),
            "kind": "estimate from second moments of the calibration text",
        },
        "seconds": {"calibrate": 1.1, "allocate": 2.2, "factor": 3.3, "recover": 4.4, "evaluate": 5.5, "total": 17.7},
        "peak_memory_bytes": 512_300_000,
        "memory": {
            "stages": {"recover": {"host": {"estimated": 3 * 2**20, "used": 5 * 2**20}}},
            "counts": {"estimated": "tensors alone", "host": "growth of the process"},
        },
        "matrices": {"targets": len(made.matrices), "factored": len(made.matrices) - 1, "pivot": 0},
        "notes": [HOSTILE],
        "ranks": rank_cells(made),
        "spectra": spectrum_cells(spectra(made)),
        "curves": {
            "train_loss": curve([3.5, 3.25, 3.125, 3.0625]),
            "learning_rate": curve([1e-4, 3e-4, 2e-4, 1e-4]),
            "validation_loss": {"steps": [2, 4], "values": [3.4375, 3.1875], "mean_over": 1, "skipped": 0},
            "counts": "Training loss: of process 0. Validation loss: val_loss.",
        },
        "config": {"keep_ratio": 0.61, "targets": None, "trainer": {"max_steps": 37, "name": HOSTILE}},
        "hardware": {"system": "Linux x86_64", "CPU cores": 12},
        "seed": 4242,
        "usage": {"folder": "runs/a'b<c>", "dtype": "float32", "test": "embedded:test"}
        | {"block_size": 256, "evaluation_blocks": 97},
        "recovery": {"pairs": 11, "largest_output_difference": 1.25e-06, "worst_pair": HOSTILE},
        "reallocation": [{"step": 5, "keep_ratio": 0.77}, {"step": 9, "keep_ratio": 0.66}],
        "passes": {"forward": 10.25, "backward": 3.0},
        "fingerprint": "f1f2f3",
        "weights_hash": "d" * 64,
        "data_hash": {"calibration": "c" * 64, "evaluation": "e" * 64},
    }
    return assemble(parts | changes)


def check(text: str) -> Page:
    """What every page must be."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("title")) >= 1
    assert len(page.all("h1")) == 1
    assert not page.all("script")
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), attributes
    assert not re.search(r"url\(|@import|https?:", text.replace("https://www.w3.org", "")), "nothing is fetched"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a"):
        assert str(attributes["href"])[1:] in ids
    for _, attributes in page.tags:
        assert attributes.get("aria-labelledby", ids[0]) in ids
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    for attributes in page.all("svg"):
        assert attributes["role"] == "img"
        assert attributes["aria-label"]
    for word in ("None", "nan", "null", "inf "):
        assert word not in " ".join(page.figures), word
    return page


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, f"{path}.{key}")]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item, path)]
    return [(path, value)]


def test_every_figure_of_the_record_is_on_the_page(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", record())
    made = read_record(tmp_path / "record.json")
    page = check(render(made))
    assert summary_rows(made)
    for row in summary_rows(made):
        for cell in row:
            assert " ".join(cell.split()) in page.text, row
    drawn = (".spectra.components", ".spectra.values", ".curves.")
    checked = 0
    for path, value in leaves(made):
        if path.startswith(drawn) or value is None or isinstance(value, bool):
            continue
        forms = [str(value)]
        if isinstance(value, (int, float)):
            forms += [f"{value:{form}}" for form in (",", ".1f", ".4f", ".5g", ".3f", "g")]
            forms += [f"{value / 1e6:{form}}" for form in (".3f", ",.1f")]
            forms += [f"{value / 2**20:.2f} MiB"]
        assert path == ".record_version" or any(" ".join(form.split()) in page.text for form in forms), (path, value)
        checked += 1
    assert checked > 100
    for figure in ("3.5 at step 1", "3.062 at step 4", "3.438 at step 2", "3.188 at step 4", "val_loss"):
        assert figure in page.text


def test_text_of_the_record_is_no_markup() -> None:
    made = plan(extra=(MatrixPlan(HOSTILE, 16, 16, "factored", 4),))
    names = dict.fromkeys(("name", "unit"), HOSTILE)
    page = check(render(record(made, further={HOSTILE: HOSTILE}, hardware=names, versions={HOSTILE: HOSTILE})))
    assert page.text.count(HOSTILE) >= 5
    assert "alert" in page.text
    assert HOSTILE.replace(".0.", ".") in page.text, "as the name of a projection"
    labels = [attributes["aria-label"] for attributes in page.all("svg")]
    assert any("<script>" in str(label) for label in labels), "decoded from its escaped form"


def test_what_was_not_measured_is_left_out_with_a_sentence() -> None:
    page = check(render(assemble()))
    for sentence in (
        "The run has not come to its end",
        "Not measured: targets; model; MB; perplexity, one-shot; perplexity, recovered; seconds, calibrate",
        "The record holds no ranks",
        "The record holds no spectra",
        "No training step has been recorded.",
        "predicts no loss in nats",
        "No stage has been timed.",
        "there was no MemoryReport",
        "The model was not exported",
        "The plan has no notes.",
    ):
        assert sentence in page.text, sentence
    assert not re.search(r"(?<![\w.])0(\.0+)?(?![\w.])", page.text.partition("Machine, seed and weights")[0]), (
        "nothing is 0"
    )


def test_parts_that_are_missing_one_by_one() -> None:
    """Each key that a stage adds may be missing by itself: a run that died, an older release, another metric."""
    whole = record()
    stages = ("ranks", "spectra", "curves", "memory", "usage", "hardware", "notes", "matrices", "predicted", "recovery")
    for key in stages:
        check(render({name: value for name, value in whole.items() if name != key}))
        check(render(whole | {key: None}))
    for section in ("keep_ratio", "parameters", "bytes", "perplexity", "seconds"):
        check(render(whole | {section: dict.fromkeys(whole[section])}))
    for name in ("train_loss", "learning_rate", "validation_loss"):
        check(render(record(curves={key: value for key, value in whole["curves"].items() if key != name})))


def test_a_loss_that_overflowed_is_said_and_not_drawn() -> None:
    infinite = {"dense": 20.0, "compressed": math.inf, "recovered": None, "protocol": "x"}
    predicted = {"nats": 0.5, "perplexity_ratio": 1.6, "measured_nats": math.inf, "kind": "estimate"}
    text = render(record(perplexity=infinite, predicted=predicted))
    assert "inf" in Page(text).text
    skipped = record(curves={"train_loss": curve([1.0, 2.0], skipped=3), "counts": "of process 0."})
    assert "3 losses were not finite" in check(render(skipped)).text
    assert "Nothing was validated" in check(render(skipped)).text


def test_experts_and_dense_matrices_are_told_apart() -> None:
    experts = tuple(
        MatrixPlan(f"model.layers.0.mlp.experts.{n}.down", 40, 100, "dense" if n == 3 else "factored", 10 * (n + 1))
        for n in range(4)
    )
    page = check(render(record(plan(extra=experts))))
    assert "0.25–0.75" in page.text
    assert "1 of 4 dense" in page.text
    dense = [attributes for attributes in page.all("td") if attributes.get("class") == "dense"]
    assert [attributes["title"] for attributes in dense] == ["stays dense, full rank 16"]
    pivot = plan(extra=(MatrixPlan("model.layers.0.mlp.gate", 16, 16, "pivot", 4),))
    assert [a["title"] for a in check(render(record(pivot))).all("td") if a.get("class") == "pivot"] == ["rank 4 of 16"]


def test_a_page_of_a_large_model_stays_small() -> None:
    made = plan(blocks=80)
    text = render(record(made))
    check(text)
    assert text.count("<polyline") == 2 * 16 + 1 + 3, "16 blocks of each projection, one matrix, three curves"
    assert "16 of 80 blocks" in text
    assert len(text) < 200_000  # measured: 102,000


def test_charts_put_points_where_they_belong() -> None:
    chart = line_chart([Line([(0, 1.0), (5, 10.0), (10, 100.0)])], label="a", x_label="b", y_label="c", log_y=True)
    (points,) = re.findall(r'<polyline[^>]* points="([^"]*)"', chart)
    places = [tuple(map(float, pair.split(","))) for pair in points.split()]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11), "equal ratios are equal distances"
    assert y2 < y0
    ticks = re.findall(r'<text class="tick"[^>]*>([^<]*)<', chart)
    assert {"1", "10", "100", "b", "c"} <= set(ticks)
    assert "<circle" in line_chart([Line([(1, 2.0)])], label="a", x_label="b", y_label="c"), "one point is a dot"
    with pytest.raises(LowRankError, match="no point to draw"):
        line_chart([Line([(0, 0.0)])], label="a", x_label="b", y_label="c", log_y=True)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1, 300), (-0.3, 0.4), (3.1, 3.15), (1e-6, 1), (0.9, 1.1), (2e-4, 9e9), (7, 7.0001)]
)
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    for ticks in [linear_ticks(low, high)] + ([log_ticks(low, high)] if low > 0 else []):
        assert 2 <= len(ticks) <= 6, ticks
        assert ticks == sorted(ticks)
        span = high - low
        assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in ticks)


def test_the_ring_is_on_the_line_at_the_plans_rank() -> None:
    made = record()
    cell = next(cell for cell in made["spectra"] if cell["kind"] == "self_attn.q_proj" and cell["block"] == 1)
    cut = cut_of(made, cell)
    assert cut is not None
    share, height = cut
    rank = share * cell["full_rank"]
    assert rank == pytest.approx(4, rel=1e-3)
    assert height == pytest.approx(cell["values"][cell["components"].index(4)], rel=0.01)
    dense = next(cell for cell in made["spectra"] if cell["kind"] == "self_attn.k_proj")
    assert cut_of(made, dense) is None
    assert {kind: count for kind, (_, count) in panels_of(made).items()} == {
        "self_attn.q_proj": 3,
        "mlp.up_proj": 3,
        "self_attn.k_proj": 1,
    }


def test_pictures_for_papers(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, figure in (("spectra", spectra_figure(record())), ("loss", loss_figure(record()))):
        assert figure is not None
        save_figure(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with pytest.raises(ExportError, match="cannot be written"):
            save_figure(figure, tmp_path / "file" / "a.png")
    assert spectra_figure(assemble()) is None
    assert loss_figure(assemble()) is None


def test_the_command_makes_the_page_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path / "record.json", record())
    write_page(tmp_path / "report.html", read_record(tmp_path / "record.json"))
    first = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "report.html").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["record.json", "report.html"]
    assert page_of_folder(tmp_path) == tmp_path / "report.html"
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "record.json' cannot be read" in error
    assert main(["report"]) == 2


def test_a_browser_draws_it(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    write_page(tmp_path / "report.html", record())
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=390,1200"]
    home = f"--user-data-dir={tmp_path / 'profile'}"
    shot = f"--screenshot={tmp_path / 'page.png'}"
    command = [browser, *options, home, shot, (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    from matplotlib.image import imread

    picture = imread(tmp_path / "page.png")
    assert picture.shape[:2] == (1200, 390)
    assert picture[..., :3].std() > 0.05, "not one colour"
