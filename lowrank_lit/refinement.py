"""Block-wise refinement: the factors of one block at a time are trained to give the dense block's output.

The dense and the compressed model run side by side over the calibration text, one block at a time. The compressed block
is fed what the compressed model really gives it, ``z``, and is trained by gradient steps towards what the dense block
gave for its own input ``x``: ``min |block'(z) - block(x)|^2``, so that it also undoes what the blocks before it did
wrong. No label is needed, no gradient leaves the block, and memory is that of one block and of the hidden states.

Only the factors train and their ranks stay. Of every block the state with the least error on sequences that it was not
trained on is kept, which may be the one that it came with.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from lowrank_lit.batches import as_batches, count_tokens
from lowrank_lit.errors import LowRankError, ModelError, NonFiniteError
from lowrank_lit.layers import FactoredLayer
from lowrank_lit.residual import find_repeating_blocks
from lowrank_lit.statistics import full_float32
from lowrank_lit.streaming import Batch, Block, BlockCalls, capture_calls, evaluating, moved, real_positions

_RECORD, _FACTORS = "refinement.json", "factors.safetensors"  # the record is written last: it marks them complete

HELD_OUT = 0.1
"""Share of the batches that decide which state is kept, and are not trained on."""


@dataclass(frozen=True)
class BlockRefinement:
    """What :func:`refine_blocks` did.

    Attributes:
        errors: By block name, the squared distance of its output from the dense one's, relative to the latter's
            squared size, on the held-out batches: before and after.
        steps: Gradient steps in all.
        tokens: Tokens of the text, those held out included.
        seconds: Wall time.
    """

    errors: dict[str, tuple[float, float]]
    steps: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def factor_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The factors of all factored layers in ``model``, without biases; those of a shared layer once.

    Raises:
        ModelError: If they are quantised, which gradients cannot train.
    """
    layers = [module for module in model.modules() if isinstance(module, FactoredLayer)]
    factors = [cast(nn.Parameter, child.weight) for layer in layers for child in (layer.inner, layer.outer)]
    if any(not factor.is_floating_point() for factor in factors):
        raise ModelError("quantised factors cannot be refined; refine before they are quantised, or train adapters")
    return factors


