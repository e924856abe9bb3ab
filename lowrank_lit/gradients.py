"""The loss that a gradient metric differentiates, and a backward through a model whose weights need no gradient.

A hook on a layer's output receives ``g = dL/dy``, all that a gradient metric needs beside the inputs. So every
parameter is frozen for the pass: no weight gradient is ever formed, and since a frozen linear layer keeps no input for
its backward, the pass needs little more memory than the activations between the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_lit.errors import DataError, GradientError, NonFiniteError
from lowrank_lit.experts import routed_mask
from lowrank_lit.statistics import GradientSums, energy_of, full_float32, real_tokens, widen
from lowrank_lit.streaming import POSITIONAL, Batch, logits_of, real_positions

Loss = Callable[[nn.Module, Batch], Tensor]
"""The forward of a model on a batch, and its loss in nats SUMMED over targets (tokens, rows): a number with a gradient.
A constant factor scales the curves of all matrices alike, and changes no rank."""


def name_of(loss: Loss) -> str:
    """What a loss is called, for notes."""
    return str(getattr(loss, "__name__", type(loss).__name__))


WeightOf = Callable[[nn.Module], Tensor]

_REMEDY = "use metric='input' (preset='unirank')"
_IGNORED = -100
# Nats per token by which a layer's outputs, changed by their own size, change the loss: below it is rounding of logits.
_NEGLIGIBLE = 1e-6
_STRIDE = 1_000_003  # between the seeds of batches; the CPU's generator takes the lower 32 bits of a seed


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every next token, summed over the batch, in nats; a :data:`Loss`.

    Labels are the batch's own ``input_ids``, shifted by one, once; a pair of positions counts if ``attention_mask``
    keeps both. Computed in float32, or float64 for float64 logits.

    Args:
        model: Returns logits ``(batch, length, vocabulary)``, as a tensor, first in a tuple, or as ``.logits``.
        batch: ``input_ids`` (or a positional tensor of them) ``(batch, length)``, optionally ``attention_mask``.

    Raises:
        GradientError: If the batch holds no token ids, or the model gives no logits for them.
    """
    ids = _token_ids(batch)
    logits = _logits(model, batch, ids)
    labels = torch.full_like(ids, _IGNORED, dtype=torch.long)
    labels[:, :-1] = ids[:, 1:]  # the labels are shifted: a slice of the logits would be a copy of them
    labels[:, :-1].masked_fill_(~predicted_positions(batch), _IGNORED)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), labels.to(wide.device).flatten(), ignore_index=_IGNORED, reduction="sum")


class SampledTokenLoss:
    """Cross-entropy with labels drawn from the model's own predictions, summed over the batch, in nats; a :data:`Loss`.

    The second moment of its gradients is the Fisher information, the curvature of the KL divergence from the model's
    own predictions; with the text's tokens for labels (:func:`next_token_loss`) it is the empirical Fisher, which also
    measures how wrong the model is on the text. Positions count as there. The draws depend on the seed and the number
    of the batch alone: a batch that another process reads is to be left to :meth:`skip`, so that each gets the labels
    that it would get in one process.

    Args:
        seed: Of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._number = 0

    def skip(self, count: int) -> None:
        """Leave out the next batches; costs nothing, for every batch has draws of its own."""
        self._number += count

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss; arguments and errors as in :func:`next_token_loss`."""
        ids = _token_ids(batch)
        logits = _logits(model, batch, ids)[:, :-1]
        wide = (logits if logits.dtype == torch.float64 else logits.float()).flatten(0, 1)
        generator = torch.Generator(wide.device).manual_seed(self._seed + _STRIDE * self._number)
        self._number += 1
        probabilities = wide.detach().softmax(-1)
        if not bool(torch.isfinite(probabilities).all()):
            raise NonFiniteError("the logits on the calibration text hold a NaN or infinity; check the weights")
        labels = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
        labels.masked_fill_(~predicted_positions(batch).flatten().to(labels.device), _IGNORED)
        return F.cross_entropy(wide, labels, ignore_index=_IGNORED, reduction="sum")


