"""Module importance I = 1 - E cos(h_in, h_out), for any network and without a line about any architecture.

h_in and h_out are the residual stream just before and just after a sub-block's contribution is added (UniRank). Where
that happens is read from the computation itself: a watched forward keeps a graph of which tensor came from which, and
an addition p + q in which q was computed from p is a skip connection; the weights used between p and q belong to that
sub-block.

- Norm after the sub-block (Gemma 2): q is the normalised contribution, as it is what is added.
- Norm after the addition (BERT): the norm lies outside, h_out is the sum itself.
- Parallel branches (GPT-NeoX, Phi, Falcon): ``h + (a + b)`` and ``(h + a) + b`` with a and b both computed from h are
  two branches, each compared by itself: h with h + a, h with h + b. The same holds for a shared expert beside routed
  ones.
- No skip connection: ``BlockCosine`` compares a repeating block's input with its output; ``resolve_importance`` joins
  both.

What cannot be followed is what torch does not show to Python: a ``torch.jit.script`` function, a kernel that writes
into a tensor it is given, a compiled graph. The matrices behind it are reported as missing, never guessed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_lit.dataflow import Trace, tensors_in
from lowrank_lit.errors import DataError, NonFiniteError


class CosineSum(NamedTuple):
    """``distance`` = sum over tokens of 1 - cos(h_in, h_out); ``tokens`` = how many. Adds up over batches and ranks."""

    distance: float
    tokens: int


@dataclass(frozen=True)
class ImportanceResult:
    """What a watched calibration found.

    Attributes:
        values: I = 1 - mean cos, in [0, 2], for each matrix that lies in some branch.
        branches: the matrices of the same sub-block, the matrix itself included, in the order of the targets.
        missing: the matrices that no residual addition was found for.
    """

    values: dict[str, float]
    branches: dict[str, tuple[str, ...]]
    missing: tuple[str, ...]


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """1 - cos(before, after) over the last dimension, shape (..., d) -> (...), in fp32 or, for fp64 input, fp64.

    Computed as |u - v|^2 / 2 of the unit vectors u and v, which stays accurate where the two are nearly parallel. A
    zero vector has no direction: two of them are at distance 0 (nothing changed), a zero and a non-zero one at 1 (as if
    orthogonal).
    """
    compute = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    u, v = before.detach().to(compute), after.detach().to(compute)
    u_norm, v_norm = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (u, v))
    least, most = torch.aminmax(torch.stack([u_norm, v_norm]))
    # In these bounds no square leaves float32, and as few passes over the activations as there can be will do.
    if float(least) > 1e-15 and float(most) < 1e15:
        apart = (u / u_norm).addcmul_(v, v_norm.reciprocal(), value=-1)
        lengths: Tensor = torch.linalg.vector_norm(apart, dim=-1)
        return lengths.square() / 2
    # Dividing by the largest entry first keeps the norm of an activation such as 1e30 inside fp32.
    u, v = (t / t.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(compute).tiny) for t in (u, v))
    u_norm, v_norm = (torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (u, v))
    distance = (u / u_norm.clamp_min(0.5) - v / v_norm.clamp_min(0.5)).square().sum(-1) / 2
    one_is_zero = (u_norm == 0) != (v_norm == 0)
    return torch.where(one_is_zero.squeeze(-1), torch.ones_like(distance), distance)


class _CosineSums:
    """Sums per key, filled one batch at a time; a batch that raises leaves no trace."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], CosineSum] = {}

    def add(self, key: tuple[str, ...], value: CosineSum) -> None:
        old = self.sums.get(key, CosineSum(0.0, 0))
        self.sums[key] = CosineSum(old.distance + value.distance, old.tokens + value.tokens)

    def commit(self, pending: Sequence[tuple[tuple[str, ...], Tensor, Tensor]]) -> None:
        values = [(key, float(distance), int(tokens)) for key, distance, tokens in pending]
        for key, distance, _ in values:
            if not math.isfinite(distance):
                raise NonFiniteError(
                    f"residual stream at {key[0]}: cos(h_in, h_out) is {distance}; "
                    "look for NaN or infinity in the weights up to there and in the batch, or for fp16 overflow"
                )
        for key, distance, tokens in values:
            self.add(key, CosineSum(distance, tokens))

    def merge(self, other: Mapping[tuple[str, ...], CosineSum]) -> None:
        for key, value in other.items():
            self.add(key, CosineSum(*value))


