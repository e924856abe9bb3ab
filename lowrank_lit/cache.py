"""A compression on disk: its plan, factors and record, so that the same compression is never computed twice.

A folder holds ``plan.json``, ``factors.safetensors`` and ``record.json``; the record is written last and marks the
others complete.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.compress import CompressionResult
from lowrank_lit.errors import LowRankError
from lowrank_lit.layers import LAYER_OF_FORM, FactoredLayer
from lowrank_lit.plan import RankPlan
from lowrank_lit.surgery import apply_plan, bias_of

_PLAN, _FACTORS, _RECORD = "plan.json", "factors.safetensors", "record.json"


def save_compression(folder: Path, model: nn.Module, result: CompressionResult) -> None:
    """Write a compression. A disk that is full or read-only costs a warning, not the result in memory.

    Args:
        folder: Created where it is missing; an earlier compression in it is replaced.
        model: The factored model.
        result: What made it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, layer in _layers(model, result.plan)
        for key, value in layer.state_dict().items()
    }
    partial, written = folder / f"{_FACTORS}.part", folder / f"{_RECORD}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _RECORD).unlink(missing_ok=True)
        save_file(tensors, partial)
        os.replace(partial, folder / _FACTORS)
        result.plan.save(folder / _PLAN)
        written.write_text(json.dumps(result.record, indent=1), encoding="utf-8")
        os.replace(written, folder / _RECORD)
    except (OSError, LowRankError, SafetensorError) as error:
        with suppress(OSError):  # the folder may be what cannot be written, or no folder at all
            partial.unlink(missing_ok=True)
            written.unlink(missing_ok=True)
        warnings.warn(
            f"the compressed factors could not be kept in '{folder}' ({error}); a second run will calibrate again",
            stacklevel=2,
        )


def load_compression(folder: Path, model: nn.Module, identity: str) -> CompressionResult | None:
    """Factor ``model`` in place from a saved compression with the fingerprint ``identity``.

    Returns:
        The result, or ``None``, with the model untouched, where the folder holds no complete compression of that
        fingerprint.
    """
    found = _read(folder, identity)
    if found is None:
        return None
    plan, tensors, record = found
    plan.check(model)
    if {key: tuple(value.shape) for key, value in tensors.items()} != _shapes(model, plan):
        warnings.warn(f"the factors in '{folder}' do not fit their plan; calibrating again", stacklevel=2)
        return None
    frozen = {
        matrix.name for matrix in plan.matrices if not next(model.get_submodule(matrix.name).parameters()).requires_grad
    }
    apply_plan(model, plan)
    with torch.no_grad():
        for name, layer in _layers(model, plan):
            layer.requires_grad_(name not in frozen)
            for key, value in layer.state_dict().items():
                value.copy_(tensors[f"{name}.{key}"])
    return CompressionResult(plan, record)


def kept_record(folder: Path, identity: str) -> dict[str, Any] | None:
    """The record of a saved compression with the fingerprint ``identity``, or ``None`` where there is none."""
    try:
        if RankPlan.load(folder / _PLAN).fingerprint != identity:
            return None
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return record
    except (OSError, ValueError):  # load_compression says what is wrong with it
        return None


def _read(folder: Path, identity: str) -> tuple[RankPlan, dict[str, Tensor], dict[str, Any]] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not all((folder / name).is_file() for name in (_PLAN, _FACTORS, _RECORD)):
        return None
    try:
        plan = RankPlan.load(folder / _PLAN)
        if plan.fingerprint != identity:
            return None
        tensors = load_file(folder / _FACTORS)
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        warnings.warn(f"the kept compression in '{folder}' cannot be read ({error}); calibrating again", stacklevel=3)
        return None
    return plan, tensors, record


def _shapes(model: nn.Module, plan: RankPlan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what ``plan`` stores for the matrices of the dense ``model`` that it factors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for matrix in plan.matrices:
        if matrix.form != "dense":
            bias = bias_of(model.get_submodule(matrix.name)) is not None
            layer = LAYER_OF_FORM[matrix.form].empty(matrix.columns, matrix.rows, matrix.rank, bias=bias, device="meta")
            shapes |= {f"{matrix.name}.{key}": tuple(value.shape) for key, value in layer.state_dict().items()}
    return shapes


def _layers(model: nn.Module, plan: RankPlan) -> list[tuple[str, FactoredLayer]]:
    layers = [(matrix.name, model.get_submodule(matrix.name)) for matrix in plan.matrices if matrix.form != "dense"]
    return [(name, layer) for name, layer in layers if isinstance(layer, FactoredLayer)]
