"""The anchored refit against moments, least squares and errors taken by hand on recorded activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit import refit
from lowrank_lit.batches import as_batches
from lowrank_lit.calibration import calibrate
from lowrank_lit.errors import NonFiniteError
from lowrank_lit.metrics import GRADIENT_SHRINKAGE, moments_of
from lowrank_lit.refit import BETAS, AnchoredRefit, anchored_refit, held_out, substituted
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.spectrum import compute_spectrum
from lowrank_lit.statistics import LayerStatistics
from lowrank_lit.streaming import capture_calls
from lowrank_lit.surgery import dense_weight, find_targets
from tests.tiny import batches, tiny_model

RANK = 6
DATA = batches(n=8, padding=True, structured=True)
FITTED, HELD = DATA[:6], DATA[6:]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: target.module for name, target in find_targets(model).items()}


def plain_cut(weight: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


class Case:
    """A float64 model, compressed weights, statistics in a metric, and a fit that writes down what it is asked."""

    def __init__(self, family: str = "llama", metric: str = "input", *, damping: float = 0.0, rank: int = RANK) -> None:
        self.model: Any = tiny_model(family).double()
        self.layers = layers_of(self.model)
        self.dense = {name: dense_weight(layer).detach().clone() for name, layer in self.layers.items()}
        self.weights = {name: plain_cut(weight, rank) for name, weight in self.dense.items()}
        self.statistics = calibrate(
            self.model,
            as_batches(DATA),
            self.layers,
            weight_of=dense_weight,
            moments=moments_of(metric),
            importance=False,
        ).statistics
        self.metric, self.damping, self.rank = metric, damping, rank
        self.asked: dict[str, list[tuple[Tensor, LayerStatistics]]] = {}

    def fit(self, name: str, target: Tensor, own: LayerStatistics) -> tuple[Tensor, Tensor]:
        self.asked.setdefault(name, []).append((target, own))
        return self.cut(name, target, own)

    def cut(self, name: str, target: Tensor, own: LayerStatistics) -> tuple[Tensor, Tensor]:
        spectrum = compute_spectrum(
            target, own, metric=self.metric, name=name, damping=self.damping, shrinkage=self.damping
        )
        return spectrum.factors(target, self.rank, nested=True)

    def run(self, **settings: Any) -> AnchoredRefit:
        found = anchored_refit(
            self.model, as_batches(DATA), self.layers, self.weights, self.statistics, self.fit, **settings
        )
        assert found is not None
        return found

    def final(self, found: AnchoredRefit) -> dict[str, Tensor]:
        """The weights after the refit."""
        return self.weights | {name: outer @ inner for name, (outer, inner) in found.factors.items()}

    def blocks(self) -> list[tuple[str, list[str]]]:
        return [
            (block, [name for name in self.layers if name.startswith(f"{block}.")])
            for block, _ in find_repeating_blocks(self.model)
        ]


def put(model: Any, weights: dict[str, Tensor]) -> Any:
    """A copy of the model with other weights in some layers."""
    other = copy.deepcopy(model)
    for name, weight in weights.items():
        layer = other.get_submodule(name)
        layer.weight.data = (weight.T if type(layer).__name__ == "Conv1D" else weight).contiguous()
    return other


@contextmanager
def recorded(model: Any, names: list[str], *, outputs: bool = False) -> Iterator[dict[str, list[Tensor]]]:
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
            found[name].append((output[0] if isinstance(output, tuple) else output) if outputs else args[0])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    yield found
    for handle in handles:
        handle.remove()


@torch.no_grad()
def inputs(model: Any, name: str, data: list[dict[str, Tensor]]) -> Tensor:
    """What a layer is fed at all real tokens, ``(tokens, columns)``."""
    with recorded(model, [name]) as found:
        for batch in data:
            model(**batch)
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found[name], data, strict=True)])


@torch.no_grad()
def outputs(model: Any, block: str, data: list[dict[str, Tensor]]) -> Tensor:
    """What a block returns at all real tokens."""
    with recorded(model, [block], outputs=True) as found:
        for batch in data:
            model(**batch)
    return torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(found[block], data, strict=True)])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_targets_are_moments_of_recorded_activations(family: str) -> None:
    """``W (I + beta K)``, ``K = (E[x z^T] - E[z z^T]) E[z z^T]^-1``, where the blocks before are already fitted.

    Each ``beta`` is tried on the batches that are not held out; the best is then fitted to all of them.
    """
    case = Case(family)
    found = case.run()
    final = case.final(found)
    before: dict[str, Tensor] = {}
    for block, names in case.blocks():
        assert names
        chosen = found.betas[block]
        compressed = put(case.model, case.weights | before)
        for name in names:
            asked = case.asked[name]
            assert len(asked) == len(BETAS) + (chosen is not None)
            for number, (target, statistics) in enumerate(asked):
                beta, data = (BETAS[number], FITTED) if number < len(BETAS) else (chosen, DATA)
                x, z = inputs(case.model, name, data), inputs(compressed, name, data)
                own, cross = z.T @ z / len(z), x.T @ z / len(z)
                mean = own.diagonal().mean() * torch.eye(len(own), dtype=torch.float64)
                correction = (cross - own) @ torch.linalg.inv((1 - refit.RIDGE) * own + refit.RIDGE * mean)
                weight = case.dense[name]
                assert beta is not None
                torch.testing.assert_close(target, weight + beta * weight @ correction, rtol=1e-5, atol=1e-6)
                assert statistics.input_moment is not None
                torch.testing.assert_close(statistics.input_moment, own, rtol=1e-6, atol=1e-8)
                assert statistics.input_energy == pytest.approx(float(own.trace()))
                assert statistics.output_moment is None
        before |= {name: final[name] for name in names}
    assert any(beta is not None for beta in found.betas.values())


def test_without_correction_it_is_the_dense_weight_on_the_compressed_inputs() -> None:
    """Truncation in the metric ``input`` is the best of its rank there: the dropped singular values of ``W Z``."""
    case = Case()
    case.run(betas=[0.0])
    compressed = put(case.model, case.weights)
    for name in case.blocks()[0][1]:
        target, statistics = case.asked[name][0]
        assert torch.equal(target, case.dense[name])
        z = inputs(compressed, name, FITTED)
        outer, inner = case.cut(name, target, statistics)
        error = ((target - outer @ inner) @ z.T).square().sum()
        best = torch.linalg.svdvals(target @ z.T)[case.rank :].square().sum()
        assert float(error) == pytest.approx(float(best), rel=1e-6)


def test_full_correction_is_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """``W (I + K) = argmin_M ||M Z - W X||`` over the fitted tokens."""
    monkeypatch.setattr(refit, "RIDGE", 1e-11)
    case = Case()
    case.run(betas=[1.0])
    compressed = put(case.model, case.weights)
    for name in case.blocks()[0][1]:
        x, z = inputs(case.model, name, FITTED), inputs(compressed, name, FITTED)
        assert len(z) > z.shape[1]
        wanted = x @ case.dense[name].T
        best = z @ torch.linalg.lstsq(z, wanted, driver="gelsd").solution
        reached = z @ case.asked[name][0][0].T
        torch.testing.assert_close(reached, best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)], ids=["tall", "wide", "square"])
def test_gradients_follow_the_target(shape: tuple[int, int]) -> None:
    """In ``two_sided``, against the SVD between dense roots of both moments."""
    weight = torch.randn(*shape, dtype=torch.float64)
    x, z, g = (torch.randn(60, size, dtype=torch.float64) for size in (shape[1], shape[1], shape[0]))
    z += x
    c, own, cross = g.T @ g / 60, z.T @ z / 60, x.T @ z / 60
    tall = shape[1] < shape[0]
    statistics = LayerStatistics(
        60,
        input_moment=x.T @ x / 60,
        output_moment=weight @ weight.T,
        gradient_energy=float(c.trace()),
        gradient_moment=None if tall else c,
        pulled_moment=weight.T @ c @ weight if tall else None,
    )
    ahead = 0.5 * refit._correction("w", own, cross)
    target = weight + weight @ ahead
    anchored = refit._anchored_statistics(statistics, own, ahead)
    for damping in (0.0, 0.1):
        found = compute_spectrum(target, anchored, metric="two_sided", name="w", damping=damping, shrinkage=damping)
        outer, inner = found.factors(target, 4)
        damped = [
            (1 - damping) * m + damping * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype) for m in (c, own)
        ]
        left, right = (torch.linalg.cholesky(m) for m in damped)
        u, s, vh = torch.linalg.svd(left.T @ target @ right, full_matrices=False)
        best = torch.linalg.inv(left.T) @ (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(right)
        torch.testing.assert_close(outer @ inner, best, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "metric", "last_is_dense"),
    [
        ("llama", "input", False),
        ("llama", "two_sided", False),
        ("gpt2", "two_sided", False),
        ("qwen2", "two_sided", True),
    ],
)
def test_the_best_beta_on_held_out_batches_is_taken_where_it_helps(
    family: str, metric: str, last_is_dense: bool
) -> None:
    """By the error of the block's output, in the curvature of the loss there where gradients are known."""
    case = Case(family, metric, damping=1e-3)
    for _, everything in case.blocks() if last_is_dense else ():
        del case.weights[everything[-1]]
    found = case.run()
    final = case.final(found)
    before: dict[str, Tensor] = {}
    for block, everything in case.blocks():
        names = [name for name in everything if name in case.weights]
        dense, held = outputs(case.model, block, HELD), as_batches(HELD)
        assert len(held) == 2
        root = torch.eye(dense.shape[-1], dtype=torch.float64)
        if metric == "two_sided":
            c = case.statistics[everything[-1]].gradient_moment
            assert c is not None
            mean = c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
            root = torch.linalg.cholesky((1 - GRADIENT_SHRINKAGE) * c + GRADIENT_SHRINKAGE * mean)
        errors = []
        for number in (None, *range(len(BETAS))):
            weights = case.weights | before
            if number is not None:
                for name in names:
                    target, own = case.asked[name][number]
                    outer, inner = case.cut(name, target, own)
                    weights = weights | {name: outer @ inner}
            errors.append(float(((outputs(put(case.model, weights), block, HELD) - dense) @ root).square().sum()))
        best = min(range(len(BETAS)), key=lambda number: errors[1 + number])
        expected = BETAS[best] if errors[1 + best] <= refit.SLACK * errors[0] else None
        assert found.betas[block] == expected
        assert {name for name in names if name in found.factors} == (set() if expected is None else set(names))
        before |= {name: final[name] for name in names}
    assert list(held_out(8)) == [6, 7]


