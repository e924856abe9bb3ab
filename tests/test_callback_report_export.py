"""RankReport and ExportOnFitEnd in real fits: what is reported is what the exported folder holds."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

import lowrank_lit
from lowrank_lit.callbacks import ExportOnFitEnd, FactorTuning, LowRankCompression, RankPreservingLoRA, RankReport
from lowrank_lit.callbacks.export import round_weights
from lowrank_lit.compress import weights_hash
from lowrank_lit.corpus import embedded_text
from lowrank_lit.data import TextDataModule
from lowrank_lit.errors import ExportError, ModelError, NonFiniteError, PlanError
from lowrank_lit.evaluation import perplexity
from lowrank_lit.html import render
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.module import LowRankModule
from lowrank_lit.report import data_hash, read_record
from tests.disks import small_disk
from tests.test_html import check
from tests.tiny import tiny_model

_STAGES = ("calibrate", "allocate", "factor", "recover", "evaluate")
_NEW = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model of two layers, stored in bfloat16."""
    path = tmp_path_factory.mktemp("dense")
    tiny_model("llama", vocab_size=300).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TextDataModule]:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(embedded_text("test")[:6000], encoding="utf-8")

    def make(*splits: str) -> TextDataModule:
        sizes = {"block_size": 32, "batch_size": 4, "calibration_blocks": 16, "evaluation_blocks": 6}
        return TextDataModule(dict.fromkeys(splits or ("train", "test"), str(path)), str(tokenizer_folder), **sizes)

    return make


def make_trainer(root: Path, callbacks: list[pl.Callback], steps: int = 2, **settings: Any) -> pl.Trainer:
    usual: dict[str, Any] = {"logger": False, "limit_val_batches": 0, "enable_checkpointing": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=callbacks,
        **usual | settings,
    )


def compression() -> LowRankCompression:
    return LowRankCompression(0.6, min_rank=4)


