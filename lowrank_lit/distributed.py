"""Several processes that make one compression together.

Three things are shared, and everything else is computed by every process from the same numbers: sums over calibration
batches (:func:`add_up`), what is made of each matrix (:func:`handed_out`), and decisions (:func:`agreed`). All of it
goes through the CPU and gloo, which notices at once when a process is gone.

Errors travel: work that processes do apart stands inside :func:`together`, at the end of which each tells the others
how it went, so that an error of one is raised, with the same message, in all. Nothing is shared outside of
:func:`cooperating`, because a program may well compress in one of its processes alone.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_lit import errors
from lowrank_lit.errors import LowRankError, reason_of

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Team:
    rank: int
    size: int
    group: Any


_team: _Team | None = None


@contextmanager
def cooperating(what: str = "the compression") -> Iterator[None]:
    """Calibrations and factorings in this context are shared by all processes of the job, which must all enter it with
    the same model, text and settings; nothing happens where ``torch.distributed`` is not initialised, or one process is
    all there is.

    Args:
        what: Is done here, in words, for messages; the same in every process.

    Raises:
        LowRankError: In all processes where one has raised inside of the context; where a process has ended, in the
            others.
    """
    global _team
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    if alone or _team is not None:
        yield
        return
    own = None if "gloo" in dist.get_backend() else dist.new_group(backend="gloo")
    _team = _Team(dist.get_rank(), dist.get_world_size(), own)
    try:
        with together(what):
            yield
    finally:
        _team = None
        if own is not None:
            dist.destroy_process_group(own)


def unreached(error: BaseException, waited: float | None = None) -> LowRankError:
    """What a process says that did not find the others of its job.

    Args:
        error: Of torch or gloo.
        waited: Seconds, where a setting says how many.
    """
    address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    limit = "" if waited is None else f" in LowRankDeepSpeed.timeout={waited:g} seconds"
    return LowRankError(
        f"the processes of the job did not find each other at {address}:{port}{limit} "
        f"({reason_of(error)}): start the command on all nodes of trainer.num_nodes, each with a NODE_RANK of its own, "
        "and set MASTER_ADDR and MASTER_PORT to an address and an open port of the first one that all of them reach"
    )


def rank() -> int:
    """Number of this process among those that cooperate; 0 where it is alone."""
    return 0 if _team is None else _team.rank


def size() -> int:
    """How many processes cooperate."""
    return 1 if _team is None else _team.size


def owners(costs: Sequence[float]) -> list[int]:
    """Which process does which piece of work: the dearest first, each to the process that has least to do so far.

    The same in every process; ties go to the lower number.
    """
    loads = [(0.0, number) for number in range(size())]
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        load, number = heapq.heappop(loads)
        found[index] = number
        heapq.heappush(loads, (load + costs[index], number))
    return found


@contextmanager
def together(what: str) -> Iterator[None]:
    """Work that processes do apart; at the end all know that all have done it.

    Args:
        what: In words, for messages; the same in every process.

    Raises:
        LowRankError: Of the first process that raised, in all of them. Another kind of error is itself in the process
            that raised it, and a ``LowRankError`` that quotes it in the others.
    """
    try:
        yield
    except Exception as error:
        if _team is not None and not getattr(error, "known_to_all", False):
            _raise_first(_exchange(what, _Failure.of(error), None), error)
        raise
    gather(what, None)


def gather(what: str, value: _T) -> list[_T]:
    """The values of all processes by number; for a few numbers or names, as they are pickled.

    Raises:
        LowRankError: As :func:`together`.
    """
    if _team is None:
        return [value]
    found = _exchange(what, None, value)
    _raise_first(found, None)
    if any(entry[0] != what for entry in found):
        stages = ", ".join(f"process {number} at {entry[0]}" for number, entry in enumerate(found))
        raise _shared(LowRankError(f"the processes are not at the same stage ({stages}); give all the same settings"))
    return [entry[2] for entry in found]


def agreed(what: str, value: _T) -> _T:
    """The value of process 0, for decisions that must not differ by the rounding of another machine."""
    return gather(what, value)[0]


def add_up(tensor: Tensor) -> Tensor:
    """The sum over processes, in float64 and the same to the last bit in each; on the device and in the dtype of the
    argument, which is returned as it is where there is one process."""
    if _team is None:
        return tensor
    total = tensor.detach().to("cpu", torch.float64, copy=True).contiguous()
    with _connected("adding up"):
        dist.all_reduce(total, group=_team.group)
    return total.to(tensor)


def handed_out(what: str, owner: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of one process in all of them, by name; those of another come on the CPU.

    Args:
        what: In words, for messages.
        owner: Number of the process that has them.
        tensors: In the owner.

    Raises:
        LowRankError: As :func:`together`.
    """
    own = dict(tensors or {}) if rank() == owner else {}
    if _team is None:
        return own
    shapes = gather(what, {name: (tuple(value.shape), value.dtype) for name, value in own.items()})[owner]
    result = {}
    with _connected(what):
        for name, (shape, kind) in shapes.items():
            value = own[name].detach().cpu().contiguous() if name in own else torch.empty(shape, dtype=kind)
            if value.numel():  # as bytes: gloo does not know every dtype
                dist.broadcast(value.reshape(-1).view(torch.uint8), owner, group=_team.group)
            result[name] = own.get(name, value)
    return result


@dataclass(frozen=True)
class _Failure:
    kind: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        if isinstance(error, LowRankError):
            return cls(type(error).__name__, str(error))
        return cls("", f"{type(error).__name__}: {reason_of(error)}")

    def error(self, number: int) -> LowRankError:
        if not self.kind:
            return LowRankError(f"process {number} of the job failed ({self.message}); see its own messages")
        found = getattr(errors, self.kind, LowRankError)
        return found(self.message) if issubclass(found, LowRankError) else LowRankError(self.message)


def _exchange(what: str, failure: _Failure | None, value: Any) -> list[tuple[str, _Failure | None, Any]]:
    assert _team is not None
    found: list[Any] = [None] * _team.size
    with _connected(what):
        dist.all_gather_object(found, (what, failure, value), group=_team.group)
    return found


def _raise_first(found: Sequence[tuple[str, _Failure | None, Any]], own: Exception | None) -> None:
    """Raise what the first process that failed raised, if any did."""
    for number, (_, failure, _) in enumerate(found):
        if failure is not None:
            if number == rank() and own is not None:
                raise _shared(own)
            raise _shared(failure.error(number)) from own


@contextmanager
def _connected(what: str) -> Iterator[None]:
    """Say in our own words that another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise _shared(
            LowRankError(
                f"process {rank()} has lost another process of the job at {what}; see what that one says, or whether "
                f"it was killed for want of memory, and start the job again ({reason_of(error)})"
            )
        ) from error


def _shared(error: Exception) -> Exception:
    """Mark an error that the other processes need not be told of, because they raise it too or are gone."""
    error.known_to_all = True  # type: ignore[attr-defined]
    return error
