"""Calibration against brute force: every statistic recomputed from recorded activations, block by block and whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.batches import as_batches, split_single
from lowrank_lit.calibration import calibrate
from lowrank_lit.collector import Calibration
from lowrank_lit.errors import DataError, NonFiniteError
from lowrank_lit.surgery import dense_weight, find_targets
from tests.tiny import batches, tiny_model

FAMILIES = ("llama", "qwen2", "mistral", "gpt_neox", "phi", "opt", "gpt2", "gemma2")


def run(model: nn.Module, data: list[dict[str, Tensor]], **options: object) -> Calibration:
    layers = {name: target.module for name, target in find_targets(model).items()}
    settings = {"moments": frozenset({"input"}), "importance": True} | options
    return calibrate(model, data, layers, weight_of=dense_weight, **settings)  # type: ignore[arg-type]


def recorded_inputs(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Inputs of every target layer at real tokens, ``(tokens, columns)``, from one plain forward per batch."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    mask: Tensor | None = None
    for name, target in find_targets(model).items():

        def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            flat = args[0].reshape(-1, args[0].shape[-1])
            seen.setdefault(name, []).append(flat if mask is None else flat[mask.reshape(-1).bool()])

        handles.append(target.module.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in data:
            mask = batch.get("attention_mask")
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_equal_brute_force(family: str) -> None:
    model = tiny_model(family).double()
    data = batches(padding=True, n=2)
    found = run(model, data)
    assert found.mode == "blocks"
    assert found.tokens == int(sum(batch["attention_mask"].sum() for batch in data))
    inputs = recorded_inputs(model, data)
    targets = find_targets(model)
    assert found.statistics.keys() == inputs.keys() == targets.keys()
    for name, x in inputs.items():
        statistics = found.statistics[name]
        weight = dense_weight(targets[name].module)
        moment = x.mT @ x / len(x)
        assert statistics.tokens == len(x)
        assert statistics.input_energy == pytest.approx(float(moment.trace()), rel=1e-10)
        if statistics.input_moment is not None:
            torch.testing.assert_close(statistics.input_moment, moment, rtol=1e-10, atol=1e-12)
        else:  # rows < columns: the smaller side
            assert weight.shape[0] < weight.shape[1]
            expected = weight @ moment @ weight.mT
            assert statistics.output_moment is not None
            torch.testing.assert_close(statistics.output_moment, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_magnitudes_and_whole_input_moments_equal_brute_force(family: str) -> None:
    model = tiny_model(family).double()
    data = batches(padding=True, n=2)
    found = run(model, data, moments=frozenset({"magnitude", "input_full"}), importance=False)
    assert found.mode == "blocks"
    for name, x in recorded_inputs(model, data).items():
        statistics = found.statistics[name]
        assert statistics.output_moment is None
        assert statistics.input_moment is not None
        assert statistics.input_magnitude is not None
        torch.testing.assert_close(statistics.input_moment, x.mT @ x / len(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(statistics.input_magnitude, x.abs().mean(0), rtol=1e-10, atol=1e-12)
        assert statistics.input_energy == pytest.approx(float(x.square().sum()) / len(x), rel=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_whole(family: str) -> None:
    model = tiny_model(family, seed=1).double()
    data = batches(padding=True, n=2, seed=3)
    blocks = run(model, data)
    # A target outside of the blocks (here the output embedding, by name) makes the model run whole.
    layers = {name: target.module for name, target in find_targets(model).items()}
    outside = nn.Linear(3, 3)
    model.outside = outside
    outside.requires_grad_(False)
    layers_and_more = layers | {"outside": outside}
    with pytest.raises(DataError, match="no calibration token reached layer 'outside'"):
        calibrate(model, data, layers_and_more, weight_of=dense_weight, moments=frozenset({"input"}), importance=True)
    whole = calibrate(model, data, layers_and_more, weight_of=dense_weight, moments=frozenset(), importance=True)
    assert whole.mode == "whole"
    for name in layers:
        assert blocks.importance[name] == pytest.approx(whole.importance[name], rel=1e-10), name
    assert len(set(blocks.importance.values())) > 1


@pytest.mark.parametrize("case", ["own", "half", "bias", "hook", "other weight", "autocast"])
def test_moments_of_outputs_are_of_the_weight_asked_for(case: str) -> None:
    """The layer's own output serves where it is the product, and nowhere else: rounded, shifted, changed or of another
    weight it would be off by a thousandth at least."""
    model = tiny_model("llama", num_hidden_layers=2)
    name = "model.layers.1.mlp.down_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach().clone()
    if case == "bias":
        layer.bias = nn.Parameter(torch.ones(layer.out_features))
    if case == "hook":
        layer.register_forward_hook(lambda module, args, output: output + 1)
    if case == "other weight":
        weight = weight.roll(1, 0) * 1.5
    if case == "half":
        model = model.bfloat16()
        weight = weight.bfloat16()
    data = batches(padding=True, n=2)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        x = recorded_inputs(model, data)[name].double()
        layers = {name: layer}
        found = calibrate(
            model, data, layers, weight_of=lambda _: weight, moments=frozenset({"input"}), importance=False
        ).statistics[name]
        if case == "own":
            own = calibrate(
                model, data, layers, weight_of=dense_weight, moments=frozenset({"input"}), importance=False
            ).statistics[name]
            assert own.output_moment is not None
            assert found.output_moment is not None
            torch.testing.assert_close(own.output_moment, found.output_moment, rtol=1e-5, atol=1e-6)
    y = x @ weight.double().mT
    expected = y.mT @ y / len(y)
    assert found.output_moment is not None
    torch.testing.assert_close(found.output_moment, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))


def test_layers_of_one_input_share_one_moment() -> None:
    model = tiny_model("llama")
    statistics = run(model, batches()).statistics
    prefix = "model.layers.0"
    q, k, v = (statistics[f"{prefix}.self_attn.{p}_proj"] for p in "qkv")
    gate, up = (statistics[f"{prefix}.mlp.{p}_proj"] for p in ("gate", "up"))
    assert q.input_moment is k.input_moment is v.input_moment
    assert gate.input_moment is up.input_moment
    assert gate.input_moment is not q.input_moment


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    model.model.layers[1].train()
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = model.model.layers[0].forward
    run(model, batches())
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.model.layers[0].forward == forward
    count = len(calls)
    model(**batches()[0])
    assert len(calls) == count + 1  # the user's hook lives on
    handle.remove()
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_hooks_go_away_on_an_error_too() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        run(model, batches())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_nothing_to_collect_runs_nothing() -> None:
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward was run"))
    assert run(model, batches(), moments=frozenset(), importance=False).mode == "none"


def test_padding_does_not_count() -> None:
    model = tiny_model("llama").double()
    short = {"input_ids": batches(n=1, batch=1, length=10)[0]["input_ids"]}
    padded = {
        "input_ids": torch.cat([short["input_ids"], torch.zeros(1, 6, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * 10 + [0] * 6]),
    }
    one, other = run(model, [short]), run(model, [padded])
    assert one.tokens == other.tokens == 10
    for name, statistics in one.statistics.items():
        again = other.statistics[name]
        for first, second in (
            (statistics.input_moment, again.input_moment),
            (statistics.output_moment, again.output_moment),
        ):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)  # softmax is float32: 2e-8
        assert one.importance[name] == pytest.approx(
            other.importance[name], rel=1e-7
        )  # rotary angles are float32: 1e-9


def test_batches_in_every_form() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    (named,) = as_batches([{"input_ids": ids, "labels": ids}])
    assert set(named) == {"input_ids"}
    model = tiny_model("llama")
    statistics = [run(model, as_batches(form)).statistics for form in ([ids], [(ids, ids)], [named])]
    for name, first in statistics[0].items():
        for other in statistics[1:]:
            assert other[name].tokens == first.tokens == 10
            assert other[name].input_energy == first.input_energy
    with pytest.raises(DataError, match="batches is empty"):
        as_batches([])
    assert len(as_batches(ids.expand(3, 2, 5))) == 3  # a tensor of batches
    with pytest.raises(DataError, match="calibration batch 1 is a str"):
        as_batches([ids, "text"])
    with pytest.raises(DataError, match="calibration batch 0 is empty"):
        as_batches([ids[:0]])


def test_a_single_batch_is_split_by_its_sequences() -> None:
    ids = torch.arange(1, 57).reshape(7, 8)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parts = split_single([whole])
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 1, 1, 1]
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)
    assert split_single(parts) is parts
    for kept in (
        [{"input_ids": ids[:1]}],
        [{**whole, "position_ids": torch.arange(8)[None]}],  # shared by all sequences
        [{**whole, "attention_mask": whole["attention_mask"] * (torch.arange(7) > 1)[:, None]}],  # a part of padding
        [whole, {"input_ids": ids}],
    ):
        assert split_single(kept) is kept
