"""The estimates against what PyTorch really holds on small models, and against published sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from lowrank_lit._footprints import (
    ModelSize,
    Recovery,
    RunShape,
    Trained,
    activation_bytes,
    adapter_parameters,
    backward_bytes,
    dequantized_bytes,
    factor_parameters,
    kept_parameters,
    loss_bytes,
    moment_bytes,
    of_one_token,
    optimizer_bytes,
    refining_bytes,
    statistics_bytes,
    statistics_flops,
    token_flops,
    trained_parameters,
    training_weight_bytes,
    uniform_rank,
    vector_bytes,
    with_experts,
)
from lowrank_lit._recipes import recipes_folder
from lowrank_lit.adapter_config import is_quantised
from lowrank_lit.calibration import calibrate
from lowrank_lit.callbacks._run_shape import find_experts, measure, measure_config
from lowrank_lit.callbacks.memory import training_items
from lowrank_lit.distillation import Predictions, divergence
from lowrank_lit.estimate import (
    Item,
    estimate,
    measured_peaks,
    on_host,
    over_gpus,
    peaks,
    stage_flops,
    streamed,
    totals,
)
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.gradients import frozen
from lowrank_lit.layers import FactoredLinear
from lowrank_lit.masks import factor_fully, mask_layers
from lowrank_lit.optimizers import build_optimizer
from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.recovery import add_adapters
from lowrank_lit.surgery import apply_plan, count_parameters, dense_weight, find_targets
from tests.tiny import CAUSAL_FAMILIES, batches, tiny_model

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=256,
)


def shape(**changes: object) -> RunShape:
    settings = {
        "keep_ratio": 0.6,
        "weight_bytes": 4,
        "storage_bytes": 4,
        "batch_size": 2,
        "block_size": 128,
        "calibration_tokens": 1024,
    }
    return RunShape(**(settings | changes))  # type: ignore[arg-type]


def factored(dtype: torch.dtype, config: LlamaConfig = CONFIG, keep_ratio: float = 0.6) -> nn.Module:
    """A Llama with every target at the uniform rank."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    matrices = tuple(
        MatrixPlan(name, target.rows, target.columns, "factored", uniform_rank(target.rows, target.columns, keep_ratio))
        for name, target in find_targets(model).items()
    )
    apply_plan(model, RankPlan(matrices, keep_ratio, "input", "uniform"))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.train()


def factor_weights(model: nn.Module) -> list[nn.Parameter]:
    layers = [module for module in model.modules() if isinstance(module, FactoredLinear)]
    return [factor.weight for layer in layers for factor in (layer.inner, layer.outer)]  # type: ignore[misc]


