"""Progressive re-allocation of ranks while a model trains: the budget's schedule, running scores, the choice.

A masked layer (:mod:`lowrank_lit.masks`) computes ``y = outer (m * (inner x)) + b`` with ``m`` in {0, 1}, one entry per
component. With the latents ``z = inner x`` and ``h``, the gradient of the loss at ``m * z``, component ``i`` alone is
worth

    1/2 E[z_i^2] E[h_i^2]    nats per token,

half its squared singular value in the metric ``two_sided``: ``E[z_i^2]`` and ``E[h_i^2]`` are the moments of the inputs
and of the output gradients, seen through its two vectors. Both are at hand in every training step, for components that
are off as well. They are summed with weights that decay by the step, so that the scores are those of the factors and
the model as they are now.

The budget falls to its target as in gradual pruning (Zhu and Gupta, arXiv:1710.01878); masks rather than new shapes are
AdaLoRA's (arXiv:2303.10512).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowrank_lit.allocation import MatrixSpec, spend
from lowrank_lit.errors import LowRankError, PlanError
from lowrank_lit.experts import routed_mask, tokens_around
from lowrank_lit.gradients import start_graph
from lowrank_lit.linalg import require_finite
from lowrank_lit.statistics import accumulator, real_tokens, widen

SCHEDULES = {"linear": 1, "cubic": 3}
"""Power of the part of the way that is left, by the name of the schedule."""


def check_schedule(begin: int, end: int, every: int, schedule: str, steps: float) -> None:
    """Check a schedule against the run that it is for.

    Args:
        begin: Optimizer step up to which the budget is the first one.
        end: Optimizer step at which it has reached the target.
        every: Steps from one re-allocation to the next.
        schedule: One of :data:`SCHEDULES`.
        steps: Optimizer steps of the run; infinity where nobody knows.

    Raises:
        LowRankError: Naming the setting that is out of range.
    """
    if schedule not in SCHEDULES:
        raise LowRankError(f"schedule='{schedule}' is unknown; choose one of {', '.join(SCHEDULES)}")
    if every < 1:
        raise LowRankError(f"every={every} is no number of steps; re-allocate every 1 or more, such as 10")
    if not 0 <= begin < end:
        raise LowRankError(f"begin={begin}, end={end}: begin at step 0 or later, and end at a later step than that")
    if end > steps:
        raise LowRankError(
            f"end={end} lies outside of the run, which has {steps:g} steps; end by then, or train longer "
            "(trainer.max_steps)"
        )


def scheduled_ratio(step: int, *, begin: int, end: int, first: float, last: float, schedule: str) -> float:
    """Keep ratio at a step: ``last + (first - last) (1 - t)^p``, ``t`` the part of the way from ``begin`` to ``end``.

    ``linear`` has ``p = 1``. ``cubic`` has ``p = 3``: it takes most away early, where components are cheap, and little
    at a time later, where the model needs steps to make up for each.

    Args:
        step: Optimizer step.
        begin: ``first`` up to here.
        end: ``last`` from here on, exactly.
        first: Keep ratio at the beginning.
        last: The target.
        schedule: One of :data:`SCHEDULES`.
    """
    if step >= end:
        return last
    left = 1.0 - max(0, step - begin) / (end - begin)
    return last + (first - last) * left ** SCHEDULES[schedule]


@dataclass
class LatentSums:
    """Decaying sums over the tokens that went through one masked layer; float64, on the layer's device.

    Attributes:
        inputs: Sum of ``z_i^2``, ``(rank,)``.
        gradients: Sum of ``h_i^2``, ``(rank,)``, of the loss summed over the tokens of a forward.
        tokens: How many, by the same weights, ``()``.
        text: The same of the text: more than ``tokens`` where the layer is an expert's.
        mask: ``(batch, length)``, true at the real tokens of the batch at hand; ``None`` where all are.
        scale: What the loss is divided by beyond its mean over tokens: batches whose gradients are accumulated.
    """

    inputs: Tensor
    gradients: Tensor
    tokens: Tensor
    text: Tensor
    mask: Tensor | None = None
    scale: float = 1.0

    @classmethod
    def zeros(cls, rank: int, device: torch.device | str = "cpu") -> LatentSums:
        """Sums over no token."""
        inputs, gradients = (accumulator(rank, device=device) for _ in range(2))
        tokens, text = (accumulator(device=device) for _ in range(2))
        return cls(inputs, gradients, tokens, text)

    @property
    def totals(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All sums: ``inputs``, ``gradients``, ``tokens``, ``text``."""
        return self.inputs, self.gradients, self.tokens, self.text

    def decay(self, factor: float) -> None:
        """Multiply all sums by ``factor``."""
        for total in self.totals:
            total.mul_(factor)

    def to(self, device: torch.device | str) -> None:
        """Move the sums."""
        self.inputs, self.gradients, self.tokens, self.text = (total.to(device) for total in self.totals)

    def observe(self, latents: Tensor, masked: Tensor) -> None:
        """Add the tokens of one forward, once its backward has brought the gradient at ``masked``.

        A forward without a backward adds nothing: neither evaluation nor, under gradient checkpointing, the forward
        that is done twice. Nor does a backward whose gradients overflow, for loss scaling skips such a step.

        Args:
            latents: ``z`` ``(..., rank)``.
            masked: ``m * z``, of the same shape; made to require a gradient where it does not.
        """
        if not torch.is_grad_enabled():
            return
        if not masked.requires_grad:
            start_graph(masked)
        mask = routed_mask(self.mask)
        rows = widen(real_tokens(latents, mask))
        squares, tokens, text = rows.square().sum(0), len(rows), tokens_around(self.mask, len(rows))

        def add(gradient: Tensor) -> None:
            # The loss is a mean over about as many tokens; that many times, it is the sum that the moment is of.
            steep = (widen(real_tokens(gradient, mask)) * (text * self.scale)).square().sum(0)
            counted = torch.isfinite(steep).all()
            self.inputs += torch.where(counted, squares, 0)
            self.gradients += torch.where(counted, steep, 0)
            self.tokens += torch.where(counted, tokens, 0)
            self.text += torch.where(counted, text, 0)

        masked.register_hook(add)  # type: ignore[no-untyped-call]

    def nats(self, name: str) -> Tensor:
        """What each component is worth, ``1/2 E[z_i^2] E[h_i^2]`` in nats per token, ``(rank,)``; zeros without tokens.

        The means are over the tokens that reach the layer, what it is worth over those of the text.

        Args:
            name: Of the layer, for errors.

        Raises:
            NonFiniteError: If a sum is NaN or infinite; names the layer.
        """
        count = self.tokens.clamp_min(torch.finfo(self.tokens.dtype).tiny)
        reach = self.tokens / self.text.clamp_min(torch.finfo(self.tokens.dtype).tiny)
        worth = (self.inputs / count) * (self.gradients / count) * reach / 2
        require_finite(worth, f"the scores of the components of layer '{name}' in the last steps")
        return worth


