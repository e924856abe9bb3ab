"""Every supported family against what transformers, PEFT and torch do with a model: one function for each cell of the
table, shared by test_families.py and benchmarks/families.py.

A cell returns "works", or one line that says what does not and whose limit it is; anything else is raised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, ViTConfig
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration
from transformers.models.vit.modeling_vit import ViTForImageClassification

import lowrank_lit
from lowrank_lit.experts import separate_experts
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.plan import RankPlan
from lowrank_lit.quantize import dequantize_model
from tests.test_surgery import factorise, output
from tests.tiny import batches, randomise, tiny_model

ROOT = Path(__file__).resolve().parent.parent
WORKS = "works"

Build = Callable[..., PreTrainedModel]

_WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
_LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Family:
    """One row of the table."""

    build: Build
    """Takes overrides of the configuration."""
    wide: dict[str, Any] = field(default_factory=lambda: dict(_WIDE))
    """Overrides that leave room for ranks of 64."""
    auto: str = "AutoModelForCausalLM"
    batch: Callable[[], dict[str, Tensor]] = lambda: batches(n=1)[0]
    generates: bool = True
    experts: bool = False

    @property
    def auto_class(self) -> Any:
        """The class that loads it."""
        return getattr(transformers, self.auto)


def _named(family: str, **settings: Any) -> Build:
    return lambda **overrides: tiny_model(family, **{**settings, **overrides})


def _t5(**overrides: Any) -> PreTrainedModel:
    settings = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    settings |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    return _seeded(T5ForConditionalGeneration, T5Config(**{**settings, **overrides}))


def _vit(**overrides: Any) -> PreTrainedModel:
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return _seeded(ViTForImageClassification, ViTConfig(**{**settings, "image_size": 16, "patch_size": 4, **overrides}))


def _seeded(model_class: Any, config: Any) -> PreTrainedModel:
    config._attn_implementation = "eager"
    model: PreTrainedModel = model_class(config)
    randomise(model)
    return model.eval()


def _translation() -> dict[str, Tensor]:
    first, second = batches(n=2)
    return {**first, "decoder_input_ids": second["input_ids"][:, :9]}


def _images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


FAMILIES: dict[str, Family] = {
    "Llama": Family(_named("llama")),
    "Llama 3": Family(_named("llama", rope_parameters=_LLAMA_3, tie_word_embeddings=False)),
    "Qwen2": Family(_named("qwen2")),
    "Qwen3": Family(_named("qwen3"), _WIDE | {"head_dim": 64}),
    "Mistral": Family(_named("mistral")),
    "Gemma 2": Family(_named("gemma2"), _WIDE | {"head_dim": 64, "query_pre_attn_scalar": 64}),
    "Phi": Family(_named("phi")),
    "GPT-2": Family(_named("gpt2"), {"n_embd": 256, "n_inner": 384, "n_layer": 1}),
    "GPT-NeoX": Family(_named("gpt_neox")),
    "OPT": Family(
        _named("opt"), {"hidden_size": 256, "word_embed_proj_dim": 256, "ffn_dim": 384, "num_hidden_layers": 1}
    ),
    "BERT": Family(_named("bert"), auto="AutoModel", generates=False),
    "T5": Family(
        _t5, {"d_model": 256, "d_kv": 64, "d_ff": 384, "num_layers": 1}, "AutoModelForSeq2SeqLM", _translation
    ),
    "ViT": Family(_vit, auto="AutoModelForImageClassification", batch=_images, generates=False),
    "Mixtral": Family(_named("mixtral"), experts=True),
    "Qwen3-MoE": Family(
        _named("qwen3_moe"), _WIDE | {"head_dim": 64, "moe_intermediate_size": 384, "num_experts": 4}, experts=True
    ),
}


class Workbench:
    """Compressed models and their folders, each made once.

    Args:
        folder: Where they go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, tuple[PreTrainedModel, RankPlan]] = {}

    def compressed(self, name: str) -> tuple[PreTrainedModel, RankPlan]:
        """A tiny model of this family at ``keep_ratio=0.6``, and its plan."""
        if name not in self._made:
            family = FAMILIES[name]
            model = family.build()
            causal = family.auto == "AutoModelForCausalLM"
            data, preset = (batches(n=4), "fast") if causal else ([family.batch()], "unirank")
            result = lowrank_lit.compress(model, data, keep_ratio=0.6, min_rank=2, preset=preset)
            self._made[name] = model, result.plan
        return self._made[name]

    def exported(self, name: str) -> Path:
        """The folder of :meth:`compressed`."""
        path = self.folder / name
        if not path.exists():
            lowrank_lit.export(*self.compressed(name), path)
        return path

    def load(self, name: str, folder: Path | None = None, **settings: Any) -> Any:
        """The exported model, by transformers."""
        path = self.exported(name) if folder is None else folder
        return FAMILIES[name].auto_class.from_pretrained(path, attn_implementation="eager", **settings)


def compresses(bench: Workbench, name: str) -> str:
    """``lowrank_lit.compress``: within the budget, finite, and another map than the dense one."""
    model, plan = bench.compressed(name)
    assert plan.keep_ratio <= 0.6
    factored = [module for module in model.modules() if isinstance(module, FactoredLayer)]
    assert factored
    if FAMILIES[name].experts:
        assert any(".experts." in matrix.name for matrix in plan.matrices if matrix.form != "dense")
    values, before = (output(m, **FAMILIES[name].batch()) for m in (model, FAMILIES[name].build()))
    assert torch.isfinite(values).all()
    assert (values - before).abs().max() > 1e-3
    return WORKS