def saved_bytes(model: nn.Module, batch: int, length: int) -> int:
    """Bytes of the distinct tensors, parameters apart, that autograd keeps for the backward of one batch."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # holds the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept.setdefault(address, tensor)
        return tensor

    ids = torch.randint(0, 64, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "trained"),
    [(torch.float32, "adapters"), (torch.bfloat16, "adapters"), (torch.float32, "factors"), (torch.float32, "all")],
)
def test_activations_are_what_autograd_keeps(dtype: torch.dtype, trained: Trained, checkpointing: bool) -> None:
    model: Any = factored(dtype)
    size = measure(AutoModelForCausalLM.from_config(CONFIG, dtype=dtype))
    if trained == "adapters":
        add_adapters(model, rank=8)
    elif trained == "factors":
        model.requires_grad_(False)
        for factor in factor_weights(model):
            factor.requires_grad_()
    recovery = Recovery(trained, checkpointing=checkpointing)
    estimated = activation_bytes(size, shape(weight_bytes=dtype.itemsize, recovery=recovery))
    log_softmax = 2 * 128 * 64 * 4  # is counted with the logits
    if not checkpointing:
        # Measured: 0.96 and 0.95 with adapters, 0.96 with factors, 0.93 with all.
        assert estimated == pytest.approx(saved_bytes(model, 2, 128) - log_softmax, rel=0.1)
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # What is kept outside of the blocks is the input of each; one block's own comes on top, in the backward pass.
    between = saved_bytes(model, 2, 128) - log_softmax
    one = activation_bytes(size, shape(weight_bytes=dtype.itemsize, recovery=Recovery(trained))) // size.blocks
    # Measured: 0.79, 0.66, 0.79, 0.57: rotary tables and the last norm, not counted, weigh much in a small model.
    assert estimated - one == pytest.approx(between, rel=0.5)
    assert estimated < 0.5 * size.blocks * one


@pytest.mark.parametrize("name", ["adamw", "paged_adamw8bit"])
def test_adapters_and_optimizer_are_counted_exactly(name: str) -> None:
    if name != "adamw":
        pytest.importorskip("bitsandbytes")
    model = factored(torch.float32)
    size = measure(AutoModelForCausalLM.from_config(CONFIG))
    run = shape(recovery=Recovery(adapter_rank=4, optimizer=name))
    adapters = add_adapters(model, rank=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = adapter_parameters(size, run, 4)
    assert adapters.trainable_parameters == sum(p.numel() for p in trained) == expected
    assert trained_parameters(size, run) == (expected, 4)
    if name != "adamw":  # small tensors keep 32 bits: one large enough is what the count is of
        trained = [nn.Parameter(torch.ones(expected))]
    optimizer = build_optimizer(name, trained, learning_rate=1e-3)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key]
    held = sum(value.nbytes for value in states if isinstance(value, Tensor) and value.ndim)
    assert optimizer_bytes(name, expected, 4) == held


def test_lion_keeps_half_of_adamw() -> None:
    assert 2 * optimizer_bytes("lion8bit", 1000, 4) == optimizer_bytes("adamw8bit", 1000, 4)
    assert 2 * optimizer_bytes("paged_lion", 1000, 2) == optimizer_bytes("paged_adamw", 1000, 2) == 8000
    assert optimizer_bytes("adamw", 1000, 2) == 4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_calibration_are_what_autograd_keeps(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=dtype)
    size = measure(model)
    with frozen(model):
        start_at = model.get_input_embeddings().register_forward_hook(lambda *args: args[2].requires_grad_())
        real = saved_bytes(model, 2, 128) - 2 * 128 * 64 * 4  # the log-softmax is counted with the logits
        start_at.remove()
    run = shape(weight_bytes=dtype.itemsize, moments=frozenset({"input", "gradient"}))
    # Measured: 1.06 in float32 and 1.05 in bfloat16.
    assert backward_bytes(size, run) == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    "moments", [{"input", "gradient"}, {"fisher"}, {"input_full"}, {"magnitude", "weight_gradient"}]
)
def test_statistics_are_those_that_calibration_keeps(moments: set[str]) -> None:
    model = tiny_model("llama")
    layers = {name: target.module for name, target in find_targets(model).items()}
    found = calibrate(
        model, batches(), layers, weight_of=dense_weight, moments=frozenset(moments), importance=False
    ).statistics.values()
    tensors = [value for entry in found for value in vars(entry).values() if isinstance(value, Tensor)]
    distinct = {id(tensor): tensor.nbytes for tensor in tensors}
    assert statistics_bytes(measure(model), frozenset(moments)) == sum(distinct.values())


def test_a_backward_pass_needs_the_whole_model_on_the_device() -> None:
    size = measure(AutoModelForCausalLM.from_config(CONFIG))
    forward, backward = (shape(moments=frozenset(names)) for names in (["input"], ["input", "gradient"]))
    assert (forward.backward, backward.backward) == (False, True)
    weights = 4 * size.parameters
    assert totals(estimate(size, forward))["calibrate", "device"] < weights
    on_device = [item for item in estimate(size, backward) if (item.stage, item.place) == ("calibrate", "device")]
    assert [item.bytes for item in on_device if "whole model" in item.what] == [weights]
    assert sum(item.bytes for item in on_device) > weights + moment_bytes(size) + backward_bytes(size, backward)
    assert not any(item.stage == "feedback" for item in estimate(size, backward))
    best = shape(moments=backward.moments, measured=True, rounds=3, refitted=True, components=True)
    sums = totals(estimate(size, best))
    assert sums["feedback", "host"] > weights + 2 * 8 * size.target_parameters
    assert sums["factor", "host"] > totals(estimate(size, backward))["factor", "host"]


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_counts_of_every_family(family: str) -> None:
    model = tiny_model(family)
    size = measure(model)
    with ExpertsApart(model):
        targets = find_targets(model)
    assert size.parameters == count_parameters(model)
    assert size.target_parameters == sum(target.rows * target.columns for target in targets.values())
    assert size.shared
    assert size.blocks == 2
    assert len(size.matrices) == len(targets)
    assert kept_parameters(size, 1.0) == size.parameters


def test_second_moments_are_those_that_calibration_keeps() -> None:
    model = tiny_model("llama")
    layers = {name: target.module for name, target in find_targets(model).items()}
    result = calibrate(model, batches(), layers, weight_of=dense_weight, moments=frozenset({"input"}), importance=False)
    moments = [(s.input_moment if s.output_moment is None else s.output_moment) for s in result.statistics.values()]
    distinct = {id(moment): moment.nbytes for moment in moments if moment is not None}
    assert len(distinct) < len(moments), "q, k and v share one"
    assert moment_bytes(measure(model)) == sum(distinct.values())


def test_llama_7b_has_its_published_size() -> None:
    config = json.loads((recipes_folder() / "configs/llama-7b.json").read_text())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    size = measure(model)
    assert size.parameters == 6_738_415_616
    assert size.target_parameters == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert len(size.moments) == 32 * 4
    assert moment_bytes(size) == 32 * 4 * 4096**2 * 8
    assert vector_bytes(size) == 32 * (5 * 4096**2 + 2 * 11008 * 4096) * 4
    sums = totals(estimate(size, shape(weight_bytes=2, storage_bytes=2, batch_size=1, block_size=2048)))
    assert sums["evaluate", "device"] > 2 * size.parameters
    assert sums["export", "disk"] == 2 * kept_parameters(size, 0.6)


@pytest.mark.parametrize("changes", [{"recovery": None}, {"moments": frozenset()}, {"recovery": Recovery("all")}, {}])
def test_stages_and_places(changes: dict[str, object]) -> None:
    size = measure(AutoModelForCausalLM.from_config(CONFIG))
    items = estimate(size, shape(**changes))
    assert all(item.bytes > 0 and item.what for item in items)
    assert any(item.stage == "recover" for item in items) is (changes.get("recovery", True) is not None)
    assert any("statistics" in item.what for item in items) is bool(changes.get("moments", True))
    total = totals(items)
    assert sum(total.values()) == sum(item.bytes for item in items)


def test_more_of_everything_needs_more() -> None:
    size = measure(AutoModelForCausalLM.from_config(CONFIG))
    small = totals(estimate(size, shape()))
    for change in ({"batch_size": 4}, {"block_size": 256}, {"recovery": Recovery(adapter_rank=16)}):
        assert totals(estimate(size, shape(**change)))["recover", "device"] > small["recover", "device"]
    assert totals(estimate(size, shape(keep_ratio=0.8)))["export", "disk"] > small["export", "disk"]


def tensor_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def test_weights_while_training_are_those_of_the_model() -> None:
    size = measure(AutoModelForCausalLM.from_config(CONFIG))
    model = factored(torch.float32)
    run = shape(recovery=Recovery("factors"))
    assert training_weight_bytes(size, run) == tensor_bytes(model)
    count = sum(weight.numel() for weight in factor_weights(model))
    assert trained_parameters(size, run) == (count, 4)
    inner = sum(layer.inner.weight.numel() for layer in model.modules() if isinstance(layer, FactoredLinear))
    assert trained_parameters(size, shape(recovery=Recovery("factors", sides=("inner",)))) == (inner, 4)
    assert trained_parameters(size, shape(recovery=Recovery("all"))) == (count_parameters(model), 4)
    assert training_weight_bytes(size, shape(keep_ratio=1.0)) == 4 * size.parameters


@pytest.mark.parametrize("which", ["both", "outer"])
def test_quantised_weights_are_those_of_the_model(which: str) -> None:
    pytest.importorskip("bitsandbytes")
    from lowrank_lit.quantize import WHICH, packed_bytes, quantize_factors

    square = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_key_value_heads": 4}
    config = LlamaConfig(**{**CONFIG.to_dict(), **square, "num_hidden_layers": 1})
    size = measure(AutoModelForCausalLM.from_config(config))
    model = factored(torch.bfloat16, config, keep_ratio=0.5)
    assert {layer.rank for layer in model.modules() if isinstance(layer, FactoredLinear)} == {64}
    quantize_factors(model, which=which, gauge="none")
    held = sum(packed_bytes(layer) for layer in model.modules() if isinstance(layer, nn.Linear) and is_quantised(layer))
    held += sum(parameter.nbytes for parameter in model.parameters() if parameter.is_floating_point())
    run = shape(weight_bytes=2, keep_ratio=0.5, recovery=Recovery(quantized=WHICH[which]))
    # Code tables of 256 numbers per factor are left out of the estimate. Measured: 0.92 and 0.98.
    assert training_weight_bytes(size, run) == pytest.approx(held, rel=0.1)
    assert dequantized_bytes(size, run) == 64 * 256 * (4 + 2)


def test_masked_layers_are_the_whole_factors() -> None:
    model = tiny_model("llama")
    size = measure(model)
    names = list(find_targets(model))
    factor_fully(model, batches(), names)
    mask_layers(model, names, min_rank=2)
    run = shape(keep_ratio=1.0, compressed=False, reallocated=0.5, recovery=Recovery("factors"))
    assert training_weight_bytes(size, run) == tensor_bytes(model)
    assert size.target_parameters < sum(factor_parameters(size, run).values()) <= 2 * size.target_parameters
    sums = totals(estimate(size, run))
    assert ("calibrate", "device") not in sums
    assert sums["mask", "host"] > 4 * (sum(factor_parameters(size, run).values()) + size.parameters)
    assert sums["export", "disk"] == 4 * kept_parameters(size, 0.5)


def peak_of(step: Any) -> int:
    """Largest sum of what PyTorch holds on the CPU in ``step``, above what it holds before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = largest = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        largest = max(largest, now)
    return largest


