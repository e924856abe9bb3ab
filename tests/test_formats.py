"""Formats of an export beside the package's own, 4 bits on loading, and names of the hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, logging

import lowrank_lit
from lowrank_lit import hub
from lowrank_lit.errors import ExportError, LowRankError, ModelError, NonFiniteError
from lowrank_lit.experts import SeparateExperts, fuse_experts, separate_experts
from lowrank_lit.formats import ARENA_RECORD, FORMATS
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.plan import RankPlan
from lowrank_lit.quantize import quantize_factors
from lowrank_lit.surgery import count_parameters
from tests.families import FAMILIES
from tests.test_surgery import factorise, output
from tests.tiny import batches, tiny_model

EVALUATION = {"dense": 10.0, "compressed": 12.5, "protocol": {"text": "none", "blocks": 4, "length": 32}}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def factored(family: str, *, rank: int = 7, form: Any = "factored", **overrides: Any) -> tuple[Any, RankPlan]:
    model = tiny_model(family, **overrides)
    separate_experts(model)
    return model, factorise(model, rank=rank, form=form)


def read(path: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **settings)


# ---- dense ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_dense_is_an_ordinary_model(family: str, tmp_path: Path) -> None:
    model, plan = factored(family)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactoredLayer)}
    before = output(model)
    hub.export(model, plan, tmp_path / "out", format="dense")
    assert torch.equal(output(model), before)
    assert {n: m for n, m in model.named_modules() if isinstance(m, FactoredLayer)} == layers  # the very same objects
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    original = tiny_model(family)
    assert config["architectures"] == [type(original).__name__]
    original.save_pretrained(tmp_path / "original")
    shapes, expected = (
        {name: value.shape for name, value in load_file(tmp_path / folder / "model.safetensors").items()}
        for folder in ("out", "original")
    )
    assert shapes == expected
    loaded = read(tmp_path / "out")
    assert not any(isinstance(module, (FactoredLayer, SeparateExperts)) for module in loaded.modules())
    torch.testing.assert_close(output(loaded), before, rtol=0, atol=2e-5)  # measured 4e-6


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_what_they_were(family: str) -> None:
    model = tiny_model(family)
    weights, before = {name: value.clone() for name, value in model.state_dict().items()}, output(model)
    fused = separate_experts(model)
    apart = fuse_experts(model)
    assert apart.keys() == fused.keys()
    assert all(isinstance(module, SeparateExperts) for module in apart.values())
    now = model.state_dict()
    assert now.keys() == weights.keys()
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    assert torch.equal(output(model), before)
    separate_experts(model)
    factorise(model, rank=4, patterns=["*.experts.1.down"])
    factored_output = output(model)
    with pytest.raises(ModelError, match="has factored experts, which cannot be fused"):
        fuse_experts(model)
    assert torch.equal(output(model), factored_output)


def test_an_overflowing_product_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, plan = factored("llama")
    layer = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.inner.weight.fill_(3e30)
        layer.outer.weight.fill_(3e30)
    with pytest.raises(NonFiniteError, match="product of the factors of"):
        hub.export(model, plan, tmp_path / "out", format="dense")
    assert model.model.layers[1].mlp.down_proj is layer
    assert sum(isinstance(module, FactoredLayer) for module in model.modules()) == len(plan.matrices)
    assert not list(tmp_path.iterdir())


# ---- trust-remote-code ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "form"), [("llama", "factored"), ("gpt2", "pivot"), ("qwen3_moe", "factored"), ("opt", "pivot")]
)
def test_remote_code_computes_what_the_package_computes(
    family: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, plan = factored(family, form=form)
    hub.export(model, plan, tmp_path / "out", format="trust-remote-code")
    loaded, report = read(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert not any(report.values())
    assert not any(isinstance(module, FactoredLayer) for module in loaded.modules())
    assert count_parameters(loaded) == count_parameters(model)
    assert torch.equal(output(loaded), output(model))
    start = batches(n=1)[0]["input_ids"][:1]
    assert torch.equal(loaded.generate(start, max_new_tokens=4), model.generate(start, max_new_tokens=4))
    loaded.train()
    batch = batches(n=1)[0]
    loaded(**batch, labels=batch["input_ids"]).loss.backward()
    ours = hub.load(tmp_path / "out", trust_remote_code=True, attn_implementation="eager")
    assert torch.equal(output(ours), output(model))
    # Nobody gets random weights for want of the argument.
    with pytest.raises(RuntimeError, match="mismatch"):
        read(tmp_path / "out")
    with pytest.raises(ExportError, match="carries its own code; load it with trust_remote_code=True"):
        hub.load(tmp_path / "out")


PLAIN = """
import json, sys
sys.modules["lowrank_lit"] = None  # its import raises
import torch, transformers
transformers.logging.disable_progress_bar()

def read(folder, auto):
    return getattr(transformers, auto).from_pretrained(
        folder, attn_implementation="eager", trust_remote_code=True, output_loading_info=True
    )

def first(model, batch):
    with torch.no_grad():
        return model(**torch.load(batch))[0]