def share_sums(sums: Sequence[LatentSums], reduce: Callable[[Tensor], Tensor], processes: int) -> None:
    """Give every process the mean of all processes' sums, by one reduction.

    The mean, so that the sum over the processes stays what it is, and later re-allocations weight old tokens alike. And
    a checkpoint, which holds the sums of one process, then knows nearly all that the others have seen.

    Args:
        sums: Of this process, changed in place.
        reduce: Adds a tensor up over all processes and gives each the same result.
        processes: How many.
    """
    parts = [total for entry in sums for total in entry.totals]
    joint = reduce(torch.cat([total.reshape(-1) for total in parts])) / processes
    for total, part in zip(parts, torch.split(joint, [total.numel() for total in parts]), strict=True):
        total.copy_(part.reshape(total.shape))


def choose_components(specs: Sequence[MatrixSpec], scores: Sequence[Tensor], keep_ratio: float) -> list[Tensor]:
    """The components of highest score per parameter, over all matrices, that a budget pays for.

    Args:
        specs: The matrices. From the break-even on the cost is that of the dense matrix, which has all components.
        scores: Of each matrix's components, ``(rank,)``, not negative, in any order; ``rank`` may be below the full one
            of a matrix that was factored before.
        keep_ratio: Share of the dense parameters to keep, in (0, 1].

    Returns:
        A mask ``(rank,)`` per matrix, bool, on the device of its scores.

    Raises:
        BudgetError: If the ratio is outside (0, 1], or the floors alone cost more than the budget.
    """
    orders = [values.argsort(descending=True, stable=True) for values in scores]
    curves = [_padded(values[order], spec.full_rank) for values, order, spec in zip(scores, orders, specs, strict=True)]
    masks = []
    for order, rank in zip(orders, spend(specs, curves, keep_ratio, per_parameter=True), strict=True):
        mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        mask[order[:rank]] = True
        masks.append(mask)
    return masks


def _padded(values: Tensor, length: int) -> NDArray[np.float64]:
    """Scores up to the full rank: components that a factored matrix does not have are worth nothing."""
    result = np.zeros(length)
    result[: len(values)] = values.detach().cpu().double().numpy()
    return result


def sums_to_dict(sums: Mapping[str, LatentSums]) -> dict[str, dict[str, Tensor]]:
    """The sums as plain tensors, for a checkpoint."""
    keys = ("inputs", "gradients", "tokens", "text")
    return {
        name: {key: total.clone() for key, total in zip(keys, entry.totals, strict=True)}
        for name, entry in sums.items()
    }


def load_sums(sums: Mapping[str, LatentSums], stored: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Take the sums that :func:`sums_to_dict` gave.

    Raises:
        PlanError: If they are of other layers or ranks.
    """
    shapes = {name: len(entry.inputs) for name, entry in sums.items()}
    if {name: len(entry["inputs"]) for name, entry in stored.items()} != shapes:
        raise PlanError(
            "the checkpoint's re-allocation is of other layers or ranks; resume with the recipe that made it"
        )
    for name, entry in sums.items():
        for total, value in zip(entry.totals, stored[name].values(), strict=True):
            total.copy_(value)