def predicted_positions(batch: Batch) -> Tensor:
    """Positions of which the next-token losses count the prediction, bool ``(batch, length - 1)``: they and the next
    one are real.

    Raises:
        GradientError: If the batch holds no token ids.
    """
    real = real_positions(batch)
    if real is None:
        return torch.ones_like(_token_ids(batch)[:, 1:], dtype=torch.bool)
    return real[:, 1:] & real[:, :-1]


def require_next_token_model(model: nn.Module, batch: Batch) -> None:
    """Check that a model predicts next tokens: what it says at a position must not depend on the tokens after it.

    Two forwards of the first sequence of two tokens or more, without gradients. A masked language model, which sees
    every token that it is asked for, would otherwise give small gradients that mean nothing.

    Raises:
        GradientError: If the model has no logits for each token, or looks ahead.
    """
    real = real_positions(batch)
    lengths = torch.full((len(_token_ids(batch)),), _token_ids(batch).shape[1]) if real is None else real.sum(1)
    if int(lengths.max()) < 2:
        return
    row = int((lengths > 1).nonzero()[0])
    first = {key: value[row : row + 1] for key, value in batch.items()}
    ids = _token_ids(first)
    last = ids.shape[1] - 1 if real is None else int(real[row].nonzero().max())
    other = ids.clone()
    other[0, last] = (ids[0, last] + 1) % (int(ids.max()) + 1)
    key = "input_ids" if "input_ids" in first else POSITIONAL
    with torch.no_grad():
        difference = _logits(model, first, ids).double() - _logits(model, {**first, key: other}, ids).double()
    before, after = (part.abs().max() for part in (difference[:, :last], difference[:, last:]))
    if before > 1e-3 * after:  # kernels may round differently, by far less
        raise GradientError(
            f"{type(model).__name__} predicts no next tokens: its output for a token depends on the tokens after it; "
            f"{_REMEDY}"
        )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of ``model`` requires a gradient for the time of the context; gradients are recorded in it."""
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for parameter, _ in states:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter, state in states:
            parameter.requires_grad_(state)


def start_graph(output: Tensor) -> None:
    """Make ``output``, which depends on nothing that requires a gradient, require one itself.

    Not by ``requires_grad_``: a leaf would refuse the in-place operations of some models, and would keep its gradient
    in ``.grad``.
    """
    _Start.apply(output, torch.zeros((), device=output.device, requires_grad=True))  # type: ignore[no-untyped-call]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        return None, None


class GradientCollector:
    """Hooks that sum over the gradients at the outputs of layers, in the backward after each forward.

    Args:
        moments: What to collect; names as in :func:`lowrank_lit.calibration.calibrate`.
        weight_of: Gives a layer's ``W`` ``(rows, columns)``; only called for the moment ``gradient``.

    Attributes:
        sums: By layer name, in the order of the layers' first calls.
    """

    def __init__(self, moments: frozenset[str], weight_of: WeightOf) -> None:
        self.sums: dict[str, GradientSums] = {}
        self._moments = moments
        self._weight_of = weight_of
        self._mask: Tensor | None = None
        self._shape = torch.Size()
        # Gradient checkpointing runs forwards in the backward, whose tokens have been counted.
        self._in_forward = False
        self._called: set[str] = set()
        self._sensitivities: list[float] = []
        self._pulled_by_autograd: set[str] = set()

    @contextmanager
    def on(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Hooks on ``layers`` for the time of the context."""
        with ExitStack() as hooks:
            for name, layer in layers.items():
                if "gradient" in self._moments:
                    hooks.callback(layer.register_forward_pre_hook(self._before(name)).remove)
                hooks.callback(layer.register_forward_hook(self._after(name)).remove)
            yield

    @contextmanager
    def batch(self, batch: Batch, mask: Tensor | None) -> Iterator[None]:
        """The context of one forward; its backward comes after it.

        Args:
            batch: What the forward is of.
            mask: ``(batch, length)``, true at real tokens; ``None`` where all are.
        """
        self._mask = mask
        self._shape = next(iter(batch.values())).shape[:2]
        self._called.clear()
        self._in_forward = True
        try:
            yield
        finally:
            self._in_forward = False

    def check_loss(self, value: Tensor) -> None:
        """Check a loss before its backward.

        Raises:
            GradientError: If it is no single number with a gradient.
            NonFiniteError: If it is not finite; names the first layer with outputs that are not.
        """
        if value.numel() != 1 or not value.requires_grad:
            raise GradientError(
                f"the loss has shape {tuple(value.shape)}{'' if value.requires_grad else ' and no gradient'}; give the "
                "sum over target tokens, computed with gradients enabled from the outputs of the target layers"
            )
        if not bool(torch.isfinite(value)):
            bad = (f"'{name}'" for name, sums in self.sums.items() if not bool(sums.output_energy.isfinite()))
            raise NonFiniteError(
                f"the loss on a calibration batch is {value.item()}; the first target layer with outputs that are not "
                f"finite: {next(bad, 'none')}; check the checkpoint, or use a wider dtype (bfloat16, float32)"
            )

    def take(self, name: str) -> GradientSums | None:
        """The sums of a layer, which are forgotten here; ``None`` where no backward has reached it."""
        found = self.sums.pop(name, None)
        if found is not None:
            self._sensitivities.append(found.sensitivity())
        return found

    def check_gradients(self) -> None:
        """Check that the gradients of some layer that was taken are more than rounding.

        Raises:
            GradientError: If all vanish.
        """
        if all(value <= _NEGLIGIBLE for value in self._sensitivities):
            raise GradientError(
                "the gradients of the loss on the calibration text vanish at every target layer; "
                "use metric='input', or text that the model does not know by heart"
            )

    def _before(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            x: Tensor = args[0]
            sums = self.sums.get(name)
            if not x.requires_grad or (sums is not None and sums.pulled is None):
                return None
            weight = self._weight_of(layer)
            if weight.shape[0] <= weight.shape[1] or not _computes_with(layer, weight):
                return None
            # What comes back through a view of the layer's own is W^T g; the gradient of the input itself is a sum over
            # all layers that it is fed to. Made in plain sight: whoever follows the data flow must not lose it here.
            view = x.view_as(x)
            with torch._C.DisableTorchFunction():
                view.register_hook(self._on_pulled(name))  # type: ignore[no-untyped-call]
            self._pulled_by_autograd.add(name)
            return (view, *args[1:])

        return hook

    def _after(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            with torch._C.DisableTorchFunction():
                if self._in_forward:
                    with torch.no_grad():
                        self._count(name, args[0], y)
                if torch.is_grad_enabled():
                    if not y.requires_grad:
                        start_graph(y)
                    _result(y).register_hook(self._on_gradient(name, layer, args[0]))  # type: ignore[no-untyped-call]
            self._pulled_by_autograd.discard(name)

        return hook

    def _count(self, name: str, x: Tensor, y: Tensor) -> None:
        if name not in self.sums:
            self.sums[name] = GradientSums(self._moments, y.shape[-1], x.shape[-1], y.device)
        if "fisher" in self._moments and name in self._called:
            raise DataError(
                f"layer '{name}' is used twice in one forward, and the moment 'fisher' would miss the products of the "
                "two gradients; leave it out of targets, or use metric='two_sided'"
            )
        self._called.add(name)
        sums, tokens = self.sums[name], y.shape[:-1].numel()
        sums.outputs += tokens
        sums.output_energy += energy_of(y)
        mask = routed_mask(self._mask)
        fits = mask is not None and mask.numel() == tokens
        sums.tokens += int(mask.sum()) if mask is not None and fits else tokens

    def _on_pulled(self, name: str) -> Callable[[Tensor], None]:
        mask = routed_mask(self._mask)

        def hook(gradient: Tensor) -> None:
            with torch.no_grad(), full_float32():
                self.sums[name].add_pulled(real_tokens(gradient, mask))

        return hook

    def _on_gradient(self, name: str, layer: nn.Module, x: Tensor) -> Callable[[Tensor], None]:
        sums, mask, shape = self.sums[name], routed_mask(self._mask), self._shape
        waiting = [x.detach()] if sums.needs_inputs else []
        version, tokens_shape = waiting[0]._version if waiting else 0, x.shape[:-1]
        pull = sums.pulled is not None and name not in self._pulled_by_autograd

        def hook(gradient: Tensor) -> None:
            with torch.no_grad(), full_float32():
                gradient = gradient.reshape(*tokens_shape, -1)
                g = real_tokens(gradient, mask)
                sums.add(g)
                if pull:
                    wide = widen(g)
                    sums.add_pulled(wide @ self._weight_of(layer).detach().to(wide))
                if waiting:
                    inputs = waiting.pop()  # the graph, which holds this hook, outlives the layer's backward
                    if inputs._version != version:
                        raise DataError(
                            f"the input of layer '{name}' is overwritten after the layer has used it, so that its "
                            "weight's gradient is lost; leave it out of targets, or use metric='two_sided'"
                        )
                    sums.add_weight_gradient(g, real_tokens(inputs, mask))
                    if sums.fisher_rows is not None:
                        sums.add_fisher(*(_by_sequence(part, mask, shape, name) for part in (gradient, inputs)))

        return hook


def _result(y: Tensor) -> Tensor:
    """The tensor to hook for the gradient at ``y``: what ``y`` is a view of, where that is all of it.

    A linear layer computes on flat tokens and returns a view of the result. Once the model writes to that view, the
    hooks on it are forgotten, and those on the result are not.
    """
    whole = y._base
    same = whole is not None and whole.numel() == y.numel() and whole.is_contiguous() and y.is_contiguous()
    return whole if whole is not None and same else y


def _by_sequence(values: Tensor, mask: Tensor | None, shape: torch.Size, name: str) -> Tensor:
    """``(sequences, ..., d)`` or ``(sequences * length, d)`` as ``(sequences, tokens, d)``, zeros at padding."""
    sequences = shape[0]
    flat = values.ndim == 2 and len(values) == shape.numel()
    if not flat and len(values) != sequences != 1:
        raise DataError(
            f"layer '{name}' mixes the tokens of the {sequences} sequences of a batch, so that the moment 'fisher' "
            "cannot tell them apart; calibrate with one sequence per batch"
        )
    grid = values.reshape(sequences, -1, values.shape[-1])
    if mask is not None and mask.numel() == grid.shape[:2].numel():
        grid = grid.masked_fill(~mask.reshape(sequences, -1, 1), 0)
    return grid


def _computes_with(layer: nn.Module, weight: Tensor) -> bool:
    """Whether ``weight`` is the one that the layer multiplies with, and multiplying (and adding) is all it does."""
    if type(layer) is not nn.Linear and type(layer).__name__ != "Conv1D":
        return False
    own = layer.weight
    return isinstance(own, Tensor) and (weight.data_ptr(), weight.dtype) == (own.data_ptr(), own.dtype)


def _token_ids(batch: Batch) -> Tensor:
    ids = batch.get("input_ids", batch.get(POSITIONAL))
    if ids is None or ids.is_floating_point() or ids.ndim != 2:
        raise GradientError(f"the calibration batches hold no input_ids (batch, length) to predict; {_REMEDY}")
    return ids


def _logits(model: nn.Module, batch: Batch, ids: Tensor) -> Tensor:
    logits = logits_of(model, batch)
    if logits is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise GradientError(
            f"{type(model).__name__} gives no logits (batch, length, vocabulary) for the next token; {_REMEDY}"
        )
    return logits
