"""Every recipe parses and makes its classes; the large ones run whole on something tiny."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowrank_lit import _recipes, cli
from lowrank_lit._session import build
from lowrank_lit._settings import callback_entry, read_settings
from lowrank_lit.data import train_tokenizer
from lowrank_lit.errors import RecipeError
from tests.tiny import tiny_model

RECIPES = sorted(_recipes.carried_recipes().values())
TEXT = "".join(f"the {n} small foxes of {n * 7 % 13} jump over {n * 5 % 11} lazy dogs\n" for n in range(3000))
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No recipe may need the folder it lies in."""
    monkeypatch.chdir(tmp_path)


def test_recipes_are_found() -> None:
    names = {path.stem for path in RECIPES}
    assert len(RECIPES) >= 3
    assert {"quickstart", "pretrain_tiny", "llama7b_40pct"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_makes_its_classes(path: Path) -> None:
    settings = read_settings(path, [])
    cli_of_recipe = build(path, settings)
    assert cli_of_recipe.trainer.max_steps == settings["trainer"]["max_steps"]
    made = {type(callback).__name__ for callback in cli_of_recipe.trainer.callbacks}
    named = {entry["class_path"].rpartition(".")[2] for entry in settings["trainer"]["callbacks"]}
    assert named <= made
    assert cli_of_recipe.datamodule.sources == settings["data"]["sources"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_is(path: Path) -> None:
    header = path.read_text().partition("seed_everything:")[0]
    for part in ("# Hardware:", f"# Command:  lightning run recipes/{path.name}", "# Override:", "# Obtained:"):
        assert part in header


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_printed_configuration_is_a_recipe(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(path), "--print_config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert cli.main(["run", "again.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == printed


def test_callbacks_of_quickstart_are_in_order() -> None:
    callbacks = [
        entry["class_path"].rpartition(".")[2]
        for entry in read_settings(_recipes.find_recipe("quickstart"), [])["trainer"]["callbacks"]
    ]
    order = [
        callbacks.index(name) for name in ("LowRankCompression", "RankPreservingLoRA", "ExportOnFitEnd", "RankReport")
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("name", ["recipes/quickstart.yaml", "quickstart.yaml", "quickstart"])
def test_recipe_by_name_from_anywhere(name: str) -> None:
    assert _recipes.find_recipe(name) == _recipes.recipes_folder() / "quickstart.yaml"


def test_own_file_comes_before_the_carried_recipe(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("trainer: {}")
    assert _recipes.find_recipe("quickstart.yaml") == Path("quickstart.yaml")
    with pytest.raises(RecipeError, match="does not exist"):
        _recipes.find_recipe("other/quickstart.yaml")


def test_paths_are_relative_to_the_recipe_or_to_here(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/x.yaml").write_text("a: {b: [./c, ../d, e/f, 3, 1e-4, 2024-01-01, null]}\n")
    loaded = _recipes.load_recipe(Path("sub/x.yaml"))
    assert loaded == {"a": {"b": [str(tmp_path / "sub/c"), str(tmp_path / "d"), "e/f", 3, 1e-4, "2024-01-01", None]}}


def test_plain_data_only(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(RecipeError, match=r"x\.yaml: line 1, column 4"):
        _recipes.load_recipe(Path("x.yaml"))


def test_pretrain_tiny_takes_three_steps(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    small = [
        f"--model.model.{key}={value}"
        for key, value in {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}.items()
    ]
    texts = [f"--data.sources.{split}=./text.txt" for split in ("train", "calibration", "validation", "test")]
    options = [
        *("--model.compile=false", "--model.model.vocab_size=300", "--data.vocab_size=300", "--data.block_size=16"),
        *(
            "--trainer.max_steps=3",
            "--trainer.val_check_interval=1",
            "--trainer.limit_val_batches=1",
            "--data.batch_size=2",
        ),
        *(
            "--ModelCheckpoint.every_n_train_steps=1",
            "--ModelCheckpoint.dirpath=checkpoints",
            "--data.tokenizer=./tokenizer",
        ),
        *("--trainer.logger=false", "--trainer.default_root_dir=out"),
    ]
    assert cli.main(["run", "pretrain_tiny", *small, *texts, *options, *QUIET]) == 0
    assert (tmp_path / "checkpoints/last.ckpt").is_file()
    assert (tmp_path / "tokenizer/tokenizer.json").is_file()


def test_llama7b_runs_whole_on_a_tiny_llama(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    train_tokenizer([TEXT], 300, tmp_path / "tiny")
    tiny_model("llama", vocab_size=300, num_hidden_layers=3).save_pretrained(tmp_path / "tiny")
    texts = [f"--data.sources.{split}=text.txt" for split in ("train", "calibration", "test")]
    options = [
        *("--model.model=./tiny", "--data.tokenizer=./tiny", "--data.block_size=32", "--data.calibration_blocks=8"),
        *(
            "--data.evaluation_blocks=4",
            "--trainer.max_steps=2",
            "--trainer.accumulate_grad_batches=1",
            "--LowRankCompression.min_rank=2",
        ),
    ]
    assert cli.main(["run", "llama7b_40pct", *texts, *options, *QUIET]) == 0
    root = tmp_path / "runs/llama7b_40pct"
    assert (root / "model/model.safetensors").is_file()
    assert (root / "checkpoints/last.ckpt").is_file()
    assert list(root.rglob("record.json")), "RankReport has written"

    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(root / "model")
    dense = tiny_model("llama", vocab_size=300, num_hidden_layers=3)
    targets = sum(p.numel() for name, p in dense.named_parameters() if "proj" in name)
    kept = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    # 0.6 is a bound from above; the cheapest component of this model is 64 numbers.
    assert 0.6 * targets - 64 <= kept <= 0.6 * targets


def test_callback_entry_is_the_entry_itself() -> None:
    settings = read_settings(_recipes.find_recipe("quickstart"), [("RankPreservingLoRA.rank", "4")])
    entry = callback_entry(settings, "RankPreservingLoRA")
    assert entry is not None
    assert entry["init_args"]["rank"] == 4
    assert callback_entry(settings, "Nothing") is None
