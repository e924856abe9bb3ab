"""Taking a merge back: the record of what was merged, and the unmerged model from it.

A merged factor is the sum of the factor and its adapter, rounded. The record keeps the adapter and those entries that
rounding would not give back, so that merged minus adapter is the unmerged factor to the last bit; where these are many,
or the method is no sum (DoRA, MiSS) or had rewritten the factor (PiSSA, OLoRA, CorDA), it keeps the factor itself. Of a
quantised factor the dequantised values come back, in the dtype that the merge gave it.

A record is a folder: ``unmerge.safetensors``, and ``unmerge.json`` with the SHA-256 of every factor before and after
the merge and of the tensors, written last.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_lit.errors import ExportError, ModelError
from lowrank_lit.linalg import to_double

_TENSORS, _RECORD = "unmerge.safetensors", "unmerge.json"
_FORMAT = 1
# A position and a value take up to three times the bytes of an entry; and sums on another machine differ by rounding.
_MOST_CORRECTIONS = 1 / 4
_MARGIN = 2.0**-40


@dataclass
class UnmergeRecord:
    """What is needed to take a merge back, on the CPU: an entry of plain values and some tensors for every factor."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(
        self, name: str, unmerged: Tensor, merged: Tensor, adapter: tuple[Tensor, Tensor, float] | None = None
    ) -> None:
        """Add one factor.

        Args:
            name: Of the factor in the model that the record will be applied to.
            unmerged: Its weight (out, in) without the adapter.
            merged: The same with it, of the same dtype.
            adapter: ``a`` (l, in), ``b`` (out, l) and scale of a merge that added ``scale b a``; ``None`` for others.
        """
        before, after = unmerged.detach().cpu(), merged.detach().cpu()
        entry: dict[str, Any] = {
            "kind": "values",
            "dtype": str(after.dtype).removeprefix("torch."),
            "shape": list(after.shape),
            "merged": _hash(after),
            "unmerged": _hash(before),
        }
        self.entries[name] = entry
        if adapter is not None:
            a, b, scale = adapter[0].detach().cpu(), adapter[1].detach().cpu(), adapter[2]
            positions = _not_given_back(after, before, a, b, scale)
            if len(positions) <= _MOST_CORRECTIONS * after.numel():
                entry |= {"kind": "sum", "scale": scale}
                self.tensors |= {f"{name}.a": a, f"{name}.b": b, f"{name}.positions": positions}
                self.tensors[f"{name}.values"] = before.reshape(-1)[positions.long()]
                return
        self.tensors[f"{name}.values"] = before.clone()

    def save(self, folder: Path) -> None:
        """Write the record.

        Raises:
            ExportError: If the folder cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        partial, written = folder / f"{_TENSORS}.part", folder / f"{_RECORD}.part"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / _RECORD).unlink(missing_ok=True)
            save_file({name: value.contiguous().clone() for name, value in self.tensors.items()}, partial)
            digest = _file_hash(partial)
            os.replace(partial, folder / _TENSORS)
            record = {"format": _FORMAT, "tensors": digest, "factors": self.entries}
            written.write_text(json.dumps(record, indent=1), encoding="utf-8")
            os.replace(written, folder / _RECORD)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"the record of the merge cannot be written to '{folder}' ({error})") from error


@torch.no_grad()
def unmerge(model: nn.Module, folder: Path | str) -> int:
    """Take a merge back, in place: every factor is what it was before there were adapters, to the last bit.

    Nothing is changed before every factor has been verified, before and after.

    Args:
        model: The merged model, in the dtype that it was merged in.
        folder: Where the record of the merge was written.

    Returns:
        How many factors were changed.

    Raises:
        ExportError: If the record is missing, damaged, or of a newer format.
        ModelError: If the model is not the one that was merged.
    """
    entries, tensors = _read(Path(folder))
    modules = dict(model.named_modules())
    weights: dict[str, Tensor] = {}
    for name, entry in entries.items():
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ModelError(
                f"the {type(model).__name__} has no factor '{name}' of the record in '{folder}'; give the merged model "
                "itself, such as module.model"
            )
        found = {"dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)}
        if found != {key: entry[key] for key in found}:
            raise ModelError(
                f"factor '{name}' ({found['dtype']} {found['shape']}) is not the one that was merged ({entry['dtype']} "
                f"{entry['shape']}) by the record in '{folder}'; give the merged model as it was, in its dtype"
            )
        digest = _hash(weight.detach().cpu())
        if digest == entry["unmerged"] != entry["merged"]:
            raise ModelError(f"factor '{name}' is what it was before the merge: the record in '{folder}' is taken back")
        if digest != entry["merged"]:
            raise ModelError(
                f"factor '{name}' has other values than the one that was merged by the record in '{folder}': it was "
                "trained further, or rounded by an export in 16 bits; give the model of the fit, or of an export with "
                "ExportOnFitEnd.dtype=float32"
            )
        weights[name] = weight
    values = {name: _unmerged(name, weights[name].detach().cpu(), entry, tensors) for name, entry in entries.items()}
    for name, value in values.items():
        if _hash(value) != entries[name]["unmerged"]:
            raise ExportError(f"the record in '{folder}' does not give factor '{name}' back; it is damaged")
    for name, value in values.items():
        weights[name].copy_(value)
    return len(values)


@torch.no_grad()
def merge_again(model: nn.Module, folder: Path | str) -> int:
    """Add the adapters of a merge to a model that does not have them, in place and in the dtype of its factors.

    Args:
        model: The model as it was before the merge, such as an export of the compression.
        folder: Where the record of the merge was written.

    Returns:
        How many factors were changed.

    Raises:
        ExportError: If the record is missing, damaged or of a newer format, or keeps factors in place of adapters.
        ModelError: If the model has not the factors of the record.
    """
    entries, tensors = _read(Path(folder))
    modules = dict(model.named_modules())
    for name, entry in entries.items():
        if entry["kind"] != "sum":
            raise ExportError(
                f"the record in '{folder}' keeps factor '{name}' itself and not its adapter; give the folder of the "
                "recovered model"
            )
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, Tensor) or list(weight.shape) != entry["shape"]:
            raise ModelError(
                f"the {type(model).__name__} has no factor '{name}' of shape {entry['shape']}, which the record in "
                f"'{folder}' has; give the record of this model's recovery"
            )
    for name, entry in entries.items():
        weight = modules[name].weight
        weight.copy_(_difference(weight.cpu(), tensors[f"{name}.a"], tensors[f"{name}.b"], -entry["scale"]))
    return len(entries)


def is_record(folder: Path | str) -> bool:
    """Whether a folder holds the record of a merge."""
    return (Path(folder) / _RECORD).is_file()


def _unmerged(name: str, merged: Tensor, entry: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    values = tensors[f"{name}.values"]
    if entry["kind"] == "values":
        return values
    result = _difference(merged, tensors[f"{name}.a"], tensors[f"{name}.b"], entry["scale"]).to(merged.dtype)
    result.view(-1)[tensors[f"{name}.positions"].long()] = values
    return result


def _difference(merged: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``merged - scale b a`` in float64."""
    return to_double(merged) - scale * (to_double(b) @ to_double(a))


