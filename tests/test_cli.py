"""The command line: what it refuses, in which words, with which exit code; forwarding; the stages that are commands."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lowrank_lit
from lowrank_lit import _scripts, cli
from lowrank_lit.collection import Collection
from lowrank_lit.data import load_tokenizer, tokenize_blocks, train_tokenizer
from lowrank_lit.plan import RankPlan
from lowrank_lit.windows import Protocol, cut_windows
from tests.tiny import batches, tiny_model

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"the {n} small foxes of {n * 7 % 13} jump over {n * 5 % 11} lazy dogs\n" for n in range(3000))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama, its tokenizer, a text and a recipe for them."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "text.txt").write_text(TEXT)
    train_tokenizer([TEXT], 300, folder / "model")
    tiny_model("llama", vocab_size=300).save_pretrained(folder / "model")
    recipe = {
        "seed_everything": 0,
        "trainer": {
            "default_root_dir": "out",
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 2,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
            "callbacks": [
                {
                    "class_path": "lowrank_lit.callbacks.LowRankCompression",
                    "init_args": {"keep_ratio": 0.6, "min_rank": 2},
                },
                {"class_path": "lowrank_lit.callbacks.RankPreservingLoRA", "init_args": {"rank": 2}},
                "lowrank_lit.callbacks.ExportOnFitEnd",
            ],
        },
        "model": {"model": "./model"},
        "data": {
            "sources": dict.fromkeys(("train", "calibration", "test"), "./text.txt"),
            "tokenizer": "./model",
            "block_size": 32,
            "batch_size": 4,
            "calibration_blocks": 8,
            "evaluation_blocks": 4,
        },
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture
def run(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; ``tiny`` stands for the recipe. Returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, program: Callable[[list[str]], int] = cli.main) -> tuple[int, str, str]:
        capsys.readouterr()
        code = program([str(workplace / "tiny.yaml") if argument == "tiny" else argument for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return call


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


REFUSED = [
    (["--trainer.max_stps=3"], "unknown option '--trainer.max_stps'; did you mean '--trainer.max_steps'?"),
    (["--model.learnin_rate", "3"], "unknown option '--model.learnin_rate'; did you mean '--model.learning_rate'?"),
    (["--trainer.max_steps=abc"], "trainer.max_steps='abc' is refused: expected int"),
    (["--model.learning_rate", "fast"], "model.learning_rate='fast' is refused: expected float"),
    (["--data.sources=[1]"], "data.sources=[1] is refused: expected dict"),
    (["--data.sources.tst=x"], "unknown splits ['tst']"),
    (["--model=x"], "'--model' names a group"),
    (["--trainer.logger=CSVLoger"], "class 'CSVLoger' does not exist; did you mean 'CSVLogger'?"),
    (["--trainer.accelerator=gpuu"], "accelerator='gpuu'"),
    (["--trainer.callbacks+=RankReprt"], "class 'RankReprt' does not exist; did you mean 'RankReport'?"),
    (["--LowRankCompresion.keep_ratio=0.8"], "did you mean '--LowRankCompression.keep_ratio'?"),
    (["--LowRankCompression.keep_ration=0.8"], "did you mean '--LowRankCompression.keep_ratio'?"),
    (["--LowRankCompression.keep_ratio=much"], "LowRankCompression.keep_ratio='much' is refused: expected float"),
    (["--LowRankCompression.keep_ratio=much"], ".yaml with the options given: LowRankCompression"),
    (["--keep_ratio=0.8"], "unknown option '--keep_ratio'; did you mean '--LowRankCompression.keep_ratio'?"),
    (["--batch_size=2"], "unknown option '--batch_size'; did you mean '--data.batch_size'?"),
    (["--LowRankCompression.keep_ratio=1.5"], ".yaml: keep_ratio=1.5 is outside (0, 1]; it is the share of"),
    (["--LowRankCompression.targets=[*.nothing]"], "'*.nothing'"),
    (["--LowRankCompression.metric=inpt"], "metric='inpt' is unknown"),
    (["--data.sources.test=missing.txt"], "text file 'missing.txt' does not exist"),
    (["--data.tokenizer=./nowhere"], "nowhere' cannot be loaded"),
    (["--trainer.max_steps"], "option '--trainer.max_steps' needs a value"),
    (["max_steps=3"], "unexpected argument 'max_steps=3'"),
    (["--config=x.yaml"], "the recipe is the first argument"),
    (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[" ".join(options) for options, _ in REFUSED])
def test_what_is_refused_is_refused_in_one_line(run: Run, options: list[str], message: str) -> None:
    code, _, err = run("run", "tiny", *options)
    assert code == 2
    assert last_line(err).startswith("error: ")
    assert message in last_line(err)
    assert "Traceback" not in err
    assert "usage:" not in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: [", "line 1"),
        ("trainer: {max_steps: 1, max_steps: 2}", "key 'max_steps' stands twice"),
        ("trainer: {}\nmodell: {}", "unknown key 'modell'; did you mean 'model'?"),
        ("model: {learnin_rate: 1}", "unknown key 'model.learnin_rate'; did you mean 'model.learning_rate'?"),
        (
            "trainer: {callbacks: [{class_path: lowrank_lit.callbacks.RankReprt}]}",
            "did you mean 'lowrank_lit.callbacks.RankReport'?",
        ),
        (
            "trainer: {callbacks: [{class_path: RankReport, init_arg: {}}]}",
            "did you mean 'trainer.callbacks.init_args'?",
        ),
        ("trainer: 3", "trainer=3 is refused"),
        ("model: {model: x}\ndata: {sources: {}}", "data.tokenizer"),
        ("just text", "not a recipe"),
        ("", "not a recipe"),
    ],
)
def test_bad_recipes_are_refused_in_one_line(run: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    code, _, err = run("run", "bad.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("error: bad.yaml: ")
    assert message in err


def test_commands_and_recipes_that_do_not_exist(run: Run) -> None:
    assert run("rn", "tiny") == (2, "", "error: unknown command 'rn'; did you mean 'run'?\n")
    code, _, err = run("run", "quickstrt.yaml")
    assert code == 2
    assert "did you mean 'quickstart'?" in err
    assert run("run")[0] == run("evaluate", "--path=x")[0] == 2
    code, _, err = run("evaluate", "tiny")
    assert code == 2
    assert "no exported model in 'out/model'" in err


def test_help_without_a_recipe(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert "quickstart" in out
    assert "  sweep  " in out
    code, out, _ = run("run", "--help")
    assert code == 0
    assert "--model.learning_rate" in out
    assert "Peak learning rate" in out, "help carries the docstrings"
    code, out, _ = run("plan", "--help")
    assert code == 0
    assert "--dry-run" in out
    code, out, _ = run("sweep", "--help")
    assert code == 0
    for option in ("--metric", "--keep-ratio", "--preset", "--seeds", "--split", "cells.jsonl"):
        assert option in out


def test_help_of_a_callback(run: Run) -> None:
    code, out, _ = run("run", "tiny", "--LowRankCompression.help")
    assert code == 0
    assert "--LowRankCompression.keep_ratio" in out
    assert "Share of the target matrices' parameters to keep" in out
    assert "CONFIG" not in run("run", "quickstart", "--RankReport.help")[1], "no option that is refused"


def test_overrides_reach_the_printed_configuration(run: Run, tmp_path: Path, workplace: Path) -> None:
    options = [
        "--LowRankCompression.keep_ratio=0.8",
        "--LowRankCompression.targets=[*.mlp.*, *.q_proj]",  # not YAML, and what people write
        "--model.learning_rate=1e-5",
        "--data.sources.test=2024",  # text, though YAML would read a number
        "--trainer.default_root_dir=2025",
        "--data.tokenizer=./here",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=../logs",
        "--trainer.callbacks+=ModelSummary",
    ]
    code, out, _ = run("run", "tiny", *options, "--print_config")
    printed = yaml.safe_load(out)
    assert code == 0
    compression, _, _, summary = printed["trainer"]["callbacks"]
    assert (compression["init_args"]["keep_ratio"], compression["init_args"]["targets"]) == (
        0.8,
        ["*.mlp.*", "*.q_proj"],
    )
    assert compression["init_args"]["min_rank"] == 2, "what is not overridden stays"
    assert summary["class_path"].endswith("ModelSummary")
    assert printed["model"] | {"learning_rate": 1e-5, "model": str(workplace / "model")} == printed["model"]
    assert printed["data"]["sources"]["test"] == "2024"
    assert printed["trainer"]["default_root_dir"] == "2025"
    assert printed["data"]["tokenizer"] == str(tmp_path / "here"), (
        "a path on the command line is relative to where it is typed"
    )
    assert printed["trainer"]["logger"]["init_args"]["save_dir"] == str(tmp_path.parent / "logs")
    (tmp_path / "printed.yaml").write_text(out)
    assert run("run", "printed.yaml", "--print_config")[:2] == (0, out)


def test_compress_evaluate_and_plan(run: Run, tmp_path: Path) -> None:
    """compress leaves recovery out, and the folder it writes is what evaluate reads and what the plan said."""
    code, _, err = run("compress", "tiny")
    assert code == 0, err
    assert (tmp_path / "out/model/model.safetensors").is_file()
    code, out, err = run("evaluate", "tiny")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()]
    assert " ".join(rows[0]) == "model parameters weights in memory perplexity KL, nats same top token"
    assert (rows[1][0], len(rows[1])) == ("dense", 5), "no divergence from itself"
    assert int(rows[2][1].replace(",", "")) < int(rows[1][1].replace(",", ""))
    assert float(rows[2][-3]) != float(rows[1][-1])
    record = json.loads((tmp_path / "out/evaluation.json").read_text())["models"]["compressed"]
    (apart,) = record["divergence"].values()
    assert (float(rows[2][-2]), apart["tokens"]) == (pytest.approx(apart["kl_nats"], rel=1e-3), 4 * 31)
    assert float(rows[2][-1]) == pytest.approx(apart["top1_agreement"], abs=1e-4)
    code, alone, err = run("evaluate", "tiny", "--no-divergence")
    assert code == 0, err
    assert "KL" not in alone
    again = json.loads((tmp_path / "out/evaluation.json").read_text())["models"]["compressed"]
    assert again == record | {"divergence": {}}, "all other figures are the same, one model at a time"
    assert "4 blocks of 32 tokens" in out
    exported = json.loads((tmp_path / "out/model/config.json").read_text())["quantization_config"]
    code, out, err = run("plan", "tiny", "--path=ranks.json")
    assert code == 0, err
    plan = RankPlan.load(tmp_path / "ranks.json")
    assert f"{plan.dense_parameters:,} parameters, {plan.parameters:,} kept" in out
    assert {matrix.name: matrix.rank for matrix in plan.matrices} == {
        matrix["name"]: matrix["rank"] for matrix in exported["plan"]["matrices"]
    }
    code, out, err = run("export", "tiny", "--format=dense")  # there is no checkpoint, but what was exported
    assert code == 0, err
    assert "model -> " in out
    dense = json.loads((tmp_path / "out/model-dense/config.json").read_text())
    assert "quantization_config" not in dense
    assert dense["hidden_size"] == json.loads((tmp_path / "out/model/config.json").read_text())["hidden_size"]


def test_evaluate_measures_both_models_alike(run: Run, tmp_path: Path, workplace: Path) -> None:
    """Both models in every table, the same figures in JSON and Markdown, and those of the functions."""
    model = tiny_model("llama", vocab_size=300)
    result = lowrank_lit.compress(model, batches(300, length=32), keep_ratio=0.6, min_rank=2, preset="unirank")
    lowrank_lit.export(model, result.plan, "out/model")
    lines = [{"query": f"the {n} small", "choices": ["foxes", "dogs of it"], "gold": n % 2} for n in range(9)]
    (tmp_path / "first.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "second.jsonl").write_text("\n".join(map(json.dumps, lines[::-1])))
    options = ["--multiple_choice=first.jsonl,second.jsonl", "--limit=6", "--protocol=sliding"]
    code, out, err = run("evaluate", "tiny", *options, "--stride", "8", "--bos=prepend", "--throughput", "1,2")
    assert code == 0, err
    record = json.loads((tmp_path / "out/evaluation.json").read_text())
    page = (tmp_path / "out/evaluation.md").read_text()
    assert record["protocol"]["perplexity"].items() >= {"name": "sliding", "stride": 8, "bos": "prepend"}.items()
    assert list(record["models"]) == ["dense", "compressed"]
    assert record["models"]["dense"]["source"] == str(workplace / "model")
    for model in record["models"].values():
        (text,) = model["perplexity"].values()
        assert text["targets"] == 4 * 32, "with a BOS before it the first token is scored too"
        assert f"{text['value']:.3f}" in out
        assert f"{text['value']:.3f}" in page
        assert [timed["batch_size"] for timed in model["throughput"]] == [1, 2]
        assert model["multiple_choice"]["first.jsonl"]["questions"] == 6
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    for name in (
        "first.jsonl, acc",
        "second.jsonl, acc_norm",
        "prefill, tokens/s, batch 1",
        "decode, tokens/s, batch 2",
    ):
        assert name in rows
        assert f"| {name} |" in page
    assert "windows of 32 tokens, one every 8, BOS before each" in out
    module = lowrank_lit.LowRankModule(str(workplace / "model"))
    module.configure_model()
    tokenizer = load_tokenizer(str(workplace / "model"))
    found = lowrank_lit.multiple_choice(
        module.model, tokenizer, tmp_path / "first.jsonl", limit=6, batch_size=1, bos="prepend"
    )
    assert record["models"]["dense"]["multiple_choice"]["first.jsonl"]["acc"] == found.acc
    assert f"{found.acc:.4f} ± {found.acc_stderr:.4f}" in rows["first.jsonl, acc"]
    compressed = lowrank_lit.load("out/model", dtype="float32")
    tokens = tokenize_blocks([(workplace / "text.txt").read_text()], tokenizer, 32)[:4].flatten()
    windows = cut_windows(tokens, Protocol("sliding", 32, 8, "prepend"), tokenizer.bos_token_id)
    expected = lowrank_lit.divergence(module.model, compressed, windows.ids, first=windows.first)
    assert record["models"]["dense"]["divergence"] == {}
    (apart,) = record["models"]["compressed"]["divergence"].values()
    assert (apart["top1_agreement"], apart["tokens"]) == (expected.agreement, 4 * 32)
    assert apart["kl_nats"] == pytest.approx(expected.kl, rel=1e-5)
    assert f"{apart['kl_nats']:.4g}  " in out
    assert f" {apart['kl_nats']:.4g} |" in page
    assert "same top token: share of these tokens" in page
    medians = [m["throughput"][0]["decode_tokens_per_second"]["median"] for m in record["models"].values()]
    assert rows["decode, tokens/s, batch 1"].split()[-1] == f"{medians[1] / medians[0]:.3f}"
    (tmp_path / "short.txt").write_text("the small fox " * 40)
    code, out, err = run("evaluate", "tiny", f"--text=short.txt,{workplace / 'text.txt'}")
    assert code == 0, err
    assert "perplexity, short.txt" in out
    assert "KL, nats, short.txt" in out
    plain = json.loads((tmp_path / "out/evaluation.json").read_text())["models"]["dense"]
    assert list(plain["perplexity"]) == ["short.txt", str(workplace / "text.txt")]
    assert (plain["throughput"], plain["multiple_choice"], plain["tasks"]) == ([], {}, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol=rolling"], "argument --protocol: invalid choice: 'rolling'"),
        (["--stride=8"], "stride=8 belongs to protocol='sliding'"),
        (["--protocol=sliding", "--stride=32"], "stride=32 is outside [1, 31], one less than a window's length (data."),
        (["--protocol=sliding", "--stride=0"], "stride=0 is outside"),
        (["--bos=yes"], "argument --bos: invalid choice: 'yes'"),
        (["--throughput=fast"], "option '--throughput': 'fast' is no batch size"),
        (["--throughput=0"], "option '--throughput': '0' is no batch size"),
        (["--multiple_choice=nowhere.jsonl"], "option '--multiple_choice': file 'nowhere.jsonl' does not exist"),
        (["--multiple_choice=bad.jsonl"], "file 'bad.jsonl', line 2: 'gold' is 5"),
        (["--multiple_choice=,"], "option '--multiple_choice' is empty"),
        (["--limit=5"], "option '--limit': 5 limits nothing"),
        (["--limit=1", "--multiple_choice=bad.jsonl"], "option '--limit': 1 is too small"),
        (["--text=nowhere.txt"], "text file 'nowhere.txt' does not exist"),
        (["--tasks=hellaswag"], "tasks=['hellaswag'] needs lm-evaluation-harness"),
        (["--task=hellaswag"], "unknown option '--task'"),
    ],
)
def test_what_evaluate_refuses(
    run: Run, tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    """In one line and before a model is loaded: the folder that stands for the export holds no weights."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    good = {"query": "the", "choices": ["fox", "dog"], "gold": 0}
    (tmp_path / "bad.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(good | {'gold': 5})}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text("{}")
    code, _, err = run("evaluate", "tiny", "--path=empty", "--model.model=./nowhere", *options)
    assert (code, last_line(err).startswith("error: ")) == (2, True)
    assert message in last_line(err)


def test_plan_predicts_the_loss_from_one_pass(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    whole = Collection._calibrate

    def counted(self: Collection, *arguments: Any) -> Any:
        passes.append(arguments[0])
        return whole(self, *arguments)

    monkeypatch.setattr(Collection, "_calibrate", counted)
    options = ["--LowRankCompression.preset=unirank", "--LowRankCompression.metric=two_sided"]
    code, out, err = run("plan", "tiny", *options)
    assert code == 0, err
    assert len(passes) == 1
    assert "an estimate" in out
    found = json.loads((tmp_path / "out/prediction.json").read_text())
    nats = {point["keep_ratio"]: point["nats"] for point in found["points"]}
    assert nats.keys() <= {round(0.3 + 0.05 * step, 2) for step in range(14)}
    assert list(nats.values()) == sorted(nats.values(), reverse=True), "more is lost where less is kept"
    assert "<- the recipe" in next(line for line in out.splitlines() if f"{nats[0.6]:.4f}" in line)
    assert found["plan"]["nats"] == RankPlan.load(tmp_path / "out/plan.json").predicted_nats
    assert (tmp_path / "out/prediction.png").stat().st_size > 5_000
    code, out, err = run("plan", "tiny", "--LowRankCompression.preset=unirank", "--path=second/plan.json")
    assert code == 0, err
    assert "No prediction of the loss: metric='input' with allocator='unirank' collects no gradients" in out
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["plan.json"]
    code, out, err = run("plan", "tiny", "--LowRankCompression.preset=unirank", "--LowRankCompression.metric=corda")
    assert "No prediction of the loss: metric='corda' has no unit" in out


def test_predicted_stands_beside_measured_in_the_record(run: Run, tmp_path: Path) -> None:
    options = ["--LowRankCompression.preset=fast", "--trainer.callbacks+=RankReport"]
    code, out, err = run("compress", "tiny", *options)
    assert code == 0, err
    record = json.loads((tmp_path / "out/record.json").read_text())
    found, values = record["predicted"], record["perplexity"]
    assert found["nats"] == RankPlan.load(tmp_path / "out/plan.json").predicted_nats
    assert found["measured_nats"] == pytest.approx(math.log(values["compressed"] / values["dense"]))
    rows = {line.strip().split("  ")[0]: line for line in out.splitlines()}
    assert f"{found['nats']:.4f}" in rows["loss rise, predicted"]
    assert "estimate" in rows["loss rise, predicted"]
    assert f"{found['measured_nats']:.4f}" in rows["loss rise, measured"]


def test_sweep(run: Run, tmp_path: Path) -> None:
    """Cells from the command line, continued by a second run, failures told by the exit code."""
    axes = ["--metric=input", "--metric", "identity", "--allocator", "uniform,unirank", "--seeds=2"]
    code, out, err = run("sweep", "tiny", *axes, "--keep-ratio=0.6")
    assert code == 0, err
    folder = tmp_path / "out/sweep"
    assert sorted(path.name for path in folder.iterdir()) == ["cells.jsonl", "sweep.csv", "sweep.md", "sweep.png"]
    with (folder / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert all(row["seeds"] == "0 1" and float(row["spread"]) > 0 for row in rows if row["metric"] == "input")
    assert "[8/8]" in out
    assert "4 blocks of 32 tokens" in out
    code, out, err = run("sweep", "tiny", *axes, "--keep_ratio=0.6,0.001")
    assert code == 1, "a cell failed"
    assert "failed: identity + uniform, keep ratio 0.001: keep_ratio=0.001" in out
    assert len((folder / "cells.jsonl").read_text().splitlines()) == 8 + 8
    code, out, err = run("compress", "tiny", "--LowRankCompression.preset=unirank")
    assert code == 0, err
    code, out, err = run("evaluate", "tiny")
    perplexity = float(out.splitlines()[2].split()[-3])
    code, out, err = run("sweep", "tiny", "--preset=unirank", "--keep-ratio=0.6", "--seeds=1", "--path=other")
    assert code == 0, err
    with (tmp_path / "other/sweep.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["perplexity"]) == pytest.approx(perplexity, rel=1e-3)
    assert row["spread"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric=inpt"], "metric='inpt' is unknown; choose one of identity"),
        (["--preset=bst"], "preset='bst' is unknown; choose one of best, fast, unirank"),
        (["--keep-ratio=0"], "keep_ratio=0.0 is outside"),
        (["--seeds=0"], "option '--seeds': 0 is too small"),
        (["--seeds=many"], "argument --seeds: invalid int value: 'many'"),
        (["--split=train"], "argument --split: invalid choice: 'train'"),
        (["--metrics=input"], "unknown option '--metrics'"),
        (["--split=validation", "--metric=input"], "data.sources has no 'validation'"),
    ],
)
def test_a_bad_sweep_is_refused_in_one_line(run: Run, tmp_path: Path, options: list[str], message: str) -> None:
    code, _, err = run("sweep", "tiny", *options)
    assert code == 2
    assert message in last_line(err)
    assert not (tmp_path / "out").exists(), "before anything is computed"


def test_laser_sweep(run: Run, tmp_path: Path) -> None:
    options = ["--LowRankCompression.targets=[*.mlp.up_proj]", "--keep-share", "0.5,0.1"]
    code, out, err = run("sweep", "tiny", "--laser", *options)
    assert code == 0, err
    folder = tmp_path / "out/laser"
    assert sorted(path.name for path in folder.iterdir()) == ["laser.json", "laser.md", "laser.png"]
    found = json.loads((folder / "laser.json").read_text())
    assert [(cell["block"], cell["keep_share"], cell["rank"]) for cell in found["cells"]] == [
        *((0, 0.5, 16), (0, 0.1, 3), (1, 0.5, 16), (1, 0.1, 3)),
    ]
    table = (folder / "laser.md").read_text()
    assert "| layer | projection | full rank | keep 0.5 | keep 0.1 |" in table
    assert f"Dense perplexity {found['dense_perplexity']:.5g}. " in table
    better = sum(cell["improves"] for cell in found["cells"])
    assert f"{better} of 4 cuts improve the perplexity" in table
    assert "4 blocks of 32 tokens" in out


def test_diagnose(run: Run, tmp_path: Path, workplace: Path) -> None:
    """From the plan alone, and with the folders of a compression and of its recovery."""
    model: Any = tiny_model("llama", vocab_size=300)
    text = batches(vocab=300, structured=True)
    plan = lowrank_lit.compress(model, text, keep_ratio=0.6, min_rank=2, preset="fast", select=False).plan
    lowrank_lit.export(model, plan, "before")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.inner.weight.mul_(1.1 + 0.1 * torch.rand(32))
    lowrank_lit.export(model, plan, "after")
    code, out, err = run("diagnose", "tiny", "--compressed=before", "--recovered=after")
    assert code == 0, err
    folder = tmp_path / "out/diagnostics"
    names = ["agreement.png", "diagnostics.json", "diagnostics.md", "head_tail.png", "losses.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    found = json.loads((folder / "diagnostics.json").read_text())
    table = (folder / "diagnostics.md").read_text()
    for title in ("## Matrices", "## Head and tail", "## Intruder dimensions"):
        assert title in table
    assert [entry["rank"] for entry in found["matrices"]] == [entry.rank for entry in plan.matrices]
    assert abs(found["losses"]["both"]["change"]["rise"]) < 1e-4
    assert found["compared"].keys() == {entry.name for entry in plan.matrices if entry.form != "dense"}
    assert [name for name, entry in found["compared"].items() if entry["overlap"]] == ["model.layers.1.mlp.up_proj"]
    assert f"Dense loss {found['dense_loss']:.5f}" in table
    assert "split calibration" in out
    assert "8 blocks of 32 tokens" not in out, "of the text, as many blocks as the recipe evaluates on"
    plan.save(tmp_path / "plan.json")
    code, out, err = run("diagnose", "tiny", "--plan=plan.json", "--head=0.5", "--split=test", "--path=other")
    assert code == 0, err
    assert "Intruder" not in out
    assert "16 of 32" in out

    (tmp_path / "short.txt").write_text("a few words")
    tiny_model("llama", vocab_size=300, intermediate_size=40).save_pretrained(tmp_path / "foreign")
    for options, message in (
        (["--compressed=before", "--recovered=foreign"], "the recovered model is none of the compressed one's: matrix"),
        (["--compressed=foreign"], "option '--compressed': 'foreign' holds a dense model"),
        (["--plan=plan.json", "--data.sources.validation=short.txt"], "is shorter than one block of 32 tokens"),
        (["--plan=nowhere.json"], "plan file 'nowhere.json' cannot be read"),
        (["--compressed=before", "--model.model=foreign"], "the base model is none of the compressed one's"),
        (["--plan=plan.json", "--model.model=foreign"], "the plan does not fit the model in"),
    ):
        code, _, err = run("diagnose", "tiny", *options, "--path=refused")
        assert (code, message in last_line(err)) == (2, True), err
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("diagnose", ["--recovered=x"], "option '--recovered' needs the compression before it; add --compressed"),
        ("diagnose", ["--compressed=nowhere"], "option '--compressed': 'nowhere' is no folder"),
        ("diagnose", ["--head=1"], "option '--head': 1 is outside (0, 1)"),
        ("diagnose", ["--threshold=2"], "threshold=2 is outside (0, 1]"),
        ("diagnose", ["--top=0"], "top=0 is too small"),
        ("diagnose", ["--LowRankCompression.targets=[*.nothing]"], "'*.nothing'"),
        ("sweep", ["--laser", "--allocator=uniform"], "option '--allocator' belongs to the grid"),
        ("sweep", ["--laser", "--metric=input,identity"], "--laser takes one metric, not 2"),
        ("sweep", ["--laser", "--metric=inpt"], "metric='inpt' is unknown"),
        ("sweep", ["--laser", "--keep-share=0.5,2"], "option '--keep-share': '2' is no share in (0, 1)"),
        ("sweep", ["--keep-share=0.5"], "option '--keep-share' belongs to --laser"),
    ],
)
def test_a_bad_diagnosis_is_refused_in_one_line(
    run: Run, tmp_path: Path, command: str, options: list[str], message: str
) -> None:
    code, _, err = run(command, "tiny", *options)
    assert code == 2
    assert message in last_line(err)
    assert not (tmp_path / "out").exists(), "before anything is computed"


def test_run_and_export_of_a_checkpoint(run: Run, tmp_path: Path) -> None:
    options = ["--trainer.enable_checkpointing=true", "--trainer.callbacks+=ModelCheckpoint"]
    code, _, err = run("run", "tiny", *options)
    assert code == 0, err
    code, out, err = run("export", "tiny", "--path=second")
    assert code == 0, err
    assert ".ckpt -> second" in out
    first, second = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out/model", "second"))
    assert first["quantization_config"]["plan"]["matrices"] == second["quantization_config"]["plan"]["matrices"]

    code, out, err = run("export", "tiny", "--format=gguf")
    assert code == 2
    assert last_line(err) == (
        "error: format='gguf' is unknown; choose one of lowrank, dense, trust-remote-code, lowrankarena"
    )
    for name in ("dense", "lowrankarena"):
        code, out, err = run("export", "tiny", f"--format={name}")
        assert code == 0, err
        assert f".ckpt -> out/model-{name}" in out
    assert "quantization_config" not in json.loads((tmp_path / "out/model-dense/config.json").read_text())
    record = json.loads((tmp_path / "out/model-lowrankarena/lowrankarena.json").read_text())
    assert record["ratios"]["achieved"] <= 0.6
    assert (record["perplexity"]["protocol"]["blocks"], record["perplexity"]["protocol"]["length"]) == (4, 32)
    code, out, err = run("evaluate", "tiny", "--path=out/model-lowrankarena")
    assert code == 0, err
    for kind in ("dense", "compressed"):
        assert f"{record['perplexity'][kind]:.3f}" in out


def test_plan_dry_run_needs_no_weights(run: Run, workplace: Path) -> None:
    code, out, err = run("plan", "tiny", "--dry-run")
    assert code == 0, err
    model = tiny_model("llama", vocab_size=300)
    targets = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert f"Whole model: {model.num_parameters():,} parameters" in out
    assert f"{targets:,} parameters; kept at keep_ratio=0.6: {int(0.6 * targets):,}" in out
    assert "forward and backward passes of the whole model on the device" in out, "of the preset's metric"
    assert "weights of the whole model, for the backward pass" in out
    code, out, err = run("plan", "tiny", "--dry-run", "--LowRankCompression.preset=unirank")
    assert "one block at a time on the device" in out
    assert "backward pass" not in out.split("recover")[0]
    code, out, err = run("plan", "tiny", "--dry-run", "--model.model=nobody/nothing")
    assert code == 2
    assert "--config_json FILE" in last_line(err)
    code, out, err = run(
        "plan", "tiny", "--dry-run", "--model.model=nobody/nothing", f"--config_json={workplace}/model/config.json"
    )
    assert code == 0, err
    assert f"Configuration: {workplace}/model/config.json" in out


def test_dry_run_of_a_hub_model_uses_the_carried_configuration(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = run("plan", "llama7b_40pct", "--dry-run")
    assert code == 0, err
    assert "Whole model: 6,738,415,616 parameters" in out, "the published size of LLaMA-7B"
    assert "Target matrices (224): 6,476,005,376 parameters" in out  # 32 (4 x 4096^2 + 3 x 4096 x 11008)


def test_errors_of_the_machine_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Callable[[list[str]], int]:
        def command(_: list[str]) -> int:
            raise error

        return command

    assert cli._guarded(fail(OSError(errno.ENOSPC, "No space left on device", "/x")), []) == 2
    assert "no space left on the disk (/x)" in capsys.readouterr().err
    assert cli._guarded(fail(PermissionError(errno.EACCES, "denied", "/y")), []) == 2
    assert "no permission (/y)" in capsys.readouterr().err
    assert cli._guarded(fail(torch.OutOfMemoryError("CUDA out of memory")), []) == 2
    assert "lower data.batch_size" in capsys.readouterr().err
    assert cli._guarded(fail(KeyboardInterrupt()), []) == 130
    capsys.readouterr()
    assert cli._guarded(fail(SIGTERMException()), []) == 143  # of a batch system, for example: no success
    assert capsys.readouterr().err == "terminated\n"
    for stop, code, message in (
        (SystemExit("no such thing"), 2, "error: no such thing\n"),
        (SystemExit(["odd"]), 2, "error: ['odd']\n"),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
    ):
        assert cli._guarded(fail(stop), []) == code
        assert capsys.readouterr().err == message
    with pytest.raises(ZeroDivisionError):  # a mistake in the program is not the user's: it keeps its traceback
        cli._guarded(fail(ZeroDivisionError()), [])


class Interrupter(pl.Callback):
    """Presses Ctrl-C where the compression would begin."""

    def setup(self, *_: object, **__: object) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_in_a_run(run: Run) -> None:
    import signal

    handler = signal.getsignal(signal.SIGINT)
    try:
        code, _, err = run("run", "tiny", "--trainer.callbacks=[{class_path: tests.test_cli.Interrupter}]")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning switches it off for good
    assert (code, last_line(err)) == (130, "interrupted")


def test_as_a_process(workplace: Path) -> None:
    """Exit code and streams as a shell sees them."""
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_lit", "run", str(workplace / "tiny.yaml"), "--trainer.max_steps=abc"],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {workplace}/tiny.yaml: trainer.max_steps='abc' is refused: expected int\n"


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_may_stand_anywhere(run: Run, place: int) -> None:
    arguments = ["run", "tiny", "--trainer.max_steps=abc"]
    code, _, err = run(*arguments[:place], "--debug", *arguments[place:])
    assert code == 2
    assert "Traceback (most recent call last)" in err
    assert last_line(err).endswith("trainer.max_steps='abc' is refused: expected int")


# --- the script `lightning` ---


@pytest.fixture
def sdk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed distribution ``lightning-sdk`` with a script ``lightning``, as the real one has."""
    folder = tmp_path / "site"
    info = folder / "lightning_sdk-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nlightning = sdk_of_a_test:entry\n")
    (folder / "sdk_of_a_test.py").write_text("import sys\ndef entry():\n    print('sdk', *sys.argv)\n    return 3\n")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("sdk_of_a_test", None)


def test_lightning_runs_recipes(run: Run) -> None:
    code, _, err = run("run", "tiny", "--trainer.max_stps=3", program=cli.lightning_main)
    assert (code, last_line(err)) == (
        2,
        "error: unknown option '--trainer.max_stps'; did you mean '--trainer.max_steps'?",
    )
    assert run("run", "quickstart", "--trainer.max_stps=3", program=cli.lightning_main)[0] == 2
    assert "recipe 'missing.yaml' does not exist" in run("run", "missing.yaml", program=cli.lightning_main)[2]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "job", "--x=1"], ["run", "script.py"], ["login"]])
def test_lightning_passes_the_rest_on_to_the_sdk(run: Run, sdk: Path, arguments: list[str]) -> None:
    before = list(sys.argv)
    code, out, _ = run(*arguments, program=cli.lightning_main)
    assert (code, out) == (3, " ".join(["sdk", "lightning", *arguments]) + "\n")
    assert sys.argv == before


def test_lightning_passes_the_rest_on_to_fabric(run: Run) -> None:
    assert "lightning-sdk" not in _scripts.script_owners(), "this test needs an environment without lightning-sdk"
    code, out, _ = run("--help", program=cli.lightning_main)
    assert code == 0
    assert "lightning run RECIPE.yaml" in out
    assert "consolidate" in out, "fabric's own help"
    code, _, err = run("run", "no_such_script.py", program=cli.lightning_main)
    assert code == 2
    assert "no_such_script.py" in err


def test_doctor_sees_the_clash(run: Run, sdk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin/lightning"
    script.parent.mkdir()
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    assert "lightning-sdk" in _scripts.script_owners()
    for module, code in (("lightning_sdk.cli.entrypoint", 1), ("lowrank_lit.cli", 0)):
        script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)
        found, out, _ = run("doctor")
        assert found == code
        assert ("lowrank-lit run RECIPE.yaml" in out) is bool(code)
        assert (_scripts.REINSTALL in out) is bool(code)
