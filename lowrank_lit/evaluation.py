"""What a model costs and how well it predicts: perplexity, divergence from the dense model, and peak memory."""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowrank_lit.errors import DataError, ModelError, NonFiniteError
from lowrank_lit.streaming import evaluating, logits_of, moved


def perplexity(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    first: Tensor | None = None,
) -> float:
    """Perplexity of a causal language model, exp of its mean next-token cross-entropy.

    Each block is read by itself, and tokens 2 to ``length`` of each are its targets: every target of every block has
    the same weight, whatever the batch size. Nothing is left out: a target of probability 0 makes the result ``inf``.
    For sliding windows and a BOS token see :func:`lowrank_lit.windows.cut_windows`, which gives ``blocks`` and
    ``first``.

    Args:
        model: Called as ``model(input_ids=...)``; returns logits ``(batch, length, vocabulary)``, as a tensor, first in
            a tuple, or as ``.logits``. Evaluated in eval mode without gradients; every module gets its own mode back.
        blocks: Token ids, LongTensor ``(n, length)``, both at least 1 and 2.
        batch_size: Blocks per forward pass.
        device: Where to evaluate; the model moves there and back. None stays where the model is.
        first: Place of the first target in each block, LongTensor ``(n,)`` of 1 to ``length - 1``; what stands before
            it is context. None is 1, every token that has one before it.

    Returns:
        exp(-mean over all targets of log p(token | the tokens before it in its block)), in [1, inf].

    Raises:
        DataError: If ``blocks`` or ``batch_size`` has the wrong shape, type or range, or a block is longer than the
            model's context.
        ModelError: If the model gives no logits of that shape, or its weights are on the meta device or on several.
        NonFiniteError: If a logit is NaN or positive infinity; the message names the block.
    """
    total, count = 0.0, 0
    for losses in token_losses(model, blocks, batch_size=batch_size, device=device, first=first):
        total += float(losses.sum())
        count += len(losses)
    return exp_of(total / count)


def exp_of(loss: float) -> float:
    """The perplexity of a mean loss in nats; infinite where it is more than a float holds."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def token_losses(
    model: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    first: Tensor | None = None,
) -> list[Tensor]:
    """What :func:`perplexity` is the exponential of the mean of; arguments and errors as there.

    Returns:
        Of each block its targets' losses in nats, ``(length - first,)`` float64 on the CPU: computed in float32 at
        least.
    """
    _check_blocks(model, blocks, batch_size)
    begins = _first_targets(blocks, first)
    check_places(model, device)
    found = []
    with torch.no_grad(), evaluating(model), moved(model, device) as place:
        for start in range(0, len(blocks), batch_size):
            ids = blocks[start : start + batch_size].to(place)
            logits = causal_logits(model, ids)
            # Block by block: the float32 copy of one block's logits is small beside that of a whole batch.
            for index in range(len(ids)):
                found.append(_block_losses(logits[index], ids[index], start + index, begins[start + index]))
    return found


@dataclass(frozen=True)
class Divergence:
    """How far the predictions of a compressed model are from those of the dense one.

    Attributes:
        kl: Mean over tokens of KL(dense || compressed) in nats, at least 0, and 0 where all predictions are the same.
        agreement: Share of the tokens for which both models rank the same token first, in [0, 1]; of equal logits the
            first counts.
        tokens: Predictions that both are means over, those of the targets of a perplexity.
    """

    kl: float
    agreement: float
    tokens: int


def divergence(
    dense: nn.Module,
    compressed: nn.Module,
    blocks: Tensor,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    first: Tensor | None = None,
) -> Divergence:
    """Divergence of a compressed model's next-token predictions from the dense model's, and how often both agree.

    Of every prediction that :func:`perplexity` scores for the same arguments: KL(p || q), the sum over the vocabulary
    of p (ln p - ln q), with p of the dense and q of the compressed model. The target itself does not enter. Both models
    have to be in memory, on the device too; their logits are there a batch at a time.

    Args:
        dense: Called as :func:`perplexity` calls a model.
        compressed: Another model of the same vocabulary.
        blocks: Token ids, LongTensor ``(n, length)``, as for :func:`perplexity`.
        batch_size: Blocks per forward pass.
        device: Where to evaluate; the models move there and back. None stays where each of them is.
        first: Place of the first target in each block, LongTensor ``(n,)``; None is 1.

    Returns:
        Mean and share over all these predictions; logarithms in float32 or wider, sums in float64.

    Raises:
        DataError: If ``blocks``, ``first`` or ``batch_size`` has the wrong shape, type or range.
        ModelError: If a model gives no logits, the two have vocabularies of different sizes, or weights are on the meta
            device or on several.
        NonFiniteError: If a logit is NaN or positive infinity, or the compressed model gives probability 0 to what the
            dense model does not rule out; the message names model and block.
    """
    for model in (dense, compressed):
        _check_blocks(model, blocks, batch_size)
        check_places(model, device)
    begins = _first_targets(blocks, first)
    total, agreed = 0.0, 0
    with (
        torch.no_grad(),
        evaluating(dense),
        evaluating(compressed),
        moved(dense, device) as place,
        moved(compressed, device) as other,
    ):
        for start in range(0, len(blocks), batch_size):
            ids = blocks[start : start + batch_size]
            one, two = causal_logits(dense, ids.to(place)), causal_logits(compressed, ids.to(other))
            if one.shape != two.shape:
                raise ModelError(
                    f"the dense model predicts {one.shape[-1]} tokens and the compressed one {two.shape[-1]}; give two "
                    "models of the same vocabulary"
                )
            for index in range(len(ids)):
                scored = slice(begins[start + index] - 1, -1)
                found = _block_divergence(one[index, scored], two[index, scored].to(one.device), start + index)
                total, agreed = total + found[0], agreed + found[1]
    tokens = blocks.numel() - sum(begins)
    return Divergence(max(0.0, total / tokens), agreed / tokens, tokens)


def _block_divergence(dense: Tensor, compressed: Tensor, block: int) -> tuple[float, int]:
    """Sum of KL(dense || compressed) in nats over the rows of two blocks of logits ``(rows, vocabulary)``, and the
    number of rows whose largest logit is at the same place."""
    p, q = _log_probabilities(dense, "dense", block), _log_probabilities(compressed, "compressed", block)
    # What the dense model rules out adds nothing, whatever the other says; 0 * inf would be NaN.
    terms = torch.where(p == -math.inf, 0.0, p.exp() * (p - q))
    loss = float(terms.sum(-1).cpu().double().sum())
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"block {block}: the divergence is infinite, for the compressed model gives probability 0 to a token that "
            "the dense model does not rule out; check its logits for negative infinities"
        )
    return loss, int((dense.argmax(-1) == compressed.argmax(-1)).sum())


def _log_probabilities(logits: Tensor, model: str, block: int) -> Tensor:
    """Log-probabilities of one block, float32 or wider."""
    values = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if bool(values.isnan().any()):
        raise NonFiniteError(
            f"block {block}: the logits of the {model} model hold a NaN or infinity; check the weights, or evaluate in "
            "float32 or bfloat16"
        )
    return values


def _first_targets(blocks: Tensor, first: Tensor | None) -> list[int]:
    """Place of each block's first target."""
    count, length = blocks.shape
    if first is None:
        return [1] * count
    if first.shape != (count,) or first.dtype != torch.long or int(first.min()) < 1 or int(first.max()) >= length:
        raise DataError(
            f"first has shape {tuple(first.shape)} and dtype {first.dtype}; give one place of 1 to {length - 1} for "
            f"each of the {count} blocks, as torch.long"
        )
    return [int(place) for place in first]


