"""The data flow of one forward, and the skip connections in it.

A watched forward keeps a graph of which tensor came from which. An addition p + q in which q was computed from p is a
skip connection, and the weights used between p and q belong to what it adds; :mod:`lowrank_lit.residual` measures
there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_ADD_IN_PLACE = frozenset({"add_", "__iadd__"})
_ADD = frozenset({"add", "__add__", "__radd__"}) | _ADD_IN_PLACE
_SCALE_IN_PLACE = frozenset({"mul_", "__imul__", "div_", "__itruediv__"})
_SCALE = frozenset({"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "true_divide"}) | _SCALE_IN_PLACE
_CAST = frozenset({"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach"})
_RESHAPE = frozenset({"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"})
_PERMUTE = frozenset({"transpose", "permute", "movedim", "swapaxes"})
_SAME_CONTENT = _CAST | _RESHAPE | _PERMUTE
_IN_PLACE = _ADD_IN_PLACE | _SCALE_IN_PLACE | {"__setitem__", "__set__", "__isub__", "__ipow__", "__iand__", "__ior__"}


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


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _mutated(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors an operation writes to."""
    written = list(tensors_in(kwargs.get("out")))
    in_place = name in _IN_PLACE or (name[-1:] == "_" != name[-2:-1])
    if in_place and args and isinstance(args[0], Tensor):
        written.append(args[0])
    return written


class Trace(TorchFunctionMode):
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
        outputs, written = list(tensors_in(result)), _mutated(name, args, kwargs)
        if not outputs and not written:
            return
        inputs = list(tensors_in((args, kwargs)))
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