def test_passes() -> None:
    found = Case().run()
    # Dense, compressed, each candidate on what is held out, and on to the next block.
    assert found.passes == pytest.approx(1 + 1 + (1 + len(BETAS)) * 2 / 8 + 1)


def test_dense_layers_of_a_block_stay_as_they_are() -> None:
    case = Case()
    (_, first), (_, second) = case.blocks()
    dense = [first[0], *second]
    case.weights = {name: weight for name, weight in case.weights.items() if name not in dense}
    found = case.run()
    assert case.asked.keys() == set(first[1:])
    assert found.factors.keys() <= set(first[1:])
    assert found.betas["model.layers.1"] is None


def test_factors_wait_on_the_cpu_in_the_layers_precision() -> None:
    case = Case()
    case.model.float()
    found = case.run()
    assert found.factors
    for name, (outer, inner) in found.factors.items():
        assert outer.dtype == inner.dtype == torch.float32
        assert outer.device.type == "cpu"
        assert (*outer.shape, *inner.shape) == (case.dense[name].shape[0], RANK, RANK, case.dense[name].shape[1])


def test_half_precision() -> None:
    case = Case("llama", "two_sided", damping=1e-3)
    exact = case.run()
    case.model.bfloat16()
    found = case.run()
    assert found.betas.keys() == exact.betas.keys()
    assert all(bool(torch.isfinite(part).all()) for pair in found.factors.values() for part in pair)


