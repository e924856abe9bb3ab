"""Statistics of gradients against brute force: explicit activations, gradients and per-sequence autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.collector import Calibration
from lowrank_lit.errors import DataError, GradientError, LowRankError, NonFiniteError
from lowrank_lit.gradients import SampledTokenLoss, next_token_loss
from lowrank_lit.statistics import GradientSums, LayerStatistics, fisher_sums
from lowrank_lit.surgery import dense_weight, find_targets
from tests.tiny import batches, randomise, tiny_model

FAMILIES = ("llama", "qwen2", "gpt2", "opt", "gpt_neox")
EVERYTHING = frozenset({"input", "input_full", "magnitude", "gradient", "fisher", "weight_gradient"})
GRADIENT = frozenset({"gradient"})
# Attention's softmax is float32 in every family, so that a float64 model agrees with itself to that only.
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-8)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: target.module for name, target in find_targets(model).items()}


def run(model: nn.Module, data: list[dict[str, Tensor]], moments: frozenset[str], **options: Any) -> Calibration:
    settings = {"weight_of": dense_weight, "importance": False} | options
    return calibrate(model, data, layers_of(model), moments=moments, **settings)  # type: ignore[arg-type]


def explicit_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Minus the log-probability of every real token that a real token comes before, by loops."""
    total = logits.new_zeros(())
    for row in range(len(ids)):
        for position in range(1, ids.shape[1]):
            if mask[row, position] and mask[row, position - 1]:
                total = total - logits[row, position - 1].log_softmax(-1)[ids[row, position]]
    return total