def test_loss_of_a_distillation_is_what_it_takes() -> None:
    tokens, vocabulary = 64, 2048
    student = torch.randn(1, tokens, vocabulary, requires_grad=True)
    counted = torch.ones(1, tokens, dtype=torch.bool)

    def step() -> None:
        logits = student * 1.0
        said = Predictions(torch.log_softmax(torch.randn(1, tokens, vocabulary), -1))
        divergence(logits, said, counted).backward()

    step()
    config = LlamaConfig(**{**CONFIG.to_dict(), "vocab_size": vocabulary})
    size = measure(AutoModelForCausalLM.from_config(config))
    run = shape(batch_size=1, block_size=tokens, recovery=Recovery(teacher="memory"))
    # Measured: 1.14.
    assert loss_bytes(size, run) == pytest.approx(peak_of(step), rel=0.25)
    assert loss_bytes(size, shape(recovery=Recovery(teacher="memory", mixed=True))) > loss_bytes(size, run)


def test_teacher_and_what_is_kept_for_it() -> None:
    size = measure(AutoModelForCausalLM.from_config(CONFIG))

    def rows(**settings: Any) -> dict[tuple[str, str], int]:
        items = estimate(size, shape(recovery=Recovery(**settings)))
        return {(item.place, item.what): item.bytes for item in items if item.stage == "recover"}

    assert rows(teacher="memory")["device", "weights of the teacher"] == 4 * size.parameters
    assert not any("teacher" in what for _, what in rows())
    cached = rows(teacher="cached", cached_tokens=1000)
    assert cached["disk", "predictions of the teacher, at most"] == 1000 * 4 * 64
    cached = rows(teacher="cached", top_k=8)
    assert cached["disk", "predictions of the teacher, of each sequence of the training text"] == 128 * 8 * 8
    name = "LoRA of rank 8 on both factors, float32"
    paged = rows(optimizer="paged_adamw")
    trained = adapter_parameters(size, shape(), 8)
    assert paged["host", f"{name}: state of paged_adamw, in pages that the driver moves"] == 8 * trained
    assert rows(keeps_best=True)["host", f"{name}: best state so far"] == 4 * trained


