"""Folders that transformers loads: export, from_pretrained, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    logging,
)

from lowrank_lit import hub
from lowrank_lit.errors import ExportError, LowRankError, ModelError, NonFiniteError, PlanError
from lowrank_lit.layers import FactoredLinear, PivotLinear
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.surgery import count_parameters, find_targets, target_parameters, to_dense
from tests.test_surgery import factorise, output
from tests.tiny import CAUSAL_FAMILIES, batches, tiny_model

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars, and the quantizer known; a second registration does nothing."""
    hub.register()
    hub.register()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def factored(
    family: str = "llama",
    *,
    rank: int = 7,
    patterns: list[str] | None = None,
    form: Literal["factored", "pivot"] = "factored",
) -> tuple[Any, RankPlan]:
    model = tiny_model(family)
    return model, factorise(model, rank=rank, patterns=patterns, form=form)


def read(path: Path, auto_class: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    return auto_class.from_pretrained(path, attn_implementation="eager", **settings)


def cast_weights(model: Any, dtype: torch.dtype) -> Any:
    """Cast the parameters alone, as loading does; ``model.to`` would round the rotary frequencies as well."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def names_in(path: Path) -> set[str]:
    return set(load_file(path / WEIGHTS))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, RankPlan]:
    """A factored llama, its folder and its plan; copy the folder before changing it."""
    path = tmp_path_factory.mktemp("exported") / "llama"
    model, plan = factored()
    hub.export(model, plan, path)
    return path, model, plan


@pytest.fixture
def folder(exported: tuple[Path, Any, RankPlan], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exported[0], tmp_path / "llama"))


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_loaded_model_is_the_one_in_memory(family: str, tmp_path: Path) -> None:
    model, plan = factored(family)
    hub.export(model, plan, tmp_path / "out")
    loaded = read(tmp_path / "out")
    assert torch.equal(output(loaded), output(model))
    assert target_parameters(loaded, plan) == plan.parameters
    assert count_parameters(loaded) == count_parameters(model)
    assert not loaded.training
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) is tied
    heads = [name for name in names_in(tmp_path / "out") if name.startswith(("lm_head", "embed_out"))]
    assert bool(heads) is not tied  # a tied head is not stored twice

    start = batches(n=1)[0]["input_ids"][:1]
    made = loaded.generate(start, max_new_tokens=5, do_sample=False)
    assert torch.equal(made, model.generate(start, max_new_tokens=5, do_sample=False))
    assert made.shape[1] > start.shape[1]

    base = read(tmp_path / "out", AutoModel)
    assert torch.equal(output(base), output(model.base_model))

    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(read(tmp_path / "again")), output(model))
    base.save_pretrained(tmp_path / "base")
    assert torch.equal(output(read(tmp_path / "base", AutoModel)), output(model.base_model))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pivot_form_is_loaded_as_it_was(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, plan = factored(family, form="pivot")
    hub.export(model, plan, tmp_path / "out", dtype=dtype)
    cast_weights(model, dtype)
    for loaded in (
        read(tmp_path / "out"),
        hub.load(tmp_path / "out", attn_implementation="eager"),
        read(tmp_path / "out", device_map="cpu"),
    ):
        assert torch.equal(output(loaded), output(model))
        assert target_parameters(loaded, plan) == plan.parameters
        layers = [module for module in loaded.modules() if isinstance(module, PivotLinear)]
        assert len(layers) == len(plan.matrices)
        assert {layer.positions.dtype for layer in layers} == {torch.int32}
        assert any(layer.positions.tolist() != list(range(layer.out_features)) for layer in layers)
    assert torch.equal(output(read(tmp_path / "out", AutoModel)), output(model.base_model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(output(read(tmp_path / "again")), output(model))
    weights = dict(model.state_dict())
    given = type(model).from_pretrained(None, config=loaded.config, state_dict=dict(weights), dtype=dtype)
    assert torch.equal(output(given), output(model))
    name = f"{plan.matrices[3].name}.positions"
    del weights[name]
    # GPT-2's own initialisation reads the weight of every layer and meets the missing rows first.
    with pytest.raises((ExportError, IndexError), match=rf"'{name}' is missing from state_dict|out of bounds"):
        type(model).from_pretrained(None, config=loaded.config, state_dict=weights)
    edited(lambda stored: stored.pop(name))(tmp_path / "out")
    for auto_class in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ExportError, match=r"positions' is missing"):
            read(tmp_path / "out", auto_class)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_dtypes_and_device_maps(exported: tuple[Path, Any, RankPlan], dtype: Any, device_map: str | None) -> None:
    path, _, _ = exported
    loaded = read(path, dtype=dtype, device_map=device_map)
    wanted = torch.float32 if dtype == "auto" else dtype
    assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    expected, _ = factored()
    assert torch.equal(output(loaded), output(cast_weights(expected, wanted)))


def test_a_loaded_model_is_an_ordinary_one(exported: tuple[Path, Any, RankPlan]) -> None:
    """No mark of a quantised model is left: it casts, trains and takes adapters."""
    path, _, plan = exported
    loaded = read(path)
    assert not getattr(loaded, "is_quantized", False)
    assert getattr(loaded, "hf_quantizer", None) is None
    assert hub.LowRankConfig.from_dict(loaded.config.quantization_config.to_dict()).rank_plan() == plan
    before = output(loaded)
    adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules=["inner", "outer"], init_lora_weights=False))
    assert (output(adapted) - before).abs().max() > 1e-3
    batch = batches(n=1)[0]
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(gradients) == 2 * 2 * len(plan.matrices)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    assert torch.equal(output(adapted.unload()), before)
    assert next(read(path).half().parameters()).dtype == torch.float16


def test_adapters_are_refused_until_they_are_merged(tmp_path: Path) -> None:
    model, plan = factored()
    settings = LoraConfig(r=2, target_modules=["inner", "outer"], init_lora_weights=False)
    adapted = get_peft_model(model, settings)
    for candidate in (model, adapted):
        with pytest.raises(ModelError, match=r"merge the adapters first|no transformers model"):
            hub.export(candidate, plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    merged = adapted.merge_and_unload()
    hub.export(merged, plan, tmp_path / "out")
    assert torch.equal(output(read(tmp_path / "out")), output(merged))


def test_export_leaves_the_model_as_it_was(exported: tuple[Path, Any, RankPlan], tmp_path: Path) -> None:
    _, model, plan = exported
    model.config.architectures = None
    config, weights = model.config.to_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    hub.export(model, plan, tmp_path / "out", dtype="bfloat16")
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_cast_while_saving(family: str, tmp_path: Path) -> None:
    model, plan = factored(family)
    hub.export(model, plan, tmp_path / "out", dtype=torch.bfloat16)
    stored = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in stored) is (family == "mistral")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = read(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(output(loaded), output(cast_weights(model, torch.bfloat16)))


def test_what_does_not_fit_the_dtype_or_is_not_finite(tmp_path: Path) -> None:
    model, plan = factored()
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.inner.weight[0, 0] = 1e5
    with pytest.raises(NonFiniteError, match=r"'model\.layers\.1\.mlp\.up_proj\.inner\.weight' reaches 1e\+05"):
        hub.export(model, plan, tmp_path / "out", dtype="float16")
    with torch.no_grad():
        layer.inner.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'model\.layers\.1\.mlp\.up_proj\.inner\.weight' has a NaN"):
        hub.export(model, plan, tmp_path / "out")
    for dtype in ("int8", "float31", torch.int32):
        with pytest.raises(ExportError, match=r"dtype=.* is no floating-point type"):
            hub.export(model, plan, tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_tokenizer_and_generation_config_are_saved(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model, plan = factored()
    model.generation_config.max_new_tokens = 17
    hub.export(model, plan, tmp_path / "out", tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("two one")["input_ids"] == [2, 1]
    assert read(tmp_path / "out").generation_config.max_new_tokens == 17
    assert not (tmp_path / "out" / hub.MARKER).read_text().count(str(tmp_path))  # no path of this machine


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_dense_model(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    hub.export(model, None, tmp_path / "out", fingerprint="run-1")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert torch.equal(output(hub.load(tmp_path / "out", attn_implementation="eager")), output(model))
    hub.export(model, None, tmp_path / "out", fingerprint="run-1")
    with pytest.raises(ExportError, match=r"export of another run \(fingerprint 'run-1', this one 'run-2'\)"):
        hub.export(model, None, tmp_path / "out", fingerprint="run-2")
    hub.export(model, None, tmp_path / "anonymous")
    with pytest.raises(ExportError, match="export of another run"):
        hub.export(model, None, tmp_path / "anonymous")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_made_dense_again(family: str, tmp_path: Path) -> None:
    """The square Conv1D of GPT-2 would load transposed without an error if its nn.Linear were stored as it is."""
    model, plan = factored(family)
    hub.attach(model, plan)
    with pytest.raises(ModelError, match=r"in the model or in its class and plan, not in both"):
        hub.export(model, None, tmp_path / "out")
    to_dense(model)
    hub.export(model, None, tmp_path / "out")
    torch.testing.assert_close(output(read(tmp_path / "out")), output(model), rtol=0, atol=1e-5)  # measured 2e-6


def test_attach_makes_save_pretrained_enough(tmp_path: Path) -> None:
    model, plan = factored("qwen2")
    with pytest.raises(ModelError, match="still dense in the model"):
        hub.attach(tiny_model("qwen2"), plan)
    with pytest.raises(PlanError, match="does not fit the model"):
        hub.attach(tiny_model("gpt2"), plan)
    hub.attach(model, plan)
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert torch.equal(output(read(tmp_path / "out")), output(model))
    assert torch.equal(output(hub.load(tmp_path / "out", attn_implementation="eager")), output(model))


def test_a_factored_head(tmp_path: Path) -> None:
    model, plan = factored("mistral", patterns=["lm_head", "*.mlp.*"])
    hub.export(model, plan, tmp_path / "out")
    assert torch.equal(output(read(tmp_path / "out")), output(model))
    base = read(tmp_path / "out", AutoModel)
    assert torch.equal(output(base), output(model.base_model))
    kept = base.config.quantization_config.rank_plan()
    assert len(kept.matrices) == len(plan.matrices) - 1
    assert target_parameters(base, kept) == kept.parameters


def test_another_head_on_a_factored_body(exported: tuple[Path, Any, RankPlan]) -> None:
    path, model, plan = exported
    classifier = read(path, AutoModelForSequenceClassification, num_labels=3)
    assert target_parameters(classifier, plan) == plan.parameters
    assert torch.equal(output(classifier.base_model), output(model.base_model))


def test_weights_given_as_a_dictionary(exported: tuple[Path, Any, RankPlan]) -> None:
    path, model, _ = exported
    config, weights = read(path).config, dict(model.state_dict())
    loaded = type(model).from_pretrained(None, config=config, state_dict=dict(weights))
    assert torch.equal(output(loaded), output(model))
    del weights["model.layers.0.mlp.up_proj.inner.weight"]
    with pytest.raises(
        ExportError, match=r"'model\.layers\.0\.mlp\.up_proj\.inner\.weight' is missing from state_dict"
    ):
        type(model).from_pretrained(None, config=config, state_dict=weights)


def test_files_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        hub.export(*factored(), tmp_path / "model")
    finally:
        os.umask(before)
    assert {item.stat().st_mode & 0o777 for item in (tmp_path / "model").iterdir()} == {0o640}


def test_a_dense_model_is_not_factored_while_loading(tmp_path: Path) -> None:
    _, plan = factored()
    hub.export(tiny_model("llama"), None, tmp_path / "out")
    with pytest.raises(ModelError, match=r"use lowrank_lit\.compress"):
        read(tmp_path / "out", quantization_config=hub.LowRankConfig(plan))


FACTOR = "model.layers.1.mlp.gate_proj.outer.weight"


def edited(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        weights = load_file(path / WEIGHTS)
        change(weights)
        save_file(weights, path / WEIGHTS, metadata={"format": "pt"})

    return apply


def truncated(share: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = (path / WEIGHTS).read_bytes()
        (path / WEIGHTS).write_bytes(content[: int(len(content) * share)])

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing factor": (edited(lambda w: w.pop(FACTOR)), f"tensor '{FACTOR}' is missing (1 of"),
    "missing norm": (edited(lambda w: w.pop("model.norm.weight")), "tensor 'model.norm.weight' is missing (1 of"),
    "missing embedding": (
        edited(lambda w: w.pop("model.embed_tokens.weight")),
        "tensor 'model.embed_tokens.weight' is missing",
    ),
    "wrong shape": (
        edited(lambda w: w.update({FACTOR: w[FACTOR][:, 1:].clone()})),
        f"tensor '{FACTOR}' has shape (48, 6), the plan needs (48, 7)",
    ),
    "transposed": (
        edited(lambda w: w.update({FACTOR: w[FACTOR].T.contiguous()})),
        f"tensor '{FACTOR}' has shape (7, 48), the plan needs (48, 7)",
    ),
    "unexpected bias": (
        edited(lambda w: w.update({FACTOR.replace("weight", "bias"): torch.ones(48)})),
        f"tensor '{FACTOR.replace('weight', 'bias')}' has no place in the plan",
    ),
    "dense beside factored": (
        edited(lambda w: w.update({FACTOR.replace("outer.", ""): torch.ones(48, 32)})),
        f"tensor '{FACTOR.replace('outer.', '')}' has no place in the plan",
    ),
    "empty file": (truncated(0.0), WEIGHTS),
    "truncated header": (truncated(0.01), WEIGHTS),
    "truncated": (truncated(0.6), WEIGHTS),
    "truncated by a hair": (truncated(0.9999), WEIGHTS),
}


# What is outside the plan may be missing in another class, such as a new head: transformers' own report tells of that.
OF_THE_PLAN = [kind for kind in DAMAGE if kind not in {"missing norm", "missing embedding"}]


@pytest.mark.parametrize(
    ("kind", "auto_class"),
    [*((kind, AutoModelForCausalLM) for kind in DAMAGE), *((kind, AutoModel) for kind in OF_THE_PLAN)],
)
def test_no_weight_is_ever_random(folder: Path, kind: str, auto_class: Any) -> None:
    damage, message = DAMAGE[kind]
    damage(folder)
    if auto_class is AutoModel and "no place" not in message:
        message = message.replace("'model.", "'")
    for settings in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ExportError) as caught:
            read(folder, auto_class, **settings)
        assert message in str(caught.value)
        assert "export the model again" in str(caught.value)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ExportError):
        hub.load(folder, auto_class=auto_class)


def test_a_plan_without_a_matrix_that_is_factored(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    plan = config["quantization_config"]["plan"]
    del plan["matrices"][3]
    (folder / "config.json").write_text(json.dumps(config))
    for auto_class in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ExportError, match=r"is missing|has no place in the plan"):
            read(folder, auto_class)


def test_plans_and_formats_that_cannot_be_read(folder: Path) -> None:
    good = json.loads((folder / "config.json").read_text())
    bad: list[tuple[dict[str, Any], type[LowRankError], str]] = [
        ({"format_version": 2}, ExportError, "format_version=2 in config.json is newer"),
        ({"format_version": None}, ExportError, "format_version=None"),
        ({"plan": None}, ExportError, "has no plan"),
        ({"plan": {"format_version": 1}}, PlanError, "plan"),
        ({"format_version": 2, "new_key": 1}, ExportError, "upgrade lowrank-lit"),
    ]
    for change, error, message in bad:
        changed = {**good, "quantization_config": {**good["quantization_config"], **change}}
        (folder / "config.json").write_text(json.dumps(changed))
        for loader in (read, hub.load):
            with pytest.raises(error, match=message):
                loader(folder)
    (folder / "config.json").write_text(json.dumps({**good, "hidden_size": 64}))
    with pytest.raises(PlanError, match="the plan does not fit the model in 14 of 14 matrices"):
        read(folder)


def test_a_folder_of_the_first_release(folder: Path, exported: tuple[Path, Any, RankPlan]) -> None:
    """A plan of version 1, and no guard."""
    _, model, plan = exported
    config = json.loads((folder / "config.json").read_text())
    entry = config["quantization_config"]["plan"]
    entry["format_version"] = 1
    for key in ("preset", "feedback", "storage", "predicted_nats", "nested", "order"):
        del entry[key]
    (folder / "config.json").write_text(json.dumps(config))
    edited(lambda weights: weights.pop(f"{plan.matrices[0].name}.weight"))(folder)
    for loader in (read, lambda path: hub.load(path, attn_implementation="eager")):
        assert torch.equal(output(loader(folder)), output(model))


def test_load_gives_one_line_where_transformers_gives_many(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere' is no folder"):
        hub.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match="empty' is no model folder: it has no config"):
        hub.load(tmp_path / "empty")
    whole = (folder / "config.json").read_text()
    (folder / "config.json").write_text(whole[:50])
    with pytest.raises(ExportError, match=r"config\.json' is truncated or no JSON"):
        hub.load(folder)
    (folder / "config.json").write_text(whole.replace('"llama"', '"no-such-model"'))
    with pytest.raises(ExportError, match=r"cannot be loaded \(.*no-such-model") as caught:
        hub.load(folder)
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text(whole)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ExportError, match=rf"{WEIGHTS}' is missing"):
        hub.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ExportError, match="is no model folder: it has no config"):
        hub.load(folder)


def test_a_missing_shard_is_named(exported: tuple[Path, Any, RankPlan], tmp_path: Path) -> None:
    _, model, plan = exported
    hub.attach(model, plan)
    model.save_pretrained(tmp_path / "out", max_shard_size="10KB")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ExportError, match=f"{shard.name}' is missing"):
        hub.load(tmp_path / "out")


def test_the_same_run_replaces_its_export(exported: tuple[Path, Any, RankPlan], folder: Path) -> None:
    _, model, plan = exported
    with torch.no_grad():
        (other := tiny_model("llama", seed=5)).eval()
    factorise(other, rank=7)
    hub.refuse_foreign(folder, hub.export_fingerprint(plan))
    hub.export(other, plan, folder)
    assert torch.equal(output(read(folder)), output(other))
    assert not torch.equal(output(other), output(model))
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]


def test_anything_else_is_refused_and_kept(exported: tuple[Path, Any, RankPlan], folder: Path, tmp_path: Path) -> None:
    _, model, plan = exported
    before = snapshot(folder)
    with pytest.raises(ExportError, match="holds the export of another run"):
        hub.export(model, replace(plan, fingerprint="another"), folder)
    assert snapshot(folder) == before
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds 'notes\.txt' beside an earlier export"):
        hub.export(model, plan, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    (folder / hub.MARKER).write_text("{")
    with pytest.raises(ExportError, match=rf"{hub.MARKER}' is truncated"):
        hub.export(model, plan, folder)
    foreign = tmp_path / "foreign"
    (foreign / "deep").mkdir(parents=True)
    hub.refuse_foreign(foreign, "x")  # empty but for a folder
    (foreign / "deep" / "thesis.tex").write_text("mine")
    with pytest.raises(ExportError, match=r"holds 'deep/thesis\.tex', which is no export of this run"):
        hub.export(model, plan, foreign)
    with pytest.raises(ExportError, match="is a file; choose a folder"):
        hub.export(model, plan, foreign / "deep" / "thesis.tex")
    with pytest.raises(ExportError, match=r"cannot be written \(.*\)"):
        hub.export(model, plan, foreign / "deep" / "thesis.tex" / "out")
    hub.refuse_foreign(tmp_path / "not-there", "x")
    assert (foreign / "deep" / "thesis.tex").read_text() == "mine"


def test_fingerprint() -> None:
    plan = RankPlan((MatrixPlan("a", 4, 4, "factored", 2),), 0.5, "input", "uniform")
    assert hub.export_fingerprint(plan) == plan.digest()
    assert hub.export_fingerprint(replace(plan, fingerprint="run")) == "run"
    assert hub.export_fingerprint(plan, "given") == hub.export_fingerprint(None, "given") == "given"
    assert hub.export_fingerprint(None) == ""


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process grows past ``limit`` bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [1_000, 20_000], ids=["config", "weights"])
def test_a_full_disk(exported: tuple[Path, Any, RankPlan], folder: Path, limit: int) -> None:
    _, model, plan = exported
    before = snapshot(folder)
    assert len(before["config.json"]) < 20_000 < len(before[WEIGHTS])
    with file_size_limit(limit), pytest.raises(ExportError, match=r"cannot be written \(.*\); free space") as caught:
        hub.export(model, plan, folder)
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before  # the earlier export is still whole
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]


class Interrupts:
    """A tokenizer that is interrupted while it saves."""

    def save_pretrained(self, folder: Path) -> None:
        assert (folder / WEIGHTS).exists()
        raise KeyboardInterrupt


def test_interrupts_and_leftovers(exported: tuple[Path, Any, RankPlan], folder: Path) -> None:
    _, model, plan = exported
    before = snapshot(folder)
    with pytest.raises(KeyboardInterrupt):
        hub.export(model, plan, folder, tokenizer=Interrupts())
    assert snapshot(folder) == before
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]

    # Killed while writing: a partial folder stays.
    partial = folder.with_name(f".{folder.name}.lowrank-lit-partial")
    partial.mkdir()
    (partial / WEIGHTS).write_bytes(b"half")
    hub.export(model, plan, folder)
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]

    # Killed between the two renames: the earlier export waits beside, and is back even if the next one is refused.
    previous = folder.with_name(f".{folder.name}.lowrank-lit-previous")
    folder.rename(previous)
    with pytest.raises(ExportError, match="another run"):
        hub.export(model, plan, folder, fingerprint="another")
    assert folder.exists()
    assert not previous.exists()

    # Killed just after them: the replaced export is removed.
    shutil.copytree(folder, previous)
    hub.export(model, plan, folder)
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]
    assert torch.equal(output(read(folder)), output(model))


FRESH = """
import sys
import torch
import lowrank_lit, lowrank_lit.hub
lowrank_lit.hub.register()
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager")
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_a_fresh_interpreter(exported: tuple[Path, Any, RankPlan], tmp_path: Path) -> None:
    path, model, _ = exported
    batch = batches(n=1)[0]
    torch.save(batch, tmp_path / "batch")
    files = [str(path), str(tmp_path / "batch"), str(tmp_path / "logits")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *files],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(hub.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "MISSING" not in done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), output(model, **batch))


