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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from lowrank_lit.errors import DataError, NonFiniteError

_ADD_IN_PLACE = frozenset({"add_", "__iadd__"})
_ADD = frozenset({"add", "__add__", "__radd__"}) | _ADD_IN_PLACE
_SCALE_IN_PLACE = frozenset({"mul_", "__imul__", "div_", "__itruediv__"})
_SCALE = frozenset({"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "true_divide"}) | _SCALE_IN_PLACE
_CAST = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach"})
_RESHAPE = frozenset({"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"})
_PERMUTE = frozenset({"transpose", "permute", "movedim", "swapaxes"})
_SAME_CONTENT = _CAST | _RESHAPE | _PERMUTE
_IN_PLACE = _ADD_IN_PLACE | _SCALE_IN_PLACE | {"__setitem__", "__set__", "__isub__", "__ipow__", "__iand__", "__ior__"}


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


# ------------------------------------------------------------------------------------------------------- the graph


@dataclass(eq=False, slots=True)
class _Node:
    """A tensor at one moment of its life (an in-place operation starts a new node)."""

    serial: int  # an ancestor's is always the smaller one
    parents: tuple[_Node, ...] = ()
    tags: int = 0  # bit set: the matrices used by this very operation and not yet claimed by a branch
    near: int = 0  # bit set: tags of this node and its ancestors, seen along the stream (see base)
    source: _Node | None = None  # the tensor this one is a view, cast or multiple of
    base: _Node | None = None  # of the result of a skip addition: the stream before it
    synced: int = 0  # of a view: serial of the last write to its storage that it knows of

    @property
    def origin(self) -> _Node:
        return self.source or self


class _Term(NamedTuple):
    node: _Node
    value: Tensor


class _Parts(NamedTuple):
    """What an addition was made of, as long as nothing was computed from its result."""

    stream: _Term | None = None
    """of a skip addition: h_in"""
    branches: tuple[_Term, ...] = ()
    """of a sum of branches: its addends"""


class _Skip(NamedTuple):
    stream: _Term
    """h_in"""
    branches: list[tuple[int, Tensor | None]]
    """matrices (bit set) and contribution; None: the whole addition is this one contribution"""


def _search(start: _Node, goal: _Node) -> tuple[bool, list[_Node]]:
    """Walk from ``start`` back to ``goal``: was it reached, and which nodes younger than it carry unclaimed matrices.

    At the result of an earlier skip addition the walk goes on along the stream only. A skip inside a skip is thereby
    passed, while a tensor from inside another sub-block (a first layer's values added in every layer) is no stream.
    """
    found, tagged, seen, stack = False, [], set(), [start]
    while stack:
        node = stack.pop()
        if node is goal:
            found = True
        if node.serial <= goal.serial or id(node) in seen:
            continue
        seen.add(id(node))
        if node.tags:
            tagged.append(node)
        stack.extend(node.parents if node.base is None else (node.base,))
    return found, tagged


def _union(nodes: Iterable[_Node]) -> int:
    result = 0
    for node in nodes:
        result |= node.tags
    return result


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return 0 < len(to) >= len(shape) and all(size in (1, wanted) for size, wanted in sizes)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mutated(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors an operation writes to."""
    written = list(_tensors(kwargs.get("out")))
    in_place = name in _IN_PLACE or (name[-1:] == "_" != name[-2:-1])
    if in_place and args and isinstance(args[0], Tensor):
        written.append(args[0])
    return written


class _Trace(TorchFunctionMode):
    """Watches one forward; calls ``on_branch(matrices, h_in, h_out)``, itself unwatched, for each branch."""

    def __init__(self, bits: Mapping[int, int], on_branch: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._bits = bits  # id of a target's Parameter -> bit set of its matrices
        # Matrices that are no targets count as well, or what is one branch would depend on what is a target.
        self._other_bits: dict[int, int] = {}
        self._next_bit = 1 << max((value.bit_length() for value in bits.values()), default=0)
        self._on_branch = on_branch
        self._serial = 0
        self._nodes: Any = WeakIdKeyDictionary()  # tensor -> _Node; forgets a tensor when the model does
        # Origin of a sum -> the sum and its views, casts and multiples -> their parts. The parts go once the sum is put
        # to use, so that a forward holds hardly more activations than an unwatched one.
        self._parts: dict[_Node, dict[_Node, _Parts]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").partition(".")[0]
        pair = (*args[:2], kwargs.get("other"))[:2] if name in _ADD and args and "out" not in kwargs else ()
        if len(pair) == 2 and all(isinstance(term, Tensor) and id(term) not in self._bits for term in pair):
            return self._addition(func, args, kwargs, pair)
        result = func(*args, **kwargs)
        self._record(func, name, args, kwargs, result)
        return result

    def _bit(self, tensor: Tensor) -> int:
        known = self._bits.get(id(tensor)) or self._other_bits.get(id(tensor), 0)
        if not known and isinstance(tensor, nn.Parameter) and tensor.ndim >= 2:
            known = self._other_bits[id(tensor)] = self._next_bit
            self._next_bit <<= 1
        return known

    # nodes

    def _new(self, parents: Iterable[_Node], tags: int = 0) -> _Node:
        self._serial += 1
        node = _Node(self._serial, tuple(parents), tags, tags, synced=self._serial)
        for parent in node.parents:
            node.near |= parent.near
        return node

    def _node(self, tensor: Tensor) -> _Node:
        node: _Node | None = self._nodes.get(tensor)
        if node is None:
            node = self._nodes[tensor] = _Node(0)  # made before the forward: older than all of it
        whole = tensor._base
        if whole is not None and (written := self._nodes.get(whole)) is not None and written.serial > node.synced:
            # The tensor is a view and its storage was written through another one since.
            node = self._nodes[tensor] = self._new((node, written))
        return node

    def _write(self, tensor: Tensor, node_of: Callable[[], _Node]) -> None:
        """Give a tensor that was written to its new node, and the storage it is a view of as well."""
        node = node_of()
        whole = tensor._base
        if whole is not None:
            written = self._nodes[whole] = self._new((self._node(whole), node))
            node.synced = written.serial
        self._nodes[tensor] = node

    def _record(self, func: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        outputs, written = list(_tensors(result)), _mutated(name, args, kwargs)
        if not outputs and not written:
            return
        inputs = list(_tensors((args, kwargs)))
        same = self._is_same_content(name, args, kwargs)
        if same and not written:
            outputs = [out for out in outputs if all(out is not tensor for tensor in inputs)]
            if not outputs:  # contiguous() of what is contiguous, dropout in eval mode
                return
        tags, parents = 0, []
        for tensor in inputs:
            tags |= self._bit(tensor)
            if id(tensor) not in self._bits:
                parents.append(self._node(tensor))
        changed = {id(tensor): tensor for tensor in (*outputs, *written)}
        if tags and len(changed) > 1:  # the matrices are claimed once, whichever output leads to them
            tags, parents = 0, [self._new(parents, tags)]

        def node_of() -> _Node:
            node = self._new(parents, tags)
            if same:
                node.source = parents[0].origin
            return node

        if not same:
            self._put_to_use(*parents)
        overwritten = {id(tensor) for tensor in (*inputs, *written)}
        for tensor in changed.values():
            if id(tensor) in overwritten:
                self._write(tensor, node_of)
            else:
                self._nodes[tensor] = node_of()
        if same and not written and len(outputs) == 1:
            self._carry(func, args, kwargs, outputs[0])

    def _is_same_content(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Is the result a view, cast or multiple of the first argument?"""
        if not args or not isinstance(args[0], Tensor) or id(args[0]) in self._bits:
            return False
        if name in _SAME_CONTENT:
            return True
        if name == "dropout":  # never an active one: _carry would draw from the generator
            probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
            training = args[2] if len(args) > 2 else kwargs.get("training", kwargs.get("train", True))
            return not training or probability == 0
        factor = args[1] if len(args) == 2 and not kwargs else None
        if isinstance(factor, Tensor):
            is_scalar = factor.numel() == 1 and factor.ndim <= args[0].ndim and id(factor) not in self._bits
            return name in _SCALE and is_scalar
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        return is_number and (name in _SCALE or (name in _ADD and factor == 0))  # sum() starts with 0 + x

    def _carry(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor) -> None:
        """A view, cast or multiple of a sum is the sum of the views, casts or multiples of its parts."""

        def moved(term: _Term) -> _Term:
            value = func(term.value, *args[1:], **kwargs)
            if value is not term.value:
                self._nodes[value] = term.node
            return _Term(term.node, value)

        parts = self._parts_of(_Term(self._node(args[0]), args[0]))
        node = self._node(result)
        if not (parts.stream or parts.branches) or node.source is None:
            return
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # a view that another memory layout does not allow
            stream = parts.stream and moved(parts.stream)
            self._parts[node.source][node] = _Parts(stream, tuple(map(moved, parts.branches)))

    def _put_to_use(self, *nodes: _Node) -> None:
        for node in nodes:
            self._parts.pop(node.origin, None)

    def _parts_of(self, term: _Term) -> _Parts:
        """Return what a sum is made of; nothing if it was put to use, or one of its parts was written to since."""
        parts = self._parts.get(term.node.origin, {}).get(term.node, _Parts())
        known = all(self._node(part.value) is part.node for part in (parts.stream, *parts.branches) if part)
        return parts if known else _Parts()

    # additions

    def _addition(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], pair: tuple[Any, ...]) -> Any:
        in_place = func.__name__.partition(".")[0] in _ADD_IN_PLACE
        if kwargs.get("alpha", 1) != 1:
            scaled = pair[1].detach() * kwargs["alpha"]
            self._nodes[scaled] = node = self._new((self._node(pair[1]),))
            node.source = node.parents[0].origin
            pair = (pair[0], scaled)
        left, right = (_Term(self._node(tensor), tensor) for tensor in pair)
        skip, sum_of = self._find_skip(left, right), None
        if skip is None and self._is_sum_of_branches(left, right):
            sum_of = (*self._branches(left), *self._branches(right))
        if in_place and (skip or sum_of):  # the values are needed after they are overwritten
            kept = pair[0].detach().clone()
            self._nodes[kept] = left.node

            def keep(term: _Term) -> _Term:
                return _Term(term.node, kept) if term.value is pair[0] else term

            sum_of = sum_of and tuple(map(keep, sum_of))
            if skip:
                contributions = [(tags, kept if value is pair[0] else value) for tags, value in skip.branches]
                skip = _Skip(keep(skip.stream), contributions)
        result = func(*args, **kwargs)
        if skip:
            self._measure(skip, result)
        self._settle(result, left, right, skip, sum_of, in_place)
        return result

    def _settle(
        self,
        result: Tensor,
        left: _Term,
        right: _Term,
        skip: _Skip | None,
        sum_of: tuple[_Term, ...] | None,
        in_place: bool,
    ) -> None:
        """Enter the result of an addition into the graph."""

        def node_of() -> _Node:
            node = self._new((left.node, right.node))
            if skip:
                node.base = skip.stream.node
                node.near = skip.stream.node.near
            return node

        self._put_to_use(left.node, right.node)
        if in_place:
            self._write(result, node_of)
        else:
            self._nodes[result] = node_of()
        if skip or sum_of:
            node = self._node(result)
            self._parts[node] = {node: _Parts(skip.stream) if skip else _Parts(branches=sum_of or ())}

    def _find_skip(self, left: _Term, right: _Term) -> _Skip | None:
        if not (left.value.is_floating_point() and right.value.is_floating_point()):
            return None
        ordered = sorted((left, right), key=lambda term: term.node.origin.serial)
        pairs = [
            (p, q) for p, q in (ordered, ordered[::-1]) if q.node.near and _broadcasts(q.value.shape, p.value.shape)
        ]
        for stream, contribution in pairs:
            found, tagged = _search(contribution.node, stream.node.origin)
            if found:
                return self._claim(stream, contribution, tagged, whole=True) if tagged else None
        for later, contribution in pairs:  # (h + a) + b
            base = later.node.origin.base
            if base is None:
                continue
            found, tagged = _search(contribution.node, base.origin)
            if found and tagged:
                # h + a that something was computed from is a state of the stream in its own right.
                earlier = self._parts_of(later).stream
                return self._claim(earlier or later, contribution, tagged, whole=earlier is None)
        return None

    def _claim(self, stream: _Term, contribution: _Term, tagged: list[_Node], *, whole: bool) -> _Skip:
        parts = self._branches(contribution)
        branches: list[tuple[int, Tensor | None]] = []
        if len(parts) > 1:
            members = [_search(part.node, stream.node.origin)[1] for part in parts]
            if sum(map(len, members)) == len(tagged):  # no matrix serves two parts
                branches = [(_union(nodes), part.value) for nodes, part in zip(members, parts, strict=True) if nodes]
                if len(branches) == 1 and whole:
                    branches = []
        if not branches:
            branches = [(_union(tagged), None if whole else contribution.value)]
        for node in tagged:
            node.tags = 0
        return _Skip(stream, branches)

    def _branches(self, term: _Term) -> tuple[_Term, ...]:
        return self._parts_of(term).branches or (term,)

    def _is_sum_of_branches(self, left: _Term, right: _Term) -> bool:
        if left.value.shape != right.value.shape or not left.value.is_floating_point():
            return False
        return bool(left.node.near & ~right.node.near and right.node.near & ~left.node.near)

    def _measure(self, skip: _Skip, result: Tensor) -> None:
        before = skip.stream.value
        compute = torch.float64 if before.dtype is torch.float64 else torch.float32
        with torch.no_grad():
            for tags, contribution in skip.branches:
                after = result if contribution is None else before.to(compute) + contribution.to(compute)
                self._on_branch(tags, before, after)


# ---------------------------------------------------------------------------------------------------- the watchers


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

        with _Trace(self._bits, on_branch):
            yield
        self._sums.commit(pending)

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

    def merge(self, other: BlockCosine | Mapping[tuple[str, ...], CosineSum]) -> None:
        """Add the sums of another one."""
        self._sums.merge(other.sums if isinstance(other, BlockCosine) else other)

    def importance(self) -> dict[str, float]:
        """Block name -> 1 - mean cos, for the blocks whose input and output sizes agree."""
        sums = {name: self._sums.sums.get((name,), CosineSum(0.0, 0)) for name in self._blocks}
        return {name: value.distance / value.tokens for name, value in sums.items() if value.tokens}


def _first_activation(value: Any) -> Tensor | None:
    return next((tensor for tensor in _tensors(value) if tensor.is_floating_point() and tensor.ndim >= 2), None)


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
