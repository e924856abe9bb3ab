"""A plan and its spectra in few numbers, by block and projection, for records and pictures.

Experts of one block and projection are averaged: a mixture has thousands of matrices, and a picture a few hundred
cells. The numbers kept do not grow with the size of a matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowrank_lit.plan import MatrixPlan, RankPlan
from lowrank_lit.spectrum import Spectrum, effective_rank

POINTS = 32
"""Singular values that are kept of a spectrum."""

_EXPERT = re.compile(r"(^|\.)experts\.\d+(?=\.)")


def place_of(name: str) -> tuple[str, int | None, str]:
    """("model.layers", 3, "self_attn.q_proj") of "model.layers.3.self_attn.q_proj"; ("", None, name) with no number."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])
    return "", None, name


def kinds_of(names: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Projection and block of every matrix, by its name alone; the experts of a block are of one projection.

    The block is the first number in the name, ``None`` without one. Where there are several stacks of blocks, such as
    an encoder and a decoder, a projection bears the name of its own.
    """
    places = {name: place_of(name) for name in names}
    several = len({stack for stack, block, _ in places.values() if block is not None}) > 1
    found: dict[str, tuple[str, int | None]] = {}
    for name, (stack, block, projection) in places.items():
        kind = _EXPERT.sub(r"\1experts", projection)
        label = f"{stack}.{kind}".strip(".") if several and block is not None else kind or stack
        found[name] = (label or "layer", block)
    return found


def rank_cells(plan: RankPlan) -> list[dict[str, Any]]:
    """Ranks by block and projection, in the order of the model.

    Returns:
        Of every cell ``kind``, ``block``, ``full_rank`` min(rows, columns) of its first matrix, ``matrices`` and how
        many of them are ``dense`` or ``pivot``; of those that are not dense the mean ``rank``, and the mean ``share``
        rank / min(rows, columns) with its ``least`` and ``most``, ``None`` where all are dense; the mean
        ``kept_energy``, ``None`` where it is not known.
    """
    kinds = kinds_of(matrix.name for matrix in plan.matrices)
    groups: dict[tuple[str, int | None], list[MatrixPlan]] = {}
    for matrix in plan.matrices:
        groups.setdefault(kinds[matrix.name], []).append(matrix)
    return [{"kind": kind, "block": block, **_ranks(matrices)} for (kind, block), matrices in groups.items()]


def _ranks(matrices: Sequence[MatrixPlan]) -> dict[str, Any]:
    smaller = [matrix for matrix in matrices if matrix.form != "dense"]
    shares = [matrix.rank / min(matrix.rows, matrix.columns) for matrix in smaller]
    energies = [matrix.kept_energy for matrix in matrices if matrix.kept_energy is not None]
    return {
        "full_rank": min(matrices[0].rows, matrices[0].columns),
        "matrices": len(matrices),
        "dense": len(matrices) - len(smaller),
        "pivot": sum(matrix.form == "pivot" for matrix in matrices),
        "rank": _short(fmean(matrix.rank for matrix in smaller)) if smaller else None,
        "share": _short(fmean(shares)) if shares else None,
        "least": _short(min(shares)) if shares else None,
        "most": _short(max(shares)) if shares else None,
        "kept_energy": round(fmean(energies), 6) if energies else None,
    }


def components(full_rank: int) -> list[int]:
    """Numbers of the components that are kept of a spectrum: all up to 32, else at most 32 from 1 to ``full_rank``, one
    half in equal ratios, for its head, the other in equal distances, for its tail."""
    if full_rank <= POINTS:
        return list(range(1, full_rank + 1))
    half = POINTS // 2
    ratios = [full_rank ** (step / half) for step in range(half)]
    distances = [full_rank * step / half for step in range(1, half + 1)]
    return sorted({round(place) for place in (*ratios, *distances)})


def spectrum_cells(spectra: Mapping[str, Spectrum]) -> list[dict[str, Any]]:
    """Spectra by block and projection, in the order given.

    Args:
        spectra: By name of the matrix, all in one metric.

    Returns:
        Of every cell ``kind``, ``block``, ``full_rank`` (experts of several sizes make a cell for each), ``matrices``,
        the mean ``effective_rank``, and at the numbers ``components`` the ``values``: singular values divided by the
        largest, of several matrices their geometric mean; all are 0 where the largest is 0.
    """
    kinds = kinds_of(spectra)
    groups: dict[tuple[str, int | None, int], list[Spectrum]] = {}
    for name, spectrum in spectra.items():
        groups.setdefault((*kinds[name], len(spectrum.singular_values)), []).append(spectrum)
    cells = []
    for (kind, block, full_rank), members in groups.items():
        numbers = components(full_rank)
        logarithms = np.mean([_logarithms(member, numbers) for member in members], axis=0)
        cells.append(
            {
                "kind": kind,
                "block": block,
                "full_rank": full_rank,
                "matrices": len(members),
                "effective_rank": _short(fmean(effective_rank(member.energy()) for member in members)),
                "components": numbers,
                "values": [_short(float(value)) for value in np.exp(logarithms)],
            }
        )
    return cells


def _logarithms(spectrum: Spectrum, numbers: Sequence[int]) -> NDArray[np.float64]:
    """``ln(s_i / s_1)`` of some components; minus infinity where a value is 0."""
    values = spectrum.singular_values.detach().cpu().double().numpy()
    picked = values[np.asarray(numbers) - 1] / (values[0] if values[0] > 0 else 1.0)
    with np.errstate(divide="ignore"):
        found: NDArray[np.float64] = np.log(picked)
    return found


def _short(value: float) -> float:
    """Four digits, which a picture has no more of."""
    return float(f"{value:.4g}")
