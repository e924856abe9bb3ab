"""The main job on the embedded model, through the real command line: compress, recover, export, report, load again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lowrank_lit
from lowrank_lit.cli import main
from lowrank_lit.data import TextDataModule, load_tokenizer
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.surgery import count_parameters
from tests.test_html import check

MODEL = Path(__file__).parent.parent / "recipes" / "quickstart" / "model"
SMALL = ["--trainer.max_steps=3", "--data.evaluation_blocks=4", "--data.calibration_blocks=16"]
CHEAP = "--LowRankCompression.preset=unirank"  # where another test has had the default


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the recipe with few steps and blocks."""
    folder = tmp_path_factory.mktemp("quickstart")
    assert main(["run", "quickstart", f"--trainer.default_root_dir={folder}", *SMALL]) == 0
    return folder


def test_the_record_has_every_figure(run_folder: Path) -> None:
    record = json.loads((run_folder / "record.json").read_text())
    assert record["complete"]
    expected = {
        "keep_ratio": {"requested", "achieved", "whole_model"},
        "bytes": {"dense", "compressed"},
        "perplexity": {"dense", "compressed", "recovered"},
        "seconds": {"calibrate", "factor", "allocate", "recover", "evaluate", "total"},
    }
    for section, keys in expected.items():
        assert keys <= record[section].keys()
        assert all(isinstance(record[section][key], (int, float)) for key in keys), section
    assert record["peak_memory_bytes"] > 50e6
    assert record["keep_ratio"]["requested"] == 0.6
    assert 0.598 < record["keep_ratio"]["achieved"] <= 0.6 < record["keep_ratio"]["whole_model"] < 1
    assert record["perplexity"]["dense"] < record["perplexity"]["compressed"]
    assert record["seed"] == 0
    assert len(record["data_hash"]["calibration"]) == len(record["data_hash"]["evaluation"]) == 64
    assert "4 blocks of 256 tokens" in record["perplexity"]["protocol"]
    assert record["config"]["trainer"]["max_steps"] == 3
    assert {"torch", "transformers", "lightning", "peft", "lowrank-lit"} <= record["versions"].keys()
    assert (run_folder / "ranks.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((run_folder / "plan.json").read_text())["fingerprint"] == record["fingerprint"]
    page = check((run_folder / "report.html").read_text(encoding="utf-8"))
    assert f"{record['perplexity']['recovered']:.5g}" in page.text
    assert "max_steps: 3" in page.text, "the resolved recipe"
    assert "Peak of each stage" in page.text, "the memory that MemoryReport saw"


def test_the_export_is_the_model_that_was_measured(run_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    record = json.loads((run_folder / "record.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run_folder / "model", dtype="float32")
    assert sum(isinstance(module, FactoredLinear) for module in model.modules()) > 20
    data = TextDataModule({"test": "embedded:test"}, str(run_folder / "model"), evaluation_blocks=4)
    measured = lowrank_lit.perplexity(model, data.evaluation())
    assert measured == pytest.approx(
        record["perplexity"]["recovered"], rel=1e-5
    )  # measured 0: the weights are the same
    assert sum(file.stat().st_size for file in (run_folder / "model").glob("*.safetensors")) == pytest.approx(
        record["bytes"]["compressed"], rel=0.01
    )
    tokenizer = load_tokenizer(str(run_folder / "model"))
    prompt = tokenizer("Return the", return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert generated.shape[1] == prompt["input_ids"].shape[1] + 8


def test_the_compressed_model_does_not_repeat_itself(run_folder: Path) -> None:
    """Sampled continuations have as many different tokens as the dense model's: a collapse would have few."""
    module = lowrank_lit.LowRankModule(str(MODEL))
    module.configure_model()
    prompts = TextDataModule({"test": "embedded:test"}, str(MODEL)).evaluation()[:8, :32]
    shares = []
    for model in (module.model, lowrank_lit.load(run_folder / "model", dtype="float32")):
        torch.manual_seed(0)
        mask = torch.ones_like(prompts)
        written = model.generate(prompts, attention_mask=mask, max_new_tokens=48, do_sample=True)[:, prompts.shape[1] :]
        shares.append(sum(len(set(row.tolist())) / len(row) for row in written) / len(written))
    dense, compressed = shares
    assert 0.8 * dense < compressed < 1.2 * dense  # measured 0.65 and 0.63


def test_a_second_run_takes_the_compression_from_the_first(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = json.loads((run_folder / "record.json").read_text())
    assert main(["run", "quickstart", f"--trainer.default_root_dir={run_folder}", *SMALL]) == 0
    assert "Compression taken from" in capfd.readouterr().out
    after = json.loads((run_folder / "record.json").read_text())
    for section in ("keep_ratio", "parameters", "bytes"):
        assert after[section] == before[section]
    for key in ("dense", "compressed", "recovered"):  # the same seed, so the same steps; sums differ by alignment
        assert after["perplexity"][key] == pytest.approx(before["perplexity"][key], rel=1e-6)  # measured 1e-8


def test_another_evaluation_text_is_measured_anew(tmp_path: Path) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    figures = []
    for blocks in (4, 2, 2):
        assert main(["compress", "quickstart", root, CHEAP, SMALL[2], f"--data.evaluation_blocks={blocks}"]) == 0
        figures.append(json.loads((tmp_path / "record.json").read_text())["perplexity"])
    assert f"{figures[1]['dense']:.4f}" != f"{figures[0]['dense']:.4f}"
    assert figures[1]["dense"] < figures[1]["compressed"] != figures[0]["compressed"]
    assert figures[2]["dense"] == figures[1]["dense"]  # taken from disk
    assert "2 blocks" in figures[1]["protocol"]


def test_another_run_does_not_replace_it(run_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (run_folder / "record.json").read_text()
    arguments = [f"--trainer.default_root_dir={run_folder}", "--LowRankCompression.keep_ratio=0.7", *SMALL]
    assert main(["run", "quickstart", *arguments]) == 2
    error = capfd.readouterr().err
    assert "holds the export of another run" in error
    assert "choose another folder" in error
    assert (run_folder / "record.json").read_text() == before


def test_compress_and_evaluate_are_stages_of_their_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    assert main(["compress", "quickstart", root, CHEAP, *SMALL[1:]]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["perplexity"]["recovered"] is None
    assert record["seconds"]["recover"] is None
    assert main(["evaluate", "quickstart", root, CHEAP, *SMALL[1:]]) == 0
    out = capfd.readouterr().out
    assert f"{record['perplexity']['dense']:.3f}" in out
    # The export is rounded to bfloat16, the one-shot figure is of the float32 factors.
    folder = tmp_path / "model"
    assert str(folder) in out


def test_the_embedded_model_is_what_its_card_says() -> None:
    files = {file.name: file.stat().st_size for file in MODEL.iterdir()}
    assert sum(files.values()) <= 8_000_000
    module = lowrank_lit.LowRankModule(str(MODEL))
    module.configure_model()
    assert module.storage_dtype == torch.bfloat16
    assert 1_000_000 <= count_parameters(module.model) <= 4_000_000
    data = TextDataModule({"test": "embedded:test"}, str(MODEL))
    card = (MODEL / "README.md").read_text()
    assert f"{lowrank_lit.perplexity(module.model, data.evaluation()):.2f}" in card
