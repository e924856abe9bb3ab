"""The table of families: each cell of tests/families.py, and what needs one family only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, logging, pipeline

import lowrank_lit
from lowrank_lit.layers import FactoredLinear, PivotLinear
from tests.families import (
    CELLS,
    FAMILIES,
    WORKS,
    Workbench,
    adapts,
    compiles,
    compresses,
    generates,
    loads,
    quantises,
    saves,
)
from tests.test_surgery import output
from tests.tiny import batches, tiny_model

FAST = {"compress": compresses, "save": saves, "load": loads, "generate": generates, "4-bit": quantises}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    logging.disable_progress_bar()
    yield Workbench(tmp_path_factory.mktemp("families"))
    logging.enable_progress_bar()


@pytest.mark.parametrize("cell", FAST)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_cell_works(bench: Workbench, name: str, cell: str) -> None:
    if cell == "4-bit":
        pytest.importorskip("bitsandbytes")
    expected = WORKS if cell != "generate" or FAMILIES[name].generates else "no text"
    assert FAST[cell](bench, name).startswith(expected)


def test_plain_peft_code_on_every_family(bench: Workbench) -> None:
    assert adapts(bench, list(FAMILIES)) == dict.fromkeys(FAMILIES, WORKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_whole_models_compile(bench: Workbench, name: str) -> None:
    said = compiles(bench, name)
    assert said.startswith("" if FAMILIES[name].experts else WORKS), said
    if FAMILIES[name].experts:
        assert "called one by one" in said


def test_the_table_has_every_cell() -> None:
    assert set(CELLS) == {*FAST, "PEFT", "compile"}


@pytest.mark.parametrize("layer_class", [FactoredLinear, PivotLinear])
def test_layers_are_exported(layer_class: Any) -> None:
    layer = layer_class(12, 20, 5)
    x = torch.randn(3, 7, 12)
    length = torch.export.Dim("length")
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: length},))
    for steps in (7, 4):
        assert torch.equal(program.module()(x[:, :steps]), layer(x[:, :steps]))


@pytest.mark.slow
@pytest.mark.parametrize("layer_class", [FactoredLinear, PivotLinear])
def test_layers_compile(layer_class: Any) -> None:
    layer = layer_class(12, 20, 5)
    x = torch.randn(3, 7, 12, requires_grad=True)
    values = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(values, layer(x))
    values.square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_text_generation_pipeline(bench: Workbench, tokenizer_folder: Path) -> None:
    path = bench.folder / "with-tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    model = tiny_model("llama", vocab_size=300)
    data = [tokenizer("the small foxes jump over the lazy dogs " * 4, return_tensors="pt")]
    result = lowrank_lit.compress(model, data, keep_ratio=0.6, min_rank=2, preset="fast")
    lowrank_lit.export(model, result.plan, path, tokenizer=tokenizer)
    write = pipeline("text-generation", model=str(path), device="cpu")
    assert any(isinstance(module, FactoredLinear) for module in write.model.modules())
    (made,) = write("the small", max_new_tokens=5, do_sample=False)
    assert made["generated_text"].startswith("the small")


def arguments(folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
    )


ROWS = [
    {"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)}
    for batch in batches(n=4)
    for row in batch["input_ids"]
]


def test_transformers_trainer(bench: Workbench, tmp_path: Path) -> None:
    """The loaded model is an ordinary one to it: the factors train, and its checkpoint loads."""
    model = bench.load("Llama")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=ROWS)
    trainer.train()
    moved = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    assert any("inner" in name for name in moved)
    assert any("outer" in name for name in moved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2", attn_implementation="eager")
    torch.testing.assert_close(output(again), output(model.eval()), rtol=0, atol=1e-6)


def test_trainer_and_peft_on_factors_in_4_bits(bench: Workbench, tmp_path: Path) -> None:
    """QLoRA by plain PEFT code: PEFT takes its own 4-bit layer, the 4-bit weights stay, and a merge is near."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    quantises(bench, "Llama")
    model = lowrank_lit.load(bench.folder / "Llama-wide", load_in_4bit=True, attn_implementation="eager")
    adapted = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(r=2, target_modules=["inner", "outer"]))
    layer = adapted.base_model.model.model.layers[0].mlp.up_proj.inner
    assert type(layer).__name__ == "Linear4bit"
    assert type(layer).__module__.startswith("peft.")
    packed = layer.base_layer.weight.detach().clone()
    Trainer(model=adapted, args=arguments(tmp_path), train_dataset=ROWS).train()
    assert torch.equal(layer.base_layer.weight, packed)
    adapted.eval()
    trained = output(adapted)
    assert float(layer.lora_B["default"].weight.detach().abs().max()) > 0
    with pytest.warns(UserWarning, match="rounding errors"):
        merged = adapted.merge_and_unload()
    error = float((output(merged) - trained).norm() / trained.norm())
    assert error < 0.5, error


def test_push_to_hub_sends_a_folder_that_loads(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: dict[str, bytes] = {}

    def take(self: HfApi, repo_id: str, operations: Any, **settings: Any) -> None:
        for operation in operations:
            with operation.as_file() as file:
                sent[operation.path_in_repo] = file.read()

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "create_commit", take)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    bench.load("Llama").push_to_hub("somebody/small-llama")
    assert {"config.json", "model.safetensors", "README.md"} <= sent.keys()
    assert json.loads(sent["config.json"])["quantization_config"]["quant_method"] == "lowrank"
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(output(bench.load("Llama", tmp_path)), output(bench.compressed("Llama")[0]))