def _not_given_back(merged: Tensor, unmerged: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Flat positions, int32 where they fit, of entries that the rounded difference might not give back anywhere."""
    exact = _difference(merged, a, b, scale)
    margin = _MARGIN * float(exact.abs().max())
    low, high = (exact - margin).to(unmerged.dtype), (exact + margin).to(unmerged.dtype)
    # Bits, not values: 0.0 equals -0.0.
    same = (_bits(low) == _bits(unmerged)) & (_bits(high) == _bits(unmerged))
    positions = (~same).reshape(-1).nonzero().reshape(-1)
    return positions.to(torch.int32) if same.numel() < 2**31 else positions


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def _hash(tensor: Tensor) -> str:
    raw: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        newer = record["format"] != _FORMAT
        intact = newer or _file_hash(folder / _TENSORS) == record["tensors"]
        tensors = load_file(folder / _TENSORS) if intact and not newer else {}
        entries: dict[str, dict[str, Any]] = record["factors"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ExportError(
            f"'{folder}' holds no readable record of a merge ({error}); give the folder of one"
        ) from error
    if newer:
        raise ExportError(f"the record in '{folder}' has format {record['format']}; this version reads {_FORMAT}")
    if not intact:
        raise ExportError(f"the tensors in '{folder}' are not those of their record; the folder is damaged")
    return entries, tensors