def refine_blocks(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    *,
    epochs: int = 4,
    learning_rate: float = 1e-3,
    held_out: float = HELD_OUT,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> BlockRefinement:
    """Train the factors of every block in place, in order, to give the dense block's output.

    One step of AdamW per batch, without weight decay, a cosine from the learning rate to 0 in every block; arithmetic
    in float32 or wider, whatever the dtype of the weights. The result depends on the arguments alone.

    Args:
        model: The factored model.
        teacher: The dense model that it was made from.
        batches: Calibration batches as :func:`lowrank_lit.compress` takes them, at least two.
        epochs: Passes over the text for each block.
        learning_rate: Peak, of AdamW.
        held_out: Share of the batches, from the end, that decide which state of a block is kept; at least one.
        seed: Of the order of the batches.
        device: Where to compute; ``None`` is where the models are. One block of each is moved there at a time.

    Raises:
        ModelError: If the blocks of the two models are not the same chain, or the model has no factors that can train.
        LowRankError: If a setting is out of range, or there are fewer than two batches.
        NonFiniteError: If a block's loss is NaN or infinite; names block and step. The block is then as it was.
    """
    started = time.perf_counter()
    texts = as_batches(batches)
    _check_settings(epochs, learning_rate, held_out, len(texts))
    if not factor_parameters(model):
        raise ModelError(f"{type(model).__name__} has no factored layer to refine; compress it first")
    order = torch.Generator().manual_seed(seed)
    errors: dict[str, tuple[float, float]] = {}
    steps = 0
    with full_float32(), evaluating(model), evaluating(teacher):
        streams = _Streams(model, teacher, texts, held_out)
        for index in tqdm(range(len(streams.blocks)), desc="refining", unit="block", disable=None, leave=False):
            streams.see_dense(index, device)
            name, block = streams.blocks[index]
            with _widened(block, device) as place:
                run = _BlockRun(streams, index, block, place)
                before = run.error()
                after = before
                if factors := factor_parameters(block):
                    with _only(factors, block):
                        after, own = _train(run, name, factors, before, epochs, learning_rate, order)
                    steps += own
                run.advance()
            errors[name] = (before, after)
    return BlockRefinement(errors, steps, sum(map(count_tokens, texts)), time.perf_counter() - started)


def save_refinement(folder: Path, model: nn.Module, identity: str, result: BlockRefinement) -> None:
    """Write refined factors; a disk that is full or read-only costs a warning, not the result in memory.

    Args:
        folder: Created where it is missing; what an earlier refinement left in it is replaced.
        model: The refined model.
        identity: Of what the result depends on.
        result: What made it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = folder / f"{_FACTORS}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RECORD).unlink(missing_ok=True)
        save_file({name: value.detach().cpu().contiguous() for name, value in _factors(model).items()}, partial)
        os.replace(partial, folder / _FACTORS)
        text = json.dumps({"identity": identity, **result.to_dict()}, indent=1)
        (folder / f"{_RECORD}.part").write_text(text, encoding="utf-8")
        os.replace(folder / f"{_RECORD}.part", folder / _RECORD)
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the refined factors could not be kept in '{folder}' ({error}); a second run refines again", stacklevel=2
        )


def load_refinement(folder: Path, model: nn.Module, identity: str) -> BlockRefinement | None:
    """Put refined factors of the same ``identity`` into ``model``.

    Returns:
        What made them, or ``None``, with the model untouched, where the folder holds no complete ones.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        entry = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        if entry.pop("identity") != identity:
            return None
        tensors = load_file(folder / _FACTORS)
        errors = {name: (float(before), float(after)) for name, (before, after) in entry.pop("errors").items()}
        result = BlockRefinement(errors=errors, **entry)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        warnings.warn(f"the refined factors in '{folder}' cannot be read ({error}); refining again", stacklevel=2)
        return None
    own = _factors(model)
    if {name: value.shape for name, value in tensors.items()} != {name: value.shape for name, value in own.items()}:
        warnings.warn(f"the refined factors in '{folder}' do not fit the model; refining again", stacklevel=2)
        return None
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return result


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    chosen = set(map(id, factor_parameters(model)))
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


def _check_settings(epochs: int, learning_rate: float, held_out: float, batches: int) -> None:
    if epochs < 1:
        raise LowRankError(f"epochs={epochs} of the block refinement is too small; give at least 1")
    if not 0 < learning_rate < math.inf:
        raise LowRankError(f"learning_rate={learning_rate} of the block refinement; give a positive number as 1e-3")
    if not 0 < held_out < 1:
        raise LowRankError(f"held_out={held_out} of the block refinement must lie between 0 and 1; give {HELD_OUT}")
    if batches < 2:
        raise LowRankError(f"{batches} batches are too few to refine with: one is held out; give at least two")


class _Streams:
    """Hidden states of both models before one block, for every batch, and what the dense block made of its own."""

    def __init__(self, model: nn.Module, teacher: nn.Module, batches: Sequence[Batch], held_out: float) -> None:
        self.blocks, self.dense_blocks = find_repeating_blocks(model), find_repeating_blocks(teacher)
        own, dense = _captured(model, self.blocks, batches), _captured(teacher, self.dense_blocks, batches)
        if own is None or dense is None or [n for n, _ in self.blocks] != [n for n, _ in self.dense_blocks]:
            raise ModelError(
                f"the blocks of {type(model).__name__} and of its teacher {type(teacher).__name__} are not the same "
                "chain, so that they cannot be refined one by one; refine with the loss 'kd' alone (block_epochs=0)"
            )
        self.calls, self.dense_calls = own, dense
        self.hidden = [cast(Tensor, call.hidden) for call in own]
        self.targets: list[Tensor] = []
        self.masks = [real_positions(batch) for batch in batches]
        self.held = range(len(batches) - max(1, round(held_out * len(batches))), len(batches))
        self.size = 1.0  # mean square of the dense block's outputs

    @torch.no_grad()
    def see_dense(self, index: int, device: torch.device | str | None) -> None:
        """The dense model goes through block ``index``: what it returns are the targets."""
        with moved(self.dense_blocks[index][1], device) as place:
            for call in self.dense_calls:
                call.step(self.dense_blocks[index][1], index, place)
        self.targets = [cast(Tensor, call.hidden) for call in self.dense_calls]
        real = [_real(target, mask) for target, mask in zip(self.targets, self.masks, strict=True)]
        total = sum(float(target.double().square().sum()) for target in real)
        self.size = max(total / max(1, sum(target.numel() for target in real)), torch.finfo(torch.float32).tiny)


class _BlockRun:
    """One block of the compressed model on its device, in the dtype of the arithmetic."""

    def __init__(self, streams: _Streams, index: int, block: nn.Module, place: torch.device | None) -> None:
        self.streams = streams
        self.index = index
        self.block = block
        self.place = place
        self.dtype = next(parameter.dtype for parameter in block.parameters() if parameter.is_floating_point())
        for call in streams.calls:
            call.arguments[index] = _cast(call.arguments[index], self.dtype)

    @property
    def train(self) -> range:
        return range(self.streams.held.start)

    def output(self, number: int) -> Tensor:
        hidden = self.streams.hidden[number].to(self.dtype)
        return self.streams.calls[number].run(self.block, self.index, hidden, self.place)

    def loss(self, number: int) -> Tensor:
        """Mean squared distance of batch ``number`` from the dense outputs, relative to their mean square."""
        streams, output = self.streams, self.output(number)
        difference = _real(output - streams.targets[number].to(output), streams.masks[number])
        return difference.square().mean() / streams.size

    @torch.no_grad()
    def error(self) -> float:
        """The same over all held-out batches."""
        return float(torch.stack([self.loss(number).double() for number in self.streams.held]).mean())

    @torch.no_grad()
    def advance(self) -> None:
        """The compressed model goes on to the next block."""
        streams = self.streams
        streams.hidden = [self.output(number).to(hidden.dtype) for number, hidden in enumerate(streams.hidden)]
        for call in streams.calls:
            call.arguments[self.index] = ((), {})  # the masks of a finished block are of no more use


def _train(
    run: _BlockRun,
    name: str,
    factors: Sequence[nn.Parameter],
    error: float,
    epochs: int,
    learning_rate: float,
    order: torch.Generator,
) -> tuple[float, int]:
    """Train ``factors``; they end in the state with the least held-out error. Gives that error and the steps taken."""
    best, least = [factor.detach().clone() for factor in factors], error
    optimizer = torch.optim.AdamW(factors, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(run.train))
    steps = 0
    try:
        for _ in range(epochs):
            for number in torch.randperm(len(run.train), generator=order).tolist():
                loss = run.loss(number)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"the loss of block '{name}' is {loss.item()} at step {steps} of its refinement; lower "
                        f"the learning rate (now {learning_rate})"
                    )
                for factor, gradient in zip(factors, torch.autograd.grad(loss, factors), strict=True):
                    factor.grad = gradient
                optimizer.step()
                schedule.step()
                steps += 1
            if (error := run.error()) < least:
                best, least = [factor.detach().clone() for factor in factors], error
    finally:
        with torch.no_grad():
            for factor, value in zip(factors, best, strict=True):
                factor.copy_(value)
                factor.grad = None
    return least, steps


