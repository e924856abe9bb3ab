"""What calibration keeps of activations and gradients: float64 sums, and the number of tokens behind them.

Sums, not means: they can be added over batches and over processes in any order and divided once at the end. Products
are taken in float32, never in TF32, or in float64 for float64 tensors: half precision would lose the small eigenvalues
next to the massive activations of some layers, and would square small gradients to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_lit.errors import LowRankError
from lowrank_lit.linalg import add_gram, mirrored, require_finite

FORWARD_MOMENTS = frozenset({"input", "input_full", "magnitude"})
BACKWARD_MOMENTS = frozenset({"gradient", "fisher", "weight_gradient"})


def check_moments(moments: frozenset[str]) -> None:
    """Check the names of moments.

    Raises:
        LowRankError: Naming one that there is none of.
    """
    known = FORWARD_MOMENTS | BACKWARD_MOMENTS
    for name in sorted(moments - known):
        raise LowRankError(f"moment '{name}' is unknown; choose among {', '.join(sorted(known))}")


@contextmanager
def full_float32() -> Iterator[None]:
    """Float32 products without the TF32 or bfloat16 shortcuts, or the autocast, that a user may have allowed for
    training."""
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        torch.set_float32_matmul_precision(chosen)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def accumulator(*shape: int, device: torch.device | str) -> Tensor:
    """Zeros to sum in: float64 where the device has it."""
    kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros(shape, dtype=kind, device=device)


def energy_of(tokens: Tensor) -> Tensor:
    """Sum of the squared lengths of vectors ``(tokens, d)``, as a float64 number on their device."""
    # Squared after the root: the square of an activation of 1e20 is no float32.
    lengths: Tensor = torch.linalg.vector_norm(widen(tokens), dim=-1)
    return lengths.to(accumulator(device=tokens.device).dtype).square().sum()


def real_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Activations or gradients ``(..., d)`` as ``(tokens, d)``, without those that a ``(batch, length)`` mask leaves
    out where it fits them."""
    flat = values.detach().reshape(-1, values.shape[-1])
    if mask is not None and mask.numel() == len(flat):
        flat = flat[mask.reshape(-1)]
    return flat


Total = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes, in float64."""


class MomentSum:
    """Sum of outer products ``x x^T`` over tokens.

    Attributes:
        tokens: Number of tokens summed over.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self._lower = accumulator(size, size, device=device)  # what is above the diagonal has no meaning
        self.tokens = 0

    @property
    def size(self) -> int:
        """``d``."""
        return len(self._lower)

    @property
    def device(self) -> torch.device:
        """Where the sum is."""
        return self._lower.device

    @property
    def sum(self) -> Tensor:
        """The sum, float64 ``(d, d)``, exactly symmetric."""
        return mirrored(self._lower)

    def add(self, rows: Tensor) -> None:
        """Add the tokens in ``rows``, shape ``(tokens, d)``."""
        add_gram(self._lower, widen(rows))
        self.tokens += len(rows)

    def merge(self, other: MomentSum) -> None:
        """Add another sum over other tokens."""
        self._lower += other._lower.to(self._lower.device)
        self.tokens += other.tokens

    def reduce(self, total: Total) -> None:
        """Replace the sum and the tokens by those over all processes."""
        self._lower = total(self._lower)
        self.tokens = int(total(torch.tensor(float(self.tokens), dtype=torch.float64)))

    def mean(self) -> Tensor:
        """The second moment ``E[x x^T]``, ``(d, d)``."""
        return self.sum / max(1, self.tokens)