@dataclass
class Run:
    """A fit that has ended."""

    root: Path
    module: LowRankModule
    data: TextDataModule
    compression: LowRankCompression
    report: RankReport
    output: str
    wall: float

    @property
    def record(self) -> dict[str, Any]:
        return read_record(self.root / "record.json")

    def exported(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.root / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def run(folder: Path, text: Callable[..., TextDataModule], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything in the usual order: compress, recover for two steps, export, report."""
    root = tmp_path_factory.mktemp("run")
    pl.seed_everything(3, verbose=False)
    module, data = LowRankModule(str(folder), learning_rate=0.02), text()
    callbacks = [compression(), RankPreservingLoRA(2), ExportOnFitEnd(), RankReport()]
    trainer = make_trainer(root, callbacks, logger=CSVLogger(root, name="log", version=""), log_every_n_steps=1)
    output, started = io.StringIO(), time.perf_counter()
    with redirect_stdout(output):
        trainer.fit(module, data)
    return Run(root, module, data, callbacks[0], callbacks[3], output.getvalue(), time.perf_counter() - started)  # type: ignore[arg-type]


def test_record_is_complete(run: Run) -> None:
    record = run.record
    assert record["complete"]
    assert run.compression.result is not None
    made = run.compression.result
    for section in ("keep_ratio", "parameters", "bytes"):
        assert record[section] == made.record[section]
    for key in ("dense", "compressed"):
        assert record["perplexity"][key] == made.record["perplexity"][key] > 1
    assert record["fingerprint"] == made.plan.fingerprint
    factored = sum(matrix.form == "factored" for matrix in made.plan.matrices)
    assert record["matrices"] == {"targets": 14, "factored": factored, "pivot": 0}
    assert record["data_hash"]["evaluation"] == data_hash([run.data.evaluation("test")])
    assert record["data_hash"]["calibration"] == made.record["calibration"]["hash"]
    assert record["perplexity"]["protocol"].startswith("test text, 6 blocks of 32 tokens")
    assert record["recovery"]["steps"] == 2
    assert record["perplexity"]["recovered"] < record["perplexity"]["compressed"]
    assert not any("made the model worse" in note for note in record["notes"])
    assert record["seed"] == 3
    assert record["config"]["keep_ratio"] == 0.6
    assert record["peak_memory_bytes"] > 50e6


def test_the_weights_are_those_of_the_folder_in_whatever_type(run: Run, folder: Path) -> None:
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert run.record["weights_hash"] == weights_hash(stored), "the fit has them in float32"
    assert run.record["weights_hash"][:12] in run.output
    assert run.record["weights_hash"] in (run.root / "report.html").read_text(encoding="utf-8")


def test_seconds_add_up(run: Run) -> None:
    seconds = run.record["seconds"]
    assert all(seconds[stage] > 0 for stage in _STAGES)
    assert sum(seconds[stage] for stage in _STAGES) <= seconds["total"] <= run.wall


def test_recovered_perplexity_is_that_of_the_exported_folder(run: Run) -> None:
    record = run.record["perplexity"]
    model = run.exported()
    assert sum(isinstance(module, FactoredLinear) for module in model.modules()) == run.record["matrices"]["factored"]
    measured = perplexity(model, run.data.evaluation("test"))
    assert measured == pytest.approx(record["recovered"], rel=1e-6)  # measured: 0
    assert abs(record["recovered"] / record["compressed"] - 1) > 1e-3  # two steps do change it
    from safetensors.torch import load_file

    stored = load_file(run.root / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_weights_in_memory_are_rounded_to_what_is_stored(run: Run) -> None:
    own, stored = run.module.model.state_dict(), run.exported().state_dict()
    assert own.keys() == stored.keys()
    for name, weight in own.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[name]), name
    frequencies = run.module.model.model.rotary_emb.inv_freq  # computed, not stored: rounding would move every position
    assert not torch.equal(frequencies, frequencies.to(torch.bfloat16).float())


def test_picture_table_and_log(run: Run) -> None:
    assert (run.root / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert "Low-rank compression" in run.output
    assert f"{run.record['perplexity']['recovered']:.5g}" in run.output
    assert run.report.record["complete"]
    assert run.record["notes"], "or there is nothing to show"
    assert [line for line in run.output.splitlines() if line.startswith("note: ")] == [
        f"note: {note}" for note in run.record["notes"]
    ]
    rows = list(csv.DictReader((run.root / "log" / "metrics.csv").open()))
    logged = {key: row[key] for row in rows for key in row if key.startswith("lowrank/") and row[key]}
    record = run.record
    for section in ("keep_ratio", "parameters", "bytes", "perplexity", "seconds"):
        for key, value in record[section].items():
            if key != "protocol":
                assert float(logged[f"lowrank/{section}/{key}"]) == pytest.approx(value, rel=1e-6)


def test_the_page_is_that_of_the_record(run: Run) -> None:
    page = check((run.root / "report.html").read_text(encoding="utf-8"))
    assert render(run.record) == (run.root / "report.html").read_text(encoding="utf-8")
    assert f"{run.record['perplexity']['recovered']:.5g}" in page.text
    assert "Written to" in run.output
    assert run.output.rstrip().endswith("record.json, report.html, ranks.png, spectra.png, loss.png")
    for name in ("ranks", "spectra", "loss"):
        assert (run.root / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {"system", "processor", "device"} <= run.record["hardware"].keys()


def test_curves_are_what_was_logged(run: Run) -> None:
    rows = list(csv.DictReader((run.root / "log" / "metrics.csv").open()))
    logged = [float(row["train_loss"]) for row in rows if row.get("train_loss")]
    curves = run.record["curves"]
    assert curves["train_loss"]["steps"] == [1, 2]
    assert curves["train_loss"]["values"] == pytest.approx(logged, rel=1e-6)
    assert curves["learning_rate"]["values"][0] == pytest.approx(0.02), "no warm-up: the first step has the peak"
    assert 0.002 <= curves["learning_rate"]["values"][1] < 0.02
    assert "validation_loss" not in curves


def test_ranks_and_spectra_belong_to_the_plan(run: Run) -> None:
    assert run.compression.result is not None
    plan, record = run.compression.result.plan, run.record
    assert len(record["ranks"]) == len(record["spectra"]) == len(plan.matrices) == 14
    for matrix, rank, spectrum in zip(plan.matrices, record["ranks"], record["spectra"], strict=True):
        assert matrix.name == f"model.layers.{rank['block']}.{rank['kind']}"
        assert (rank["rank"] or matrix.rank) == matrix.rank
        assert spectrum["kind"] == rank["kind"]
        # The kept share, from the few values that are kept where they are all of them.
        if spectrum["components"] == list(range(1, spectrum["full_rank"] + 1)):
            energy = [value**2 for value in spectrum["values"]]
            assert sum(energy[: matrix.rank]) / sum(energy) == pytest.approx(matrix.kept_energy, abs=2e-3)
    assert any(len(spectrum["components"]) == spectrum["full_rank"] for spectrum in record["spectra"])


def test_the_commands_on_the_page_give_the_recovered_perplexity(run: Run) -> None:
    usage = run.record["usage"]
    assert usage["folder"] == str(run.root / "model")
    text = render(run.record)
    code = unescape(text.partition("<pre><code>")[2].partition("</code>")[0])
    output = io.StringIO()
    with redirect_stdout(output):
        exec(code, {})
    assert float(output.getvalue()) == pytest.approx(run.record["perplexity"]["recovered"], rel=1e-6)


class Pictures(CSVLogger):
    """A logger that takes pictures by their paths, as that of Weights & Biases does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="pictures", version="")
        self.seen: dict[str, bytes] = {}

    def log_image(self, key: str, images: list[str], step: int | None = None) -> None:
        self.seen[key] = b"".join(Path(image).read_bytes()[:4] for image in images)


def test_every_logger_is_given_what_it_takes(folder: Path, text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = TensorBoardLogger(tmp_path, name="board", version=""), CSVLogger(tmp_path, name="table", version="")
    pictures = Pictures(tmp_path)
    callbacks = [compression(), FactorTuning(), RankReport(str(tmp_path / "report"))]
    trainer = make_trainer(
        tmp_path, callbacks, logger=[board, table, pictures], limit_val_batches=1, val_check_interval=1
    )
    trainer.fit(LowRankModule(str(folder), learning_rate=0.02), text("train", "validation", "test"))
    record = read_record(tmp_path / "report" / "record.json")
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"lowrank/ranks", "lowrank/spectra", "lowrank/loss"} == set(tags["images"])
    assert events.Images("lowrank/ranks")[0].encoded_image_string.startswith(b"\x89PNG")
    assert events.Scalars("lowrank/perplexity/recovered")[0].value == pytest.approx(record["perplexity"]["recovered"])
    for name in ("board", "table"):
        settings = (tmp_path / name / "hparams.yaml").read_text()
        assert "lowrank/keep_ratio: 0.6" in settings
        assert "lowrank/metric: two_sided" in settings
    assert pictures.seen == dict.fromkeys(("lowrank/ranks", "lowrank/spectra", "lowrank/loss"), b"\x89PNG")
    validation = record["curves"]["validation_loss"]
    assert validation["steps"] == [0, 1, 2], "the sanity check is of the whole text here"
    rows = list(csv.DictReader((tmp_path / "table" / "metrics.csv").open()))
    logged = [float(row["val_loss"]) for row in rows if row.get("val_loss")]
    assert validation["values"][1:] == pytest.approx(logged, rel=1e-6)
    assert "Validation loss: val_loss." in check((tmp_path / "report" / "report.html").read_text()).text


def test_curves_go_on_where_a_run_was_interrupted(
    folder: Path, text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    def fit(root: Path, steps: int, checkpoint: str | None = None) -> dict[str, Any]:
        pl.seed_everything(5, verbose=False)
        saved = ModelCheckpoint(root / "saved", save_last=True, every_n_train_steps=1)
        callbacks = [compression(), FactorTuning(), RankReport(), saved]
        trainer = make_trainer(root, callbacks, steps, enable_checkpointing=True, accumulate_grad_batches=2)
        # Warm-up throughout: the decay after it would know of the number of steps, which is another one here.
        module = LowRankModule(str(folder), learning_rate=0.01, warmup_steps=100)
        trainer.fit(module, text(), ckpt_path=checkpoint, weights_only=True)
        return dict(read_record(root / "record.json")["curves"])

    whole = fit(tmp_path / "whole", 4)
    first = fit(tmp_path / "cut", 2)
    assert first["train_loss"]["steps"] == [0, 1, 1, 2]
    second = fit(tmp_path / "cut", 4, str(tmp_path / "cut" / "saved" / "last.ckpt"))
    assert second["train_loss"]["steps"] == whole["train_loss"]["steps"] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert second["train_loss"]["values"][:4] == first["train_loss"]["values"]
    assert second["learning_rate"]["values"] == pytest.approx(whole["learning_rate"]["values"], rel=1e-9)


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 * 1024) as disk:
        if not disk.mounted:
            pytest.skip("no small disk can be mounted here")
        made = LowRankCompression(
            0.6, metric="identity", allocator="uniform", min_rank=2, batches=[{"x": torch.randn(4, 16)}]
        )
        report = RankReport(str(disk.folder / "report"))
        disk.fill(leave=0)
        with pytest.warns(UserWarning, match=r"record\.json' cannot be written .*the run goes on"):
            make_trainer(tmp_path, [made, report]).fit(Plain())
        assert report.record["complete"]
        assert not [file for file in (disk.folder / "report").rglob("*") if file.stat().st_size]


def test_a_recovery_that_harms_is_said_in_record_table_and_page(
    text: Callable[..., TextDataModule], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = text()
    model, blocks = tiny_model("llama", vocab_size=300), data.evaluation("test")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):  # untrained weights are so far off that any step helps
        model(input_ids=blocks, labels=blocks).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "dense")
    callbacks = [compression(), RankPreservingLoRA(2), RankReport()]
    with pytest.warns(UserWarning, match="the recovery made the model worse"):
        make_trainer(tmp_path, callbacks).fit(LowRankModule(str(tmp_path / "dense"), learning_rate=1.0), data)
    record = read_record(tmp_path / "record.json")
    values = record["perplexity"]
    assert values["recovered"] > 2 * values["compressed"], "or the learning rate is not absurd"
    note = record["notes"][0]
    for part in (f"{values['recovered']:.5g} after it", f"{values['compressed']:.5g} one-shot", "lower learning_rate"):
        assert part in note
    assert f"note: {note}" in capsys.readouterr().out.splitlines()
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert note in page.text
    assert "after training, which made it worse" in page.text