def _captured(model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> list[BlockCalls] | None:
    with torch.no_grad():
        return capture_calls(model, blocks, batches)


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden states ``(batch, length, d)`` as ``(tokens, d)`` without padding, with their gradients."""
    return values.flatten(0, -2) if mask is None else values[mask.to(values.device)]


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


@contextmanager
def _widened(block: nn.Module, device: torch.device | str | None) -> Iterator[torch.device | None]:
    """``block`` on the device with its floating-point tensors in float32 or wider; then as it was, with new values."""
    tensors = [tensor for tensor in (*block.parameters(), *block.buffers()) if tensor.is_floating_point()]
    own = [tensor.dtype for tensor in tensors]
    with moved(block, device) as place:
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
            yield place
        finally:
            for tensor, dtype in zip(tensors, own, strict=True):
                tensor.data = tensor.data.to(dtype)


@contextmanager
def _only(factors: Sequence[nn.Parameter], block: nn.Module) -> Iterator[None]:
    """Gradients are recorded for ``factors`` and for no other parameter of ``block``."""
    states = [(parameter, parameter.requires_grad, parameter.grad) for parameter in block.parameters()]
    chosen = set(map(id, factors))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter, _, _ in states:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
    finally:
        for parameter, state, gradient in states:
            parameter.requires_grad_(state)
            parameter.grad = gradient