def _masked_sum(distance: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Sum per-token distances in fp64 over real tokens; both results stay on the device (0-d)."""
    keep = torch.ones_like(distance, dtype=torch.bool) if mask is None else _fit_mask(mask, distance.shape, name)
    keep = keep.to(distance.device)
    # where, not a product: a padded row may be NaN (softmax over nothing) and NaN * 0 is NaN.
    return torch.where(keep, distance.double(), 0.0).sum(), keep.sum()


def _fit_mask(mask: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Bring a (batch, seq) mask to the tokens of an activation: (batch, seq[, heads]), (seq, batch), flat, packed."""
    mask = mask.bool()
    grid = tuple(size for size in shape if size != 1)
    for candidate in (mask, mask.T):
        if grid == tuple(size for size in candidate.shape if size != 1):
            return candidate.reshape(shape)
    if len(shape) == 1 and shape.numel() == mask.numel():
        return mask.reshape(shape)
    if len(shape) > 2 and shape[:2] == mask.shape:
        return mask.reshape(*shape[:2], *[1] * (len(shape) - 2)).expand(shape)
    pooled = shape in ((len(mask),), (len(mask), 1))
    if bool(mask.all()) or pooled or shape == (int(mask.sum()),):
        return torch.ones(shape, dtype=torch.bool)
    raise DataError(
        f"mask {tuple(mask.shape)} does not fit the tokens {tuple(shape)} of the residual stream at {name}; "
        "calibrate on batches without padding"
    )


def _check_mask(mask: Tensor | None) -> None:
    if mask is not None and mask.ndim != 2:
        raise DataError(f"mask has shape {tuple(mask.shape)}; pass the (batch, seq) attention mask")


class ResidualWatcher:
    """Collects the module importance of the matrices of a network over any number of forwards.

    The model's output is the same to the last bit. Run the forward alone inside ``batch`` (no backward), with
    gradients on or off; ``torch.inference_mode`` hides writes through views and is best avoided. Serves a model and a
    single block alike.

    Args:
        weights: name of a target matrix -> the Parameters it is stored in (two for a factored one), told by identity.
    """

    def __init__(self, weights: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._names = tuple(weights)
        self._parameters = [tuple(parameters) for parameters in weights.values()]  # held: ids stay theirs
        self._bits: dict[int, int] = {}
        for index, parameters in enumerate(self._parameters):
            for parameter in parameters:
                self._bits[id(parameter)] = self._bits.get(id(parameter), 0) | 1 << index
        self._sums = _CosineSums()

    @property
    def sums(self) -> Mapping[tuple[str, ...], CosineSum]:
        """The state: a branch's matrices, in the order of the targets, -> its sum. Enough to ``merge`` elsewhere."""
        return self._sums.sums

    @contextlib.contextmanager
    def batch(self, mask: Tensor | None = None) -> Iterator[None]:
        """Watch one forward.

        Args:
            mask: (batch, seq) attention mask, non-zero at real tokens; None when all are.

        Raises:
            DataError: the mask is not 2-d, or holds padding and does not fit a residual stream.
            NonFiniteError: on leaving, when the stream at some branch is not finite at a real token.
        """
        _check_mask(mask)
        pending: list[tuple[tuple[str, ...], Tensor, Tensor]] = []

        def on_branch(tags: int, before: Tensor, after: Tensor) -> None:
            key = tuple(name for index, name in enumerate(self._names) if tags >> index & 1)
            if not key:  # a sub-block without a target
                return
            pending.append((key, *_masked_sum(cosine_distance(before, after), mask, key[0])))

        with Trace(self._bits, on_branch):
            yield
        self._sums.commit(pending)

    def empty(self) -> ResidualWatcher:
        """Another one for the same matrices, with no sums, to ``merge`` into."""
        return ResidualWatcher(dict(zip(self._names, self._parameters, strict=True)))

    def merge(self, other: ResidualWatcher | Mapping[tuple[str, ...], CosineSum]) -> None:
        """Add the sums of another watcher, or of its ``sums`` as received from another process."""
        self._sums.merge(other.sums if isinstance(other, ResidualWatcher) else other)

    def importance(self) -> ImportanceResult:
        """Divide the sums. A matrix called in several branches (a shared module) gets the mean over all of them."""
        totals: dict[str, CosineSum] = {}
        members: dict[str, set[str]] = {}
        for key, value in sorted(self._sums.sums.items()):  # sorted: order of batches does not matter
            if not value.tokens:
                continue
            for name in key:
                old = totals.get(name, CosineSum(0.0, 0))
                totals[name] = CosineSum(old.distance + value.distance, old.tokens + value.tokens)
                members.setdefault(name, set()).update(key)
        found = [name for name in self._names if name in totals]
        return ImportanceResult(
            values={name: totals[name].distance / totals[name].tokens for name in found},
            branches={name: tuple(n for n in self._names if n in members[name]) for name in found},
            missing=tuple(name for name in self._names if name not in totals),
        )


class BlockCosine:
    """1 - E cos(input, output) of whole blocks, for networks without a residual stream; plain forward hooks.

    The input is the block's first floating-point tensor of at least two dimensions, positional arguments first; the
    output the first such of what it returns. A block is left out where their shapes differ.

    Args:
        blocks: name -> module, such as ``dict(find_repeating_blocks(model))``.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self._blocks = dict(blocks)
        self._sums = _CosineSums()

    @property
    def sums(self) -> Mapping[tuple[str, ...], CosineSum]:
        """The state: (block name,) -> its sum."""
        return self._sums.sums

    @contextlib.contextmanager
    def batch(self, mask: Tensor | None = None) -> Iterator[None]:
        """Watch one forward; mask and errors as in ``ResidualWatcher.batch``."""
        _check_mask(mask)
        pending: list[tuple[tuple[str, ...], Tensor, Tensor]] = []
        entered: dict[str, list[Tensor | None]] = {name: [] for name in self._blocks}

        def enter(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            value = _first_activation((args, kwargs))
            # A copy: a block may add to its input in place.
            entered[name].append(None if value is None else value.detach().clone())

        def leave(name: str, output: Any) -> None:
            before, after = entered[name].pop(), _first_activation(output)
            if before is not None and after is not None and before.shape == after.shape:
                with torch.no_grad():
                    pending.append(((name,), *_masked_sum(cosine_distance(before, after), mask, name)))

        with contextlib.ExitStack() as hooks:
            for name, module in self._blocks.items():
                before_hook = module.register_forward_pre_hook(
                    lambda _m, args, kwargs, name=name: enter(name, args, kwargs), with_kwargs=True
                )
                hooks.callback(before_hook.remove)
                hooks.callback(
                    module.register_forward_hook(lambda _m, _args, output, name=name: leave(name, output)).remove
                )
            yield
        self._sums.commit(pending)

    def empty(self) -> BlockCosine:
        """Another one for the same blocks, with no sums, to ``merge`` into."""
        return BlockCosine(self._blocks)

    def merge(self, other: BlockCosine | Mapping[tuple[str, ...], CosineSum]) -> None:
        """Add the sums of another one."""
        self._sums.merge(other.sums if isinstance(other, BlockCosine) else other)

    def importance(self) -> dict[str, float]:
        """Block name -> 1 - mean cos, for the blocks whose input and output sizes agree."""
        sums = {name: self._sums.sums.get((name,), CosineSum(0.0, 0)) for name in self._blocks}
        return {name: value.distance / value.tokens for name, value in sums.items() if value.tokens}


def _first_activation(value: Any) -> Tensor | None:
    return next((tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.ndim >= 2), None)


def find_repeating_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Find the blocks a network is a stack of: (dotted name, module) in the stack's order; empty when there is none.

    The stack is the nn.ModuleList, or nn.Sequential of one class, of at least two children that holds the most
    parameters (the outermost on a tie); some class must occur twice in it, so a hybrid's list of attention and other
    layers counts. Of an encoder-decoder's two stacks it is the larger one.
    """
    best: tuple[int, list[tuple[str, nn.Module]]] = (-1, [])
    for path, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        children = list(module._modules.items())  # not named_children(), which skips a module that occurs again
        classes = {type(child) for _, child in children}
        limit = 1 if isinstance(module, nn.Sequential) else len(children) - 1
        size = sum(parameter.numel() for parameter in module.parameters())
        if len(children) >= 2 and len(classes) <= limit and size > best[0]:
            prefix = f"{path}." if path else ""
            best = (size, [(f"{prefix}{name}", child) for name, child in children])
    return best[1]


def resolve_importance(
    target_names: Sequence[str], found: ImportanceResult, block_cosines: Mapping[str, float]
) -> tuple[dict[str, float], tuple[str, ...]]:
    """Give every target matrix an importance: its branch's, else its repeating block's, else 1.

    Args:
        target_names: dotted names of the matrices.
        found: what ``ResidualWatcher.importance`` returned.
        block_cosines: what ``BlockCosine.importance`` returned; may be empty.

    Returns:
        name -> I for every target, in their order, and one note for each kind of fallback that was used.
    """
    values: dict[str, float] = {}
    by_block: list[str] = []
    unknown: list[str] = []
    for name in target_names:
        if name in found.values:
            values[name] = found.values[name]
            continue
        enclosing = [block for block in block_cosines if name == block or name.startswith(f"{block}.")]
        values[name] = block_cosines[max(enclosing, key=len)] if enclosing else 1.0
        (by_block if enclosing else unknown).append(name)
    notes = []
    if by_block:
        notes.append(
            f"importance: no residual addition for {_counted(by_block)}; I = 1 - cos(input, output) of their block"
        )
    if unknown:
        notes.append(
            f"importance: no residual addition and no repeating block with input and output of one size for "
            f"{_counted(unknown)}; I = 1"
        )
    return values, tuple(notes)


def _counted(names: Sequence[str]) -> str:
    return f"{len(names)} {'matrix' if len(names) == 1 else 'matrices'} ({names[0]}{', ...' if len(names) > 1 else ''})"
