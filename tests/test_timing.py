"""Prefill and decode: which forwards are timed, what the cache gives, and what the figures mean."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_lit
from lowrank_lit.errors import DataError, ModelError, NonFiniteError
from lowrank_lit.timing import Throughput, throughput
from tests.tiny import MAX_POSITIONS, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_it_runs_what_generate_runs(family: str) -> None:
    """Every decode step is fed the token that greedy search takes, one token at a time, after one whole prompt."""
    model = tiny_model(family).train()
    fed: list[Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    try:
        found = throughput(model, batch_size=2, prompt_length=7, new_tokens=4, repeats=3, warmup=1)
    finally:
        handle.remove()
    assert [tuple(ids.shape) for ids in fed] == [(2, 7), *[(2, 1)] * 4] * 5, "1 warms up, 1 for the memory, 3 count"
    assert model.training
    assert model.config.use_cache
    prompt = fed[0]
    model.eval()
    with torch.no_grad():
        ids = prompt
        for _ in range(4):  # without a cache
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(torch.cat(fed[:5], dim=1), ids)
    for run in range(5):
        assert torch.equal(torch.cat(fed[5 * run : 5 * run + 5], dim=1), ids), "a cache has outlived its run"
    assert len(found.prefill_seconds) == len(found.decode_seconds) == 3
    assert all(seconds > 0 for seconds in (*found.prefill_seconds, *found.decode_seconds))
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert found.peak_memory_bytes is None or found.peak_memory_bytes >= 0


def test_rates_are_tokens_by_time() -> None:
    found = Throughput(4, 100, 10, (0.1, 0.5, 0.2), (0.8, 0.4, 1.6), None, "cpu", "float32", 1)
    assert (found.prefill.median, found.prefill.slowest, found.prefill.fastest) == pytest.approx((2000, 800, 4000))
    assert (found.decode.median, found.decode.slowest, found.decode.fastest) == pytest.approx((50, 25, 100))
    assert found.first_token_seconds == 0.2
    assert found.token_seconds == pytest.approx(0.08)


def test_what_a_step_takes_is_in_the_time_that_it_counts_for() -> None:
    """A model that sleeps bounds both times from below, on however busy a machine: the prompt's not by the steps'."""
    model = tiny_model("llama")
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: time.sleep(0.002 * kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        found = throughput(model, prompt_length=40, new_tokens=10, repeats=2)
    finally:
        handle.remove()
    assert all(seconds > 40 * 0.002 for seconds in found.prefill_seconds)
    assert all(seconds > 10 * 0.002 for seconds in found.decode_seconds)
    assert found.prefill.fastest < 500
    assert found.decode.fastest < 500


class Bare(nn.Module):
    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


class Uncached(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        return self.model(input_ids=input_ids, use_cache=False)


def test_what_is_refused() -> None:
    model = tiny_model("llama")
    for name in ("batch_size", "prompt_length", "new_tokens", "repeats", "warmup"):
        with pytest.raises(DataError, match=f"{name}=0 is too small"):
            throughput(model, **{name: 0})
    with pytest.raises(DataError, match=f"make 160 tokens, the model's max_position_embeddings is {MAX_POSITIONS}"):
        throughput(model)
    with pytest.raises(ModelError, match="Bare takes no use_cache"):
        throughput(Bare())
    with pytest.raises(ModelError, match="Uncached gives no past_key_values"):
        throughput(Uncached(model), prompt_length=4, new_tokens=2)
    with pytest.raises(ModelError, match="meta device"):
        throughput(tiny_model("llama").to("meta"), prompt_length=4, new_tokens=2)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="NaN"):
        throughput(model, prompt_length=4, new_tokens=2)


def test_it_is_public() -> None:
    assert lowrank_lit.throughput is throughput
    assert {"multiple_choice", "throughput"} <= set(lowrank_lit.__all__)
