"""Tensors that stay in files and take memory only while they are used.

transformers loads safetensors by memory map: a weight in the dtype of its file takes no memory before it is read, and
what was read can be dropped and read again. :func:`release` drops it, :class:`Workspace` does the same for what a
compression computes, so that a model larger than the memory goes through it one block at a time.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from lowrank_lit.errors import LowRankError

_MADV_DONTNEED = 4
_LEAST = 2**18
"""Bytes below which it is not worth to look for a mapping."""
_MAPS = Path("/proc/self/smaps")


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

    def __init__(self, parent: str | Path, *, budget: int = 2**30) -> None:
        self.parent = Path(parent)
        self.budget = budget
        self.bytes = 0
        try:
            self.parent.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="lowrank-lit-", dir=self.parent))
        except OSError as error:
            raise LowRankError(
                f"workspace='{parent}' cannot be made ({error.strerror or error}); give a folder on a disk with room"
            ) from error

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same values as mapped tensors on the CPU, of which nothing is in memory.

        Args:
            tensors: By any names.

        Raises:
            LowRankError: If the disk is full, or the folder is gone; nothing is left of the file.
        """
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        if not tensors:
            return {}
        file = self.folder / "tensors"
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        size = sum(value.nbytes for value in whole.values())
        try:
            save_file({key: value.clone() if _shares(value, whole) else value for key, value in whole.items()}, file)
            with safe_open(file, framework="pt") as opened:
                found = {key: opened.get_tensor(key) for key in whole}
        except (OSError, SafetensorError) as error:
            raise LowRankError(
                f"workspace='{self.parent}' cannot take {size / 2**20:.0f} MiB more after {self.bytes / 2**20:.0f} MiB "
                f"({error}); free space there, or give a folder on another disk"
            ) from error
        finally:
            with suppress(OSError):
                file.unlink()
        self.bytes += size
        return found

    def close(self) -> None:
        """Remove the folder; tensors that were kept stay valid."""
        shutil.rmtree(self.folder, ignore_errors=True)


def release(tensors: Iterable[Tensor]) -> int:
    """Drop from memory what was read of mapped tensors; it is read again when it is used.

    A tensor in ordinary memory, or in a mapping that was written to, stays. Does nothing where the system is not Linux.

    Returns:
        The bytes of the tensors that were dropped, read or not.
    """
    spans = [_span(tensor) for tensor in tensors if not tensor.is_meta and tensor.device.type == "cpu"]
    spans = [(begin, end) for begin, end in spans if end - begin >= _LEAST]
    clean = _clean_mappings() if spans else []
    libc, dropped = ctypes.CDLL(None, use_errno=True) if clean else None, 0
    for begin, end in spans:
        if libc is not None and any(start <= begin and end <= stop for start, stop in clean):
            failed = libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
            dropped += 0 if failed else end - begin
    return dropped


def give_back() -> None:
    """Return to the system what the C library keeps of small tensors that were freed; nothing where it is not glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _span(tensor: Tensor) -> tuple[int, int]:
    """The whole pages inside a tensor's memory, as addresses; pages at its ends may hold a neighbour's numbers."""
    if not tensor.is_contiguous():
        return 0, 0
    page, begin = 4096, tensor.data_ptr()
    return -(-begin // page) * page, (begin + tensor.nbytes) // page * page


def _clean_mappings() -> list[tuple[int, int]]:
    """Addresses of the private mappings of files, of which no page was written to."""
    found: list[tuple[int, int]] = []
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return found
    span: tuple[int, int] | None = None
    for line in lines:
        key, *rest = line.split()
        if not key.endswith(":"):  # the head of a mapping: addresses, permissions, offset, device, inode, file
            begin, _, end = key.partition("-")
            mapped = len(rest) > 3 and rest[3] != "0" and "x" not in rest[0]
            span = (int(begin, 16), int(end, 16)) if mapped else None
        elif key == "Anonymous:" and span is not None and rest[0] == "0":
            found.append(span)
    return found


def _shares(value: Tensor, others: Mapping[str, Tensor]) -> bool:
    """Whether a tensor's memory is another's too, which the file format refuses."""
    return (
        sum(other.untyped_storage().data_ptr() == value.untyped_storage().data_ptr() for other in others.values()) > 1
    )