def saves(bench: Workbench, name: str) -> str:
    """``export``, and ``save_pretrained`` of what was loaded, in shards."""
    path = bench.exported(name)
    assert (path / "config.json").exists()
    again = bench.folder / f"{name}-again"
    bench.load(name).save_pretrained(again, max_shard_size="20KB")
    assert len(list(again.glob("model-*.safetensors"))) > 1
    same(bench, name, bench.load(name, again))
    return WORKS


def loads(bench: Workbench, name: str) -> str:
    """``from_pretrained``: the same numbers; ``device_map``, ``dtype``."""
    same(bench, name, bench.load(name))
    same(bench, name, bench.load(name, device_map="cpu"))
    half = bench.load(name, dtype=torch.bfloat16)
    assert torch.bfloat16 in {parameter.dtype for parameter in half.parameters()}
    batch = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in _batch(name)}
    assert torch.isfinite(output(half, **batch)).all()
    return WORKS


def generates(bench: Workbench, name: str) -> str:
    """``generate``: greedy, the tokens of the model in memory."""
    family = FAMILIES[name]
    if not family.generates:
        return "no text: transformers has no generate for it"
    start = family.batch()["input_ids"][:1]
    made = [
        model.generate(start, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        for model in (bench.load(name), bench.compressed(name)[0])
    ]
    assert torch.equal(*made)
    return WORKS


def quantises(bench: Workbench, name: str) -> str:
    """``lowrank_lit.load(..., load_in_4bit=True)``: products near the exact ones, and the output that is theirs."""
    family, path = FAMILIES[name], bench.folder / f"{name}-wide"
    model = family.build(**family.wide)
    separate_experts(model)
    plan = factorise(model, rank=64)
    lowrank_lit.export(model, plan, path)
    loaded = lowrank_lit.load(path, load_in_4bit=True, auto_class=family.auto_class, attn_implementation="eager")
    layers = [module for module in loaded.modules() if isinstance(module, FactoredLayer)]
    assert len(layers) == len(plan.matrices)
    assert {type(layer.inner).__name__ for layer in layers} | {type(layer.outer).__name__ for layer in layers} == {
        "NF4Linear"
    }
    for matrix in plan.matrices:
        found, weight = (m.get_submodule(matrix.name).weight.detach() for m in (loaded, model))
        assert 0.05 < float((found - weight).norm() / weight.norm()) < 0.2, matrix.name  # 0.092 in each factor
    values = output(loaded, **family.batch())
    if family.generates:
        assert loaded.generate(family.batch()["input_ids"][:1], max_new_tokens=3, do_sample=False).shape[0] == 1
    assert dequantize_model(loaded) == 2 * len(layers)
    torch.testing.assert_close(output(loaded, **family.batch()), values, rtol=1e-4, atol=1e-4)
    return WORKS


def adapts(bench: Workbench, names: list[str]) -> dict[str, str]:
    """Plain PEFT code in one fresh process: adapters, a step of an optimizer, save, load, merge. By family."""
    cases = []
    for name in names:
        bench.exported(name)
        torch.save(FAMILIES[name].batch(), bench.folder / f"{name}.pt")
        cases.append({"name": name, "folder": str(bench.folder / name), "auto": FAMILIES[name].auto})
    script = ROOT / "tests" / "scripts" / "peft_on_export.py"
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(cases)],
        capture_output=True,
        text=True,
        cwd=bench.folder,
        env=os.environ | settings,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def compiles(bench: Workbench, name: str) -> str:
    """``torch.compile`` of the whole model: one graph where the dense model is one, and the same numbers."""
    family = FAMILIES[name]
    factored, dense = bench.load(name), family.build()
    breaks = [_graph_breaks(model, family.batch()) for model in (factored, dense)]
    if breaks[0] == 0:
        compiled = torch.compile(factored, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            values = compiled(**family.batch())[0]
        torch.testing.assert_close(values, factored(**family.batch())[0].detach(), rtol=1e-4, atol=1e-5)
        return WORKS
    same_as_dense = breaks[0] <= breaks[1]
    text = f"{breaks[0]} graph breaks, the dense model {breaks[1]}"
    return f"{WORKS}: {text}" if same_as_dense else f"{text}: experts of own ranks are called one by one"


def _graph_breaks(model: nn.Module, batch: dict[str, Tensor]) -> int:
    torch._dynamo.reset()
    with torch.no_grad():
        return int(torch._dynamo.explain(model)(**batch).graph_break_count)


def _batch(name: str) -> list[tuple[str, Tensor]]:
    return list(FAMILIES[name].batch().items())


def same(bench: Workbench, name: str, loaded: nn.Module) -> None:
    """Whether a loaded model is the one in memory, to the last bit."""
    batch = FAMILIES[name].batch()
    assert torch.equal(output(loaded, **batch), output(bench.compressed(name)[0], **batch))


CELLS: dict[str, Callable[[Workbench, str], str]] = {
    "compress": compresses,
    "save": saves,
    "load": loads,
    "generate": generates,
    "4-bit": quantises,
    "PEFT": lambda bench, name: adapts(bench, [name])[name],
    "compile": compiles,
}
