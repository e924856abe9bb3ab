"""Folders of factored modules that transformers has no format for: weights, plan, and which run wrote them.

The code of such a module is the project's. So a folder is loaded into a dense module that the project has made:
:func:`load_module` gives it the plan's layout and then the weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowrank_lit._version import __version__
from lowrank_lit.errors import ExportError, NonFiniteError
from lowrank_lit.folders import (
    FORMAT_VERSION,
    MARKER,
    atomic_folder,
    check_version,
    files_in,
    read_json,
    refuse_foreign,
    restore_interrupted,
    unwritable,
)
from lowrank_lit.hub import export_fingerprint, refuse_unmerged
from lowrank_lit.paging import DTYPES, save_tensors
from lowrank_lit.plan import RankPlan
from lowrank_lit.surgery import apply_plan, check_applied

_PLAN = "plan.json"
_WEIGHTS = "model.safetensors"

_PathLike = str | os.PathLike[str]


def save_module(
    module: nn.Module,
    plan: RankPlan | None,
    path: _PathLike,
    *,
    dtype: torch.dtype | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write the module's state dict and its plan as a folder that is complete or is not there.

    Args:
        module: Any, factored by ``plan``, without adapters.
        plan: Its plan, or ``None`` for a dense module.
        path: Folder to write; an earlier one of the same fingerprint is replaced.
        dtype: Floating-point weights are cast to this type; ``None`` keeps theirs.
        fingerprint: Identity of the run, see :func:`lowrank_lit.hub.export_fingerprint`.

    Raises:
        ExportError: If ``path`` holds something else or cannot be written, or a tensor is of a type that no safetensors
            file holds.
        ModelError: If the module has unmerged adapters or layers in 4 bits.
        NonFiniteError: If a weight is NaN or infinite, or becomes so in ``dtype``.
        PlanError: If the plan does not fit the module.
    """
    target = Path(path).resolve()
    identity = export_fingerprint(plan, fingerprint)
    try:
        restore_interrupted(target)
    except OSError as error:
        raise unwritable(path, error) from error
    refuse_foreign(target, identity)
    refuse_unmerged(module)
    if plan is not None:
        check_applied(module, plan)
    weights = {name: _checked(name, value, dtype) for name, value in module.state_dict().items()}
    with atomic_folder(target) as partial:
        save_tensors(partial / _WEIGHTS, weights, {"format": "pt"})
        if plan is not None:
            plan.save(partial / _PLAN)
        marker = {
            "format_version": FORMAT_VERSION,
            "fingerprint": identity,
            "versions": {"lowrank_lit": __version__, "torch": str(torch.__version__)},
            "files": [*files_in(partial), MARKER],
        }
        (partial / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")


def load_module(module: nn.Module, path: _PathLike) -> RankPlan | None:
    """Load a folder of :func:`save_module` into a dense module, which gets the plan's layout.

    Args:
        module: Of the class and sizes of the one that was written; weights keep its dtypes.
        path: Of the folder.

    Returns:
        The plan, ``None`` where a dense module was written.

    Raises:
        ExportError: If a file is missing, truncated or of a newer format, or the weights are not the module's; of
            weights that do not fit some may have been loaded.
        PlanError: If the plan does not fit the module, which is then unchanged.
    """
    folder = Path(path)
    if not (folder / MARKER).is_file():
        raise ExportError(f"path='{path}' is no export of a module: it has no {MARKER}; give the folder of one")
    check_version(read_json(folder / MARKER).get("format_version"), MARKER)
    plan = RankPlan.load(folder / _PLAN) if (folder / _PLAN).exists() else None
    try:
        weights = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"weight file '{folder / _WEIGHTS}' is missing, truncated or no safetensors file ({error}); export the "
            "module again"
        ) from error
    if plan is not None:
        apply_plan(module, plan)
    own = module.state_dict()
    different = sorted(own.keys() ^ weights.keys())
    different += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if different:
        raise ExportError(
            f"'{different[0]}' is not the same in the module and in '{path}' ({len(different)} differ); make "
            "the module with the settings that it was exported with"
        )
    module.load_state_dict(weights)
    return plan


def _checked(name: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = value.to(dtype) if dtype is not None and value.is_floating_point() else value
    if cast.dtype not in DTYPES:
        raise ExportError(f"'{name}' is of type {cast.dtype}, which no safetensors file holds; register it otherwise")
    if cast.is_floating_point() and not bool(torch.isfinite(cast).all()):
        raise NonFiniteError(f"'{name}' holds a NaN or infinity, or does in {cast.dtype}; check the training")
    return cast