def test_the_model_is_left_as_it_was() -> None:
    case = Case("gpt2")
    case.model.transformer.h[0].train()
    next(case.model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in case.model.parameters()]

    def check() -> None:
        assert all(torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
        assert [parameter.data_ptr() for parameter in case.model.parameters()] == pointers
        assert [p.requires_grad for p in case.model.parameters()] == [False] + [True] * (len(pointers) - 1)
        assert case.model.transformer.h[0].training
        assert not case.model.transformer.h[1].training
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in case.model.modules())
        assert all("forward" not in block.__dict__ for block in case.model.transformer.h)

    case.run()
    check()
    calls: list[str] = []

    def fails(name: str, target: Tensor, own: LayerStatistics) -> tuple[Tensor, Tensor]:
        calls.append(name)
        if len(calls) == 5:
            raise RuntimeError("no memory")
        return Case.fit(case, name, target, own)

    with pytest.raises(RuntimeError, match="no memory"):
        anchored_refit(case.model, as_batches(DATA), case.layers, case.weights, case.statistics, fails)
    check()


def test_where_there_is_no_chain_of_blocks() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
    layers: dict[str, nn.Module] = {"0": model[0], "2": model[2]}
    data = as_batches([torch.randn(3, 6)] * 4)
    assert anchored_refit(model, data, layers, {}, {}, Case.fit) is None  # type: ignore[arg-type]
    case = Case("llama")
    everything = as_batches(DATA)
    assert anchored_refit(case.model, everything[:1], case.layers, case.weights, case.statistics, case.fit) is None
    outside = {**case.layers, "lm_head": case.model.lm_head}
    assert anchored_refit(case.model, everything, outside, case.weights, case.statistics, case.fit) is None


