"""Module importance: each family's branches against the family's own formula, and every form of a skip addition."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_lit.errors import DataError, NonFiniteError
from lowrank_lit.residual import (
    BlockCosine,
    ImportanceResult,
    ResidualWatcher,
    cosine_distance,
    find_repeating_blocks,
    resolve_importance,
)
from tests.tiny import batches, randomise, tiny_model

EXACT = 1e-12  # measured over all families: at most 1.9e-16
WRONG = 1e-3  # a wrong choice differs by more than this; smallest difference measured: 1.0e-2


def weights_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every Linear and Conv1D but the output embedding."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {
        name: [module.weight]
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    }


def mean_distance(before: Tensor, after: Tensor) -> float:
    """1 - mean cos written the plain way, independently of the code under test."""
    before, after = before.double().reshape(-1, before.shape[-1]), after.double().reshape(-1, after.shape[-1])
    cos = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
    return float(1 - cos.mean())


@contextmanager
def captured(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """First tensor into (``name.in``) and out of (``name.out``) every module; copies, as models add in place."""
    store: dict[str, Tensor] = {}

    def first(value: Any) -> Tensor | None:
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        return value.detach().clone() if isinstance(value, Tensor) else None

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = first(args) if args else first(kwargs.get("hidden_states"))
            if value is not None:
                store[f"{name}.in"] = value

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            value = first(output)
            if value is not None:
                store[f"{name}.out"] = value

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


def watch(model: nn.Module, *inputs: Any, mask: Tensor | None = None, **kwargs: Any) -> ImportanceResult:
    watcher = ResidualWatcher(weights_of(model))
    with torch.no_grad(), watcher.batch(mask):
        model(*inputs, **kwargs)
    return watcher.importance()


@dataclass
class Branch:
    """A branch by the formula of its architecture, and what a wrong hook would compare."""

    members: tuple[str, ...]
    before: Tensor
    after: Tensor
    wrong: tuple[tuple[Tensor, Tensor], ...]


Formula = Callable[[Callable[[str], Tensor]], list[Branch]]

SPLIT_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
GATED_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def sequential(attention: tuple[str, ...], a: str, mlp: tuple[str, ...], m: str) -> Formula:
    """h1 = h + a; h2 = h1 + m. Wrong: the residual left out; a parallel base; the whole block."""

    def formula(at: Callable[[str], Tensor]) -> list[Branch]:
        h, da, dm = at(".in"), at(a), at(m)
        dm = dm.view_as(h)
        h1, h2 = h + da, h + da + dm
        return [
            Branch(attention, h, h1, ((h, da), (h, h2))),
            Branch(mlp, h1, h2, ((h1, dm), (h, h + dm), (h, h2))),
        ]

    return formula


def parallel(attention: tuple[str, ...], a: str, mlp: tuple[str, ...], m: str) -> Formula:
    """h2 = h + a + m. Wrong: the residual left out; a sequential base; both branches together."""

    def formula(at: Callable[[str], Tensor]) -> list[Branch]:
        h, da, dm = at(".in"), at(a), at(m)
        h2 = h + da + dm
        return [
            Branch(attention, h, h + da, ((h, da), (h, h2), (h + dm, h2))),
            Branch(mlp, h, h + dm, ((h, dm), (h, h2), (h + da, h2))),
        ]

    return formula


def gemma2(at: Callable[[str], Tensor]) -> list[Branch]:
    """What is added is normalised. Wrong besides: the contribution before its norm."""
    h, a, m = at(".in"), at(".post_attention_layernorm.out"), at(".post_feedforward_layernorm.out")
    h1 = h + a
    return [
        Branch(SPLIT_ATTENTION, h, h1, ((h, a), (h, h + at(".self_attn.out")))),
        Branch(GATED_MLP, h1, h1 + m, ((h1, m), (h1, h1 + at(".mlp.out")))),
    ]


def bert(at: Callable[[str], Tensor]) -> list[Branch]:
    """The sum is normalised. Wrong besides: the norm included."""
    h, a, m = at(".in"), at(".attention.output.dense.out"), at(".output.dense.out")
    h1 = at(".attention.output.LayerNorm.out")
    attention = tuple(f"attention.{name}" for name in ("self.query", "self.key", "self.value", "output.dense"))
    return [
        Branch(attention, h, h + a, ((h, a), (h, h1))),
        Branch(("intermediate.dense", "output.dense"), h1, h1 + m, ((h1, m), (h1, at(".output.LayerNorm.out")))),
    ]


OPT_ATTENTION = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj")


def opt_post_norm(at: Callable[[str], Tensor]) -> list[Branch]:
    h, a, h1 = at(".in"), at(".self_attn.out"), at(".self_attn_layer_norm.out")
    m = at(".fc2.out").view_as(h)
    return [
        Branch(OPT_ATTENTION, h, h + a, ((h, a), (h, h1))),
        Branch(("fc1", "fc2"), h1, h1 + m, ((h1, m), (h1, at(".final_layer_norm.out").view_as(h)), (h, h + m))),
    ]


LLAMA = sequential(SPLIT_ATTENTION, ".self_attn.out", GATED_MLP, ".mlp.out")
NEOX = (("attention.query_key_value", "attention.dense"), ".attention.out")
NEOX_MLP = (("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), ".mlp.out")
FALCON = (("self_attention.query_key_value", "self_attention.dense"), ".self_attention.out")
# Falcon adds in place to what its MLP returns: the output of the last matrix is copied before that happens.
FALCON_MLP = (("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"), ".mlp.dense_4h_to_h.out")
PHI = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"), ".self_attn.out")

CASES: dict[str, tuple[str, dict[str, Any], str, Formula]] = {
    "llama": ("llama", {}, "model.layers", LLAMA),
    "qwen2": ("qwen2", {}, "model.layers", LLAMA),
    "qwen3": ("qwen3", {}, "model.layers", LLAMA),
    "mistral": ("mistral", {}, "model.layers", LLAMA),
    "gemma2": ("gemma2", {}, "model.layers", gemma2),
    "gpt_neox": ("gpt_neox", {}, "gpt_neox.layers", parallel(*NEOX, *NEOX_MLP)),
    "gpt_neox-sequential": (
        "gpt_neox",
        {"use_parallel_residual": False},
        "gpt_neox.layers",
        sequential(*NEOX, *NEOX_MLP),
    ),
    "phi": ("phi", {}, "model.layers", parallel(*PHI, ("mlp.fc1", "mlp.fc2"), ".mlp.out")),
    "bert": ("bert", {}, "encoder.layer", bert),
    "gpt2": (
        "gpt2",
        {},
        "transformer.h",
        sequential(("attn.c_attn", "attn.c_proj"), ".attn.out", ("mlp.c_fc", "mlp.c_proj"), ".mlp.out"),
    ),
    "opt": ("opt", {}, "model.decoder.layers", sequential(OPT_ATTENTION, ".self_attn.out", ("fc1", "fc2"), ".fc2.out")),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}, "model.decoder.layers", opt_post_norm),
    "falcon": ("falcon", {}, "transformer.h", parallel(*FALCON, *FALCON_MLP)),
    "falcon-sequential": ("falcon", {"parallel_attn": False}, "transformer.h", sequential(*FALCON, *FALCON_MLP)),
    "stablelm-parallel": (
        "stablelm",
        {"use_parallel_residual": True},
        "model.layers",
        parallel(SPLIT_ATTENTION, ".self_attn.out", GATED_MLP, ".mlp.out"),
    ),
    "falcon-new": ("falcon", {"new_decoder_architecture": True}, "transformer.h", parallel(*FALCON, *FALCON_MLP)),
}


def build(case: str, **overrides: Any) -> nn.Module:
    family, settings_, _, _ = CASES[case]
    arguments = {**settings_, **overrides}
    model = tiny_other(family, **arguments) if family in OTHERS else tiny_model(family, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms far from the identity, or a norm too many would hardly show
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.double()


OTHERS = {"falcon": ("FalconConfig", "FalconForCausalLM"), "stablelm": ("StableLmConfig", "StableLmForCausalLM")}


def tiny_other(family: str, *, attention: str = "eager", **overrides: Any) -> nn.Module:
    config_class, model_class = (getattr(transformers, name) for name in OTHERS[family])
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {} if family == "falcon" else {"intermediate_size": 48, "num_key_value_heads": 2}
    model: nn.Module = model_class(config_class(**{**sizes, **overrides}, attn_implementation=attention))
    randomise(model)
    return model.eval()


def branches_by_formula(model: nn.Module, case: str, batch: Mapping[str, Tensor]) -> list[Branch]:
    _, _, stack, formula = CASES[case]
    result = []
    with torch.no_grad(), captured(model) as store:
        model(**batch)
    for index in range(2):
        for branch in formula(lambda name, index=index: store[f"{stack}.{index}{name}"]):
            branch.members = tuple(f"{stack}.{index}.{name}" for name in branch.members)
            result.append(branch)
    return result


@pytest.mark.parametrize("case", CASES)
def test_every_branch_equals_the_formula_of_its_family_and_no_wrong_one(case: str) -> None:
    model, batch = build(case), batches(n=1, length=12)[0]
    found = watch(model, **batch)
    expected = branches_by_formula(model, case, batch)
    assert len(expected) == 4
    for branch in expected:
        assert set(found.branches[branch.members[0]]) == set(branch.members)
        for name in branch.members:
            assert abs(found.values[name] - mean_distance(branch.before, branch.after)) < EXACT
            for before, after in branch.wrong:
                assert abs(found.values[name] - mean_distance(before, after)) > WRONG
    assert sum(len(branch.members) for branch in expected) == len(found.values)
    # What is left lies outside the stack of blocks, and that stack is found too.
    stack = CASES[case][2]
    assert not any(name.startswith(stack) for name in found.missing)
    blocks = find_repeating_blocks(model)
    assert [name for name, _ in blocks] == [f"{stack}.0", f"{stack}.1"]
    assert all(model.get_submodule(name) is block for name, block in blocks)


@pytest.mark.parametrize("case", ["llama", "gemma2", "bert", "gpt_neox", "falcon", "stablelm-parallel"])
def test_the_choice_of_targets_changes_no_value(case: str) -> None:
    model, batch = build(case), batches(n=1)[0]
    everything = watch(model, **batch)
    groups = sorted(set(everything.branches.values()))
    assert len(groups) == 4
    for group in groups:
        watcher = ResidualWatcher({group[-1]: weights_of(model)[group[-1]]})
        with torch.no_grad(), watcher.batch():
            model(**batch)
        assert watcher.importance().values == {group[-1]: everything.values[group[-1]]}


# The model around the watcher


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", ["llama", "bert", "gpt_neox", "falcon", "opt"])
def test_padding_counts_for_nothing(case: str, attention: str) -> None:
    model, batch = build(case, attention=attention), batches(n=1, batch=4, length=12, padding=True)[0]
    mask = batch["attention_mask"]
    assert 4 < int(mask.sum()) < mask.numel() - 4
    masked = watch(model, **batch, mask=mask)
    counted = watch(model, **batch)
    rows = ResidualWatcher(weights_of(model))
    for ids, keep in zip(batch["input_ids"], mask.bool(), strict=True):
        with torch.no_grad(), rows.batch():
            model(input_ids=ids[keep][None], attention_mask=torch.ones_like(ids[keep])[None])
    alone = rows.importance()
    assert masked.values.keys() == alone.values.keys() == counted.values.keys()
    assert masked.branches == alone.branches
    for name, value in masked.values.items():
        assert abs(value - alone.values[name]) < EXACT  # measured: 4e-16
    assert max(abs(value - counted.values[name]) for name, value in masked.values.items()) > WRONG


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_same_to_the_last_bit(case: str) -> None:
    attention = "eager" if case == "gemma2" else "sdpa"
    model = build(case, attention=attention).float().train()  # dropout is off where the family has it
    batch = batches(n=1, batch=3, length=10, padding=True)[0]
    outputs, gradients = [], []
    for watched in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        watcher = ResidualWatcher(weights_of(model))
        if watched:
            with watcher.batch(batch["attention_mask"]):
                output = model(**batch)[0]
            assert len(watcher.importance().values) >= 8
        else:
            output = model(**batch)[0]
        output.square().sum().backward()
        outputs.append(output.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert torch.equal(*outputs)
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_active_dropout_draws_the_same_numbers() -> None:
    def wire(net: Net, h: Tensor) -> Tensor:
        for _ in range(2):
            h = h + F.dropout(net.one(h) + net.two(h), 0.5)
        return h

    net, h = Net(wire), torch.randn(5, WIDTH, dtype=torch.float64)
    watcher = letters(net)
    torch.manual_seed(7)
    plain = net(h)
    torch.manual_seed(7)
    with watcher.batch():
        assert torch.equal(plain, net(h))
    assert set(watcher.sums) == {("a", "b", "c", "d")}  # what was dropped of each branch is not known: a joint one


def test_one_block_alone_gives_what_the_whole_model_gives() -> None:
    model, batch = build("llama"), batches(n=1)[0]
    whole = watch(model, **batch)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layer = model.model.layers[1]
    handle = layer.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(**batch, use_cache=False)
    handle.remove()
    args, kwargs = calls[0]
    found = watch(layer, *args, **kwargs)
    assert len(found.values) == 7
    for name, value in found.values.items():
        assert abs(value - whole.values[f"model.layers.1.{name}"]) < EXACT


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("case", ["llama", "falcon"])
def test_every_gradient_mode_gives_the_same(case: str, mode: Any) -> None:
    model, batch = build(case), batches(n=1)[0]
    expected = watch(model, **batch)
    watcher = ResidualWatcher(weights_of(model))
    with mode(), watcher.batch():
        model(**batch)
    assert watcher.importance() == expected


def test_gradient_checkpointing_and_half_precision() -> None:
    model, batch = build("llama"), batches(n=1)[0]
    expected = watch(model, **batch)
    watcher = ResidualWatcher(weights_of(model))
    with watcher.batch():
        output = checkpoint(lambda ids: model(input_ids=ids)[0], batch["input_ids"], use_reentrant=False)
    output.sum().backward()
    assert watcher.importance() == expected
    half = watch(model.eval().bfloat16(), **batch)
    for name, value in half.values.items():
        assert abs(value - expected.values[name]) < 0.02 * expected.values[name]  # measured: 0.7 %


def test_factored_matrix_has_two_weights() -> None:
    model, batch = build("llama"), batches(n=1)[0]
    mlp = model.model.layers[0].mlp
    inner, outer = nn.Linear(48, 5, bias=False).double(), nn.Linear(5, 32, bias=False).double()
    mlp.down_proj = nn.Sequential(inner, outer)
    weights = weights_of(model)
    first = weights.pop("model.layers.0.mlp.down_proj.0")
    weights["model.layers.0.mlp.down_proj"] = [*first, *weights.pop("model.layers.0.mlp.down_proj.1")]
    watcher = ResidualWatcher(weights)
    with torch.no_grad(), watcher.batch(), captured(model) as store:
        model(**batch)
    found = watcher.importance()
    assert set(found.branches["model.layers.0.mlp.down_proj"]) == {f"model.layers.0.{name}" for name in GATED_MLP}
    h1 = store["model.layers.0.in"] + store["model.layers.0.self_attn.out"]
    by_hand = mean_distance(h1, h1 + store["model.layers.0.mlp.out"])
    assert abs(found.values["model.layers.0.mlp.down_proj"] - by_hand) < EXACT


# Every form of an addition, on a network small enough to write the answer by hand

WIDTH = 6


class Net(nn.Module):
    """Matrices a, b, c, d of one size (and e, f), wired by ``wiring(net, h)``."""

    def __init__(self, wiring: Callable[[Net, Tensor], Tensor], columns: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(columns, columns).double() for _ in range(6))
        self.wiring = wiring

    def forward(self, h: Tensor) -> Tensor:
        return self.wiring(self, h)

    def one(self, h: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(h)))

    def two(self, h: Tensor) -> Tensor:
        return self.d(torch.tanh(self.c(h)))


Expected = dict[str, tuple[Tensor, Tensor]]


def in_order(net: Net, h: Tensor) -> Expected:
    h1 = h + net.one(h)
    return {"ab": (h, h1), "cd": (h1, h1 + net.two(h1))}


def beside(net: Net, h: Tensor) -> Expected:
    return {"ab": (h, h + net.one(h)), "cd": (h, h + net.two(h))}


def wire_in_place(net: Net, h: Tensor) -> Tensor:
    h = h.clone()
    h += net.one(h)
    h.add_(net.two(h))
    return h


def wire_into_contribution(net: Net, h: Tensor) -> Tensor:
    h = net.one(h).add_(h)
    return torch.Tensor.__iadd__(net.two(h), h)


def wire_in_place_view(net: Net, h: Tensor) -> Tensor:
    stream = h.clone().unsqueeze(0)
    view = stream[0]
    view += net.one(view)
    stream.add_(net.two(stream))  # sees what was written through the view
    return view


def wire_flat(net: Net, h: Tensor) -> Tensor:
    flat = h.reshape(-1, WIDTH)
    flat = (flat + net.one(flat)).view(h.shape)
    return flat + net.two(flat.reshape(-1, WIDTH)).view_as(h)


def wire_branches_by_hand(net: Net, h: Tensor) -> Tensor:
    branches = net.one(h)
    branches += net.two(h)
    return branches + h


def wire_sum(net: Net, h: Tensor) -> Tensor:
    return sum([h, net.one(h), net.two(h)])  # type: ignore[return-value]


def wire_dropout_view_between(net: Net, h: Tensor) -> Tensor:
    both = (net.one(h) + net.two(h)).reshape(-1, WIDTH)
    return F.dropout(both.view(h.shape), 0.5, training=False) + h


def wire_late(net: Net, h: Tensor) -> Tensor:
    both = net.one(h) + net.two(h)
    return torch.add(h, both)


def wire_second_first(net: Net, h: Tensor) -> Tensor:
    second = net.two(h)
    return second + (net.one(h) + h)


def wire_two_blocks(net: Net, h: Tensor) -> Tensor:
    h = h + net.one(h) + net.two(h)
    return h + net.e(torch.tanh(h)) + net.f(torch.cos(h))


def expect_two_blocks(net: Net, h: Tensor) -> Expected:
    h2 = h + net.one(h) + net.two(h)
    return {
        **beside(net, h),
        "e": (h2, h2 + net.e(torch.tanh(h2))),
        "f": (h2, h2 + net.f(torch.cos(h2))),
    }


def wire_scaled_branches(net: Net, h: Tensor) -> Tensor:
    return h + 0.5 * (net.one(h) + net.two(h))


def expect_scaled_branches(net: Net, h: Tensor) -> Expected:
    return {"ab": (h, h + 0.5 * net.one(h)), "cd": (h, h + 0.5 * net.two(h))}


def wire_scaled_stream(net: Net, h: Tensor) -> Tensor:
    h = h * 1.7 + net.one(h)
    old = h.clone()
    h.mul_(torch.tensor(2.5))
    return h.float().double() + net.two(old)


def expect_scaled_stream(net: Net, h: Tensor) -> Expected:
    h1 = 1.7 * h + net.one(h)
    wide = (2.5 * h1).float().double()
    return {"ab": (1.7 * h, h1), "cd": (wide, wide + net.two(h1))}


def wire_alpha(net: Net, h: Tensor) -> Tensor:
    h = torch.add(h, net.one(h), alpha=3)
    return torch.add(net.two(h), h, alpha=0.5)


def expect_alpha(net: Net, h: Tensor) -> Expected:
    h1 = h + 3 * net.one(h)
    return {"ab": (h, h1), "cd": (0.5 * h1, 0.5 * h1 + net.two(h1))}


def wire_joint(net: Net, h: Tensor) -> Tensor:
    return h + net.d(net.a(h) + net.b(h).relu() + net.c(h))


def expect_joint(net: Net, h: Tensor) -> Expected:
    return {"abcd": (h, wire_joint(net, h))}


def wire_shared_matrix(net: Net, h: Tensor) -> Tensor:
    x = torch.tanh(net.a(h))
    return h + (net.b(x) + net.c(x))  # a serves both addends: one branch


def expect_shared_matrix(net: Net, h: Tensor) -> Expected:
    return {"abc": (h, wire_shared_matrix(net, h))}


def wire_two_outputs(net: Net, h: Tensor) -> Tensor:
    low, high = torch.aminmax(net.a.weight, dim=0)
    return h + (net.b(h * low) + net.c(h * high))


def expect_two_outputs(net: Net, h: Tensor) -> Expected:
    return {"abc": (h, wire_two_outputs(net, h))}


def wire_added_twice(net: Net, h: Tensor) -> Tensor:
    contribution = net.one(h)
    first = h + contribution  # the first addition has it
    return first * (2 * h + contribution)


def expect_added_twice(net: Net, h: Tensor) -> Expected:
    return {"ab": (h, h + net.one(h))}


def wire_gelu(net: Net, h: Tensor) -> Tensor:
    x = net.a(h)
    x = 0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3)))  # its addition is none of a sub-block
    h = h + net.b(x)
    return h + net.two(h)


def expect_gelu(net: Net, h: Tensor) -> Expected:
    x = net.a(h)
    h1 = h + net.b(0.5 * x * (1.0 + torch.tanh(0.8 * (x + 0.044715 * x**3))))
    return {"ab": (h, h1), "cd": (h1, h1 + net.two(h1))}


def wire_nested(net: Net, h: Tensor) -> Tensor:
    q = net.one(h)
    return h + (q + net.two(q))  # an adapter inside the sub-block


def expect_nested(net: Net, h: Tensor) -> Expected:
    q = net.one(h)
    return {"cd": (q, q + net.two(q)), "ab": (h, h + q + net.two(q))}


def wire_outer(net: Net, h: Tensor) -> Tensor:
    inner = net.e(h)
    inner = inner + net.one(inner)
    inner = inner + net.two(inner)
    return h + net.f(inner)


def expect_outer(net: Net, h: Tensor) -> Expected:
    h0 = net.e(h)
    h1 = h0 + net.one(h0)
    h2 = h1 + net.two(h1)
    return {"ab": (h0, h1), "cd": (h1, h2), "ef": (h, h + net.f(h2))}


def wire_values_of_first_layer(net: Net, h: Tensor) -> Tensor:
    value = net.a(h)
    h = h + net.b(value)
    return h + net.d(net.c(h) + value)  # value is an ancestor of c(h), but no stream


def expect_values_of_first_layer(net: Net, h: Tensor) -> Expected:
    h1 = h + net.b(net.a(h))
    return {"ab": (h, h1), "cd": (h1, h1 + net.d(net.c(h1) + net.a(h)))}


def wire_shared_bias(net: Net, h: Tensor) -> Tensor:
    bias = torch.ones(*h.shape[:-1], h.shape[-1], dtype=h.dtype)
    h = h + net.b(torch.tanh(net.a(h) + bias))
    return h + net.d(torch.tanh(net.c(h) + bias))


def expect_shared_bias(net: Net, h: Tensor) -> Expected:
    h1 = h + net.b(torch.tanh(net.a(h) + 1))
    return {"ab": (h, h1), "cd": (h1, h1 + net.d(torch.tanh(net.c(h1) + 1)))}


def wire_side_input(net: Net, h: Tensor) -> Tensor:
    memory = torch.sin(h.flip(0)).detach()
    h = h * 1.0
    return h + net.b(net.a(h) * net.c(memory))  # as keys and values of a cross-attention


def expect_side_input(net: Net, h: Tensor) -> Expected:
    return {"abc": (h, wire_side_input(net, h))}


def wire_weight_delta(net: Net, h: Tensor) -> Tensor:
    return h + F.linear(torch.tanh(F.linear(h, net.a.weight + 0.1 * net.b.weight)), net.c.weight.t().contiguous())


def expect_weight_delta(net: Net, h: Tensor) -> Expected:
    return {"abc": (h, wire_weight_delta(net, h))}


def wire_buffer(net: Net, h: Tensor) -> Tensor:
    buffer = torch.zeros_like(h)
    buffer[:, :2].copy_(net.a(h)[:, :2])
    buffer[:, 2:] = net.b(h)[:, 2:]
    h = h + buffer
    return h + F.relu(net.two(h), inplace=True)


def expect_buffer(net: Net, h: Tensor) -> Expected:
    h1 = h + torch.cat([net.a(h)[:, :2], net.b(h)[:, 2:]], 1)
    return {"ab": (h, h1), "cd": (h1, h1 + net.two(h1).relu())}


def wire_written_since(net: Net, h: Tensor) -> Tensor:
    first, second = net.one(h), net.two(h)
    both = first + second
    first.zero_()  # the addends are known no longer: one joint branch, never a wrong one
    return h + both


def expect_written_since(net: Net, h: Tensor) -> Expected:
    return {"abcd": (h, h + net.one(h) + net.two(h))}


def wire_state_in_use(net: Net, h: Tensor) -> Tensor:
    h1 = h + net.one(h)
    side = net.e(torch.tanh(h1))
    return h1 + net.two(h) + side  # h1 is a state of its own, as something was computed from it


def expect_state_in_use(net: Net, h: Tensor) -> Expected:
    h1 = h + net.one(h)
    h2 = h1 + net.two(h)
    return {"ab": (h, h1), "cd": (h1, h2), "e": (h1, h1 + net.e(torch.tanh(h1)))}


WIRINGS: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Expected]]] = {
    "in place": (wire_in_place, in_order),
    "into the contribution": (wire_into_contribution, in_order),
    "in place in a view": (wire_in_place_view, in_order),
    "flattened": (wire_flat, in_order),
    "h + (a + b) in place": (wire_branches_by_hand, beside),
    "sum()": (wire_sum, beside),
    "h + view(a + b)": (wire_dropout_view_between, beside),
    "h + (a + b), addends gone": (wire_late, beside),
    "b + (a + h)": (wire_second_first, beside),
    "two parallel blocks": (wire_two_blocks, expect_two_blocks),
    "h + (a + b) / 2": (wire_scaled_branches, expect_scaled_branches),
    "scaled stream": (wire_scaled_stream, expect_scaled_stream),
    "alpha": (wire_alpha, expect_alpha),
    "joint": (wire_joint, expect_joint),
    "shared matrix": (wire_shared_matrix, expect_shared_matrix),
    "two outputs": (wire_two_outputs, expect_two_outputs),
    "added twice": (wire_added_twice, expect_added_twice),
    "gelu": (wire_gelu, expect_gelu),
    "nested": (wire_nested, expect_nested),
    "outer": (wire_outer, expect_outer),
    "values of the first layer": (wire_values_of_first_layer, expect_values_of_first_layer),
    "shared bias": (wire_shared_bias, expect_shared_bias),
    "side input": (wire_side_input, expect_side_input),
    "weight delta": (wire_weight_delta, expect_weight_delta),
    "buffer": (wire_buffer, expect_buffer),
    "written since": (wire_written_since, expect_written_since),
    "state in use": (wire_state_in_use, expect_state_in_use),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_form_of_addition(wiring: str, gradients: bool) -> None:
    wire, expect = WIRINGS[wiring]
    net, h = Net(wire), torch.randn(5, WIDTH, dtype=torch.float64)
    watcher = ResidualWatcher({name: [getattr(net, name).weight] for name in "abcdef"})
    with torch.set_grad_enabled(gradients):
        plain = net(h)
        with watcher.batch():
            watched = net(h)
    assert torch.equal(plain, watched)
    found = watcher.importance()
    with torch.no_grad():
        expected = {name: (members, pair) for members, pair in expect(net, h).items() for name in members}
    assert found.values.keys() == expected.keys()
    assert found.missing == tuple(name for name in "abcdef" if name not in expected)
    for name, (members, pair) in expected.items():
        assert "".join(found.branches[name]) == members
        assert abs(found.values[name] - mean_distance(*pair)) < EXACT


def test_named_wrong_choices_differ_on_the_small_network() -> None:
    """The forms above are told apart: each pair of answers that a wrong reading would swap differs."""
    net, h = Net(wire_sum), torch.randn(5, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        assert abs(mean_distance(*in_order(net, h)["cd"]) - mean_distance(*beside(net, h)["cd"])) > WRONG
        joint = mean_distance(h, h + net.one(h) + net.two(h))
        assert all(abs(joint - mean_distance(*pair)) > WRONG for pair in beside(net, h).values())


# State


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def letters(net: Net) -> ResidualWatcher:
    return ResidualWatcher({name: [getattr(net, name).weight] for name in "abcdef"})


def run(watcher: ResidualWatcher, net: Net, *inputs: Tensor) -> ImportanceResult:
    for h in inputs:
        with torch.no_grad(), watcher.batch():
            net(h)
    return watcher.importance()


def test_sums_of_any_split_into_watchers_are_the_sums_of_one() -> None:
    net = Net(wire_two_blocks)
    inputs = [torch.randn(rows, WIDTH, dtype=torch.float64) for rows in (1, 7, 3, 2)]
    whole = run(letters(net), net, torch.cat(inputs))
    one, other = letters(net), letters(net)
    run(one, net, inputs[0], inputs[2])
    run(other, net, inputs[3], inputs[1])
    one.merge(other)
    received = letters(net)
    received.merge(dict(one.sums))
    assert one.importance() == received.importance()
    assert one.importance().branches == whole.branches
    assert sorted(one.sums) == [("a", "b"), ("c", "d"), ("e",), ("f",)]
    assert {value.tokens for value in one.sums.values()} == {13}
    per_batch = sum(run(letters(net), net, h).values["a"] for h in inputs) / len(inputs)
    for name, value in one.importance().values.items():
        assert abs(value - whole.values[name]) < EXACT
    assert abs(per_batch - whole.values["a"]) > WRONG  # a mean of means is another number


def test_a_module_called_twice_counts_both_calls() -> None:
    def wire(net: Net, h: Tensor) -> Tensor:
        for _ in range(2):
            h = h + net.one(h)
        return h + net.c(net.a(h))

    net, h = Net(wire), torch.randn(5, WIDTH, dtype=torch.float64)
    found = run(letters(net), net, h)
    with torch.no_grad():
        h1 = h + net.one(h)
        h2 = h1 + net.one(h1)
        steps = mean_distance(h, h1), mean_distance(h1, h2), mean_distance(h2, net(h))
    assert abs(found.values["b"] - sum(steps[:2]) / 2) < EXACT
    assert abs(found.values["a"] - sum(steps) / 3) < EXACT
    assert abs(found.values["c"] - steps[2]) < EXACT
    assert found.branches == {"a": ("a", "b", "c"), "b": ("a", "b"), "c": ("a", "c")}


def test_exception_restores_everything_and_leaves_no_trace() -> None:
    model, batch = build("llama"), batches(n=1)[0]
    watcher = ResidualWatcher(weights_of(model))
    cosine = BlockCosine(dict(find_repeating_blocks(model)))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail(*_: Any) -> None:
        raise KeyError("stop")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyError, match="stop"), watcher.batch(), cosine.batch():
        model(**batch)
    handle.remove()
    assert not watcher.sums
    assert not cosine.sums
    assert torch._C._len_torch_function_stack() == 0
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    with torch.no_grad(), watcher.batch():
        model(**batch)
    assert watcher.importance() == watch(model, **batch)


def test_no_activation_outlives_the_forward() -> None:
    streams: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def wire(net: Net, h: Tensor) -> Tensor:
        for _ in range(8):
            h = h + net.one(h)
            streams.append(weakref.ref(h))
            alive.append(sum(ref() is not None for ref in streams))
        return h

    net = Net(wire)
    run(letters(net), net, torch.randn(5, WIDTH, dtype=torch.float64))
    assert max(alive) <= 3, "a deep model would keep every residual stream"
    assert sum(ref() is not None for ref in streams) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_stream_that_is_not_finite_names_the_first_matrix_of_its_branch(bad: float) -> None:
    model = build("llama")
    clean = batches(n=1)[0]
    watcher = ResidualWatcher(weights_of(model))
    with torch.no_grad(), watcher.batch():
        model(**clean)
    before = dict(watcher.sums)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = bad
    message = r"model\.layers\.1\.mlp\.gate_proj"
    with torch.no_grad(), pytest.raises(NonFiniteError, match=message), watcher.batch():
        model(**clean)
    assert watcher.sums == before


def test_padding_may_be_anything() -> None:
    net = Net(wire_sum)
    h = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    kept = run(letters(net), net, h[mask.bool()])
    h[mask == 0] = float("nan")
    watcher = letters(net)
    with torch.no_grad(), watcher.batch(mask):
        net(h)
    assert all(abs(value - kept.values[name]) < EXACT for name, value in watcher.importance().values.items())


@pytest.mark.parametrize(
    "layout",
    [
        lambda h: h,
        lambda h: h.reshape(-1, WIDTH),
        lambda h: h.transpose(0, 1),
        lambda h: h[:, None],
        lambda h: h[MASK.bool()],
        lambda h: h.reshape(2, 3, 2, WIDTH // 2),
    ],
    ids=["batch seq", "flat", "seq batch", "extra axis", "packed", "heads"],
)
def test_mask_finds_the_tokens_in_every_layout(layout: Callable[[Tensor], Tensor]) -> None:
    h = layout(torch.randn(2, 3, WIDTH, dtype=torch.float64))
    net = Net(wire_sum, columns=h.shape[-1])
    watcher = letters(net)
    with torch.no_grad(), watcher.batch(MASK):
        net(h)
    with torch.no_grad():
        steps = cosine_distance(h, h + net.one(h))
    real = {
        "torch.Size([2, 3])": lambda d: d[MASK.bool()],
        "torch.Size([6])": lambda d: d[MASK.reshape(-1).bool()],
        "torch.Size([3, 2])": lambda d: d.T[MASK.bool()],
        "torch.Size([2, 1, 3])": lambda d: d[:, 0][MASK.bool()],
        "torch.Size([4])": lambda d: d,
        "torch.Size([2, 3, 2])": lambda d: d[MASK.bool()],
    }[str(steps.shape)](steps)
    assert abs(watcher.importance().values["a"] - float(real.mean())) < EXACT
    assert watcher.sums["a", "b"].tokens == real.numel()


def test_a_mask_that_cannot_be_applied_is_refused() -> None:
    net, h = Net(wire_sum), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    watcher = letters(net)
    with pytest.raises(DataError, match=r"mask \(2, 3\) does not fit the tokens \(2, 5\) .* at a"), watcher.batch(MASK):
        net(h)
    with pytest.raises(DataError, match="attention mask"), watcher.batch(MASK[None]):
        net(h)
    with pytest.raises(DataError, match="attention mask"), BlockCosine({}).batch(MASK[0]):
        net(h)
    with torch.no_grad(), watcher.batch(torch.ones(2, 3)):  # without padding there is nothing to apply
        net(h)
    with torch.no_grad(), watcher.batch(MASK):  # one pooled vector for each row
        net(h[:, 0])
    assert watcher.sums["a", "b"].tokens == 12


# The pure function


@given(st.integers(0, 10_000), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.sampled_from([1e-7, 1e-3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_distance_is_accurate_at_every_scale_and_for_nearly_parallel_vectors(
    seed: int, scale: float, step: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(4, 16, generator=generator, dtype=torch.float64)
    after = before + step * torch.randn(4, 16, generator=generator, dtype=torch.float64)
    before, after = before.float(), after.float()  # what the fp32 path sees, exactly
    u, v = (t.double() / t.double().norm(dim=-1, keepdim=True) for t in (before, after))
    exact = (u - v).square().sum(-1) / 2
    found = cosine_distance(before * scale, after * scale)
    assert found.dtype is torch.float32
    # 1 - cos in fp32 would be off by 6e-8; measured here: at most 1.4e-7 |u - v| + 1e-14
    assert ((found.double() - exact).abs() <= 1e-6 * exact.sqrt() + 1e-12).all()


def test_distance_of_zero_vectors() -> None:
    zero, one = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 3.0]])
    assert cosine_distance(zero, zero).tolist() == [0.0]
    assert cosine_distance(zero, one).tolist() == cosine_distance(one, zero).tolist() == [1.0]
    assert cosine_distance(one, -one).tolist() == pytest.approx([2.0])
    assert cosine_distance(one.double(), one).dtype is torch.float64


# No residual stream; blocks


def test_network_without_residual_falls_back_and_says_so() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, WIDTH).double()
            self.stack = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for block in self.stack:
                x = block(x)
            return x

    model, x = Plain(), torch.randn(5, 4, dtype=torch.float64)
    blocks = find_repeating_blocks(model)
    assert [name for name, _ in blocks] == ["stack.0", "stack.1", "stack.2"]
    watcher, cosine = ResidualWatcher(weights_of(model)), BlockCosine(dict(blocks))
    with torch.no_grad(), watcher.batch(), cosine.batch(), captured(model) as store:
        model(x)
    found = watcher.importance()
    assert not found.values
    assert found.missing == ("first", "stack.0.0", "stack.1.0", "stack.2.0")
    values, notes = resolve_importance(found.missing, found, cosine.importance())
    assert values["first"] == 1.0
    for name, _ in blocks:
        assert abs(values[f"{name}.0"] - mean_distance(store[f"{name}.in"], store[f"{name}.out"])) < EXACT
        assert 0.001 < values[f"{name}.0"] != 1.0
    assert len(notes) == 2
    assert "3 matrices (stack.0.0, ...)" in notes[0]
    assert "1 matrix (first)" in notes[1]
    assert "I = 1" in notes[1]
    values, notes = resolve_importance(found.missing, found, {})
    assert set(values.values()) == {1.0}
    assert len(notes) == 1
    assert "4 matrices (first, ...)" in notes[0]


def test_resolve_takes_the_innermost_block_and_no_name_that_only_begins_alike() -> None:
    found = ImportanceResult({"h.1.a": 0.25}, {"h.1.a": ("h.1.a",)}, ("h.1.b", "h.10.b", "h.1.x.b"))
    values, notes = resolve_importance(["h.1.a", "h.1.b", "h.10.b", "h.1.x.b"], found, {"h.1": 0.5, "h.1.x": 0.125})
    assert values == {"h.1.a": 0.25, "h.1.b": 0.5, "h.10.b": 1.0, "h.1.x.b": 0.125}
    assert len(notes) == 2
    assert resolve_importance(["h.1.a"], found, {}) == ({"h.1.a": 0.25}, ())


def test_block_cosine_of_a_transformer_masks_copies_and_merges() -> None:
    class InPlace(nn.Module):
        def forward(self, *, hidden_states: Tensor) -> tuple[Tensor]:
            return (hidden_states.add_(torch.ones_like(hidden_states)),)

    h = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    old, block = h.clone(), InPlace()
    one, other, whole = (BlockCosine({"0": block, "grow": nn.Linear(WIDTH, WIDTH + 1)}) for _ in range(3))
    for cosine, rows in ((one, slice(0, 1)), (other, slice(1, 2)), (whole, slice(0, 2))):
        with cosine.batch(MASK[rows]):
            block(hidden_states=h[rows].clone())
            cosine._blocks["grow"](h[rows].float())
    one.merge(other)
    expected = mean_distance(old[MASK.bool()], old[MASK.bool()] + 1)
    assert whole.importance().keys() == {"0"}
    assert abs(whole.importance()["0"] - expected) < EXACT
    assert abs(one.importance()["0"] - expected) < EXACT
    assert one.sums["0",].tokens == 4


def test_repeating_blocks_elsewhere() -> None:
    linear = nn.Linear(3, 3)
    assert find_repeating_blocks(nn.Sequential(linear, nn.ReLU(), nn.Linear(3, 3))) == []
    assert find_repeating_blocks(linear) == []
    assert [name for name, _ in find_repeating_blocks(nn.Sequential(linear, linear))] == ["0", "1"]

    class Attention(nn.Sequential):
        pass

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))

    hybrid = nn.Module()
    hybrid.layers = nn.ModuleList([Attention(linear), Experts(), Attention(nn.Linear(3, 3)), Experts()])
    assert [name for name, _ in find_repeating_blocks(hybrid)] == [f"layers.{index}" for index in range(4)]