def _block_losses(logits: Tensor, ids: Tensor, block: int, first: int) -> Tensor:
    """One block's losses in nats from place ``first`` on; logits ``(length, vocabulary)``, ids ``(length,)``.

    torchmetrics' Perplexity takes the logarithm of softmax probabilities, which underflow to 0 and make the loss
    infinite where the logits are far apart; cross_entropy stays in logarithms.
    """
    wide = logits[first - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(wide, ids[first:], reduction="none")
    losses = losses.cpu().double()  # summed on the CPU: not every device has float64
    if math.isnan(float(losses.sum())):
        raise NonFiniteError(
            f"block {block}: the logits hold a NaN or infinity; check the weights, or evaluate in float32 or bfloat16"
        )
    return losses


def causal_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits ``(batch, length, vocabulary)`` of token ids ``(batch, length)``.

    Raises:
        ModelError: If the model gives none of that shape.
    """
    logits = logits_of(model, {"input_ids": ids})
    if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        shape = "missing" if logits is None else tuple(logits.shape)
        raise ModelError(
            f"{type(model).__name__}: logits are {shape}, needed are {tuple(ids.shape)} + vocabulary; "
            "give a causal language model"
        )
    return logits


def _check_blocks(model: nn.Module, blocks: Tensor, batch_size: int) -> None:
    if batch_size < 1:
        raise DataError(f"batch_size={batch_size} is too small; give at least 1")
    if not isinstance(blocks, Tensor):
        raise DataError(
            f"blocks is a {type(blocks).__name__}; give one tensor of token ids (n, length), of batches such as "
            "torch.cat([batch['input_ids'] for batch in batches])"
        )
    if blocks.ndim != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2:
        raise DataError(f"blocks has shape {tuple(blocks.shape)}; give (n, length) with n >= 1 and length >= 2")
    if blocks.dtype != torch.long:
        raise DataError(f"blocks has dtype {blocks.dtype}; give token ids as torch.long")
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and blocks.shape[1] > longest:
        raise DataError(
            f"blocks have {blocks.shape[1]} tokens, the model's max_position_embeddings is {longest}; "
            "give shorter blocks"
        )
    vocabulary = getattr(config, "vocab_size", None)
    low, high = int(blocks.min()), int(blocks.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise DataError(
            f"blocks hold token ids {low} to {high}, the model's vocab_size is {vocabulary}; "
            "use the model's own tokenizer"
        )


def check_places(model: nn.Module, device: torch.device | str | None) -> None:
    """Check that the model has weights to compute with, all in one place where it is to be moved.

    Raises:
        ModelError: If they are on the meta device, or on several.
    """
    places = list(dict.fromkeys(tensor.device for tensor in (*model.parameters(), *model.buffers())))
    if any(place.type == "meta" for place in places):
        raise ModelError(f"{type(model).__name__} has weights on the meta device; load them before evaluating")
    if device is not None and len(places) > 1:
        spread = ", ".join(map(str, places))
        raise ModelError(f"device='{device}': {type(model).__name__} is spread over {spread}; leave device unset")


def peak_memory_bytes(device: torch.device | str) -> int:
    """Largest memory in use so far, in bytes.

    On a CUDA device: what PyTorch's allocator held in tensors on that device, from the start of the process or the
    last ``torch.cuda.reset_peak_memory_stats``; the CUDA context and other processes are not in it. On any other: the
    peak resident set of this process since its start, which is everything, the interpreter and its libraries too, but
    not its child processes.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