WITHOUT_IMPORT = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for auto_class in (AutoModelForCausalLM, AutoModel):
    try:
        auto_class.from_pretrained(sys.argv[1])
    except RuntimeError as error:
        assert "mismatch" in str(error), error
    else:
        raise SystemExit("a model of random weights was loaded")
"""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("form", ["factored", "pivot"])
def test_without_the_import_it_is_an_error(family: str, form: Literal["factored", "pivot"], tmp_path: Path) -> None:
    """transformers alone builds the dense model; one tensor of another shape keeps it from inventing the weights."""
    model, plan = factored(family, form=form)
    hub.export(model, plan, tmp_path / "out")
    assert load_file(tmp_path / "out" / WEIGHTS)[f"{plan.matrices[0].name}.weight"].shape == (0,)
    command = [sys.executable, "-c", WITHOUT_IMPORT, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{plan.matrices[0].name}.weight" in done.stderr  # the report names it
    _, report = read(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())  # and with the import nobody hears of it


def test_nothing_here_is_vacuous(exported: tuple[Path, Any, RankPlan]) -> None:
    _, model, plan = exported
    assert len(plan.matrices) == 14
    assert sum(isinstance(module, FactoredLinear) for module in model.modules()) == 14
    assert (output(model) - output(tiny_model("llama"))).abs().max() > 0.1
    assert len(find_targets(tiny_model("llama"))) == 14