def fisher_sums(inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column sums of the squared gradient of a weight, each sequence's own, summed over sequences.

    With the inputs ``X`` ``(tokens, columns)`` and the output gradients ``D`` ``(tokens, rows)`` of one sequence, the
    gradient of the weight is ``G = D^T X``, of which only ``sum_j G_aj^2 = sum_t D_ta ((X X^T) D)_ta`` and
    ``sum_a G_aj^2 = sum_t X_tj ((D D^T) X)_tj`` are wanted. Those cost ``4 tokens^2 (rows + columns)``, all sequences
    in one call, and never form ``G``; where ``2 tokens rows columns`` is less, ``G`` is formed for one sequence at a
    time.

    Args:
        inputs: ``(sequences, tokens, columns)``; zeros at padding.
        gradients: ``(sequences, tokens, rows)``, of the summed loss; zeros at padding.

    Returns:
        ``(rows,)`` and ``(columns,)``, in float32 or wider.
    """
    x, d = widen(inputs), widen(gradients)
    tokens, columns, rows = x.shape[1], x.shape[2], d.shape[2]
    if 2 * tokens * (rows + columns) < rows * columns:
        of_rows = (d * ((x @ x.mT) @ d)).sum((0, 1))
        of_columns = (x * ((d @ d.mT) @ x)).sum((0, 1))
        return of_rows.clamp_min(0), of_columns.clamp_min(0)  # no sums of squares: rounding may go below zero
    of_rows, of_columns = x.new_zeros(rows), x.new_zeros(columns)
    for one_x, one_d in zip(x, d, strict=True):
        squared = (one_d.mT @ one_x).square_()
        of_rows += squared.sum(1)
        of_columns += squared.sum(0)
    return of_rows, of_columns


class InputSums:
    """Sums over the inputs of a layer, or of several that are fed the same tensor.

    Args:
        moments: What to collect; names as in :func:`lowrank_lit.calibration.calibrate`.
        rows: Of the weight; only asked for by the moment ``input``.
        columns: Of the weight.
        device: Of the sums.
    """

    def __init__(
        self, moments: frozenset[str], rows: Callable[[], int], columns: int, device: torch.device | str
    ) -> None:
        whole = "input_full" in moments or ("input" in moments and columns <= rows())
        self.tokens = 0
        self.columns = columns
        self.moment = MomentSum(columns, device) if whole else None
        self.outputs = MomentSum(rows(), device) if "input" in moments and not whole else None
        self.magnitude = accumulator(columns, device=device) if "magnitude" in moments else None
        self.energy = accumulator(device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs ``(tokens, columns)``."""
        self.tokens += len(x)
        x = widen(x)
        if self.moment is not None:
            self.moment.add(x)
        if self.outputs is not None:
            self.energy += energy_of(x)
        if self.magnitude is not None:
            self.magnitude += x.abs().sum(0)

    def add_outputs(self, y: Tensor) -> None:
        """Add the outputs ``W x`` ``(tokens, rows)`` of inputs that were added, in float32 or wider."""
        if self.outputs is not None:
            self.outputs.add(y)

    def reduce(self, total: Total) -> None:
        """Replace the sums by those over all processes."""
        self.tokens = int(total(torch.tensor(float(self.tokens), dtype=torch.float64)))
        for part in (self.moment, self.outputs):
            if part is not None:
                part.reduce(total)
        if self.magnitude is not None:
            self.magnitude = total(self.magnitude)
        self.energy = total(self.energy)

    def means(self) -> dict[str, Any]:
        """Fields of :class:`LayerStatistics`; the sums are on the device for one block at a time, the means are not."""
        moment = None if self.moment is None else _finished(self.moment.mean())
        return {
            "input_energy": float(self.energy) / max(1, self.tokens) if moment is None else float(moment.trace()),
            "input_moment": moment,
            "output_moment": None if self.outputs is None else _finished(self.outputs.mean()),
            "input_magnitude": None if self.magnitude is None else _finished(self.magnitude / max(1, self.tokens)),
        }


class GradientSums:
    """Sums over the gradients ``g`` at the outputs of a layer.

    Args:
        moments: What to collect; names as in :func:`lowrank_lit.calibration.calibrate`.
        rows: Of the weight.
        columns: Of the weight.
        device: Of the sums.

    Attributes:
        tokens: Tokens of the forwards, padding left out.
        outputs: Tokens of the forwards, padding included.
        moment: Of ``g``, where the layer has no more rows than columns.
        pulled: Of ``W^T g``, where it has fewer columns.
        energy: Sum of ``|g|^2``.
        output_energy: Sum of ``|y|^2`` over ``outputs``: the scale to judge the gradients by.
    """

    def __init__(self, moments: frozenset[str], rows: int, columns: int, device: torch.device | str) -> None:
        wanted = "gradient" in moments
        self.shape = (rows, columns)
        self.tokens = 0
        self.outputs = 0
        self.sequences = 0
        self.energy = accumulator(device=device)
        self.output_energy = accumulator(device=device)
        self.moment = MomentSum(rows, device) if wanted and rows <= columns else None
        self.pulled = MomentSum(columns, device) if wanted and columns < rows else None
        fisher = "fisher" in moments
        self.fisher_rows = accumulator(rows, device=device) if fisher else None
        self.fisher_columns = accumulator(columns, device=device) if fisher else None
        self.weight_gradient = accumulator(rows, columns, device=device) if "weight_gradient" in moments else None

    @property
    def needs_inputs(self) -> bool:
        """Whether the layer's inputs have to wait for its gradients."""
        return self.fisher_rows is not None or self.weight_gradient is not None

    def add(self, g: Tensor) -> None:
        """Add gradients ``(tokens, rows)``."""
        self.energy += energy_of(g)
        if self.moment is not None:
            self.moment.add(g)

    def add_pulled(self, pulled: Tensor) -> None:
        """Add ``W^T g``, ``(tokens, columns)``."""
        if self.pulled is not None:
            self.pulled.add(pulled)

    def add_weight_gradient(self, g: Tensor, x: Tensor) -> None:
        """Add the products of gradients ``(tokens, rows)`` and inputs ``(tokens, columns)``."""
        if self.weight_gradient is not None:
            self.weight_gradient += widen(g).mT @ widen(x)

    def add_fisher(self, gradients: Tensor, inputs: Tensor) -> None:
        """Add sequences; shapes as in :func:`fisher_sums`."""
        if self.fisher_rows is not None and self.fisher_columns is not None:
            rows, columns = fisher_sums(inputs, gradients)
            self.fisher_rows += rows
            self.fisher_columns += columns
            self.sequences += len(gradients)

    def reduce(self, total: Total) -> None:
        """Replace the sums by those over all processes."""
        counts = total(torch.tensor([self.tokens, self.outputs, self.sequences], dtype=torch.float64))
        self.tokens, self.outputs, self.sequences = (int(count) for count in counts)
        for part in (self.moment, self.pulled):
            if part is not None:
                part.reduce(total)
        for name in ("energy", "output_energy", "fisher_rows", "fisher_columns", "weight_gradient"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, total(value))

    def means(self) -> dict[str, Any]:
        """Fields of :class:`LayerStatistics`. Tokens that no gradient came back for count as gradients of zero."""
        return {
            "gradient_energy": float(self.energy) / max(1, self.tokens),
            "gradient_moment": self._mean(None if self.moment is None else self.moment.sum, self.tokens),
            "pulled_moment": self._mean(None if self.pulled is None else self.pulled.sum, self.tokens),
            "sequences": self.sequences,
            "fisher_rows": self._mean(self.fisher_rows, self.sequences),
            "fisher_columns": self._mean(self.fisher_columns, self.sequences),
            "weight_gradient": self._mean(self.weight_gradient, self.tokens),
        }

    def sensitivity(self) -> float:
        """``sqrt(E|g|^2 E|y|^2)``: no change of the outputs by their own size changes the loss by more, in nats per
        token and to first order."""
        mean = float(self.energy) / max(1, self.tokens)
        return float((mean * float(self.output_energy) / max(1, self.outputs)) ** 0.5)

    @staticmethod
    def _mean(total: Tensor | None, count: int) -> Tensor | None:
        return None if total is None else _finished(total / max(1, count))


def _finished(mean: Tensor) -> Tensor:
    return mean.cpu().double()


@dataclass(frozen=True)
class LayerStatistics:
    """Moments of one layer ``y = W x``, ``W`` of shape ``(rows, columns)``; all float64 on the CPU.

    ``g`` is the gradient at ``y`` of the loss summed over all target tokens, in nats per unit of ``y``. Second moments
    are kept on the smaller side of the matrix. What was not asked for is ``None`` or zero.

    Attributes:
        tokens: Tokens behind all moments, padding left out.
        input_energy: ``tr R``, the mean squared length of an input.
        input_moment: ``R = E[x x^T]`` ``(columns, columns)``, where columns <= rows, where a layer fed the same tensor
            needs it, or where asked for by ``input_full``.
        output_moment: ``E[W x (W x)^T] = W R W^T`` ``(rows, rows)``, bias left out, where ``R`` is not kept.
        input_magnitude: ``E |x_j|`` ``(columns,)``.
        gradient_energy: ``tr C``, the mean squared length of a gradient.
        gradient_moment: ``C = E[g g^T]`` ``(rows, rows)``, where rows <= columns.
        pulled_moment: ``W^T C W = E[(W^T g) (W^T g)^T]`` ``(columns, columns)``, where columns < rows.
        sequences: Sequences behind the Fisher sums.
        fisher_rows: Mean over sequences of ``sum_j (dL/dW_aj)^2``, ``L`` the loss summed over the one sequence;
            ``(rows,)``.
        fisher_columns: The same summed over rows, ``(columns,)``.
        weight_gradient: ``E[g x^T]`` ``(rows, columns)``: the gradient of the loss in nats per token.
        frequency: Of an expert: the share of the text's tokens that are routed to it, smoothed
            (:mod:`lowrank_lit.pooling`).
    """

    tokens: int
    input_energy: float = 0.0
    input_moment: Tensor | None = None
    output_moment: Tensor | None = None
    input_magnitude: Tensor | None = None
    gradient_energy: float = 0.0
    gradient_moment: Tensor | None = None
    pulled_moment: Tensor | None = None
    sequences: int = 0
    fisher_rows: Tensor | None = None
    fisher_columns: Tensor | None = None
    weight_gradient: Tensor | None = None
    frequency: float | None = None

    def check(self, name: str) -> None:
        """Check that the moments are finite.

        Raises:
            NonFiniteError: Naming the layer.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (float, Tensor)):
                what = _MEASURED.get(field.name, "gradients")
                require_finite(
                    torch.as_tensor(value, dtype=torch.float64),
                    f"the {what} of layer '{name}' on the calibration text ({field.name.replace('_', ' ')})",
                )


_MEASURED = {
    "input_energy": "inputs",
    "input_moment": "inputs",
    "input_magnitude": "inputs",
    "output_moment": "outputs",
}


def tensors_of(statistics: LayerStatistics) -> dict[str, Tensor]:
    """The moments that are tensors, by attribute."""
    found = {field.name: getattr(statistics, field.name) for field in fields(statistics)}
    return {key: value for key, value in found.items() if isinstance(value, Tensor)}


def stored_statistics(
    statistics: Mapping[str, LayerStatistics], keep: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, LayerStatistics]:
    """The same statistics with all their tensors put elsewhere at once; a moment that layers share stays shared.

    Args:
        statistics: By layer name.
        keep: Gives the tensors that stand in for those it is handed, under the same keys.
    """
    tensors = {name: tensors_of(entry) for name, entry in statistics.items()}
    kept = keep({str(id(value)): value for own in tensors.values() for value in own.values()})
    found = {}
    for name, entry in statistics.items():
        moments: dict[str, Any] = {key: kept[str(id(value))] for key, value in tensors[name].items()}
        found[name] = replace(entry, **moments)
    return found
