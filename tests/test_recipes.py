"""Every recipe parses and makes its classes; the large ones run whole on something tiny."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_lit import FactoredLinear, _recipes, cli
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
    large = {"llama7b_40pct", "llama7b_40pct_deepspeed", "llama7b_40pct_lora", "qwen3_8b_20pct"}
    assert names == large | {"pretrain_tiny", "progressive", "quickstart", "refine_only"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_makes_its_classes(path: Path) -> None:
    settings = read_settings(path, [])
    cli_of_recipe = build(path, settings)
    assert cli_of_recipe.trainer.max_steps == settings["trainer"].get("max_steps", -1)
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
def test_recipe_by_name_from_anywhere(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = _recipes.find_recipe(name)
    assert found == _recipes.recipes_folder() / "quickstart.yaml"
    told = f"recipe '{name}' is no file here; taking the package's own, {found}\n"
    assert capsys.readouterr().err == ("" if name == "quickstart" else told)  # a path that is not there


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


ALPACA = [
    {
        "instruction": f"Say {n} twice.",
        "input": "" if n % 2 else "slowly",
        "output": f"{n} and {n}, as the {n} foxes do",
    }
    for n in range(40)
]
CHATS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"the {n} small foxes"}]}
    for n in range(40)
]
CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"


def tiny_folder(family: str, folder: Path, **settings: Any) -> Any:
    """A random model with a tokenizer of its own, and the model."""
    train_tokenizer([TEXT], 300, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny_model(family, vocab_size=300, max_position_embeddings=256, **settings)
    model.save_pretrained(folder)
    return model


def large_recipe(name: str, train: str, *options: str) -> int:
    """A recipe for a large model, on the tiny one in ./tiny, for two steps."""
    sources = [f"--data.sources.{split}={text}" for split, text in (("calibration", "text.txt"), ("test", "text.txt"))]
    sizes = ("--model.model=./tiny", "--data.tokenizer=./tiny", "--data.block_size=256", "--data.calibration_blocks=8")
    steps = ("--data.evaluation_blocks=4", "--trainer.max_steps=2", "--trainer.accumulate_grad_batches=1")
    return cli.main(["run", name, f"--data.sources.train={train}", *sources, *sizes, *steps, *options, *QUIET])


def require_whole_run(root: Path, dense: Any, keep_ratio: float, granule: int) -> None:
    """The export loads, has the size that was asked for, and reports and checkpoints lie beside it."""
    assert list(root.rglob("checkpoints/last.ckpt"))
    assert list(root.rglob("record.json")), "RankReport has written"
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    targets = sum(p.numel() for name, p in dense.named_parameters() if "proj.weight" in name)
    factors = ("proj.weight", "inner.weight", "outer.weight")
    kept = sum(p.numel() for name, p in model.named_parameters() if name.endswith(factors))
    assert keep_ratio * targets - granule <= kept <= keep_ratio * targets  # a bound from above


def test_llama7b_lora_runs_whole_on_a_tiny_llama(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    dense = tiny_folder("llama", tmp_path / "tiny", num_hidden_layers=3)
    assert large_recipe("llama7b_40pct_lora", "alpaca:alpaca.json", "--LowRankCompression.min_rank=2") == 0
    require_whole_run(tmp_path / "runs/llama7b_40pct_lora", dense, 0.6, 64)


def test_llama7b_runs_whole_in_4_bits(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    dense = tiny_folder(
        "llama", tmp_path / "tiny", hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=2
    )
    assert large_recipe("llama7b_40pct", "alpaca:alpaca.json", "--LowRankCompression.min_rank=64") == 0
    root = tmp_path / "runs/llama7b_40pct"
    require_whole_run(root, dense, 0.6, 64 * 1024)
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    ranks = {layer.rank for layer in model.modules() if isinstance(layer, FactoredLinear)}
    assert ranks
    assert all(rank % 64 == 0 for rank in ranks)


def test_qwen3_runs_whole_on_conversations(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    dense = tiny_folder("qwen3", tmp_path / "tiny", num_hidden_layers=3)
    assert large_recipe("qwen3_8b_20pct", "chat:chat.jsonl", "--LowRankCompression.min_rank=2") == 0
    require_whole_run(tmp_path / "runs/qwen3_8b_20pct", dense, 0.8, 64)


@pytest.mark.parametrize(
    ("name", "keep_ratio", "options"),
    [
        (
            "refine_only",
            0.6,
            ["--Refinement.block_epochs=1", "--trainer.max_epochs=1"],
        ),
        ("progressive", 0.4, ["--trainer.max_steps=6", "--RankReallocation.end=4", "--RankReallocation.every=2"]),
    ],
)
def test_small_recipe_runs_whole(name: str, keep_ratio: float, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT[:20000])
    dense = tiny_folder("llama", tmp_path / "tiny")
    sources = [f"--data.sources.{split}=text.txt" for split in ("train", "calibration", "validation", "test")]
    floors = ["--LowRankCompression.min_rank=2", "--LowRankCompression.preset=fast"]
    if name == "progressive":
        floors.append("--RankReallocation.min_rank=2")
    sizes = ["--data.block_size=32", "--data.calibration_blocks=16", "--data.evaluation_blocks=4", *floors]
    steps = ["--trainer.limit_train_batches=6", "--ModelCheckpoint.every_n_train_steps=2"]
    models = ["--model.model=./tiny", "--data.tokenizer=./tiny"]
    assert cli.main(["run", name, *models, *sources, *sizes, *steps, *options, *QUIET]) == 0
    require_whole_run(tmp_path / "runs" / name, dense, keep_ratio, 80)


def test_callback_entry_is_the_entry_itself() -> None:
    settings = read_settings(_recipes.find_recipe("quickstart"), [("RankPreservingLoRA.rank", "4")])
    entry = callback_entry(settings, "RankPreservingLoRA")
    assert entry is not None
    assert entry["init_args"]["rank"] == 4
    assert callback_entry(settings, "Nothing") is None
