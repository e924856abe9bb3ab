"""A compression on disk: its plan, factors and record, so that the same compression is never computed twice.

A folder holds ``plan.json``, ``factors.safetensors`` and ``record.json``; the record is written last and marks the
others complete. The factors carry a hash of themselves and of the plan, so that an edited or damaged folder is not
taken. Until they are there, ``calibration.safetensors`` may hold what an interrupted compression goes on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit import distributed
from lowrank_lit.compress import CompressionResult
from lowrank_lit.errors import LowRankError
from lowrank_lit.experts import ExpertsApart
from lowrank_lit.kept import CALIBRATION_FILE, is_intact, read_tensors, write_tensors
from lowrank_lit.layers import LAYER_OF_FORM, FactoredLayer
from lowrank_lit.plan import RankPlan
from lowrank_lit.surgery import apply_plan, bias_of

_PLAN, _FACTORS, _RECORD = "plan.json", "factors.safetensors", "record.json"


def save_compression(folder: Path, model: nn.Module, result: CompressionResult) -> None:
    """Write a compression. A disk that is full or read-only costs a warning, not the result in memory.

    Args:
        folder: Created where it is missing; an earlier compression in it is replaced once the new one is on the disk,
            and stays where that cannot be written.
        model: The factored model.
        result: What made it.
    """
    from safetensors import SafetensorError

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, layer in _layers(model, result.plan)
        for key, value in layer.state_dict().items()
    }
    parts = {name: folder / f"{name}.new" for name in (_FACTORS, _PLAN, _RECORD)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(parts[_FACTORS], tensors, {"plan": _plan_hash(result.plan)})
        result.plan.save(parts[_PLAN])
        parts[_RECORD].write_text(json.dumps(result.record, indent=1), encoding="utf-8")
        (folder / _RECORD).unlink(missing_ok=True)  # from here to the end there is no compression to be taken
        for name, part in parts.items():
            os.replace(part, folder / name)
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    except (OSError, LowRankError, SafetensorError) as error:
        for part in parts.values():
            with suppress(OSError):  # the folder may be what cannot be written, or no folder at all
                part.unlink(missing_ok=True)
        warnings.warn(
            f"the compressed factors could not be kept in '{folder}' ({error}); a second run will calibrate again",
            stacklevel=2,
        )


def load_compression(folder: Path, model: nn.Module, identity: str) -> CompressionResult | None:
    """Factor ``model`` in place from a saved compression with the fingerprint ``identity``.

    Processes that cooperate read the folder each, and take the compression only where all of them find it.

    Returns:
        The result, or ``None``, with the model untouched, where the folder holds no complete compression of that
        fingerprint, or one that is not what was written.
    """
    with ExpertsApart(model) as apart:
        with distributed.together("reading the kept compression"):
            found = _checked(folder, model, identity)
        everywhere = distributed.gather("reading the kept compression", found is not None)
        if found is None or not all(everywhere):
            if any(everywhere) and distributed.rank() == 0:
                missing = ", ".join(str(number) for number, there in enumerate(everywhere) if not there)
                warnings.warn(
                    f"processes {missing} do not find the kept compression in '{folder}'; calibrating again (a folder "
                    "that all machines share spares that)",
                    stacklevel=2,
                )
            return None
        plan, tensors, record = found
        _factor(model, plan, tensors)
        apart.keep([matrix.name for matrix in plan.matrices])
    return CompressionResult(plan, record)


def _factor(model: nn.Module, plan: RankPlan, tensors: Mapping[str, Tensor]) -> None:
    """Give the dense model the plan's layers, with these tensors."""
    frozen = {
        matrix.name for matrix in plan.matrices if not next(model.get_submodule(matrix.name).parameters()).requires_grad
    }
    apply_plan(model, plan)
    with torch.no_grad():
        for name, layer in _layers(model, plan):
            layer.requires_grad_(name not in frozen)
            for key, value in layer.state_dict().items():
                value.copy_(tensors[f"{name}.{key}"])


def _checked(
    folder: Path, model: nn.Module, identity: str
) -> tuple[RankPlan, dict[str, Tensor], dict[str, Any]] | None:
    """Plan, factors and record, if they belong together and to the dense model."""
    found = _read(folder, identity)
    if found is None:
        return None
    plan, tensors, metadata, record = found
    plan.check(model)
    reason = ""
    if {key: tuple(value.shape) for key, value in tensors.items()} != _shapes(model, plan):
        reason = "do not fit their plan"
    elif metadata.get("plan") != _plan_hash(plan) or not is_intact(tensors, metadata):
        reason = "do not match the hash that was written with them, or their plan does not: the folder was changed"
    if reason:
        _say(f"the factors in '{folder}' {reason}; calibrating again")
        return None
    return plan, tensors, record


def _say(message: str) -> None:
    if distributed.rank() == 0:  # the others read the same folder
        warnings.warn(message, stacklevel=4)


def _plan_hash(plan: RankPlan) -> str:
    return hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()


def kept_record(folder: Path, identity: str) -> dict[str, Any] | None:
    """The record of a saved compression with the fingerprint ``identity``, or ``None`` where there is none."""
    try:
        if RankPlan.load(folder / _PLAN).fingerprint != identity:
            return None
        record: dict[str, Any] = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        return record
    except (OSError, ValueError):  # load_compression says what is wrong with it
        return None


def _read(folder: Path, identity: str) -> tuple[RankPlan, dict[str, Tensor], dict[str, str], dict[str, Any]] | None:
    from safetensors import SafetensorError

    if not all((folder / name).is_file() for name in (_PLAN, _FACTORS, _RECORD)):
        return None
    try:
        plan = RankPlan.load(folder / _PLAN)
        if plan.fingerprint != identity:
            return None
        tensors, metadata = read_tensors(folder / _FACTORS)
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        _say(f"the kept compression in '{folder}' cannot be read ({error}); calibrating again")
        return None
    return plan, tensors, metadata, record


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