def test_refinement_holds_both_models() -> None:
    size = measure(AutoModelForCausalLM.from_config(CONFIG))
    run = shape(refined=True, weight_bytes=2)
    sums = totals(estimate(size, run))
    hidden = 3 * 1024 * 64 * 2
    assert sums["refine", "host"] == 2 * size.parameters + training_weight_bytes(size, run) + hidden
    assert sums["refine", "device"] > refining_bytes(size, run) + 16 * sum(factor_parameters(size, run).values()) // 4
    assert sums["refine", "device"] < sums["refine", "host"] + refining_bytes(size, run)


def test_one_memory_holds_a_copy_once() -> None:
    size = measure(AutoModelForCausalLM.from_config(CONFIG))
    items = estimate(size, shape(moments=frozenset({"input", "gradient"})))
    apart, one = totals(items), totals(on_host(items))
    copied = statistics_bytes(size, frozenset({"input", "gradient"}))
    together = apart["calibrate", "device"] + apart["calibrate", "host"]
    assert one["calibrate", "host"] == together - copied
    assert not any(place == "device" for _, place in one)
    assert measured_peaks(on_host(items))["compress", "host"] == max(
        one[stage, "host"] for stage in ("calibrate", "factor")
    )


def test_training_of_any_module() -> None:
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    module[0].weight.requires_grad_(False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    found = training_items(module.parameters(), module.buffers(), [optimizer])
    assert [item.bytes for item in found] == [4 * (32 + 4 + 8 + 8) + 8, 4 * 12, 2 * 4 * 12]
    assert len(training_items(module.parameters(), [], [torch.optim.SGD(trained)])) == 2


MIXED = Qwen3MoeConfig(
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    vocab_size=128,
)


def meta_size(config: Any, **changes: Any) -> ModelSize:
    return measure_config(type(config)(**{**config.to_dict(), **changes}))


def test_experts_are_counted_once() -> None:
    model = AutoModelForCausalLM.from_config(MIXED)
    assert find_experts(model) == ((8, 64, 64), (8, 64, 32)) * 3
    size = measure_config(MIXED, ["*.self_attn.*"])
    targets = meta_size(MIXED)
    assert size.expert_parameters == 3 * 8 * (64 * 64 + 64 * 32)
    assert size.parameters == count_parameters(model)
    assert size.active_share == 0.25
    assert targets == with_experts(size, [(64, 64), (64, 32)] * 24)
    assert targets.target_parameters == size.target_parameters + size.expert_parameters
    assert kept_parameters(targets, 0.5) < kept_parameters(size, 0.5)
    # What is kept of one token counts the experts that it goes through, whoever counts them.
    two = of_one_token(targets, lambda own: sum(rows for rows, _ in own.matrices))
    assert two == sum(rows for rows, _ in size.matrices) + 3 * 2 * (64 + 64)
    assert of_one_token(size, lambda own: own.target_parameters) == size.target_parameters
    assert find_experts(AutoModelForCausalLM.from_config(CONFIG)) == ()


@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["dense", "experts"])
def test_operations_are_those_that_torch_counts(config: Any) -> None:
    # Of the experts' grouped products and of fused attention torch counts nothing.
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", **({"experts_implementation": "eager"} if config is MIXED else {})
    )
    size = measure(model)
    ids = torch.randint(0, 64, (1, 32))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    assert 32 * token_flops(size, 32) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_operations_of_the_stages() -> None:
    size = meta_size(CONFIG)
    forward = 1024 * token_flops(size, 128)
    moment = sum(2 * side * side for side in size.moments)
    assert stage_flops(size, shape())["calibrate"] == forward + 1024 * moment
    assert statistics_flops(size, frozenset({"input"})) == moment
    assert token_flops(size, 128, 0.5) < token_flops(size, 128)
    assert "recover" not in stage_flops(size, shape()), "of nobody knows how many batches"
    steps = {
        name: stage_flops(size, shape(training_steps=10, recovery=Recovery(name)))["recover"]  # type: ignore[arg-type]
        for name in ("adapters", "factors")
    }
    assert steps["adapters"] < steps["factors"] == 10 * 256 * 3 * token_flops(size, 128, 0.6)
    again = shape(training_steps=10, recovery=Recovery("factors", checkpointing=True, teacher="memory"))
    assert stage_flops(size, again)["recover"] == 10 * 256 * (4 * token_flops(size, 128, 0.6) + token_flops(size, 128))
    both = stage_flops(size, shape(rounds=3, refitted=True, refined=True, reallocated=0.5))
    assert both["feedback"] > 2 * both["calibrate"]
    assert both["refine"] > forward