def recorded(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Inputs, output gradients and weight gradient ``(rows, columns)`` of every layer from plain autograd."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        inputs[name] = args[0].detach()
        output.retain_grad()
        outputs[name] = output

    layers = layers_of(model)
    handles = [layer.register_forward_hook(partial(keep, name=name)) for name, layer in layers.items()]
    logits = model(**batch, use_cache=False).logits
    for handle in handles:
        handle.remove()
    model.zero_grad()
    explicit_loss(logits, batch["input_ids"], batch["attention_mask"]).backward()
    found = {}
    for name, layer in layers.items():
        gradient = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
        found[name] = (inputs[name], outputs[name].grad, gradient.clone())
    model.zero_grad()
    return found


def brute_force(model: nn.Module, data: list[dict[str, Tensor]]) -> dict[str, LayerStatistics]:
    weights = {name: dense_weight(layer).detach() for name, layer in layers_of(model).items()}
    x: dict[str, list[Tensor]] = {name: [] for name in weights}
    g: dict[str, list[Tensor]] = {name: [] for name in weights}
    sequence_gradients: dict[str, list[Tensor]] = {name: [] for name in weights}
    for batch in data:
        real = batch["attention_mask"].bool().flatten()
        for name, (inputs, gradients, _) in recorded(model, batch).items():
            x[name].append(inputs.reshape(-1, inputs.shape[-1])[real])
            g[name].append(gradients.reshape(-1, gradients.shape[-1])[real])
        for row in range(len(batch["input_ids"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            for name, (_, _, gradient) in recorded(model, one).items():
                sequence_gradients[name].append(gradient)
    found = {}
    for name, w in weights.items():
        tokens, gradients = torch.cat(x[name]), torch.cat(g[name])
        r, c = tokens.T @ tokens / len(tokens), gradients.T @ gradients / len(gradients)
        squared = torch.stack(sequence_gradients[name]).square().mean(0)
        found[name] = LayerStatistics(
            tokens=len(tokens),
            input_energy=float(r.trace()),
            input_moment=r,
            output_moment=w @ r @ w.T,
            input_magnitude=tokens.abs().mean(0),
            gradient_energy=float(c.trace()),
            gradient_moment=c,
            pulled_moment=w.T @ c @ w,
            sequences=len(sequence_gradients[name]),
            fisher_rows=squared.sum(1),
            fisher_columns=squared.sum(0),
            weight_gradient=torch.stack(sequence_gradients[name]).sum(0) / len(tokens),
        )
    return found


def assert_same(found: LayerStatistics, expected: LayerStatistics, *names: str) -> None:
    for name in names:
        value, wanted = getattr(found, name), getattr(expected, name)
        if isinstance(wanted, Tensor):
            assert value.dtype == torch.float64
            close(
                value,
                wanted.double(),
                atol=1e-7 * float(wanted.abs().max()),
                msg=lambda text, name=name: f"{name}: {text}",
            )
        elif wanted is None:
            assert value is None, name
        else:
            assert value == pytest.approx(wanted, rel=1e-6), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_moments_equal_brute_force(family: str, attention: str) -> None:
    model = tiny_model(family, attention=attention).double()
    data = batches(padding=True, n=2, batch=3, length=12)
    found = run(model, data, EVERYTHING)
    assert found.mode == "whole"
    for name, expected in brute_force(model, data).items():
        statistics = found.statistics[name]
        rows, columns = dense_weight(layers_of(model)[name]).shape
        assert (statistics.gradient_moment is None) == (columns < rows) == (statistics.pulled_moment is not None)
        side = "gradient_moment" if rows <= columns else "pulled_moment"
        assert_same(statistics, expected, "tokens", "sequences", "input_energy", "input_moment", "input_magnitude")
        assert_same(statistics, expected, "gradient_energy", side, "fisher_rows", "fisher_columns", "weight_gradient")
        assert float(statistics.gradient_energy) > 1e-6  # of something


def test_only_what_is_asked_for_is_collected() -> None:
    model = tiny_model("llama")
    kept = {
        "input": {"input_moment", "output_moment"},
        "input_full": {"input_moment"},
        "magnitude": {"input_magnitude"},
        "gradient": {"gradient_moment", "pulled_moment"},
        "fisher": {"fisher_rows", "fisher_columns"},
        "weight_gradient": {"weight_gradient"},
    }
    for moment, fields in kept.items():
        found = run(model, batches(n=1), frozenset({moment}))
        assert found.importance == {}
        assert found.mode == ("blocks" if moment in {"input", "input_full", "magnitude"} else "whole")
        present = {
            key
            for entry in found.statistics.values()
            for key, value in vars(entry).items()
            if isinstance(value, Tensor)
        }
        assert present == fields
        assert all(entry.tokens == 32 for entry in found.statistics.values())
    with pytest.raises(LowRankError, match="moment 'inputs' is unknown; choose among fisher, gradient, input,"):
        run(model, batches(n=1), frozenset({"inputs"}))


def test_forward_moments_and_importance_come_from_the_same_pass() -> None:
    model = tiny_model("qwen2").double()
    data = batches(padding=True, n=2)
    forward = run(model, data, frozenset({"input", "magnitude"}), importance=True)
    calls: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    both = run(model, data, frozenset({"input", "magnitude", "gradient"}), importance=True)
    handle.remove()
    assert len(calls) == 2 + 2  # the two forwards of the check are of one sequence each
    assert both.tokens == forward.tokens
    assert both.importance == pytest.approx(forward.importance, rel=1e-6)
    for name, statistics in forward.statistics.items():
        assert_same(both.statistics[name], statistics, "tokens", "input_energy", "input_moment", "output_moment")
        assert_same(both.statistics[name], statistics, "input_magnitude")
    q, k = (both.statistics[f"model.layers.0.self_attn.{p}_proj"] for p in "qk")
    assert q.input_moment is k.input_moment  # fed the same tensor


def test_moments_of_another_weight_than_the_model_runs_with() -> None:
    model = tiny_model("llama").double()
    layers = layers_of(model)
    original = {id(layer): torch.randn_like(dense_weight(layer)) for layer in layers.values()}
    data = batches(n=1)
    found = run(model, data, frozenset({"input", "gradient"}), weight_of=lambda layer: original[id(layer)])
    pulled = 0
    for name, expected in brute_force(model, data).items():
        w, statistics = original[id(layers[name])], found.statistics[name]
        if statistics.output_moment is not None:
            close(statistics.output_moment, w @ expected.input_moment @ w.T)
        if statistics.pulled_moment is not None:
            close(statistics.pulled_moment, w.T @ expected.gradient_moment @ w)
            pulled += 1
    assert pulled == 4


@pytest.mark.parametrize("cheaper", ["gram", "gradient"])
def test_fisher_sums_equal_those_of_the_gradient(cheaper: str) -> None:
    tokens, columns, rows = (7, 40, 30) if cheaper == "gram" else (50, 6, 9)
    x, d = torch.randn(3, tokens, columns, dtype=torch.float64), torch.randn(3, tokens, rows, dtype=torch.float64)
    squared = (d.mT @ x).square()
    for found, expected in zip(fisher_sums(x, d), (squared.sum((0, 2)), squared.sum((0, 1))), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # measured 2e-15
    single = zip(fisher_sums(x.float(), d.float()), fisher_sums(x, d), strict=True)
    for found, expected in single:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)  # measured 5e-7


def test_fisher_of_a_float32_model() -> None:
    model = tiny_model("llama")
    data = batches(n=1, padding=True)
    expected = brute_force(copy.deepcopy(model).double(), data)
    for name, statistics in run(model, data, frozenset({"fisher"})).statistics.items():
        for field in ("fisher_rows", "fisher_columns"):
            found, exact = getattr(statistics, field), getattr(expected[name], field)
            assert float((found - exact).norm() / exact.norm()) < 1e-5  # measured 1e-6


def test_half_precision_gradients_are_squared_in_float32() -> None:
    x, d = torch.full((1, 4, 3), 1.0), torch.full((1, 4, 5), 2.0**-14)
    assert float(torch.tensor(2.0**-14, dtype=torch.float16).square()) < 2.0**-24 * 1.01  # where float16 ends
    rows, columns = fisher_sums(x.half(), d.half())
    torch.testing.assert_close(rows, torch.full((5,), 3 * (4 * 2.0**-14) ** 2))
    torch.testing.assert_close(columns, torch.full((3,), 5 * (4 * 2.0**-14) ** 2))
    sums = GradientSums(GRADIENT, 5, 8, "cpu")
    sums.add(d[0].half())
    assert sums.moment is not None
    close(sums.moment.mean(), torch.full((5, 5), 2.0**-28, dtype=torch.float64), atol=0)
    assert float(sums.energy) == pytest.approx(4 * 5 * 2.0**-28, rel=1e-6)


def test_bfloat16_model() -> None:
    model = tiny_model("llama").bfloat16()
    data = batches(n=2)
    found = run(model, data, frozenset({"gradient", "fisher", "input"})).statistics
    expected = brute_force(copy.deepcopy(model).double(), data)
    for name, statistics in found.items():
        assert statistics.gradient_energy == pytest.approx(expected[name].gradient_energy, rel=0.1)
        assert torch.cosine_similarity(statistics.fisher_rows, expected[name].fisher_rows, 0) > 0.99


# The model is left as it was, and other ways to run it


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    parameters = list(model.parameters())
    parameters[3].requires_grad_(False)
    parameters[5].grad = kept = torch.ones_like(parameters[5])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.layers[0].train()
    with torch.no_grad():
        run(model, batches(n=1), EVERYTHING, importance=True)
        assert not torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in parameters] == [index != 3 for index in range(len(parameters))]
    assert all((parameter.grad is kept) == (index == 5) for index, parameter in enumerate(parameters))
    assert torch.equal(kept, torch.ones_like(kept))
    assert model.model.layers[0].training
    assert not model.model.layers[1].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all(parameter._backward_hooks is None for parameter in parameters)


def test_under_inference_mode() -> None:
    model, data = tiny_model("llama"), batches(n=1)
    expected = run(model, data, GRADIENT).statistics
    with torch.inference_mode():
        found = run(model, data, GRADIENT).statistics
    assert all(found[name].gradient_energy == expected[name].gradient_energy for name in expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the check's forwards have no gradients
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_nothing_twice(reentrant: bool) -> None:
    model = tiny_model("llama").double()
    data = batches(n=2, padding=True)
    expected = run(model, data, EVERYTHING).statistics

    def again_in_backward(forward: Callable[..., Any], hidden: Tensor, **options: Any) -> Any:
        return checkpoint(partial(forward, **options), hidden, use_reentrant=reentrant)

    for block in model.model.layers:
        block.forward = partial(again_in_backward, block.forward)
    if reentrant:  # which torch only runs where some input of a block requires a gradient
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.requires_grad_())
    layers = layers_of(model)
    again = calibrate(model, data, layers, weight_of=dense_weight, moments=EVERYTHING, importance=False).statistics
    for name, statistics in expected.items():
        for field, value in vars(statistics).items():
            if value is not None:
                assert_same(again[name], statistics, field)


class InPlace(nn.Module):
    """A head and a body whose outputs are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.body, self.head = nn.Linear(6, 9), nn.Linear(9, 20)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embedding(ids))
        hidden *= 0.5
        logits: Tensor = self.head(F.relu(hidden, inplace=True))
        return logits.add_(1)


def test_outputs_that_are_written_to() -> None:
    model = InPlace().double()
    ids = torch.randint(20, (2, 7))
    layers = {"body": model.body, "head": model.head}
    data = as_batches([ids])
    found = calibrate(model, data, layers, weight_of=dense_weight, moments=EVERYTHING, importance=False).statistics
    explicit_loss(model(ids), ids, torch.ones_like(ids)).backward()
    for name, layer in layers.items():
        close(found[name].weight_gradient, layer.weight.grad / 14)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_loss_is_that_of_transformers(family: str) -> None:
    """Which shifts the labels itself, once, and takes the mean."""
    model = tiny_model(family)
    (batch,) = batches(n=1, batch=3, padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    targets = int((labels[:, 1:] != -100).sum())
    with torch.no_grad():
        mean = model(**batch, labels=labels).loss
        assert float(next_token_loss(model, batch)) == pytest.approx(float(mean) * targets, rel=1e-6)
        assert float(next_token_loss(model.half(), batch)) == pytest.approx(float(mean) * targets, rel=1e-2)


@torch.no_grad()
def test_loss_with_padding_on_the_left_and_positional_ids() -> None:
    model = InPlace()
    ids = torch.randint(20, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, None]:
            return self.inner(input_ids), None

    found = next_token_loss(Masked(), {"input_ids": ids, "attention_mask": mask})
    assert float(found) == pytest.approx(float(explicit_loss(model(ids), ids, mask)), rel=1e-6)
    (positional,) = as_batches([ids])
    assert float(next_token_loss(model, positional)) == pytest.approx(
        float(explicit_loss(model(ids), ids, torch.ones_like(ids))), rel=1e-6
    )


@torch.no_grad()
def test_sampled_labels_follow_the_models_own_predictions() -> None:
    """The mean over draws of the loss is the entropy, over the same positions; a seed gives the same draws again."""
    model = tiny_model("llama").double()
    (batch,) = batches(n=1, batch=3, padding=True)
    mask = batch["attention_mask"].bool()
    logs = model(**batch).logits[:, :-1][mask[:, 1:] & mask[:, :-1]].log_softmax(-1)
    entropy = float(-(logs.exp() * logs).sum())
    loss = SampledTokenLoss(seed=3)
    draws = torch.stack([loss(model, batch) for _ in range(100)])
    assert float(draws.mean()) == pytest.approx(entropy, abs=4 * float(draws.std()) / 10)
    assert len(draws.unique()) > 75
    assert float(SampledTokenLoss(seed=3)(model, batch)) == float(draws[0])
    found = run(model, [batch], GRADIENT, loss=SampledTokenLoss(seed=3)).statistics
    again = run(model, [batch], GRADIENT, loss=SampledTokenLoss(seed=3)).statistics
    assert all(found[name].gradient_energy == again[name].gradient_energy > 0 for name in found)


def test_a_loss_of_ones_own() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    layers = {"0": model[0], "1": model[1]}

    def half_square(model: nn.Module, batch: Any) -> Tensor:  # which is what was given
        return model(batch).square().sum() / 2

    found = calibrate(
        model, as_batches([x]), layers, weight_of=dense_weight, moments=EVERYTHING, importance=True, loss=half_square
    ).statistics
    y = model(x).detach().reshape(-1, 2)  # its own gradient
    close(found["1"].pulled_moment if found["1"].gradient_moment is None else found["1"].gradient_moment, y.T @ y / 30)
    assert found["0"].sequences == 5


# Errors


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (lambda: tiny_model("bert"), batches(n=1), r"BertModel gives no logits \(batch, length, vocabulary\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), as_batches([torch.randn(3, 4)]), "hold no input_ids"),
    ],
)
def test_no_next_token_loss(model: Callable[[], nn.Module], data: list[dict[str, Tensor]], message: str) -> None:
    network = model()
    with pytest.raises(GradientError, match=message + ".*use metric='input'"):
        run(network, data, GRADIENT)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_model_that_looks_ahead_predicts_no_next_token() -> None:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM(tiny_model("bert").config).eval()
    randomise(model)
    for loss in (None, next_token_loss, SampledTokenLoss()):
        with pytest.raises(GradientError, match="depends on the tokens after it; use metric='input'"):
            run(model, batches(n=1, padding=True), GRADIENT, loss=loss)


def test_vanishing_gradients() -> None:
    model = tiny_model("qwen2")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(GradientError, match="vanish at every target layer; use metric='input'"):
        run(model, batches(n=1), GRADIENT)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1e-8)
    with pytest.raises(GradientError, match="vanish"):
        run(model, batches(n=1), frozenset({"fisher"}))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(**batch).logits.sum(-1), r"shape \(2, 16\)"),
        (lambda model, batch: model(**batch).logits.sum().detach(), r"shape \(\) and no gradient"),
    ],
)
def test_a_loss_that_is_none(loss: Callable[[nn.Module, Any], Tensor], message: str) -> None:
    with pytest.raises(GradientError, match=message):
        run(tiny_model("llama"), batches(n=1), GRADIENT, loss=loss)


def test_non_finite_loss_names_the_layer_and_hooks_go_away() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"not finite: 'model\.layers\.1\.mlp\.gate_proj'"):
        run(model, batches(n=1), GRADIENT)
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Twice(InPlace):
    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.embedding(ids))
        return self.head(hidden + self.body(hidden[..., :6]))


def test_a_layer_used_twice() -> None:
    model, ids = Twice(), torch.randint(20, (2, 7))
    collect = partial(
        calibrate, model, as_batches([ids]), {"body": model.body}, weight_of=dense_weight, importance=False
    )
    with pytest.raises(DataError, match=r"'body' is used twice in one forward.*metric='two_sided'"):
        collect(moments=frozenset({"fisher"}))
    assert collect(moments=GRADIENT).statistics["body"].tokens == 28  # each use has tokens of its own


class Overwrites(InPlace):
    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        hidden = self.body(states)
        states += 1
        return self.head(hidden + states.sum(-1, keepdim=True))


def test_an_input_that_is_overwritten() -> None:
    model, ids = Overwrites(), torch.randint(20, (2, 7))
    collect = partial(
        calibrate, model, as_batches([ids]), {"body": model.body}, weight_of=dense_weight, importance=False
    )
    with pytest.raises(DataError, match=r"input of layer 'body' is overwritten"):
        collect(moments=frozenset({"weight_gradient"}))
    collect(moments=GRADIENT)


class Mixed(InPlace):
    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        chosen = states.flatten(0, 1)[1:]  # as a router would
        return self.head(self.body(torch.cat([states.flatten(0, 1)[:1], chosen])[:, None]).view(*ids.shape, -1))


def test_fisher_needs_sequences_apart() -> None:
    model, ids = Mixed(), torch.randint(20, (2, 7))
    collect = partial(calibrate, model, layers={"body": model.body}, weight_of=dense_weight, importance=False)
    with pytest.raises(DataError, match=r"'body' mixes the tokens of the 2 sequences.*one sequence per batch"):
        collect(as_batches([ids]), moments=frozenset({"fisher"}))
    assert collect(as_batches([ids[:1]]), moments=frozenset({"fisher"})).statistics["body"].sequences == 1


# Quantised models


def quantised(model: nn.Module) -> nn.Module:
    """A copy with its linear layers but the output embedding in NF4."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    copied = copy.deepcopy(model)
    for name, layer in layers_of(copied).items():
        dense = layer.weight.data
        new = bitsandbytes.nn.Linear4bit(
            dense.shape[1], dense.shape[0], bias=layer.bias is not None, quant_type="nf4", compute_dtype=torch.float32
        )
        new.weight = bitsandbytes.nn.Params4bit(dense.contiguous(), requires_grad=False, quant_type="nf4")
        if layer.bias is not None:
            new.bias = layer.bias
        copied.set_submodule(name, new.to("cpu"))
    return copied


def test_fisher_weights_of_a_quantised_model_are_those_of_the_original() -> None:
    """Cosine of the weights, bfloat16 against NF4, on a trained model; measured by benchmarks/fisher_memory.py."""
    pytest.importorskip("bitsandbytes")
    from lowrank_lit import LowRankModule, TextDataModule

    folder = str(Path(__file__).parent.parent / "recipes" / "quickstart" / "model")
    module = LowRankModule(folder)
    module.configure_model()
    data = TextDataModule({"calibration": "embedded:calibration"}, folder)
    calibration = as_batches(data.calibration_batches())[:1]
    original = module.model.float()
    layers = layers_of(original)
    four_bit = quantised(original)
    options: dict[str, Any] = {"weight_of": None, "moments": frozenset({"fisher", "magnitude"}), "importance": False}
    exact = calibrate(original.bfloat16(), calibration, layers, **options).statistics
    other = {name: four_bit.get_submodule(name) for name in layers}
    noisy = calibrate(four_bit, calibration, other, **options).statistics
    for name, statistics in exact.items():
        for field in ("fisher_rows", "fisher_columns", "input_magnitude"):
            cosine = torch.cosine_similarity(getattr(statistics, field), getattr(noisy[name], field), 0)
            assert float(cosine) > 0.99, f"{name} {field}"  # least measured: 0.9955, on four times the text