for case in json.loads(sys.argv[1]):
    folder = case["folder"]
    model, report = read(folder, case["auto"])
    assert not any(report.values()), report
    assert type(model).__name__ == case["class"], type(model)
    torch.save(first(model, folder + ".batch"), folder + ".values")
    model.save_pretrained(folder + "-again")
    again, _ = read(folder + "-again", case["auto"])
    assert torch.equal(first(again, folder + ".batch"), torch.load(folder + ".values"))
"""


def test_neither_code_nor_a_dense_model_needs_the_package(tmp_path: Path) -> None:
    """transformers alone, in a process where importing this package raises."""
    cases, expected = [], {}
    for name, format in (("Mixtral", "trust-remote-code"), ("T5", "trust-remote-code"), ("GPT-2", "dense")):
        family, path = FAMILIES[name], tmp_path / name
        model = family.build()
        separate_experts(model)
        hub.export(model, factorise(model, rank=5), path, format=format)
        kind = f"{'LowRank' if format != 'dense' else ''}{type(model).__name__}"
        cases.append({"folder": str(path), "auto": family.auto, "class": kind})
        torch.save(family.batch(), f"{path}.batch")
        expected[name] = output(model, **family.batch())
        if format != "dense":
            assert {"modeling_lowrank.py", "config.json", "model.safetensors"} <= set(os.listdir(path))
            assert "import lowrank_lit" not in (path / "modeling_lowrank.py").read_text()
    environment = os.environ | {
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", PLAIN, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for name, values in expected.items():
        tolerance = 2e-5 if name == "GPT-2" else 0.0
        torch.testing.assert_close(torch.load(f"{tmp_path / name}.values"), values, rtol=0, atol=tolerance)


def test_every_family_has_an_auto_class(tmp_path: Path) -> None:
    for name, family in FAMILIES.items():
        model = family.build()
        plan = factorise(model, rank=3)
        hub.export(model, plan, tmp_path / name, format="trust-remote-code")
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["auto_map"][family.auto] == f"modeling_lowrank.{config['architectures'][0]}"
        assert RankPlan.from_dict(config["lowrank_plan"]) == plan


def test_a_class_that_a_file_cannot_name(tmp_path: Path) -> None:
    model, plan = factored("llama")
    model.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(ExportError, match="Mine is no class that transformers exports"):
        hub.export(model, plan, tmp_path / "out", format="trust-remote-code")


# ---- lowrankarena, and what does not go together --------------------------------------------------------------------


def test_arena_record(tmp_path: Path) -> None:
    model, plan = factored("llama")
    dense = count_parameters(tiny_model("llama"))
    hub.export(model, plan, tmp_path / "out", format="lowrankarena", evaluation=EVALUATION)
    record = json.loads((tmp_path / "out" / ARENA_RECORD).read_text())
    assert record["parameters"] == {
        "targets_dense": plan.dense_parameters,
        "targets": plan.parameters,
        "model_dense": dense,
        "model": count_parameters(model),
    }
    assert record["ratios"]["whole_model"] == count_parameters(model) / dense
    assert record["ratios"]["achieved"] == plan.keep_ratio
    assert [(m["name"], m["form"], m["rank"]) for m in record["plan"]] == [
        (m.name, m.form, m.rank) for m in plan.matrices
    ]
    assert record["perplexity"] == EVALUATION
    assert record["method"]["metric"] == "identity"
    assert torch.equal(output(read(tmp_path / "out")), output(model))
    worse = EVALUATION | {"compressed": float("inf")}
    hub.export(model, plan, tmp_path / "out", format="lowrankarena", evaluation=worse)
    assert json.loads((tmp_path / "out" / ARENA_RECORD).read_text())["perplexity"]["compressed"] == "Infinity"
    with pytest.raises(NonFiniteError, match="is NaN"):
        hub.export(model, plan, tmp_path / "x", format="lowrankarena", evaluation=EVALUATION | {"dense": float("nan")})


def test_what_does_not_go_together(tmp_path: Path) -> None:
    model, plan = factored("llama")
    dense = tiny_model("llama")
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (model, plan, {"format": "gguf"}, r"format='gguf' is unknown; choose one of lowrank, dense"),
        (model, plan, {"format": "lowrankarena"}, r"needs evaluation\['dense'\]"),
        (model, plan, {"evaluation": EVALUATION}, "leave it out"),
        (dense, None, {"format": "trust-remote-code"}, "needs a factored model"),
        (dense, None, {"format": "lowrankarena", "evaluation": EVALUATION}, "needs a factored model"),
    ]
    for candidate, candidate_plan, settings, message in cases:
        with pytest.raises(ExportError, match=message) as caught:
            hub.export(candidate, candidate_plan, tmp_path / "out", **settings)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_formats_do_not_replace_each_other(tmp_path: Path) -> None:
    model, plan = factored("llama")
    hub.export(model, plan, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    for format in FORMATS[1:]:
        evaluation = EVALUATION if format == "lowrankarena" else None
        with pytest.raises(ExportError, match="holds the export of another run"):
            hub.export(model, plan, tmp_path / "out", format=format, evaluation=evaluation)
        for _ in range(2):  # of itself it is an earlier export
            hub.export(model, plan, tmp_path / format, format=format, evaluation=evaluation)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


# ---- 4 bits on loading ----------------------------------------------------------------------------------------------

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}


def test_load_in_4bit_is_quantize_factors(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, plan = factored("llama", rank=64, **WIDE)
    hub.export(model, plan, tmp_path / "out")
    numbers = count_parameters(model)
    loaded = hub.load(tmp_path / "out", load_in_4bit=True, attn_implementation="eager")
    quantize_factors(model)
    assert torch.equal(output(loaded), output(model))
    assert loaded.num_parameters() == numbers  # transformers counts the packed ones
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if ".inner." in name)
    with pytest.raises(ModelError, match="is in 4 bits, which an export does not hold"):
        hub.export(loaded, plan, tmp_path / "again")


def test_load_in_4bit_of_a_smaller_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny_model("llama", **WIDE)
    result = lowrank_lit.compress(
        model, batches(n=2), keep_ratio=0.9, preset="fast", nested=True, quantum=64, min_rank=64
    )
    assert max(matrix.rank for matrix in result.plan.matrices if matrix.form == "factored") > 64
    hub.export(model, result.plan, tmp_path / "out")
    loaded = hub.load(tmp_path / "out", keep_ratio=0.7, load_in_4bit=True)
    plan = loaded.config.quantization_config.rank_plan()
    assert plan.keep_ratio <= 0.7
    assert {matrix.rank % 64 for matrix in plan.matrices if matrix.form == "factored"} == {0}
    assert torch.isfinite(output(loaded)).all()


def test_load_in_4bit_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = factored("llama", rank=7)
    hub.export(model, plan, tmp_path / "out")
    hub.export(tiny_model("llama"), None, tmp_path / "dense")
    with pytest.raises(LowRankError, match=r"has rank 7, which is no multiple of 64 \(14 of 14 layers\)"):
        hub.load(tmp_path / "out", load_in_4bit=True)
    with pytest.raises(ExportError, match="holds a dense model, which load_in_4bit=True has no factors of"):
        hub.load(tmp_path / "dense", load_in_4bit=True)
    with pytest.raises(ExportError, match=r"takes no quantization_config; set load_in_4bit=True"):
        hub.load(tmp_path / "out", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LowRankError, match=r"load_in_4bit=True needs bitsandbytes .*lowrank-lit\[qlora\]"):
        hub.load(tmp_path / "out", load_in_4bit=True)


def test_our_adapters_on_a_model_loaded_in_4bit(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, plan = factored("llama", rank=64, **WIDE)
    hub.export(model, plan, tmp_path / "out")
    loaded = hub.load(tmp_path / "out", load_in_4bit=True, attn_implementation="eager")
    before = output(loaded)
    adapters = lowrank_lit.add_adapters(loaded, rank=4)
    assert torch.equal(output(loaded), before)
    adapters.merge()
    torch.testing.assert_close(output(loaded), before, rtol=0, atol=1e-4)
    hub.export(loaded, plan, tmp_path / "merged")


def test_the_weight_of_a_pair_in_4bit(tmp_path: Path) -> None:
    """T5 asks its feed-forward layers for the dtype of their weight."""
    pytest.importorskip("bitsandbytes")
    model, _ = factored("llama", rank=64, **WIDE)
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.weight.detach().clone()
    quantize_factors(model)
    assert layer.weight.shape == exact.shape
    assert layer.weight.dtype == exact.dtype
    assert 0.05 < float((layer.weight - exact).norm() / exact.norm()) < 0.2
    x = torch.randn(5, 256)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-4, atol=1e-4)


# ---- names of the hub -----------------------------------------------------------------------------------------------


def test_a_hub_name_without_network(tmp_path: Path) -> None:
    """One line, soon; nothing listens on the port."""
    code = (
        "import lowrank_lit, time\n"
        "for load in (lowrank_lit.load, lambda name: lowrank_lit.LowRankModule(name).configure_model()):\n"
        "    start = time.monotonic()\n"
        "    try:\n        load('somebody/no-such-model')\n"
        "    except lowrank_lit.LowRankError as error:\n        print(error, time.monotonic() - start)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ours, of_the_module = done.stdout.splitlines()
    assert "path='somebody/no-such-model' is no folder here, and the hub gives no such model" in ours
    assert "model 'somebody/no-such-model' cannot be loaded (We couldn't connect" in of_the_module
    for line in (ours, of_the_module):  # with its own tries the client of the hub takes 23 seconds
        assert float(line.split()[-1]) < 10, line


def test_a_hub_name_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = factored("llama")
    commit = "0" * 40
    cached = tmp_path / "hub" / "models--somebody--small"
    hub.export(model, plan, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = hub.load("somebody/small", cache_dir=tmp_path / "hub", attn_implementation="eager")
    assert torch.equal(output(loaded), output(model))
    with pytest.raises(ExportError, match="the hub gives no such model"):
        hub.load("somebody/large", cache_dir=tmp_path / "hub")
    with pytest.raises(ExportError, match=r"path='no/such/folder' is no folder; give"):
        hub.load("no/such/folder")