def device_bytes(items: list[Item]) -> int:
    return peaks(items)["device"]


@pytest.mark.parametrize("recovery", [Recovery("factors"), Recovery("all"), Recovery(optimizer="paged_adamw8bit")])
def test_more_gpus_take_no_more_of_each(recovery: Recovery) -> None:
    size = meta_size(CONFIG)
    run = shape(weight_bytes=2, recovery=recovery)
    items = [item for item in estimate(size, run) if item.stage == "recover"]
    trained, width = trained_parameters(size, run)
    assert device_bytes(over_gpus(items, size, run, 1)) == device_bytes(items)
    ddp = device_bytes(items) + trained * width
    for zero in (0, 1, 2, 3):
        counts = [device_bytes(over_gpus(items, size, run, gpus, zero)) for gpus in (2, 4, 8, 64)]
        assert counts == sorted(counts, reverse=True)
        assert len(set(counts)) == (1 if zero == 0 else 4) or (zero == 1 and recovery.optimizer != "adamw")
        assert zero != 0 or counts[0] == ddp
    # What is not split stays: of one process of many, stage 3 keeps activations, logits and one block.
    least = device_bytes(over_gpus(items, size, run, 10**9, 3))
    assert least > activation_bytes(size, run) + loss_bytes(size, run)
    one = over_gpus(items, size, run, 1, 3)
    assert device_bytes(one) - device_bytes(items) == sum(item.bytes for item in one if item not in items)


