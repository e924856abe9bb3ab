"""Tensors that stay in files and take memory only while they are used.

transformers loads safetensors by memory map: a weight in the dtype of its file takes no memory before it is read, and
what was read can be dropped and read again. :func:`release` drops it, :class:`Workspace` does the same for what a
compression computes, so that a model larger than the memory goes through it one block at a time.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_lit.errors import LowRankError

BUDGET = 2**30
"""Bytes of hidden states that wait in memory where a workspace is used."""
_MADV_DONTNEED = 4
_LEAST = 2**14
"""Bytes below which it is not worth to look for a mapping."""
_TRIM = 2**24
"""Bytes that are kept until free memory is given back to the system."""
_PAGES = Path("/proc/self/pagemap")
_PAGE = mmap.PAGESIZE
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of the types in a safetensors file."""


class Workspace:
    """A temporary folder on a disk, for tensors that wait.

    Args:
        parent: Folder to make it in; created where it is missing.
        budget: Bytes of hidden states between the blocks that may wait in memory; what is beyond goes to the disk.
            Whatever else is kept here goes there at once.

    The files have no name left once they are mapped: their room on the disk is free as soon as the last tensor of them
    is gone, however the process ends.

    Raises:
        LowRankError: If the folder cannot be made.
    """

    def __init__(self, parent: str | Path, *, budget: int = BUDGET) -> None:
        self.parent = Path(parent)
        self.budget = budget
        self.bytes = self._since = 0
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="lowrank-lit-", dir=self.parent))
            try:
                (self.folder / "tensors").write_bytes(bytes(_LEAST))  # a full disk may take a folder, and no more
                (self.folder / "tensors").unlink()
            except OSError:
                self.close()
                raise
        except OSError as error:
            raise LowRankError(
                f"workspace='{parent}' cannot be made ({error.strerror or error}); give a folder on a disk with room"
            ) from error

    def require(self, size: int) -> None:
        """Refuse a disk with less room than ``size`` bytes, before anything is computed.

        Raises:
            LowRankError: Naming the setting, what is free and what is needed.
        """
        free = shutil.disk_usage(self.folder).free
        if free < size:
            raise LowRankError(
                f"workspace='{self.parent}' has {free / 2**20:.0f} MiB free, and {size / 2**20:.0f} MiB at least wait "
                "there; free space, or give a folder on another disk"
            )

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values as mapped tensors on the CPU, of which nothing is in memory.

        Args:
            tensors: By any names.

        Raises:
            LowRankError: If the disk is full, or the folder is gone; nothing is left of the file.
        """
        from safetensors import SafetensorError, safe_open

        if not tensors:
            return {}
        file = self.folder / "tensors"
        size = sum(value.nbytes for value in tensors.values())
        try:
            save_tensors(file, tensors)
            with safe_open(file, framework="pt") as opened:
                found = {key: opened.get_tensor(key) for key in tensors}
        except (OSError, SafetensorError) as error:
            raise LowRankError(
                f"workspace='{self.parent}' cannot take {size / 2**20:.0f} MiB more after {self.bytes / 2**20:.0f} MiB "
                f"({error}); free space there, or give a folder on another disk"
            ) from error
        finally:
            with suppress(OSError):
                file.unlink()
        self.bytes += size
        self._since += size
        if self._since >= _TRIM:  # what was kept is free by now, and the heap would hold on to it
            self._since = 0
            give_back()
        return found

    def close(self) -> None:
        """Remove the folder; tensors that were kept stay valid."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Shelf:
    """Hidden states of a text between two blocks of a model: in memory as far as a workspace's budget goes, on its
    disk beyond.

    Args:
        workspace: Whose budget and disk; ``None`` keeps all in memory.
        sizes: Bytes of the states of each batch.
        copies: How many times the states of a batch wait together, such as before and after a block.
    """

    def __init__(self, workspace: Workspace | None, sizes: Sequence[int], *, copies: int = 1) -> None:
        self._workspace = workspace
        self._in_memory = 0
        total = 0
        for number, size in enumerate(sizes, 1):
            total += copies * size
            if workspace is None or total <= workspace.budget:
                self._in_memory = number

    def put(self, number: int, states: Tensor) -> Tensor:
        """The same states, of batch ``number``, where they wait."""
        if self._workspace is None or number < self._in_memory:
            return states
        return self._workspace.keep({"states": states})["states"]

    def put_away(self, number: int, states: Tensor) -> Tensor:
        """The same states, which are on the shelf, on the disk: what waits for long is no part of the budget."""
        if self._workspace is None or number >= self._in_memory:
            return states
        return self._workspace.keep({"states": states})["states"]

    def leave(self, number: int, *states: Tensor) -> None:
        """Drop from memory what was read of the states of batch ``number``."""
        if number >= self._in_memory:
            release(states)


def save_tensors(file: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file one tensor at a time; what is read of mapped tensors is dropped again.

    The file has the same bytes for the same tensors in the same order.

    Args:
        file: Replaced where it is there.
        tensors: By name, on any device; two may share their memory, and are then written twice.
        metadata: Of the file.

    Raises:
        OSError: If it cannot be written.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # every tensor is aligned to its numbers
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensors[name].detach()
            raw: Any = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            opened.write(memoryview(raw))
            release([value])


def release(tensors: Iterable[Tensor]) -> int:
    """Drop from memory what was read of mapped tensors; it is read again when it is used.

    A tensor in ordinary memory, or of which a page was written to, stays. Does nothing where the system is not Linux.

    Returns:
        The bytes of the tensors that were dropped, read or not.
    """
    spans = [_span(tensor) for tensor in tensors if not tensor.is_meta and tensor.device.type == "cpu"]
    spans = [(begin, end) for begin, end in spans if end - begin >= _LEAST]
    dropped = 0
    if not spans or sys.platform != "linux":
        return 0
    with suppress(OSError), _PAGES.open("rb", buffering=0) as pages:
        libc = ctypes.CDLL(None, use_errno=True)
        for begin, end in spans:
            # Pages at the ends may hold a neighbour's numbers, which may have been written to.
            whole = (begin // _PAGE * _PAGE, -(-end // _PAGE) * _PAGE)
            inside = (-(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE)
            begin, end = next((span for span in (whole, inside) if _only_read(pages, *span)), (0, 0))
            if end > begin:
                failed = libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
                dropped += 0 if failed else end - begin
    return dropped


def give_back() -> None:
    """Return to the system what the C library keeps of memory that was freed, where it can: glibc keeps pages that lie
    between pages in use, and a process that goes from block to block would grow with every one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(ctypes.c_size_t(0))


def _span(tensor: Tensor) -> tuple[int, int]:
    """A tensor's memory as addresses; empty where it does not lie in one piece."""
    if not (tensor.is_contiguous() or (tensor.ndim == 2 and tensor.mT.is_contiguous())):
        return 0, 0
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _only_read(pages: Any, begin: int, end: int) -> bool:
    """Whether all pages in memory between two addresses are a file's, none of them written to, and none is swapped out.

    The kernel gives eight bytes a page: bit 63 says that it is in memory, 62 that it is swapped out, 61 that it is a
    file's. A page of a private mapping is the file's no longer once it was written to.
    """
    pages.seek(begin // _PAGE * 8)
    found = np.frombuffer(pages.read((end - begin) // _PAGE * 8), dtype=np.uint64)
    state = found >> np.uint64(61)
    return len(found) == (end - begin) // _PAGE and bool(np.isin(state, (0, 1, 5)).all()) and bool((state == 5).any())