def test_without_a_step_there_is_no_recovery(folder: Path, text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    callbacks = [compression(), RankPreservingLoRA(2), ExportOnFitEnd(), RankReport()]
    make_trainer(tmp_path, callbacks, steps=0).fit(LowRankModule(str(folder)), text())
    record = read_record(tmp_path / "record.json")
    assert record["complete"]
    assert record["perplexity"]["recovered"] is record["seconds"]["recover"] is None
    assert record["perplexity"]["compressed"] > record["perplexity"]["dense"] > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    measured = perplexity(model, text().evaluation("test"))
    # The compression is measured before its factors are rounded to bfloat16; measured difference: 2.9e-3.
    assert measured == pytest.approx(record["perplexity"]["compressed"], rel=0.02)


class PowerCut(LowRankModule):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 1:
            raise KeyError("the power went out")
        return super().training_step(batch, batch_idx)


def test_a_run_that_dies_keeps_its_record(folder: Path, text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    callbacks: list[pl.Callback] = [RankReport(), ExportOnFitEnd(), compression()]
    with pytest.raises(KeyError, match="power"):
        make_trainer(tmp_path, callbacks).fit(PowerCut(str(folder)), text())
    record = read_record(tmp_path / "record.json")
    assert record["complete"] is False
    assert record["perplexity"]["compressed"] > record["perplexity"]["dense"] > 1
    assert record["seconds"]["calibrate"] > 0
    assert record["perplexity"]["recovered"] is record["seconds"]["recover"] is None
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "ranks.png").exists()
    page = check((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "The run has not come to its end" in page.text
    assert f"{record['perplexity']['compressed']:.5g}" in page.text


def test_any_order_and_a_second_fit(folder: Path, text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    report, made = RankReport(), compression()
    callbacks: list[pl.Callback] = [report, ExportOnFitEnd(), made, RankPreservingLoRA(2)]
    module, data = LowRankModule(str(folder)), text()
    make_trainer(tmp_path, callbacks).fit(module, data)
    first = read_record(tmp_path / "record.json")
    assert first["complete"]
    assert first["perplexity"]["recovered"] > 1
    assert sum(first["seconds"][stage] for stage in _STAGES) <= first["seconds"]["total"]

    time.sleep(1.0)  # a clock that still ran since the first fit would show
    started = time.perf_counter()
    make_trainer(tmp_path, [report, made], steps=0).fit(module, data)
    second = read_record(tmp_path / "record.json")
    assert second["seconds"]["total"] <= time.perf_counter() - started
    assert second["seconds"]["recover"] is None


def test_perplexities_are_null_without_a_test_text(
    folder: Path, text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    make_trainer(tmp_path, [compression(), RankReport()]).fit(LowRankModule(str(folder)), text("train"))
    record = read_record(tmp_path / "record.json")
    assert set(record["perplexity"].values()) == {None}
    assert record["data_hash"]["evaluation"] is None
    assert record["complete"]


def test_report_without_a_compression_warns(text: Callable[..., TextDataModule], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="nothing to report"):
        make_trainer(tmp_path, [RankReport()], steps=1).fit(LowRankModule(_NEW), text())
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])
@pytest.mark.parametrize(
    "make", [lambda path: RankReport(path), lambda path: ExportOnFitEnd(path)], ids=["report", "export"]
)
def test_a_folder_that_cannot_be_is_refused_before_calibration(
    folder: Path, text: Callable[..., TextDataModule], tmp_path: Path, make: Callable[[str], pl.Callback], first: bool
) -> None:
    (tmp_path / "file").write_text("mine")
    module, seen = LowRankModule(str(folder)), []
    module.configure_model()
    module.model.register_forward_pre_hook(lambda *_: seen.append(1))
    callbacks: list[pl.Callback] = [compression(), make(str(tmp_path / "file"))]
    with pytest.raises(ExportError, match="file"):
        make_trainer(tmp_path / "root", callbacks[::-1] if first else callbacks).fit(module, text())
    assert not seen
    assert (tmp_path / "file").read_text() == "mine"


def test_dense_model_is_exported_and_replaced_by_its_own_run_alone(
    text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    def fit(source: dict[str, Any], steps: int) -> LowRankModule:
        module = LowRankModule(source, learning_rate=0.02)
        make_trainer(tmp_path, [ExportOnFitEnd()], steps).fit(module, text())
        return module

    fit(_NEW, 1)
    module = fit(_NEW, 2)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, weight in module.model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    with pytest.raises(ExportError, match="another run"):
        fit({**_NEW, "hidden_size": 64}, 1)


def test_factored_model_trains_on_without_a_compression(
    run: Run, text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    callbacks = [RankPreservingLoRA(2), ExportOnFitEnd()]
    module = LowRankModule(str(run.root / "model"), learning_rate=0.02)
    make_trainer(tmp_path, callbacks).fit(module, text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before, after = run.exported().state_dict(), loaded.state_dict()
    assert {name: w.shape for name, w in after.items()} == {name: w.shape for name, w in before.items()}
    assert any(not torch.equal(after[name], before[name]) for name in after)
    with pytest.raises(ExportError, match="another run"):  # it does not write over what it started from
        make_trainer(tmp_path, [ExportOnFitEnd(str(run.root / "model"))]).fit(module, text())


def test_adapters_left_in_the_model_are_named(
    folder: Path, text: Callable[..., TextDataModule], tmp_path: Path
) -> None:
    module = LowRankModule(str(folder))
    callbacks: list[pl.Callback] = [compression(), ExportOnFitEnd(), RankPreservingLoRA(2)]
    with pytest.raises(ModelError, match="list RankPreservingLoRA before ExportOnFitEnd"):
        make_trainer(tmp_path, callbacks, steps=0).fit(module, text())
    assert not (tmp_path / "model").exists()


class Break(pl.Callback):
    """Sets one weight after training."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with torch.no_grad():
            pl_module.get_parameter("model.model.norm.weight")[0] = self.value


@pytest.mark.parametrize(
    ("value", "dtype", "error"),
    [(1e5, "float16", ExportError), (float("nan"), "auto", NonFiniteError), (float("inf"), "auto", NonFiniteError)],
)
def test_weights_that_cannot_be_stored(
    text: Callable[..., TextDataModule], tmp_path: Path, value: float, dtype: str, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"'model\.norm\.weight'"):
        make_trainer(tmp_path, [Break(value), ExportOnFitEnd(dtype=dtype)], 1).fit(LowRankModule(_NEW), text())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", ["int8", "bf16", "Tensor", ""])
def test_unknown_dtypes(dtype: str) -> None:
    with pytest.raises(ModelError, match="dtype="):
        ExportOnFitEnd(dtype=dtype)


class Plain(pl.LightningModule):
    """A module of the user's own, without any transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.randn(8, 16)), batch_size=4)


def test_users_own_module_is_reported(tmp_path: Path) -> None:
    made = LowRankCompression(
        0.6, metric="identity", allocator="uniform", min_rank=2, batches=[{"x": torch.randn(4, 16)}]
    )
    make_trainer(tmp_path, [made, RankReport()]).fit(Plain())
    record = read_record(tmp_path / "record.json")
    assert record["complete"]
    assert record["keep_ratio"]["achieved"] <= 0.6
    assert set(record["perplexity"].values()) == {None}


def test_a_users_own_module_is_exported_as_a_folder_of_its_own(tmp_path: Path) -> None:
    made = LowRankCompression(0.6, min_rank=2)
    module, x = Plain(), torch.randn(5, 16)
    make_trainer(tmp_path, [made, ExportOnFitEnd()], 2).fit(module)
    again = Plain()
    plan = lowrank_lit.load_module(again, tmp_path / "model")
    assert made.result is not None
    assert plan == made.result.plan
    assert torch.equal(again(x), module(x))
    assert isinstance(again.net[0], FactoredLinear)
    make_trainer(tmp_path / "dense", [ExportOnFitEnd()], 1).fit(dense := Plain())
    assert lowrank_lit.load_module(other := Plain(), tmp_path / "dense" / "model") is None
    assert torch.equal(other(x), dense(x))

    with pytest.raises(ExportError, match=r"'0\.bias' is not the same"):
        lowrank_lit.load_module(nn.Sequential(nn.Linear(2, 2)), tmp_path / "dense" / "model")
    with pytest.raises(PlanError, match="does not fit"):
        lowrank_lit.load_module(nn.Sequential(nn.Linear(2, 2)), tmp_path / "model")
    with pytest.raises(ExportError, match="no export of a module"):
        lowrank_lit.load_module(again, tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ExportError, match="missing, truncated"):
        lowrank_lit.load_module(Plain(), tmp_path / "model")


@pytest.mark.parametrize("callback", [ExportOnFitEnd(), RankReport()], ids=["export", "report"])
def test_weights_in_pieces_are_refused_at_setup(callback: pl.Callback) -> None:
    module = LowRankModule(_NEW)
    trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(), logger=False)
    trainer.strategy.connect(module)
    with pytest.raises(ModelError, match="ModelParallelStrategy splits the weights"):
        callback.setup(trainer, module, "fit")


def test_rounding_keeps_types_ties_and_what_is_not_stored() -> None:
    model = tiny_model("llama")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    frequencies = model.model.rotary_emb.inv_freq.clone()  # type: ignore[union-attr, operator]
    round_weights(model, torch.bfloat16)
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, before[name].to(torch.bfloat16).float())
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert tied
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)  # type: ignore[union-attr, arg-type]
    versions = [weight._version for weight in model.state_dict().values()]
    round_weights(model, torch.float32)
    assert [weight._version for weight in model.state_dict().values()] == versions, "its own type: nothing is written"
