"""How a text is cut for a perplexity: who is scored, after how much context, and what the model makes of it."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank_lit.errors import DataError
from lowrank_lit.evaluation import perplexity
from lowrank_lit.windows import Protocol, cut_windows
from tests.tiny import VOCABULARY, tiny_model

BOS = 1


@pytest.mark.parametrize("bos", ["none", "prepend"])
@pytest.mark.parametrize("count", [16, 17, 40, 63])
@pytest.mark.parametrize(
    ("name", "stride"), [("blocks", None), ("sliding", None), ("sliding", 1), ("sliding", 5), ("sliding", 15)]
)
def test_every_token_is_scored_once_with_its_context(name: str, stride: int | None, count: int, bos: str) -> None:
    protocol = Protocol(name, 16, stride, bos)
    windows = cut_windows(torch.arange(count) + 100, protocol, BOS)  # a token tells its place
    assert windows.ids.shape[1] == 16
    begin = bos == "prepend"
    contexts: dict[int, int] = {}
    for ids, first in zip(windows.ids.tolist(), windows.first.tolist(), strict=True):
        text = ids[1:] if begin else ids
        assert text == list(range(text[0], text[0] + len(text)))
        assert (ids[0] == BOS) == begin
        for place in range(first, 16):
            assert ids[place] not in contexts, "scored twice"
            contexts[ids[place]] = place
    assert windows.targets == len(contexts)
    if name == "blocks":
        per = 16 - begin
        whole = count // per * per
        assert sorted(contexts) == [100 + n for n in range(whole) if begin or n % per]
        assert all(context == (token - 100) % per + begin for token, context in contexts.items())
    else:
        assert sorted(contexts) == [100 + n for n in range(0 if begin else 1, count)]
        least = 16 - protocol.step
        assert all(context >= min(least, token - 100 + begin) for token, context in contexts.items())


def test_a_sliding_perplexity_is_the_definition() -> None:
    """Each token's loss in float64 from a forward over exactly the tokens that its window holds before it."""
    model = tiny_model("llama").double()
    text = torch.randint(3, VOCABULARY, (50,), generator=torch.Generator().manual_seed(0))
    losses = []
    for end in range(1, 50):
        # Windows of 12 begin at 0, 4, 8, ...; the last at 38, so that it is full.
        begin = 0 if end < 12 else min(((end - 12) // 4 + 1) * 4, 38)
        with torch.no_grad():
            logits = model(input_ids=text[None, begin:end]).logits[0, -1]
        losses.append(float(torch.logsumexp(logits, 0) - logits[text[end]]))
    windows = cut_windows(text, Protocol("sliding", 12, 4))
    expected = math.exp(math.fsum(losses) / 49)
    found = perplexity(model, windows.ids, first=windows.first, batch_size=3)
    assert found == pytest.approx(expected, rel=1e-12)
    assert abs(found / perplexity(model, windows.ids, batch_size=3) - 1) > 1e-3, (
        "or where scoring begins would not count"
    )


def test_bos_comes_before_every_block() -> None:
    model = tiny_model("gpt2").double()
    text = torch.randint(3, VOCABULARY, (30,), generator=torch.Generator().manual_seed(1))
    windows = cut_windows(text, Protocol("blocks", 16, bos="prepend"), BOS)
    losses = []
    for begin in (0, 15):
        ids = torch.cat([torch.tensor([BOS]), text[begin : begin + 15]])
        with torch.no_grad():
            rows = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        losses += [-float(rows[place, ids[place + 1]]) for place in range(15)]
    assert windows.targets == len(losses) == 30
    assert perplexity(model, windows.ids, first=windows.first) == pytest.approx(
        math.exp(math.fsum(losses) / 30), rel=1e-12
    )


def test_blocks_are_the_default_of_perplexity() -> None:
    model = tiny_model("llama")
    blocks = torch.randint(3, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2))
    windows = cut_windows(blocks.flatten(), Protocol("blocks", 16))
    assert torch.equal(windows.ids, blocks)
    assert perplexity(model, windows.ids, first=windows.first) == perplexity(model, blocks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "rolling"}, "protocol='rolling' is unknown; choose one of blocks, sliding"),
        ({"bos": "always"}, "bos='always' is unknown"),
        ({"length": 1}, "length=1 is too small"),
        ({"stride": 4}, "stride=4 belongs to protocol='sliding'"),
        ({"name": "sliding", "length": 16, "stride": 16}, r"stride=16 is outside \[1, 15\]"),
        ({"name": "sliding", "length": 16, "stride": 0}, r"stride=0 is outside \[1, 15\]"),
    ],
)
def test_protocols_that_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Protocol(**arguments)  # type: ignore[arg-type]


def test_texts_that_are_refused() -> None:
    with pytest.raises(DataError, match="the text has 15 tokens, less than one window of 16"):
        cut_windows(torch.arange(15), Protocol("sliding", 16))
    with pytest.raises(DataError, match="the tokenizer has no BOS token"):
        cut_windows(torch.arange(16), Protocol("blocks", 16, bos="prepend"))


@pytest.mark.parametrize("first", [torch.tensor([1]), torch.tensor([1, 0]), torch.tensor([1, 8]), torch.ones(2)])
def test_places_that_are_refused(first: torch.Tensor) -> None:
    with pytest.raises(DataError, match="give one place of 1 to 7 for each of the 2 blocks"):
        perplexity(tiny_model("llama"), torch.full((2, 8), 5), first=first)