@pytest.mark.parametrize("config", [CONFIG, MIXED], ids=["dense", "experts"])
@pytest.mark.parametrize("moments", [{"input"}, {"input", "gradient"}], ids=["forward", "backward"])
def test_streaming_needs_no_more_for_more_blocks(config: Any, moments: set[str]) -> None:
    run = shape(moments=frozenset(moments), measured=True, rounds=2, refitted=True)
    sizes = [meta_size(config, num_hidden_layers=layers) for layers in (2, 4, 8)]
    found = [peaks(streamed(size, run)) for size in sizes]
    assert found[0]["device"] == found[1]["device"] == found[2]["device"]
    assert found[0]["host"] == found[1]["host"] == found[2]["host"]
    assert found[0]["disk"] < found[1]["disk"] < found[2]["disk"]
    whole = [peaks(estimate(size, replace(run, recovery=None))) for size in sizes]
    assert whole[0]["host"] < whole[1]["host"] < whole[2]["host"]
    shared = [totals(streamed(sizes[2], run, gpus)) for gpus in (1, 2, 8)]
    assert shared[0]["calibrate", "host"] > shared[1]["calibrate", "host"] > shared[2]["calibrate", "host"]
    assert shared[0]["calibrate", "disk"] == shared[2]["calibrate", "disk"]
    assert streamed(sizes[0], replace(run, compressed=False)) == []


def test_stages_follow_one_another_and_files_stay() -> None:
    items = [Item("calibrate", "device", "a", 3), Item("factor", "device", "b", 2), Item("factor", "device", "c", 2)]
    files = [Item("factor", "disk", "d", 5), Item("export", "disk", "e", 6)]
    assert peaks([*items, *files]) == {"device": 4, "disk": 11}
    size = meta_size(CONFIG)
    one, three, none = (totals(estimate(size, shape(checkpoints=count))) for count in (1, 3, 0))
    assert three["recover", "disk"] == 3 * one["recover", "disk"]
    assert ("recover", "disk") not in none
    assert one["checkpoint", "host"] == three["checkpoint", "host"] == one["recover", "disk"]
    assert not any(stage == "checkpoint" for stage, _ in none)


def test_what_is_measured_as_one_stage_counts_its_largest_part() -> None:
    size = meta_size(CONFIG)
    run = shape(keep_ratio=1.0, compressed=False, reallocated=0.5, recovery=Recovery("factors"), reported=True)
    one, together = totals(on_host(estimate(size, run))), measured_peaks(on_host(estimate(size, run)))
    for whole, part in (("reallocate", "mask"), ("recover", "checkpoint"), ("evaluate", "report")):
        assert together[whole, "host"] == max(one[whole, "host"], one[part, "host"])
        assert (part, "host") not in together


@pytest.mark.parametrize("reallocated", [None, 0.5])
@pytest.mark.parametrize("trained", ["adapters", "factors"])
def test_the_optimizer_of_what_stays_in_the_model_is_there_at_the_export(
    trained: Trained, reallocated: float | None
) -> None:
    size = meta_size(CONFIG)
    run = shape(recovery=Recovery(trained), reallocated=reallocated, weight_bytes=2, storage_bytes=2)
    kept = kept_parameters(size, run.final_ratio) * 2 + size.vocabulary * size.hidden * (2 + 2)
    state = 2 * 2 * sum(factor_parameters(size, run).values())
    expected = kept + (state if trained == "factors" and reallocated is None else 0)
    assert totals(estimate(size, run))["export", "host"] == expected
    wider = totals(estimate(size, replace(run, storage_bytes=4)))["export", "host"]
    assert wider == expected + 4 * kept_parameters(size, run.final_ratio), "a copy, where the type is another"
