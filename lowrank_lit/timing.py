"""How fast a causal language model reads a prompt and writes after it.

A run is what ``generate`` does greedily, without its search for the next step: one forward over the prompt that fills
the KV cache (prefill), then one forward per new token that reads the cache (decode). Every run starts with an empty
cache; runs before the first that counts warm caches, allocators and kernels up.
"""

from __future__ import annotations

import inspect
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.errors import DataError, ModelError, NonFiniteError
from lowrank_lit.evaluation import check_places
from lowrank_lit.memory import Watch, stage
from lowrank_lit.paging import give_back
from lowrank_lit.streaming import evaluating, moved

PROMPT_LENGTH = 128
NEW_TOKENS = 32
REPEATS = 5
WARMUP = 2


@dataclass(frozen=True)
class Throughput:
    """Times of repeated runs, and what they mean.

    Attributes:
        batch_size: Sequences that are read and written together.
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens written after each prompt.
        prefill_seconds: Wall time of the forward over the prompts, by run.
        decode_seconds: Wall time of the ``new_tokens`` forwards after it, by run.
        peak_memory_bytes: What a run needs above what was in use before it, weights not counted: of PyTorch's tensors
            on a CUDA device, of the process's resident memory elsewhere; ``None`` where the system does not tell.
        device: Where it ran.
        dtype: Of the weights that compute.
        threads: Of torch on the CPU.
    """

    batch_size: int
    prompt_length: int
    new_tokens: int
    prefill_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    peak_memory_bytes: int | None
    device: str
    dtype: str
    threads: int

    @property
    def prefill(self) -> Rate:
        """Tokens of the prompts per second."""
        return _rate(self.batch_size * self.prompt_length, self.prefill_seconds)

    @property
    def decode(self) -> Rate:
        """New tokens of all sequences per second."""
        return _rate(self.batch_size * self.new_tokens, self.decode_seconds)

    @property
    def first_token_seconds(self) -> float:
        """Median time from the prompt to the first token: that of the prefill."""
        return statistics.median(self.prefill_seconds)

    @property
    def token_seconds(self) -> float:
        """Median time of one decode step, a token for every sequence."""
        return statistics.median(self.decode_seconds) / self.new_tokens


@dataclass(frozen=True)
class Rate:
    """Tokens per second: median over the runs, slowest and fastest of them."""

    median: float
    slowest: float
    fastest: float


def _rate(tokens: int, seconds: tuple[float, ...]) -> Rate:
    return Rate(tokens / statistics.median(seconds), tokens / max(seconds), tokens / min(seconds))


def throughput(
    model: nn.Module,
    *,
    batch_size: int = 1,
    prompt_length: int = PROMPT_LENGTH,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    warmup: int = WARMUP,
    device: torch.device | str | None = None,
) -> Throughput:
    """Time prefill and decode of random prompts, the same for every model of one vocabulary.

    Args:
        model: A causal language model of transformers with a KV cache.
        batch_size: Prompts at a time.
        prompt_length: Tokens of each.
        new_tokens: Tokens to write after each.
        repeats: Runs that count.
        warmup: Runs before them, at least 1. One more run follows these in which the memory is read, and no clock.
        device: Where to run; the model moves there before the clock starts, and back. None stays where the model is.

    Raises:
        DataError: If a number is out of range, or prompt and new tokens exceed the model's context.
        ModelError: If the model takes no ``use_cache`` or gives no cache, or its weights are on the meta device.
        NonFiniteError: If the logits after the prompt hold a NaN.
    """
    counts = {
        "batch_size": batch_size,
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "warmup": warmup,
    }
    _check(model, counts)
    check_places(model, device)
    with torch.no_grad(), evaluating(model), moved(model, device) as place:
        home = torch.device("cpu") if place is None else place
        ids = _prompts(model, batch_size, prompt_length).to(home)
        for _ in range(warmup):
            _run(model, ids, new_tokens)
        memory = _peak(model, ids, new_tokens)
        times = [_run(model, ids, new_tokens) for _ in range(repeats)]
    prefill, decode = zip(*times, strict=True)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return Throughput(
        batch_size,
        prompt_length,
        new_tokens,
        prefill,
        decode,
        memory,
        torch.cuda.get_device_name(home) if home.type == "cuda" else str(home),
        str(dtype).removeprefix("torch."),
        torch.get_num_threads(),
    )


def context_of(model: nn.Module) -> int | None:
    """Tokens that a model reads at most, ``None`` where its configuration does not say."""
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def _check(model: nn.Module, counts: dict[str, int]) -> None:
    for name, value in counts.items():
        if value < 1:
            raise DataError(f"{name}={value} is too small; give at least 1")
    longest = context_of(model)
    total = counts["prompt_length"] + counts["new_tokens"]
    if longest is not None and total > longest:
        raise DataError(
            f"prompt_length={counts['prompt_length']} and new_tokens={counts['new_tokens']} make {total} tokens, the "
            f"model's max_position_embeddings is {longest}; give less"
        )
    if "use_cache" not in _arguments(model):
        raise ModelError(f"{type(model).__name__} takes no use_cache; give a causal language model of transformers")


def _arguments(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


def _prompts(model: nn.Module, batch_size: int, length: int) -> Tensor:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ModelError(f"{type(model).__name__} has no config.vocab_size to draw prompts from")
    return torch.randint(0, vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(0))


def _peak(model: nn.Module, ids: Tensor, new_tokens: int) -> int | None:
    """Peak memory of a run above what is in use before it."""
    # What an earlier model or run has freed would be used again unseen.
    give_back()
    held = torch.cuda.memory_allocated(ids.device) if ids.device.type == "cuda" else 0
    watch = Watch(ids.device)
    watch.start()
    try:
        with stage("throughput"):
            _run(model, ids, new_tokens)
    finally:
        watch.stop()
    peak = watch.used.get(("throughput", "device" if ids.device.type == "cuda" else "host"))
    return None if peak is None else max(0, peak - held)


def _run(model: nn.Module, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of prefill and of decode, with an empty cache at the start."""
    # As generate does: the head runs for the last place alone, where the model can do that.
    last = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}
    begin = _now(ids.device)
    output = model(input_ids=ids, use_cache=True, **last)
    chosen = output.logits[:, -1:].argmax(-1)
    prefilled = _now(ids.device)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ModelError(f"{type(model).__name__} gives no past_key_values; decoding without a KV cache is not timed")
    if bool(output.logits[:, -1].isnan().any()):
        raise NonFiniteError("the logits after the prompt hold a NaN; check the weights, or run in float32 or bfloat16")
    start = _now(ids.device)
    for _ in range(new_tokens):
        output = model(input_ids=chosen, past_key_values=cache, use_cache=True, **last)
        cache, chosen = output.past_key_values, output.logits[:, -1:].argmax(-1)
    return prefilled - begin, _now(ids.device) - start


def _now(device: torch.device) -> float:
    """Seconds, after all work that was given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
