"""Perplexity and divergence against their definitions, at their extremes, and what they leave behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_lit.errors import DataError, ModelError, NonFiniteError
from lowrank_lit.evaluation import divergence, peak_memory_bytes, perplexity
from tests.tiny import CAUSAL_FAMILIES, MAX_POSITIONS, VOCABULARY, tiny_model


def draw_blocks(n: int = 5, length: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


class Lookup(nn.Module):
    """Logits of the next token from a table (vocabulary, vocabulary), returned as a plain tensor."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.modes: list[bool] = []

    def forward(self, input_ids: Tensor) -> Tensor:
        self.modes.append(self.training)
        return self.table[input_ids]


class First(nn.Module):
    """The same logits, first in a tuple."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> tuple[Tensor, None]:
        return self.model(input_ids), None


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_is_the_definition(family: str) -> None:
    model = tiny_model(family).double()
    blocks = draw_blocks()
    losses = []
    for block in blocks:
        with torch.no_grad():
            logits = model(input_ids=block[None]).logits[0]
        for position in range(len(block) - 1):
            row = logits[position]
            losses.append(float(torch.logsumexp(row, 0) - row[block[position + 1]]))
    assert len(losses) == 5 * 23
    expected = math.exp(math.fsum(losses) / len(losses))
    assert 20 < expected < 1e6
    assert perplexity(model, blocks) == pytest.approx(expected, rel=1e-12)  # measured: 5e-15 at most
    assert perplexity(model.float(), blocks) == pytest.approx(expected, rel=1e-6)  # measured: 1.2e-7 at most


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    model, blocks = tiny_model("llama"), draw_blocks()
    one = perplexity(model, blocks[:1])
    assert perplexity(model, blocks, batch_size=batch_size) == pytest.approx(perplexity(model, blocks), rel=1e-6)
    assert abs(one / perplexity(model, blocks) - 1) > 1e-3  # or the blocks after the first would not count


def test_uniform_and_certain_models() -> None:
    blocks = draw_blocks()
    assert perplexity(Lookup(torch.zeros(VOCABULARY, VOCABULARY)), blocks) == pytest.approx(VOCABULARY, rel=1e-7)
    cycle = torch.arange(10).repeat(3, 4)
    certain = 50.0 * torch.eye(10).roll(1, dims=1)  # after token t comes t + 1
    assert perplexity(Lookup(certain), cycle) == pytest.approx(1.0, abs=1e-9)
    assert perplexity(Lookup(certain), cycle.flip(1)) == pytest.approx(math.exp(50), rel=1e-5)


def test_probability_far_below_float32_stays_finite() -> None:
    """p = e^-200 underflows in float32 (smallest 1e-45), the loss of 200 nats does not."""
    table = torch.zeros(4, 4)
    table[:, 0] = 200.0
    blocks = torch.tensor([[0, 0, 1]])
    assert float(torch.softmax(table[0], 0)[1]) == 0.0
    assert perplexity(Lookup(table), blocks) == pytest.approx(math.exp(100), rel=1e-5)


def test_sum_is_exact_over_many_targets() -> None:
    """200,000 equal losses: a float32 running sum would be off by about 1e-4."""
    blocks = torch.zeros(200, 1001, dtype=torch.long)
    assert perplexity(Lookup(torch.tensor([[0.0, 0.1, 0.3]]).repeat(3, 1)), blocks) == pytest.approx(
        1 + math.exp(0.1) + math.exp(0.3), rel=1e-6
    )


def test_infinite_loss_is_reported_not_skipped() -> None:
    table = torch.zeros(4, 4)
    table[1, 2] = -math.inf
    assert perplexity(Lookup(table), torch.tensor([[0, 1, 3], [0, 1, 2]])) == math.inf
    assert perplexity(Lookup(1e4 * torch.eye(4)), torch.tensor([[0, 1, 2]])) == math.inf  # e^10000 is beyond a float


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_names_the_block(value: float) -> None:
    table = torch.zeros(8, 8)
    table[7, 0] = value
    blocks = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 7, 0], [1, 2, 3]])
    with pytest.raises(NonFiniteError, match="block 2"):
        perplexity(Lookup(table), blocks, batch_size=2)


def test_half_precision_logits_are_widened() -> None:
    """Logits of 0.1 and 3 in bfloat16: the loss must be that of the rounded logits, not itself rounded to 8 bits."""
    table = torch.tensor([[0.1, 3.0, -1.0]]).repeat(3, 1).to(torch.bfloat16)
    row = table[0].double()
    expected = float(torch.exp(torch.logsumexp(row, 0) - row[2]))
    assert perplexity(Lookup(table), torch.tensor([[0, 2, 2, 2]])) == pytest.approx(expected, rel=1e-6)


def test_modes_gradients_and_device_are_left_as_found() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()  # type: ignore[union-attr, operator]
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = {name: (id(p), p.device, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    perplexity(model, draw_blocks(), device="cpu")
    assert len(set(modes.values())) == 2
    assert {name: module.training for name, module in model.named_modules()} == modes
    for name, parameter in model.named_parameters():
        assert (id(parameter), parameter.device, parameter.requires_grad) == parameters[name][:3]
        assert torch.equal(parameter, parameters[name][3])
        assert parameter.grad is None
    lookup = Lookup(torch.zeros(4, 4)).train()
    perplexity(lookup, torch.tensor([[0, 1]]))
    assert lookup.modes == [False]
    assert lookup.training


def test_logits_may_come_in_a_tuple() -> None:
    model, blocks = Lookup(torch.randn(9, 9)), torch.arange(1, 9).reshape(2, 4)
    assert perplexity(First(model), blocks) == perplexity(model, blocks)


def test_modes_come_back_after_an_error() -> None:
    model = Lookup(torch.full((4, 4), math.nan)).train()
    with pytest.raises(NonFiniteError):
        perplexity(model, torch.tensor([[0, 1]]))
    assert model.training


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (torch.zeros(8, dtype=torch.long), "shape"),
        (torch.zeros(0, 8, dtype=torch.long), "shape"),
        (torch.zeros(4, 1, dtype=torch.long), "length >= 2"),
        (torch.zeros(4, 8), "dtype"),
        (torch.zeros(1, MAX_POSITIONS + 1, dtype=torch.long), f"max_position_embeddings is {MAX_POSITIONS}"),
        (torch.full((1, 8), VOCABULARY), f"vocab_size is {VOCABULARY}"),
        (torch.full((1, 8), -1), "token ids -1"),
    ],
)
def test_bad_blocks(blocks: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        perplexity(tiny_model("gpt2"), blocks)
    assert perplexity(tiny_model("gpt2"), draw_blocks(1, MAX_POSITIONS)) > 1


@pytest.mark.parametrize("blocks", ["hello", [{"input_ids": torch.zeros(1, 8, dtype=torch.long)}]])
def test_blocks_that_are_no_tensor(blocks: Any) -> None:
    with pytest.raises(DataError, match=rf"blocks is a {type(blocks).__name__}; give one tensor of token ids"):
        perplexity(tiny_model("gpt2"), blocks)


def test_bad_batch_size_and_model() -> None:
    with pytest.raises(DataError, match="batch_size=0"):
        perplexity(tiny_model("llama"), draw_blocks(), batch_size=0)
    with pytest.raises(ModelError, match="causal language model"):
        perplexity(tiny_model("bert"), draw_blocks())
    with pytest.raises(ModelError, match="meta device"):
        perplexity(tiny_model("llama").to("meta"), draw_blocks())


def shaken(model: nn.Module, scale: float = 0.1) -> Any:
    """A copy whose weights are off by a tenth of their own size, like those of a compressed model."""
    generator = torch.Generator().manual_seed(7)
    result = copy.deepcopy(model)
    with torch.no_grad():
        for weight in result.parameters():
            weight += scale * weight.std() * torch.randn(weight.shape, generator=generator).to(weight)
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [None, [1, 5, 23, 2, 9]])
def test_divergence_is_the_definition(family: str, first: list[int] | None) -> None:
    dense = tiny_model(family).double()
    compressed, blocks = shaken(dense), draw_blocks()
    values, same = [], 0
    for block, begin in zip(blocks, first or [1] * 5, strict=True):
        with torch.no_grad():
            one, two = (torch.softmax(model(input_ids=block[None]).logits[0], -1) for model in (dense, compressed))
        for position in range(begin - 1, 23):
            p, q = one[position].tolist(), two[position].tolist()
            values.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same += p.index(max(p)) == q.index(max(q))
    expected, share = math.fsum(values) / len(values), same / len(values)
    assert expected > 1e-2, "or the two are the same"
    assert 0 < share < 1
    begins = None if first is None else torch.tensor(first)
    wide = divergence(dense, compressed, blocks, first=begins)
    assert (wide.agreement, wide.tokens) == (share, len(values) if first is None else 120 - sum(first))
    assert wide.kl == pytest.approx(expected, rel=1e-12)  # measured: 4e-16 at most
    found = divergence(dense.float(), compressed.float(), blocks, first=begins, batch_size=2)
    assert (found.agreement, found.tokens) == (share, len(values))
    assert found.kl == pytest.approx(expected, abs=1e-6)  # measured: 5e-8 at most
    back = divergence(compressed, dense, blocks, first=begins)
    assert abs(back.kl - expected) > 1e-4, "the dense model's predictions are the ones that weigh"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_divergence_from_the_same_model(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    found = divergence(model, copy.deepcopy(model), draw_blocks(), device="cpu")
    assert (found.kl, found.agreement, found.tokens) == (0.0, 1.0, 5 * 23)
    assert divergence(model, model, draw_blocks()) == found


def test_the_top_token_is_counted_by_hand() -> None:
    """After 0 both rank 1 first; after 1 the two disagree; after 2 all logits are equal, and the first one counts."""
    dense = Lookup(torch.tensor([[0.0, 9.0, 1.0], [0.0, 1.0, 2.0], [0.5, 0.5, 0.5]])).train()
    compressed = Lookup(torch.tensor([[0.0, 1.5, 1.0], [0.0, 2.0, 1.0], [0.7, 0.7, 0.7]]))
    found = divergence(dense, compressed, torch.tensor([[0, 1, 2, 0], [1, 1, 1, 1]]), batch_size=1)
    assert (found.agreement, found.tokens) == (2 / 6, 6)
    assert dense.modes == [False, False]
    assert dense.training


def test_what_is_ruled_out_by_the_dense_model_alone_is_no_divergence() -> None:
    ruled, plain = torch.zeros(4, 4), torch.zeros(4, 4)
    ruled[:, 3] = -math.inf
    blocks = torch.tensor([[0, 1, 2]])
    assert divergence(Lookup(ruled), Lookup(ruled), blocks).kl == 0
    assert divergence(Lookup(ruled), Lookup(plain), blocks).kl == pytest.approx(math.log(4 / 3), rel=1e-6)
    with pytest.raises(NonFiniteError, match="block 0: the divergence is infinite"):
        divergence(Lookup(plain), Lookup(ruled), blocks)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_divergence_names_the_model_and_block_that_broke(value: float) -> None:
    good, bad = torch.zeros(8, 8), torch.zeros(8, 8)
    bad[7, 0] = value
    blocks = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 7, 0]])
    with pytest.raises(NonFiniteError, match="block 2: the logits of the compressed model"):
        divergence(Lookup(good), Lookup(bad), blocks, batch_size=2)
    with pytest.raises(NonFiniteError, match="block 2: the logits of the dense model"):
        divergence(Lookup(bad), Lookup(good), blocks, batch_size=2)


def test_what_a_divergence_refuses() -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="predicts 96 tokens and the compressed one 90"):
        divergence(model, tiny_model("llama", vocab_size=90), draw_blocks().clamp_max(80))
    with pytest.raises(DataError, match="batch_size=0"):
        divergence(model, model, draw_blocks(), batch_size=0)
    with pytest.raises(DataError, match="first has shape"):
        divergence(model, model, draw_blocks(), first=torch.tensor([1]))
    with pytest.raises(ModelError, match="meta device"):
        divergence(model, tiny_model("llama").to("meta"), draw_blocks())


def test_peak_memory_counts_the_process() -> None:
    before = peak_memory_bytes("cpu")
    assert before > 50 * 2**20  # the interpreter and torch alone
    held = torch.ones(before // 4 + 2**26)  # as many bytes again, and 256 MiB
    after = peak_memory_bytes(torch.device("cpu"))
    assert after >= before
    assert after > held.numel() * held.element_size()