class Block(nn.Module):
    """Experts of which every token takes one, a layer that is used twice, and one whose input is written to."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.twice = nn.Linear(width, width)
        self.dead = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        states = hidden + 0.0
        mixed = self.first(states)
        states.mul_(0)  # what the first layer was fed is gone
        flat = mixed.flatten(0, 1)
        choice = flat[:, 0] > 0
        routed = torch.empty_like(flat)
        for index, expert in enumerate(self.experts):
            routed[choice == bool(index)] = expert(flat[choice == bool(index)])
        result: Tensor = hidden + self.twice(torch.tanh(self.twice(routed))).view_as(hidden) + self.dead(states)
        return result


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        result: Tensor = hidden
        return result


def test_inputs_that_cannot_be_paired_keep_their_factors() -> None:
    """A router sends each expert other tokens in the compressed model; one layer has two inputs; one only zeros."""
    model = Stack().double()
    layers = layers_of(model)
    dense = {name: dense_weight(layer).detach().clone() for name, layer in layers.items()}
    weights = {name: plain_cut(weight, 3) for name, weight in dense.items()}
    data = as_batches([torch.randint(30, (4, 10)) for _ in range(5)])
    asked: dict[str, tuple[Tensor, LayerStatistics]] = {}

    def fit(name: str, target: Tensor, own: LayerStatistics) -> tuple[Tensor, Tensor]:
        asked[name] = (target, own)  # the last one is of all batches
        return compute_spectrum(target, own, metric="input", name=name).factors(target, 3)

    statistics = {name: LayerStatistics(1) for name in layers}
    found = anchored_refit(model, data, layers, weights, statistics, fit, betas=[1.0])
    assert found is not None
    assert asked.keys() == {f"blocks.{index}.{name}" for index in (0, 1) for name in ("first", "dead")}
    assert found.factors.keys() <= asked.keys()
    assert torch.equal(asked["blocks.0.dead"][0], dense["blocks.0.dead"])  # nothing to correct
    x = model.embedding(torch.cat([batch[""] for batch in data])).detach().reshape(-1, 8)
    moment = asked["blocks.0.first"][1].input_moment  # of the inputs as they were when the layer was called
    assert moment is not None
    torch.testing.assert_close(moment, x.T @ x / len(x))


def test_a_compressed_model_that_runs_away_is_named() -> None:
    case = Case()
    case.model.float()
    name = "model.layers.0.mlp.up_proj"
    case.weights[name] = torch.full_like(case.weights[name], 3e38)
    with pytest.raises(NonFiniteError, match=r"the inputs of layer 'model\.layers\.0\.mlp\.down_proj' in the compr"):
        case.run()
    assert torch.equal(case.model.get_submodule(name).weight.double(), case.dense[name].float().double())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_substituted_weights_are_computed_with_and_go_away(family: str) -> None:
    case = Case(family)
    (batch,) = batches(n=1)
    expected = put(case.model, case.weights)(**batch).logits
    dense = case.model(**batch).logits
    some = dict(list(case.weights.items())[:3])
    with substituted(case.layers, case.weights):
        torch.testing.assert_close(case.model(**batch).logits, expected)
        with substituted(case.layers, {name: case.dense[name] for name in case.layers}):
            assert torch.equal(case.model(**batch).logits, dense)
        torch.testing.assert_close(case.model(**batch).logits, expected)
    assert torch.equal(case.model(**batch).logits, dense)
    with pytest.raises(ZeroDivisionError), substituted(case.layers, some):
        raise ZeroDivisionError
    assert torch.equal(case.model(**batch).logits, dense)
    bad = {**some, list(case.layers)[5]: torch.full_like(case.dense[list(case.layers)[5]], torch.inf)}
    with (
        pytest.raises(NonFiniteError, match=f"compressed weight of layer '{list(case.layers)[5]}'"),
        substituted(case.layers, bad),
    ):
        pass
    assert torch.equal(case.model(**batch).logits, dense)


def test_substituted_weights_take_the_layers_dtype() -> None:
    case = Case()
    case.model.bfloat16()
    name = next(iter(case.layers))
    with substituted(case.layers, {name: case.weights[name]}):
        assert torch.equal(case.layers[name].weight, case.weights[name].bfloat16())
    with (
        pytest.raises(NonFiniteError, match=name),
        substituted(case.layers, {name: torch.full_like(case.weights[name], 1e300)}),
    ):
        pass


def test_statistics_are_those_of_the_layer_apart_from_the_inputs() -> None:
    given = LayerStatistics(7, gradient_energy=2.0, fisher_rows=torch.ones(3), weight_gradient=torch.ones(3, 4))
    moment = torch.eye(4, dtype=torch.float64)
    found = refit._anchored_statistics(given, moment, torch.zeros(4, 4, dtype=torch.float64))
    assert replace(found, input_moment=None, input_energy=0.0) == given


@pytest.mark.parametrize(
    ("family", "last", "moves"),
    [
        ("llama", "mlp.down_proj", True),
        ("llama", "self_attn.q_proj", False),
        ("gpt2", "mlp.c_proj", True),
        ("gpt_neox", "attention.dense", True),  # parallel residual: both branches end in the block's output
        ("gemma2", "mlp.down_proj", False),  # a norm comes after it
    ],
)
def test_which_layers_end_in_the_output_of_their_block(family: str, last: str, moves: bool) -> None:
    """Their gradients are those of the block's output; a projection to queries of the same width has others."""
    model = tiny_model(family)
    blocks, data = find_repeating_blocks(model), as_batches(batches(n=3))
    with torch.no_grad():
        calls = capture_calls(model, blocks, data)
        assert calls is not None
        stage = refit._Stage(0, blocks[0][1], {}, None)
        assert refit._moves(refit._Streams(calls, data), stage, blocks[0][1].get_submodule(last)) == moves
