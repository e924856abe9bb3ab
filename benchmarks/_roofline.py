"""What this machine can do, measured: the rate of matrix products, the bandwidth of memory, and times of routes that
are compared.

All times are of one process: by the wall clock, or its processor time, which with one thread is what the wall clock
shows on a machine that does nothing else. Compared routes take turns, round by round, so that what else the machine
does meets all of them; a ratio is the median of the ratios within the rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Timing:
    """Seconds of one route, one entry per round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """Median, fastest, slowest, and the number of rounds, for JSON."""
        return {
            "median": self.median,
            "fastest": min(self.seconds),
            "slowest": max(self.seconds),
            "rounds": len(self.seconds),
        }


@dataclass(frozen=True)
class Ratio:
    """How many times as long one route takes as another: median, least and largest over the rounds."""

    median: float
    least: float
    largest: float

    def summary(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.largest:.2f})"


def interleaved(
    routes: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Seconds of every route, run in turn: all of them once per round, in the same order.

    Args:
        routes: What to time, by name; what they return is dropped outside of the clock.
        rounds: That count, at least 1.
        warmup: Rounds before them.
        device: Whose work is waited for.
        clock: ``time.perf_counter`` or, on the CPU with one thread, ``time.process_time``.
    """
    place = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for number in range(warmup + rounds):
        for name, route in routes.items():
            synchronize(place)
            started = clock()
            result = route()
            synchronize(place)
            spent = clock() - started
            del result
            if number >= warmup:
                seconds[name].append(spent)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(slow: Timing, fast: Timing) -> Ratio:
    """``slow / fast`` of two routes that took turns."""
    values = [above / below for above, below in zip(slow.seconds, fast.seconds, strict=True)]
    return Ratio(statistics.median(values), min(values), max(values))


def synchronize(device: torch.device | str) -> None:
    """Wait for all work that was given to the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(
    dtype: torch.dtype | str,
    size: int | tuple[int, int, int] = 1024,
    *,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Floating-point operations per second of a matrix product, the median of some; a product of ``(m, k)`` and
    ``(k, n)`` counts ``2 m k n``.

    Args:
        dtype: A torch dtype or its name.
        size: ``(m, k, n)``, or one number for all three.
        rounds: Products that count, after one that does not.
        device: Where.
        clock: As in :func:`interleaved`.
    """
    rows, inner, columns = (size,) * 3 if isinstance(size, int) else size
    kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).to(device, kind)
    right = torch.randn(inner, columns, generator=generator).to(device, kind)
    times = interleaved({"product": lambda: left @ right}, rounds=rounds, device=device, clock=clock)
    return 2.0 * rows * inner * columns / times["product"].median


def bandwidth(
    mebibytes: int = 256,
    *,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes per second of a copy between two pieces of memory, read and written bytes both counted.

    Args:
        mebibytes: Size of each piece; well above the caches, or it is their bandwidth. Virtual machines may show a
            cache that is shared by the whole host.
        rounds: Copies that count, after one that does not.
        device: Where.
        clock: As in :func:`interleaved`.
    """
    source = torch.ones(mebibytes * 2**20 // 4, dtype=torch.float32, device=device)
    sink = torch.zeros_like(source)
    times = interleaved({"copy": lambda: sink.copy_(source)}, rounds=rounds, device=device, clock=clock)
    return 2.0 * source.nbytes / times["copy"].median


def read_bandwidth(
    mebibytes: int = 256,
    *,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Bytes per second of reading alone, by a float32 product of a matrix and a vector, which is what decoding one
    token does; arguments as in :func:`bandwidth`."""
    columns = 4096
    matrix = torch.ones(mebibytes * 2**20 // 4 // columns, columns, dtype=torch.float32, device=device)
    vector = torch.ones(columns, device=device)
    times = interleaved({"read": lambda: matrix @ vector}, rounds=rounds, device=device, clock=clock)
    return matrix.nbytes / times["read"].median


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine, the versions, and how busy it is at present, for JSON."""
    info: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": _flags(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }
    if torch.device(device).type == "cuda":
        info["device"] = torch.cuda.get_device_name(device)
        info["cuda"] = torch.version.cuda
    return info


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _flags() -> list[str]:
    """Which of the instruction sets that half-precision products use the processor has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = next((line.split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "avx512_fp16") if flag in found]
