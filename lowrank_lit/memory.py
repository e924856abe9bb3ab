"""What memory is in use, stage by stage of a run.

Whoever does a stage's work says so with :func:`stage`, which does nothing unless a :class:`Watch` is on. On a CUDA
device the peak is that of PyTorch's tensors, exact. On the host it is that of the process's resident memory, read
several times a second: exact where a stage uses more than any before it, else the largest reading. Resident memory is
not of tensors alone: libraries that are loaded meanwhile are in it, and memory that is freed and not given back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

INTERVAL = 0.02
"""Seconds from one reading of the resident memory to the next."""

_STATUS = Path("/proc/self/status")
_ON: list[Watch] = []


class Resident(NamedTuple):
    """Resident memory of this process in bytes: now, and the largest since its start (0 where that is not told)."""

    now: int
    largest: int


def resident() -> Resident | None:
    """Resident memory of this process, ``None`` where the system does not tell it (Linux does)."""
    found = {"VmRSS": 0, "VmHWM": 0}
    try:
        for line in _STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] = int(value.split()[0]) * 1024  # in KiB, whatever the pages' size
    except (OSError, ValueError):
        return None
    return Resident(found["VmRSS"], found["VmHWM"]) if found["VmRSS"] else None


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Count the peak of what follows as that of stage ``name``; of stages in one another the inner one's alone."""
    watches = list(_ON)
    for watch in watches:
        watch.enter(name)
    try:
        yield
    finally:
        for watch in watches:
            watch.leave()


class Watch:
    """Largest memory in use by stage, in this process, above what was in use when the watch began.

    On a CUDA device PyTorch's own peak (``torch.cuda.max_memory_allocated``) is reset where stages begin and end;
    :attr:`largest` keeps it.

    Args:
        device: Where the model runs.
        interval: Seconds between two readings of the resident memory.

    Attributes:
        used: Bytes by stage and place: ``device`` (only of a CUDA device) and ``host`` (only where it can be read).
        largest: Peak of PyTorch's tensors on the CUDA device in all the time, 0 without one.
    """

    def __init__(self, device: torch.device | str, *, interval: float = INTERVAL) -> None:
        self.device = torch.device(device)
        self.interval = interval
        self.used: dict[tuple[str, str], int] = {}
        self.largest = 0
        self._stages: list[str] = []
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._reader: threading.Thread | None = None
        self._read = 0  # the largest reading since the last turn
        self._before = Resident(0, 0)
        self._base: int | None = None

    def start(self) -> None:
        """Begin to watch; what is resident now is where growth is counted from."""
        now = resident()
        if now is not None:
            self._base, self._before, self._read = now.now, now, now.now
            self._end.clear()
            self._reader = threading.Thread(target=self._keep_reading, name="resident memory", daemon=True)
            self._reader.start()
        self._turn()
        _ON.append(self)

    def stop(self) -> None:
        """Watch no longer; a second time does nothing."""
        if self not in _ON:
            return
        _ON.remove(self)
        self._turn()
        self._stages.clear()
        self._end.set()
        if self._reader is not None:
            self._reader.join()
            self._reader = None

    def enter(self, name: str) -> None:
        """A stage begins."""
        self._turn()
        self._stages.append(name)

    def leave(self) -> None:
        """The stage that began last ends; one that was interrupted by it goes on."""
        self._turn()
        if self._stages:
            self._stages.pop()

    def _turn(self) -> None:
        """Count the peak since the last turn for the stage that has been going on, and begin anew."""
        for place, peak in (("device", self._device_peak()), ("host", self._host_peak())):
            if peak is not None and self._stages:
                key = (self._stages[-1], place)
                self.used[key] = max(self.used.get(key, 0), peak)

    def _device_peak(self) -> int | None:
        if self.device.type != "cuda":
            return None
        peak = int(torch.cuda.max_memory_allocated(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)
        self.largest = max(self.largest, peak)
        return peak

    def _host_peak(self) -> int | None:
        now = resident()
        if now is None or self._base is None:
            return None
        with self._lock:
            peak, self._read = max(self._read, now.now), now.now
        if now.largest > self._before.largest:  # then it was reached since
            peak = now.largest
        self._before = now
        return max(0, peak - self._base)

    def _keep_reading(self) -> None:
        while not self._end.wait(self.interval):
            now = resident()
            if now is not None:
                with self._lock:
                    self._read = max(self._read, now.now)
