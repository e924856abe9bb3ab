"""Safetensors files that prove their own content, and the statistics that an interrupted compression goes on from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_lit.collector import Calibration
from lowrank_lit.paging import release, save_tensors
from lowrank_lit.statistics import LayerStatistics, tensors_of

CALIBRATION_FILE = "calibration.safetensors"
_METADATA = "lowrank_lit"
_CONTENT = "content"


def content_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and values, in hexadecimal."""
    own = {key: value for key, value in metadata.items() if key != _CONTENT}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(raw)
        release([tensor])
    return digest.hexdigest()


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors, metadata and the hash of both; the file is complete or is not there.

    Raises:
        OSError: If the disk is full or read-only.
    """
    partial = file.with_name(f"{file.name}.part")
    try:
        # One entry alone, which any writer of the format puts down with the same bytes.
        values = {**metadata, _CONTENT: content_hash(tensors, metadata)}
        save_tensors(partial, tensors, {_METADATA: json.dumps(values, sort_keys=True)})
        os.replace(partial, file)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What :func:`write_tensors` wrote, not yet compared with its hash.

    Raises:
        OSError: If there is no such file; or ValueError, or safetensors' own error, where it is damaged.
    """
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = json.loads((opened.metadata() or {}).get(_METADATA, "{}"))
        return {key: opened.get_tensor(key) for key in opened.keys()}, metadata  # noqa: SIM118


def is_intact(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether tensors and metadata are those that were written."""
    return metadata.get(_CONTENT) == content_hash(tensors, metadata)


def save_calibration(file: Path, identity: str, calibration: Calibration) -> None:
    """Write statistics. A disk that is full or read-only costs a warning.

    Args:
        file: Replaced where it is there.
        identity: Of the model, the text and what was collected.
        calibration: A moment that layers share is written once.
    """
    from safetensors import SafetensorError

    tensors: dict[str, Tensor] = {}
    key_of: dict[int, str] = {}
    layers: dict[str, Any] = {}
    for name, entry in calibration.statistics.items():
        moments = tensors_of(entry)
        for field, value in moments.items():
            key = key_of.setdefault(id(value), f"{name}.{field}")
            tensors.setdefault(key, value.contiguous())
        numbers = {field.name: getattr(entry, field.name) for field in fields(entry) if field.name not in moments}
        layers[name] = [numbers, {field: key_of[id(value)] for field, value in moments.items()}]
    rest = [calibration.importance, calibration.tokens, calibration.mode, list(calibration.notes)]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, tensors, {"identity": identity, "layers": json.dumps(layers), "rest": json.dumps(rest)})
    except (OSError, SafetensorError) as error:
        warnings.warn(
            f"the statistics could not be kept in '{file.parent}' ({error}); a run that is interrupted will calibrate "
            "again",
            stacklevel=2,
        )


def load_calibration(file: Path, identity: str) -> Calibration | None:
    """The statistics that :func:`save_calibration` wrote; ``None`` where there are none of this identity, with a
    warning where they are damaged."""
    from safetensors import SafetensorError

    if not file.is_file():
        return None
    try:
        tensors, metadata = read_tensors(file)
        if metadata.get("identity") != identity:
            return None
        if not is_intact(tensors, metadata):
            raise ValueError("their content does not match the hash kept with them")
        importance, tokens, mode, notes = json.loads(metadata["rest"])
        statistics = {}
        for name, (numbers, moments) in json.loads(metadata["layers"]).items():
            values: dict[str, Any] = {**numbers, **{field: tensors[key] for field, key in moments.items()}}
            statistics[name] = LayerStatistics(**values)
    except (OSError, ValueError, SafetensorError) as error:
        warnings.warn(f"the kept statistics in '{file}' cannot be read ({error}); calibrating again", stacklevel=2)
        return None
    return Calibration(statistics, importance, tokens, mode, tuple(notes))
